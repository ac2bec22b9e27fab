"""Features of labelled images: read every image once, run the frozen network once, keep one vector an image.

Everything the evaluators do afterwards is arithmetic on these vectors.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from fdkit.data.loader import LoaderConfig, evaluation_batches
from fdkit.data.sources import ImageSource
from fdkit.data.views import CenterCrop, Interpolation
from fdkit.errors import ConfigError, DataError, NumericsError
from fdkit.evaluation._reading import Part, Reading, parts_of, reader, resolve_reading
from fdkit.models.backbone import Backbone, Preprocessing
from fdkit.teachers.teacher import Teacher

log = logging.getLogger("fdkit")

Precision = Literal["fp32", "bf16"]
SECONDS_BETWEEN_REPORTS = 30
CHECKED_AT_ONCE = 65536
OF_ONE_MODEL = ("model", "weights", "sha256", "pooling", "layers", "image_size")
"""What the record of two sets of features must agree in, where both say it, to be compared."""


class Features(NamedTuple):
    """One vector an image, in the order of the source."""

    values: Tensor
    """(N, D) float32; its memory may be a file."""
    labels: Tensor
    """(N,) int64, positions in classes."""
    classes: tuple[str, ...]
    """Class names."""
    info: dict[str, Any]
    """Where they come from, as plain JSON: model, pooling, crop, source, fingerprint, skipped images."""
    parts: tuple[Part, ...] = ()
    """Which columns are of which token and layer; empty where nobody asked a network."""

    def to(self, device: torch.device | str) -> "Features":
        """The same features on another device, where the evaluators then run."""
        return self._replace(values=self.values.to(device), labels=self.labels.to(device))


class Rows(NamedTuple):
    """Some images' features, as they are made."""

    indices: Tensor
    """(B,) int64: positions in the source."""
    values: Tensor
    """(B, D) float32, on the CPU."""


def extract_features(
    model: Teacher | Backbone,
    source: ImageSource,
    *,
    pooling: str = "auto",
    layers: int = 1,
    batch_size: int = 64,
    loader: LoaderConfig | None = None,
    device: torch.device | str = "cpu",
    precision: Precision = "fp32",
) -> Features:
    """Features of every readable image of a labelled source, from the model's own evaluation crop; on the CPU.

    pooling: "cls", the class token; "patches", the mean of the patch tokens; "registers", that of the registers;
    several with + between; "auto", the class token where the model has one. layers: how many of the last ones to read.
    precision: "bf16" runs the network under autocast. A Backbone that is being trained works in eval mode meanwhile.
    Raises DataError if the source has no labels, ConfigError for a token or layer that the model does not have.
    """
    device = torch.device(device)
    backbone = model if isinstance(model, Backbone) else model.backbone
    reading = resolve_reading(backbone, pooling, layers)
    views = evaluation_crop(backbone.preprocessing)
    model.to(device)
    encode = encoder(backbone, reading, device, precision)
    with evaluating(backbone):
        features = encode_source(encode, source, views, batch_size=batch_size, loader=loader, device=device)
        parts = parts_of(backbone, reading, device)
    return features._replace(info=identity(model, reading, precision) | features.info, parts=parts)


def encoder(
    backbone: Backbone, reading: Reading, device: torch.device, precision: Precision
) -> Callable[[Tensor], Tensor]:
    """What maps images (B, 3, H, W) in [0, 1] on the device to features (B, D), the parts side by side."""
    read = reader(backbone, reading)

    def encode(images: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            return torch.cat(read(images), dim=1)

    return encode


def raw_pixels(
    source: ImageSource, image_size: int = 32, *, crop_ratio: float = 1.0, loader: LoaderConfig | None = None
) -> Features:
    """The centre crops themselves as features, (N, 3 * image_size**2): what a network has to be better than.

    image_size in pixels; crop_ratio: image_size / short side after resizing, 1 keeps the whole short side.
    Raises DataError if the source has no labels.
    """
    views = CenterCrop(image_size=image_size, crop_ratio=crop_ratio, interpolation="bicubic")
    features = encode_source(lambda images: images.flatten(1), source, views, loader=loader)
    info = {
        "model": "raw pixels",
        "image_size": image_size,
        "crop_ratio": crop_ratio,
        "interpolation": "bicubic",
    }
    return features._replace(info=info | features.info)


def encode_source(
    encode: Callable[[Tensor], Tensor],
    source: ImageSource,
    views: CenterCrop,
    *,
    batch_size: int = 64,
    loader: LoaderConfig | None = None,
    device: torch.device | str = "cpu",
) -> Features:
    """What `encode` makes of every readable image of a labelled source, float32 on the CPU.

    encode: maps images (B, 3, H, W) in [0, 1] on the device to (B, D); called without gradient.
    Raises DataError without labels or readable images, NumericsError if a feature is not finite.
    """
    all_labels = labels_of(source)
    values, kept, count = torch.empty(0), list[Tensor](), 0
    for rows in encoded_rows(encode, source, views, batch_size=batch_size, loader=loader, device=device):
        if count == 0:
            values = torch.empty(len(source), rows.values.shape[1])
        values[count : count + len(rows.values)] = rows.values
        kept.append(rows.indices)
        count += len(rows.indices)
    if not kept:
        raise no_image(source)
    indices = torch.cat(kept)
    return Features(values[:count], all_labels[indices], class_names(source), record_of(source, indices))


def encoded_rows(
    encode: Callable[[Tensor], Tensor],
    source: ImageSource,
    views: CenterCrop,
    *,
    batch_size: int,
    loader: LoaderConfig | None,
    device: torch.device | str,
) -> Iterator[Rows]:
    """What `encode` makes of every readable image, batch by batch in the order of the source.

    A batch is read back while the device works on the next one. Raises NumericsError if a feature is not finite.
    """
    waiting: tuple[Tensor, Tensor] | None = None
    report = _Report(len(source))
    for batch in evaluation_batches(source, views, loader or LoaderConfig(), batch_size=batch_size):
        crops = [crop.to(device, non_blocking=True) for crop in batch.crops]
        colour = [drawn.to(device, non_blocking=True) for drawn in batch.colour]
        with torch.no_grad():
            found = encode(views.finish(crops, colour)[0]).float()
        if waiting is not None:
            yield _read_back(source, *waiting)
        waiting = batch.indices, found
        report.count(len(batch.indices))
    if waiting is not None:
        yield _read_back(source, *waiting)


def labels_of(source: ImageSource) -> Tensor:
    """(N,) int64. Raises DataError if the source has no labels."""
    if source.labels is None:
        raise DataError(
            f"{source.name} has no labels, and accuracy needs them",
            "put the images of each class in a folder of its own: DIR/train/CLASS/*.jpg, DIR/test/CLASS/*.jpg",
        )
    return torch.as_tensor(source.labels, dtype=torch.int64)


def class_names(source: ImageSource) -> tuple[str, ...]:
    """Names of the classes of a labelled source; numbers where it has none."""
    return tuple(source.classes) or tuple(str(label) for label in range(int(labels_of(source).max()) + 1))


def record_of(source: ImageSource, kept: Tensor) -> dict[str, Any]:
    """What a result says of its images; kept: positions of those that could be read."""
    readable = set(kept.tolist()) if len(kept) < len(source) else range(len(source))
    skipped = [source.describe(index) for index in range(len(source)) if index not in readable]
    return {
        "source": source.name,
        "fingerprint": source.fingerprint,
        "num_images": len(kept),
        "num_classes": len(class_names(source)),
        "skipped": skipped,
    }


def no_image(source: ImageSource) -> DataError:
    """What to raise where no image of a source could be read."""
    return DataError(f"no image of {source.name} could be read", "each is named above with its reason")


def evaluation_crop(want: Preprocessing) -> CenterCrop:
    """The crop a model is evaluated on. Raises ConfigError for an interpolation other than bilinear or bicubic."""
    if want.interpolation not in get_args(Interpolation):
        known = " and ".join(get_args(Interpolation))
        raise ConfigError(f"the model asks for {want.interpolation} interpolation; there are {known}")
    return CenterCrop(want.image_size, crop_ratio=want.crop_ratio, interpolation=want.interpolation)


def paired(train: Features, test: Features) -> tuple[Features, Features]:
    """Both features with the labels of test counted in the classes of train, which are matched by name.

    A test folder without images of some class numbers the others differently; this puts that right.
    Raises DataError if either holds no image or test has a class that train lacks, ConfigError if they are features of
    two models or readings, NumericsError if a value is not finite.
    """
    if len(train.values) == 0 or len(test.values) == 0:
        raise DataError(
            f"{len(train.values)} training and {len(test.values)} test images are too few to evaluate"
        )
    if train.values.shape[1] != test.values.shape[1]:
        widths = f"{train.values.shape[1]} and {test.values.shape[1]}"
        raise ConfigError(
            f"training and test features have widths {widths}", "extract both with one model and pooling"
        )
    for key in OF_ONE_MODEL:
        if key in train.info and key in test.info and train.info[key] != test.info[key]:
            raise ConfigError(
                f"training features have {key} {train.info[key]}, test features {test.info[key]}: two models are mixed",
                "extract both with one model and pooling",
            )
    refuse_not_finite(train, "training")
    refuse_not_finite(test, "test")
    device = train.values.device
    train, test = train.to(device), test.to(device)
    if train.classes == test.classes:
        return train, test
    unknown = [name for name in test.classes if name not in train.classes]
    if unknown:
        raise DataError(
            f"{test.info.get('source', 'test')} has classes without training images: {', '.join(unknown)}",
            "name the class folders of train and test alike",
        )
    position = torch.tensor([train.classes.index(name) for name in test.classes], device=device)
    return train, test._replace(labels=position[test.labels], classes=train.classes)


def refuse_not_finite(features: Features, name: str) -> None:
    """Raises NumericsError naming how many of the `name` features hold a value that is not finite, and the first."""
    # A value that is not finite shows in the smallest or largest of its row; that is far quicker than looking at each.
    checks = [
        torch.stack([block.amin(dim=1), block.amax(dim=1)]).isfinite().all(dim=0)
        for block in features.values.split(CHECKED_AT_ONCE)
    ]
    bad = (~torch.cat(checks)).nonzero()[:, 0] if checks else torch.empty(0)
    if len(bad):
        raise NumericsError(
            f"{len(bad)} of {len(features.values)} {name} features are not finite, the first in row {int(bad[0])}",
            "the weights may be damaged, or the precision too small: extract them again with fp32",
        )


def identity(model: Teacher | Backbone, reading: Reading, precision: Precision) -> dict[str, Any]:
    """What a result says of the model and how it was read."""
    if isinstance(model, Backbone):
        backbone, known = model, {"model": model.recipe.get("architecture", "student")}
    else:
        backbone = model.backbone
        known = {
            "model": model.name,
            "model_source": model.source,
            "license": model.license,
            "sha256": model.sha256,
            "origin": None if model.origin is None else model.origin._asdict(),
        }
    want = backbone.preprocessing
    return known | {
        "pooling": reading.pooling,
        "layers": reading.num_layers,
        "image_size": want.image_size,
        "crop_ratio": want.crop_ratio,
        "interpolation": want.interpolation,
        "precision": precision,
    }


def _read_back(source: ImageSource, indices: Tensor, found: Tensor) -> Rows:
    values = found.cpu()
    finite = values.isfinite().all(dim=1)
    if not finite.all():
        raise NumericsError(
            f"the features of {source.describe(int(indices[~finite][0]))} are not finite",
            "the weights may be damaged; if --precision is bf16, try fp32",
        )
    return Rows(indices, values)


class _Report:
    """Says now and then how far a long extraction is."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self.start = self.last = time.monotonic()

    def count(self, number: int) -> None:
        self.done += number
        now = time.monotonic()
        if now - self.last < SECONDS_BETWEEN_REPORTS:
            return
        self.last = now
        rate = self.done / (now - self.start)
        minutes = (self.total - self.done) / rate / 60
        log.info(
            "features of %d of %d images, %.0f a second, %.1f minutes left",
            self.done,
            self.total,
            rate,
            minutes,
        )


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """The network in eval mode; afterwards each of its parts is back in its own mode."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
