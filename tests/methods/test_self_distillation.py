import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from timm.layers import DropPath
from torch import Tensor, nn

from fdkit.methods._self_distillation import (
    Centre,
    SelfDistillationConfig,
    Targets,
    batches_by_size,
    build_head,
    centred_targets,
    cross_entropy_of_pairs,
    keep_prototypes,
    summed_cross_entropy,
    target_statistics,
    teacher_of,
    teacher_temperature,
)
from fdkit.models.libraries import build_timm

B, K = 3, 7


def random_scores(rows: int, seed: int = 0, num_prototypes: int = K) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, num_prototypes, generator=generator, dtype=torch.float64)


def targets_by_loops(scores: Tensor, centre: Tensor, temperature: float) -> list[list[float]]:
    """Each row's shares of exp((score - centre) / temperature)."""
    targets = []
    for row in scores.tolist():
        powers = [
            math.exp((s - c) / temperature) for s, c in zip(row, centre.flatten().tolist(), strict=True)
        ]
        targets.append([power / sum(powers) for power in powers])
    return targets


Pair = Callable[[int, int], bool]


def other_view(teacher: int, student: int) -> bool:
    return teacher != student


def loss_by_loops(
    scores: Tensor,
    targets: list[list[float]],
    *,
    num_views: int,
    temperature: float = 0.1,
    pair: Pair = other_view,
    divide_by: Callable[[int], int] = lambda num_pairs: num_pairs,
) -> float:
    """Equation 3: over pairs of a teacher's and another view, -sum p_t log p_s, each a mean over the images."""
    batch, total, num_pairs = len(scores) // num_views, 0.0, 0
    for i in range(2):
        for j in range(num_views):
            if not pair(i, j):
                continue
            num_pairs += 1
            for image in range(batch):
                row = [score / temperature for score in scores[j * batch + image].tolist()]
                log_sum = math.log(sum(math.exp(score) for score in row))
                target = targets[i * batch + image]
                total -= sum(p * (score - log_sum) for p, score in zip(target, row, strict=True)) / batch
    return total / divide_by(num_pairs)


# --- the targets


def test_targets_match_naive_loops() -> None:
    scores, centre = random_scores(2 * B), random_scores(1, seed=1)
    expected = torch.tensor(targets_by_loops(scores, centre, 0.5), dtype=torch.float64)
    torch.testing.assert_close(centred_targets(scores, centre, 0.5), expected)
    torch.testing.assert_close(centred_targets(scores, centre, torch.tensor(0.5).double()), expected)


def test_the_centre_is_subtracted_before_the_scores_are_sharpened() -> None:
    scores, centre = random_scores(B), random_scores(1, seed=1)
    right = centred_targets(scores, centre, 0.04)
    wrong = (scores / 0.04 - centre).softmax(dim=1)
    assert (right - wrong).abs().max() > 0.1


def test_scores_equal_to_the_centre_give_uniform_targets() -> None:
    centre = random_scores(1)
    torch.testing.assert_close(
        centred_targets(centre.repeat(B, 1), centre, 0.04), torch.full((B, K), 1 / K).double()
    )


def test_targets_do_not_know_the_offset_of_a_row_and_have_no_gradient() -> None:
    scores = random_scores(B).requires_grad_()
    targets = centred_targets(scores, torch.zeros(1, K), 0.1)
    assert not targets.requires_grad
    torch.testing.assert_close(centred_targets(scores + 3, torch.zeros(1, K), 0.1), targets)


def test_targets_of_half_precision_are_float32() -> None:
    targets = centred_targets(random_scores(B).bfloat16(), torch.zeros(1, K), 0.04)
    assert targets.dtype == torch.float32
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(B))


# --- the loss


@pytest.mark.parametrize("num_views", [2, 3, 6])
def test_the_loss_matches_naive_loops(num_views: int) -> None:
    scores, teacher = random_scores(num_views * B), random_scores(2 * B, seed=1)
    targets = targets_by_loops(teacher, torch.zeros(1, K), 0.5)
    expected = loss_by_loops(scores, targets, num_views=num_views)
    loss = cross_entropy_of_pairs(
        scores, torch.tensor(targets, dtype=torch.float64), num_views=num_views, temperature=0.1
    )
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def plain_loss(scores: Tensor, targets: Tensor, *, num_views: int, temperature: float) -> Tensor:
    """As it would be written first: one cross-entropy a pair, its gradient torch's own."""
    terms = [
        -(target * (row / temperature).log_softmax(dim=1)).sum(dim=1).mean()
        for i, target in enumerate(targets.chunk(2))
        for j, row in enumerate(scores.chunk(num_views))
        if i != j
    ]
    assert len(terms) == 2 * (num_views - 1)
    return torch.stack(terms).mean()


@pytest.mark.parametrize("num_views", [2, 4])
def test_loss_and_gradient_are_those_of_the_plain_form(num_views: int) -> None:
    targets = random_scores(2 * B, seed=1).softmax(dim=1)
    results = []
    for form in (plain_loss, cross_entropy_of_pairs):
        scores = random_scores(num_views * B).requires_grad_()
        loss = form(scores, targets, num_views=num_views, temperature=0.1)
        (3 * loss).backward()
        results.append((loss.detach(), scores.grad))
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-14)


def test_the_gradient_is_that_of_finite_differences() -> None:
    targets = random_scores(2 * B, seed=1).softmax(dim=1)

    def loss(scores: Tensor) -> Tensor:
        return cross_entropy_of_pairs(scores, targets, num_views=4, temperature=0.3)

    assert torch.autograd.gradcheck(loss, random_scores(4 * B).requires_grad_())


@pytest.mark.parametrize(
    "wrong",
    [
        {"pair": lambda i, j: True},  # a view is compared with itself
        {"pair": lambda i, j: j >= 2},  # large views are not compared with each other
        {"pair": lambda i, j: i < j},  # only one direction between the large views
        {"divide_by": lambda num_pairs: 16},  # mean over V * V
        {"divide_by": lambda num_pairs: 8},  # mean over 2 * V
        {"divide_by": lambda num_pairs: 1},  # a sum
        {"temperature": 1.0},
    ],
)
def test_a_wrong_but_plausible_loss_is_another_number(wrong: dict[str, Any]) -> None:
    scores = random_scores(4 * B)
    targets = targets_by_loops(random_scores(2 * B, seed=1), torch.zeros(1, K), 0.5)
    loss = cross_entropy_of_pairs(
        scores, torch.tensor(targets, dtype=torch.float64), num_views=4, temperature=0.1
    )
    assert loss.item() != pytest.approx(loss_by_loops(scores, targets, num_views=4, **wrong), rel=1e-3)


def test_the_loss_does_not_know_the_order_of_the_images_or_of_the_small_views() -> None:
    scores, targets = random_scores(4 * B), random_scores(2 * B, seed=1).softmax(dim=1)
    loss = cross_entropy_of_pairs(scores, targets, num_views=4, temperature=0.1)
    views, teachers = scores.view(4, B, K), targets.view(2, B, K)
    moved = cross_entropy_of_pairs(
        views.flip(1).flatten(0, 1), teachers.flip(1).flatten(0, 1), num_views=4, temperature=0.1
    )
    swapped = cross_entropy_of_pairs(views[[0, 1, 3, 2]].flatten(0, 1), targets, num_views=4, temperature=0.1)
    crossed = cross_entropy_of_pairs(views[[1, 0, 2, 3]].flatten(0, 1), targets, num_views=4, temperature=0.1)
    torch.testing.assert_close(torch.stack([moved, swapped]), torch.stack([loss, loss]))
    assert abs(crossed - loss) > 1e-3


@pytest.mark.parametrize(
    ("alike", "expected"), [(True, (10.1, 10.5)), (False, (11.0, 11.4))], ids=["same", "other inputs"]
)
def test_the_loss_at_the_start_is_about_the_logarithm_of_the_number_of_prototypes(
    alike: bool, expected: tuple[float, float]
) -> None:
    torch.manual_seed(0)
    head = build_head(32, SelfDistillationConfig())
    features = torch.randn(4, 32)
    with torch.no_grad():
        student = head(features)
        teacher = student if alike else head(torch.randn(4, 32))
        targets = centred_targets(teacher, torch.zeros(1, 65536), 0.04)
        loss = -(targets * (student / 0.1).log_softmax(dim=1)).sum(dim=1).mean()
        rows = torch.cat([student, student])
        ours = cross_entropy_of_pairs(rows, torch.cat([targets, targets]), num_views=2, temperature=0.1)
        even = cross_entropy_of_pairs(0 * rows, torch.cat([targets, targets]), num_views=2, temperature=0.1)
    assert ours.item() == pytest.approx(loss.item(), rel=1e-5)
    assert expected[0] < ours.item() < expected[1]
    assert even.item() == pytest.approx(math.log(65536), rel=1e-4)  # 11.09


def test_scores_of_half_precision_are_compared_in_float32() -> None:
    scores = random_scores(4 * B).bfloat16().requires_grad_()
    targets = random_scores(2 * B, seed=1).float().softmax(dim=1)
    loss = cross_entropy_of_pairs(scores, targets, num_views=4, temperature=0.1)
    loss.backward()
    exact = cross_entropy_of_pairs(scores.detach().double(), targets, num_views=4, temperature=0.1)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)
    assert scores.grad is not None
    assert scores.grad.dtype == torch.bfloat16


def test_targets_of_parts_are_asked_for_one_at_a_time() -> None:
    scores, rows = random_scores(5), random_scores(5, seed=1).softmax(dim=1)
    asked: list[int] = []

    def parts() -> Iterator[Targets]:
        for i in range(5):
            asked.append(i)
            yield Targets(2 * rows[i : i + 1], 2)

    total = summed_cross_entropy(scores, parts(), temperature=0.1)
    expected = -2 * (rows * (scores / 0.1).log_softmax(dim=1)).sum()
    torch.testing.assert_close(total, expected)
    assert asked == list(range(5))


def test_rows_without_targets_are_not_passed_over() -> None:
    with pytest.raises(AssertionError, match="targets for 2 of 5 rows"):
        summed_cross_entropy(random_scores(5), [Targets(random_scores(2), 1)], temperature=0.1)


# --- the centre


def test_the_centre_moves_by_a_tenth_of_the_mean_and_only_when_told() -> None:
    centre, scores = Centre(K, momentum=0.9).double(), random_scores(2 * B)
    centre.add(scores)
    assert torch.equal(centre.value, torch.zeros(1, K).double())
    centre.update()
    torch.testing.assert_close(centre.value, 0.1 * scores.mean(dim=0, keepdim=True))
    centre.add(scores)
    centre.update()
    torch.testing.assert_close(centre.value, 0.19 * scores.mean(dim=0, keepdim=True))


def test_the_centre_takes_parts_of_a_batch_as_the_whole() -> None:
    scores = random_scores(6)
    whole, parts = (Centre(K, momentum=0.9).double() for _ in range(2))
    whole.add(scores)
    for part in (scores[:2], scores[2:]):
        parts.add(part)
    for centre in (whole, parts):
        centre.update()
    torch.testing.assert_close(parts.value, whole.value)


def test_a_centre_without_news_stays() -> None:
    centre = Centre(K, momentum=0.9)
    centre.value.fill_(0.5)
    centre.update()
    assert torch.equal(centre.value, torch.full((1, K), 0.5))


def test_the_centre_of_a_constant_teacher_becomes_that_constant() -> None:
    constant = random_scores(1)
    centre = Centre(K, momentum=0.9).double()
    for _ in range(200):
        centre.add(constant.repeat(B, 1))
        centre.update()
    torch.testing.assert_close(centre.value, constant)
    targets = centred_targets(constant.repeat(B, 1), centre.value, 0.04)
    torch.testing.assert_close(targets, torch.full((B, K), 1 / K).double())


def test_the_centre_is_saved_and_nothing_else() -> None:
    centre = Centre(K, momentum=0.9)
    centre.add(random_scores(B).float())
    assert list(centre.state_dict()) == ["value"]
    assert not list(centre.parameters())


# --- schedules, heads, views and the teacher


def test_the_temperature_warms_up_by_the_epoch_and_ends_on_time() -> None:
    config = SelfDistillationConfig(teacher_temperature=0.07, warmup_teacher_temperature_epochs=4)
    values = [teacher_temperature(config, epoch) for epoch in range(6)]
    assert values == pytest.approx([0.04, 0.05, 0.06, 0.07, 0.07, 0.07])


@pytest.mark.parametrize(("num_epochs", "first"), [(0, 0.07), (1, 0.04)])
def test_the_shortest_warm_ups(num_epochs: int, first: float) -> None:
    config = SelfDistillationConfig(teacher_temperature=0.07, warmup_teacher_temperature_epochs=num_epochs)
    assert [teacher_temperature(config, epoch) for epoch in range(2)] == [first, 0.07]


def test_the_head_is_the_configured_one() -> None:
    config = SelfDistillationConfig(
        output_dim=9, hidden_dim=6, bottleneck_dim=4, num_head_layers=2, head_norm=True, norm_last_layer=False
    )
    head = build_head(5, config)
    assert [type(layer).__name__ for layer in head.mlp] == ["Linear", "BatchNorm", "GELU", "Linear"]
    assert head.prototypes.weight.shape == (9, 4)
    assert head.prototypes.gain.requires_grad
    assert not build_head(5, SelfDistillationConfig(output_dim=9)).prototypes.gain.requires_grad


def test_scores_are_cosines_with_prototypes_of_length_1() -> None:
    torch.manual_seed(0)
    head = build_head(5, SelfDistillationConfig(output_dim=50, hidden_dim=8, bottleneck_dim=3))
    with torch.no_grad():
        head.prototypes.weight.mul_(torch.rand(50, 1) * 9)  # lengths do not count
        scores = head(10 * torch.randn(40, 5))
        own = head.prototypes(torch.eye(3))
    assert scores.abs().max() <= 1 + 1e-6
    torch.testing.assert_close(own.norm(dim=0), torch.ones(50))


def test_a_teacher_reads_the_learned_lengths_too() -> None:
    torch.manual_seed(0)
    config = SelfDistillationConfig(output_dim=9, hidden_dim=6, bottleneck_dim=4, norm_last_layer=False)
    head = build_head(5, config)
    with torch.no_grad():
        head.prototypes.gain.uniform_(0.5, 2)
    features = torch.randn(3, 5)
    torch.testing.assert_close(teacher_of(head)(features), head(features).detach())


def test_prototypes_lose_their_gradients_and_nothing_else_does() -> None:
    config = SelfDistillationConfig(output_dim=9, hidden_dim=6, bottleneck_dim=4, norm_last_layer=False)
    heads = [build_head(5, config) for _ in range(2)]
    for head in heads:
        head(torch.randn(3, 5)).square().sum().backward()
    keep_prototypes(heads)
    for head in heads:
        without = {name for name, parameter in head.named_parameters() if parameter.grad is None}
        assert without == {"prototypes.weight", "prototypes.gain"}


def test_views_of_one_size_are_one_batch_in_order() -> None:
    views = [torch.full((2, 3, size, size), float(i)) for i, size in enumerate((8, 8, 4, 4, 4))]
    large, small = batches_by_size(views)
    assert (large.shape, small.shape) == ((4, 3, 8, 8), (6, 3, 4, 4))
    assert small[:, 0, 0, 0].tolist() == [2, 2, 3, 3, 4, 4]
    assert len(batches_by_size(views[:2])) == 1


def test_a_teacher_is_an_equal_copy_of_its_own_that_drops_nothing() -> None:
    args = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 3, "num_heads": 2, "drop_path_rate": 0.5}
    student = build_timm("vit_tiny_patch16_224", args).train()
    teacher = teacher_of(student)
    for (name, own), (copied, parameter) in zip(
        student.named_parameters(), teacher.named_parameters(), strict=True
    ):
        assert (name, own.requires_grad, parameter.requires_grad) == (copied, True, False)
        assert torch.equal(own, parameter)
        assert own.data_ptr() != parameter.data_ptr()
    images = torch.rand(8, 3, 8, 8)
    assert teacher.training
    assert torch.equal(teacher.pooled(images, "cls"), teacher.pooled(images, "cls"))
    assert not torch.equal(student.pooled(images, "cls"), student.pooled(images, "cls"))
    assert max(part.drop_prob for part in student.modules() if isinstance(part, DropPath)) == 0.5


def test_a_teacher_of_batch_norms_normalises_by_its_batch() -> None:
    teacher = teacher_of(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train())
    assert teacher(torch.randn(6, 4)).mean(dim=0).abs().max() < 1e-6


# --- the collapses


def test_statistics_tell_both_collapses_from_health() -> None:
    uniform = target_statistics(torch.full((8, K), 1 / K))
    assert (uniform.entropy.item(), uniform.prototypes_used.item()) == pytest.approx((math.log(K), K))
    single = target_statistics(torch.eye(K)[:1].repeat(8, 1))
    assert (single.entropy.item(), single.prototypes_used.item()) == pytest.approx((0, 1))
    healthy = target_statistics(torch.eye(K))
    assert (healthy.entropy.item(), healthy.prototypes_used.item()) == pytest.approx((0, K))
