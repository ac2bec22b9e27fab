"""What a report says of a run: what it was, how it went, and what its folder lacks."""

import json
import shlex
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from fdkit.data.json_file import read_object
from fdkit.report.figures import DISTILLATION_CURVES, training_curves
from fdkit.report.page import Column, Details, Drawing, Section, Table
from fdkit.report.training_curves import training_figure
from fdkit.training.progress import duration
from fdkit.training.run import read_metrics

EXPECTED = {
    "config.yaml": "the configuration",
    "run.json": "what was run and how it ended",
    "metrics.jsonl": "the training curves",
    "student.safetensors": "the student's weights",
    "student.json": "what builds the student",
}
"""Files of a run folder, and what a report has of them."""
STATES = {
    "done": "done",
    "running": "running, or ended without a word",
    "failed": "failed",
    "preempted": "interrupted and saved; continue it with --resume",
    "planned": "never started",
}
MAX_ROWS = 40
"""Of the table of metrics."""


class RunFolder(NamedTuple):
    """What is there of a run."""

    name: str
    path: Path
    facts: dict[str, Any]
    """Of run.json; empty where it cannot be read."""
    config: str
    rows: list[dict[str, Any]]
    """Of metrics.jsonl."""
    missing: list[str]
    """What is not there, or cannot be read, in words."""

    @property
    def command(self) -> str:
        """What was typed; "" where it is not known."""
        words = self.facts.get("command")
        if not isinstance(words, list) or not words:
            return ""
        return shlex.join(["fdkit", *(str(word) for word in words[1:])])


def read_run(name: str, path: Path) -> RunFolder:
    """A run folder as far as it is there."""
    missing = [f"{path / file}: {what}" for file, what in EXPECTED.items() if not (path / file).is_file()]
    facts, config, rows = _facts(path / "run.json", missing), "", []
    if (path / "config.yaml").is_file():
        config = (path / "config.yaml").read_text(encoding="utf-8", errors="replace")
    if (path / "metrics.jsonl").is_file():
        rows = read_metrics(path)
        if not _with_loss(rows):
            missing.append(f"{path / 'metrics.jsonl'}: holds no step with a loss")
    return RunFolder(name, path, facts, config, rows, missing)


def _facts(path: Path, missing: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return read_object(path)
    except (OSError, ValueError) as error:
        missing.append(f"{path}: cannot be read: {error}")
        return {}


def run_sections(runs: Sequence[RunFolder]) -> list[Section]:
    """What was run and how it went, of each run in turn."""
    sections: list[Section] = []
    for run in runs:
        heading = "What was run" if len(runs) == 1 else f"What was run: {run.name}"
        sections.append(_identity(run, heading))
        if _with_loss(run.rows):
            sections.append(_training(run, "Training" if len(runs) == 1 else f"Training: {run.name}"))
    return sections


def _identity(run: RunFolder, heading: str) -> Section:
    details = []
    if run.config:
        details.append(Details("The whole configuration (config.yaml)", run.config))
    if run.facts:
        details.append(Details("Everything recorded (run.json)", json.dumps(run.facts, indent=2)))
    words = [] if run.facts else ["The folder does not tell what was run."]
    return Section(heading, words, facts_of(run), code=run.command, details=details)


def facts_of(run: RunFolder) -> list[tuple[str, str]]:
    """Names and values of what a reader asks first; what is not known is left out."""
    facts = run.facts
    data, teacher, derived = (_mapping(facts.get(key)) for key in ("data", "teacher", "derived"))
    hardware, versions = _mapping(facts.get("hardware")), _mapping(facts.get("versions"))
    fingerprint = str(data.get("fingerprint", ""))[:12]
    sha256 = str(teacher.get("sha256") or "")[:12]
    found = [
        ("folder", str(run.path)),
        ("state", _state(facts)),
        ("method", str(facts.get("method", ""))),
        ("teacher", " · ".join(part for part in (str(teacher.get("source", "")), sha256) if part)),
        ("teacher's licence", _licence(teacher)),
        ("images", " · ".join(part for part in (str(data.get("name", "")), fingerprint) if part)),
        ("steps", _steps(facts, derived)),
        ("batch", str(derived.get("batch_size", ""))),
        ("precision", str(derived.get("precision", ""))),
        ("time", _time(run)),
        ("resumed", "" if not facts.get("resumes") else f"{facts['resumes']} times"),
        ("seed", str(facts.get("seed", ""))),
        ("hardware", _hardware(facts, hardware)),
        ("commit", str(facts.get("commit") or "")),
        ("versions", ", ".join(f"{name} {number}" for name, number in versions.items())),
    ]
    return [(name, value) for name, value in found if value]


def _with_loss(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows of steps whose loss was a number."""
    return [row for row in rows if row.get("loss") is not None]


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _state(facts: Mapping[str, Any]) -> str:
    state = str(facts.get("state", ""))
    words = STATES.get(state, state)
    reason = str(facts.get("reason") or "").partition("\n")[0]
    return f"{words}: {reason}" if reason and state != "done" else words


def _licence(teacher: Mapping[str, Any]) -> str:
    if not teacher.get("license"):
        return ""
    forbids = ": it forbids commercial use, of the student too" if teacher.get("is_noncommercial") else ""
    return f"{teacher['license']}{forbids}"


def _steps(facts: Mapping[str, Any], derived: Mapping[str, Any]) -> str:
    done, asked = facts.get("step"), derived.get("num_steps")
    if not isinstance(asked, int):
        return ""
    return f"{done:,} of {asked:,}" if isinstance(done, int) else f"{asked:,}"


def training_seconds(rows: Sequence[Mapping[str, Any]]) -> float:
    """Seconds that all parts of a run trained: a process counts from its own start, so they fall where one resumed."""
    seconds = [float(row["seconds"]) for row in rows if isinstance(row.get("seconds"), int | float)]
    ends = [one for one, following in pairwise([*seconds, 0.0]) if following < one]
    return sum(ends)


def _time(run: RunFolder) -> str:
    seconds = training_seconds(run.rows)
    started = str(run.facts.get("started") or "")
    try:
        words = f"from {datetime.fromisoformat(started):%Y-%m-%d %H:%M} UTC"
    except ValueError:
        words = ""
    return ", ".join(part for part in (f"{duration(seconds)} of training" if seconds else "", words) if part)


def _hardware(facts: Mapping[str, Any], hardware: Mapping[str, Any]) -> str:
    gpus = hardware.get("cuda")
    gpus = gpus if isinstance(gpus, list) else []
    parts = [
        ", ".join(map(str, gpus)),
        str(hardware.get("cpu", "")),
        f"{hardware['cpus']} CPUs" if hardware.get("cpus") else "",
    ]
    device = f"on {facts['device']}" if facts.get("device") else ""
    return ", ".join(part for part in (*parts, device) if part)


def _training(run: RunFolder, heading: str) -> Section:
    """Curves over epochs where the run tells of them, else over steps; and a table of the metrics."""
    training = _with_loss(run.rows)
    last = training[-1]
    words = [
        f"The last of {len(training):,} logged steps is step {last['step']:,}, with a loss of {last['loss']:.4g}."
    ]
    if (explained := last.get("explained_variance")) is not None:
        words = [f"{words[0][:-1]}; it explains {explained:.0%} of the variance of the targets."]
    drawing = Drawing(partial(_curves, run.rows), f"Training curves of {run.name}")
    return Section(
        heading, words, pictures=[drawing], details=[Details("The numbers", table=_metrics(training))]
    )


def _curves(rows: Sequence[Mapping[str, Any]], width: float) -> Any:
    if any(row.get("epoch") for row in rows):
        return training_figure(rows, width)
    return training_curves(rows, width, curves=DISTILLATION_CURVES[:1])


def _metrics(rows: Sequence[Mapping[str, Any]]) -> Table:
    """At most MAX_ROWS rows, evenly spread, the last among them."""
    stride = max(1, -(-len(rows) // MAX_ROWS))
    shown = [*rows[: len(rows) - 1 : stride], rows[-1]]
    columns = [
        Column("step", ",.0f"),
        Column("loss", ".4f"),
        Column("explained", ".1%"),
        Column("gradient norm", ".3g"),
        Column("learning rate", ".2g"),
        Column("images a second", ",.0f"),
    ]
    keys = ("step", "loss", "explained_variance", "grad_norm", "lr", "images_per_second")
    kept = [place for place, key in enumerate(keys) if any(row.get(key) is not None for row in shown)]
    return Table(
        [columns[place] for place in kept], [[row.get(keys[place]) for place in kept] for row in shown]
    )
