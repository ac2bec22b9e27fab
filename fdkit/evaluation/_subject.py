"""What is evaluated: a frozen model and the labelled images it is measured on, with features made when asked for."""

import tempfile
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fdkit.data.loader import LoaderConfig, training_batches
from fdkit.data.sources import ImageSource, open_source
from fdkit.data.subset import Subset
from fdkit.data.views import Views
from fdkit.errors import ConfigError
from fdkit.evaluation._reading import Part, Reading, parts_of, resolve_reading
from fdkit.evaluation._store import FeatureStore, weights_digest
from fdkit.evaluation.features import (
    Features,
    Precision,
    Rows,
    class_names,
    encoded_rows,
    encoder,
    evaluating,
    evaluation_crop,
    identity,
    labels_of,
    no_image,
    record_of,
)
from fdkit.models.collectives import rank, world_size
from fdkit.teachers.teacher import Teacher

FORMAT = 1
"""Counted up when the same key would give other values."""


class Extraction(NamedTuple):
    """How images become features."""

    device: torch.device
    pooling: str = "auto"
    layers: int = 1
    batch_size: int = 64
    precision: Precision = "fp32"
    loader: LoaderConfig = LoaderConfig()
    cache: Path | None = None
    """Folder where features are kept; none: in a file that is gone with the process."""


class Subject:
    """A model, on the device, and the images of `data`; `split` is the one it is tested on."""

    def __init__(self, teacher: Teacher, data: str, split: str, extraction: Extraction) -> None:
        self.teacher = teacher.to(extraction.device)
        self.data = data
        self.split = split
        self.extraction = extraction
        self.device = extraction.device
        self.loader = extraction.loader
        self.batch_size = extraction.batch_size
        self._sources: dict[str, ImageSource] = {}
        self._temporary: tempfile.TemporaryDirectory[str] | None = None

    @cached_property
    def reading(self) -> Reading:
        """Which tokens of which layers are read. Raises ConfigError for those the model does not have."""
        return resolve_reading(self.teacher.backbone, self.extraction.pooling, self.extraction.layers)

    @cached_property
    def weights(self) -> str:
        """SHA-256 of the network's weights, wherever they come from."""
        return weights_digest(self.teacher.backbone.network)

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """Which columns of a feature are of which token and layer."""
        return parts_of(self.teacher.backbone, self.reading, self.device)

    def refuse_reading(self, why: str) -> None:
        """Raises ConfigError if tokens or layers were chosen where an evaluator reads its own; why: what it reads."""
        given = self.extraction
        if given.pooling != "auto" or given.layers != 1:
            raise ConfigError(
                f"pooling {given.pooling} and layers {given.layers} have no effect: {why}", "leave them out"
            )

    def source(self, split: str) -> ImageSource:
        """The images of a split of the data, opened once."""
        if split not in self._sources:
            self._sources[split] = open_source(self.data, split)
        return self._sources[split]

    def splits(self) -> tuple[Features, Features]:
        """Features of the training images and of the tested split, on the device the model is on."""
        return self.features("train").to(self.device), self.features(self.split).to(self.device)

    def features(self, images: str | ImageSource) -> Features:
        """Features of every readable image of a split, or of a source, on the CPU; from the cache if they are there.

        Under torchrun every process makes a share of them, and has them all.
        """
        source = self.source(images) if isinstance(images, str) else images
        labels, info = labels_of(source), identity(self.teacher, self.reading, self.extraction.precision)
        info["weights"] = self.weights
        backbone = self.teacher.backbone
        parts = self.parts
        store = FeatureStore(self._root(), self._key(source), num_images=len(source), width=parts[-1].stop)
        views = evaluation_crop(backbone.preprocessing)

        def make(indices: np.ndarray) -> Iterator[Rows]:
            found = encoded_rows(
                self.encode,
                Subset(source, indices),
                views,
                batch_size=self.batch_size,
                loader=self.loader,
                device=self.device,
            )
            for rows in found:
                yield rows._replace(indices=torch.from_numpy(indices)[rows.indices])

        values, indices = store.fill(make)
        if len(indices) == 0:
            raise no_image(source)
        return Features(
            values, labels[indices], class_names(source), info | record_of(source, indices), parts
        )

    @cached_property
    def encode(self) -> Callable[[Tensor], Tensor]:
        """What maps images (B, 3, H, W) in [0, 1] on the device to features (B, D); no gradient."""
        compute = encoder(self.teacher.backbone, self.reading, self.device, self.extraction.precision)

        def encode(images: Tensor) -> Tensor:
            with torch.no_grad(), evaluating(self.teacher.backbone):
                return compute(images)

        return encode

    def stream(
        self, source: ImageSource, views: Views, *, batch_size: int, num_steps: int, seed: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Features (b, D) float32 and labels (b,), on the device, of new random views of the images at every step.

        views: one view an image. batch_size: over all processes; each sees its own slice. The order and the views are
        those of a training with this seed.
        """
        batches = training_batches(
            source,
            views,
            self.loader,
            batch_size=batch_size,
            seed=seed,
            start_step=0,
            num_steps=num_steps,
            rank=rank(),
            world_size=world_size(),
        )
        for batch in batches:
            crops = [crop.to(self.device, non_blocking=True) for crop in batch.crops]
            colour = [drawn.to(self.device, non_blocking=True) for drawn in batch.colour]
            values = self.encode(views.finish(crops, colour)[0]).float()
            yield values, batch.labels.to(self.device, non_blocking=True)

    def _key(self, source: ImageSource) -> dict[str, Any]:
        """Everything that the values of a source's features hang on."""
        backbone = self.teacher.backbone
        return {
            "format": FORMAT,
            "weights": self.weights,
            "recipe": backbone.recipe,
            "reading": [list(self.reading.tokens), self.reading.num_layers],
            "preprocessing": backbone.preprocessing.to_json(),
            "precision": self.extraction.precision,
            "images": getattr(source, "content_stamp", source.fingerprint),
            "device": self.device.type,
            "torch": torch.__version__,
        }

    def _root(self) -> Path:
        if self.extraction.cache is not None:
            return self.extraction.cache
        if world_size() > 1:
            raise ConfigError(
                "several processes share features through the cache, and it is off", "leave out --cache none"
            )
        if self._temporary is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="fdkit-features-")
        return Path(self._temporary.name)
