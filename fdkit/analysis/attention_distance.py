"""How far each head looks: the mean distance between a patch and what it attends to.

Heads that all look equally far in a deep layer do the same work; heads spread over many distances are diverse.
Feature distillation is known to spread them in deep layers.
"""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from fdkit.analysis._analysis import Analysis
from fdkit.analysis._attention import AttentionConfig, measure, require_models
from fdkit.analysis._depth import draw_heads_of
from fdkit.analysis._figure import WIDE, in_style
from fdkit.analysis.observe import Attention, Images, Observed
from fdkit.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

READING = (
    "Each dot is a head, and the line their mean: a layer whose dots lie low looks at its neighbourhood, one whose "
    "dots lie high looks across the image, and a layer whose dots spread has heads that do different work."
)
Unit = Literal["pixels", "patches", "image"]
UNIT_WORDS: dict[str, str] = {"pixels": "pixels", "patches": "patches", "image": "% of the image's side"}


class AttentionDistanceConfig(AttentionConfig):
    """How attention distance is measured."""

    renormalise: bool = True
    """Attention among patches is scaled to sum to 1, so that attention to class and register tokens, which have no
    place in the image, does not shorten distances; false keeps it as the softmax gave it. Both are in the numbers."""
    unit: Unit = "pixels"
    """Of figure and table: pixels of the model's own input, patches, or image, percent of its side, which alone
    compares models of different input sizes. The numbers are in pixels and in patches."""


class Distances(NamedTuple):
    """Means over images and query patches, each (H,) float64; distances in the unit of the table."""

    renormalised: Tensor
    """Distance, each query's attention to patches scaled to sum to 1; a query that attends to none counts 0."""
    as_attended: Tensor
    """Distance, attention as the softmax gave it: what goes to prefix tokens counts as distance 0."""
    on_prefix: Tensor
    """Attention to tokens without a place in the image: class token, registers, padding."""


def patch_distances(grid: tuple[int, int], patch_size: float) -> Tensor:
    """Euclidean distances between patch centres, in pixels; (h*w, h*w) float32, row-major.

    grid: (h, w), rows and columns of patches; patch_size: pixels between neighbouring patches.
    """
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    places = torch.stack([rows.flatten(), columns.flatten()], dim=-1).double()
    offsets = places[:, None] - places[None]
    return (patch_size * offsets.norm(dim=-1)).float()


def token_distances(places: Tensor, grid: tuple[int, int], stride: float) -> Tensor:
    """(W, N, N) float32: distances in pixels between the tokens of each window, 0 where either has no place.

    places: (W, N), grid: (h, w) and stride as in `Attention`.
    """
    columns = grid[1]
    centres = torch.stack([places // columns, places % columns], dim=-1).double()
    distances = stride * (centres[:, :, None] - centres[:, None]).norm(dim=-1)
    return (distances * _both_placed(places)).float()


def uniform_distance(
    places: Tensor, grid: tuple[int, int], stride: float, visible: Tensor | None = None
) -> float:
    """The distance if every patch attended alike to all patches that it can see, in pixels; all as in `Attention`."""
    placed = _both_placed(places)
    seen = placed if visible is None else placed & visible
    distances = token_distances(places, grid, stride).double()
    per_query = (distances * seen).sum(-1) / seen.sum(-1).clamp_min(1)
    return per_query[places >= 0].mean().item()


def _both_placed(places: Tensor) -> Tensor:
    return (places >= 0)[:, :, None] & (places >= 0)[:, None]


def attention_distance(attention: Attention, distances: Tensor | None = None) -> Distances:
    """Mean distance from a query patch to what it attends to; queries and keys without a place are dropped.

    distances: (W, N, N) between the tokens of each window; by default `token_distances`, in pixels.
    Raises ValueError if their shape does not fit.
    Source: Dosovitskiy et al. 2021, appendix D.7, which leaves open how the class token is treated.
    """
    weights, places = attention.weights, attention.places
    batch_size, num_windows, num_heads, num_tokens, _ = weights.shape
    if distances is None:
        distances = token_distances(places, attention.grid, attention.stride)
    if distances.shape != (num_windows, num_tokens, num_tokens):
        raise ValueError(
            f"distances are {tuple(distances.shape)}, but there are {num_windows} windows of {num_tokens} tokens"
        )
    is_patch = places >= 0
    table = torch.stack([distances, is_patch[:, None].expand_as(distances).to(distances.dtype)], dim=-1)
    # (W*N, B*H, N): one matrix product a query, and for a single window no copy
    by_query = weights.float().permute(1, 3, 0, 2, 4).reshape(num_windows * num_tokens, -1, num_tokens)
    distance, mass = torch.bmm(by_query, table.flatten(0, 1).to(by_query.device)).double().unbind(-1)
    kept = is_patch.flatten().to(by_query.device)
    distance, mass = (part[kept].unflatten(1, (batch_size, num_heads)) for part in (distance, mass))
    means = (distance / mass.clamp_min(torch.finfo(torch.float32).tiny), distance, 1 - mass)
    return Distances(*(part.mean((0, 1)).cpu() for part in means))


class DistanceStatistic:
    """Gathers the distances of one model."""

    def __init__(self) -> None:
        self._layers: list[_Layer] = []
        self._batch_size = 0

    def begin(self, images: Images) -> None:
        """A batch begins."""
        self._batch_size = len(images.pixels)

    def add(self, layer: int, attention: Attention) -> None:
        """The attention of a layer."""
        if layer == len(self._layers):
            self._layers.append(_Layer(attention))
        own = self._layers[layer]
        # In place: small tensors made between large ones would keep the allocator from reusing memory.
        own.sums += self._batch_size * torch.stack(attention_distance(attention, own.distances))
        own.num_images += self._batch_size

    def numbers(self) -> dict[str, Any]:
        """See `analyze`."""
        means = [Distances(*(layer.sums / layer.num_images)) for layer in self._layers]
        strides = [layer.stride for layer in self._layers]
        return {
            "distance_renormalised": [one.renormalised.tolist() for one in means],
            "distance_as_attended": [one.as_attended.tolist() for one in means],
            "prefix_attention": [one.on_prefix.tolist() for one in means],
            "uniform_distance": [layer.uniform for layer in self._layers],
            "stride": strides,
        }


class _Layer:
    """What is known of a layer, and the sums over images."""

    def __init__(self, attention: Attention) -> None:
        geometry = (attention.places, attention.grid, attention.stride)
        self.distances = token_distances(*geometry)
        self.uniform = uniform_distance(*geometry, attention.visible)
        self.stride = attention.stride
        self.sums = torch.zeros(3, attention.num_heads, dtype=torch.float64)
        self.num_images = 0


def statistic(observed: Observed, config: AttentionDistanceConfig) -> DistanceStatistic:
    """What gathers the distances of a model."""
    return DistanceStatistic()


def analyze(observed: Sequence[Observed], config: AttentionDistanceConfig) -> Analysis:
    """Attention distance of every head of every model, averaged over images; memory does not grow with their number.

    The numbers hold, for each model, "distance" as [[a number a head] a layer] in pixels of the model's own input: the
    one of "distance_renormalised" and "distance_as_attended" that the configuration chooses, which stand beside it;
    "distance_in_patches", the same in strides of the layer; its "mean" and "head_std" over the heads of a layer;
    "prefix_attention" in the same layout; for each layer "uniform_distance", the distance if every patch attended to
    all that it can see alike, and "stride", pixels between its patches.
    Raises ConfigError if a model's attention cannot be read or pixels of different input sizes would be compared,
    DataError if there are no images.
    """
    require_models(len(observed), "attention-distance")
    return collect([measure(one, [statistic(one, config)], config)[0] for one in observed], config)


def collect(models: Sequence[dict[str, Any]], config: AttentionDistanceConfig) -> Analysis:
    """The analysis made of one table a model."""
    sizes = {model["image_size"] for model in models}
    if config.unit == "pixels" and len(sizes) > 1:
        raise ConfigError(
            f"pixels of different input sizes cannot stand in one figure: {_listed(models)}",
            "use --unit image, percent of the image's side, or one size for all: --image-size 224",
        )
    name = "distance_renormalised" if config.renormalise else "distance_as_attended"
    numbers = {
        "analysis": "attention-distance",
        "unit": "pixel",
        "shown_unit": config.unit,
        "renormalised": config.renormalise,
        "models": [_with_summary(model, name) for model in models],
    }
    return Analysis(numbers, partial(draw, numbers))


def _listed(models: Sequence[dict[str, Any]]) -> str:
    return ", ".join(f"{model['name']} {model['image_size']}" for model in models)


def _with_summary(model: dict[str, Any], name: str) -> dict[str, Any]:
    distance = model[name]
    heads = [torch.tensor(layer, dtype=torch.float64) for layer in distance]
    return {
        **model,
        "distance": distance,
        "distance_in_patches": [
            [value / stride for value in layer]
            for layer, stride in zip(distance, model["stride"], strict=True)
        ],
        "mean": [layer.mean().item() for layer in heads],
        "head_std": [layer.std(correction=0).item() for layer in heads],
    }


def scalars(model: dict[str, Any]) -> dict[str, float]:
    """The mean of all heads, and how much heads differ in the deeper half of the layers."""
    deep = model["head_std"][len(model["head_std"]) // 2 :]
    return {
        "mean distance (pixels)": sum(model["mean"]) / len(model["mean"]),
        "spread of heads in deep layers (pixels)": sum(deep) / len(deep),
    }


def _shown(model: dict[str, Any], unit: str) -> list[float]:
    """For each layer, what a distance in pixels is multiplied by."""
    factors = {
        "pixels": [1.0] * len(model["stride"]),
        "patches": [1 / stride for stride in model["stride"]],
        "image": [100 / model["image_size"]] * len(model["stride"]),
    }
    return factors[unit]


def summary(numbers: dict[str, Any]) -> tuple[str, list[list[str]]]:
    """A table for people: its title, and its rows, the header first; the mean over heads of every layer."""
    models, unit = numbers["models"], numbers["shown_unit"]
    header = ["layer", *(model["name"] for model in models)]
    rows = [
        [str(layer + 1), *(_mean_of_heads(model, layer, unit) for model in models)]
        for layer in range(max(len(model["mean"]) for model in models))
    ]
    kept = "renormalised" if numbers["renormalised"] else "as attended"
    title = f"{numbers['analysis']}, {kept}, {UNIT_WORDS[unit]}, mean of heads ± spread"
    return title, [header, *rows]


def _mean_of_heads(model: dict[str, Any], layer: int, unit: str) -> str:
    """Empty for a layer that the model does not have."""
    if layer >= len(model["mean"]):
        return ""
    factor = _shown(model, unit)[layer]
    return f"{factor * model['mean'][layer]:.1f} ± {factor * model['head_std'][layer]:.1f}"


@in_style
def draw(numbers: dict[str, Any], width: float = WIDE) -> "Figure":
    """Distance over depth, a panel a model with one distance axis for all: a dot a head, a line for their mean.

    numbers: as `analyze` gives them; width: inches.
    """
    unit = numbers["shown_unit"]
    shown = [(model["name"], *_scaled(model, _shown(model, unit))) for model in numbers["models"]]
    return draw_heads_of(shown, f"attention distance ({UNIT_WORDS[unit]})", width=width)


def _scaled(model: dict[str, Any], factors: Sequence[float]) -> tuple[list[list[float]], list[float]]:
    """[[a distance a head] a layer], and that of uniform attention, each layer by its factor."""
    distance = [
        [factor * value for value in heads] for factor, heads in zip(factors, model["distance"], strict=True)
    ]
    return distance, [factor * one for factor, one in zip(factors, model["uniform_distance"], strict=True)]
