"""Commands killed at any moment and started again: what they leave must be what an undisturbed one leaves, to the bit.

A command runs in a forked child, leader of its own process group, so that its start costs milliseconds and its workers
die with it. A kill comes after a random time, or, to hit every place between two changes to the disk, from inside:
at the n-th opening for writing, renaming, removal or making of a folder below the output.
"""

import hashlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

TIMED = {"images_per_second", "data_wait_ratio", "seconds"}
SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT", "from inside")
SAVED, OVER = {75}, {130, 143}
LONGEST_RUN = 180.0


class Job(NamedTuple):
    """A command and what of its output must not depend on how often it was killed."""

    name: str
    arguments: Callable[[Path], list[str]]
    """The command line that starts it, given its folder."""
    resume: tuple[str, ...]
    """What is added to start it again; nothing for commands that go on by themselves."""
    result: Callable[[Path], dict[str, str]]
    """Names and digests of what it leaves."""


class Tally(NamedTuple):
    """How a job that was killed again and again came out."""

    kills: dict[str, int]
    """Kills that met it alive, by their kind."""
    same: bool
    """Whether everything it left equals what the undisturbed one left."""
    differing: list[str]
    unexpected: list[str]
    """Ends that were neither success nor what the signal asks for, with the last words said."""


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def left_by_training(folder: Path) -> dict[str, str]:
    """The exported student, every tensor and number of the last checkpoint, and the metrics without timings."""
    steps = [path for path in (folder / "checkpoints").iterdir() if path.name.removeprefix("step-").isdigit()]
    newest = max(steps, key=lambda path: path.name)
    found = {
        path.name: digest(path.read_bytes()) for path in newest.iterdir() if path.name != "manifest.json"
    }
    found["exported"] = digest((folder / "student.safetensors").read_bytes())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    untimed = [{name: value for name, value in row.items() if name not in TIMED} for row in rows]
    return found | {"metrics": digest(json.dumps(untimed).encode())}


def start(arguments: list[str], log: Path, *, die_at: int = 0, watched: Path | None = None) -> int:
    """Process id of a child that runs the command line. die_at: kill itself at this change below `watched`."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    try:
        os.setsid()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if watched is not None:
            _watch(watched, die_at)
        from fdkit.cli import main

        main(arguments)
    except SystemExit as end:
        os._exit(end.code if isinstance(end.code, int) else 1)
    except BaseException:
        import traceback

        traceback.print_exc()
    os._exit(1)


def _watch(folder: Path, die_at: int) -> None:
    """Count changes below a folder into its .changes file; kill this group at one of them."""
    seen, inside = 0, str(folder)

    def hook(event: str, values: tuple[Any, ...]) -> None:
        nonlocal seen
        if event == "open":
            changes = isinstance(values[2], int) and values[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        else:
            changes = event in {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate"}
        if not changes or not os.fspath(
            values[0] if isinstance(values[0], (str, bytes, os.PathLike)) else ""
        ).__str__().startswith(inside):
            return
        seen += 1
        if seen == die_at:
            os.killpg(0, signal.SIGKILL)

    sys.addaudithook(hook)


def wait(child: int, seconds: float) -> int | None:
    """Exit code of a child, negative for a signal; None if it still runs after that time."""
    deadline = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= deadline:
            return None
        time.sleep(0.005)


def end_group(child: int) -> None:
    """Kill what is left of a child's group; its workers outlive it by a moment."""
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:
        return


def last_words(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return " | ".join(lines[-3:])[-400:]


def try_to_lose(job: Job, folder: Path, *, kills: int, seed: int) -> Tally:
    """Run a job once undisturbed, and once with kills, each followed by a new start.

    Kills come at times drawn uniformly over what the job has left to do, as seen on the undisturbed run.
    """
    draw = random.Random(seed)
    straight, broken, log = folder / "straight", folder / "broken", folder / "log"
    began = time.monotonic()
    code = wait(child := start(job.arguments(straight), log), LONGEST_RUN)
    length = time.monotonic() - began
    if code != 0:
        end_group(child)
        return Tally({}, False, [], [f"undisturbed: exit code {code}: {last_words(log)}"])
    counted: dict[str, int] = dict.fromkeys(SIGNALS, 0)
    unexpected: list[str] = []
    arguments = job.arguments(broken)
    for number in range(kills * 4):
        if sum(counted.values()) >= kills:
            break
        kind = SIGNALS[number % len(SIGNALS)]
        die_at = draw.randint(1, 60) if kind == "from inside" else 0
        child = start(arguments, log, die_at=die_at, watched=broken if die_at else None)
        code = wait(child, LONGEST_RUN if die_at else draw.uniform(0.02, max(0.5, 1.1 * length / 4)))
        alive = code is None or (die_at > 0 and code == -signal.SIGKILL)
        if code is None:
            os.killpg(child, getattr(signal, kind))
            code = wait(child, 60)
            allowed = (
                {-signal.SIGKILL}
                if kind == "SIGKILL"
                else {0, *SAVED, *OVER, -signal.SIGTERM, -signal.SIGINT}
            )
            if code not in allowed:
                unexpected.append(f"{kind}: exit code {code}: {last_words(log)}")
        elif code not in {0, -signal.SIGKILL}:
            unexpected.append(f"{kind}, before it came: exit code {code}: {last_words(log)}")
        end_group(child)
        counted[kind] += alive
        arguments = [*job.arguments(broken), *job.resume]
    code = wait(child := start(arguments, log), LONGEST_RUN)
    end_group(child)
    if code != 0:
        return Tally(
            counted, False, [], [*unexpected, f"the last start: exit code {code}: {last_words(log)}"]
        )
    wanted, found = job.result(straight), job.result(broken)
    differing = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    return Tally(counted, not differing, differing, unexpected)
