import json
import math

import numpy as np
import pydantic
import pytest
import torch
from sklearn.neighbors import NearestCentroid

from fdkit.errors import DataError, NumericsError
from fdkit.evaluation import prototype
from fdkit.evaluation._statistics import bootstrap_interval
from fdkit.evaluation.features import Features
from fdkit.evaluation.prototype import PrototypeConfig, evaluate, ranks

METRICS = ("cosine", "centred-cosine", "euclidean")


def blobs(count: int, *, num_classes: int = 7, width: int = 5, seed: int = 0, noise: float = 1.5) -> Features:
    """Overlapping classes of unequal size, away from the origin, with vectors of very different lengths."""
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(num_classes, width)) + 0.7
    chances = np.arange(1, num_classes + 1) / np.arange(1, num_classes + 1).sum()
    labels = random.choice(num_classes, size=count, p=chances)
    values = centres[labels] + noise * random.normal(size=(count, width))
    values *= random.lognormal(sigma=0.7, size=(count, 1))
    classes = tuple(f"c{index}" for index in range(num_classes))
    return Features(
        torch.tensor(values, dtype=torch.float32), torch.tensor(labels), classes, {"source": "blobs"}
    )


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / math.sqrt(vector @ vector)


def naive_ranks(train: Features, test: Features, metric: str) -> list[int]:
    """One query and one class at a time."""
    bank, labels = train.values.double().numpy(), train.labels.numpy()
    shift = bank.mean(axis=0) if metric == "centred-cosine" else 0.0
    found = []
    for query, label in zip(test.values.double().numpy(), test.labels.tolist(), strict=True):
        nearness = []
        for number in range(len(train.classes)):
            own = bank[labels == number] - shift
            if metric == "euclidean":
                nearness.append(-math.dist(query, own.mean(axis=0)))
            else:
                mean = np.mean([unit(row) for row in own], axis=0)
                nearness.append(unit(query - shift) @ unit(mean))
        found.append(sum(value > nearness[label] for value in nearness))
    return found


@pytest.mark.parametrize("metric", METRICS)
def test_equals_a_naive_loop(metric):
    train, test = blobs(131), blobs(157, seed=1)
    expected = naive_ranks(train, test, metric)
    assert ranks(train, test, metric).tolist() == expected
    metrics = evaluate(train, test, PrototypeConfig(metric=metric))
    assert metrics["top1"] == sum(rank == 0 for rank in expected) / 157
    assert metrics["top5"] == sum(rank < 5 for rank in expected) / 157
    assert metrics["interval"] == list(bootstrap_interval(torch.tensor(expected) == 0))


def test_equals_scikit_learns_nearest_centroid():
    train, test = blobs(131), blobs(157, seed=1)
    oracle = NearestCentroid().fit(train.values.double().numpy(), train.labels.numpy())
    expected = oracle.predict(test.values.double().numpy()) == test.labels.numpy()
    assert np.array_equal((ranks(train, test, "euclidean") == 0).numpy(), expected)


def test_the_metrics_and_plausible_wrong_rules_answer_otherwise():
    train, test = blobs(131), blobs(157, seed=1)
    found = {metric: ranks(train, test, metric) for metric in METRICS}
    counts = torch.bincount(train.labels, minlength=7)
    means = torch.stack([train.values[train.labels == c].mean(0) for c in range(7)])
    plain_means = (
        torch.nn.functional.normalize(test.values, dim=1) @ torch.nn.functional.normalize(means, dim=1).T
    )
    sums = (
        torch.nn.functional.normalize(test.values, dim=1) @ (means * counts[:, None]).T
    )  # classes weighed by size
    answers = [found[metric] == 0 for metric in METRICS]
    answers += [scores.argmax(dim=1) == test.labels for scores in (plain_means, sums)]
    for k, one in enumerate(answers):
        for other in answers[:k]:
            assert not torch.equal(one, other)


def test_length_means_nothing_to_the_cosine_and_shifts_nothing_when_centred():
    train, test = blobs(131), blobs(157, seed=1)
    stretched = train._replace(values=train.values * torch.linspace(0.1, 9, 131)[:, None])
    assert torch.equal(ranks(stretched, test, "cosine"), ranks(train, test, "cosine"))
    assert not torch.equal(ranks(stretched, test, "euclidean"), ranks(train, test, "euclidean"))
    moved = [part._replace(values=part.values + 20) for part in (train, test)]
    assert torch.equal(ranks(*moved, "centred-cosine"), ranks(train, test, "centred-cosine"))
    assert not torch.equal(ranks(*moved, "cosine"), ranks(train, test, "cosine"))


@pytest.mark.parametrize("metric", METRICS)
def test_blocks_of_rows_join_up(monkeypatch, metric):
    train, test = blobs(131), blobs(157, seed=1)
    whole = ranks(train, test, metric)
    monkeypatch.setattr(prototype, "ROWS_AT_ONCE", 10)
    assert torch.equal(ranks(train, test, metric), whole)


@pytest.mark.parametrize("metric", METRICS)
def test_a_class_without_images_comes_last(metric):
    train, test = blobs(131), blobs(157, seed=1)
    names = (*train.classes[:3], "empty", *train.classes[3:])
    widened = [
        part._replace(labels=part.labels + (part.labels >= 3), classes=names) for part in (train, test)
    ]
    assert torch.equal(ranks(*widened, metric), ranks(train, test, metric))


def test_one_image_a_class_is_its_own_prototype():
    train = blobs(7)._replace(labels=torch.arange(7))
    assert evaluate(train, train, PrototypeConfig())["top1"] == 1.0


def test_of_equal_prototypes_the_lower_class_is_the_answer():
    values = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
    train = Features(values, torch.tensor([0, 1, 2]), ("a", "b", "c"), {})
    assert ranks(train, train, "cosine").tolist() == [0, 1, 0]


def test_identical_twice_from_a_file_and_as_json(tmp_path):
    train, test = blobs(131), blobs(157, seed=1)
    stored = np.memmap(tmp_path / "values", dtype=np.float32, mode="w+", shape=tuple(train.values.shape))
    stored[:] = train.values.numpy()
    file = train._replace(values=torch.from_numpy(stored))
    for metric in METRICS:
        config = PrototypeConfig(metric=metric)
        first = evaluate(train, test, config)
        assert json.loads(json.dumps(first, allow_nan=False)) == first
        assert evaluate(train, test, config) == evaluate(file, test, config) == first
    assert (first["evaluator"], first["metric"], first["train"]) == (
        "prototype",
        "euclidean",
        {"source": "blobs"},
    )


def test_refusals_name_the_value():
    train, test = blobs(90), blobs(30, seed=1)
    with pytest.raises(DataError, match="all 90 training images are of class c1"):
        evaluate(train._replace(labels=torch.ones(90, dtype=torch.int64)), test, PrototypeConfig())
    with pytest.raises(NumericsError, match="the 90 training features are all the same"):
        evaluate(train._replace(values=torch.ones(90, 5)), test, PrototypeConfig())
    test.values[:4, 0] = float("nan")
    with pytest.raises(NumericsError, match="4 of 30 test features are not finite"):
        evaluate(train, test, PrototypeConfig())
    with pytest.raises(pydantic.ValidationError):
        PrototypeConfig(metric="manhattan")
