"""`fdkit pack PATH --output DIR`: the same images in shards that read faster.

What is whole is never made twice: run again, the command makes the shards that are missing or damaged, if any.
"""

import errno
import fcntl
import logging
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO, Annotated, Any

import numpy as np
import tyro
from pydantic import Field
from rich.console import Console

from fdkit.commands._outcome import Outcome
from fdkit.config import Config, validate
from fdkit.data.decode import BadImage
from fdkit.data.json_file import read_object
from fdkit.data.loader import BadImages
from fdkit.data.pack import VERSION, Job, Settings, finished, jobs, write_json, write_shard
from fdkit.data.packed import MANIFEST, UNFINISHED
from fdkit.data.sources import ImageSource, open_source, splits_of
from fdkit.data.views import CropConfig, RandomCrop
from fdkit.errors import DataError, OutputError, ResourceError
from fdkit.training.run_files import set_aside

log = logging.getLogger("fdkit")

PLAN = "plan.json"
"""In the folder of what is known of finished shards: what was asked for."""
LINE_EVERY_SECONDS = 15.0
SECONDS_TO_ANSWER = 0.2
"""How long Ctrl-C and SIGTERM may wait while shards are written."""
SECONDS_TO_END = 5.0
"""How long the workers of a command that was killed may hold its folder."""
SAMPLE_IMAGES = 64
"""Images whose reading is timed, before and after."""


class PackConfig(Config):
    """Write images into tar shards, large ones made smaller, so that training waits less for them.

    The result is a PATH like any other, with the same classes and splits; WebDataset's readers open it too. Typed
    again, the same command goes on where it stopped, and makes again what was damaged since.

    Example: fdkit pack photos --output photos-256
    """

    data: tyro.conf.Positional[str]
    """The images: any PATH, such as a folder."""
    output: Path
    """Folder for the shards."""
    short_side: int = Field(256, ge=16)
    """Images whose short side is longer, in pixels, are made this small and saved as JPEG; others keep their bytes."""
    quality: int = Field(95, ge=1, le=100)
    """JPEG quality of the images made smaller."""
    images_per_shard: int = Field(1000, ge=1)
    """How many images a shard holds."""
    workers: int = Field(-1, ge=-1, le=1024)
    """Processes that write shards; 0 writes in this one, -1 starts one a core."""
    max_bad_ratio: float = Field(0.01, ge=0, le=1)
    """Share of a split's images that may be unreadable before packing stops; one is always allowed."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the order of the images in the shards, 0 or more."""
    overwrite: bool = Field(default=False, exclude=True)
    """Pack anew where something was packed before; that is moved to OUTPUT.old-N, not deleted."""
    json_output: Annotated[bool, tyro.conf.arg(name="json")] = Field(default=False, exclude=True)
    """Print one JSON document on standard output and nothing else there."""


def config_class() -> type[Config]:
    """The configuration of the command."""
    return PackConfig


def pack(data: str | Path, **fields: Any) -> dict[str, Any]:
    """The numbers of `fdkit pack`; fields are those of its configuration.

    Example: fdkit.pack("photos", output="photos-256")["bytes_after"]
    """
    return run(validate(PackConfig, {"data": str(data), **fields}, "fdkit.pack")).numbers


def run(config: PackConfig) -> Outcome:
    """Pack, and measure what it saves."""
    settings = Settings(config.short_side, config.quality, config.images_per_shard, config.seed)
    sources = {split: open_source(config.data, split) for split in splits_of(config.data)}
    folder = config.output.expanduser()
    plan = settings._asdict() | {
        "version": VERSION,
        "images": {split: source.fingerprint for split, source in sources.items()},
    }
    workers = _cores() if config.workers == -1 else config.workers
    with _explained_failures(folder):
        _prepare(folder, plan, overwrite=config.overwrite)
        with _held(folder):
            records = _write_all(config, sources, settings, folder, workers)
            _write_manifest(folder, plan, sources, records)
    numbers = _numbers(config, sources, records, max(1, workers))
    return Outcome(numbers, lambda: _show(numbers))


def _prepare(folder: Path, plan: dict[str, Any], *, overwrite: bool) -> None:
    """Make the folder, keep the shards that the same command wrote, or move away what was packed before."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}: is there already, and no folder", "choose another --output")
    begun = _plan_there(folder)
    if begun is not None and not overwrite:
        _require_same_plan(folder, begun, plan)
        log.info("%s: packed before, in full or in part; shards that are whole are kept", folder)
        return
    if begun is not None:
        _move_away(folder)
    elif folder.exists() and any(entry.name != UNFINISHED for entry in folder.iterdir()):
        raise OutputError(f"{folder}: not empty, and not packed images", "choose another --output")
    (folder / UNFINISHED).mkdir(parents=True, exist_ok=True)
    write_json(folder / UNFINISHED / PLAN, plan)


def _plan_there(folder: Path) -> dict[str, Any] | None:
    """What was asked for when the folder was packed, or packing began; {} if that is damaged, None if neither was."""
    for path in (folder / MANIFEST, folder / UNFINISHED / PLAN):
        if path.exists():
            try:
                known = read_object(path)
            except ValueError:
                return {}
            plan = known.get("plan") if path.name == MANIFEST else known
            return plan if isinstance(plan, dict) else {}
    return None


def _require_same_plan(folder: Path, begun: dict[str, Any], plan: dict[str, Any]) -> None:
    other = sorted(name for name in plan.keys() | begun.keys() if plan.get(name) != begun.get(name))
    if other:
        raise OutputError(
            f"{folder}: holds images packed with other {', '.join(other)}",
            "use what was used then, --overwrite to pack anew (they are moved away), or another --output",
        )


def _move_away(folder: Path) -> None:
    with _held(folder):
        aside = set_aside(folder, "old")
    log.info("--overwrite: what was packed in %s is now in %s", folder, aside)


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Keep other processes from writing into the folder."""
    deadline = time.monotonic() + SECONDS_TO_END
    while (lock := _lock(folder)) is None:
        if time.monotonic() >= deadline:
            raise OutputError(
                f"{folder}: another process is packing into it", "wait for it, or choose another --output"
            )
        time.sleep(0.1)
    with lock:
        yield


def _lock(folder: Path) -> IO[str] | None:
    """The folder's lock file, locked; None if another process holds it, or has just done away with it."""
    path = folder / UNFINISHED / "lock"
    path.parent.mkdir(exist_ok=True)
    with suppress(FileNotFoundError), ExitStack() as stack:
        file = stack.enter_context(path.open("a"))
        with suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                stack.pop_all()
                return file
    return None


@contextmanager
def _explained_failures(folder: Path) -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool as error:
        raise ResourceError(
            f"{folder}: a process that wrote shards was killed, perhaps for want of memory",
            "run the same command again with fewer --workers; finished shards are kept",
        ) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ResourceError(
                f"{folder}: the disk is full",
                "free some space and run the same command again; finished shards are kept",
            ) from error
        raise OutputError(
            f"{folder}: cannot be written: {error.strerror or error}", "choose another --output"
        ) from error


def _write_all(
    config: PackConfig, sources: dict[str, ImageSource], settings: Settings, folder: Path, workers: int
) -> list[dict[str, Any]]:
    """The records of all shards, in order; those that are missing are written first."""
    every = [job for split, source in sources.items() for job in jobs(split, len(source), settings)]
    listed = _listed(folder)
    records = {job.file: record for job in every if (record := finished(folder, job, listed.get(job.file)))}
    missing = [job for job in every if job.file not in records]
    bad = {split: BadImages(source, config.max_bad_ratio) for split, source in sources.items()}
    progress = _Progress(len(every), len(every) - len(missing), sum(len(job.indices) for job in missing))
    for job in every:
        if job.file in records:
            bad[job.split].add([BadImage(*pair) for pair in records[job.file]["bad"]])
    written = _in_processes if workers and len(missing) > 1 else _here
    with closing(
        written(sources, missing, settings, folder, workers)
    ) as shards:  # ends the workers at an error
        for job, record in shards:
            records[job.file] = record
            bad[job.split].add([BadImage(*pair) for pair in record["bad"]])
            progress.show(record["images"])
    return [records[job.file] for job in every]


def _listed(folder: Path) -> dict[str, dict[str, Any]]:
    """What a manifest that is there says of each shard, by its file."""
    try:
        shards = read_object(folder / MANIFEST).get("shards")
    except (OSError, ValueError):
        return {}
    named = [shard for shard in shards if isinstance(shard, dict)] if isinstance(shards, list) else []
    return {str(shard.get("file")): shard for shard in named}


def _here(
    sources: dict[str, ImageSource], missing: Sequence[Job], settings: Settings, folder: Path, workers: int
) -> Generator[tuple[Job, dict[str, Any]], None, None]:
    for job in missing:
        yield job, write_shard(sources[job.split], job, settings, folder)


def _in_processes(
    sources: dict[str, ImageSource], missing: Sequence[Job], settings: Settings, folder: Path, workers: int
) -> Generator[tuple[Job, dict[str, Any]], None, None]:
    before = set(multiprocessing.active_children())
    executor = ProcessPoolExecutor(
        min(workers, len(missing)), initializer=_start_worker, initargs=(sources, os.getpid())
    )
    with _stopped_politely() as asked:
        try:
            futures: dict[Future[dict[str, Any]], Job] = {
                executor.submit(_write_in_worker, job, settings, folder): job for job in missing
            }
            pending = set(futures)
            while pending:
                done, pending = wait(pending, timeout=SECONDS_TO_ANSWER, return_when=FIRST_COMPLETED)
                _leave_if(asked)
                for future in done:
                    yield futures[future], future.result()
            executor.shutdown()
            _leave_if(asked)
        finally:  # what a stop leaves half-written is made again; nothing waits for it
            executor.shutdown(wait=False, cancel_futures=True)
            for child in set(multiprocessing.active_children()) - before:
                child.terminate()


_sources: dict[str, ImageSource] = {}


def _start_worker(sources: dict[str, ImageSource], parent: int) -> None:
    _sources.update(sources)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this worker when its parent is gone, however that ended."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _write_in_worker(job: Job, settings: Settings, folder: Path) -> dict[str, Any]:
    return write_shard(_sources[job.split], job, settings, folder)


@contextmanager
def _stopped_politely() -> Iterator[list[int]]:
    """What SIGTERM and Ctrl-C leave a mark in, for the block to end by itself, so that the workers are ended too.

    Raising where the signal is received would be lost inside what Python calls around a fork; a second one is raised.
    """
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(number: int, frame: FrameType | None) -> None:
        _leave_if(asked)
        asked.append(number)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave_if(asked: list[int]) -> None:
    """Raises KeyboardInterrupt or SystemExit if a signal came."""
    if asked:
        raise KeyboardInterrupt if asked[0] == signal.SIGINT else SystemExit(128 + asked[0])


def _write_manifest(
    folder: Path, plan: dict[str, Any], sources: dict[str, ImageSource], records: list[dict[str, Any]]
) -> None:
    if not any(record["images"] for record in records):
        raise DataError(
            f"{folder}: no image could be read, so nothing is packed", "each is named above with its reason"
        )
    classes = max((source.classes for source in sources.values()), key=len)
    write_json(folder / MANIFEST, {"classes": list(classes), "shards": records, "plan": plan})
    shutil.rmtree(folder / UNFINISHED)


def _numbers(
    config: PackConfig, sources: dict[str, ImageSource], records: list[dict[str, Any]], workers: int
) -> dict[str, Any]:
    before = [record["source_bytes"] for record in records]
    rates = {
        "before": _rate(list(sources.values())),
        "after": _rate([open_source(str(config.output.expanduser()))]),
    }
    num_images = sum(record["images"] for record in records)
    return {
        "data": config.data,
        "output": str(config.output),
        "images": num_images,
        "resized": sum(record["resized"] for record in records),
        "unreadable": dict(pair for record in records for pair in record["bad"]),
        "shards": len(records),
        "bytes_before": None if None in before else sum(before),
        "bytes_after": sum(record["bytes"] for record in records),
        "images_per_second_of_a_worker": rates,
        "workers": workers,
        "epoch_seconds": {name: num_images / rate / workers for name, rate in rates.items()},
    }


def _rate(sources: Sequence[ImageSource]) -> float:
    """Images a second that one process reads, decodes and crops to 224 pixels; files are in memory by then."""
    views, random = RandomCrop(CropConfig()), np.random.default_rng(0)
    total = sum(len(source) for source in sources)
    places = np.unique(np.linspace(0, total - 1, SAMPLE_IMAGES).astype(int))
    sample = [place for place in (_find(sources, int(place)) for place in places) if _is_readable(*place)]

    def crop_all() -> float:
        start = time.perf_counter()
        for source, index in sample:
            views(getattr(source, "read_pixels", source.read)(index), random)
        return time.perf_counter() - start

    return len(sample) / min(crop_all() for _ in range(3))


def _find(sources: Sequence[ImageSource], place: int) -> tuple[ImageSource, int]:
    for source in sources:
        if place < len(source):
            return source, place
        place -= len(source)
    raise IndexError(place)


def _is_readable(source: ImageSource, index: int) -> bool:
    try:
        source.read(index)
    except BadImage:
        return False
    return True


class _Progress:
    """A line now and then."""

    def __init__(self, num_shards: int, num_done: int, num_missing_images: int) -> None:
        self.num_shards, self.num_done, self.num_missing_images = num_shards, num_done, num_missing_images
        self.num_images = 0
        self.started = self.last_line = time.monotonic()

    def show(self, num_images: int) -> None:
        """A shard is finished."""
        self.num_done += 1
        self.num_images += num_images
        now = time.monotonic()
        if now - self.last_line < LINE_EVERY_SECONDS:
            return
        self.last_line = now
        rate = self.num_images / (now - self.started)
        left = (self.num_missing_images - self.num_images) / rate if rate else float("inf")
        log.info("shard %d/%d  %.0f img/s  eta %.0f s", self.num_done, self.num_shards, rate, left)


def _show(numbers: dict[str, Any]) -> None:
    console = Console(markup=False, highlight=False, soft_wrap=True)
    rates, epochs, after = (
        numbers["images_per_second_of_a_worker"],
        numbers["epoch_seconds"],
        numbers["bytes_after"],
    )
    left_out = f", {len(numbers['unreadable'])} unreadable left out" if numbers["unreadable"] else ""
    console.print(
        f"{numbers['images']} images in {numbers['shards']} shards ({numbers['resized']} made smaller{left_out})"
    )
    if numbers["bytes_before"] is not None:
        console.print(f"bytes    {_size(numbers['bytes_before'])} -> {_size(after)}")
    console.print(
        f"a worker {rates['before']:.0f} -> {rates['after']:.0f} images/s read, decoded and cropped "
        f"({rates['after'] / rates['before']:.1f}x, measured on {SAMPLE_IMAGES} images)"
    )
    console.print(
        f"an epoch {epochs['before']:.3g} s -> {epochs['after']:.3g} s of that with {numbers['workers']} workers"
    )
    console.print(f"use it   --data {numbers['output']}")


def _size(count: int) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"


def _cores() -> int:
    usable: Callable[[int], set[int]] | None = getattr(os, "sched_getaffinity", None)
    return len(usable(0)) if usable else os.cpu_count() or 1
