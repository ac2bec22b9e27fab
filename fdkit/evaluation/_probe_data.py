"""What linear heads are trained on: cached features, or features of new random views at every step."""

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fdkit.data.subset import Subset
from fdkit.data.views import Views
from fdkit.errors import ConfigError, NumericsError
from fdkit.evaluation._columns import Columns, resolve_inputs
from fdkit.evaluation._metrics import rank_of_label
from fdkit.evaluation._probe import (
    Batch,
    Candidate,
    Normalizer,
    Probe,
    ProbeConfig,
    RunningNorm,
    Standardizer,
    Unchanged,
    statistics,
    train_heads,
)
from fdkit.evaluation._reading import parts_of
from fdkit.evaluation._subject import Subject
from fdkit.evaluation.features import Features, class_names, identity, labels_of
from fdkit.models.collectives import gather_rows, world_size

log = logging.getLogger("fdkit")

T = TypeVar("T")

# Scores made at a time: 64 MB in float32.
SCORED_AT_ONCE = 1 << 24
SECONDS_BETWEEN_REPORTS = 30

Comparison = dict[str, Any]
"""{"validation_top1", "validation_loss"}; both None for a head that diverged."""


class ProbeData(Protocol):
    """Training images, some of which heads are trained on and others compared on; rows count them from 0."""

    labels: Tensor
    """(N,) int64, of all of them."""
    classes: tuple[str, ...]
    columns: dict[str, Columns]
    """Of every input asked for, by name."""
    info: dict[str, Any]
    """Where they come from, as plain JSON."""

    def refuse_batches(self, num_images: int) -> None:
        """Raises ConfigError if so many images cannot be cut into batches as configured."""

    def fit(self, candidates: Sequence[Candidate], rows: Tensor) -> list[Probe]:
        """A classifier for every candidate, trained on the images at `rows`; one Probe an input."""

    def compare(self, probes: Sequence[Probe], rows: Tensor) -> dict[Candidate, Comparison]:
        """How each classifier does on the evaluation crops of the images at `rows`."""


class CachedImages:
    """Features made once. An epoch sees every image; its last batch may be smaller."""

    def __init__(self, train: Features, inputs: Sequence[str], config: ProbeConfig) -> None:
        self.train, self.config = train, config
        self.labels, self.classes, self.info = train.labels, train.classes, train.info
        self.columns = resolve_inputs(inputs, train.parts, train.values)

    def refuse_batches(self, num_images: int) -> None:
        """Raises ConfigError if batch norm would meet a batch of one image."""
        size = min(self.config.train_batch_size, num_images)
        if self.config.normalization == "batch_norm" and (size == 1 or num_images % size == 1):
            raise ConfigError(
                f"normalization batch_norm needs two images a batch: train_batch_size {self.config.train_batch_size} "
                f"leaves one of {num_images} alone",
                f"use --train-batch-size {self.config.train_batch_size + 1}, or --normalization standardize",
            )

    def fit(self, candidates: Sequence[Candidate], rows: Tensor) -> list[Probe]:
        """A classifier for every candidate, trained on the features at `rows`, batch by batch."""
        values, config = self.train.values, self.config
        steps_per_epoch = -(-len(rows) // config.train_batch_size)
        return train_heads(
            _reported(self._batches(rows), config.epochs * steps_per_epoch),
            candidates,
            columns=self.columns,
            num_classes=len(self.classes),
            normalizer=_normalizer(config, values, rows),
            steps_per_epoch=steps_per_epoch,
            like=values[:0],
            config=config,
        )

    def compare(self, probes: Sequence[Probe], rows: Tensor) -> dict[Candidate, Comparison]:
        """How each classifier does on the features at `rows`."""
        return compare(probes, self.train.values, self.labels, rows)

    def _batches(self, rows: Tensor) -> Iterator[Batch]:
        random = torch.Generator().manual_seed(self.config.seed)
        for _ in range(self.config.epochs):
            order = torch.randperm(len(rows), generator=random).to(rows.device)
            for part in rows[order].split(self.config.train_batch_size):
                yield self.train.values[part], self.labels[part]


class StreamedImages:
    """New random views at every step, one forward for all heads; the processes share the forward.

    An epoch is as many whole batches as there are; what remains waits for the next epoch's order. Every process
    gathers the features of the others, so each sees whole batches. Heads are compared on the model's evaluation crop.
    """

    def __init__(self, subject: Subject, views: Views, inputs: Sequence[str], config: ProbeConfig) -> None:
        self.subject, self.views, self.config = subject, views, config
        self.source = subject.source("train")
        self.labels = labels_of(self.source).to(subject.device)
        self.classes = class_names(self.source)
        parts = parts_of(subject.teacher.backbone, subject.reading, subject.device)
        self.like = torch.zeros(1, parts[-1].stop, device=subject.device)
        self.columns = resolve_inputs(inputs, parts, self.like)
        self.info = identity(subject.teacher, subject.reading, subject.extraction.precision) | {
            "weights": subject.weights,
            "source": self.source.name,
            "fingerprint": self.source.fingerprint,
            "num_images": len(self.source),
        }

    def stand_in(self) -> Features:
        """What features of the training images look like: one of zeros, to pair those of test with."""
        return Features(self.like, self.labels[:1], self.classes, self.info)

    def refuse_batches(self, num_images: int) -> None:
        """Raises ConfigError for a batch of more than the images, of uneven shares, or of one before batch norm."""
        size, processes = self.config.train_batch_size, world_size()
        if size > num_images:
            raise ConfigError(
                f"train_batch_size {size} is more than the {num_images} images the probe is trained on",
                f"use --train-batch-size {1 << (num_images.bit_length() - 1)}",
            )
        if size % processes:
            raise ConfigError(
                f"train_batch_size {size} does not divide by {processes} processes",
                f"use --train-batch-size {max(1, size // processes) * processes}",
            )
        if size == 1 and self.config.normalization == "batch_norm":
            raise ConfigError(
                "normalization batch_norm needs two images a batch, and train_batch_size is 1",
                "use --train-batch-size 256, or --normalization none",
            )

    def fit(self, candidates: Sequence[Candidate], rows: Tensor) -> list[Probe]:
        """A classifier for every candidate, trained on random views of the images at `rows`."""
        part, config = self._part(rows), self.config
        steps_per_epoch = len(part) // config.train_batch_size
        return train_heads(
            self._batches(part, config.epochs * steps_per_epoch, steps_per_epoch),
            candidates,
            columns=self.columns,
            num_classes=len(self.classes),
            normalizer=self._normalizer(part),
            steps_per_epoch=steps_per_epoch,
            like=self.like,
            config=config,
        )

    def compare(self, probes: Sequence[Probe], rows: Tensor) -> dict[Candidate, Comparison]:
        """How each classifier does on the evaluation crops of the images at `rows`, cached or made."""
        held = self.subject.features(self._part(rows)).to(self.subject.device)
        every = torch.arange(len(held.labels), device=held.labels.device)
        return compare(probes, held.values, held.labels, every)

    def _part(self, rows: Tensor) -> Subset:
        return Subset(self.source, rows.cpu().numpy())

    def _normalizer(self, part: Subset) -> Normalizer:
        """That of the configuration; standardisation takes its statistics from evaluation crops, one an image."""
        if self.config.normalization != "standardize":
            return _normalizer(self.config, self.like, torch.empty(0))
        values = self.subject.features(part).to(self.subject.device).values
        return _normalizer(self.config, values, torch.arange(len(values), device=values.device))

    def _batches(self, part: Subset, num_steps: int, steps_per_epoch: int) -> Iterator[Batch]:
        """Whole batches, the same on every process. Raises NumericsError after an epoch with a value not finite."""
        size, seed = self.config.train_batch_size, self.config.seed
        stream = self.subject.stream(part, self.views, batch_size=size, num_steps=num_steps, seed=seed)
        finite = torch.ones((), dtype=torch.bool, device=self.subject.device)
        for step, (values, labels) in enumerate(_reported(stream, num_steps), start=1):
            whole = gather_rows(values)
            finite &= whole.isfinite().all()
            yield whole, gather_rows(labels)
            if step % steps_per_epoch == 0 and not finite:
                raise NumericsError(
                    f"features of random views are not finite, in epoch {step // steps_per_epoch} of the probe",
                    "the weights may be damaged; if --precision is bf16, try fp32",
                )


def compare(
    probes: Sequence[Probe], values: Tensor, labels: Tensor, rows: Tensor
) -> dict[Candidate, Comparison]:
    """Accuracy and mean cross-entropy of every classifier on the features (N, D) and labels (N,) at some rows."""
    found: dict[Candidate, Comparison] = {}
    for probe in probes:
        heads = len(probe.candidates)
        loss = torch.zeros(heads, dtype=torch.float64, device=values.device)
        hits = torch.zeros(heads, dtype=torch.int64, device=values.device)
        for block in rows.split(max(1, SCORED_AT_ONCE // probe.bias.numel())):
            scores = probe.scores(values[block]).flatten(0, 1)  # (B * K, C)
            own = labels[block].repeat_interleave(heads)
            loss += F.cross_entropy(scores, own, reduction="none").view(-1, heads).double().sum(dim=0)
            hits += (rank_of_label(scores, own) == 0).view(-1, heads).sum(dim=0)
        alive = (loss.isfinite() & probe.weight.flatten(1).isfinite().all(dim=1)).tolist()
        for k, candidate in enumerate(probe.candidates):
            found[candidate] = {
                "validation_top1": int(hits[k]) / len(rows) if alive[k] else None,
                "validation_loss": float(loss[k]) / len(rows) if alive[k] else None,
            }
    return found


def scores_of(probe: Probe, values: Tensor) -> Tensor:
    """Scores (N, C) of a single classifier for features (N, D)."""
    blocks = values.split(max(1, SCORED_AT_ONCE // probe.bias.numel()))
    return torch.cat([probe.scores(block)[:, 0] for block in blocks])


def of_all_ranks(value: T) -> list[T]:
    """What every process has, in their order; tensors in it have to be on the CPU."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found


def _normalizer(config: ProbeConfig, values: Tensor, rows: Tensor) -> Normalizer:
    if config.normalization == "standardize":
        return Standardizer(*statistics(values, rows))
    return RunningNorm(values) if config.normalization == "batch_norm" else Unchanged()


def _reported(batches: Iterable[Batch], num_steps: int) -> Iterator[Batch]:
    """The batches; now and then the log says how far they are."""
    start = last = time.monotonic()
    for step, batch in enumerate(batches):
        now = time.monotonic()
        if now - last > SECONDS_BETWEEN_REPORTS:
            minutes = (num_steps - step) * (now - start) / max(1, step) / 60
            log.info("linear probe: step %d of %d, %.1f minutes left", step, num_steps, minutes)
            last = now
        yield batch
