import json
import math

import numpy as np
import pydantic
import pytest
import torch
from sklearn.metrics import average_precision_score

from fdkit.errors import ConfigError, DataError, NumericsError
from fdkit.evaluation import retrieval
from fdkit.evaluation._statistics import bootstrap_interval
from fdkit.evaluation.features import Features
from fdkit.evaluation.retrieval import RetrievalConfig, evaluate, rank


def blobs(count: int, *, num_classes: int = 6, width: int = 5, seed: int = 0, noise: float = 1.2) -> Features:
    """Overlapping classes of unequal size with vectors of very different lengths."""
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(num_classes, width))
    chances = np.arange(1, num_classes + 1) / np.arange(1, num_classes + 1).sum()
    labels = random.choice(num_classes, size=count, p=chances)
    values = centres[labels] + noise * random.normal(size=(count, width))
    values *= random.lognormal(sigma=1.0, size=(count, 1))
    classes = tuple(f"c{index}" for index in range(num_classes))
    return Features(
        torch.tensor(values, dtype=torch.float32), torch.tensor(labels), classes, {"source": "blobs"}
    )


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / math.sqrt(a @ a) / math.sqrt(b @ b))


def naive(gallery: Features, queries: Features, *, within: bool) -> list[tuple[float, float, int]]:
    """(average precision, the same at R, images before the first relevant one), a query at a time."""
    bank, found = gallery.values.double().numpy(), []
    for row, query in enumerate(queries.values.double().numpy()):
        others = [other for other in range(len(bank)) if not (within and other == row)]
        others.sort(key=lambda other: -cosine(query, bank[other]))  # Python's sort keeps the order of equals
        hits = [int(gallery.labels[other]) == int(queries.labels[row]) for other in others]
        relevant = sum(hits)
        if relevant == 0:
            continue
        precisions = [
            (place, sum(hits[:place]) / place) for place in range(1, len(hits) + 1) if hits[place - 1]
        ]
        average = sum(precision for _, precision in precisions) / relevant
        at_r = sum(precision for place, precision in precisions if place <= relevant) / relevant
        found.append((average, at_r, hits.index(True)))
    return found


@pytest.mark.parametrize("gallery", ["test", "train"])
def test_equals_a_naive_loop(gallery):
    train, test = blobs(83), blobs(61, seed=1)
    bank = test if gallery == "test" else train
    expected = naive(bank, test, within=gallery == "test")
    metrics = evaluate(train, test, RetrievalConfig(gallery=gallery, k=(1, 3, 10)))
    assert metrics["map"] == pytest.approx(np.mean([row[0] for row in expected]), abs=1e-9)
    assert metrics["map@r"] == pytest.approx(np.mean([row[1] for row in expected]), abs=1e-9)
    for k in (1, 3, 10):
        assert metrics[f"recall@{k}"] == pytest.approx(np.mean([row[2] < k for row in expected]))
    assert metrics["num_queries"] == len(expected)
    values = torch.tensor([row[0] for row in expected], dtype=torch.float64)
    assert metrics["interval"] == pytest.approx(bootstrap_interval(values), abs=1e-9)


def test_average_precision_is_scikit_learns():
    train, test = blobs(83), blobs(61, seed=1)
    found = rank(train, test, within=False).average_precision
    similarity = (
        torch.nn.functional.normalize(test.values, dim=1)
        @ torch.nn.functional.normalize(train.values, dim=1).T
    )
    for row in range(61):
        relevant = (train.labels == test.labels[row]).numpy()
        assert found[row] == pytest.approx(
            average_precision_score(relevant, similarity[row].numpy()), abs=1e-9
        )


def test_measures_worked_by_hand():
    # From the query (class 0) the gallery lies at 10, 20, 30, 40 degrees with classes 0, 1, 0, 0.
    angles = torch.tensor([0.0, 10.0, 20.0, 30.0, 40.0]).deg2rad()
    values = (
        torch.stack([angles.cos(), angles.sin()], dim=1) * torch.tensor([3.0, 1.0, 5.0, 0.2, 7.0])[:, None]
    )
    gallery = Features(values[1:], torch.tensor([0, 1, 0, 0]), ("a", "b"), {})
    query = Features(values[:1], torch.tensor([0]), ("a", "b"), {})
    found = rank(gallery, query, within=False)
    assert found.average_precision.item() == pytest.approx((1 + 2 / 3 + 3 / 4) / 3)
    assert found.average_precision_at_r.item() == pytest.approx((1 + 2 / 3) / 3)
    assert found.first_relevant.tolist() == [0]


def test_plausible_wrong_measures_answer_otherwise():
    test = blobs(61, seed=1)
    right = rank(test, test, within=True).average_precision.mean()
    assert (
        abs(rank(test, test, within=False).average_precision.mean() - right) > 1e-2
    )  # an image finds itself
    unit = torch.nn.functional.normalize(test.values, dim=1)
    doubled = test._replace(values=torch.cat([unit, unit], 1))  # the same cosines
    assert rank(doubled, doubled, within=True).average_precision.mean() == pytest.approx(
        right.item(), abs=1e-6
    )
    metrics = evaluate(test, test, RetrievalConfig())
    assert len({metrics[key] for key in ("map", "map@r", "recall@1", "recall@5", "recall@10")}) == 5


def test_of_equal_similarities_the_lower_row_comes_first():
    values = torch.randint(-1, 2, (40, 3), generator=torch.Generator().manual_seed(1)).float()
    values[(values == 0).all(dim=1)] = 1.0
    values = torch.nn.functional.one_hot(values.abs().argmax(dim=1), 3).float()  # cosines of exactly 0 and 1
    test = Features(values, torch.arange(40) % 3, ("a", "b", "c"), {})
    found = rank(test, test, within=True)
    expected = naive(test, test, within=True)
    assert found.average_precision.tolist() == pytest.approx([row[0] for row in expected], abs=1e-12)
    assert found.first_relevant.tolist() == [row[2] for row in expected]


@pytest.mark.parametrize("gallery", ["test", "train"])
def test_blocks_of_queries_join_up_and_bound_memory(monkeypatch, gallery):
    train, test = blobs(83), blobs(61, seed=1)
    whole = evaluate(train, test, RetrievalConfig(gallery=gallery))
    monkeypatch.setattr(retrieval, "BLOCK_CPU", 200)
    sizes, original = [], retrieval._measures

    def watched(hits, relevant):
        sizes.append(hits.numel())
        return original(hits, relevant)

    monkeypatch.setattr(retrieval, "_measures", watched)
    assert evaluate(train, test, RetrievalConfig(gallery=gallery)) == whole
    assert max(sizes) <= 200
    assert len(sizes) > 20


def test_a_query_alone_in_its_class_is_left_out_and_counted():
    test = blobs(61, seed=1)
    alone = test._replace(
        labels=torch.cat([test.labels, torch.tensor([6, 7])]),
        values=torch.cat([test.values, -test.values[:2]]),
    )
    alone = alone._replace(classes=(*test.classes, "c6", "c7"))
    metrics = evaluate(test, alone, RetrievalConfig())
    assert (metrics["num_queries"], metrics["num_left_out"]) == (61, 2)
    assert metrics["map"] == pytest.approx(
        np.mean([row[0] for row in naive(alone, alone, within=True)]), abs=1e-9
    )
    train = blobs(83)
    kept = train.labels != 2
    train = train._replace(values=train.values[kept], labels=train.labels[kept])
    metrics = evaluate(train, test, RetrievalConfig(gallery="train"))
    assert metrics["num_left_out"] == int((test.labels == 2).sum()) > 0


def test_classes_of_a_gallery_train_are_matched_by_name_and_a_gallery_test_needs_no_train():
    train, test = blobs(83), blobs(61, seed=1)
    names = tuple(reversed(test.classes))
    renumbered = test._replace(labels=5 - test.labels, classes=names)
    config = RetrievalConfig(gallery="train")
    assert evaluate(train, renumbered, config)["map"] == evaluate(train, test, config)["map"]
    strangers = test._replace(classes=tuple(f"other-{name}" for name in test.classes))
    metrics = evaluate(train, strangers, RetrievalConfig())
    assert metrics["map"] == evaluate(train, test, RetrievalConfig())["map"]
    assert "train" not in metrics
    with pytest.raises(DataError, match="classes without training images: other-c0"):
        evaluate(train, strangers, config)


def test_identical_twice_from_a_file_and_as_json(tmp_path):
    train, test = blobs(83), blobs(61, seed=1)
    stored = np.memmap(tmp_path / "values", dtype=np.float32, mode="w+", shape=tuple(train.values.shape))
    stored[:] = train.values.numpy()
    file = train._replace(values=torch.from_numpy(stored))
    for config in (RetrievalConfig(), RetrievalConfig(gallery="train")):
        first = evaluate(train, test, config)
        assert json.loads(json.dumps(first, allow_nan=False)) == first
        assert evaluate(train, test, config) == evaluate(file, test, config) == first
    assert evaluate(file, file, RetrievalConfig()) == evaluate(train, train, RetrievalConfig())
    assert (first["evaluator"], first["gallery"], first["train"]) == (
        "retrieval",
        "train",
        {"source": "blobs"},
    )


def test_refusals_name_the_value():
    train, test = blobs(83), blobs(61, seed=1)
    with pytest.raises(ConfigError, match="recall at 61 is asked for, but the gallery holds 60 images"):
        evaluate(train, test, RetrievalConfig(k=(1, 61)))
    with pytest.raises(ConfigError, match="recall at 84 is asked for, but the gallery holds 83 images"):
        evaluate(train, test, RetrievalConfig(gallery="train", k=(84,)))
    evaluate(train, test, RetrievalConfig(k=(60,)))
    singles = blobs(6)._replace(labels=torch.arange(6))
    with pytest.raises(DataError, match="none of the 6 test images has another image of its class"):
        evaluate(train, singles, RetrievalConfig(k=(1,)))
    with pytest.raises(DataError, match="blobs has 61 test images and 0 labels"):
        evaluate(train, test._replace(labels=torch.empty(0, dtype=torch.int64)), RetrievalConfig())
    with pytest.raises(DataError, match="there are no test images"):
        evaluate(train, blobs(0), RetrievalConfig())
    with pytest.raises(NumericsError, match="the 61 test features are all the same"):
        evaluate(train, test._replace(values=torch.ones(61, 5)), RetrievalConfig())
    test.values[5, 1] = float("inf")
    for gallery in ("test", "train"):
        with pytest.raises(NumericsError, match="1 of 61 test features are not finite"):
            evaluate(train, test, RetrievalConfig(gallery=gallery))
    for wrong in ({"k": ()}, {"k": (0,)}, {"gallery": "val"}):
        with pytest.raises(pydantic.ValidationError):
            RetrievalConfig(**wrong)
