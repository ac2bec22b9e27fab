"""How widely each head spreads its attention: the entropy of what a patch attends to.

A head of low entropy picks few tokens; one of high entropy averages over all that it sees, which says little about the
patch that asks. Divided by the logarithm of how many tokens a patch sees, 1 is uniform and 0 is a single token, so
that models of different grids can be compared.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from fdkit.analysis._analysis import Analysis
from fdkit.analysis._attention import AttentionConfig, LayerMeans, measure, require_models
from fdkit.analysis._depth import draw_heads_of
from fdkit.analysis._figure import WIDE, in_style
from fdkit.analysis.observe import Attention, Images, Observed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

READING = (
    "Each dot is a head, and the line their mean: a dot near the top spreads its attention over all it sees, a dot "
    "near the bottom picks few tokens; layers whose dots spread have heads that do different work."
)
Unit = Literal["normalised", "bits", "nats"]
UNIT_WORDS: dict[str, str] = {"normalised": "1 = uniform", "bits": "bits", "nats": "nats"}
_TINY = torch.finfo(torch.float32).tiny


class AttentionEntropyConfig(AttentionConfig):
    """How the spread of attention is measured."""

    renormalise: bool = True
    """Entropy of the attention among patches, scaled to sum to 1; false takes all tokens, class token, registers and
    padding of windows too. Both are in the numbers."""
    unit: Unit = "normalised"
    """Of figure and table: normalised (divided by the entropy of uniform attention), bits, or nats. The numbers hold
    nats and normalised."""


class Entropies(NamedTuple):
    """Means over images and patch queries, each (H,) float64."""

    among_patches: Tensor
    """Nats, of the attention to patches scaled to sum to 1; a query that attends to none counts 0."""
    over_all: Tensor
    """Nats, of the attention to all tokens."""
    among_patches_normalised: Tensor
    """The first, each query's divided by the logarithm of how many patches it sees."""
    over_all_normalised: Tensor
    """The second, each query's divided by the logarithm of how many tokens it sees."""


def query_entropies(attention: Attention) -> tuple[Tensor, Tensor]:
    """Entropy of each query's attention in nats, among patches and over all tokens; each (B, W, H, N) float32.

    Of attention a to patches whose sum is m, the entropy scaled to sum to 1 is sum(-a log a) / m + log m.
    """
    weights = attention.weights
    num_tokens = attention.places.shape[1]
    is_patch = attention.is_patch.to(weights.device, torch.float32)
    table = torch.stack([is_patch, torch.ones_like(is_patch)], dim=-1)  # (W, N, 2)
    found = []
    # An image at a time: what is made on the way stays in the processor's cache.
    for image in weights:
        plain = image.float().flatten(1, 2)  # (W, H*N, N)
        # The logarithm of PyTorch is vectorised on a CPU, `torch.special.entr` is not.
        terms = plain.clamp_min(_TINY).log_().mul_(plain)
        sums, mass = -torch.bmm(terms, table), torch.bmm(plain, is_patch[:, :, None]).squeeze(-1)
        floor = mass.clamp_min(_TINY)
        among = sums[..., 0] / floor + floor.log()
        found.append(torch.stack([torch.where(mass > _TINY, among, 0), sums[..., 1]]))
    among, whole = torch.stack(found, dim=1).clamp_min(0).unflatten(-1, (-1, num_tokens))
    return among, whole


def num_seen(attention: Attention) -> tuple[Tensor, Tensor]:
    """How many patches, and how many tokens, each query sees; each (W, N) int64."""
    sees = attention.sees()
    return (sees & attention.is_patch[:, None]).sum(-1), sees.sum(-1)


def attention_entropy(attention: Attention) -> Entropies:
    """Mean entropy of the attention of patches; a query that sees a single token counts as uniform, 1.

    Source: Shannon 1948; over the tokens a query attends to, as in Zhai et al. 2023, arXiv 2303.06296, section 3.
    """
    entropies = query_entropies(attention)
    queries = attention.is_patch
    means = []
    for entropy, count in zip(entropies, num_seen(attention), strict=True):
        of_patches = entropy.double().movedim(2, 0)[:, :, queries.to(entropy.device)]  # (H, B, queries)
        most = count[queries].to(of_patches).log()
        normalised = torch.where(most > 0, of_patches / most.clamp_min(_TINY), 1)
        means.append((of_patches.mean((1, 2)), normalised.mean((1, 2))))
    (among, among_normalised), (whole, whole_normalised) = means
    return Entropies(among, whole, among_normalised, whole_normalised)


class EntropyStatistic:
    """Gathers the entropies of one model."""

    def __init__(self) -> None:
        self._means = LayerMeans()
        self._uniform: list[tuple[float, float]] = []
        self._batch_size = 0

    def begin(self, images: Images) -> None:
        """A batch begins."""
        self._batch_size = len(images.pixels)

    def add(self, layer: int, attention: Attention) -> None:
        """The attention of a layer."""
        if layer == len(self._uniform):
            self._uniform.append(uniform_entropy(attention))
        self._means.add(layer, torch.stack(attention_entropy(attention)), self._batch_size)

    def numbers(self) -> dict[str, Any]:
        """See `analyze`."""
        layers = [Entropies(*layer) for layer in self._means.means()]
        return {
            "entropy_among_patches": [layer.among_patches.tolist() for layer in layers],
            "entropy_over_all": [layer.over_all.tolist() for layer in layers],
            "normalised_among_patches": [layer.among_patches_normalised.tolist() for layer in layers],
            "normalised_over_all": [layer.over_all_normalised.tolist() for layer in layers],
            "uniform_among_patches": [among for among, _ in self._uniform],
            "uniform_over_all": [whole for _, whole in self._uniform],
        }


def uniform_entropy(attention: Attention) -> tuple[float, float]:
    """The entropies in nats, among patches and over all tokens, if every patch attended alike to all that it sees."""
    queries = attention.is_patch
    among, whole = (count[queries].double().log().mean().item() for count in num_seen(attention))
    return among, whole


def statistic(observed: Observed, config: AttentionEntropyConfig) -> EntropyStatistic:
    """What gathers the entropies of a model."""
    return EntropyStatistic()


def analyze(observed: Sequence[Observed], config: AttentionEntropyConfig) -> Analysis:
    """Entropy of every head's attention, mean over patches and images; memory does not grow with the images.

    The numbers hold, for each model, "entropy" in nats and "normalised" (1 is uniform) as [[a number a head] a layer],
    of the attention among patches or over all tokens as the configuration chooses; both stand beside them under
    "..._among_patches" and "..._over_all"; "uniform", the entropy in nats of uniform attention, a number a layer; and
    "mean" and "head_std" over the heads of a layer, of the normalised entropy.
    Raises ConfigError if a model's attention cannot be read, DataError if there are no images.
    """
    require_models(len(observed), "attention-entropy")
    return collect([measure(one, [statistic(one, config)], config)[0] for one in observed], config)


def collect(models: Sequence[dict[str, Any]], config: AttentionEntropyConfig) -> Analysis:
    """The analysis made of one table a model."""
    numbers = {
        "analysis": "attention-entropy",
        "unit": "nat",
        "shown_unit": config.unit,
        "renormalised": config.renormalise,
        "models": [_with_summary(model, renormalise=config.renormalise) for model in models],
    }
    return Analysis(numbers, partial(draw, numbers))


def _with_summary(model: dict[str, Any], *, renormalise: bool) -> dict[str, Any]:
    kind = "among_patches" if renormalise else "over_all"
    normalised = model[f"normalised_{kind}"]
    heads = [torch.tensor(layer, dtype=torch.float64) for layer in normalised]
    return {
        **model,
        "entropy": model[f"entropy_{kind}"],
        "normalised": normalised,
        "uniform": model[f"uniform_{kind}"],
        "mean": [layer.mean().item() for layer in heads],
        "head_std": [layer.std(correction=0).item() for layer in heads],
    }


def scalars(model: dict[str, Any]) -> dict[str, float]:
    """The mean of all heads, and how much heads differ in the deeper half of the layers."""
    deep = model["head_std"][len(model["head_std"]) // 2 :]
    return {
        "mean entropy (1 = uniform)": sum(model["mean"]) / len(model["mean"]),
        "spread of heads in deep layers (1 = uniform)": sum(deep) / len(deep),
    }


def _shown(model: dict[str, Any], unit: str) -> tuple[list[list[float]], list[float]]:
    """[[a value a head] a layer] in the unit shown, and what uniform attention would give, a number a layer."""
    if unit == "normalised":
        return model["normalised"], [1.0] * len(model["normalised"])
    factor = 1 / math.log(2) if unit == "bits" else 1.0
    entropy = [[factor * value for value in heads] for heads in model["entropy"]]
    return entropy, [factor * value for value in model["uniform"]]


def summary(numbers: dict[str, Any]) -> tuple[str, list[list[str]]]:
    """A table for people: its title, and its rows, the header first; mean of heads and their spread, a row a layer."""
    unit = numbers["shown_unit"]
    shown = [_shown(model, unit)[0] for model in numbers["models"]]
    header = ["layer", *(model["name"] for model in numbers["models"])]
    rows = [
        [str(layer + 1), *(_mean_of_heads(heads, layer) for heads in shown)]
        for layer in range(max(len(heads) for heads in shown))
    ]
    kept = "among patches" if numbers["renormalised"] else "over all tokens"
    return f"{numbers['analysis']}, {kept}, {UNIT_WORDS[unit]}, mean of heads ± spread", [header, *rows]


def _mean_of_heads(layers: list[list[float]], layer: int) -> str:
    """Empty for a layer that the model does not have."""
    if layer >= len(layers):
        return ""
    heads = torch.tensor(layers[layer], dtype=torch.float64)
    return f"{heads.mean().item():.2f} ± {heads.std(correction=0).item():.2f}"


@in_style
def draw(numbers: dict[str, Any], width: float = WIDE) -> "Figure":
    """Entropy over depth, a panel a model with one axis for all: a dot a head, a line for their mean.

    numbers: as `analyze` gives them; width: inches.
    """
    unit = numbers["shown_unit"]
    shown = [(model["name"], *_shown(model, unit)) for model in numbers["models"]]
    return draw_heads_of(shown, f"entropy ({UNIT_WORDS[unit]})", width=width)
