"""Where in a model classes come apart: accuracy of nearest neighbours in the features of every layer.

Each labelled image is classified by the k most similar of the others (leave one out), which vote for their class with
weight exp(cosine similarity / temperature), as in the kNN evaluation. Nothing is trained, and the images need no
training part; the accuracy is of few images, so it compares layers and models, and is no benchmark.
Source of the vote: Wu et al. 2018 (arXiv 1805.01978), section 3.4.
"""

from collections.abc import Sequence
from functools import partial
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from fdkit.analysis._analysis import Analysis
from fdkit.analysis._features import POOLING_WORDS, FeatureConfig, layer_features, need_models
from fdkit.analysis._figure import GREY, NARROW, WIDE, in_style, new_figure
from fdkit.analysis._lines import draw_over_depth
from fdkit.analysis.observe import Images, Observed, backbone_of, first_images
from fdkit.errors import DataError
from fdkit.models.representation import unit_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

READING = (
    "The line shows how well the neighbours of an image at that depth tell its class, within the shaded 95 % interval; "
    "a line that falls towards the end belongs to a model whose last layers serve its pretext task, not the classes."
)
BLOCK = 1024
LABELS_HINT = "labels come from class folders, one a class, inside --data"


class LayerKnnConfig(FeatureConfig):
    """How neighbours vote, and among how many images."""

    num_images: int = Field(default=1024, ge=2)
    """Images read, drawn from the data with the seed; those without a label are left out."""
    k: int = Field(default=20, ge=1)
    """Neighbours that vote; fewer than the labelled images."""
    temperature: float = Field(default=0.07, gt=0)
    """Divides cosine similarity before the exponential, so low values favour the nearest."""


class Labelled(NamedTuple):
    """Features of labelled images."""

    layers: list[Tensor]
    """Of each layer (N, C), of a width of its own."""
    labels: Tensor
    """(N,) int64, 0 or higher."""
    num_unlabelled: int
    """Images read that had no label."""


def analyze(observed: Sequence[Observed], config: LayerKnnConfig) -> Analysis:
    """Leave-one-out accuracy of a weighted vote of nearest neighbours in every layer of every model.

    Memory: the features of all layers, N x (sum of widths) float32, and blocks of 1024 x N similarities. Layers are as
    each leaves them, without the final norm.
    The numbers hold, for each model, "accuracy", a fraction a layer, "interval", [low, high] a layer: 95 %, Wilson
    1927, of images taken as independent; "chance", of always answering the most frequent class; "num_images", the
    labelled ones, "num_unlabelled", "num_classes", those among the images, and "num_classes_of_data", all of them.
    Raises DataError for images without labels, of one class alone or of one class each, for k labelled images or
    fewer, or models with different labels; ConfigError for a model whose layers are not known or that has no class
    token where it is asked for, NumericsError for features that are not finite.
    """
    need_models(observed, "layer-knn")
    models: list[dict[str, Any]] = []
    first_labels: Tensor | None = None
    for one in observed:
        found = _read(one, config)
        if first_labels is not None and not torch.equal(first_labels, found.labels):
            raise DataError(
                f"{observed[0].name} and {one.name} read images with different labels",
                "every model must be given the same images in the same order",
            )
        first_labels = found.labels
        models.append(_measure(one, found, config))
    numbers = {
        "analysis": "layer-knn",
        "pooling": config.pooling,
        "k": config.k,
        "temperature": config.temperature,
        "models": models,
    }
    return Analysis(numbers, partial(draw, numbers))


def _read(observed: Observed, config: LayerKnnConfig) -> Labelled:
    layers: list[list[Tensor]] = []
    labels: list[Tensor] = []
    num_unlabelled = 0
    for images in first_images(observed, config.num_images):
        has_label = _labels(images, observed) >= 0
        num_unlabelled += int((~has_label).sum())
        if not has_label.any():
            continue
        new = layer_features(observed, images.pixels[has_label.to(images.pixels.device)], config.pooling)
        layers = layers or [[] for _ in new]
        for parts, features in zip(layers, new, strict=True):
            parts.append(features)
        labels.append(_labels(images, observed)[has_label])
    num_labelled = sum(len(part) for part in labels)
    if num_labelled <= config.k:
        raise DataError(
            f"{num_labelled} labelled images are too few for a vote of k {config.k} others ({observed.name})",
            "give more labelled images, a larger --num-images or a smaller --k",
        )
    all_labels = torch.cat(labels)
    if len(all_labels.unique()) < 2:
        raise DataError(
            f"the {num_labelled} labelled images are all of one class, so that there is nothing to tell apart",
            "use a larger --num-images, or a folder of more classes",
        )
    if int(all_labels.bincount().max()) < 2:
        raise DataError(
            f"each of the {num_labelled} labelled images is the only one of its class, so that no vote can be right",
            "use a larger --num-images, or images of fewer classes",
        )
    return Labelled([torch.cat(parts) for parts in layers], all_labels, num_unlabelled)


def _labels(images: Images, observed: Observed) -> Tensor:
    if images.labels is None:
        raise DataError(
            f"layer-knn needs labels, and the images given to {observed.name} have none", LABELS_HINT
        )
    return images.labels.cpu().long()


def _measure(observed: Observed, found: Labelled, config: LayerKnnConfig) -> dict[str, Any]:
    num_images = len(found.labels)
    device = backbone_of(observed.model).mean.device
    hits = [
        int((predict(layer.to(device), found.labels.to(device), config).cpu() == found.labels).sum())
        for layer in found.layers
    ]
    counts = torch.bincount(found.labels)
    return {
        "name": observed.name,
        "num_images": num_images,
        "num_unlabelled": found.num_unlabelled,
        "num_classes": int((counts > 0).sum()),
        "num_classes_of_data": max(len(observed.classes), int((counts > 0).sum())),
        "chance": counts.max().item() / num_images,
        "accuracy": [one / num_images for one in hits],
        "interval": [wilson_interval(one, num_images) for one in hits],
    }


def predict(features: Tensor, labels: Tensor, config: LayerKnnConfig) -> Tensor:
    """The class that the k nearest others of each row vote for; (N,) int64.

    features: (N, D), N > k; labels: (N,) int64, 0 or higher. An image never votes for itself. Of equal similarities
    the earlier image is nearer, of classes with equal votes the lower one wins.
    """
    rows = unit_rows(features)
    num_classes = int(labels.max()) + 1
    predicted = []
    for start in range(0, len(rows), BLOCK):
        similarity = rows[start : start + BLOCK] @ rows.T
        own = torch.arange(len(similarity), device=rows.device)
        similarity[own, own + start] = -torch.inf
        nearest = similarity.sort(dim=1, descending=True, stable=True)
        values, places = nearest.values[:, : config.k], nearest.indices[:, : config.k]
        # A factor common to a query's votes changes no order, and without it low temperatures would overflow.
        weights = ((values - values[:, :1]).double() / config.temperature).exp()
        votes = weights.new_zeros(len(weights), num_classes).scatter_add_(1, labels[places], weights)
        predicted.append(votes.argmax(dim=1))
    return torch.cat(predicted)


def wilson_interval(hits: int, count: int) -> list[float]:
    """[low, high]: the 95 % interval of a share of hits among `count` independent images. Source: Wilson 1927.

    Written out: SciPy's binomtest says the same, after a second for its import.
    """
    z, share = NormalDist().inv_cdf(0.975), hits / count
    scale = 1 + z**2 / count
    middle = (share + z**2 / (2 * count)) / scale
    half = z / scale * (share * (1 - share) / count + z**2 / (4 * count**2)) ** 0.5
    return [max(0.0, middle - half), min(1.0, middle + half)]


def scalars(model: dict[str, Any]) -> dict[str, float]:
    """Accuracy at the end, and how much better the best layer is."""
    last, best = model["accuracy"][-1], max(model["accuracy"])
    return {
        "kNN accuracy, last layer (%)": 100 * last,
        "best layer above the last (points)": 100 * (best - last),
    }


def summary(numbers: dict[str, Any]) -> tuple[str, list[list[str]]]:
    """A table for people: its title, and its rows, the header first; accuracy with its interval, by layer."""
    models = numbers["models"]
    rows = [
        [str(layer + 1), *(_at(model, layer) for model in models)]
        for layer in range(max(len(model["accuracy"]) for model in models))
    ]
    one = models[0]
    title = (
        f"kNN accuracy in %, k {numbers['k']}, {POOLING_WORDS[numbers['pooling']]}, {one['num_images']} images of "
        f"{_classes(one)}, 95 % intervals; chance {100 * one['chance']:.1f}"
    )
    return title, [["layer", *(model["name"] for model in models)], *rows]


def _classes(model: dict[str, Any]) -> str:
    """Such as "10 classes", or "2 of 10 classes" where the images hold no more."""
    found, known = model["num_classes"], model["num_classes_of_data"]
    return f"{found} classes" if found == known else f"{found} of {known} classes"


def _at(model: dict[str, Any], layer: int) -> str:
    """Empty for a layer that the model does not have."""
    if layer >= len(model["accuracy"]):
        return ""
    low, high = model["interval"][layer]
    return f"{100 * model['accuracy'][layer]:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


@in_style
def draw(numbers: dict[str, Any], width: float = WIDE) -> "Figure":
    """Accuracy over relative depth, a line a model with the band of its interval, and a dashed line for chance.

    numbers: as `analyze` gives them; width: inches.
    """
    models = numbers["models"]
    is_narrow = width <= NARROW
    figure = new_figure(width, 3.0 + (0.2 * (len(models) + 1) if is_narrow else 0.2))
    axes = figure.subplots()
    for number, model in enumerate(models):
        accuracy = [100 * value for value in model["accuracy"]]
        band = [[100 * low, 100 * high] for low, high in model["interval"]]
        draw_over_depth(axes, number, accuracy, label=model["name"], band=band)
    chance = 100 * models[0]["chance"]
    axes.axhline(chance, color=GREY, linestyle=(0, (4, 3)), linewidth=1, label="most frequent class")
    lows = [100 * low for model in models for low, _ in model["interval"]]
    axes.set_ylim(bottom=max(min(*lows, chance) - 4, 0))
    axes.set_title(f"{models[0]['num_images']} images of {_classes(models[0])}")
    axes.set_ylabel(f"kNN accuracy (%), k = {numbers['k']}")
    figure.legend(loc="outside lower left" if is_narrow else "outside right upper", ncols=1)
    return figure
