"""Where the class token looks: the attention of each head of one layer from the class token to the patches.

A model that pools by attention has a pooling query in place of a class token. Heads that look at different parts of an
object divide the work; attention to the class token itself or to registers looks at nothing in the image.
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
from fdkit.analysis._attention import AttentionConfig, LayerMeans, layer_position, measure, require_models
from fdkit.analysis._figure import NARROW, WIDE, in_style, new_figure
from fdkit.analysis._pictures import image_from_text, map_from_text, map_to_text
from fdkit.analysis._tiles import (
    draw_tiles,
    heat_tile,
    height_of,
    image_tile,
    over_tile,
    rows_of,
    small_picture,
)
from fdkit.analysis.observe import Attention, Images, Observed, backbone_of, observe_pooling
from fdkit.errors import ConfigError
from fdkit.models.backbone import Backbone, Tokens
from fdkit.models.patches import patch_grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fdkit.analysis._tiles import Tile

KEEPS_COLOURS = True
READING = (
    "Bright patches are those that the query attends to, each map scaled to its own brightest patch: maps that differ "
    "from head to head divide the work, and maps that follow an object show what the model takes the image to be of."
)
Query = Literal["auto", "class", "pooling", "mean"]
QUERY_WORDS: dict[str, str] = {
    "class": "class token",
    "pooling": "pooling query",
    "mean": "mean of all patches",
}
NARROW_SHOWN = 2
"""Images that the narrow figure shows, as maps of single heads need their size."""


class ClassAttentionConfig(AttentionConfig):
    """Whose attention is shown, of which layer and of how many images."""

    query: Query = "auto"
    """Whose attention: class (the class token), pooling (the query by which the model pools its tokens), mean (of all
    patches, which any model has), or auto: the class token, or else the pooling query."""
    layer: int | None = None
    """Layer, counted from 0, or from the end if negative; left out, the last. The pooling query stands behind them
    all."""
    num_shown: int = Field(default=4, ge=1)
    """Of the images, how many the figure shows, the first ones."""


def query_of(backbone: Backbone, config: ClassAttentionConfig, *, name: str) -> str:
    """Whose attention is gathered: class, pooling or mean.

    Raises ConfigError if the model has no such query, or a layer is named that the query does not have.
    """
    network: Any = getattr(backbone.network, "trunk", backbone.network)
    has = {
        "class": backbone.num_prefix_tokens > 0,
        "pooling": getattr(network, "attn_pool", None) is not None,
        "mean": True,
    }
    query = config.query
    if query == "auto":
        query = next((one for one in ("class", "pooling") if has[one]), "auto")
    if query == "auto" or not has[query]:
        missing = "class token and no pooling query" if query == "auto" else QUERY_WORDS[query]
        raise ConfigError(
            f"{name} has no {missing} whose attention could be shown",
            "use --query mean, what all patches attend to, or attention-rollout",
        )
    if query == "pooling" and config.layer is not None:
        raise ConfigError(
            f"layer {config.layer}: the pooling query of {name} stands behind all layers",
            "leave the layer out, or use --query mean",
        )
    return query


def attention_of_class(attention: Attention) -> tuple[Tensor, Tensor]:
    """What the class token, the first of all, attends to: patches (B, H, h*w), and prefix tokens (B, H, P)."""
    row = attention.weights[:, 0, :, 0].float()
    is_patch = attention.is_patch[0].to(row.device)
    return row[..., is_patch], row[..., ~is_patch]


def mean_attention(attention: Attention) -> tuple[Tensor, Tensor]:
    """What all patches attend to, on average: patches (B, H, h*w), and the rest, prefix tokens or padding (B, H, 1).

    Patches of all windows count alike, each with the window's own attention.
    """
    weights, places = attention.weights, attention.places.to(attention.weights.device)
    is_patch = places >= 0
    queries = is_patch.float() / is_patch.sum()
    given = torch.einsum("wq,bwhqk->bhwk", queries, weights.float())  # (B, H, W, N)
    patches = torch.zeros(*given.shape[:2], attention.grid[0] * attention.grid[1], device=given.device)
    patches[..., places[is_patch]] = given[..., is_patch]
    return patches, given[..., ~is_patch].sum(-1, keepdim=True)


def spread(patches: Tensor) -> Tensor:
    """Entropy of attention to patches (B, H, h*w) scaled to sum to 1, over that of uniform attention; (B, H)."""
    shares = patches / patches.sum(-1, keepdim=True).clamp_min(torch.finfo(patches.dtype).tiny)
    return torch.special.entr(shares).sum(-1) / math.log(max(shares.shape[-1], 2))


class ClassStatistic:
    """Gathers what one query of one model attends to."""

    def __init__(self, observed: Observed, config: ClassAttentionConfig) -> None:
        self._observed, self._config = observed, config
        self._backbone = backbone_of(observed.model)
        self._query = query_of(self._backbone, config, name=observed.name)
        self._means = LayerMeans()
        self._images: Images | None = None
        self._latest: list[tuple[Tensor, Tensor]] = []
        """Of the batch's layers: patches and others; small beside one layer's attention."""
        self._grids: list[tuple[int, int]] = []
        self._layer: int | None = None
        self._grid = patch_grid(self._backbone)
        self._pictures: list[dict[str, Any]] = []

    def begin(self, images: Images) -> None:
        """A batch begins."""
        self._images, self._latest, self._grids = images, [], []

    def add(self, layer: int, attention: Attention) -> None:
        """The attention of a layer."""
        if self._query == "pooling":
            return
        read = attention_of_class if self._query == "class" else mean_attention
        self._latest.append(read(attention))
        self._grids.append(attention.grid)

    def end(self, tokens: Tokens) -> None:
        """The final tokens of a batch."""
        assert self._images is not None, "a batch begins before it ends"
        if self._query == "pooling":
            pooled = observe_pooling(self._observed.model, tokens)
            if pooled is None:
                raise ConfigError(f"the attention by which {self._observed.name} pools cannot be read")
            self._grid = tokens.grid
            num_others = pooled.shape[-1] - self._grid[0] * self._grid[1]
            patches, others = pooled[..., num_others:], pooled[..., :num_others]
        else:
            wanted = -1 if self._config.layer is None else self._config.layer
            self._layer = layer_position(wanted, len(self._latest), name=self._observed.name)
            (patches, others), self._grid = self._latest[self._layer], self._grids[self._layer]
        self._keep(patches.float(), others.float())

    def _keep(self, patches: Tensor, others: Tensor) -> None:
        assert self._images is not None, "a batch begins before it ends"
        own = others[..., :1].sum(-1)  # the class token itself; nothing where there is no other token
        rows = torch.stack([spread(patches), own, others.sum(-1)])
        self._means.add(0, rows.mean(1), len(patches))
        left = self._config.num_shown - len(self._pictures)
        for number in range(min(left, len(patches))):
            indices = self._images.indices
            self._pictures.append(
                {
                    "image": small_picture(self._images.pixels[number]),
                    "index": None if indices is None else int(indices[number]),
                    "heads": map_to_text(patches[number].cpu().numpy()),
                }
            )

    def numbers(self) -> dict[str, Any]:
        """See `analyze`."""
        entropy, on_itself, on_others = self._means.means()[0].tolist()
        return {
            "query": self._query,
            "layer": self._layer,
            "grid": list(self._grid),
            "num_heads": len(entropy),
            "entropy": entropy,
            "mean_entropy": sum(entropy) / len(entropy),
            "on_itself": on_itself if self._query == "class" else None,
            "on_prefix": on_others,
            "pictures": self._pictures,
        }


def statistic(observed: Observed, config: ClassAttentionConfig) -> ClassStatistic:
    """What gathers the attention of a model's class token."""
    return ClassStatistic(observed, config)


def analyze(observed: Sequence[Observed], config: ClassAttentionConfig) -> Analysis:
    """What the class token, or the pooling query, attends to: pictures of some images, and means over all.

    The numbers hold, for each model, "query" (class, pooling or mean), "layer" (from 0; null for the pooling query),
    "grid" of the maps, and for each head "entropy", of its attention to patches scaled to sum to 1, over that of
    uniform attention (0: one patch, 1: all alike), "on_itself", the share the class token gives itself (null for other
    queries), and "on_prefix", the share on all tokens without a place in the image; "pictures" are small images as
    JPEG in base64 with "heads", the attention to patches (heads, h, w) as base64 of float16, and the "index" of the
    image. Memory does not grow with the images beyond the pictures.
    Source: Caron et al. 2021, arXiv 2104.14294, figure 1, shows the class token of the last layer.
    Raises ConfigError if a model has no such query or its attention cannot be read, DataError if there are no images.
    """
    require_models(len(observed), "class-attention")
    return collect([measure(one, [statistic(one, config)], config)[0] for one in observed], config)


def collect(models: Sequence[dict[str, Any]], config: ClassAttentionConfig) -> Analysis:
    """The analysis made of one table a model."""
    numbers = {"analysis": "class-attention", "unit": "share", "models": list(models)}
    return Analysis(numbers, partial(draw, numbers))


def scalars(model: dict[str, Any]) -> dict[str, float]:
    """How widely the query looks, and how much it gives to tokens without a place in the image."""
    return {
        "entropy of class attention (1 = uniform)": model["mean_entropy"],
        "class attention on prefix tokens": sum(model["on_prefix"]) / len(model["on_prefix"]),
    }


def described(model: dict[str, Any]) -> str:
    """Whose attention of which layer, in words."""
    words = QUERY_WORDS[model["query"]]
    return words if model["layer"] is None else f"{words}, layer {model['layer'] + 1}"


def summary(numbers: dict[str, Any]) -> tuple[str, list[list[str]]]:
    """A table for people: its title, and its rows, the header first."""
    header = ["model", "query", "entropy of heads (1 = uniform)", "least", "most", "on prefix tokens"]
    rows = [
        [
            model["name"],
            described(model),
            f"{model['mean_entropy']:.2f}",
            f"{min(model['entropy']):.2f}",
            f"{max(model['entropy']):.2f}",
            f"{100 * sum(model['on_prefix']) / len(model['on_prefix']):.1f} %",
        ]
        for model in numbers["models"]
    ]
    return f"{numbers['analysis']}: what the query attends to", [header, *rows]


@in_style
def draw(numbers: dict[str, Any], width: float = WIDE) -> "Figure":
    """For each image the image, the mean over heads and each head; a panel a model.

    numbers: as `analyze` gives them; width: inches.
    """
    models = numbers["models"]
    columns = [_columns(model["num_heads"], width) for model in models]
    panels = [
        _groups(
            model, NARROW_SHOWN if width <= NARROW else None, head="head " if width / across > 0.5 else ""
        )
        for model, across in zip(models, columns, strict=True)
    ]
    heights = [
        height_of(sum(rows_of(len(group), across) for group in groups), across, width)
        for groups, across in zip(panels, columns, strict=True)
    ]
    figure = new_figure(width, sum(heights) + 0.35 * len(models))
    places = figure.subplots(len(models), 1, squeeze=False, height_ratios=heights)[:, 0]
    for place, model, groups, across in zip(places, models, panels, columns, strict=True):
        draw_tiles(place, groups, across, width)
        place.set_title(textwrap.fill(f"{model['name']}: {described(model)}", round(9.5 * width)))
    return figure


def _columns(num_heads: int, width: float) -> int:
    """Tiles side by side, so that the image, the mean and the heads fill two rows, or three of a narrow figure."""
    num_tiles = 2 + num_heads
    if width > NARROW:
        return min(num_tiles, max(7, min(14, math.ceil(num_tiles / 2))))
    return min(num_tiles, max(5, min(8, math.ceil(num_tiles / 3))))


def _groups(model: dict[str, Any], count: int | None, *, head: str) -> "list[list[Tile]]":
    """The tiles of each image; head: stands before the number of a head."""
    shape = (model["num_heads"], *model["grid"])
    groups = []
    for picture in model["pictures"][:count]:
        pixels, heads = image_from_text(picture["image"]), map_from_text(picture["heads"], shape)
        first = [image_tile("image", pixels), over_tile("mean", pixels, heads.mean(0))]
        groups.append(first + [heat_tile(f"{head}{number + 1}", one) for number, one in enumerate(heads)])
    return groups
