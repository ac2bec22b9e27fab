"""How many directions the features of a model fill: the spectrum of their covariance, and four ranks that sum it up.

Features that collapse put all of their variance into few directions; a student that matches its teacher should match
its spectrum too. The ranks need no labels. They answer different questions: the effective rank and the participation
ratio are of the centred features, RankMe is of the features as they are, so that a mean far from 0 lowers it, and
LiDAR counts only directions that tell images apart better than augmented views of one image.
"""

from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field, field_validator
from torch import Tensor

from fdkit.analysis._analysis import Analysis
from fdkit.analysis._features import (
    POOLING_WORDS,
    FeatureConfig,
    each_model,
    final_features,
    need_models,
)
from fdkit.analysis._figure import GREY, NARROW, WIDE, in_style, new_figure
from fdkit.analysis._lines import colour_of, line_of
from fdkit.analysis._moments import Moments
from fdkit.analysis._views import ViewConfig, draw_views
from fdkit.analysis.observe import Images, Observed, first_images
from fdkit.models.representation import entropy_rank

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

READING = (
    "A line that falls late, and a cumulated one that rises late, belong to features that use many directions; no rank "
    "exceeds what the number of images allows, so compare models on the same images, more of them than channels."
)
LIDAR_DELTA = 1e-4
"""Added to the covariance within views; in units of the features squared."""
ROUNDING = 1e-6
"""Features that differ by less than this share of their length are taken as equal: float32 differs that much itself."""
RANKS = {
    "effective_rank": "effective rank",
    "participation_ratio": "participation ratio",
    "rankme": "RankMe",
    "lidar": "LiDAR",
}
LINE = 0.23
"""Inches a line of the table."""


class SpectrumConfig(ViewConfig, FeatureConfig):
    """Which features are looked at, and on how many images and views."""

    num_images: int = Field(default=1024, ge=2)
    """Images read, drawn from the data with the seed; ranks are meant for more images than the features have
    channels."""
    num_views: int = Field(default=10, ge=0)
    """Augmented views an image for LiDAR; 0 leaves LiDAR out, and its cost of num_views x view_images passes."""
    view_images: int = Field(default=128, ge=2)
    """Of the images, how many LiDAR is measured on, the first ones; it is less than their number."""

    @field_validator("num_views")
    @classmethod
    def _one_view_has_no_spread(cls, value: int) -> int:
        if value == 1:
            raise ValueError("LiDAR compares views of an image: give 2 or more, or 0 to leave it out")
        return value


class Scatter:
    """What LiDAR gathers: how images differ, and how views of one image do; two D x D matrices."""

    def __init__(self, width: int) -> None:
        self.images = Moments(width)
        """Of the mean over views of each image."""
        self._within = torch.zeros(width, width, dtype=torch.float64)
        self._num_views = 0

    def add(self, features: Tensor) -> None:
        """Counts features (B, Q, D) of Q views of each of B images."""
        features = features.double()
        means = features.mean(1)
        self.images.add(means)
        spread = (features - means[:, None]).flatten(0, 1)
        self._within += spread.T @ spread
        self._num_views += len(spread)

    def within(self) -> Tensor:
        """(D, D): the covariance of views about the mean of their image."""
        return self._within / self._num_views


def explained_variance(covariance: Tensor, num_images: int) -> Tensor:
    """Shares of the variance along the principal directions, largest first; (min(N - 1, D),), sums to 1.

    All 0 if nothing varies. Directions beyond N - 1, which N rows cannot vary in, are left out.
    """
    values = _eigenvalues(covariance)[: num_images - 1]
    total = values.sum()
    return values / total if total > 0 else values


def effective_rank(shares: Tensor) -> float:
    """Exp of the entropy of the centred features' singular values, scaled to sum to 1; at most their number.

    shares: of the variance, as `explained_variance` gives them; singular values are proportional to their roots.
    Source: Roy and Vetterli 2007, definition 1.
    """
    return entropy_rank(shares.sqrt(), epsilon=0).item()


def participation_ratio(shares: Tensor) -> float:
    """1 / sum of squared shares of the variance: as many directions, were they to share it alike; 1 if all are 0."""
    square = shares.square().sum()
    return (shares.sum().square() / square).item() if square > 0 else 1.0


def rankme(second_moment: Tensor, num_images: int) -> float:
    """RankMe of features that are neither centred nor scaled, from the mean of z z^T over N rows; at most min(N, D).

    Source: Garrido et al. 2023 (arXiv 2210.02885), equation 1. Singular values come as roots of eigenvalues, those that
    are 0 as up to 1e-8 of the largest.
    """
    return entropy_rank(_eigenvalues(second_moment)[:num_images].sqrt()).item()


def lidar(between: Tensor, within: Tensor, *, delta: float = LIDAR_DELTA) -> float:
    """Exp of the entropy of the eigenvalues of W^-1/2 B W^-1/2, scaled to sum to 1 and lifted by epsilon 1e-7.

    between: B, the covariance of the images' mean features; within: that of the views about them, W once delta times
    the identity is added. Its bound is min(images - 1, D). delta has the unit of the features squared, so LiDAR of
    features of tiny scale falls back to a rank of B.
    Source: Thilak et al. 2023 (arXiv 2312.04000), the definition of LiDAR; implementations differ in delta, so compare
    values of one delta, and of one number of images and views.
    """
    ridge = within + delta * torch.eye(len(within), dtype=within.dtype)
    # Of the pencil (B, W): the same numbers, without the root of W.
    from scipy import linalg  # type: ignore[import-untyped]  # of all that the file does, LiDAR alone needs it

    values = torch.from_numpy(linalg.eigh(between.numpy(), ridge.numpy(), eigvals_only=True))
    return entropy_rank(values.clamp(min=0)).item()


def _eigenvalues(matrix: Tensor) -> Tensor:
    """Of a symmetric matrix without negative ones but by rounding, largest first."""
    return torch.linalg.eigvalsh(matrix).flip(0).clamp(min=0)


def analyze(observed: Sequence[Observed], config: SpectrumConfig) -> Analysis:
    """The spectrum of the final features of every model, and its ranks.

    Memory: matrices of D x D float64, whatever the number of images; features themselves are not kept.
    The numbers hold, for each model, "width" D, "explained_variance", shares of the variance along the min(N - 1, D)
    principal directions, largest first, "variance", their sum before (of all channels, N as the divisor), the ranks
    "effective_rank", "participation_ratio", "rankme" and "lidar" (null without views), see the functions of these
    names, "rank_bound" of the first two, "is_bounded_by_images", whether N is not above D, and "lidar_images",
    "lidar_views".
    Raises ConfigError for the class token of a model without one, DataError for fewer than 2 images, NumericsError for
    features that are not finite.
    """
    need_models(observed, "spectrum")
    numbers = {
        "analysis": "spectrum",
        "pooling": config.pooling,
        "models": [_measure(one, config) for one in observed],
    }
    return Analysis(numbers, partial(draw, numbers))


def _measure(observed: Observed, config: SpectrumConfig) -> dict[str, Any]:
    moments: Moments | None = None
    scatter: Scatter | None = None
    for images in first_images(observed, config.num_images, at_least=2):
        features = final_features(observed, images.pixels, config.pooling)
        if moments is None:
            moments = Moments(features.shape[1])
            scatter = Scatter(features.shape[1]) if config.num_views else None
        left = config.view_images - moments.count
        if scatter is not None and left > 0:
            scatter.add(_features_of_views(observed, images, left, first=moments.count, config=config))
        moments.add(features)
    assert moments is not None, "first_images gives images or raises"
    return _numbers(observed.name, moments, scatter) | {"lidar_views": config.num_views}


def _features_of_views(
    observed: Observed, images: Images, count: int, *, first: int, config: SpectrumConfig
) -> Tensor:
    """(B, Q, D) of Q views of each of the first `count` images of a batch."""
    pixels = images.pixels[:count]
    views = (draw_views(pixels, first=first, view=view, config=config) for view in range(config.num_views))
    return torch.stack([final_features(observed, view, config.pooling) for view in views], dim=1)


def _numbers(name: str, moments: Moments, scatter: Scatter | None) -> dict[str, Any]:
    num_images, width = moments.count, len(moments.mean)
    covariance = _varying(moments)
    shares = explained_variance(covariance, num_images)
    return {
        "name": name,
        "num_images": num_images,
        "width": width,
        "rank_bound": len(shares),
        "is_bounded_by_images": num_images <= width,
        "variance": covariance.trace().item(),
        "effective_rank": effective_rank(shares),
        "participation_ratio": participation_ratio(shares),
        "rankme": rankme(moments.second_moment(), num_images),
        "lidar": lidar(_varying(scatter.images), scatter.within()) if scatter else None,
        "lidar_images": scatter.images.count if scatter else 0,
        "explained_variance": shares.tolist(),
    }


def _varying(moments: Moments) -> Tensor:
    """The covariance, 0 where it is nothing but rounding, whose spectrum would look full of directions."""
    covariance = moments.covariance()
    is_rounding = covariance.trace() <= ROUNDING**2 * moments.second_moment().trace()
    return torch.zeros_like(covariance) if is_rounding else covariance


def scalars(model: dict[str, Any]) -> dict[str, float]:
    """The ranks, in directions."""
    return {words: model[name] for name, words in RANKS.items() if model[name] is not None}


def summary(numbers: dict[str, Any]) -> tuple[str, list[list[str]]]:
    """A table for people: its title, and its rows, the header first."""
    models = numbers["models"]
    header = ["model", "images", "channels", *RANKS.values()]
    rows = [
        [model["name"], str(model["num_images"]), str(model["width"]), *_ranks(model)] for model in models
    ]
    return f"spectrum, {POOLING_WORDS[numbers['pooling']]}, ranks in directions{_warning(models)}", [
        header,
        *rows,
    ]


def _ranks(model: dict[str, Any]) -> list[str]:
    return [_of(model, name) for name in RANKS]


def _warning(models: Sequence[dict[str, Any]]) -> str:
    """Empty where there are images enough."""
    bounded = [model for model in models if model["is_bounded_by_images"]]
    return (
        f"; too few images, which bound the ranks of {each_model(bounded, 'rank_bound')}" if bounded else ""
    )


@in_style
def draw(numbers: dict[str, Any], width: float = WIDE) -> "Figure":
    """Share of the variance a component, the shares cumulated, and a table of ranks; a colour a model.

    numbers: as `analyze` gives them; width: inches.
    """
    models = numbers["models"]
    is_narrow = width <= NARROW
    heights = [4.9 if is_narrow else 2.7, LINE * (2 + 2 * len(models))]
    figure = new_figure(width, sum(heights))
    top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=heights)[:, 0]
    left, right = top.subplots(2, 1) if is_narrow else top.subplots(1, 2)
    _draw_shares(left, models)
    _draw_cumulated(right, models)
    _draw_ranks(bottom, models)
    return figure


def _draw_shares(axes: "Axes", models: Sequence[dict[str, Any]]) -> None:
    lowest, highest = 100.0, 0.0
    for number, model in enumerate(models):
        shares = [100 * share for share in model["explained_variance"] if share > 0]
        axes.loglog(range(1, len(shares) + 1), shares, linewidth=1.8, **line_of(number))
        # The last component of few images is often far below the rest and would flatten all lines.
        kept = shares[: max(1, round(0.98 * len(shares)))]
        lowest, highest = min([lowest, *kept]), max([highest, *kept])
    if highest > 0:  # nothing is drawn of features that are all equal
        axes.set_ylim(lowest / 2, 1.5 * highest)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_title("spectrum")
    axes.set_ylabel("share of variance (%)")
    _label_components(axes)


def _draw_cumulated(axes: "Axes", models: Sequence[dict[str, Any]]) -> None:
    for number, model in enumerate(models):
        shares = model["explained_variance"]
        cumulated = [100 * value for value in accumulate(shares)]
        axes.semilogx(range(1, len(shares) + 1), cumulated, linewidth=1.8, **line_of(number))
    axes.axhline(90, color=GREY, linestyle=(0, (4, 3)), linewidth=1)
    axes.set_ylim(0, 103)
    axes.set_title("cumulated")
    axes.set_ylabel("variance explained (%)")
    _label_components(axes)


def _label_components(axes: "Axes") -> None:
    axes.set_xlabel("principal component")
    axes.xaxis.set_major_formatter("{x:g}")


def _draw_ranks(figure: "SubFigure", models: Sequence[dict[str, Any]]) -> None:
    """Text in rows and columns; a model's name, in the colour of its line, on a line of its own, as it may be long."""
    from matplotlib.lines import Line2D

    num_lines = 2 + 2 * len(models)
    columns = [0.22 + 0.76 * place / (len(RANKS) - 1) for place in range(len(RANKS))]
    for place, words in zip(columns, RANKS.values(), strict=True):
        words = words.replace(" ", "\n")
        figure.text(place, 1, words, color=GREY, ha="right", va="top", fontsize=8.5, linespacing=1.0)
    for number, model in enumerate(models):
        y = 1 - (2.5 + 2 * number) / num_lines
        line = Line2D([0.02, 0.09], [y, y], linewidth=2, transform=figure.transSubfigure, **line_of(number))
        figure.add_artist(line)
        figure.text(
            0.11, y, model["name"], color=colour_of(number), va="center", fontweight="bold", fontsize=9
        )
        for place, name in zip(columns, RANKS, strict=True):
            figure.text(place, y - 1 / num_lines, _of(model, name), ha="right", va="center", fontsize=8.5)


def _of(model: dict[str, Any], name: str) -> str:
    """A rank beside what it can be at most."""
    return "–" if model[name] is None else f"{model[name]:.1f} of {_bounds(model)[name]}"


def _bounds(model: dict[str, Any]) -> dict[str, int]:
    """What each rank can be at most."""
    num_images, width = model["num_images"], model["width"]
    centred = min(num_images - 1, width)
    return {
        "effective_rank": centred,
        "participation_ratio": centred,
        "rankme": min(num_images, width),
        "lidar": min(model["lidar_images"] - 1, width),
    }
