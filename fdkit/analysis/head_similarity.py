"""How alike the heads of a layer attend: the mean cosine between the attentions of two heads.

Heads that all attend alike do the work of one. Feature distillation is known to make the heads of deep layers differ.
"""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fdkit.analysis._analysis import Analysis
from fdkit.analysis._attention import AttentionConfig, LayerMeans, measure, require_models
from fdkit.analysis._depth import draw_models, model_legend
from fdkit.analysis._figure import NARROW, WIDE, in_style, new_figure
from fdkit.analysis.observe import Attention, Images, Observed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

READING = (
    "The lower a line, the more the heads of that layer differ from each other: 1 says that all heads attend alike, "
    "0 that no two heads attend to the same tokens."
)


class HeadSimilarityConfig(AttentionConfig):
    """How heads are compared."""

    prefix_tokens: bool = True
    """Compares the whole attention, rows and columns of class and register tokens (and padding of windows) included;
    false compares attention of patches to patches alone. Both are in the numbers."""


def head_similarity(attention: Attention) -> tuple[Tensor, Tensor]:
    """Cosines between the attentions of two heads, mean over images; each (H, H) float64.

    The first of the whole attention, the second of that of patches to patches, as attended: rows are not scaled. The
    vectors are all rows of all windows of an image, one after the other; a head without any attention has cosine 0.
    """
    among_patches = _products(attention, attention.is_patch)
    if bool(attention.is_patch.all()):
        mean = _mean_cosine(among_patches)
        return mean, mean
    # Added and not subtracted, so that a large share on the class token takes nothing from the accuracy.
    whole = among_patches + _products_of_others(attention)
    return _mean_cosine(whole), _mean_cosine(among_patches)


def _products(attention: Attention, kept: Tensor) -> Tensor:
    """(B, H, H) float32: products of heads, summed over the queries and keys that are kept (W, N) bool."""
    weights, kept = attention.weights, kept.to(attention.weights.device)
    if len(kept) == 1:
        start = int((~kept[0]).sum())
        if bool(kept[0, start:].all()):  # prefix tokens alone come first: a slice does
            # An image at a time, as the slice has to be copied.
            return torch.cat([_gram(one[:, :, start:, start:].float().flatten(2)) for one in weights])
    both = kept[:, None, :, None] & kept[:, None, None, :]
    return _gram_of_windows(weights.float() * both)


def _products_of_others(attention: Attention) -> Tensor:
    """(B, H, H) float32: products of heads, summed over pairs of which one at least is no patch."""
    weights, is_patch = attention.weights, attention.is_patch.to(attention.weights.device)
    if len(is_patch) > 1:
        neither = ~(is_patch[:, None, :, None] & is_patch[:, None, None, :])
        return _gram_of_windows(weights.float() * neither)
    others, patches = ~is_patch[0], is_patch[0]
    rows = weights[:, 0, :, others].float().flatten(2)
    columns = weights[:, 0][:, :, patches][..., others].float().flatten(2)
    return _gram(rows) + _gram(columns)


def _gram_of_windows(weights: Tensor) -> Tensor:
    batch_size, num_windows, num_heads = weights.shape[:3]
    products = _gram(weights.reshape(batch_size * num_windows, num_heads, -1))
    return products.unflatten(0, (batch_size, num_windows)).sum(1)


def _gram(vectors: Tensor) -> Tensor:
    return torch.bmm(vectors, vectors.transpose(1, 2))


def _mean_cosine(products: Tensor) -> Tensor:
    lengths = products.double().diagonal(dim1=1, dim2=2).sqrt()
    floor = torch.finfo(torch.float32).tiny
    cosines = products.double() / (lengths[:, :, None] * lengths[:, None]).clamp_min(floor)
    return cosines.mean(0).clamp(max=1).cpu()


def mean_of_pairs(matrix: Tensor) -> float | None:
    """Mean over the pairs of different heads of a matrix (H, H); None for a single head, which has no other."""
    num_heads = len(matrix)
    if num_heads == 1:
        return None
    rows, columns = torch.triu_indices(num_heads, num_heads, offset=1)
    return matrix[rows, columns].mean().item()


class SimilarityStatistic:
    """Gathers the cosines of one model."""

    def __init__(self) -> None:
        self._means = LayerMeans()
        self._batch_size = 0

    def begin(self, images: Images) -> None:
        """A batch begins."""
        self._batch_size = len(images.pixels)

    def add(self, layer: int, attention: Attention) -> None:
        """The attention of a layer."""
        self._means.add(layer, torch.stack(head_similarity(attention)), self._batch_size)

    def numbers(self) -> dict[str, Any]:
        """See `analyze`."""
        layers = self._means.means()
        return {
            "similarity_of_all_tokens": [mean_of_pairs(whole) for whole, _ in layers],
            "similarity_among_patches": [mean_of_pairs(patches) for _, patches in layers],
            "pairs_of_all_tokens": [_rounded(whole) for whole, _ in layers],
            "pairs_among_patches": [_rounded(patches) for _, patches in layers],
        }


def _rounded(matrix: Tensor) -> list[list[float]]:
    return [[round(value, 4) for value in row] for row in matrix.tolist()]


def statistic(observed: Observed, config: HeadSimilarityConfig) -> SimilarityStatistic:
    """What gathers the cosines of a model."""
    return SimilarityStatistic()


def analyze(observed: Sequence[Observed], config: HeadSimilarityConfig) -> Analysis:
    """Mean cosine between the attentions of two heads of a layer, over pairs and images.

    The numbers hold, for each model, "similarity", a number a layer, null for a layer of one head: the one of
    "similarity_of_all_tokens" and "similarity_among_patches" that the configuration chooses, which stand beside it;
    and "pairs_of_all_tokens" and "pairs_among_patches", [[[cosine of two heads] a head] a layer], to 4 digits.
    Memory does not grow with the images. Source: the head similarity of Wei et al. 2022, arXiv 2205.14141,
    which leaves open how the class token is treated: mean over images and pairs h < h' of cos(vec A_h, vec A_h').
    Raises ConfigError if a model's attention cannot be read, DataError if there are no images.
    """
    require_models(len(observed), "head-similarity")
    return collect([measure(one, [statistic(one, config)], config)[0] for one in observed], config)


def collect(models: Sequence[dict[str, Any]], config: HeadSimilarityConfig) -> Analysis:
    """The analysis made of one table a model."""
    name = "similarity_of_all_tokens" if config.prefix_tokens else "similarity_among_patches"
    numbers = {
        "analysis": "head-similarity",
        "unit": "cosine",
        "prefix_tokens": config.prefix_tokens,
        "models": [{**model, "similarity": model[name]} for model in models],
    }
    return Analysis(numbers, partial(draw, numbers))


def scalars(model: dict[str, Any]) -> dict[str, float]:
    """The mean over the layers of several heads, and over those in the deeper half; {} if each has one head."""
    similarity = model["similarity"]
    everywhere = [value for value in similarity if value is not None]
    deep = [value for value in similarity[len(similarity) // 2 :] if value is not None]
    means = {"similarity of heads": everywhere, "similarity of heads in deep layers": deep}
    return {name: sum(values) / len(values) for name, values in means.items() if values}


def summary(numbers: dict[str, Any]) -> tuple[str, list[list[str]]]:
    """A table for people: its title, and its rows, the header first; a row a layer."""
    models = numbers["models"]
    header = ["layer", *(model["name"] for model in models)]
    rows = [
        [str(layer + 1), *(_written(model["similarity"], layer) for model in models)]
        for layer in range(max(len(model["similarity"]) for model in models))
    ]
    kept = "all tokens" if numbers["prefix_tokens"] else "patches alone"
    return f"{numbers['analysis']}, {kept}, mean cosine of two heads", [header, *rows]


def _written(similarity: list[float | None], layer: int) -> str:
    """Empty for a layer that the model does not have."""
    if layer >= len(similarity):
        return ""
    value = similarity[layer]
    return "one head" if value is None else f"{value:.3f}"


@in_style
def draw(numbers: dict[str, Any], width: float = WIDE) -> "Figure":
    """Similarity over depth, a line a model; layers of one head are left out.

    numbers: as `analyze` gives them; width: inches.
    """
    models = numbers["models"]
    figure = new_figure(width, 3.0 if width > NARROW else 3.2)
    axes = figure.subplots()
    draw_models(axes, [model["name"] for model in models], [model["similarity"] for model in models])
    axes.set_ylim(0, 1.03)
    axes.set_ylabel("similarity of heads (cosine)")
    model_legend(figure, axes)
    return figure
