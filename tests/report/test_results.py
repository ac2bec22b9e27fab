import json
from pathlib import Path

import pytest
import torch

from fdkit.evaluation._metrics import hits_to_text
from fdkit.evaluation._statistics import paired_difference
from fdkit.report.results import Evaluation, collect, difference


def write(folder: Path, name: str, numbers: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(numbers if isinstance(numbers, str) else json.dumps(numbers))


def hits(share: float, count: int = 200, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed)) < share


def knn(right: torch.Tensor, model: str = "demo", fingerprint: str = "abc", **more) -> dict:
    return {
        "evaluator": "knn",
        "k": 10,
        "top1": right.double().mean().item(),
        "hits": hits_to_text(right),
        "test": {"num_images": len(right), "fingerprint": fingerprint},
        "command": {"model": model, "data": "photos/flowers", "split": "test"},
        "command_line": f"fdkit evaluate knn {model} --data photos/flowers",
        **more,
    }


def test_results_of_every_kind_are_told_apart(tmp_path):
    write(tmp_path / "results", "knn-test.json", knn(hits(0.5)))
    write(tmp_path, "attention-distance.json", {"analysis": "attention-distance", "models": []})
    write(tmp_path, "compare.json", {"verdict": "It helped.", "candidates": []})
    write(tmp_path / "results", "segmentation-val.json", {"miou": 0.4, "command": {"model": "m"}})
    write(tmp_path / "results", "other.json", {"something": 1})
    write(tmp_path / "results", "list.json", [1, 2])
    found = collect([("", tmp_path)])
    assert [one.measure for one in found.evaluations] == ["kNN, k = 10, test of flowers"]
    assert [one.model for one in found.evaluations] == ["demo"]
    assert list(found.analyses) == ["attention-distance"]
    assert [one["verdict"] for one in found.comparisons] == ["It helped."]
    assert [model for model, _ in found.others] == ["m"]
    assert found.problems == []


def test_a_run_gives_its_name_to_its_results(tmp_path):
    write(tmp_path / "results", "knn-test.json", knn(hits(0.5), model="runs/a"))
    assert collect([("my student", tmp_path)]).evaluations[0].model == "my student"


def test_damaged_results_are_told_and_do_not_keep_others_away(tmp_path):
    write(tmp_path, "a.json", '{"analysis": "cka", ')
    write(tmp_path, "b.json", knn(hits(0.5)) | {"top1": "high"})
    write(tmp_path, "c.json", knn(hits(0.5)) | {"hits": "AAAA"})
    write(tmp_path, "d.json", knn(hits(0.5)))
    found = collect([("", tmp_path)])
    assert len(found.evaluations) == 1
    assert [Path(one.partition(":")[0]).name for one in found.problems] == ["a.json", "b.json", "c.json"]
    assert "cannot be read" in found.problems[0]
    assert "is not the result it seems to be" in found.problems[1]
    assert "do not hold a bit for each of 200 images" in found.problems[2]


def test_an_interval_that_is_not_stored_is_the_binomial_one(tmp_path):
    from scipy import stats

    right = hits(0.5)
    write(tmp_path, "a.json", knn(right))
    one = collect([("", tmp_path)]).evaluations[0]
    expected = stats.binomtest(int(right.sum()), 200).proportion_ci(0.95, method="wilson")
    assert (one.low, one.high) == pytest.approx((expected.low, expected.high))
    write(tmp_path, "a.json", knn(right, interval=[0.3, 0.7]))
    one = collect([("", tmp_path)]).evaluations[0]
    assert (one.low, one.high) == (0.3, 0.7)


def evaluation(right: torch.Tensor, **changes) -> Evaluation:
    share = right.double().mean().item()
    own = Evaluation("m", "kNN", share, share - 0.06, share + 0.07, len(right), "abc", right, "")
    return own._replace(**changes)


def test_differences_on_the_same_images_are_resampled_together():
    first, second = hits(0.6), hits(0.6) | hits(0.1, seed=3)
    found = difference(evaluation(second), evaluation(first))
    expected = paired_difference(second, first)
    assert found.is_paired
    assert (found.value, found.low, found.high) == (expected.difference, expected.low, expected.high)
    assert found.low > 0  # second has all that first has and more: a real difference


@pytest.mark.parametrize("changes", [{"hits": None}, {"fingerprint": "other"}, {"fingerprint": ""}], ids=str)
def test_otherwise_two_intervals_make_one_that_is_wider(changes):
    first, second = evaluation(hits(0.6)), evaluation(hits(0.6) | hits(0.1, seed=3))
    found = difference(second._replace(**changes), first)
    assert not found.is_paired
    gap = second.top1 - first.top1
    assert found.value == pytest.approx(gap)
    # Newcombe 1998, method 10: the square root of both halves' squares
    assert found.low == pytest.approx(gap - (0.06**2 + 0.07**2) ** 0.5)
    assert found.high == pytest.approx(gap + (0.07**2 + 0.06**2) ** 0.5)
    paired = difference(second, first)
    assert found.high - found.low > paired.high - paired.low


def test_without_intervals_there_is_a_difference_alone():
    found = difference(evaluation(hits(0.6), hits=None, low=None), evaluation(hits(0.5), hits=None))
    assert (found.low, found.high) == (None, None)
