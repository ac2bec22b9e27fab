"""Attention averaged over heads and images: whether patches look around themselves, or all at the same places.

A bright diagonal is attention to the patch itself and its neighbours, as relative positions make it; bright columns are
patches that all others look at, whatever they are. Feature distillation is known to strengthen the diagonal.
"""

import textwrap
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fdkit.analysis._analysis import Analysis
from fdkit.analysis._attention import AttentionConfig, LayerMeans, layer_position, measure, require_models
from fdkit.analysis._depth import draw_models, model_legend
from fdkit.analysis._figure import NARROW, WIDE, in_style, new_figure
from fdkit.analysis._pictures import map_from_text, map_to_text
from fdkit.analysis.observe import Attention, Images, Observed, on_map
from fdkit.models.backbone import Tokens

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KEEPS_COLOURS = True
READING = (
    "A bright diagonal is attention to the patch itself and its neighbours, bright columns are places that all "
    "patches look at; the lines say how much of the attention of patches is of either kind, layer by layer."
)
LARGEST_SIDE = 16
"""Rows and columns of patches that a stored map has at most; a larger one is averaged over areas."""
NUM_SHOWN = 4
NAME_HEIGHT = 0.2
"""Inches of a row of the figure that holds a model's name."""


class AttentionMapsConfig(AttentionConfig):
    """Which layers are shown."""

    layers: tuple[int, ...] = ()
    """Layers whose maps are kept and shown, counted from 0, or from the end if negative; left out, 4 of them, spread
    over the depth. The shares are measured of all."""


class Shares(NamedTuple):
    """Of the attention of patches: means over images and patches, each (H,) float64."""

    diagonal: Tensor
    """On the patch itself and the patches around it, of the attention among patches scaled to sum to 1."""
    itself: Tensor
    """On the patch itself, of the same."""
    column: Tensor
    """What is the same for all queries, of the same, see `column_share`."""
    diagonal_as_attended: Tensor
    """On the patch itself and the patches around it, of all attention."""
    itself_as_attended: Tensor
    """On the patch itself, of all attention."""
    on_prefix: Tensor
    """On tokens without a place in the image: class token, registers, padding."""


def neighbours(places: Tensor, grid: tuple[int, int]) -> Tensor:
    """(W, N, N) bool: whether two tokens are patches at most one row and one column apart.

    places: (W, N) and grid as in `Attention`.
    """
    rows, columns = places // grid[1], places % grid[1]
    is_near = ((rows[:, :, None] - rows[:, None]).abs() <= 1) & (
        (columns[:, :, None] - columns[:, None]).abs() <= 1
    )
    is_patch = places >= 0
    return is_near & is_patch[:, :, None] & is_patch[:, None]


def column_share(attention: Attention) -> Tensor:
    """How much of the attention among patches is the same for all queries; (B, H) float32, mean over queries.

    With p_q the attention of query q to patches, scaled to sum to 1, and m the mean of p_q over the queries that see
    the same tokens as q (all of them, or those of a window), it is 1 minus the total variation between p_q and m,
    which is sum over patches k of min(p_q(k), m(k)). It is 1 if all queries attend alike, as in uniform attention, and
    1/n if each of n queries attends to another patch alone. A query that attends to no patch counts 0.
    """
    is_patch = attention.is_patch.to(attention.weights.device)
    alike = None
    if attention.visible is not None or len(is_patch) > 1:
        alike = (attention.sees().to(is_patch.device) & is_patch[:, None]).float()
        alike = alike / alike.sum(-1, keepdim=True).clamp_min(1)
    # An image at a time: what is made on the way stays in the processor's cache.
    return torch.stack([_column_share(image, is_patch, alike) for image in attention.weights])


def _column_share(image: Tensor, is_patch: Tensor, alike: Tensor | None) -> Tensor:
    """(H,) of one image (W, H, N, N); alike: (W, N, N), rows that average queries, or None for one mean of all."""
    weights = image.float()
    mass = torch.einsum("whqk,wk->whq", weights, is_patch.float())
    # (W, H, N), 0 for what is no patch; a mass of 1e-30 is none, as its inverse would overflow when summed
    scale = torch.where(mass > 1e-30, is_patch[:, None] / mass, 0)
    num_queries = int(is_patch.sum())
    if alike is None:
        mean = torch.einsum("whqk,whq->whk", weights, scale)[:, :, None] / num_queries
    else:
        mean = alike[:, None] @ (weights * scale[..., None])
    # min(p, m) = min(a, m * mass) / mass: one table less than with p itself
    common = torch.minimum(mean * mass[..., None], weights)
    per_query = torch.einsum("whqk,wk->whq", common, is_patch.float()) * scale
    return per_query.sum((0, 2)) / num_queries


def attention_shares(attention: Attention, near: Tensor | None = None) -> Shares:
    """The shares of one batch; near: `neighbours`, so that they are made once."""
    weights, places = attention.weights, attention.places
    batch_size, num_windows, num_heads, num_tokens, _ = weights.shape
    near = neighbours(places, attention.grid) if near is None else near
    is_patch = attention.is_patch
    table = torch.stack([near, is_patch[:, None].expand_as(near)], dim=-1).to(weights.device, torch.float32)
    # (W*N, B*H, N): one matrix product a query, and for a single window no copy
    by_query = weights.float().permute(1, 3, 0, 2, 4).reshape(num_windows * num_tokens, -1, num_tokens)
    around, mass = torch.bmm(by_query, table.flatten(0, 1)).unbind(-1)  # (W*N, B*H)
    itself = weights.diagonal(dim1=-2, dim2=-1).permute(1, 3, 0, 2).reshape(num_windows * num_tokens, -1)
    kept = is_patch.flatten().to(weights.device)
    parts = (
        torch.stack([around, itself.float(), mass])[:, kept].unflatten(-1, (batch_size, num_heads)).double()
    )
    around, itself, mass = parts.unbind(0)  # (queries, B, H)
    floor = mass.clamp_min(torch.finfo(torch.float32).tiny)
    means = [
        one.mean((0, 1)).cpu()
        for one in (around / floor, itself / floor, around, itself, (1 - mass).clamp_min(0))
    ]
    column = column_share(attention).double().mean(0).cpu()
    return Shares(means[0], means[1], column, *means[2:])


def uniform_shares(attention: Attention, near: Tensor) -> tuple[float, float]:
    """The shares on and around the diagonal, and on it, if patches attended alike to all patches that they see."""
    seen = attention.sees() & attention.is_patch[:, None]
    count = seen.sum(-1).clamp_min(1).double()
    around = ((near & seen).sum(-1) / count)[attention.is_patch].mean().item()
    return around, (1 / count)[attention.is_patch].mean().item()


class _Layer:
    """What is known of a layer before its attention."""

    def __init__(self, attention: Attention) -> None:
        self.near = neighbours(attention.places, attention.grid)
        self.around, self.itself = uniform_shares(attention, self.near)
        self.geometry = attention._replace(weights=attention.weights.new_empty(0))


class MapsStatistic:
    """Gathers the mean maps and the shares of one model."""

    def __init__(self, observed: Observed, config: AttentionMapsConfig) -> None:
        self._name, self._config = observed.name, config
        self._layers: list[_Layer] = []
        # Maps are large: float32 keeps more digits of them than a picture or a share needs.
        self._shares, self._maps = LayerMeans(), LayerMeans(torch.float32)
        self._batch_size = 0

    def begin(self, images: Images) -> None:
        """A batch begins."""
        self._batch_size = len(images.pixels)

    def add(self, layer: int, attention: Attention) -> None:
        """The attention of a layer."""
        if layer == len(self._layers):
            self._layers.append(_Layer(attention))
        shares = attention_shares(attention, self._layers[layer].near)
        self._shares.add(layer, torch.stack(shares), self._batch_size)
        self._maps.add(layer, attention.weights.mean((0, 2), dtype=torch.float32), self._batch_size)

    def end(self, tokens: Tokens) -> None:
        """A batch ends: layers that there are not are told early."""
        self._shown()

    def _shown(self) -> list[int]:
        """Numbers of the layers whose maps are kept."""
        count = len(self._layers)
        if not self._config.layers:
            return sorted({round(one) for one in np.linspace(0, count - 1, min(NUM_SHOWN, count))})
        places = (layer_position(layer, count, name=self._name) for layer in self._config.layers)
        return list(dict.fromkeys(places))

    def numbers(self) -> dict[str, Any]:
        """See `analyze`."""
        shares = [Shares(*layer) for layer in self._shares.means()]
        maps = self._maps.means()
        return {
            "diagonal_share": [layer.diagonal.tolist() for layer in shares],
            "self_share": [layer.itself.tolist() for layer in shares],
            "column_share": [layer.column.tolist() for layer in shares],
            "diagonal_share_as_attended": [layer.diagonal_as_attended.tolist() for layer in shares],
            "self_share_as_attended": [layer.itself_as_attended.tolist() for layer in shares],
            "prefix_attention": [layer.on_prefix.tolist() for layer in shares],
            "uniform_diagonal_share": [layer.around for layer in self._layers],
            "uniform_self_share": [layer.itself for layer in self._layers],
            "column_share_of_mean_map": [
                column_share(layer.geometry._replace(weights=one[None, :, None])).item()
                for one, layer in zip(maps, self._layers, strict=True)
            ],
            "maps": [
                {"layer": number, **stored_map(maps[number], self._layers[number].geometry)}
                for number in self._shown()
            ],
        }


def stored_map(mean: Tensor, attention: Attention) -> dict[str, Any]:
    """A mean map (W, N, N) as plain data: "prefix" tokens come first, then the patches of the "grid", row-major.

    attention: where its tokens stand. Of windows, only the attention among patches is kept. A map of more than
    LARGEST_SIDE rows or columns is averaged over areas of "of_grid" patches: attention from the mean patch of an area
    to the patches of an area together, so that rows still sum to what they did.
    """
    places, grid = attention.places.cpu(), attention.grid
    num_patches = grid[0] * grid[1]
    num_prefix = max(places.shape[1] - num_patches, 0)
    is_global = len(places) == 1 and torch.equal(places[0, num_prefix:], torch.arange(num_patches))
    if not is_global:
        mean, num_prefix = on_map(mean, places, num_patches), 0
    else:
        mean = mean[0]
    coarse = (min(grid[0], LARGEST_SIDE), min(grid[1], LARGEST_SIDE))
    if coarse != grid:
        keys = torch.block_diag(torch.eye(num_prefix), torch.kron(*map(area_shares, coarse, grid)))
        queries = keys / keys.sum(1, keepdim=True)
        mean = queries @ mean @ keys.T
    values = map_to_text(mean.numpy())
    return {"prefix": num_prefix, "grid": list(coarse), "of_grid": list(grid), "values": values}


def area_shares(count: int, of: int) -> Tensor:
    """(count, of): how much of each of `of` equal steps lies in each of `count` equal areas of the same length."""
    areas, steps = torch.arange(count + 1) * (of / count), torch.arange(of)
    ends = torch.minimum(areas[1:, None], steps + 1.0)
    return (ends - torch.maximum(areas[:-1, None], steps)).clamp_min(0)


def statistic(observed: Observed, config: AttentionMapsConfig) -> MapsStatistic:
    """What gathers the maps of a model."""
    return MapsStatistic(observed, config)


def analyze(observed: Sequence[Observed], config: AttentionMapsConfig) -> Analysis:
    """Attention averaged over heads and images, as pictures of some layers, and the shares of all.

    The numbers hold, for each model as [[a number a head] a layer], means over images and query patches:
    "diagonal_share" of the attention among patches, scaled to sum to 1, that is on the patch itself and the up to 8
    around it; "self_share", on itself; "column_share", what is the same for all queries (see `column_share`);
    "diagonal_share_as_attended" and "self_share_as_attended", of all attention; "prefix_attention", on tokens without a
    place in the image. As a number a layer: "uniform_diagonal_share" and "uniform_self_share", what uniform attention
    gives (its column share is 1), and "column_share_of_mean_map", of the attention averaged over heads and images.
    "maps" are the averaged attentions of the layers shown (see `stored_map`), as base64 of float16.
    Memory grows with the tokens and layers, one map a layer, and not with the images.
    Source: the averaged attention map of Wei et al. 2022, arXiv 2205.14141; the shares are defined here.
    Raises ConfigError if a model's attention cannot be read or it has no such layer, DataError if there are no images.
    """
    require_models(len(observed), "attention-maps")
    return collect([measure(one, [statistic(one, config)], config)[0] for one in observed], config)


def collect(models: Sequence[dict[str, Any]], config: AttentionMapsConfig) -> Analysis:
    """The analysis made of one table a model."""
    numbers = {"analysis": "attention-maps", "unit": "share", "models": list(models)}
    return Analysis(numbers, partial(draw, numbers))


def _means(layers: Sequence[Sequence[float]]) -> list[float]:
    """Over the heads of each layer."""
    return [sum(heads) / len(heads) for heads in layers]


def scalars(model: dict[str, Any]) -> dict[str, float]:
    """The shares, mean over heads and layers."""
    names = {"diagonal share": "diagonal_share", "column share": "column_share"}
    means = {name: _means(model[key]) for name, key in names.items()}
    return {name: sum(layers) / len(layers) for name, layers in means.items()}


def summary(numbers: dict[str, Any]) -> tuple[str, list[list[str]]]:
    """A table for people: its title, and its rows, the header first; a row a layer, model by model."""
    header = ["model", "layer", "diagonal", "itself", "same for all"]
    rows = []
    for model in numbers["models"]:
        shares = [_means(model[f"{name}_share"]) for name in ("diagonal", "self", "column")]
        for layer, values in enumerate(zip(*shares, strict=True)):
            written = [f"{100 * value:.1f} %" for value in values]
            rows.append([model["name"] if layer == 0 else "", str(layer + 1), *written])
    return f"{numbers['analysis']}: shares of the attention among patches, mean of heads", [header, *rows]


@in_style
def draw(numbers: dict[str, Any], width: float = WIDE) -> "Figure":
    """Averaged maps of some layers, a row a model, and under them the shares over depth, a line a model.

    numbers: as `analyze` gives them; width: inches.
    """
    models = numbers["models"]
    is_wide = width > NARROW
    across, num_line_rows = (NUM_SHOWN, 1) if is_wide else (2, 2)
    rows = _rows(models, across)
    heights = [width / across + 0.2 if maps else NAME_HEIGHT for _, maps in rows] + [2.4] * num_line_rows
    figure = new_figure(width, sum(heights) + 0.9)
    grid = figure.add_gridspec(len(heights), across, height_ratios=heights)
    places = [
        [figure.add_subplot(grid[row, column]) for column in range(len(maps))]
        for row, (_, maps) in enumerate(rows)
    ]
    _draw_maps(figure, places, [maps for _, maps in rows])
    for row, (name, maps) in enumerate(rows):
        if not maps:
            place = figure.add_subplot(grid[row, :])
            place.set_axis_off()
            name = textwrap.shorten(name, round(9.5 * width), placeholder="…")
            place.text(0, 0, name, fontsize=10.5, fontweight="bold")
    halves = [grid[-1, : across // 2], grid[-1, across // 2 :]] if is_wide else [grid[-2, :], grid[-1, :]]
    _draw_shares(figure, [figure.add_subplot(half) for half in halves], models)
    return figure


def _rows(models: Sequence[dict[str, Any]], across: int) -> list[tuple[str, list[dict[str, Any]]]]:
    """For each model a row with its name and no map, then rows of maps."""
    rows: list[tuple[str, list[dict[str, Any]]]] = []
    for model in models:
        starts = range(0, len(model["maps"]), across)
        rows += [(model["name"], []), *(("", model["maps"][start : start + across]) for start in starts)]
    return rows


def _draw_maps(figure: "Figure", places: "list[list[Axes]]", rows: list[list[dict[str, Any]]]) -> None:
    """One colour scale for all: how often the attention is that of an image whose tokens all get alike."""
    from matplotlib.colors import LogNorm

    pictures = [[_times_uniform(one) for one in maps] for maps in rows]
    highest = max(float(np.quantile(picture, 0.999)) for of_row in pictures for picture in of_row)
    scale = LogNorm(0.1, max(10.0, highest))
    for axes, maps, of_row in zip(places, rows, pictures, strict=True):
        for place, one, picture in zip(axes, maps, of_row, strict=True):
            image = place.imshow(picture.clip(0.1), norm=scale, cmap="viridis", interpolation="nearest")
            place.set_title(f"layer {one['layer'] + 1}", fontweight="normal")
            _label_rows(place, one, is_first=place is axes[0])
    everywhere = [place for axes in places for place in axes]
    bar = figure.colorbar(
        image, ax=everywhere, location="bottom", fraction=0.03, pad=0.02, aspect=40, format="%g"
    )
    bar.minorticks_off()
    bar.set_label("attention, as a multiple of uniform attention")


def _times_uniform(one: dict[str, Any]) -> np.ndarray:
    """(T, T) of a stored map; 1 where a token gets what it would if all tokens of the image got alike."""
    count = one["prefix"] + one["grid"][0] * one["grid"][1]
    return map_from_text(one["values"], (count, count)) * count


def _label_rows(axes: "Axes", one: dict[str, Any], *, is_first: bool) -> None:
    """Both axes count the rows of patches, which stand one after the other; prefix tokens come before them."""
    rows, columns = one["grid"]
    step = max(1, round(rows / 4))
    shown = range(0, rows, step)
    centres = [one["prefix"] + (row + 0.5) * columns - 0.5 for row in shown]
    names = [str(round(row * one["of_grid"][0] / rows) + 1) for row in shown]
    axes.set_xticks(centres, names)
    axes.set_yticks(centres, names)
    axes.tick_params(labelsize=8)
    axes.grid(visible=False)
    axes.set_xlabel("to patches of row")
    if is_first:
        axes.set_ylabel("from patches of row")


def _draw_shares(figure: "Figure", axes: "list[Axes]", models: Sequence[dict[str, Any]]) -> None:
    names = [model["name"] for model in models]
    diagonal = [[100 * value for value in _means(model["diagonal_share"])] for model in models]
    uniform = [[100 * value for value in model["uniform_diagonal_share"]] for model in models]
    draw_models(axes[0], names, diagonal, uniform)
    draw_models(axes[1], names, [[100 * value for value in _means(m["column_share"])] for m in models])
    for place, title in zip(axes, ("on itself and neighbours", "the same for all queries"), strict=True):
        place.set_title(title)
        place.set_ylabel("% of attention")
        place.set_ylim(0)
    axes[1].set_ylim(0, 103)
    model_legend(figure, axes[0], note="uniform attention")
