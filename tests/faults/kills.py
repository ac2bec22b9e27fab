"""Commands killed at any moment and started again: what they leave must be what an undisturbed one leaves, to the bit.

A command runs in a forked child, leader of its own process group, so that its start costs milliseconds and its workers
die with it. A kill comes after a random time, or, to hit every place between two changes to the disk, from inside:
at the n-th opening for writing, renaming, removal, making of a folder, writing in place or syncing below the output.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

TIMED = {"images_per_second", "data_wait_ratio", "seconds", "teacher_cache_read"}
"""What may differ: times, and how much of the cache was there already when steps were done again."""
SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT", "SIGUSR1")
AT_A_CHANGE, IN_A_CHECKPOINT, TWICE = "at a change", "in a checkpoint", "twice in a checkpoint"
KINDS = (*SIGNALS, AT_A_CHANGE, IN_A_CHECKPOINT, TWICE)
"""Four signals at a random time; SIGKILL at a change to the disk, and at one of a checkpoint that is being written;
SIGTERM there, and again before it is written."""
HALF_WRITTEN = ".writing-"
SAVED, OVER = {75}, {130, 138, 143}
DIED = {-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, -signal.SIGUSR1}
LONGEST_RUN = 600.0


class Job(NamedTuple):
    """Commands, one after the other, and what of their output must not depend on how often they were killed."""

    name: str
    commands: Callable[[Path], list[list[str]]]
    """The command lines, given the folder all they write is below."""
    resume: tuple[str, ...]
    """What is added to each to start it again; nothing for commands that go on by themselves."""
    result: Callable[[Path], dict[str, str]]
    """Names and digests of what they leave."""
    is_quick: bool = False
    """Whether it may be done before a kill reaches it, and is then begun anew."""

    def begun(self, folder: Path) -> list[list[str]]:
        """The command lines that start again what was killed."""
        return [[*command, *self.resume] for command in self.commands(folder)]


class Death(NamedTuple):
    """Where a child is to end itself."""

    number: int
    """At this change below the folder, counted from 1; 0: never."""
    below: Path
    within: str = ""
    """Count only changes whose path holds this."""
    twice: bool = False
    """By SIGTERM, which asks it to save and stop, and another one at once, instead of SIGKILL."""


class Tally(NamedTuple):
    """How a job that was killed again and again came out."""

    kills: dict[str, int]
    """Kills that met it alive, by their kind."""
    in_checkpoints: int
    """Kills that left a checkpoint half-written."""
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


def preload() -> None:
    """Import here what every child would import: seconds each, and one thread, on which bits depend."""
    import open_clip  # noqa: F401
    import sklearn.neighbors  # noqa: F401
    import timm  # noqa: F401
    import torch
    import torchvision  # noqa: F401
    from matplotlib import pyplot  # noqa: F401

    from fdkit.commands import analyze, distill, evaluate, finetune, pack, pretrain, report, segment  # noqa: F401
    from fdkit.evaluation import knn, linear  # noqa: F401
    from fdkit.teachers import loading  # noqa: F401

    torch.set_num_threads(1)


def start(
    commands: Sequence[list[str]], log: Path, *, death: Death | None = None, prepare: Any = None
) -> int:
    """Process id of a child that runs command lines one after the other, until one fails.

    prepare: called in the child first, to plant a fault.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setsid()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = os.fdopen(os.dup(1), "w", buffering=1)  # also where a test listens to the ones before
        sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
        if death is not None:
            _watch(death)
        if prepare is not None:
            prepare()
        code = _run_all(commands)
        sys.stdout.flush()
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def _run_all(commands: Sequence[list[str]]) -> int:
    from fdkit.cli import main

    for command in commands:
        try:
            main(command)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
            if code:
                return code
    return 0


CHANGING = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate", "shutil.rmtree")
"""Audit events of changes, besides opening for writing; what libraries in C write raises none."""
IN_PLACE = ("pwrite", "fsync", "ftruncate")
"""Functions of `os` that change an open file, or have changes on the disk."""


def _watch(death: Death) -> None:
    """Count changes below a folder; end this process group at one of them."""
    seen, inside, quiet = 0, str(death.below), False

    def changes(path: str) -> None:
        nonlocal seen, quiet
        if quiet or not path.startswith(inside) or death.within not in path:
            return
        seen += 1
        sys.audit("fdkit.change", path)
        if seen == death.number:
            quiet = True
            _die(death)

    def hook(event: str, values: tuple[Any, ...]) -> None:
        if event == "open":
            if isinstance(values[2], int) and values[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                changes(_path(values[0], None))
        elif event in CHANGING:
            changes(_path(values[0], values[-1] if len(values) > 1 else None))

    sys.addaudithook(hook)
    for name in IN_PLACE:
        setattr(os, name, _counted(getattr(os, name), changes))


def _die(death: Death) -> None:
    if not death.twice:
        os.killpg(0, signal.SIGKILL)
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.001)  # the first is handled before the second comes


def _counted(function: Callable[..., Any], changes: Callable[[str], None]) -> Callable[..., Any]:
    def counted(file: int, *arguments: Any) -> Any:
        changes(_path("", file))
        return function(file, *arguments)

    return counted


def _path(value: Any, folder: Any) -> str:
    """A path that an event names, below an open folder or of an open file where it gives one."""
    name = os.fsdecode(value) if isinstance(value, (str, bytes, os.PathLike)) else ""
    if name.startswith("/") or not isinstance(folder, int) or folder < 0:
        return name
    try:
        return os.path.join(os.readlink(f"/proc/self/fd/{folder}"), name).rstrip("/")
    except OSError:
        return name


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


def finish(commands: Sequence[list[str]], log: Path, **how: Any) -> int:
    """Exit code of command lines that are left to run to their end; -1000 for a hang."""
    child = start(commands, log, **how)
    code = wait(child, LONGEST_RUN)
    end_group(child)
    if code is None:
        os.waitpid(child, 0)
        return -1000
    return code


def last_words(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return " | ".join(lines[-3:])[-400:]


def try_to_lose(job: Job, folder: Path, *, kills: int, seed: int, kinds: Sequence[str] = KINDS) -> Tally:
    """Run a job once undisturbed, and once with kills, each followed by a new start.

    Kills come at times drawn uniformly over what the job has left to do, as seen on the undisturbed run.
    """
    draw = random.Random(seed)
    straight, broken, log = folder / "straight", folder / "broken", folder / "log"
    began = time.monotonic()
    if code := finish(job.commands(straight), log):
        return Tally({}, 0, False, [], [f"undisturbed: exit code {code}: {last_words(log)}"])
    length = time.monotonic() - began
    counted: Counter[str] = Counter()
    in_checkpoints, unexpected, commands = 0, [], job.commands(broken)
    for number in range(kills * 6):
        if counted.total() >= kills:
            break
        kind = kinds[number % len(kinds)]
        code, alive = _kill_once(commands, log, kind, broken, draw, length)
        if job.is_quick and code == 0 and not alive:
            shutil.rmtree(broken)  # it was done before the kill: once more from the beginning
            log.unlink(missing_ok=True)
            commands = job.commands(broken)
            continue
        counted[kind] += alive
        in_checkpoints += alive and _is_half_written(broken)
        if code not in ({0, *SAVED, *OVER, *DIED} if alive else {0}) or _has_traceback(log):
            unexpected.append(f"{kind}: exit code {code}: {last_words(log)}")
        log.unlink(missing_ok=True)
        commands = job.begun(broken)
    code = finish(commands, log)
    if code:
        unexpected.append(f"the last start: exit code {code}: {last_words(log)}")
        return Tally(dict(counted), in_checkpoints, False, [], unexpected)
    differing = differences(job.result(straight), job.result(broken))
    return Tally(dict(counted), in_checkpoints, not differing, differing, unexpected)


def differences(wanted: dict[str, str], found: dict[str, str]) -> list[str]:
    """Names of what two results do not have in common."""
    return sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))


def _kill_once(
    commands: Sequence[list[str]],
    log: Path,
    kind: str,
    folder: Path,
    draw: random.Random,
    length: float,
) -> tuple[int | None, bool]:
    """Start a job and kill it once; its exit code, and whether the kill met it alive."""
    if kind not in SIGNALS:
        within = "" if kind == AT_A_CHANGE else HALF_WRITTEN
        number = draw.randint(1, 60 if kind == AT_A_CHANGE else 40)
        death = Death(number, folder, within, twice=kind == TWICE)
        code = finish(commands, log, death=death)
        return code, code != 0
    child = start(commands, log)
    code = wait(child, draw.uniform(0.02, max(0.1, 1.1 * length / 3)))
    if code is not None:
        end_group(child)
        return code, False
    os.kill(child, getattr(signal, kind))
    code = wait(child, 60)
    end_group(child)
    if code is None:
        os.waitpid(child, 0)
    return code, True


def _is_half_written(folder: Path) -> bool:
    return any(folder.rglob(f"{HALF_WRITTEN}*"))


def _has_traceback(log: Path) -> bool:
    return log.exists() and "Traceback" in log.read_text(errors="replace")


def kill_jobs(folder: Path, *, amount: int, seed: int) -> dict[str, Any]:
    """Kill every kind of job `amount` times in all, and count what was lost."""
    from faults.jobs import all_jobs

    preload()
    jobs = all_jobs()
    kinds: Counter[str] = Counter()
    by_job, failures, exact, in_checkpoints = {}, [], 0, 0
    for number, job in enumerate(jobs):
        kills = amount * (number + 1) // len(jobs) - amount * number // len(jobs)
        if not kills:
            continue
        shifted = KINDS[number % len(KINDS) :] + KINDS[: number % len(KINDS)]
        place = folder / str(number)
        place.mkdir()
        tally = try_to_lose(job, place, kills=kills, seed=seed + number, kinds=shifted)
        kinds.update(tally.kills)
        by_job[job.name] = sum(tally.kills.values())
        exact += tally.same
        in_checkpoints += tally.in_checkpoints
        failures += [f"{job.name}: {what}" for what in tally.unexpected]
        failures += [f"{job.name}: {', '.join(tally.differing)} differ"] * bool(tally.differing)
        shutil.rmtree(place)
    return {
        "tried": kinds.total(),
        "kills_by_kind": dict(kinds),
        "kills_by_job": by_job,
        "kills_in_half_written_checkpoints": in_checkpoints,
        "jobs": len(by_job),
        "jobs_ended_in_the_same_bits": exact,
        "failures": failures,
    }


def kill_at_every_change(folder: Path, *, amount: int, seed: int) -> dict[str, Any]:
    """Kill a distillation at one change to the disk after the other, `amount` of them spread evenly over all, starting
    a fresh run for each; each, resumed, must end as the undisturbed one."""
    from faults.jobs import finished, shortest

    preload()
    job, log = shortest(), folder / "log"
    wanted = job.result(finished())
    total = count_changes(job, folder / "counted", log)
    places = sorted({round(1 + place * (total - 1) / max(1, amount - 1)) for place in range(amount)})
    failures = []
    for place in places:
        if said := _loses(job, folder / "broken", place, wanted, log):
            failures.append(f"change {place} of {total}: {said}")
        shutil.rmtree(folder / "broken", ignore_errors=True)
        log.unlink(missing_ok=True)
    return {"tried": len(places), "changes_of_a_run": total, "failures": failures}


def count_changes(job: Job, folder: Path, log: Path) -> int:
    """How many changes a job makes below a folder."""
    reader, writer = os.pipe()

    def tell() -> None:
        def count(event: str, values: tuple[Any, ...]) -> None:
            if event == "fdkit.change":
                os.write(writer, b".")

        sys.addaudithook(count)

    finish(job.commands(folder), log, death=Death(0, folder), prepare=tell)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        return len(pipe.read())


def _loses(job: Job, broken: Path, place: int, wanted: dict[str, str], log: Path) -> str:
    """What went wrong when a job was killed at a change and started again; empty if nothing did."""
    code = finish(job.commands(broken), log, death=Death(place, broken))
    if code != -signal.SIGKILL:
        return f"was not killed: exit code {code}"
    if code := finish(job.begun(broken), log):
        return f"exit code {code}: {last_words(log)}"
    differing = differences(wanted, job.result(broken))
    return f"{', '.join(differing)} differ" if differing else ""
