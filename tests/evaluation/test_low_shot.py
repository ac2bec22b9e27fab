import hashlib
import json
import math

import numpy as np
import pydantic
import pytest
import torch
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid

from fdkit.errors import ConfigError, DataError, NumericsError
from fdkit.evaluation import prototype
from fdkit.evaluation.features import Features
from fdkit.evaluation.low_shot import LowShotConfig, draw, evaluate, fraction_of_each, shots_of_each


def blobs(count: int = 260, *, num_classes: int = 6, width: int = 8, seed: int = 0) -> Features:
    """Overlapping classes of unequal size, from about 12 images up."""
    random = torch.Generator().manual_seed(seed)
    centres = torch.randn(num_classes, width, generator=torch.Generator().manual_seed(99))
    labels = torch.multinomial(
        torch.arange(1, num_classes + 1).double(), count, replacement=True, generator=random
    )
    values = 0.5 + centres[labels] + 1.2 * torch.randn(count, width, generator=random)
    return Features(values, labels, tuple(f"c{index}" for index in range(num_classes)), {"source": "blobs"})


def sized(*counts: int) -> Features:
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))]
    values = torch.randn(len(labels), 3, generator=torch.Generator().manual_seed(2))
    return Features(values, labels, tuple(f"c{index}" for index in range(len(counts))), {})


def test_fractions_are_rounded_half_to_even_and_hold_one_of_each_class():
    labels = sized(250, 30, 25, 3, 1, 0, 1).labels
    expected = {
        0.01: [2, 1, 1, 1, 1, 0, 1],  # 2.5, 0.3, 0.25, 0.03, 0.01, none, 0.01
        0.1: [25, 3, 2, 1, 1, 0, 1],
        0.5: [125, 15, 12, 2, 1, 0, 1],
        1.0: [250, 30, 25, 3, 1, 0, 1],
    }
    assert {fraction: fraction_of_each(labels, fraction).tolist() for fraction in expected} == expected
    assert shots_of_each(sized(9, 1, 0, 4), 1).tolist() == [1, 1, 0, 1]


def test_draws_fill_the_quota_lie_within_each_other_and_depend_on_the_seed():
    labels = sized(20, 7, 11).labels
    few, more = (draw(labels, torch.tensor(wanted), 4) for wanted in ([2, 3, 1], [9, 3, 4]))
    assert torch.bincount(labels[few]).tolist() == [2, 3, 1]
    assert torch.bincount(labels[more]).tolist() == [9, 3, 4]
    assert set(few.tolist()) < set(more.tolist())
    assert few.tolist() == sorted(few.tolist())
    assert torch.equal(draw(labels, torch.tensor([2, 3, 1]), 4), few)
    assert not torch.equal(draw(labels, torch.tensor([2, 3, 1]), 5), few)


def test_every_image_is_drawn_as_often_as_any_other():
    labels = sized(6, 3).labels
    drawn = torch.zeros(9)
    for seed in range(600):
        drawn[draw(labels, torch.tensor([2, 1]), seed)] += 1
    assert stats.chisquare(drawn.numpy()).pvalue > 1e-3  # 200 each


def sklearn_top1(name: str, train: Features, rows: torch.Tensor, test: Features) -> float:
    values, labels = train.values[rows].double(), train.labels[rows].numpy()
    queries = test.values.double()
    if name == "logistic":
        mean, std = values.mean(0), (values.var(0, correction=0) + 1e-6).sqrt()
        values, queries = (values - mean) / std, (queries - mean) / std
        model = LogisticRegression(C=1.0, tol=1e-9, max_iter=10_000)
    elif name == "prototype":
        model = NearestCentroid()
    else:
        weights = lambda distance: np.exp((1 - distance) / 0.07)  # noqa: E731
        model = KNeighborsClassifier(3, metric="cosine", weights=weights)
    return model.fit(values.numpy(), labels).score(queries.numpy(), test.labels.numpy())


@pytest.mark.parametrize(
    ("name", "options"),
    [("logistic", {}), ("prototype", {"metric": "euclidean"}), ("knn", {"k": 3})],
)
def test_numbers_are_the_mean_of_scikit_learn_over_the_draws(name, options):
    train, test = blobs(), blobs(190, seed=1)
    config = LowShotConfig(fraction=(0.2,), shots=(5,), repeats=3, seed=7, classifier=name, **options)
    metrics = evaluate(train, test, config)
    quotas = {"20%": fraction_of_each(train.labels, 0.2), "5-shot": torch.full((6,), 5)}
    assert [row["subset"] for row in metrics["results"]] == ["20%", "5-shot"]
    for row in metrics["results"]:
        top1 = []
        for run, seed in zip(row["runs"], (7, 8, 9), strict=True):
            rows = draw(train.labels, quotas[row["subset"]], seed)
            assert len(rows) == row["num_images"]
            assert run["seed"] == seed
            assert run["fingerprint"] == hashlib.sha256(rows.numpy().astype("<i8").tobytes()).hexdigest()
            assert run["top1"] == pytest.approx(sklearn_top1(name, train, rows, test), abs=1e-12)
            top1.append(run["top1"])
        assert row["top1"] == pytest.approx(np.mean(top1))
        assert row["std"] == pytest.approx(np.std(top1, ddof=1))
        assert (row["min"], row["max"]) == (min(top1), max(top1))
        half = stats.t.ppf(0.975, 2) * np.std(top1, ddof=1) / math.sqrt(3)
        assert row["interval"] == pytest.approx([row["top1"] - half, row["top1"] + half])
    assert [row["num_images"] for row in metrics["results"]] == [int(quotas["20%"].sum()), 30]
    assert metrics["results"][0]["min"] < metrics["results"][0]["max"]


def test_all_of_train_is_no_draw_at_all():
    train, test = blobs(), blobs(190, seed=1)
    config = LowShotConfig(fraction=(1.0,), shots=(), repeats=2, classifier="prototype")
    row = evaluate(train, test, config)["results"][0]
    whole = prototype.evaluate(train, test, prototype.PrototypeConfig())
    assert (row["top1"], row["top5"], row["std"]) == (whole["top1"], whole["top5"], 0.0)


def test_headline_is_the_first_subset_and_a_single_draw_has_no_interval():
    metrics = evaluate(blobs(), blobs(190, seed=1), LowShotConfig(fraction=(), shots=(2, 5), repeats=1))
    first = metrics["results"][0]
    assert (metrics["subset"], metrics["num_images"], metrics["top1"]) == ("2-shot", 12, first["top1"])
    assert first["interval"] is None
    assert first["std"] is None
    assert metrics["protocol"] == {"repeats": 1, "seed": 0, "c": 1.0, "tolerance": 1e-6}
    assert (metrics["evaluator"], metrics["classifier"]) == ("low-shot", "logistic")
    assert first["runs"][0]["converged"]
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics


def test_settings_of_the_classifier_are_used():
    train, test = blobs(), blobs(190, seed=1)
    for one, other in (
        ({"c": 1e-4}, {"c": 10.0}),
        ({"classifier": "prototype"}, {"classifier": "prototype", "metric": "centred-cosine"}),
        ({"classifier": "knn"}, {"classifier": "knn", "k": 9}),
        ({"classifier": "knn", "k": 9}, {"classifier": "knn", "k": 9, "temperature": 5.0}),
    ):
        found = [
            evaluate(train, test, LowShotConfig(fraction=(), shots=(10,), repeats=3, **part))
            for part in (one, other)
        ]
        assert found[0]["top1"] != found[1]["top1"]


def test_stopping_early_is_said(caplog):
    with caplog.at_level("WARNING", "fdkit"):
        metrics = evaluate(
            blobs(), blobs(190, seed=1), LowShotConfig(fraction=(), shots=(5,), repeats=1, tolerance=1e-300)
        )
    assert not metrics["results"][0]["runs"][0]["converged"]
    assert "logistic regression on 30 images stopped at a gradient of" in caplog.text


def test_identical_twice_and_from_a_file(tmp_path):
    train, test = blobs(), blobs(190, seed=1)
    stored = np.memmap(tmp_path / "values", dtype=np.float32, mode="w+", shape=tuple(train.values.shape))
    stored[:] = train.values.numpy()
    file = train._replace(values=torch.from_numpy(stored))
    state = torch.get_rng_state()
    for classifier in ("logistic", "prototype", "knn"):
        config = LowShotConfig(fraction=(0.1,), shots=(1,), repeats=2, classifier=classifier)
        first = evaluate(train, test, config)
        assert evaluate(train, test, config) == evaluate(file, test, config) == first
        assert evaluate(train, test, config.model_copy(update={"seed": 1})) != first
    assert torch.equal(torch.get_rng_state(), state)


def test_refusals_name_the_value():
    train, test = blobs(), blobs(190, seed=1)
    few = sized(20, 4, 9)
    with pytest.raises(DataError, match="class c1 has 4 training images, fewer than the 5 a class asked for"):
        evaluate(few, sized(3, 2, 4), LowShotConfig(fraction=(), shots=(1, 5)))
    with pytest.raises(ConfigError, match="k is 7, but there are only 6"):
        evaluate(train, test, LowShotConfig(fraction=(), shots=(1,), classifier="knn", k=7))
    with pytest.raises(ConfigError, match="k is 5, but the classifier logistic does not read it"):
        LowShotConfig(k=5)
    with pytest.raises(ConfigError, match=r"c is 0\.5, but the classifier knn does not read it"):
        LowShotConfig(classifier="knn", c=0.5)
    with pytest.raises(ConfigError, match="fraction and shots are both empty"):
        LowShotConfig(fraction=(), shots=())
    for wrong in ({"fraction": (0.0,)}, {"fraction": (1.1,)}, {"shots": (0,)}, {"repeats": 0}):
        with pytest.raises(pydantic.ValidationError):
            LowShotConfig(**wrong)
    with pytest.raises(DataError, match="all 260 training images are of class c2"):
        evaluate(train._replace(labels=torch.full((260,), 2)), test, LowShotConfig())
    train.values[3, 2] = float("nan")
    with pytest.raises(NumericsError, match="1 of 260 training features are not finite"):
        evaluate(train, test, LowShotConfig())
