"""Many thousand tiny steps: what the process holds must not grow with them; and lists of a million files.

Memory, Python objects, open files, threads, child processes, shared memory and the run folder are looked at every few
steps, from inside the process that trains. Growth is the slope of a straight line through what was seen after a
warm-up, with its standard error.
"""

import gc
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from faults.children import run
from faults.jobs import STUDENT, pretrain
from PIL import Image

NUM_IMAGES = 64
BATCH = 8
WARM_UP = 0.5
"""Share of the steps after which nothing may grow any more: pools and caches are full, figures were drawn."""
SAMPLES = 100
LITTLE = [
    *("--train.batch-size", str(BATCH), "--train.precision", "fp32", "--device", "cpu"),
    *("--loader.workers", "2", "--train.log-every-steps", "10", "--train.save-every-steps", "50"),
    *("--monitor.every-epochs", "20", "--monitor.collapse-every-epochs", "15"),
]  # fmt: skip
MEGABYTE = 1_000_000
WORKERS = "memory of workers"
LIMITS = {
    "memory": 0.3 * MEGABYTE,
    WORKERS: 2.5 * MEGABYTE,
    "objects": 300.0,
    "open files": 0.5,
    "threads": 0.5,
    "processes": 0.5,
    "shared memory": 0.5,
    "files of the run": 0.5,
    "bytes of the run": 30_000.0,
}
"""The most that each may grow in 1000 steps of a run of LONG ones, in bytes or in number; an allocator takes memory in
pieces of megabytes, so that a line through fewer steps is steeper and may be, in proportion."""
LONG = 5000
JUMPS = 0.25
"""Workers took 2 to 4 MB at once, each once in 2000 to 12,000 steps, and were flat before and after: their limit falls
with the length of a run, down to this share."""
ERRORS = 2
"""How many standard errors a slope must lie above its limit."""


class Growth(NamedTuple):
    """How one number grew after the warm-up."""

    start: float
    end: float
    slope: float
    """In 1000 steps."""
    error: float
    """Standard error of the slope."""


def soak(folder: Path, *, amount: int, seed: int) -> dict[str, Any]:
    """`amount` steps of distillation, and half as many of MoCo v3."""
    pictures(folder / "images", seed)
    found = {
        "distill": soak_one(distillation(folder), folder, steps=amount, seed=seed),
        "mocov3": soak_one(contrast(folder), folder, steps=max(200, amount // 2), seed=seed),
    }
    failures = [f"{name}: {failure}" for name, one in found.items() for failure in one["failures"]]
    return {"tried": sum(one["steps"] for one in found.values()), "failures": failures, "runs": found}


def pictures(folder: Path, seed: int) -> None:
    """A folder of two classes of little pictures, for training and testing."""
    random_numbers = np.random.default_rng(seed)
    for split, count in (("train", NUM_IMAGES), ("test", 16)):
        for number in range(count):
            path = folder / split / f"class{number % 2}" / f"{number:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random_numbers.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)


def distillation(folder: Path) -> list[str]:
    """The command of a little distillation, all but its length and place."""
    return ["distill", "--teacher", "demo", "--data", str(folder / "images"), *STUDENT, *LITTLE]


def contrast(folder: Path) -> list[str]:
    """Likewise of MoCo v3."""
    arguments = pretrain("mocov3")
    arguments[arguments.index("--data") + 1] = str(folder / "images")
    return [*arguments, *LITTLE]


def soak_one(
    command: list[str],
    folder: Path,
    *,
    steps: int,
    seed: int,
    leak: Callable[[Any], None] | None = None,
) -> dict[str, Any]:
    """Train so many steps and tell what grew. leak: called with the trainer after every step, to show it is found."""
    run_folder, samples = folder / "run", folder / "samples.jsonl"
    shutil.rmtree(run_folder, ignore_errors=True)
    samples.unlink(missing_ok=True)
    every = max(1, steps // SAMPLES)
    epochs = steps * BATCH / NUM_IMAGES
    arguments = [
        *command,
        "--output",
        str(run_folder),
        "--seed",
        str(seed),
        "--train.epochs",
        f"{epochs:.6f}",
    ]
    began = time.monotonic()
    end = run(arguments, folder / "log", seconds=3600, prepare=lambda: _sample_every(every, samples, leak))
    rows = [json.loads(line) for line in samples.read_text().splitlines()] if samples.exists() else []
    growth = {name: grown(rows, name, warm_up=WARM_UP * steps) for name in LIMITS} if rows else {}
    failures = [f"exit code {end.code}: {end.words}"] if end.code != 0 else []
    failures += [
        f"{name} grew by {one.slope:.3g} +- {one.error:.2g} in 1000 steps, from {one.start:.6g} to {one.end:.6g}"
        for name, one in growth.items()
        if one.slope - ERRORS * one.error
        > LIMITS[name] * max(JUMPS if name == WORKERS else 1.0, LONG / steps)
    ]
    return {
        "steps": steps,
        "seconds": round(time.monotonic() - began, 1),
        "failures": failures,
        "growth_in_1000_steps": {name: one._asdict() for name, one in growth.items()},
    }


def grown(rows: list[dict[str, float]], name: str, *, warm_up: float) -> Growth:
    """The line through what was seen of one number from a step on."""
    late = [row for row in rows if row["step"] >= warm_up]
    steps, values = (np.array([row[key] for row in late], dtype=float) for key in ("step", name))
    centred = steps - steps.mean()
    slope = float((centred * values).sum() / (centred**2).sum())
    left = values - values.mean() - slope * centred
    error = float(np.sqrt((left**2).sum() / max(1, len(steps) - 2) / (centred**2).sum()))
    return Growth(float(values[0]), float(values[-1]), 1000 * slope, 1000 * error)


def _sample_every(every: int, path: Path, leak: Callable[[Any], None] | None) -> None:
    """Write a line about this process after every so many steps."""
    from fdkit.training.loop import Trainer

    gc.freeze()  # what is there by now, millions of objects, is not searched again at every line

    between = Trainer.between_steps

    def watched(self: Any, *arguments: Any) -> None:
        between(self, *arguments)
        if leak is not None:
            leak(self)
        if self.step % every == 0:
            with path.open("a") as file:
                file.write(json.dumps({"step": self.step, **_seen(self.run.folder)}) + "\n")

    Trainer.between_steps = watched  # type: ignore[method-assign]


def _seen(run_folder: Path) -> dict[str, float]:
    """What this process holds now."""
    gc.collect()
    children = _children()
    files = [path for path in run_folder.rglob("*") if path.is_file()]
    return {
        "memory": _memory("self"),
        WORKERS: sum(_memory(str(child)) for child in children),
        "objects": sys.getallocatedblocks(),
        "open files": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "processes": len(children),
        "shared memory": len(os.listdir("/dev/shm")),
        "files of the run": len(files),
        "bytes of the run": sum(path.stat().st_size for path in files if path.name != "metrics.jsonl"),
    }


def _children() -> list[int]:
    return [
        int(child)
        for path in Path("/proc/self/task").glob("*/children")
        for child in path.read_text().split()
    ]


def _memory(process: str) -> int:
    """Bytes of a process in memory, without files it shares; 0 for one that has ended."""
    try:
        _, resident, shared, *_ = Path(f"/proc/{process}/statm").read_text().split()
    except OSError:
        return 0
    return (int(resident) - int(shared)) * resource.getpagesize()


def million_files(folder: Path, *, amount: int, seed: int) -> dict[str, Any]:
    """List, fingerprint, draw an order of and read samples of so many image files, hard links to a few pictures."""
    from fdkit.data.loader import LoaderConfig, training_batches
    from fdkit.data.sources import open_source
    from fdkit.data.views import CropConfig, RandomCrop

    began = time.monotonic()
    link_pictures(folder / "train", amount, seed)
    seconds = {"link": time.monotonic() - began}
    memory, failures = {"before": _memory("self")}, []

    def timed(what: str, work: Callable[[], Any]) -> Any:
        start = time.monotonic()
        found = work()
        seconds[what] = time.monotonic() - start
        memory[what] = _memory("self")
        return found

    source = timed("list and fingerprint", lambda: open_source(str(folder), "train"))
    again = timed("list and fingerprint again", lambda: open_source(str(folder), "train"))
    views = RandomCrop(CropConfig(image_size=16))
    drawn = np.random.default_rng(seed).choice(len(source), min(SAMPLED, len(source)), replace=False)
    images = timed("read samples", lambda: [source.read(int(index)) for index in drawn])
    batches = timed(
        "draw an epoch's order and read its first batch",
        lambda: next(
            training_batches(
                source, views, LoaderConfig(workers=0), batch_size=64, seed=seed, start_step=0, num_steps=1
            )
        ),
    )
    checks = {
        f"{len(source)} images listed of {amount}": len(source) == amount,
        f"{len(source.classes)} classes": len(source.classes) == min(CLASSES, amount),
        "the list changes from one time to the next": source.fingerprint == again.fingerprint,
        "a sample of another size": all(image.size == (16, 16) for image in images),
        "a batch of too few images": len(batches.indices) == min(64, amount),
    }
    failures = [failure for failure, holds in checks.items() if not holds]
    rounded = {what: round(value, 2) for what, value in seconds.items()}
    grown_by = {what: round((value - memory["before"]) / MEGABYTE, 1) for what, value in memory.items()}
    return {"tried": amount, "failures": failures, "seconds_for": rounded, "megabytes": grown_by}


CLASSES = 1000
SAMPLED = 200
LINKS = 50_000
"""Names of one file; ext4 allows 65,000."""


def link_pictures(folder: Path, amount: int, seed: int) -> None:
    """So many names in CLASSES folders, each a link to one of a few pictures."""
    originals = folder.parent / "originals"
    originals.mkdir(parents=True)
    numbers = np.random.default_rng(seed)
    for picture in range(amount // LINKS + 4):
        Image.fromarray(numbers.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(
            originals / f"{picture}.png"
        )
    files = sorted(map(str, originals.iterdir()))
    for one in range(min(CLASSES, amount)):
        inside = folder / f"class{one:04}"
        inside.mkdir(parents=True)
        for number in range(one, amount, CLASSES):
            os.link(files[number // CLASSES % len(files)], f"{inside}/{number:07}.png")
