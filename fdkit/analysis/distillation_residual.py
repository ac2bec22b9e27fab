"""What a student fails to match of its teacher: in which channels, where in the image, and in which images.

The best linear map from the student's final tokens to the teacher's whitened ones is fitted on some of the images and
measured on the others; measured on the same it would flatter. A fresh map is taken in place of the projector that a run
trained, so that any model can be compared with any other, whatever it was trained for.
Both models see the teacher's evaluation crop, each resized to its own input, as in distillation. A student's map on
another grid is resampled to the teacher's. Class tokens are compared if both have one, and registers are not.
Source of target and pairing: Wei et al. 2022 (arXiv 2205.14141), section 3.
"""

import heapq
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from fdkit.analysis._analysis import Analysis
from fdkit.analysis._features import need_models
from fdkit.analysis._figure import WIDE, in_style
from fdkit.analysis._pictures import image_to_text, to_pixels
from fdkit.analysis._residual import Folds, LinearMap, Unexplained
from fdkit.analysis._residual_figure import draw_residual, percent
from fdkit.analysis._targets import final_tokens
from fdkit.analysis.observe import Images, Observed, first_images
from fdkit.config import Config
from fdkit.errors import ConfigError, DataError, NumericsError
from fdkit.models.backbone import Tokens
from fdkit.models.distillation_target import paired_tokens, whiten

if TYPE_CHECKING:
    from matplotlib.figure import Figure

READING = (
    "Explained variance is 1 where a linear map of the student says all that the teacher says, and 0 where it does no "
    "better than the channel's mean: channels and places far below the others are what the student fails to match, "
    "and bright spots in the images are where it fails."
)
VectorWhitening = Literal["layernorm", "l2", "none"]
"""Kinds of whitening that a token alone decides; over a batch it would hang on which images come together."""
KEEPS_COLOURS = True
PICTURE_SIDE = 112


class DistillationResidualConfig(Config):
    """How student and teacher are compared, on MODEL MODEL ...: the teacher first, then one student or several."""

    whitening: VectorWhitening = "layernorm"
    """What the teacher's tokens go through first: layernorm (each token to mean 0 and variance 1), l2 (to length 1)
    or none."""
    fit_ratio: float = Field(default=0.5, gt=0, lt=1)
    """Share of the images that the linear map is fitted on, spread evenly over them; the others are measured."""
    ridge: float | None = Field(default=None, ge=0)
    """Penalty on the map's weights, in units of the mean variance of the student's channels; 0 is least squares. Left
    out, the power of ten from 1e-6 to 100 that serves best among the fitted images, one half of them against the
    other."""
    num_images: int = Field(default=256, ge=2)
    """Images fitted and measured on, drawn from the data with the seed."""
    num_shown: int = Field(default=4, ge=1, le=16)
    """Measured images shown that are explained worst, and as many that are explained best."""
    batch_size: int = Field(default=16, ge=1)
    """Images a forward pass; memory grows with it."""


class _Batch(NamedTuple):
    """A part of the images, and what the teacher says of them."""

    images: Images
    positions: list[int]
    """Which of all images these are, from 0."""
    teacher: Tokens


def analyze(observed: Sequence[Observed], config: DistillationResidualConfig) -> Analysis:
    """The share of the first model's whitened tokens that a linear map of each other model's explains, held out.

    The numbers hold "teacher", the first model's name, and a table for each other: "explained_variance" of the measured
    images and "explained_variance_fitted" of the others; "by_channel"; "by_position", rows of the teacher's "grid";
    "class_token" and "class_token_between_images", see `_residual.Unexplained`; "by_image", with "indices" beside;
    "is_resampled", whether the student's grid is another; the "ridge" penalty of the map; and the "worst" and "best"
    images, each with its "index", "description", "label", "explained_variance", small "picture" (JPEG in base64) and
    "residual", the squared error of every patch in units of what a token of the target deviates on average.
    Memory: for each student two covariances of both widths together, a sum a place and channel, one number an image,
    and the images shown.
    Raises ConfigError for fewer than two models, DataError for too few images, NumericsError for values that are not
    finite.
    """
    need_models(observed, "distillation-residual")
    if len(observed) < 2:
        raise ConfigError(
            f"distillation-residual sets students against a teacher; {observed[0].name} is alone",
            "name the teacher first, then a student: fdkit analyze distillation-residual TEACHER STUDENT --data PATH",
        )
    teacher, *students = observed
    maps = _fit(teacher, students, config)
    numbers = {
        "analysis": "distillation-residual",
        "unit": "share of the target's variance",
        "teacher": teacher.name,
        "whitening": config.whitening,
        "models": _measure(teacher, students, maps, config),
    }
    return Analysis(numbers, partial(draw, numbers))


def is_fitted(position: int, ratio: float) -> bool:
    """Whether the image at a position, from 0, is one of those that the map is fitted on: evenly spread, ratio of all.

    Not the first part of them: images that are read class by class would leave other classes for the rest.
    """
    return math.floor((position + 1) * ratio) > math.floor(position * ratio)


def _batches(teacher: Observed, config: DistillationResidualConfig, *, fitted: bool) -> Iterator[_Batch]:
    """The images that are fitted on, or the others. Raises DataError if there are none."""
    start = num_images = 0
    for images in first_images(teacher, config.num_images):
        every = range(start, start + len(images.pixels))
        start = every.stop
        positions = [one for one in every if is_fitted(one, config.fit_ratio) == fitted]
        num_images += len(positions)
        if positions:
            rows = torch.tensor(positions) - every.start
            labels, indices = (None if one is None else one[rows] for one in (images.labels, images.indices))
            part = Images(images.pixels[rows], labels, indices)
            yield _Batch(part, positions, final_tokens(teacher, part.pixels))
    if num_images == 0:
        done = "fit a map on" if fitted else "measure it on"
        raise DataError(
            f"of {start} images, none is left to {done} with a fit ratio of {config.fit_ratio}",
            "use more images",
        )


def _pair(student: Tokens, teacher: Tokens, whitening: VectorWhitening) -> tuple[Tensor, Tensor]:
    """Paired tokens on the teacher's device, the teacher's whitened."""
    own, target = paired_tokens(student, teacher)
    return own.to(target.device), whiten(target, whitening)


def _fit(
    teacher: Observed, students: Sequence[Observed], config: DistillationResidualConfig
) -> list[LinearMap]:
    folds: list[Folds] = []
    for batch in _batches(teacher, config, fitted=True):
        for number, student in enumerate(students):
            tokens = final_tokens(student, batch.images.pixels)
            own, target = _pair(tokens, batch.teacher, config.whitening)
            if number == len(folds):
                folds.append(Folds(own.shape[-1], target.shape[-1]))
            folds[number].add(own, target)
    return [one.fit(config.ridge) for one in folds]


def _measure(
    teacher: Observed,
    students: Sequence[Observed],
    maps: Sequence[LinearMap],
    config: DistillationResidualConfig,
) -> list[dict[str, Any]]:
    residuals: list[_Residual] = []
    for batch in _batches(teacher, config, fitted=False):
        for number, student in enumerate(students):
            tokens = final_tokens(student, batch.images.pixels)
            if number == len(residuals):
                device = batch.teacher.patches.device
                residuals.append(_Residual(teacher, tokens, batch.teacher, maps[number].to(device), config))
            residuals[number].add(tokens, batch)
    return [
        {"name": student.name, **residual.numbers()}
        for student, residual in zip(students, residuals, strict=True)
    ]


class _Residual:
    """What is gathered of one student."""

    def __init__(
        self,
        observed: Observed,
        student: Tokens,
        teacher: Tokens,
        linear: LinearMap,
        config: DistillationResidualConfig,
    ) -> None:
        self.observed = observed
        self.config = config
        self.grid = teacher.grid
        self.is_resampled = student.grid != teacher.grid
        num_prefix = min(student.prefix.shape[1], teacher.prefix.shape[1], 1)
        num_tokens = num_prefix + math.prod(self.grid)
        self.unexplained = Unexplained(linear, num_tokens=num_tokens, num_prefix=num_prefix)
        self.indices: list[int] = []
        self.worst: list[dict[str, Any]] = []
        self.best: list[dict[str, Any]] = []

    def add(self, student: Tokens, batch: _Batch) -> None:
        """Counts a batch."""
        first = len(self.unexplained.by_image)
        errors = self.unexplained.add(*_pair(student, batch.teacher, self.config.whitening))
        errors = errors[:, self.unexplained.num_prefix :].unflatten(1, self.grid).cpu()
        indices = batch.images.indices
        self.indices += batch.positions if indices is None else indices.tolist()
        found = [
            self._entry(batch.images, row, first + row, errors[row])
            for row in range(len(errors))
            if self.unexplained.by_image[first + row] is not None
        ]
        count = self.config.num_shown
        self.worst = [
            _with_picture(one) for one in heapq.nsmallest(count, self.worst + found, key=_explained)
        ]
        self.best = [_with_picture(one) for one in heapq.nlargest(count, self.best + found, key=_explained)]

    def _entry(self, images: Images, row: int, number: int, errors: Tensor) -> dict[str, Any]:
        label = -1 if images.labels is None else int(images.labels[row])
        classes = self.observed.classes
        return {
            "index": self.indices[number],
            "description": self.observed.describe(self.indices[number]),
            "label": classes[label] if 0 <= label < len(classes) else None,
            "explained_variance": self.unexplained.by_image[number],
            "pixels": images.pixels[row],
            "errors": errors,
        }

    def numbers(self) -> dict[str, Any]:
        """See `analyze`."""
        unit = self.unexplained.deviation_of_a_token()
        if unit == 0:
            raise NumericsError(
                f"the tokens of {self.observed.name} are alike in all measured images: there is nothing to explain"
            )
        tokens_an_image = self.unexplained.num_prefix + math.prod(self.grid)
        num_fitted = self.unexplained.linear.num_tokens // tokens_an_image
        return {
            "num_images": num_fitted + self.unexplained.num_images,
            "num_fitted_images": num_fitted,
            "grid": list(self.grid),
            "is_resampled": self.is_resampled,
            "ridge": self.unexplained.linear.ridge,
            "explained_variance_fitted": self.unexplained.linear.explained_variance,
            **self.unexplained.numbers(self.grid),
            "by_image": self.unexplained.by_image,
            "indices": self.indices,
            "worst": [_finished(one, unit) for one in self.worst],
            "best": [_finished(one, unit) for one in self.best],
        }


def _explained(entry: dict[str, Any]) -> float:
    return float(entry["explained_variance"])


def _with_picture(entry: dict[str, Any]) -> dict[str, Any]:
    """The entry with a small picture in place of the pixels."""
    if "pixels" not in entry:
        return entry
    entry = dict(entry)  # an image may be among the worst and the best
    pixels = entry.pop("pixels")[None].float()
    small = F.interpolate(pixels, size=(PICTURE_SIDE, PICTURE_SIDE), mode="bilinear", antialias=True)
    return entry | {"picture": image_to_text(to_pixels(small[0].clamp(0, 1)), quality=90)}


def _finished(entry: dict[str, Any], unit: float) -> dict[str, Any]:
    """The entry as plain data, squared errors in units of a token's mean squared deviation."""
    entry = dict(entry)
    errors = entry.pop("errors") / unit
    return entry | {"residual": [[round(one, 4) for one in row] for row in errors.tolist()]}


def scalars(model: dict[str, Any]) -> dict[str, float]:
    """What is explained of the teacher by a linear map, of all tokens and of what class tokens differ in."""
    found = {"explained variance of the teacher (%)": 100 * model["explained_variance"]}
    if model["class_token_between_images"] is not None:
        found["explained variance of its class token (%)"] = 100 * model["class_token_between_images"]
    return found


def summary(numbers: dict[str, Any]) -> tuple[str, list[list[str]]]:
    """A table for people: its title, and its rows, the header first."""
    header = ["student", "explained", "where fitted", "class token", "worst channel", "worst image"]
    rows = [
        [
            model["name"],
            percent(model["explained_variance"]),
            percent(model["explained_variance_fitted"]),
            percent(model["class_token_between_images"]),
            percent(_smallest(model["by_channel"])),
            percent(_smallest(model["by_image"])),
        ]
        for model in numbers["models"]
    ]
    return f"distillation-residual, explained variance of {numbers['teacher']}", [header, *rows]


def _smallest(values: Sequence[float | None]) -> float | None:
    return min((one for one in values if one is not None), default=None)


@in_style
def draw(numbers: dict[str, Any], width: float = WIDE) -> "Figure":
    """Explained variance of every channel, sorted, a line a student; by place, a map a student; then the images that
    are explained worst and best, above the residual of their patches.

    numbers: as `analyze` gives them; width: inches.
    """
    return draw_residual(numbers, width)
