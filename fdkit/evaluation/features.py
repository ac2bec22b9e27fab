"""Features of labelled images: read every image once, run the frozen network once, keep one vector an image.

Everything the evaluators do afterwards is arithmetic on these vectors.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from fdkit.data.loader import LoaderConfig, evaluation_batches
from fdkit.data.sources import ImageSource
from fdkit.data.views import CenterCrop, Interpolation
from fdkit.errors import ConfigError, DataError, NumericsError
from fdkit.models.backbone import Backbone, Preprocessing, pool
from fdkit.teachers.teacher import Teacher

Pooling = Literal["auto", "cls", "patches"]
Precision = Literal["fp32", "bf16"]


class Features(NamedTuple):
    """One vector an image, in the order of the source."""

    values: Tensor
    """(N, D) float32."""
    labels: Tensor
    """(N,) int64, positions in classes."""
    classes: tuple[str, ...]
    """Class names."""
    info: dict[str, Any]
    """Where they come from, as plain JSON: model, pooling, crop, source, fingerprint, skipped images."""

    def to(self, device: torch.device | str) -> "Features":
        """The same features on another device, where the evaluators then run."""
        return self._replace(values=self.values.to(device), labels=self.labels.to(device))


def extract_features(
    model: Teacher | Backbone,
    source: ImageSource,
    *,
    pooling: Pooling = "auto",
    batch_size: int = 64,
    loader: LoaderConfig | None = None,
    device: torch.device | str = "cpu",
    precision: Precision = "fp32",
) -> Features:
    """Features of every readable image of a labelled source, from the model's own evaluation crop; on the CPU.

    pooling: "cls", the class token; "patches", the mean of the patch tokens; "auto", the class token where the
    model has one. precision: "bf16" runs the network under autocast. A Backbone that is being trained works in
    eval mode meanwhile. Raises DataError if the source has no labels, ConfigError if "cls" is asked of a model
    without a class token.
    """
    device = torch.device(device)
    backbone = model if isinstance(model, Backbone) else model.backbone
    chosen = resolve_pooling(backbone, pooling)
    want = backbone.preprocessing
    views = evaluation_crop(want)
    model.to(device)

    def encode(images: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            tokens = model(images) if isinstance(model, Backbone) else model.encode(images)
        return pool(tokens, chosen)

    with _evaluating(backbone):
        features = encode_source(encode, source, views, batch_size=batch_size, loader=loader, device=device)
    info = _identity(model) | {
        "pooling": chosen,
        "image_size": want.image_size,
        "crop_ratio": want.crop_ratio,
        "interpolation": want.interpolation,
        "precision": precision,
    }
    return features._replace(info=info | features.info)


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
    if source.labels is None:
        raise DataError(
            f"{source.name} has no labels, and accuracy needs them",
            "put the images of each class in a folder of its own: DIR/train/CLASS/*.jpg, DIR/test/CLASS/*.jpg",
        )
    values, labels, kept, count = torch.empty(0), torch.empty(len(source), dtype=torch.int64), set[int](), 0
    for batch in evaluation_batches(source, views, loader or LoaderConfig(), batch_size=batch_size):
        crops = [crop.to(device, non_blocking=True) for crop in batch.crops]
        colour = [drawn.to(device, non_blocking=True) for drawn in batch.colour]
        with torch.no_grad():
            found = encode(views.finish(crops, colour)[0]).float().cpu()
        _check_finite(found, source, batch.indices)
        if count == 0:
            values = torch.empty(len(source), found.shape[1])
        rows = slice(count, count + len(found))
        values[rows], labels[rows] = found, batch.labels
        kept.update(batch.indices.tolist())
        count += len(found)
    if count == 0:
        raise DataError(f"no image of {source.name} could be read")
    skipped = [source.describe(index) for index in range(len(source)) if index not in kept]
    info = {"source": source.name, "fingerprint": source.fingerprint, "num_images": count, "skipped": skipped}
    classes = tuple(source.classes) or tuple(str(label) for label in range(int(labels[:count].max()) + 1))
    return Features(values[:count], labels[:count], classes, info)


def evaluation_crop(want: Preprocessing) -> CenterCrop:
    """The crop a model is evaluated on. Raises ConfigError for an interpolation other than bilinear or bicubic."""
    if want.interpolation not in get_args(Interpolation):
        known = " and ".join(get_args(Interpolation))
        raise ConfigError(f"the model asks for {want.interpolation} interpolation; there are {known}")
    return CenterCrop(want.image_size, crop_ratio=want.crop_ratio, interpolation=want.interpolation)


def resolve_pooling(backbone: Backbone, pooling: Pooling) -> Literal["cls", "patches"]:
    """The pooling asked for, with "auto" decided.

    Raises ConfigError for "cls" of a model without a class token.
    """
    if pooling == "auto":
        return "cls" if backbone.num_prefix_tokens > 0 else "patches"
    if pooling == "cls" and backbone.num_prefix_tokens == 0:
        raise ConfigError("pooling is cls, but the model has no class token", "use --pooling patches")
    return pooling


def paired(train: Features, test: Features) -> tuple[Features, Features]:
    """Both features with the labels of test counted in the classes of train, which are matched by name.

    A test folder without images of some class numbers the others differently; this puts that right.
    Raises DataError if either holds no image or test has a class that train lacks, ConfigError if widths
    differ.
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


def _identity(model: Teacher | Backbone) -> dict[str, Any]:
    if isinstance(model, Backbone):
        return {"model": model.recipe.get("architecture", "student")}
    return {
        "model": model.name,
        "model_source": model.source,
        "license": model.license,
        "sha256": model.sha256,
    }


def _check_finite(found: Tensor, source: ImageSource, indices: Tensor) -> None:
    finite = found.isfinite().all(dim=1)
    if not finite.all():
        first = int(indices[~finite][0])
        raise NumericsError(
            f"the features of {source.describe(first)} are not finite",
            "the weights may be damaged; if --precision is bf16, try fp32",
        )


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """The network in eval mode; afterwards each of its parts is back in its own mode."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
