"""The loss of a classifier on images held in memory: cross-entropy of the model's own head, or of a fitted probe."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import skip_init

from fdkit.analysis.observe import Images, Observed, backbone_of, evaluating
from fdkit.data.imagenet_variants import imagenet_wnids
from fdkit.errors import ConfigError, DataError, NumericsError
from fdkit.models.backbone import Backbone, Pooling

Readout = Literal["head", "probe"]
IMAGENET_CLASSES = 1000


class Labelled(NamedTuple):
    """Images held in memory, on the CPU."""

    pixels: Tensor
    """(N, 3, H, W), RGB in [0, 1]; 12 H W bytes an image."""
    labels: Tensor
    """(N,) int64."""


def labelled_images(observed: Observed, count: int, *, num_fit: int = 0) -> tuple[Labelled, Labelled]:
    """Images to measure on, and others to fit on: the first of every class in turn, equally many as far as there are.

    Data in the order of its classes is read until each class has its share, so all of it, or nearly so; what is kept
    is `count` + `num_fit` images, less where there are not as many. Fewer, of a class too, are divided in proportion.
    Raises DataError for images without labels, or of which none is left to measure on.
    """
    classes = observed.classes
    share = -(-(count + num_fit) // max(1, len(classes)))
    kept: dict[int, list[Tensor]] = {}
    for batch in observed.batches:
        for pixels, label in _with_labels(batch):
            if len(kept.setdefault(label, [])) < share:
                kept[label].append(pixels.cpu().clone())
        if len(kept) == len(classes) and all(len(images) == share for images in kept.values()):
            break
    if not kept or not classes:
        raise DataError(
            f"no labelled images to measure the loss of {observed.name} on",
            "give a folder with a folder a class",
        )
    in_turn = [
        (images[turn], label)
        for turn in range(share)
        for label, images in sorted(kept.items())
        if turn < len(images)
    ][: count + num_fit]
    fit, measured = _divided(in_turn, num_fit / (count + num_fit))
    if not measured or (num_fit and not fit):
        raise DataError(
            f"{len(in_turn)} labelled images are too few to fit on some and measure on others",
            "give more images, or larger --num-images and --num-fit-images",
        )
    return _stacked(measured), _stacked(fit)


def _divided(
    images: Sequence[tuple[Tensor, int]], ratio: float
) -> tuple[list[tuple[Tensor, int]], list[tuple[Tensor, int]]]:
    """The first of each class, this share of all and as nearly as can be of each class; and the rest."""
    sizes = Counter(label for _, label in images)
    num_first = {label: int(size * ratio) for label, size in sizes.items()}
    missing = round(len(images) * ratio) - sum(num_first.values())
    for label in sorted(sizes, key=lambda label: (num_first[label] - sizes[label] * ratio, label))[:missing]:
        num_first[label] += 1
    first: list[tuple[Tensor, int]] = []
    rest: list[tuple[Tensor, int]] = []
    for image in images:
        num_first[image[1]] -= 1
        (first if num_first[image[1]] >= 0 else rest).append(image)
    return first, rest


def _with_labels(batch: Images) -> Iterator[tuple[Tensor, int]]:
    if batch.labels is not None:
        pairs = zip(batch.pixels, batch.labels.tolist(), strict=True)
        yield from ((pixels, label) for pixels, label in pairs if label >= 0)


def _stacked(images: Sequence[tuple[Tensor, int]]) -> Labelled:
    if not images:
        return Labelled(torch.empty(0), torch.empty(0, dtype=torch.int64))
    return Labelled(
        torch.stack([pixels for pixels, _ in images]), torch.tensor([label for _, label in images])
    )


class Objective:
    """A loss, as a function of a network's weights, on images that stay the same."""

    def __init__(
        self,
        backbone: Backbone,
        logits_of: Callable[[Backbone, Tensor], Tensor],
        images: Labelled,
        *,
        batch_size: int,
        about: dict[str, Any],
    ) -> None:
        self.backbone = backbone
        self.logits_of = logits_of
        self.images = images
        self.batch_size = batch_size
        self.about = about
        """What the numbers say of the loss: readout, counts of images and classes."""

    def parameters(self) -> dict[str, Tensor]:
        """The network's parameters that the loss depends on, by name."""
        everything = dict(self.backbone.network.named_parameters())
        free = {name: weights.detach().requires_grad_() for name, weights in everything.items()}
        (loss, *_) = self.losses(free, limit=1)
        slopes = torch.autograd.grad(loss, list(free.values()), allow_unused=True)
        return {name: everything[name] for name, slope in zip(free, slopes, strict=True) if slope is not None}

    def losses(self, parameters: dict[str, Tensor], *, limit: int | None = None) -> Iterator[Tensor]:
        """The loss in parts, whose sum is the mean cross-entropy: one a batch, as a function of these parameters.

        limit: of the first images alone.
        """
        call = _Call(self.backbone, self.logits_of)
        named = {f"backbone.network.{name}": value for name, value in parameters.items()}
        count = len(self.images.labels[:limit])
        for pixels, labels in self._batches(limit):
            logits = functional_call(call, named, (pixels,))
            yield F.cross_entropy(logits, labels, reduction="sum") / count

    @torch.no_grad()
    def measure(self) -> tuple[float, float]:
        """Mean cross-entropy in nats, which may not be finite, and the share of images whose class scores highest."""
        total, hits = 0.0, 0
        for pixels, labels in self._batches():
            logits = self.logits_of(self.backbone, pixels).float()
            total += float(F.cross_entropy(logits, labels, reduction="sum").double())
            hits += int((logits.argmax(dim=1) == labels).sum())
        return total / len(self.images.labels), hits / len(self.images.labels)

    def _batches(self, limit: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        device = self.backbone.mean.device
        pixels, labels = self.images.pixels[:limit], self.images.labels[:limit]
        for part, of in zip(pixels.split(self.batch_size), labels.split(self.batch_size), strict=True):
            yield part.to(device), of.to(device)


class _Call(nn.Module):
    """The logits as a module, so that they can be computed with other parameters."""

    def __init__(self, backbone: Backbone, logits_of: Callable[[Backbone, Tensor], Tensor]) -> None:
        super().__init__()
        self.backbone = backbone
        self.logits_of = logits_of

    def forward(self, images: Tensor) -> Tensor:
        return self.logits_of(self.backbone, images)


def make_objective(
    observed: Observed,
    *,
    readout: Readout,
    pooling: Pooling,
    num_images: int,
    num_fit_images: int,
    batch_size: int,
) -> Objective:
    """The loss of a model on labelled images; holds `num_images` of them in memory.

    readout: "head", the model's own classifier, all of whose classes compete; "probe", a logistic regression on its
    pooled features, standardised, that is fitted on `num_fit_images` further images and stays as it is.
    Raises ConfigError for a model without a classifier or with one of other classes, DataError for too few images,
    NumericsError if features or loss are not finite.
    """
    backbone = backbone_of(observed.model)
    logits_of: Callable[[Backbone, Tensor], Tensor]
    about: dict[str, Any]
    if readout == "head":
        places = _classes_of_head(observed, backbone)
        images, _ = labelled_images(observed, num_images)
        images = images._replace(labels=places[images.labels])
        logits_of, about = Backbone.logits, {"readout": "head"}
    else:
        images, fit = labelled_images(observed, num_images, num_fit=num_fit_images)
        with evaluating(backbone):
            probe, places = _fit_probe(observed, backbone, images, fit, pooling, batch_size=batch_size)
        images = images._replace(labels=places[images.labels])
        logits_of = partial(_probed, probe=probe, pooling=pooling)
        about = {"readout": "probe", "pooling": pooling, "num_fit_images": len(fit.labels)}
    about |= {"num_images": len(images.labels), "num_classes": len(images.labels.unique())}
    return Objective(backbone, logits_of, images, batch_size=batch_size, about=about)


def _classes_of_head(observed: Observed, backbone: Backbone) -> Tensor:
    """(K,) int64: which output of the head is each class of the data; by name, so in any order."""
    if backbone.logits_of is None:
        raise ConfigError(
            f"{observed.name} has no classifier of its own",
            "use --readout probe, which fits one on frozen features, or a fine-tuned model",
        )
    if not observed.classes:
        raise DataError(
            f"no labelled images to measure the loss of {observed.name} on",
            "give a folder with a folder a class",
        )
    own = tuple(backbone.recipe.get("classes") or ())
    width = backbone.recipe.get("model_args", {}).get("num_classes")
    if not own and width == IMAGENET_CLASSES:
        own = imagenet_wnids()
    missing = [name for name in observed.classes if name not in own]
    if missing:
        raise ConfigError(
            f"the classifier of {observed.name} has {f'{len(own)} classes' if own else 'classes without names'}, "
            f"and not {', '.join(missing[:5])} of the data",
            "use --readout probe, which fits a classifier on the data's own classes",
        )
    return torch.tensor([own.index(name) for name in observed.classes])


@torch.no_grad()
def _fit_probe(
    observed: Observed,
    backbone: Backbone,
    images: Labelled,
    fit: Labelled,
    pooling: Pooling,
    *,
    batch_size: int,
) -> tuple[nn.Linear, Tensor]:
    """A classifier of the classes fitted on, and for every class of the data its output, (K,) int64.

    Logistic regression (C = 1) on standardised features, written as one linear layer on the features themselves.
    """
    seen = fit.labels.unique()
    unseen = sorted(
        {observed.classes[label] for label in images.labels.tolist()} - {observed.classes[i] for i in seen}
    )
    if len(seen) < 2 or unseen:
        raise DataError(
            f"{len(fit.labels)} images are too few to fit a classifier on: "
            + (f"none is of {', '.join(unseen[:5])}" if unseen else "all are of one class"),
            f"use a larger --num-fit-images, such as {max(128, 10 * len(observed.classes))}, or more images a class",
        )
    parts = [
        backbone.pooled(pixels.to(backbone.mean.device), pooling).double().cpu()
        for pixels in fit.pixels.split(batch_size)
    ]
    features = torch.cat(parts)
    if not features.isfinite().all():
        raise NumericsError(f"the features of {observed.name} are not finite", "the weights may be damaged")
    mean, std = features.mean(0), features.std(0, correction=0)
    std = torch.where(std > 1e-6 * std.max(), std, 1.0)
    model = LogisticRegression(max_iter=2000)
    model.fit(((features - mean) / std).numpy(), fit.labels.numpy())
    weight, bias = (torch.from_numpy(part) for part in (model.coef_, model.intercept_))
    if len(weight) == 1:  # of two classes, scikit-learn keeps the second alone
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    dtype = torch.promote_types(backbone.dtype, torch.float32)
    # Without the usual start, which would draw from the global random numbers.
    probe = skip_init(nn.Linear, len(mean), len(seen), device=backbone.mean.device, dtype=dtype)
    probe.weight.copy_(weight / std)
    probe.bias.copy_(bias - (weight * (mean / std)).sum(1))
    places = torch.full((len(observed.classes),), -1)
    places[seen] = torch.arange(len(seen))
    return probe.requires_grad_(False), places


def _probed(backbone: Backbone, images: Tensor, *, probe: nn.Linear, pooling: Pooling) -> Tensor:
    return F.linear(backbone.pooled(images, pooling).to(probe.weight.dtype), probe.weight, probe.bias)
