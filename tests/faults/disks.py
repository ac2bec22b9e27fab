"""Commands on a disk that is full at any moment, read-only, or taken away while they run.

A disk is a tmpfs of a few pages more or less, so that it fills at the start, at the log, in a checkpoint, at the
export or in a figure. Where no file system may be mounted there is nothing to try: `can_mount` says so.
"""

import os
import random
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from faults import jobs
from faults.kills import Job, differences, digest, end_group, finish, last_words, preload, start, wait

from fdkit.teachers.run_checkpoint import damage_of
from fdkit.training.checkpoint import STATE_FILE, list_steps

PAGE_BYTES = 4096
ROOM = "64m"


def mount(*arguments: str) -> bool:
    """Whether `mount` did what it was told."""
    return subprocess.run(["mount", *arguments], capture_output=True, check=False).returncode == 0


def can_mount() -> bool:
    """Whether this process may mount file systems."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        return False
    with tempfile.TemporaryDirectory() as folder:
        if not mount("-t", "tmpfs", "-o", "size=64k", "tmpfs", folder):
            return False
        subprocess.run(["umount", folder], check=True, capture_output=True)
    return True


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A folder that is a disk of this size, such as "64k"."""
    folder.mkdir(parents=True, exist_ok=True)
    assert mount("-t", "tmpfs", "-o", f"size={size},mode=755", "tmpfs", str(folder)), folder
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True, capture_output=True)


def used(folder: Path) -> int:
    """Bytes taken on the disk of a folder, in whole pages."""
    usage = os.statvfs(folder)
    return (usage.f_blocks - usage.f_bfree) * usage.f_frsize


def analysis() -> Job:
    """A comparison of a model with itself, and its figures."""
    command = ["analyze", "cka", "demo", "--data", "demo", "--num-images", "16", "--device", "cpu"]
    return Job(
        "analyze cka",
        lambda folder: [[*command, "--output", str(folder)]],
        ("--overwrite",),
        lambda folder: {"figure": digest((folder / "cka.svg").read_bytes())},
    )


def report() -> Job:
    """A page about a model, with an analysis."""

    def result(folder: Path) -> dict[str, str]:
        return {"pages": str(len(list(folder.rglob("*.html"))))}

    command = [
        "report",
        "demo",
        "--data",
        "demo",
        "--analyses",
        "cka",
        "--num-images",
        "16",
        "--device",
        "cpu",
    ]
    return Job("report", lambda folder: [[*command, "--output", str(folder)]], ("--overwrite",), result)


def disk_jobs() -> list[Job]:
    """A job for every kind of command that writes."""
    return [
        jobs.shortest(),
        jobs.cached_distillations(),
        jobs.training("pretrain mae", jobs.pretrain("mae")),
        jobs.training(
            "finetune", ["finetune", "demo", "--data", "digits", *jobs.SHORT], jobs.left_by_finetuning
        ),
        jobs.extraction("linear"),
        jobs.pack("--workers", "0"),
        analysis(),
        report(),
    ]


def fill_disks(folder: Path, *, amount: int, seed: int) -> dict[str, Any]:
    """Run every kind of command on `amount` disks in all, each too small by another amount, make room, and go on."""
    if not can_mount():
        return {"tried": 0, "skipped": "no file system may be mounted here", "failures": []}
    preload()
    draw = random.Random(seed)
    every = disk_jobs()
    counts: Counter[str] = Counter()
    stages: Counter[str] = Counter()
    failures = []
    for number, job in enumerate(every):
        disks = amount * (number + 1) // len(every) - amount * number // len(every)
        if disks:
            tally = fill_again_and_again(job, folder / str(number), disks, draw)
            failures += [f"{job.name}: {what}" for what in tally.pop("failures")]
            stages.update(tally.pop("stages"))
            counts.update(tally)
    return {**counts, "jobs": len(every), "full_at": dict(stages), "failures": failures}


def fill_again_and_again(job: Job, folder: Path, disks: int, draw: random.Random) -> dict[str, Any]:
    """Run one job on disks of sizes spread evenly from none to nearly enough."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log"
    with small_disk(folder / "large", ROOM) as disk:
        if code := finish(job.commands(disk / "out"), log):
            return {"tried": 0, "stages": {}, "failures": [f"with room: exit code {code}: {last_words(log)}"]}
        wanted, needed = job.result(disk / "out"), used(disk)
    tally: dict[str, Any] = {"tried": 0, "full": 0, "went_on_in_the_same_bits": 0}
    stages: Counter[str] = Counter()
    failures = []
    for number in range(disks):
        pages = max(1, round(needed / PAGE_BYTES * (number + draw.random()) / disks))
        with small_disk(folder / "disk", f"{4 * pages}k") as disk:
            log.unlink(missing_ok=True)
            code, said = _fill(job, disk / "out", log)
            stage = stage_of(disk / "out")
            went_wrong = said
            if not went_wrong:
                mount("-o", f"remount,size={ROOM}", str(disk))
                went_wrong = _goes_on(job, disk / "out", wanted, log)
            tally["tried"] += 1
            tally["full"] += code == 6
            tally["went_on_in_the_same_bits"] += not went_wrong
            stages[stage] += code == 6
            failures += [f"{4 * pages} kB of {needed // 1024} kB, full at {stage}: {went_wrong}"] * bool(
                went_wrong
            )
    return tally | {"stages": {name: count for name, count in stages.items() if count}, "failures": failures}


def _fill(job: Job, out: Path, log: Path) -> tuple[int, str]:
    """Exit code of a job on a small disk, and what is wrong with how it ended."""
    code = finish(job.commands(out), log)
    text = log.read_text()
    if code not in (0, 6):
        return code, f"exit code {code}: {last_words(log)}"
    if "Traceback" in text:
        return code, f"a traceback: {last_words(log)}"
    if code == 6 and not any(word in text for word in ("room", "space", "full", "free", "fit")):
        return code, f"without a word of the disk: {last_words(log)}"
    if code == 6 and "done; the student" in text and len(job.commands(out)) == 1:
        return code, "said to be done"
    for run in {path.parent.parent for path in out.rglob("checkpoints/step-*")}:
        for path in list_steps(run / "checkpoints"):
            if damage := damage_of(path, required=STATE_FILE, whole=True):
                return code, f"{path.name} is damaged: {damage}"
    return code, ""


def _goes_on(job: Job, out: Path, wanted: dict[str, str], log: Path) -> str:
    """What is wrong with a job that was started again with room."""
    log.unlink(missing_ok=True)
    if code := finish(job.begun(out), log):
        return f"with room again: exit code {code}: {last_words(log)}"
    differing = differences(wanted, job.result(out))
    return f"with room again: {', '.join(differing)} differ" if differing else ""


STAGES = (
    ("an export", "student.safetensors"),
    ("a later checkpoint", "checkpoints/step-*"),
    ("the first checkpoint", "checkpoints"),
    ("metrics", "metrics.jsonl"),
    ("training", "student.json"),
    ("features", "cache/*/*.f32"),
    ("shards", "*.tar"),
    ("the log", "log.txt"),
    ("the configuration", "config.yaml"),
    ("the lock", "lock"),
)
"""Where a disk was full, by the last of these that is there."""


def stage_of(out: Path) -> str:
    """What was being written when the disk was full, as far as what is there tells."""
    for name, pattern in STAGES:
        if any(out.glob(pattern)) or any(out.glob(f"*/{pattern}")):
            return name
    return "files of results" if out.exists() and any(out.iterdir()) else "the start"


def lose_disk(job: Job, folder: Path, log: Path, *, after: str) -> tuple[int | None, float, bool]:
    """Run a job whose folder becomes an empty, read-only one once `after` is there: its exit code, the seconds it took
    to end, and whether the files from before are as they were."""
    out = folder / "out"
    child = start(job.commands(out), log)
    deadline = time.monotonic() + 60
    while not any(out.glob(after)):
        assert time.monotonic() < deadline, last_words(log)
        assert wait(child, 0.001) is None, last_words(log)
    saved = _saved(out)
    assert mount("-t", "tmpfs", "-o", "ro,size=64k", "tmpfs", str(out))
    began = time.monotonic()
    try:
        code = wait(child, 60)
        end_group(child)
    finally:
        subprocess.run(["umount", "-l", str(out)], check=True, capture_output=True)
    now = _saved(out)
    return code, time.monotonic() - began, all(now.get(name) == value for name, value in saved.items())


def _saved(out: Path) -> dict[str, str]:
    """Digests of what is in sound checkpoints."""
    return {
        str(path.relative_to(out)): digest(path.read_bytes())
        for step in out.glob("checkpoints/step-*")
        for path in step.iterdir()
    }
