"""What was measured: the results that lie in run folders and folders of results, read for a page."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from fdkit.analysis.layer_knn import wilson_interval
from fdkit.data.json_file import parse_json
from fdkit.evaluation._metrics import hits_from_text
from fdkit.evaluation._statistics import paired_difference

MAX_RESULT_BYTES = 200_000_000
NAMES = {
    "knn": "kNN",
    "linear": "linear probe",
    "logistic": "logistic regression",
    "prototype": "nearest class mean",
    "zero-shot": "zero-shot",
    "low-shot": "few labels",
    "finetune": "fine-tuned",
}


class Evaluation(NamedTuple):
    """One accuracy of one model."""

    model: str
    measure: str
    """What was measured on which images, such as "kNN, k = 20, on test of photos"; equal words are compared."""
    top1: float
    """In [0, 1]."""
    low: float | None
    """Lower end of the 95 % interval over test images; None where it is not known."""
    high: float | None
    num_images: int | None
    fingerprint: str
    """Of the test images; hits of the same images are compared image by image."""
    hits: Tensor | None
    """(N,) bool, which test images were right."""
    command_line: str
    report_line: str = ""
    """The `fdkit report` that measured it, if one did."""


class Difference(NamedTuple):
    """How much better a model is than the first one, in [-1, 1]."""

    value: float
    low: float | None
    high: float | None
    is_paired: bool
    """Whether the same test images were compared one by one, which gives the narrower, exact interval."""


class Results(NamedTuple):
    """Everything that was found in some folders."""

    evaluations: list[Evaluation]
    analyses: dict[str, dict[str, Any]]
    """Numbers of each analysis, by its name, or trajectory-NAME along a run; the last where there are several."""
    comparisons: list[dict[str, Any]]
    """Numbers of `fdkit compare`."""
    others: list[tuple[str, dict[str, Any]]]
    """Results that have no accuracy to compare: model and numbers, such as those of a segmentation."""
    problems: list[str]
    """What could not be read, in words."""

    def models(self) -> list[str]:
        """What the models are called, in the order of the analysis that has most of them."""
        tables = [numbers.get("models") for numbers in self.analyses.values()]
        named = [
            [str(one.get("name")) for one in table if isinstance(one, dict)]
            for table in tables
            if isinstance(table, list)
        ]
        longest = max(named, key=len, default=[])
        return list(dict.fromkeys([*longest, *(one.model for one in self.evaluations)]))


def collect(folders: Sequence[tuple[str, Path]]) -> Results:
    """The results in each folder and in its results/; with each folder what its models are called, "" for their own.

    A file that cannot be read is told in `problems`; files that are no results are passed over.
    """
    found = Results([], {}, [], [], [])
    for name, folder in folders:
        for path in _files(folder):
            numbers = _read(path, found.problems)
            if numbers is not None:
                _sort_in(numbers, name, path, found)
    return found


def _files(folder: Path) -> Iterator[Path]:
    for place in (folder, folder / "results"):
        if place.is_dir():
            yield from sorted(path for path in place.glob("*.json") if path.is_file())


def _read(path: Path, problems: list[str]) -> dict[str, Any] | None:
    try:
        if path.stat().st_size > MAX_RESULT_BYTES:
            problems.append(f"{path}: {path.stat().st_size:,} bytes, too large for a result")
            return None
        numbers = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        problems.append(f"{path}: cannot be read: {error}")
        return None
    return numbers if isinstance(numbers, dict) else None


def _sort_in(numbers: dict[str, Any], name: str, path: Path, found: Results) -> None:
    try:
        if isinstance(numbers.get("analysis"), str):
            followed = f"-{numbers['of']}" if numbers["analysis"] == "trajectory" else ""
            found.analyses[numbers["analysis"] + followed] = numbers
        elif "verdict" in numbers and "candidates" in numbers:
            found.comparisons.append(numbers)
        elif "top1" in numbers:
            found.evaluations.append(_evaluation(numbers, name, path))
        elif "miou" in numbers or "evaluator" in numbers:
            found.others.append((name or _model_of(numbers, path), numbers))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        found.problems.append(f"{path}: is not the result it seems to be: {type(error).__name__}: {error}")


def _evaluation(numbers: dict[str, Any], name: str, path: Path) -> Evaluation:
    test = numbers.get("test", {})
    num_images = test.get("num_images", numbers.get("num_images"))
    interval = numbers.get("interval") or numbers.get("top1_interval")
    if interval is None and num_images:
        interval = wilson_interval(round(numbers["top1"] * num_images), num_images)
    low, high = interval or (None, None)
    text = numbers.get("hits")
    return Evaluation(
        model=name or _model_of(numbers, path),
        measure=_measure_of(numbers, path),
        top1=float(numbers["top1"]),
        low=low,
        high=high,
        num_images=num_images,
        fingerprint=str(test.get("fingerprint", numbers.get("fingerprint", ""))),
        hits=hits_from_text(text, num_images) if text and num_images else None,
        command_line=str(numbers.get("command_line", "")),
        report_line=str(numbers.get("report_line", "")),
    )


def _model_of(numbers: dict[str, Any], path: Path) -> str:
    named = numbers.get("shown_name") or numbers.get("command", {}).get("model")
    return str(named or path.parent.parent.name)


def _measure_of(numbers: dict[str, Any], path: Path) -> str:
    """In words: the evaluator, what it was set to, and the images."""
    evaluator = numbers.get("evaluator") or path.stem.partition("-")[0]
    words = NAMES.get(evaluator, evaluator)
    if "k" in numbers:
        words += f", k = {numbers['k']}"
    if protocol := numbers.get("named_protocol"):
        words += f", protocol {protocol.get('name', '')}"
    command = numbers.get("command", {})
    if command.get("data"):
        words += f", {command.get('split', 'test')} of {Path(str(command['data'])).name or command['data']}"
    return words


def difference(one: Evaluation, reference: Evaluation) -> Difference:
    """How much better `one` is than the reference on the same measure.

    Where both say which images they had right, of the same images, they are resampled together; otherwise the two
    intervals are put together as those of independent shares (Newcombe 1998, method 10), which is too wide for models
    measured on the same images.
    """
    gap = one.top1 - reference.top1
    is_paired = (
        one.hits is not None
        and reference.hits is not None
        and one.fingerprint == reference.fingerprint != ""
        and len(one.hits) == len(reference.hits)
    )
    if is_paired:
        assert one.hits is not None
        assert reference.hits is not None
        found = paired_difference(one.hits, reference.hits)
        return Difference(found.difference, found.low, found.high, True)
    if one.low is None or one.high is None or reference.low is None or reference.high is None:
        return Difference(gap, None, None, False)
    below = ((one.top1 - one.low) ** 2 + (reference.high - reference.top1) ** 2) ** 0.5
    above = ((one.high - one.top1) ** 2 + (reference.top1 - reference.low) ** 2) ** 0.5
    return Difference(gap, gap - below, gap + above, False)
