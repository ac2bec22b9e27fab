import json
import math
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from fdkit.errors import ConfigError, DataError, NumericsError
from fdkit.evaluation._draws import validation_split
from fdkit.evaluation._probe import Candidate
from fdkit.evaluation._probe_data import CachedImages, compare
from fdkit.evaluation._reading import Part
from fdkit.evaluation.features import Features
from fdkit.evaluation.linear import LinearConfig, choose, evaluate


def blobs(
    num_images: int, *, num_classes: int = 5, width: int = 6, seed: int = 0, noise: float = 1.0
) -> Features:
    """Overlapping classes; channels of very different means and scales, as features of networks have."""
    random = torch.Generator().manual_seed(seed)
    centres = torch.randn(num_classes, width, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(num_classes, (num_images,), generator=random)
    values = centres[labels] + noise * torch.randn(num_images, width, generator=random)
    values = values * torch.logspace(-1, 1, width) + torch.linspace(-3, 5, width)
    return Features(values, labels, tuple(f"c{index}" for index in range(num_classes)), {"source": "blobs"})


def fit(train: Features, candidates: list[Candidate], config: LinearConfig, rows: Tensor | None = None):
    """Weight (K, C, D) and bias (K, C) of the classifiers of the given rows of train, or of all."""
    every = torch.arange(len(train.labels)) if rows is None else rows
    (probe,) = CachedImages(train, ("all",), config).fit(candidates, every)
    return probe


def naive_scores(train: Features, candidate: Candidate, config: LinearConfig) -> torch.Tensor:
    """Scores of train by one head, trained by autograd and torch's own SGD on inputs that were standardised before."""
    values = (train.values - train.values.mean(0)) / (train.values.var(0, correction=0) + 1e-6).sqrt()
    head = torch.nn.Linear(values.shape[1], len(train.classes))
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    groups = [{"params": [head.weight], "weight_decay": candidate.weight_decay}, {"params": [head.bias]}]
    optimizer = torch.optim.SGD(groups, lr=candidate.lr, momentum=config.momentum)
    order, step = torch.Generator().manual_seed(config.seed), 0
    total = config.epochs * math.ceil(len(values) / config.train_batch_size)
    for _ in range(config.epochs):
        for rows in torch.randperm(len(values), generator=order).split(config.train_batch_size):
            for group in optimizer.param_groups:
                group["lr"] = candidate.lr * 0.5 * (1 + math.cos(math.pi * step / total))
            optimizer.zero_grad()
            F.cross_entropy(head(values[rows]), train.labels[rows]).backward()
            optimizer.step()
            step += 1
    return head(values).detach()


def test_cached_features_are_probed_as_by_autograd():
    train = blobs(53)
    config = LinearConfig(epochs=4, train_batch_size=16, seed=3)
    candidates = [Candidate(lr, decay) for decay in (0.0, 0.02) for lr in (1e-3, 5e-3, 2e-2)]
    found = fit(train, candidates, config).scores(train.values)
    for k, candidate in enumerate(candidates):
        expected = naive_scores(train, candidate, config)
        torch.testing.assert_close(found[:, k], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("normalization", ["standardize", "batch_norm", "none"])
def test_rows_are_probed_as_if_there_were_no_others(normalization):
    train, rows = blobs(60), torch.randperm(60)[:41].sort().values
    config = LinearConfig(epochs=2, train_batch_size=16, normalization=normalization)
    part = train._replace(values=train.values[rows], labels=train.labels[rows])
    found, expected = fit(train, [Candidate(0.01)], config, rows), fit(part, [Candidate(0.01)], config)
    torch.testing.assert_close(found.weight, expected.weight)
    torch.testing.assert_close(found.bias, expected.bias)


def test_a_candidate_that_diverges_is_not_chosen():
    train = blobs(60)
    config = LinearConfig(epochs=3, train_batch_size=16, normalization="none", lr=(1e38, 1e-3))
    choice = choose(train, config)
    assert choice.candidate == Candidate(1e-3)
    assert choice.candidates[0] == {
        "lr": 1e38,
        "weight_decay": 0.0,
        "inputs": "all",
        "validation_top1": None,
        "validation_loss": None,
    }
    with pytest.raises(NumericsError, match=r"diverged at every learning rate tried: 1e\+38, 2e\+38"):
        choose(train, config.model_copy(update={"lr": (1e38, 2e38)}))


def test_reaches_the_optimum_that_scikit_learn_finds():
    train, test = blobs(400), blobs(300, seed=1)
    decay = 0.01
    config = LinearConfig(epochs=1500, train_batch_size=400)
    probe = fit(train, [Candidate(0.5, decay)], config)
    mean, std = train.values.mean(0), train.values.std(0, correction=0)
    oracle = LogisticRegression(C=1 / (decay * len(train.values)), tol=1e-10, max_iter=2000)
    oracle.fit(((train.values - mean) / std).double().numpy(), train.labels.numpy())
    expected = torch.tensor(oracle.predict_proba(((test.values - mean) / std).double().numpy()))
    found = probe.scores(test.values)[:, 0].softmax(dim=1)
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=0)


def test_default_settings_do_as_well_as_scikit_learn():
    train, test = blobs(400), blobs(300, seed=1)
    oracle = LogisticRegression(max_iter=2000).fit(train.values.numpy(), train.labels.numpy())
    top1 = evaluate(train, test, LinearConfig())["top1"]
    assert top1 >= oracle.score(test.values.numpy(), test.labels.numpy()) - 0.02


@pytest.mark.parametrize("refit", [True, False])
def test_test_labels_cannot_influence_the_choice(refit):
    train, test = blobs(120, noise=2.0), blobs(80, seed=1, noise=2.0)
    config = LinearConfig(epochs=10, refit=refit)
    honest = evaluate(train, test, config)
    shuffled = test._replace(
        labels=test.labels[torch.randperm(80, generator=torch.Generator().manual_seed(5))]
    )
    blind = evaluate(train, shuffled, config)
    assert blind["top1"] < honest["top1"]
    for metrics in (honest, blind):
        for name in ("top1", "top5", "interval", "ece", "nll", "hits"):
            metrics.pop(name)
    assert blind == honest


def test_a_refit_that_diverges_is_an_error_and_not_an_accuracy(monkeypatch):
    fit_before = CachedImages.fit

    def diverges_on_all(self, candidates, rows):
        probes = fit_before(self, candidates, rows)
        return [p._replace(weight=p.weight * float("nan")) for p in probes] if len(rows) == 120 else probes

    monkeypatch.setattr(CachedImages, "fit", diverges_on_all)
    with pytest.raises(NumericsError, match="diverged on all of train"):
        choose(blobs(120), LinearConfig(epochs=1))


def test_refit_uses_every_training_image_and_no_refit_keeps_the_compared_head():
    train, config = blobs(120), LinearConfig(epochs=10, lr=(1e-6, 1e-2))
    rows = validation_split(train.labels, config.validation_ratio, seed=config.seed)[0]
    for refit, used in ((True, None), (False, rows)):
        chosen = choose(train, config.model_copy(update={"refit": refit})).probe
        expected = fit(train, [Candidate(1e-2)], config, used)
        torch.testing.assert_close(chosen.weight, expected.weight, rtol=1e-4, atol=1e-5)


def test_a_single_candidate_is_trained_once_on_all_images(monkeypatch):
    train, test, fitted = blobs(120), blobs(40, seed=1), []
    fit_before = CachedImages.fit
    monkeypatch.setattr(
        CachedImages, "fit", lambda self, c, rows: fitted.append(len(rows)) or fit_before(self, c, rows)
    )
    config = LinearConfig(epochs=3, lr=(0.01,))
    found = evaluate(train, test, config)
    assert fitted == [120]
    assert (found["lr"], found["candidates"], found["protocol"]["num_validation"]) == (0.01, [], 0)
    assert "validation_top1" not in found
    hits = (fit(train, [Candidate(0.01)], config).scores(test.values)[:, 0].argmax(1) == test.labels).float()
    assert found["top1"] == pytest.approx(float(hits.mean()))
    kept = evaluate(train, test, config.model_copy(update={"refit": False}))
    assert kept["protocol"]["num_validation"] > 0
    assert "validation_top1" in kept


def test_choice_is_the_best_on_validation_by_a_naive_count():
    train, config = blobs(300, noise=2.0), LinearConfig(epochs=10, lr=(1e-5, 1e-2, 20.0))
    fit_rows, validation_rows = validation_split(train.labels, 0.1, seed=0)
    choice = choose(train, config)
    for row in choice.candidates:
        scores = fit(train, [Candidate(row["lr"])], config, fit_rows).scores(train.values[validation_rows])[
            :, 0
        ]
        hits = sum(
            int(score.argmax()) == int(label)
            for score, label in zip(scores, train.labels[validation_rows], strict=True)
        )
        assert row["validation_top1"] == pytest.approx(
            hits / len(validation_rows), abs=1.01 / len(validation_rows)
        )
    best = max(choice.candidates, key=lambda row: (row["validation_top1"], -row["validation_loss"]))
    assert (choice.candidate.lr, choice.num_fit, choice.num_validation) == (
        best["lr"],
        len(fit_rows),
        len(validation_rows),
    )


def test_accuracy_decides_and_loss_among_equals(monkeypatch):
    found = {0.01: (0.6, 0.1), 0.1: (0.7, 0.9), 0.5: (0.7, 0.8), 1.0: (0.7, 0.8), 2.0: (None, None)}
    table = {
        Candidate(lr): {"validation_top1": top1, "validation_loss": loss}
        for lr, (top1, loss) in found.items()
    }
    monkeypatch.setattr(CachedImages, "compare", lambda *_: table)
    choice = choose(blobs(60), LinearConfig(epochs=1, lr=tuple(found)))
    assert choice.candidate == Candidate(0.5)
    assert [row["validation_loss"] for row in choice.candidates] == [loss for _, loss in found.values()]


def test_metrics_are_json_with_the_protocol():
    metrics = evaluate(
        blobs(120), blobs(40, seed=1), LinearConfig(epochs=3, lr=(0.01, 0.1), weight_decay=(0.0, 1e-3))
    )
    json.dumps(metrics, allow_nan=False)
    assert 0 <= metrics["top1"] <= metrics["top5"] == 1.0
    assert len(metrics["candidates"]) == 4
    assert metrics["protocol"]["num_fit"] + metrics["protocol"]["num_validation"] == 120
    assert metrics["train"] == {"source": "blobs"}
    assert metrics["protocol"]["normalization"] == "standardize"
    keys = ("lr", "weight_decay", "inputs", "validation_top1", "validation_loss")
    chosen = {key: metrics[key] for key in keys}
    assert chosen in metrics["candidates"]


def test_runs_are_repeatable_and_leave_the_global_generator_alone():
    train, test = blobs(120), blobs(40, seed=1)
    torch.manual_seed(1)
    first = evaluate(train, test, LinearConfig(epochs=3))
    state = torch.get_rng_state()
    torch.manual_seed(2)
    second = evaluate(train, test, LinearConfig(epochs=3))
    assert first == second
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)
    other = evaluate(train, test, LinearConfig(epochs=3, seed=1))
    assert other["candidates"] != first["candidates"]


def test_a_constant_channel_does_no_harm():
    train, test = blobs(120), blobs(40, seed=1)
    widened = [f._replace(values=F.pad(f.values, (0, 1), value=7.0)) for f in (train, test)]
    assert (
        evaluate(*widened, LinearConfig(epochs=5))["top1"]
        == evaluate(train, test, LinearConfig(epochs=5))["top1"]
    )


def test_split_is_stratified_and_complete():
    labels = torch.tensor([0] * 40 + [1] * 20 + [2] * 3 + [3])[torch.randperm(64)]
    fit_rows, validation_rows = validation_split(labels, 0.1, seed=0)
    assert sorted([*fit_rows.tolist(), *validation_rows.tolist()]) == list(range(64))
    assert torch.bincount(labels[validation_rows], minlength=4).tolist() == [4, 2, 1, 0]
    again = validation_split(labels, 0.1, seed=0)
    assert torch.equal(again[1], validation_rows)
    assert not torch.equal(validation_split(labels, 0.1, seed=1)[1], validation_rows)
    assert torch.bincount(labels[validation_split(labels, 0.99, seed=0)[0]]).tolist() == [1, 1, 1, 1]


def test_one_image_a_class_cannot_be_probed():
    train = blobs(5)._replace(labels=torch.arange(5))
    with pytest.raises(DataError, match="no class has two images among the 5 training images"):
        evaluate(train, blobs(9), LinearConfig())


def test_best_rate_at_the_edge_is_said(caplog):
    with caplog.at_level("WARNING", "fdkit"):
        choose(blobs(200), LinearConfig(epochs=2, lr=(1e-7, 1e-6, 1e-5)))
    assert "the best learning rate 1e-05 is the edge of those tried" in caplog.text


@pytest.mark.slow
def test_a_full_sweep_on_a_small_data_set_takes_seconds():
    train, test = blobs(3068, num_classes=10, width=192), blobs(300, num_classes=10, width=192, seed=1)
    start = time.perf_counter()
    evaluate(train, test, LinearConfig())
    assert time.perf_counter() - start < 60  # about 5 on one idle core


def test_comparisons_in_blocks_count_every_image_once(monkeypatch):
    monkeypatch.setattr(
        "fdkit.evaluation._probe_data.SCORED_AT_ONCE", 20
    )  # two images of two heads of five classes
    train = blobs(60, noise=2.0)
    probe = fit(train, [Candidate(0.01), Candidate(0.1)], LinearConfig(epochs=3))
    rows = torch.randperm(60)[:37]
    found = compare([probe], train.values, train.labels, rows)
    for k, candidate in enumerate(probe.candidates):
        scores = train.values[rows] @ probe.weight[k].T + probe.bias[k]
        expected = float(F.cross_entropy(scores, train.labels[rows]))
        assert found[candidate]["validation_loss"] == pytest.approx(expected, rel=1e-5)
        hits = int((scores.argmax(1) == train.labels[rows]).sum())
        assert found[candidate]["validation_top1"] == hits / 37


def tokens(num_images: int, seed: int = 0) -> Features:
    """Class tokens of two layers that tell nothing, and patches of the last that tell everything."""
    clear = blobs(num_images, seed=seed, noise=0.1)
    noise = torch.randn(num_images, 14, generator=torch.Generator().manual_seed(seed))
    names = [(-2, "cls", 4), (-2, "patches", 4), (-1, "cls", 6), (-1, "patches", 6)]
    parts, start = [], 0
    for layer, token, width in names:
        parts.append(Part(layer, token, start, start + width))
        start += width
    return clear._replace(values=torch.cat([noise, clear.values], dim=1), parts=tuple(parts))


def test_the_input_that_tells_most_is_chosen_and_alone_is_the_same():
    train, test = tokens(120), tokens(60, seed=1)
    config = LinearConfig(epochs=10, lr=(1e-3, 1e-2), inputs=("grid",))
    found = evaluate(train, test, config)
    names = ["cls", "cls:2", "cls+patches", "cls:2+patches"]
    assert [row["inputs"] for row in found["candidates"]] == [name for name in names for _ in range(2)]
    assert found["inputs"] in names[2:]
    assert found["top1"] > 0.85
    for name in names:
        alone = evaluate(train, test, config.model_copy(update={"inputs": (name,)}))
        rows = [row for row in found["candidates"] if row["inputs"] == name]
        for row, expected in zip(rows, alone["candidates"], strict=True):
            assert row["validation_top1"] == expected["validation_top1"]
            assert row["validation_loss"] == pytest.approx(expected["validation_loss"], rel=1e-5)
    blind = [row["validation_top1"] for row in found["candidates"] if "patches" not in row["inputs"]]
    assert max(blind) < 0.6


def test_features_in_a_file_give_the_same_numbers(tmp_path):
    train, test = blobs(120), blobs(40, seed=1)
    for name, features in (("train", train), ("test", test)):
        features.values.numpy().tofile(tmp_path / name)
    mapped = [
        f._replace(
            values=torch.from_numpy(np.memmap(tmp_path / name, np.float32, "r+", shape=f.values.shape))
        )
        for name, f in (("train", train), ("test", test))
    ]
    config = LinearConfig(epochs=5)
    assert evaluate(*mapped, config) == evaluate(train, test, config)


MEMORY = """
import resource, torch
import fdkit.evaluation._probe as probe
from fdkit.evaluation.features import Features
from fdkit.evaluation._draws import validation_split
from fdkit.evaluation.linear import LinearConfig, choose

torch.set_num_threads(1)
probe.READ_AT_ONCE = 1024
values = torch.randn(1, 4096).expand(20_000, 4096)  # 328 MB if it were ever copied
labels = torch.arange(20_000) % 2
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for normalization in ("standardize", "batch_norm", "none"):
    config = LinearConfig(epochs=1, train_batch_size=1024, lr=(0.1,), refit=False, normalization=normalization)
    choose(Features(values, labels, ("a", "b"), {}), config)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.slow
def test_features_are_never_copied_whole():
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 200  # a few blocks of 1024 rows, 17 MB each, some of them in float64


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"augment": "crop"}, "augment is crop, but these features are made already"),
        (
            {"inputs": ("cls",)},
            "inputs cls reads cls of layer -1, which was not extracted; there is one vector",
        ),
        (
            {"normalization": "batch_norm", "train_batch_size": 1},
            "needs two images a batch: train_batch_size 1 leaves",
        ),
        (
            {"normalization": "batch_norm", "train_batch_size": 53},
            "train_batch_size 53 leaves one of 107 alone",
        ),
    ],
)
def test_settings_that_do_not_fit_the_features_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        evaluate(blobs(107 if "53" in message else 40), blobs(9, seed=1), LinearConfig(**fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"augment": "crop", "crop_scale": (0.9, 0.2)}, r"crop_scale \(0.9, 0.2\) ends below its beginning"),
        ({"crop_boxes": "clipped"}, "crop_boxes has no effect without random crops"),
        ({"warmup_epochs": 200}, "warmup_epochs is 200, and the probe trains for 100 epochs in all"),
    ],
)
def test_fields_that_do_not_go_together_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        LinearConfig(**fields)


def test_one_class_and_damaged_features_are_refused():
    train, test = blobs(40), blobs(9, seed=1)
    with pytest.raises(DataError, match="all 40 training images are of class c3: nothing to tell apart"):
        evaluate(train._replace(labels=torch.full((40,), 3)), test, LinearConfig())
    damaged = train.values.clone()
    damaged[[4, 7], 2] = float("nan")
    with pytest.raises(NumericsError, match="2 of 40 training features are not finite, the first in row 4"):
        evaluate(train._replace(values=damaged), test, LinearConfig())
