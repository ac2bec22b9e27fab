"""Which patches reach the end of a model: attention multiplied through all layers.

A token of the last layer mixes tokens that are mixtures themselves. Rollout follows the attention back through all
layers, with the residual connections as attention of each token to itself, and ends in the patches of the image.
"""

import math
import textwrap
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from fdkit.analysis._analysis import Analysis
from fdkit.analysis._attention import AttentionConfig, measure, require_models
from fdkit.analysis._figure import NARROW, WIDE, in_style, new_figure
from fdkit.analysis._pictures import image_from_text, map_from_text, map_to_text
from fdkit.analysis._tiles import draw_tiles, height_of, image_tile, over_tile, rows_of, small_picture
from fdkit.analysis.observe import Attention, Images, Observed, backbone_of
from fdkit.errors import ConfigError
from fdkit.models.backbone import Tokens

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fdkit.analysis._tiles import Tile

KEEPS_COLOURS = True
READING = (
    "Bright patches are those whose content reaches the query through all layers, each map scaled to its own "
    "brightest patch: a map that follows the object says that the model's output is made of it."
)
Fusion = Literal["mean", "max", "min"]
RolloutQuery = Literal["auto", "class", "mean"]
QUERY_WORDS: dict[str, str] = {"class": "class token", "mean": "mean of all patches"}


class AttentionRolloutConfig(AttentionConfig):
    """How attention is multiplied through the layers."""

    fusion: Fusion = "mean"
    """Of the heads of a layer: mean, as published, or the largest or smallest attention of any head, as often shown,
    scaled to sum to 1 again."""
    residual_ratio: float = Field(default=0.5, ge=0, lt=1)
    """Share of the residual connection: each layer counts as this much of the token itself, and the rest of what it
    attends to; 0.5 as published, 0 attention alone."""
    query: RolloutQuery = "auto"
    """What is followed back: the class token, the mean of all patches, or auto: the class token where there is one."""
    num_shown: int = Field(default=8, ge=1)
    """Of the images, how many the figure shows, the first ones."""


def fused(attention: Attention, fusion: Fusion) -> Tensor:
    """The attention of all heads as one, (B, N, N) float32; rows sum to 1.

    Raises ConfigError for attention in windows.
    """
    weights = attention.weights
    if weights.shape[1] != 1:
        raise ConfigError(
            f"attention in {weights.shape[1]} windows cannot be multiplied through layers that merge patches",
            "rollout needs attention of all tokens to all, as in a ViT; see attention-maps for windows",
        )
    heads = weights[:, 0].float()
    if fusion == "mean":
        return heads.mean(1)
    one = heads.amax(1) if fusion == "max" else heads.amin(1)
    return one / one.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def with_residual(attention: Tensor, residual_ratio: float) -> Tensor:
    """(B, N, N): residual_ratio of the identity and the rest of the attention; rows sum to 1."""
    mixed = (1 - residual_ratio) * attention
    mixed.diagonal(dim1=-2, dim2=-1).add_(residual_ratio)
    # Rows of the attention sum to 1, but for rounding and for a query that no head's smallest attention leaves any.
    return mixed / mixed.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


class RolloutStatistic:
    """Multiplies the attention of one model through its layers, batch by batch."""

    def __init__(self, observed: Observed, config: AttentionRolloutConfig) -> None:
        self._name, self._config = observed.name, config
        has_class = backbone_of(observed.model).num_prefix_tokens > 0
        if config.query == "class" and not has_class:
            raise ConfigError(f"{observed.name} has no class token to follow back", "use --query mean")
        self._query = "class" if config.query != "mean" and has_class else "mean"
        self._images: Images | None = None
        self._product: Tensor | None = None
        self._geometry: Attention | None = None
        self._sums = torch.zeros(2, dtype=torch.float64)
        self._num_images = 0
        self._pictures: list[dict[str, Any]] = []

    def begin(self, images: Images) -> None:
        """A batch begins."""
        self._images, self._product = images, None

    def add(self, layer: int, attention: Attention) -> None:
        """The attention of a layer, multiplied onto that of those before it."""
        if self._product is not None and self._geometry is not None and attention.grid != self._geometry.grid:
            raise ConfigError(
                f"layer {layer} of {self._name} has {_by(attention.grid)} patches and the one before it "
                f"{_by(self._geometry.grid)}: attention cannot be multiplied through layers that merge patches",
                "rollout needs one grid for all layers, as in a ViT",
            )
        mixed = with_residual(fused(attention, self._config.fusion), self._config.residual_ratio)
        self._product = mixed if self._product is None else torch.bmm(mixed, self._product)
        self._geometry = attention._replace(weights=attention.weights.new_empty(0))

    def end(self, tokens: Tokens) -> None:
        """The final tokens of a batch: what is left of each patch is read."""
        assert self._product is not None, "attention comes before the final tokens"
        assert self._geometry is not None, "attention comes before the final tokens"
        assert self._images is not None, "a batch begins before it ends"
        is_patch = self._geometry.is_patch[0].to(self._product.device)
        row = self._product[:, 0] if self._query == "class" else self._product[:, is_patch].mean(1)
        patches, on_prefix = row[:, is_patch], row[:, ~is_patch].sum(-1)
        self._sums += torch.stack([spread(patches), on_prefix]).double().sum(1).cpu()
        self._num_images += len(patches)
        left = self._config.num_shown - len(self._pictures)
        for number in range(min(left, len(patches))):
            indices = self._images.indices
            self._pictures.append(
                {
                    "image": small_picture(self._images.pixels[number]),
                    "index": None if indices is None else int(indices[number]),
                    "rollout": map_to_text(patches[number].cpu().numpy()),
                }
            )
        self._product = None

    def numbers(self) -> dict[str, Any]:
        """See `analyze`."""
        assert self._geometry is not None, "attention comes before the numbers"
        entropy, on_prefix = (self._sums / self._num_images).tolist()
        return {
            "query": self._query,
            "grid": list(self._geometry.grid),
            "entropy": entropy,
            "on_prefix": on_prefix,
            "pictures": self._pictures,
        }


def _by(grid: tuple[int, int]) -> str:
    return f"{grid[0]}x{grid[1]}"


def spread(patches: Tensor) -> Tensor:
    """Entropy of shares of patches (B, h*w) scaled to sum to 1, over that of uniform shares; (B,)."""
    shares = patches / patches.sum(-1, keepdim=True).clamp_min(torch.finfo(patches.dtype).tiny)
    return torch.special.entr(shares).sum(-1) / math.log(max(shares.shape[-1], 2))


def statistic(observed: Observed, config: AttentionRolloutConfig) -> RolloutStatistic:
    """What multiplies the attention of a model through."""
    return RolloutStatistic(observed, config)


def analyze(observed: Sequence[Observed], config: AttentionRolloutConfig) -> Analysis:
    """What the class token, or the mean of all patches, is made of: pictures of some images, and means over all.

    With A the attention of a layer over all heads, each layer counts as r I + (1 - r) A, rows scaled to sum to 1, and
    the product of all layers, the last one leftmost, says how much of each token of the input reaches each of the end.
    Source: Abnar and Zuidema 2020, arXiv 2005.00928, section 3 (attention rollout), with r = 0.5 and the mean of heads.

    The numbers hold, for each model, "query" (class or mean), the "grid" of the maps, "entropy" of the shares of
    patches scaled to sum to 1 over that of uniform shares (0: one patch, 1: all alike), "on_prefix", the share of
    tokens without a place in the image, both mean over images; "pictures" are small images as JPEG in base64 with
    "rollout", the shares of patches (h, w) as base64 of float16, and the "index" of the image.
    Memory does not grow with the images beyond the pictures: an (N, N) matrix an image of the batch.
    Raises ConfigError for attention in windows, or without a class token that is asked for; DataError if there are no
    images.
    """
    require_models(len(observed), "attention-rollout")
    return collect([measure(one, [statistic(one, config)], config)[0] for one in observed], config)


def collect(models: Sequence[dict[str, Any]], config: AttentionRolloutConfig) -> Analysis:
    """The analysis made of one table a model."""
    numbers = {
        "analysis": "attention-rollout",
        "unit": "share",
        "fusion": config.fusion,
        "residual_ratio": config.residual_ratio,
        "models": list(models),
    }
    return Analysis(numbers, partial(draw, numbers))


def scalars(model: dict[str, Any]) -> dict[str, float]:
    """How widely the query's content is spread over the image."""
    return {"entropy of rollout (1 = uniform)": model["entropy"]}


def summary(numbers: dict[str, Any]) -> tuple[str, list[list[str]]]:
    """A table for people: its title, and its rows, the header first."""
    header = ["model", "query", "entropy (1 = uniform)", "of prefix tokens"]
    rows = [
        [
            model["name"],
            QUERY_WORDS[model["query"]],
            f"{model['entropy']:.3f}",
            f"{100 * model['on_prefix']:.1f} %",
        ]
        for model in numbers["models"]
    ]
    how = f"{numbers['fusion']} of heads, residual {numbers['residual_ratio']:g}"
    return f"{numbers['analysis']}, {how}: what the query is made of", [header, *rows]


@in_style
def draw(numbers: dict[str, Any], width: float = WIDE) -> "Figure":
    """Each image beside the same one with its rollout over it; a panel a model.

    numbers: as `analyze` gives them; width: inches.
    """
    models = numbers["models"]
    columns = 8 if width > NARROW else 4
    panels = [_tiles(model) for model in models]
    heights = [height_of(rows_of(len(tiles), columns), columns, width) for tiles in panels]
    figure = new_figure(width, sum(heights) + 0.35 * len(models))
    places = figure.subplots(len(models), 1, squeeze=False, height_ratios=heights)[:, 0]
    for place, model, tiles in zip(places, models, panels, strict=True):
        draw_tiles(place, [tiles], columns, width)
        place.set_title(textwrap.fill(f"{model['name']}: {QUERY_WORDS[model['query']]}", round(9.5 * width)))
    return figure


def _tiles(model: dict[str, Any]) -> "list[Tile]":
    tiles: list[Tile] = []
    for picture in model["pictures"]:
        pixels = image_from_text(picture["image"])
        rollout = map_from_text(picture["rollout"], tuple(model["grid"]))
        tiles += [image_tile("image", pixels), over_tile("rollout", pixels, rollout)]
    return tiles
