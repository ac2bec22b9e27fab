import json
import math
from pathlib import Path

import numpy as np
import pydantic
import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from sklearn.neighbors import KNeighborsClassifier

from fdkit.errors import ConfigError, DataError, NumericsError
from fdkit.evaluation import _search
from fdkit.evaluation.features import Features
from fdkit.evaluation.knn import KNNConfig, evaluate, nearest, predict


def blobs(
    num_images: int, *, num_classes: int = 7, width: int = 6, seed: int = 0, noise: float = 1.0
) -> Features:
    """Overlapping classes with vectors of very different lengths, so that k, T and the norm all matter."""
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(num_classes, width))
    labels = random.integers(num_classes, size=num_images)
    values = centres[labels] + noise * random.normal(size=(num_images, width))
    values *= random.lognormal(sigma=1.0, size=(num_images, 1))
    classes = tuple(f"c{index}" for index in range(num_classes))
    return Features(
        torch.tensor(values, dtype=torch.float32), torch.tensor(labels), classes, {"source": "blobs"}
    )


def naive_votes(train: Features, query: np.ndarray, k: int, temperature: float) -> np.ndarray:
    bank = train.values.double().numpy()
    similarity = [value @ query / math.sqrt(value @ value) / math.sqrt(query @ query) for value in bank]
    votes = np.zeros(len(train.classes))
    for index in sorted(range(len(similarity)), key=lambda i: -similarity[i])[:k]:
        votes[train.labels[index]] += math.exp(similarity[index] / temperature)
    return votes


def naive(train: Features, test: Features, k: int, temperature: float) -> tuple[list[int], float, float]:
    predictions, top5 = [], 0
    for query, label in zip(test.values.double().numpy(), test.labels.tolist(), strict=True):
        votes = naive_votes(train, query, k, temperature)
        predictions.append(int(votes.argmax()))
        top5 += label in [c for c in np.argsort(-votes)[:5] if votes[c] > 0]
    top1 = np.mean([p == t for p, t in zip(predictions, test.labels.tolist(), strict=True)])
    return predictions, float(top1), top5 / len(test.labels)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (23, 0.07), (23, 0.5), (60, 0.02)])
def test_equals_a_naive_loop(k, temperature):
    train, test = blobs(83), blobs(41, seed=1)
    predictions, top1, top5 = naive(train, test, k, temperature)
    assert predict(train, test.values, k=k, temperature=temperature).tolist() == predictions
    metrics = evaluate(train, test, KNNConfig(k=(k,), temperature=(temperature,)))
    assert (metrics["top1"], metrics["top5"]) == (pytest.approx(top1), pytest.approx(top5))


@pytest.mark.parametrize("k", [3, 20])
def test_equals_scikit_learn_with_the_same_weights(k):
    train, test = blobs(300, noise=1.5), blobs(200, seed=1, noise=1.5)
    oracle = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
    oracle.fit(train.values.double().numpy(), train.labels.numpy())
    expected = oracle.predict(test.values.double().numpy())
    assert np.array_equal(predict(train, test.values, k=k, temperature=0.07).numpy(), expected)


def test_plausible_wrong_rules_answer_otherwise():
    train, test = blobs(300, noise=1.5), blobs(200, seed=1, noise=1.5)
    right = predict(train, test.values, k=20, temperature=0.07)
    warmer = predict(train, test.values, k=20, temperature=0.1)
    unweighted = predict(train, test.values, k=20, temperature=1e6)
    index = (test.values @ train.values.T).topk(20).indices  # without normalisation
    unnormalised = torch.stack([torch.bincount(train.labels[row], minlength=7).argmax() for row in index])
    for wrong in (warmer, unweighted, unnormalised):
        assert (wrong != right).any()


def test_length_of_a_vector_means_nothing():
    train, test = blobs(90), blobs(30, seed=1)
    scaled = train._replace(values=train.values * torch.linspace(0.1, 50, 90)[:, None])
    config = KNNConfig(k=(1, 10, 40))
    assert evaluate(train, test, config)["results"] == evaluate(scaled, test, config)["results"]


def test_many_k_and_temperatures_at_once_equal_one_at_a_time():
    train, test = blobs(200, noise=2.0), blobs(150, seed=1, noise=2.0)
    together = evaluate(train, test, KNNConfig(k=(10, 3, 50), temperature=(0.07, 0.5)))
    assert [(row["k"], row["temperature"]) for row in together["results"]] == [
        (k, t) for k in (10, 3, 50) for t in (0.07, 0.5)
    ]
    for row in together["results"]:
        alone = evaluate(train, test, KNNConfig(k=(row["k"],), temperature=(row["temperature"],)))
        assert alone["results"] == [row]
    assert len({row["top1"] for row in together["results"]}) > 1


def test_headline_is_the_first_asked_and_not_the_best():
    train, test = blobs(200, noise=2.0), blobs(150, seed=1, noise=2.0)
    metrics = evaluate(train, test, KNNConfig(k=(1, 50)))
    assert metrics["results"][1]["top1"] > metrics["results"][0]["top1"]
    assert (metrics["k"], metrics["top1"]) == (1, metrics["results"][0]["top1"])
    assert metrics["evaluator"] == "knn"
    json.dumps(metrics)


@pytest.mark.parametrize("block", [1, 2, 7, 64, 1000])
def test_search_is_the_same_in_any_blocks(block):
    queries, bank = torch.randn(13, 5), torch.randn(101, 5)
    values, rows = nearest(queries, bank, 9, block=block)
    cosines = F.normalize(queries.double(), dim=1) @ F.normalize(bank.double(), dim=1).T
    expected = cosines.float().sort(dim=1, descending=True, stable=True)
    assert torch.equal(rows, expected.indices[:, :9])
    torch.testing.assert_close(values, expected.values[:, :9])


@pytest.mark.parametrize("block", [3, 8, 1000])
@pytest.mark.parametrize("k", [1, 4, 30])
def test_of_equally_near_images_the_first_come_first(block, k):
    # Few directions, most of them several times and at lengths that scaling leaves exact: ties are plentiful.
    random = torch.Generator().manual_seed(4)
    queries = torch.randint(0, 2, (17, 3), generator=random).double()
    bank = torch.randint(-1, 2, (40, 3), generator=random) * 2.0 ** torch.randint(
        -2, 3, (40, 1), generator=random
    )
    lengths = queries.norm(dim=1)[:, None] * bank.double().norm(dim=1)
    cosines = queries @ bank.double().T / lengths.clamp(min=1e-12)
    expected = cosines.float().sort(dim=1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(nearest(queries.float(), bank, k, block=block)[1], expected)


def test_blocks_of_queries_join_up(monkeypatch):
    train, test = blobs(90), blobs(41, seed=1)
    whole = evaluate(train, test, KNNConfig(k=(5,)))
    monkeypatch.setattr(_search, "CPU_BLOCKS", _search.Blocks(queries=4, bank=11, numbers=50))
    assert evaluate(train, test, KNNConfig(k=(5,))) == whole


def test_the_precision_of_the_search_is_reported_and_changes_nothing_else():
    train, test = blobs(400, noise=2.0, width=40), blobs(150, seed=1, noise=2.0, width=40)
    found = {name: evaluate(train, test, KNNConfig(k=(5, 20), search=name)) for name in ("fp32", "bf16")}
    assert found["fp32"].pop("search") == {"method": "fp32", "rechecked": 0}
    searched = found["bf16"].pop("search")
    assert searched["method"] == "bf16"
    assert 0 <= searched["rechecked"] < 150
    assert found["fp32"] == found["bf16"]
    auto = evaluate(train, test, KNNConfig(k=(5, 20)))
    assert auto["search"]["method"] == _search.resolve_method("auto", torch.device("cpu"))


def test_queries_searched_again_are_counted():
    train = blobs(400)
    near = train._replace(values=torch.eye(6)[:1] + 1e-6 * train.values / train.values.norm(dim=1)[:, None])
    both = near._replace(values=torch.where(torch.arange(400)[:, None] % 2 == 0, near.values, -near.values))
    test = near._replace(values=near.values[:9], labels=near.labels[:9])
    found = {name: evaluate(both, test, KNNConfig(search=name)) for name in ("fp32", "bf16")}
    assert found["fp32"]["results"] == found["bf16"]["results"]
    assert [found[name]["search"]["rechecked"] for name in found] == [9, 9]


def test_every_image_may_vote():
    train, test = blobs(30, noise=0.5), blobs(20, seed=1, noise=0.5)
    predictions, top1, _ = naive(train, test, 30, 0.07)
    assert predict(train, test.values, k=30, temperature=0.07).tolist() == predictions
    assert evaluate(train, test, KNNConfig(k=(30,)))["top1"] == pytest.approx(top1)


def test_one_class_is_always_right_and_has_no_top5():
    train, test = blobs(30, num_classes=1), blobs(20, num_classes=1, seed=1)
    metrics = evaluate(train, test, KNNConfig(k=(3,)))
    assert metrics["top1"] == 1.0
    assert "top5" not in metrics


def test_a_zero_vector_is_equally_near_to_all():
    train, test = blobs(30), blobs(20, seed=1)
    test.values[4] = 0
    votes = torch.bincount(train.labels[:5], minlength=7)
    assert predict(train, test.values, k=5, temperature=0.07)[4] == votes.argmax()


def test_features_that_are_not_finite_are_refused():
    train, test = blobs(30), blobs(20, seed=1)
    train.values[3, 0] = train.values[7, 1] = torch.nan
    with pytest.raises(NumericsError, match="2 of 30 training features are not finite"):
        evaluate(train, test, KNNConfig(k=(3,)))
    with pytest.raises(NumericsError, match="2 of 30 test features are not finite"):
        predict(test, train.values, k=3, temperature=0.07)


def one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    metrics = evaluate(blobs(83), blobs(41, seed=1), KNNConfig(k=(5, 60)), sharded=True)
    if rank == 1:  # alone, as a monitor in training is: nobody may be waited for
        metrics["alone"] = evaluate(blobs(83), blobs(41, seed=1), KNNConfig(k=(5, 60)))
    Path(folder, f"rank{rank}.json").write_text(json.dumps(metrics))
    torch.distributed.destroy_process_group()


@pytest.mark.distributed
def test_two_processes_equal_one(tmp_path):
    mp.spawn(one_rank, args=(str(tmp_path),), nprocs=2)
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    alone = ranks[1].pop("alone")
    assert alone == json.loads(json.dumps(evaluate(blobs(83), blobs(41, seed=1), KNNConfig(k=(5, 60)))))
    assert ranks[0] == ranks[1]
    assert {**ranks[0], "search": None} == {**alone, "search": None}


def test_low_temperatures_do_not_overflow():
    train, test = blobs(90), blobs(41, seed=1)
    coldest = predict(train, test.values, k=30, temperature=1e-4)
    assert torch.equal(coldest, predict(train, test.values, k=1, temperature=0.07))


def test_a_class_without_votes_is_no_top5_hit():
    train = blobs(7)._replace(labels=torch.arange(7), values=torch.eye(7))
    test = train._replace(values=torch.eye(7)[[6]], labels=torch.tensor([0]))
    metrics = evaluate(train, test, KNNConfig(k=(1,)))
    assert (metrics["top1"], metrics["top5"]) == (0.0, 0.0)


def test_classes_are_matched_by_name():
    train, test = blobs(90, noise=0.1), blobs(41, seed=1, noise=0.1)
    keep = test.labels > 0  # a test folder without class 0 numbers the others from 0
    shifted = Features(test.values[keep], test.labels[keep] - 1, test.classes[1:], {})
    assert evaluate(train, shifted, KNNConfig(k=(5,)))["top1"] == 1.0
    with pytest.raises(DataError, match="classes without training images: zebra"):
        evaluate(train, test._replace(classes=(*test.classes[:-1], "zebra")), KNNConfig())


def test_refusals_name_the_value():
    with pytest.raises(ConfigError, match="k is 91, but there are only 90 training images"):
        evaluate(blobs(90), blobs(10), KNNConfig(k=(5, 91)))
    with pytest.raises(ConfigError, match="widths 6 and 5"):
        evaluate(blobs(90), blobs(10, width=5), KNNConfig(k=(5,)))
    with pytest.raises(DataError, match="90 training and 0 test images"):
        evaluate(blobs(90), blobs(0), KNNConfig(k=(5,)))
    for wrong in ({"k": (0,)}, {"k": ()}, {"temperature": (0.0,)}, {"neighbours": 3}, {"search": "fp64"}):
        with pytest.raises(pydantic.ValidationError):
            KNNConfig(**wrong)
