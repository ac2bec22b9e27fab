"""The page of `fdkit report`: what was run, how it went, what it is worth, what differs, and how to get it again."""

import json
import logging
from collections.abc import Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from fdkit import __version__
from fdkit.report.analysis_sections import analysis_sections, cannot_be_shown, numbers_command
from fdkit.report.drawing import with_pictures
from fdkit.report.figures import comparison_intervals
from fdkit.report.page import (
    MAX_PAGE_MEGABYTES,
    Column,
    Details,
    Drawing,
    Section,
    Table,
    write_page,
)
from fdkit.report.results import Evaluation, Results, difference
from fdkit.report.run_sections import RunFolder, facts_of, run_sections

log = logging.getLogger("fdkit")

LIGHT_FACTS = ("state", "teacher", "teacher's licence", "images", "commit")
"""Of a run, those that stand at the top of the page."""


class Report(NamedTuple):
    """Everything the page tells."""

    names: Sequence[str]
    """What the models are called; the first is the one that others are compared with."""
    runs: Sequence[RunFolder]
    results: Results
    left_out: Sequence[str]
    """What was asked for and could not be made, in words."""
    command_line: str
    """What makes this page again."""


def write_report(path: Path, report: Report) -> Path:
    """Write the page and return its path. Raises OutputError if it cannot be written."""
    problems = [*report.left_out, *report.results.problems]
    shown = [
        *run_sections(report.runs),
        *_accuracy_sections(report.results.evaluations, report.names),
        *_comparison_sections(report.results),
        *_other_sections(report.results),
        *analysis_sections(report.results.analyses, problems),
    ]
    drawn: list[Section] = []
    for section, one in zip(shown, with_pictures(shown), strict=True):
        if isinstance(one, Exception):
            problems.append(cannot_be_shown(section.heading, one, section.details[-1].text))
        else:
            drawn.append(one)
    sections = [*drawn, *_missing_sections(report, problems), _again_section(report)]
    write_page(path, _title(report), lead=_lead(report), sections=sections, facts=_facts(report))
    megabytes = path.stat().st_size / 1e6
    if megabytes > MAX_PAGE_MEGABYTES:
        log.warning(
            "%s has %.0f MB: fewer images or less of --max-megabytes in the attention viewer make it smaller",
            path,
            megabytes,
        )
    return path


def _title(report: Report) -> str:
    return " and ".join(report.names) if len(report.names) < 3 else f"{report.names[0]} and others"


def _lead(report: Report) -> str:
    """What is on the page, and its first result, in two sentences."""
    parts = []
    if report.runs:
        parts.append("one run" if len(report.runs) == 1 else f"{len(report.runs)} runs")
    if count := len(report.results.evaluations):
        parts.append("one accuracy" if count == 1 else f"{count} accuracies")
    if count := len(report.results.analyses):
        parts.append("one analysis" if count == 1 else f"{count} analyses")
    said = f"This page shows {', '.join(parts) or 'nothing yet'}."
    best = _first_difference(report.results.evaluations, report.names)
    return f"{said} {best}".strip()


def _first_difference(evaluations: Sequence[Evaluation], names: Sequence[str]) -> str:
    """The first comparison of two models, in a sentence; "" if there is none."""
    for measure, rows in _by_measure(evaluations, names):
        if len(rows) > 1:
            reference, one = rows[0], rows[1]
            gap = difference(one, reference)
            ends = _interval(gap.low, gap.high, sign="+")
            return (
                f"By {measure}, {one.model} reaches {one.top1:.1%} and {reference.model} {reference.top1:.1%}: "
                f"{100 * gap.value:+.1f} points" + (f" (95 % interval {ends})." if ends else ".")
            )
        return f"By {measure}, {rows[0].model} reaches {rows[0].top1:.1%}."
    return ""


def _facts(report: Report) -> list[tuple[str, str]]:
    """Of a single run what matters first; of several their states."""
    if len(report.runs) == 1:
        found = dict(facts_of(report.runs[0]))
        shown = [(name, found[name]) for name in LIGHT_FACTS if name in found]
    else:
        shown = [(run.name, dict(facts_of(run)).get("state", "no run.json")) for run in report.runs]
    return [*shown, ("fdkit", __version__)]


def _by_measure(
    evaluations: Sequence[Evaluation], names: Sequence[str]
) -> list[tuple[str, list[Evaluation]]]:
    """Evaluations of equal measures together, in the order of the models; measures of many models first."""
    order = {name: place for place, name in enumerate(names)}
    by_words = sorted(evaluations, key=lambda one: (one.measure, order.get(one.model, len(order)), one.model))
    groups = [(measure, list(rows)) for measure, rows in groupby(by_words, key=lambda one: one.measure)]
    return sorted(groups, key=lambda group: -len(group[1]))


def _accuracy_sections(evaluations: Sequence[Evaluation], names: Sequence[str]) -> list[Section]:
    groups = _by_measure(evaluations, names)
    if not groups:
        return []
    again = dict.fromkeys(one.command_line for one in evaluations if one.command_line)
    return [
        Section(
            "Accuracy",
            table=_accuracy_table(groups),
            pictures=_accuracy_drawings(evaluations, names),
            details=[Details("Make them again", "\n".join(again))] if again else [],
        )
    ]


def _accuracy_table(groups: Sequence[tuple[str, list[Evaluation]]]) -> Table:
    """A row an accuracy: its interval, and its difference to the first model of the same measure."""
    rows: list[list[str | float | None]] = []
    is_paired: set[bool] = set()
    for measure, ones in groups:
        for one in ones:
            gap = None if one is ones[0] else difference(one, ones[0])
            is_paired |= {gap.is_paired} if gap else set()
            own: list[str | float | None] = [measure, one.model, one.top1, _interval(one.low, one.high)]
            gap_cells: list[str | float | None] = (
                [100 * gap.value, _interval(gap.low, gap.high, sign="+")] if gap else [None, None]
            )
            rows.append([*own, *gap_cells, one.num_images])
    columns = [
        Column("measure"),
        Column("model"),
        Column("top-1", ".1%"),
        Column("95 % interval"),
        Column("difference (points)", "+.1f"),
        Column("its 95 % interval"),
        Column("test images", ",.0f"),
    ]
    return Table(columns, rows, _how_compared(is_paired))


def _interval(low: float | None, high: float | None, sign: str = "") -> str | None:
    """Both ends in percent."""
    return None if low is None or high is None else f"{100 * low:{sign}.1f} to {100 * high:{sign}.1f}"


def _how_compared(is_paired: set[bool]) -> str:
    words = "Intervals tell what another draw of test images would change, and nothing of another seed."
    if True in is_paired:
        words += " Differences are to the first model, on the same test images, resampled together."
    if False in is_paired:
        words += (
            " Where it is not known which images a model had right, the interval of a difference is made of the two"
            " intervals as if of separate images, which is too wide."
        )
    return words


def _accuracy_drawings(evaluations: Sequence[Evaluation], names: Sequence[str]) -> list[Drawing]:
    """Each accuracy with its interval, where those are known."""
    known = [one for one in evaluations if one.low is not None]
    models = list(dict.fromkeys([*names, *(one.model for one in known)]))
    rows = [
        (
            name,
            {
                one.measure: {"top1": one.top1, "interval": (one.low, one.high)}
                for one in known
                if one.model == name
            },
        )
        for name in models
    ]
    rows = [(name, row) for name, row in rows if row]
    return [Drawing(partial(comparison_intervals, rows), "Accuracies with their intervals")] if rows else []


def _comparison_sections(results: Results) -> list[Section]:
    """What `fdkit compare` said of a student and its controls."""
    sections = []
    for number, found in enumerate(results.comparisons, start=1):
        sentences = [str(one["sentence"]) for one in found.get("comparisons", []) if "sentence" in one]
        heading = (
            "Beside its controls" if len(results.comparisons) == 1 else f"Beside its controls ({number})"
        )
        rows: list[list[str | float | None]] = [[sentence] for sentence in sentences]
        table = Table([Column("each difference, on the same test images")], rows) if rows else None
        sections.append(Section(heading, [str(found["verdict"])], table=table))
    return sections


def _other_sections(results: Results) -> list[Section]:
    """Results without an accuracy to compare, each as its numbers."""
    if not results.others:
        return []
    details = [
        Details(f"{model}: {numbers.get('evaluator', 'result')}", json.dumps(_short(numbers), indent=2))
        for model, numbers in results.others
    ]
    measured: list[list[str | float | None]] = [
        [model, str(numbers.get("evaluator") or "segmentation"), numbers["miou"]]
        for model, numbers in results.others
        if isinstance(numbers.get("miou"), int | float)
    ]
    columns = [Column("model"), Column("measure"), Column("mIoU", ".1%")]
    return [Section("Other results", table=Table(columns, measured) if measured else None, details=details)]


def _short(numbers: dict[str, Any]) -> dict[str, Any]:
    """Without what only machines read."""
    return {key: value for key, value in numbers.items() if key not in {"command", "hits", "train", "test"}}


def _missing_sections(report: Report, problems: Sequence[str]) -> list[Section]:
    """What the reader might look for and not find."""
    missing = [*(one for run in report.runs for one in run.missing), *problems]
    if not report.results.evaluations:
        missing.append("accuracies: none were measured; fdkit evaluate knn MODEL --data PATH makes one")
    if not report.results.analyses:
        missing.append("analyses: none were made; fdkit report RUN --data PATH makes them")
    if not missing:
        return []
    rows: list[list[str | float | None]] = [[one] for one in missing]
    return [Section("What is missing", table=Table([Column("not on this page, and why")], rows))]


def _again_section(report: Report) -> Section:
    """The commands, in the order in which they were run."""
    commands = [run.command for run in report.runs]
    commands += [one.report_line or one.command_line for one in report.results.evaluations]
    commands += [
        str(numbers.get("report_line") or numbers_command(numbers))
        for numbers in report.results.analyses.values()
    ]
    unique = list(dict.fromkeys(command for command in [*commands, report.command_line] if command))
    words = ["Everything on this page, from the first command to the page itself."]
    return Section("Make it again", words, code="\n".join(unique))
