"""The files of a run folder as they may be found: whole, damaged, or hardly begun."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from fdkit.errors import DistributedError

log = logging.getLogger("fdkit")

STATUS_FILE = "run.json"
FAILED = "failed_steps"
"""What run.json calls the steps at which the last attempts failed."""
LOCK_FILE = "lock"
CONFIG_FILE = "config.yaml"
_BEGINNINGS = {LOCK_FILE, CONFIG_FILE, f".{CONFIG_FILE}.partial", f".{STATUS_FILE}.partial"}


def kind_of(folder: Path) -> Literal["empty", "run", "other"]:
    """What a folder holds: nothing, a run, or something else.

    Nothing is also the little that a process leaves that was killed before its run began: the lock, made first, and
    the configuration. A run that lost its run.json is one while its configuration is there, and its checkpoints or the
    damaged run.json that was set aside.
    """
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if not names or (LOCK_FILE in names and names <= _BEGINNINGS):
        return "empty"
    is_known = "checkpoints" in names or f"{STATUS_FILE}.corrupt-1" in names
    is_run = (folder / STATUS_FILE).is_file() or ({LOCK_FILE, CONFIG_FILE} <= names and is_known)
    return "run" if is_run else "other"


def read_status(folder: Path) -> dict[str, Any]:
    """What run.json says; a damaged one is set aside by name, and nothing is known then, nor if it is not there.

    What is lost is where the numbers come from; what was learned is in the checkpoints.
    """
    path = folder / STATUS_FILE
    try:
        facts = json.loads(path.read_bytes())
        if isinstance(facts, dict) and _has_sane_parts(facts):
            return facts
        damage = "it is not what was written"
    except FileNotFoundError:
        log.warning("%s is not there: what it said of this run's beginning is lost", path)
        return {}
    except (ValueError, RecursionError) as error:
        damage = str(error)
    aside = set_aside(path)
    log.warning("%s cannot be read (%s): set aside as %s; the run goes on", path, damage, aside.name)
    return {}


def _has_sane_parts(facts: dict[str, Any]) -> bool:
    """Whether the facts that a resumed run builds on are of their kinds."""
    data, launchers = facts.get("data", {}), facts.get("launchers", [])
    return (
        isinstance(facts.get("resumes", 0), int)
        and isinstance(facts.get("started", ""), str)
        and isinstance(data, dict)
        and (not data or all(isinstance(data.get(name), str) for name in ("name", "fingerprint")))
        and isinstance(launchers, list)
    )


def failed_steps(facts: Mapping[str, Any]) -> list[int]:
    """The steps at which the last two attempts of torchrun failed, the newest last."""
    found = facts.get(FAILED)
    return [step for step in found if type(step) is int] if isinstance(found, list) else []


def refuse_a_third_time(facts: Mapping[str, Any], folder: Path) -> None:
    """Raises DistributedError where two attempts failed at one step: what torchrun starts again would fail there, too.

    Processes are told of a failure in one of them a step late at most.
    """
    steps = failed_steps(facts)
    if len(steps) == 2 and abs(steps[0] - steps[1]) <= 1:
        raise DistributedError(
            f"{folder}: step {steps[1]} failed twice and is not tried again by itself; it said: "
            f"{facts.get('reason', '(nothing)')}",
            "mend what it names; the same command with --resume then goes on from the newest checkpoint",
        )


def set_aside(path: Path, word: str = "corrupt") -> Path:
    """Rename a file or folder to NAME.WORD-N, with the first N that is free; its new path."""
    number = 1
    while (aside := path.with_name(f"{path.name}.{word}-{number}")).exists():
        number += 1
    path.rename(aside)
    return aside


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run folder's metrics.jsonl, none if it is not there; torn and damaged ones are left out.

    What is no number in a line is None there, as what is not finite is written.
    """
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    rows = [_row(line) for line in lines if line.endswith(b"\n")]
    return [row for row in rows if row is not None]


def count_damaged_metrics(folder: Path) -> int:
    """Whole lines of metrics.jsonl that are none of a step's; a last one that was cut short does not count."""
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") - len(read_metrics(folder)) if path.exists() else 0


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return None
    return {name: value if _is_number(value) else None for name, value in row.items()}


def _is_number(value: Any) -> bool:
    """Whether it is one that arithmetic takes: finite, and no whole number beyond all others."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


class QuietLog(logging.FileHandler):
    """A log file that says once, on standard error, that it cannot be written, instead of a traceback a line."""

    _failed = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  # the name is logging's
        """Tell of the first failure alone; the run ends, if it must, by what it fails to write itself."""
        if self._failed:
            return
        self._failed = True
        log.warning("%s cannot be written any more; what is said is not kept there", self.baseFilename)
