"""Batches of views. Which images a step sees, and how they are cropped, is a pure function of (seed, epoch, index).

So a checkpoint needs no loader state, and the number of workers or ranks changes nothing. No draw touches the global
random generators: they belong to the model.
"""

import logging
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from fdkit.config import Config
from fdkit.data.decode import Decoder, decoder_for, decoding_with
from fdkit.data.patience import DEFAULT_SECONDS, LostData, waiting_up_to
from fdkit.data.reading import NOTHING, Cost, Readers, ReadingCosts, total, usable_cores
from fdkit.data.sources import BadImage, ImageSource
from fdkit.data.views import Pixels, Sample, Views
from fdkit.errors import ConfigError, DataError, ResourceError

log = logging.getLogger("fdkit")

MAX_AUTO_WORKERS = 12
MAX_BAD_IN_A_ROW = 100
MOST_NAMED = 5
"""Workers of which a message says where they were."""
_TRAINERS_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_ORDER, _VIEWS = 0, 1  # what a stream of random numbers is for

Slot = tuple[int, int]
"""(epoch, index): an image and the epoch that decides its augmentation."""


class LoaderConfig(Config):
    """How images are read."""

    workers: int = Field(-1, ge=-1, le=1024)
    """Processes that read and crop images; 0 reads in the training process, -1 chooses by the number of cores."""
    max_bad_ratio: float = Field(0.01, ge=0, le=1)
    """Share of the images that may be unreadable before the run stops; one is always allowed."""
    decoder: Decoder = "auto"
    """What decodes JPEG files, always to the same pixels: torchcodec, which is quicker; pillow; or auto, the first
    that is installed. Other formats are Pillow's."""
    timeout_seconds: float = Field(600, gt=0, le=1_000_000)
    """Longest wait for a batch from a worker before the run stops."""
    retry_seconds: float = Field(DEFAULT_SECONDS, ge=0, le=1_000_000)
    """How long a folder of images that is gone, such as a network disk, is waited for before the run stops."""


class Batch(NamedTuple):
    """The views of B images."""

    crops: list[Tensor]
    """One a view: uint8 (B, 3, H, W)."""
    colour: list[Tensor]
    """One a view: float32 (B, P) colour parameters; empty when the views change no colour."""
    labels: Tensor
    """(B,) int64; -1 where unlabelled."""
    indices: Tensor
    """(B,) int64: which images of the source these are."""


class BadImages:
    """The unreadable images met so far: each named once in the log, too many of them an error."""

    def __init__(self, source: ImageSource, max_bad_ratio: float) -> None:
        self.source_name = source.name
        self.num_images = len(source)
        self.max_bad_ratio = max_bad_ratio
        self.reasons: dict[str, str] = {}
        """Path -> why it cannot be read."""

    def add(self, bad: Sequence[BadImage]) -> None:
        """Record unreadable images. Raises DataError once more than max_bad_ratio of the source (and one) are bad."""
        for image in bad:
            if image.path not in self.reasons:
                self.reasons[image.path] = image.reason
                log.warning("unreadable image left out: %s", image)
        if len(self.reasons) > max(1, self.max_bad_ratio * self.num_images):
            self.stop()

    def stop(self) -> None:
        """Raise DataError for the images recorded."""
        share = len(self.reasons) / self.num_images
        path, reason = next(iter(self.reasons.items()))
        raise DataError(
            f"{self.source_name}: {len(self.reasons)} of {self.num_images} images are unreadable ({share:.1%}), "
            f"more than the {self.max_bad_ratio:.1%} allowed; the first: {path} ({reason})",
            "mend or remove them, or allow more with --loader.max-bad-ratio",
        )


def steps_per_epoch(source: ImageSource, batch_size: int) -> int:
    """How many whole batches the images make; what remains waits for the next epoch's order.

    Raises ConfigError if batch_size is more than there are images.
    """
    if batch_size > len(source):
        raise ConfigError(
            f"batch size {batch_size} is more than the {len(source)} images of {source.name}",
            f"use --train.batch-size {1 << (len(source).bit_length() - 1)}",
        )
    return len(source) // batch_size


def training_batches(
    source: ImageSource,
    views: Views,
    config: LoaderConfig,
    *,
    batch_size: int,
    seed: int,
    start_step: int,
    num_steps: int,
    rank: int = 0,
    world_size: int = 1,
    bad_images: BadImages | None = None,
    costs: ReadingCosts | None = None,
) -> Iterator[Batch]:
    """The part of one rank in the batches of steps start_step, ..., num_steps - 1, without a pause between epochs.

    batch_size: of all ranks together; rank r takes the r-th of world_size equal slices. An unreadable image is
    replaced by the next readable one. bad_images: where those are recorded; a fresh record by default. costs: where
    it is recorded what reading takes.
    Raises ConfigError if batch_size does not divide by world_size or exceeds the images; DataError if too many
    images are unreadable; ResourceError if a worker dies or does not answer.
    """
    if batch_size % world_size:
        raise ConfigError(
            f"batch size {batch_size} does not divide by {world_size} ranks",
            f"use --train.batch-size {max(1, batch_size // world_size) * world_size}",
        )
    steps_per_epoch(source, batch_size)
    share = batch_size // world_size
    slots = _TrainingSlots(
        len(source), batch_size, seed, range(start_step, num_steps), slice(rank * share, (rank + 1) * share)
    )
    dataset = _ViewsOfImages(source, views, seed, config, substitute=True)
    bad_images = bad_images or BadImages(source, config.max_bad_ratio)
    return _run(dataset, slots, config, bad_images, costs or ReadingCosts())


def evaluation_batches(
    source: ImageSource,
    views: Views,
    config: LoaderConfig,
    *,
    batch_size: int,
    bad_images: BadImages | None = None,
) -> Iterator[Batch]:
    """All images once, in order; unreadable ones are left out, so `indices` may skip and a batch may be smaller.

    bad_images: where those are recorded; a fresh record by default.
    Raises DataError if too many images are unreadable; ResourceError if a worker dies or does not answer.
    """
    slots = _EvaluationSlots(len(source), batch_size)
    dataset = _ViewsOfImages(source, views, 0, config, substitute=False)
    bad_images = bad_images or BadImages(source, config.max_bad_ratio)
    return _run(dataset, slots, config, bad_images, ReadingCosts())


def num_workers(config: LoaderConfig) -> int:
    """The number of workers this process starts.

    By default one a core but one, shared among the ranks of this machine. On one or two cores without a GPU there are
    none: the network uses all cores, so a worker would only take turns with it.
    """
    if config.workers >= 0:
        return config.workers
    cores = usable_cores()
    if torch.cuda.is_available():
        return max(1, min(cores - 1, MAX_AUTO_WORKERS))
    return 0 if cores <= 2 else min(cores - 1, MAX_AUTO_WORKERS)


def readers_of(config: LoaderConfig) -> Readers:
    """Who reads the images of this process. Raises ConfigError if the decoder asked for is not there."""
    return Readers(num_workers(config), decoder_for(config.decoder), usable_cores())


class _Item(NamedTuple):
    """One slot of a batch; sample is None where no readable image was found."""

    sample: Sample | None
    label: int
    position: int
    bad: list[tuple[str, str]]
    cost: Cost = NOTHING
    lost: LostData | None = None
    """Why no further image can be read."""


class _Collated(NamedTuple):
    """What a worker sends; batch is None where every image was unreadable."""

    batch: Batch | None
    bad: list[tuple[str, str]]
    complete: bool
    cost: Cost
    lost: LostData | None = None


class _ViewsOfImages(Dataset[_Item]):
    """(epoch, index) -> the views of that image. Never raises for an unreadable file."""

    def __init__(
        self, source: ImageSource, views: Views, seed: int, config: LoaderConfig, *, substitute: bool
    ) -> None:
        self.source = source
        self.decoder = config.decoder
        self.retry_seconds = config.retry_seconds
        self.read: Callable[[int], Pixels] = getattr(source, "read_pixels", source.read)
        self.views = views
        self.stream = _Stream(seed, _VIEWS)
        self.tries = min(len(source), MAX_BAD_IN_A_ROW) if substitute else 1
        self.places: Tensor | None = None
        """(workers,) int64 that all processes share: the image each worker is at, -1 for none."""

    def __getitem__(self, slot: Slot) -> _Item:
        item = self._item(slot)
        self._mark(-1)
        return item

    def _mark(self, index: int) -> None:
        """Leave word of where this worker is, should it never come back."""
        worker = get_worker_info()
        if worker is not None and self.places is not None:
            self.places.numpy()[worker.id] = index

    def being_read(self) -> str:
        """The images that workers are at, in words; "" where none is."""
        places = [] if self.places is None else self.places.tolist()
        named = [
            f"worker {worker} at {self.source.describe(index)}"
            for worker, index in enumerate(places)
            if index >= 0
        ]
        return ", ".join(named[:MOST_NAMED]) + (", ..." if len(named) > MOST_NAMED else "")

    def _item(self, slot: Slot) -> _Item:
        epoch, index = slot
        bad: list[tuple[str, str]] = []
        for candidate in range(index, index + self.tries):
            candidate %= len(self.source)
            self._mark(candidate)
            start, busy = time.perf_counter(), time.thread_time()
            try:
                with decoding_with(self.decoder), waiting_up_to(self.retry_seconds):
                    image = self.read(candidate)
            except BadImage as error:
                bad.append((error.path, error.reason))
                continue
            except (
                LostData
            ) as error:  # raised in a worker, it would reach the trainer as a traceback in a text
                return _Item(None, -1, index, bad, lost=LostData(error.message, error.hint))
            label = -1 if self.source.labels is None else int(self.source.labels[candidate])
            read = time.perf_counter()
            sample = self.views(image, self.stream.at(epoch, index))
            end, busy = time.perf_counter(), time.thread_time() - busy
            short_side = min(image.size if isinstance(image, Image.Image) else image.shape[:2])
            cost = Cost(1, read - start, end - read, max(0.0, end - start - busy), short_side)
            return _Item(sample, label, candidate, bad, cost)
        return _Item(None, -1, index, bad)


class _TrainingSlots:
    """The slots of each step's batch, one rank's slice; a new order of the images every epoch."""

    def __init__(self, num_images: int, batch_size: int, seed: int, steps: range, part: slice) -> None:
        self.num_images = num_images
        self.batch_size = batch_size
        self.stream = _Stream(seed, _ORDER)
        self.steps = steps
        self.part = part

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[Slot]]:
        per_epoch = self.num_images // self.batch_size
        order_epoch, order = -1, np.empty(0, dtype=np.int64)
        for step in self.steps:
            epoch, position = divmod(step, per_epoch)
            if epoch != order_epoch:
                order_epoch, order = epoch, self.stream.at(epoch).permutation(self.num_images)
            start = position * self.batch_size
            yield [(epoch, int(index)) for index in order[start : start + self.batch_size][self.part]]


class _EvaluationSlots:
    """The slots of all images in order, a batch at a time: a list of them all would take 100 bytes an image."""

    def __init__(self, num_images: int, batch_size: int) -> None:
        self.num_images = num_images
        self.batch_size = batch_size

    def __len__(self) -> int:
        return math.ceil(self.num_images / self.batch_size)

    def __iter__(self) -> Iterator[list[Slot]]:
        for start in range(0, self.num_images, self.batch_size):
            yield [(0, index) for index in range(start, min(start + self.batch_size, self.num_images))]


class _Stream:
    """Random numbers that are a pure function of (seed, purpose, epoch, index).

    Philox makes its numbers from a key and a counter, so a place in the stream is set rather than a generator made
    anew, which costs thirty times as much. Every (epoch, index) has 2**128 numbers of its own.
    """

    def __init__(self, seed: int, purpose: int) -> None:
        key = np.random.SeedSequence(seed, spawn_key=(purpose,)).generate_state(2, np.uint64)
        self._generator = np.random.Generator(np.random.Philox(key=key))
        self._start: dict[str, Any] = dict(self._generator.bit_generator.state)

    def at(self, epoch: int, index: int = 0) -> np.random.Generator:
        """The generator, set to its first number for this place; the next call sets it elsewhere."""
        counter = np.array([0, 0, index, epoch], dtype=np.uint64)
        self._generator.bit_generator.state = self._start | {
            "state": self._start["state"] | {"counter": counter}
        }
        return self._generator


def _collate(items: list[_Item]) -> _Collated:
    bad = [entry for item in items for entry in item.bad]
    good = [item for item in items if item.sample is not None]
    lost = next((item.lost for item in items if item.lost is not None), None)
    if not good or lost is not None:
        return _Collated(None, bad, complete=False, cost=NOTHING, lost=lost)
    samples = [item.sample for item in good if item.sample is not None]
    crops = [_stack_crops(view) for view in zip(*(s.crops for s in samples), strict=True)]
    colour = [_stack(view) for view in zip(*(s.colour for s in samples), strict=True)]
    labels, indices = (
        torch.tensor([item.label for item in good]),
        torch.tensor([item.position for item in good]),
    )
    cost = total([item.cost for item in good])
    return _Collated(Batch(crops, colour, labels, indices), bad, len(good) == len(items), cost)


def _stack_crops(crops: Sequence[Tensor]) -> Tensor:
    """(B, 3, H, W) in the memory layout of the crops, so that each is one plain copy."""
    if crops[0].is_contiguous():
        return _stack(crops)
    return _stack([crop.permute(1, 2, 0) for crop in crops]).permute(0, 3, 1, 2)


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors as one batch, in shared memory when a worker makes it."""
    stacked: Tensor = default_collate(list(tensors))
    return stacked


def _run(
    dataset: _ViewsOfImages, slots: Any, config: LoaderConfig, bad_images: BadImages, costs: ReadingCosts
) -> Iterator[Batch]:
    """The batches in order, from one set of workers that lives until the iterator ends."""
    decoder_for(config.decoder)  # refused here rather than in a worker
    workers = num_workers(config)
    dataset.places = torch.full((workers,), -1).share_memory_() if workers else None
    loader = DataLoader(
        dataset,
        batch_sampler=slots,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=torch.cuda.is_available(),
        timeout=config.timeout_seconds + config.retry_seconds if workers else 0,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # without one, iter() draws from the global generator
    )
    return _batches(loader, dataset, bad_images, costs)


def _batches(
    loader: DataLoader[_Item], dataset: _ViewsOfImages, bad_images: BadImages, costs: ReadingCosts
) -> Iterator[Batch]:
    try:
        with _trainers_signals_blocked():
            workers = iter(loader)
        for collated in workers:
            if collated.lost is not None:
                raise collated.lost
            costs.add(collated.cost)
            bad_images.add([BadImage(path, reason) for path, reason in collated.bad])
            if dataset.tries > 1 and not collated.complete:
                bad_images.stop()
            if collated.batch is not None:
                yield collated.batch
    except RuntimeError as error:
        if "DataLoader" not in str(error):
            raise
        at = dataset.being_read()
        raise ResourceError(
            f"reading images failed: {error}" + (f"; {at}" if at else ""),
            "if memory or /dev/shm is short, use fewer processes: --loader.workers 1, or 0 for none",
        ) from error


@contextmanager
def _trainers_signals_blocked() -> Iterator[None]:
    """Workers started inside begin with the trainer's signals blocked, until they have handlers of their own."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _TRAINERS_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(worker: int) -> None:
    """Ctrl-C, and a first SIGTERM, are the trainer's to answer: it still needs its workers until it has saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _die_of_the_next)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _TRAINERS_SIGNALS)
    sys.excepthook = partial(_tell_unless_orphaned, os.getppid())


def _tell_unless_orphaned(trainer: int, *error: Any) -> None:
    """Print an error as Python does, but none that a worker meets because its trainer was killed."""
    time.sleep(0.1)  # a process that dies closes its connections before its children are another's
    if os.getppid() == trainer:
        sys.__excepthook__(*error)


def _die_of_the_next(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)
