"""How well classes of pixels are told apart: one confusion matrix, streamed over images, and what follows from it."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fdkit.data.loader import LoaderConfig, evaluation_batches
from fdkit.data.segmentation import IGNORED, SegmentationSource
from fdkit.data.segmentation_views import WholeImage, finish
from fdkit.errors import NumericsError
from fdkit.evaluation._metrics import Metrics


class Measured(NamedTuple):
    """What `measure` found in a split."""

    confusion: Tensor
    """(K, K) int64 on the CPU: pixels by true class (row) and predicted class (column)."""
    num_images: int
    skipped: list[str]
    """Images that could not be read."""


def combined(parts: Sequence[Measured]) -> Measured:
    """What several processes found, each in its part of a split, as one."""
    return Measured(
        torch.stack([part.confusion for part in parts]).sum(dim=0),
        sum(part.num_images for part in parts),
        sorted(name for part in parts for name in part.skipped),
    )


def measure(
    score: Callable[[Tensor], Tensor],
    source: SegmentationSource,
    *,
    short_side: int,
    loader: LoaderConfig | None = None,
    device: torch.device | str = "cpu",
) -> Measured:
    """The confusion of every readable image of a source, one at a time, at the resolution of its mask.

    score: maps an image (3, h, w) in [0, 1] on the device to scores (K, r, c), which are resized bilinearly to the
    mask; called without gradient. short_side: of the images, in pixels.
    Raises DataError if the loader finds too many images unreadable, NumericsError for scores that are not finite.
    """
    num_classes = len(source.classes)
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
    kept: list[int] = []
    views = WholeImage(short_side)
    for batch in evaluation_batches(source, views, loader or LoaderConfig(), batch_size=1):
        images, masks = views.finish([crop.to(device, non_blocking=True) for crop in batch.crops], [])
        predicted = predict(score, images[0], masks.shape[-2:], name=source.describe(int(batch.indices[0])))
        confusion += confusion_matrix(predicted, masks[0], num_classes)
        kept += batch.indices.tolist()
    skipped = [source.describe(index) for index in sorted(set(range(len(source))) - set(kept))]
    return Measured(confusion.cpu(), len(kept), skipped)


def predict_image(
    score: Callable[[Tensor], Tensor],
    source: SegmentationSource,
    index: int,
    *,
    short_side: int,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    """Image `index` uint8 (H, W, 3), its classes (H, W) with IGNORED among them, those predicted (H, W); on the CPU.

    score and short_side are as for `measure`. Raises BadImage if the image cannot be read.
    """
    pixels = source.read_pixels(index)
    crops = WholeImage(short_side)(pixels, np.random.default_rng(0)).crops
    images, masks = finish([crop[None].to(device) for crop in crops])
    predicted = predict(score, images[0], masks.shape[-2:], name=source.describe(index))
    return pixels[..., :3], masks[0].cpu(), predicted.cpu()


@torch.no_grad()
def predict(
    score: Callable[[Tensor], Tensor], image: Tensor, size: Sequence[int], *, name: str = "the image"
) -> Tensor:
    """The class of every pixel, int64 of a size (H, W), for an image (3, h, w); score is as for `measure`.

    Of equal scores the lower class wins. Raises NumericsError for scores that are not finite.
    """
    scores = score(image).float()
    scores = F.interpolate(scores[None], size=tuple(size), mode="bilinear", align_corners=False)[0]
    if not scores.isfinite().all():
        raise NumericsError(
            f"the scores of {name} are not finite", "the weights may be damaged, or training has diverged"
        )
    return (scores == scores.amax(dim=0)).int().argmax(dim=0)


def confusion_matrix(predicted: Tensor, truth: Tensor, num_classes: int) -> Tensor:
    """(K, K) int64: pixels by true class (row) and predicted class (column); IGNORED ones are left out.

    predicted: classes in [0, K), truth: classes or IGNORED; both int64 of one shape.
    """
    counts = truth != IGNORED
    cells = truth[counts] * num_classes + predicted[counts]
    return torch.bincount(cells, minlength=num_classes**2).view(num_classes, num_classes)


def scores_of(confusion: Tensor, classes: Sequence[str]) -> Metrics:
    """What a confusion matrix (K, K) says, as plain JSON; every number is a fraction in [0, 1].

    {"miou": mean over classes of true positives / (true + predicted - true positives), "pixel_accuracy": share of
    pixels that are right, "mean_accuracy": mean over classes of the share of their pixels that is right, "per_class":
    [{"name", "iou", "accuracy", "pixels"}], "absent": names of the classes that are neither in the truth nor in the
    prediction, which count in no mean, "confusion": rows of pixels}. A class that is only predicted has IoU 0, which
    counts, and no accuracy (null).
    Source: Long et al. 2015, section 5, where these are mean IU, pixel and mean accuracy.
    """
    matrix = confusion.double()
    right, true, predicted = matrix.diagonal(), matrix.sum(dim=1), matrix.sum(dim=0)
    iou = _ratios(right, true + predicted - right)
    accuracy = _ratios(right, true)
    per_class = [
        {"name": name, "iou": one, "accuracy": share, "pixels": int(count)}
        for name, one, share, count in zip(classes, iou, accuracy, true.tolist(), strict=True)
    ]
    return {
        "miou": _mean(iou),
        "pixel_accuracy": float(right.sum() / true.sum()) if true.sum() else None,
        "mean_accuracy": _mean(accuracy),
        "per_class": per_class,
        "absent": [name for name, one in zip(classes, iou, strict=True) if one is None],
        "confusion": confusion.tolist(),
    }


def _ratios(parts: Tensor, wholes: Tensor) -> list[float | None]:
    """Each part of its whole; None where the whole is nothing."""
    return [
        part / whole if whole else None for part, whole in zip(parts.tolist(), wholes.tolist(), strict=True)
    ]


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
