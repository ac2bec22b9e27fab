"""What a distillation target looks like channel by channel, as the teacher gives it and whitened.

Teachers differ in the scale of their tokens by orders of magnitude, and a few channels of some hold most of the
variance: a loss on them hears little else. Whitening is what brings all teachers to one scale, and this shows how far.
Source of the whitening: Wei et al. 2022 (arXiv 2205.14141), section 3.
"""

from collections.abc import Sequence
from functools import partial
from math import ceil
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from fdkit.analysis._analysis import Analysis
from fdkit.analysis._features import need_models
from fdkit.analysis._figure import BLUE, NARROW, ORANGE, WIDE, columns_of, in_style, panels, wrapped
from fdkit.analysis._targets import WHITENING_WORDS, final_tokens, target_tokens
from fdkit.analysis.observe import Observed, first_images
from fdkit.config import Config
from fdkit.models.distillation_target import EPS, whiten

if TYPE_CHECKING:
    from matplotlib.figure import Figure

READING = (
    "Channels stand from the one that varies most to the one that varies least, on a logarithmic scale: a line far "
    "from 1 asks for a learning rate of its own and one that falls steeply lets few channels rule the loss, while "
    "after whitening the lines of all teachers lie alike, so that one recipe serves them all."
)
TOP_SHARE = 0.01
ROUNDING = 1e-7
"""A channel whose deviation is smaller than this share of its values, as float32 rounds them, does not vary."""


class TargetStatisticsConfig(Config):
    """Over how many images the channels are described, and which whitening the figure shows."""

    whitening: Literal["layernorm", "batch", "l2"] = "layernorm"
    """Shown beside the target as it is: layernorm (each token to mean 0 and variance 1), batch (each channel to the
    same, all images taken as one batch) or l2 (each token to length 1). The numbers hold all of them."""
    num_images: int = Field(default=256, ge=1)
    """Images read, drawn from the data with the seed."""
    batch_size: int = Field(default=16, ge=1)
    """Images a forward pass; memory grows with it, and not with the number of images."""


class ChannelMoments:
    """Count and the first four moments of each channel of rows (D,) seen so far, float64; memory 5 x D.

    Powers are summed around the mean of the first rows, which keeps them small.
    """

    def __init__(self) -> None:
        self.count = 0
        self._shift = torch.zeros(0)
        self._sums = torch.zeros(0)

    def add(self, rows: Tensor) -> None:
        """Counts rows (B, D), B >= 1."""
        rows = rows.detach().double()
        if self.count == 0:
            self._shift = rows.mean(0)
            self._sums = rows.new_zeros(4, rows.shape[1])
        offsets = rows - self._shift
        squares = offsets.square()
        self._sums += torch.stack(
            [offsets.sum(0), squares.sum(0), (squares * offsets).sum(0), squares.square().sum(0)]
        )
        self.count += len(rows)

    def mean(self) -> Tensor:
        """(D,)."""
        return (self._shift + self._sums[0] / self.count).cpu()

    def variance(self) -> Tensor:
        """(D,), with the count as divisor."""
        first, second, *_ = self._sums / self.count
        return (second - first.square()).clamp_min(0).cpu()

    def kurtosis(self) -> Tensor:
        """(D,): the fourth central moment over the squared variance, 3 for normal values; NaN without variance."""
        one, two, three, four = self._sums / self.count
        fourth = four - 4 * one * three + 6 * one.square() * two - 3 * one**4
        return fourth.cpu() / self.variance().square()


def analyze(observed: Sequence[Observed], config: TargetStatisticsConfig) -> Analysis:
    """Each channel of the final tokens over tokens and images, before and after whitening.

    The numbers hold, for each model, "num_tokens" counted (the class token and the patches; registers take no part in
    distillation), its "width", and under "none", "layernorm", "batch" and "l2" what `described` says of the target as
    the model gives it and whitened in each way. "shown_whitening" is the one in figure and table.
    Memory is five numbers a channel, whatever the number of images.
    Raises ConfigError without a model, DataError without images, NumericsError for values that are not finite.
    """
    need_models(observed, "target-statistics")
    numbers = {
        "analysis": "target-statistics",
        "unit": "as the final norm gives it",
        "shown_whitening": config.whitening,
        "models": [_measure(one, config) for one in observed],
    }
    return Analysis(numbers, partial(draw, numbers))


def _measure(observed: Observed, config: TargetStatisticsConfig) -> dict[str, Any]:
    kinds = {"none": ChannelMoments(), "layernorm": ChannelMoments(), "l2": ChannelMoments()}
    num_images = 0
    for images in first_images(observed, config.num_images):
        rows = target_tokens(final_tokens(observed, images.pixels)).flatten(0, 1)
        kinds["none"].add(rows)
        kinds["layernorm"].add(whiten(rows, "layernorm"))
        kinds["l2"].add(whiten(rows, "l2"))
        num_images += len(images.pixels)
    plain = kinds["none"]
    variance = plain.variance()
    batch = described(torch.zeros_like(variance), variance / (variance + EPS), plain.kurtosis())
    tables = {name: described(one.mean(), one.variance(), one.kurtosis()) for name, one in kinds.items()}
    return {
        "name": observed.name,
        "num_images": num_images,
        "num_tokens": plain.count,
        "width": len(variance),
        **tables,
        "batch": batch,
    }


def described(mean: Tensor, variance: Tensor, kurtosis: Tensor) -> dict[str, Any]:
    """What the moments (C,) of channels say.

    "mean" and "std", a number a channel to 6 digits; "rms", the root mean square of all values; of the channels that
    vary: "largest_mean_over_std", max |mean| / std; "std_spread", the standard deviation of log10 std, in powers of
    ten; "largest_over_median_std"; "median_kurtosis" and "largest_kurtosis" (3 for normal values). "top_variance_share"
    is the share of all variance in the 1 % of channels, at least one, that vary most. "num_constant_channels" do not
    vary at all. Where no channel varies, these are None.
    """
    second = variance + mean.square()
    varies = variance > (ROUNDING**2) * second
    std = variance.sqrt()
    table: dict[str, Any] = {
        "mean": _rounded(mean),
        "std": _rounded(std),
        "rms": second.mean().sqrt().item(),
        "num_constant_channels": int((~varies).sum()),
    }
    if not varies.any():
        return table | dict.fromkeys(_OF_VARYING)
    num_top = max(1, ceil(TOP_SHARE * len(variance)))
    top = variance.topk(num_top).values.sum() / variance.sum()
    own_std, own_kurtosis = std[varies], kurtosis[varies]
    values = (
        (mean[varies].abs() / own_std).max(),
        own_std.log10().std(correction=0),
        own_std.max() / own_std.median(),
        own_kurtosis.median(),
        own_kurtosis.max(),
        top,
    )
    return table | {name: value.item() for name, value in zip(_OF_VARYING, values, strict=True)}


_OF_VARYING = (
    "largest_mean_over_std",
    "std_spread",
    "largest_over_median_std",
    "median_kurtosis",
    "largest_kurtosis",
    "top_variance_share",
)


def _rounded(values: Tensor) -> list[float]:
    return [float(f"{value:.6g}") for value in values.tolist()]


def scalars(model: dict[str, Any]) -> dict[str, float]:
    """The scale of the target as it is, and how unevenly its variance lies before and after whitening per token."""
    found = {"root mean square before whitening": model["none"]["rms"]}
    for name, when in (("none", "before"), ("layernorm", "after")):
        if model[name]["top_variance_share"] is not None:
            found[f"variance in the top 1 % of channels, {when} whitening (%)"] = (
                100 * model[name]["top_variance_share"]
            )
    return found


def summary(numbers: dict[str, Any]) -> tuple[str, list[list[str]]]:
    """A table for people: its title, and its rows, the header first; two rows a model, before and after."""
    header = ["model", "target", "RMS", "largest/median std", "variance in top 1 %", "max |mean|/std"]
    rows = [
        [
            model["name"],
            WHITENING_WORDS[kind],
            f"{model[kind]['rms']:.3g}",
            _shown(model[kind]["largest_over_median_std"], ".1f"),
            _shown(model[kind]["top_variance_share"], ".1%").replace("%", " %"),
            _shown(model[kind]["largest_mean_over_std"], ".1f"),
        ]
        for model in numbers["models"]
        for kind in ("none", numbers["shown_whitening"])
    ]
    return "target-statistics, channels of the final tokens", [header, *rows]


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


@in_style
def draw(numbers: dict[str, Any], width: float = WIDE) -> "Figure":
    """Deviation of each channel, sorted, before and after whitening: a panel a model, one axis for all.

    numbers: as `analyze` gives them; width: inches. Channels that do not vary have no place on a logarithmic axis.
    """
    from matplotlib.ticker import LogLocator, NullLocator

    models, kind = numbers["models"], numbers["shown_whitening"]
    figure, axes = panels(len(models), width=width, share_y=True)
    for place, model in zip(axes, models, strict=True):
        for name, colour in (("none", BLUE), (kind, ORANGE)):
            std = sorted((one for one in model[name]["std"] if one > 0), reverse=True)
            share = [100 * (rank + 0.5) / model["width"] for rank in range(len(std))]
            place.plot(share, std, color=colour, linewidth=2, label=WHITENING_WORDS[name])
        place.set_yscale("log")
        place.yaxis.set_major_formatter("{x:g}")
        place.set_xlim(0, 100)
        place.set_xlabel("channels, most varied first (%)")
        place.set_title(wrapped(model["name"], figure))
    low, high = axes[0].get_ylim()
    if high < 100 * low:  # tens alone would leave the axis almost without numbers
        axes[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes[0].yaxis.set_minor_locator(NullLocator())
    for place in axes[:: columns_of(figure)]:
        place.set_ylabel("standard deviation of a channel")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2 if width > NARROW else 1)
    return figure
