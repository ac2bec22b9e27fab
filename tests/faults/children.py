"""A command run in a forked child that may be prepared first: faults put in there leave the parent as it was."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from faults.kills import end_group, preload, start, wait


class End(NamedTuple):
    """How a command ended."""

    code: int | None
    """Its exit code, negative for a signal; None if it had to be killed."""
    text: str
    """All it said."""

    @property
    def words(self) -> str:
        """The last lines it said, in one."""
        return " | ".join(self.text.strip().splitlines()[-3:])[-400:]


def run(
    arguments: list[str], log: Path, *, seconds: float = 120, prepare: Callable[[], object] | None = None
) -> End:
    """Run a command line of fdkit in a child; its end.

    log: what it says, begun anew; prepare: called in the child before the command.
    """
    preload()
    log.unlink(missing_ok=True)
    child = start([arguments], log, prepare=prepare)
    code = wait(child, seconds)
    end_group(child)
    if code is None:
        os.waitpid(child, 0)
    return End(code, log.read_text(errors="replace") if log.exists() else "")


def rows_of(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that tell of steps."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row or "bad_steps" in row]


def facts_of(run: Path) -> dict[str, Any]:
    """What run.json says."""
    facts: dict[str, Any] = json.loads((run / "run.json").read_text())
    return facts
