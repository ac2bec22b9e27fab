"""Whether a distillation helped: what is said of clear, reversed and unclear differences."""

import pytest
import torch

from fdkit.evaluation._comparison import Candidate, Measure, compare, table, verdict
from fdkit.evaluation._statistics import bootstrap_interval, paired_difference


def hits(share: float, count: int = 400) -> torch.Tensor:
    """Right on the first share of the images, so that better candidates are right wherever worse ones are."""
    return torch.arange(count) < share * count


def outcomes(**shares: float) -> dict[Candidate, dict[Measure, torch.Tensor]]:
    return {name: {"finetune": hits(share)} for name, share in shares.items()}  # type: ignore[misc]


def test_a_student_better_than_both_controls_has_helped() -> None:
    said = verdict(compare(outcomes(student=0.9, teacher=0.8, scratch=0.5)))
    assert said.startswith(
        "Distillation helped: fine-tuned, the student is 10.0 points better than its teacher"
    )
    assert "40.0 points better than its own network trained from scratch" in said


@pytest.mark.parametrize(
    ("teacher", "scratch", "words"),
    [
        (0.95, 0.5, "5.0 points worse than its teacher"),
        (0.8, 0.95, "5.0 points worse than its own network trained from scratch"),
        (0.9, 0.5, "do not differ beyond chance"),
    ],
)
def test_one_lost_control_is_enough_to_say_that_it_did_not_help(
    teacher: float, scratch: float, words: str
) -> None:
    said = verdict(compare(outcomes(student=0.9, teacher=teacher, scratch=scratch)))
    assert said.startswith("Distillation did not help: ")
    assert words in said


def test_frozen_features_decide_where_nothing_was_fine_tuned() -> None:
    found: dict[Candidate, dict[Measure, torch.Tensor]] = {
        "student": {"knn": hits(0.9), "logistic": hits(0.6)},
        "teacher": {"knn": hits(0.5), "logistic": hits(0.8)},
        "untrained": {"knn": hits(0.1), "logistic": hits(0.1)},
    }
    comparisons = compare(found)
    assert [(one.measure, one.control, one.outcome) for one in comparisons] == [
        ("knn", "teacher", "better"),
        ("logistic", "teacher", "worse"),
        ("knn", "untrained", "better"),
        ("logistic", "untrained", "better"),
    ]
    assert verdict(comparisons).startswith("Distillation did not help: frozen, by logistic regression")


def test_a_difference_within_its_interval_is_no_difference() -> None:
    a, b = hits(0.5), hits(0.5)
    a[0], b[1] = ~a[0], ~b[1]
    (one,) = compare({"student": {"knn": a}, "teacher": {"knn": b}})
    gap = paired_difference(a, b)
    assert (one.gap, one.outcome) == (gap, "equal")
    assert "do not differ beyond chance (+0.0 points; 95 % interval" in one.sentence()


def test_images_are_paired_so_a_small_sure_difference_is_seen() -> None:
    """2 % more of the same images: separate intervals overlap, the paired one does not hold 0."""
    found = outcomes(student=0.72, teacher=0.70)
    (one,) = compare(found)
    low, _ = bootstrap_interval(found["student"]["finetune"])
    _, high = bootstrap_interval(found["teacher"]["finetune"])
    assert low < high
    assert one.outcome == "better"


def test_the_table_has_a_row_a_candidate_with_intervals() -> None:
    rows = table(outcomes(student=0.9, teacher=0.8))
    assert [row["candidate"] for row in rows] == ["student", "teacher"]
    low, high = rows[0]["finetune"]["interval"]
    assert rows[0]["finetune"]["top1"] == pytest.approx(0.9)
    assert low < 0.9 < high


def test_nothing_compared_is_no_verdict() -> None:
    assert verdict([]).startswith("Nothing was compared")
