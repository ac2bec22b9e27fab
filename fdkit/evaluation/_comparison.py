"""Whether a distilled student is better than what one would have had without distillation, on the same test images."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from torch import Tensor

from fdkit.evaluation._statistics import PairedDifference, bootstrap_interval, paired_difference

Candidate = Literal["student", "teacher", "untrained", "scratch"]
Measure = Literal["knn", "logistic", "finetune"]

MEASURES: dict[Measure, str] = {
    "knn": "frozen, by kNN",
    "logistic": "frozen, by logistic regression",
    "finetune": "fine-tuned",
}
CONTROLS: dict[Candidate, str] = {
    "teacher": "its teacher",
    "untrained": "its own untrained network",
    "scratch": "its own network trained from scratch on as many images",
}
DECISIVE: tuple[tuple[Measure, Candidate], ...] = (("finetune", "teacher"), ("finetune", "scratch"))
"""What a distillation that helped must win: without it, one would fine-tune the teacher or train from scratch."""
DECISIVE_FROZEN: tuple[tuple[Measure, Candidate], ...] = (("logistic", "teacher"),)
"""The same where nothing is fine-tuned."""


class Comparison(NamedTuple):
    """The student beside one control, by one measure."""

    measure: Measure
    control: Candidate
    gap: PairedDifference
    """Of the student over the control; shares of the test images."""

    @property
    def outcome(self) -> Literal["better", "worse", "equal"]:
        """Of the student; equal where the 95 % interval holds 0."""
        if self.gap.low > 0:
            return "better"
        return "worse" if self.gap.high < 0 else "equal"

    def sentence(self) -> str:
        """The comparison in words."""
        points = abs(100 * self.gap.difference)
        interval = f"95 % interval {100 * self.gap.low:+.1f} to {100 * self.gap.high:+.1f}"
        how, control = MEASURES[self.measure], CONTROLS[self.control]
        if (self.measure, self.control) == ("finetune", "teacher"):
            control += " fine-tuned directly"
        said = {
            "better": f"is {points:.1f} points better than {control}",
            "worse": f"is {points:.1f} points worse than {control}",
            "equal": f"and {control} do not differ beyond chance ({100 * self.gap.difference:+.1f} points)",
        }
        return f"{how}, the student {said[self.outcome]} ({interval})".replace(") (", "; ")


def compare(hits: Mapping[Candidate, Mapping[Measure, Tensor]], *, seed: int = 0) -> list[Comparison]:
    """The student beside every control, by every measure both have.

    hits: of each candidate and measure, (N,) bool, whether each test image was named right, in one order of images.
    """
    return [
        Comparison(measure, control, paired_difference(hits["student"][measure], of[measure], seed=seed))
        for control, of in hits.items()
        if control != "student"
        for measure in MEASURES
        if measure in of and measure in hits["student"]
    ]


def verdict(comparisons: list[Comparison]) -> str:
    """In one sentence, whether the distillation helped, and by what that is judged."""
    found = {(one.measure, one.control): one for one in comparisons}
    wanted = [pair for pair in DECISIVE if pair in found] or [
        pair for pair in DECISIVE_FROZEN if pair in found
    ]
    judged = [found[pair] for pair in wanted]
    if not judged:
        return "Nothing was compared that could show whether distillation helped."
    lost = [one for one in judged if one.outcome != "better"]
    if not lost:
        return "Distillation helped: " + "; ".join(one.sentence() for one in judged) + "."
    return "Distillation did not help: " + "; ".join(one.sentence() for one in lost) + "."


def table(hits: Mapping[Candidate, Mapping[Measure, Tensor]], *, seed: int = 0) -> list[dict[str, Any]]:
    """A row a candidate: "candidate", and of each measure "top1" and its 95 % "interval" over test images."""
    return [
        {"candidate": candidate}
        | {
            measure: {
                "top1": float(right.double().mean()),
                "interval": list(bootstrap_interval(right, seed=seed)),
            }
            for measure, right in of.items()
        }
        for candidate, of in hits.items()
    ]
