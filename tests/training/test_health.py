"""Warnings and stops on made-up curves, and on small runs that really collapse, and others that do not."""

import copy
import json
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdkit.errors import NumericsError
from fdkit.models.representation import channel_std, effective_rank
from fdkit.training.health import (
    DIP,
    LOGGED,
    PATIENCE,
    SPIKE_HISTORY,
    SPIKE_MIN_HISTORY,
    SPIKE_QUIET_LINES,
    SPIKE_RATIO,
    Health,
    Spikes,
)

LINE = 10


def fed(gradients: list[float], name: str = "first_layer_grad_norm_max") -> tuple[Health, list[str]]:
    """A health that saw a line for each number, and what it said."""
    health, said = Health(steps_per_epoch=100), []
    for number, value in enumerate(gradients, 1):
        said += health.logged(LINE * number, {"loss": 1.0, "grad_norm": 9.0, name: value})
    return health, said


def wavy(count: int) -> list[float]:
    """Norms between 0.6 and 2.5 that fall slowly."""
    return [math.exp(0.5 * math.sin(2.4 * i) - 0.001 * i) * 1.5 for i in range(count)]


def test_a_spike_is_said_with_its_size_and_place() -> None:
    health, said = fed([0.5] * 20 + [7.5] + [0.5] * 20)
    assert said == [
        "gradient spike by step 210 (epoch 2.1): the first layer's gradient norm reached 7.5, 15 times the usual "
        "0.5; a fall of kNN accuracy may follow"
    ]
    assert health.last_spike == 210


def test_spikes_close_together_are_said_once() -> None:
    calm, spike = [1.0] * 20, 50.0
    cluster = [spike] + [1.0] * (SPIKE_QUIET_LINES - 1)
    assert len(fed(calm + cluster * 4)[1]) == 1
    assert len(fed(calm + [spike] + [1.0] * SPIKE_QUIET_LINES + [spike])[1]) == 2


def test_common_unrest_and_a_new_level_are_no_spikes() -> None:
    assert fed(wavy(300))[1] == []
    risen = [1.0] * 100 + [4.5] * 100 + [20.0] * 100
    assert fed(risen)[1] == []
    _, said = fed([1.0] * 100 + [20.0] * 100)
    assert len(said) == 1  # where it rises; then it is the usual


def test_a_warm_up_that_grows_is_no_spike() -> None:
    assert fed([0.01 * 1.2**i for i in range(60)])[1] == []


def test_the_first_lines_are_no_measure_of_the_usual() -> None:
    assert fed([0.1] * (SPIKE_MIN_HISTORY - 1) + [50.0])[1] == []
    assert len(fed([0.1] * SPIKE_MIN_HISTORY + [50.0])[1]) == 1


def test_the_norm_of_all_layers_is_watched_where_there_is_no_other() -> None:
    _, said = fed([1.0] * 20 + [40.0], name="grad_norm_max")
    assert "the gradient norm reached 40, 40 times" in said[0]
    health = Health(100)
    for step in range(1, 31):
        both = {"first_layer_grad_norm_max": 0.1, "grad_norm_max": 90.0 if step == 30 else 1.0}
        assert health.logged(step, both) == []


def test_norms_that_are_not_finite_or_zero_are_left_to_others() -> None:
    assert fed([math.inf, math.nan] * 20 + [1.0])[1] == []
    assert fed([0.0] * 30 + [1.0])[1] == []


def naive_spikes(values: list[float]) -> list[bool]:
    marks = []
    for place, value in enumerate(values):
        before = sorted(values[max(0, place - SPIKE_HISTORY) : place])
        middle = len(before) // 2
        enough = len(before) >= SPIKE_MIN_HISTORY
        usual = (before[middle] + before[-middle - 1]) / 2 if enough else math.inf
        usual = max(usual, sorted(values[place - 5 : place])[2]) if enough else math.inf
        marks.append(value > SPIKE_RATIO * usual)
    return marks


def test_spikes_stand_above_the_medians_of_the_lines_before() -> None:
    generator = torch.Generator().manual_seed(0)
    values = (1.6 * torch.randn(400, generator=generator)).exp().tolist()
    spikes = Spikes()
    found = [spikes.add(value) for value in values]
    assert [ratio is not None for ratio in found] == naive_spikes(values)
    assert 5 < sum(ratio is not None for ratio in found) < 100
    assert min(ratio for ratio in found if ratio is not None) > SPIKE_RATIO


def knn(health: Health, curve: dict[int, float]) -> list[str]:
    return [sentence for step, value in curve.items() for sentence in health.found(step, {"knn_top1": value})]


def test_a_dip_after_a_spike_says_what_it_means_and_what_helps() -> None:
    health = Health(100, can_freeze=True)
    assert knn(health, {400: 0.31, 800: 0.452}) == []
    for step in range(810, 1160, 10):
        health.logged(step, {"first_layer_grad_norm_max": 0.5})
    health.logged(1160, {"first_layer_grad_norm_max": 9.0})
    assert knn(health, {1200: 0.381}) == [
        "kNN fell from 45.2 % at step 800 to 38.1 % at step 1200 (epoch 12.0), after a gradient spike by step 1160: "
        "training is partly failing (Chen et al. 2021, section 4); freezing the patch projection "
        "(--network.freeze-patch-projection), a lower --optim.lr or a longer --optim.warmup-epochs helps"
    ]


def test_a_dip_without_a_spike_since_the_best_names_none() -> None:
    health = Health(100)
    for step in range(10, 400, 10):
        health.logged(step, {"first_layer_grad_norm_max": 9.0 if step == 390 else 0.5})
    assert health.last_spike == 390
    (sentence,) = knn(health, {400: 0.5, 800: 0.3})
    assert "spike" not in sentence
    assert "freeze" not in sentence


def test_a_dip_is_said_once_until_it_is_over() -> None:
    said = knn(Health(100), {100: 0.5, 200: 0.4, 300: 0.38, 400: 0.42, 500: 0.48, 600: 0.41})
    assert [sentence.split(" at step ")[2].split(" ")[0] for sentence in said] == ["200", "600"]


def test_small_falls_and_the_start_are_no_dips() -> None:
    assert knn(Health(100), {100: 0.5, 200: 0.5 - 0.9 * DIP, 300: 0.6, 400: 0.6 - 0.9 * DIP}) == []
    assert knn(Health(100), {0: 0.3, 100: 0.2, 200: 0.22}) == []


def test_a_slow_decline_is_told_as_well() -> None:
    """Chen et al. 2021, figure 3: with LAMB and a rate too high the curve is smooth and sinks in the middle."""
    said = knn(Health(100), {100 * i: 0.6 - 0.01 * abs(i - 10) for i in range(1, 20)})
    assert len(said) == 1
    assert "from 60.0 % at step 1000" in said[0]


def measured(spread: float, rank: float = 60.0) -> dict[str, float]:
    return {"channel_std_ratio": spread, "effective_rank": rank, "alignment": 0.2, "uniformity": -2.0}


def test_a_collapse_stops_the_run_at_its_second_sight() -> None:
    health = Health(100)
    for step, spread in ((0, 0.6), (100, 0.7), (200, 0.03)):
        assert health.found(step, measured(spread)) == []
    with pytest.raises(NumericsError, match=r"collapsed at step 300 \(epoch 3\.0\)") as caught:
        health.found(300, measured(0.02), kept="run/checkpoints/step-00000100")
    assert (
        "the spread of features over images, as a share of the most there can be is 0.02, was 0.7 at best, and has "
        "been as low 2 times in a row"
    ) in caught.value.message
    assert "--optim.lr" in caught.value.hint
    assert caught.value.hint.endswith("the last good checkpoint is kept: run/checkpoints/step-00000100")
    assert health.last_good_step == 100


def test_without_a_checkpoint_none_is_named() -> None:
    health = Health(100)
    health.found(0, measured(0.6))
    health.found(1, measured(0.01))
    with pytest.raises(NumericsError) as caught:
        health.found(2, measured(0.01))
    assert "checkpoint" not in caught.value.hint


def test_one_bad_measurement_is_forgiven() -> None:
    health = Health(100)
    for step in range(20):
        health.found(step, measured(0.01 if step % 2 else 0.6))
    assert health.last_good_step == 18


@pytest.mark.parametrize("start", [0.002, 0.02, 0.06])
def test_a_network_may_start_with_features_hardly_apart(start: float) -> None:
    """Deep random networks do; they stay a little below their start for a while before they learn."""
    health = Health(100)
    for step, share in enumerate((1, 0.8, 0.5, 0.4, 0.4, 0.6, 2, 5)):
        health.found(step, measured(start * share, rank=1.5))
    assert health.last_good_step == 7
    health.found(8, measured(start * 0.1, rank=1.5))
    with pytest.raises(NumericsError):
        health.found(9, measured(start * 0.1, rank=1.5))


def test_features_along_few_directions_are_a_collapse_though_they_spread() -> None:
    health = Health(100)
    for step, rank in enumerate((34.5, 6.4, 3.2, 2.2)):
        health.found(step, measured(0.37, rank))
    with pytest.raises(NumericsError, match=r"the number of directions that features take up is 2\.2"):
        health.found(4, measured(0.37, 2.2))


def test_a_low_rank_of_images_that_are_alike_is_no_collapse() -> None:
    health = Health(100)
    for step in range(10):
        health.found(step, measured(0.3, 1.6 if step else 2.8))
    assert health.last_good_step == 9


@pytest.mark.parametrize("name", sorted(LOGGED.keys() - {"target_information"}))
def test_what_methods_log_tells_a_collapse_too(name: str) -> None:
    health = Health(100)
    patience = LOGGED[name].patience
    health.logged(10, {name: 0.5})
    for line in range(patience - 1):
        health.logged(20 + line, {name: 0.004})
    assert health.last_good_step == 10
    with pytest.raises(NumericsError, match=f"has been as low {patience} times in a row"):
        health.logged(90, {name: 0.004})


@pytest.mark.parametrize("entropy", [0.001, math.log(300) - 0.001])
def test_prototypes_that_tell_nothing_of_an_image_are_a_collapse(entropy: float) -> None:
    """Whether all images share one prototype or each has a bit of all 300."""
    health = Health(100)
    health.logged(10, {"target_entropy": 2.0, "prototypes_used": 150.0})
    line = {"target_entropy": entropy, "prototypes_used": math.exp(entropy + 0.001)}
    for step in range(20, 19 + PATIENCE):
        health.logged(step, line)
    with pytest.raises(NumericsError, match=r"tells of an image, in nats, is 0\.001, was 3\.01 at best"):
        health.logged(19 + PATIENCE, line)
    assert health.last_good_step == 10


def test_sure_predictions_that_differ_between_images_are_none() -> None:
    health = Health(100)
    for step in range(10, 100):
        health.logged(step, {"target_entropy": 1.0 / step, "prototypes_used": 20.0})
    assert health.last_good_step == 99


def test_lines_do_not_vouch_for_what_the_monitor_has_not_seen() -> None:
    health = Health(100)
    health.logged(10, {"feature_std": 0.05})
    assert health.last_good_step == 10
    health.found(20, measured(0.6))
    health.logged(30, {"feature_std": 0.05})
    assert health.last_good_step == 20
    health.found(40, measured(0.01))
    health.logged(50, {"feature_std": 0.05})
    assert health.last_good_step == 20


def test_accuracy_alone_says_nothing_of_collapse() -> None:
    health = Health(100)
    health.found(10, {"knn_top1": 0.5})
    health.logged(10, {"loss": 1.0})
    assert health.last_good_step is None


def scenario(health: Health, first: int, last: int) -> list[str]:
    said: list[str] = []
    for step in range(first, last):
        spike = 40.0 if step in (31, 33, 60) else 1.0
        said += health.logged(step, {"first_layer_grad_norm_max": spike, "feature_std": 0.05})
        if step % 10 == 0:
            low = step in (40, 50)
            said += health.found(step, {"knn_top1": 0.3 if low else 0.5})
            said += health.found(step, measured(0.01 if low else 0.6))
            if step == 40:
                said += health.found(step, measured(0.6))
    return said


@pytest.mark.parametrize("cut", [5, 32, 34, 41, 55, 61])
def test_a_resumed_run_says_what_an_unbroken_one_says(cut: int) -> None:
    whole = Health(10)
    expected = scenario(whole, 0, 80)
    assert len(expected) == 3
    first = Health(10)
    said = scenario(first, 0, cut)
    second = Health(10)
    second.load(json.loads(json.dumps(first.state(), allow_nan=False)))
    said += scenario(second, cut, 80)
    assert said == expected
    assert second.state() == whole.state()


def test_a_fresh_state_is_plain_json() -> None:
    health = Health(10)
    health.load(json.loads(json.dumps(Health(10).state(), allow_nan=False)))
    assert knn(health, {10: 0.5, 20: 0.4}) == knn(Health(10), {10: 0.5, 20: 0.4})


# Small runs: 96 points in 12 dimensions, two noisy views of each, a network of two layers.

POINTS = torch.randn(96, 12, generator=torch.Generator().manual_seed(3))


def views(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    first, second = (POINTS + 0.2 * torch.randn(POINTS.shape, generator=generator) for _ in range(2))
    return first, second


def network(out: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, out))


@torch.no_grad()
def look(features: Tensor) -> dict[str, float]:
    return measured(
        float(channel_std(features)) * features.shape[1] ** 0.5, rank=float(effective_rank(features))
    )


def similarity(first: Tensor, second: Tensor) -> Tensor:
    return -F.cosine_similarity(first, second).mean()


def simsiam(*, stop_gradient: bool, predictor: bool) -> Health:
    """SimSiam; its guard, the stop-gradient, and its predictor are optional."""
    torch.manual_seed(0)
    trunk = network(16)
    bottleneck = nn.Sequential(nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 16))
    predict = bottleneck if predictor else nn.Identity()
    optimizer = torch.optim.SGD([*trunk.parameters(), *predict.parameters()], lr=0.3, momentum=0.9)
    health = Health(20)
    health.found(0, look(trunk(POINTS)))
    for step in range(1, 401):
        a, b = (trunk(view) for view in views(step))
        targets = (a.detach(), b.detach()) if stop_gradient else (a, b)
        loss = (similarity(predict(a), targets[1]) + similarity(predict(b), targets[0])) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            health.found(step, look(trunk(POINTS)))
    return health


@pytest.mark.parametrize("predictor", [True, False])
def test_simsiam_without_stop_gradient_is_stopped(predictor: bool) -> None:
    with pytest.raises(NumericsError, match="training has collapsed"):
        simsiam(stop_gradient=False, predictor=predictor)


def test_simsiam_with_its_guard_is_left_to_run() -> None:
    assert simsiam(stop_gradient=True, predictor=True).last_good_step == 400


def contrast() -> Health:
    """SimCLR's loss on the same points, which cannot collapse."""
    torch.manual_seed(0)
    trunk = network(16)
    optimizer = torch.optim.SGD(trunk.parameters(), lr=0.3, momentum=0.9)
    health = Health(20)
    health.found(0, look(trunk(POINTS)))
    for step in range(1, 201):
        a, b = (F.normalize(trunk(view), dim=1) for view in views(step))
        loss = F.cross_entropy(a @ b.T / 0.2, torch.arange(len(a)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            health.found(step, look(trunk(POINTS)))
    return health


def test_a_contrast_is_left_to_run() -> None:
    assert contrast().last_good_step == 200


def statistics(targets: Tensor) -> dict[str, float]:
    entropy = torch.special.entr(targets).sum(dim=1).mean()
    used = torch.special.entr(targets.mean(dim=0)).sum().exp()
    return {"target_entropy": entropy.item(), "prototypes_used": used.item()}


def dino(*, centre: bool, sharpen: bool) -> Health:
    """DINO on 24 prototypes; its targets are described as the method itself logs them."""
    torch.manual_seed(0)
    student = network(24)
    teacher = copy.deepcopy(student).requires_grad_(False)
    middle = torch.zeros(24)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.01)
    health = Health(20)
    for step in range(1, 301):
        pair = [view + 7 for view in views(step)]  # alike enough to end in one prototype
        scores = [teacher(view) for view in pair]
        temperature = 0.04 if sharpen else 1.0
        targets = [((score - middle) / temperature).softmax(dim=1) for score in scores]
        losses = [
            -(targets[i] * (student(pair[1 - i]) / 0.1).log_softmax(dim=1)).sum(dim=1).mean() for i in (0, 1)
        ]
        loss = (losses[0] + losses[1]) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
                slow.lerp_(fast, 0.05)
            if centre:
                middle.lerp_(torch.cat(scores).mean(dim=0), 0.1)
        if step % 10 == 0:
            health.logged(step, statistics(torch.cat(targets)))
    return health


@pytest.mark.parametrize(("centre", "sharpen"), [(False, True), (True, False)])
def test_dino_without_one_of_its_guards_is_stopped(centre: bool, sharpen: bool) -> None:
    with pytest.raises(NumericsError, match="the teacher's choice of prototypes"):
        dino(centre=centre, sharpen=sharpen)


def test_dino_with_both_guards_is_left_to_run() -> None:
    assert dino(centre=True, sharpen=True).last_good_step == 300


def constant(step: int) -> Tensor:
    return torch.ones(40, 6) if step > 30 else torch.randn(40, 6)


def dead(step: int) -> Tensor:
    return torch.zeros(40, 6) if step > 30 else torch.randn(40, 6)


@pytest.mark.parametrize("features", [constant, dead])
def test_constant_features_are_a_collapse(features: Callable[[int], Tensor]) -> None:
    health = Health(10)
    for step in range(0, 50, 10):
        health.found(step, look(features(step)))
    with pytest.raises(NumericsError, match="collapsed at step 50"):
        health.found(50, look(features(50)))
    assert health.last_good_step == 30
