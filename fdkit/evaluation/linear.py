"""Linear probe of frozen features: multinomial logistic regression, all candidates trained at the same time.

A candidate is a learning rate and a weight decay. The K candidates are K heads of one (K * C, D) weight: the
gradient of the sum of their losses is each head's own gradient, so training them together equals training them
apart, and every batch is read once. The candidate is chosen on a validation split carved out of train; test is
read once, at the end, by the chosen one alone.
Recipe: SGD with momentum, cosine learning rate to zero, no augmentation (features are given), no bias decay.
Source: Chen et al. 2021 (MoCo v3) for SGD and its schedule; He et al. 2022 (MAE), appendix A.1, for features
standardised without scale and offset; Oquab et al. 2023 (DINOv2), appendix B.3, for a grid of heads on one pass.
"""

import logging
import math
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from fdkit.config import Config
from fdkit.errors import DataError, NumericsError
from fdkit.evaluation._metrics import Metrics, accuracies, rank_of_label
from fdkit.evaluation.features import Features, paired

log = logging.getLogger("fdkit")

# Smallest variance a channel is divided by, as in MAE's probe: a constant channel stays near zero.
VARIANCE_FLOOR = 1e-6
SCORED_AT_ONCE = 4096


class LinearConfig(Config):
    """The candidates of a linear probe and how they are trained and chosen."""

    lr: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0), min_length=1
    )
    """Peak learning rates to try, used as they are whatever the batch size."""
    weight_decay: tuple[Annotated[float, Field(ge=0)], ...] = Field((0.0,), min_length=1)
    """Weight decays to try with each learning rate; biases are not decayed."""
    epochs: int = Field(100, ge=1)
    """Passes over the training features."""
    train_batch_size: int = Field(256, ge=1)
    """Features a step; the last batch of an epoch may be smaller."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of SGD."""
    standardize: bool = True
    """Whether each channel is shifted and scaled to mean 0 and variance 1 over the training features."""
    validation_ratio: float = Field(0.1, gt=0, lt=1)
    """Fraction of the training images of each class on which the candidate is chosen."""
    refit: bool = True
    """Whether the chosen candidate is trained again on all training images before it meets test."""
    seed: int = Field(0, ge=0)
    """Seed of the validation split and of the order of batches."""


class Candidate(NamedTuple):
    """One setting of the sweep."""

    lr: float
    weight_decay: float


class Probe(NamedTuple):
    """K linear classifiers on features as they were extracted; standardisation is folded into them."""

    weight: Tensor
    """(K, C, D)."""
    bias: Tensor
    """(K, C)."""


class Choice(NamedTuple):
    """The probe chosen without looking at test, and how it was chosen."""

    probe: Probe
    """Of a single classifier, K = 1."""
    candidate: Candidate
    """Its setting."""
    candidates: list[dict[str, Any]]
    """Of each candidate: lr, weight_decay, validation_top1 and validation_loss (both None if it diverged)."""
    num_fit: int
    """Images the candidates were trained on."""
    num_validation: int
    """Images they were compared on."""


def evaluate(train: Features, test: Features, config: LinearConfig) -> Metrics:
    """Accuracy on test of the probe chosen on a part of train; runs on the device of train.values.

    Returns {"evaluator", "top1", "top5" (of 5 classes or more), "lr", "weight_decay", "validation_top1",
    "validation_loss", "candidates", "protocol", "train", "test"}. Logs a warning if the choice stands at the edge
    of the learning rates tried. Raises DataError if no class has two images or test has classes that train lacks,
    NumericsError if all candidates diverge.
    """
    train, test = paired(train, test)
    choice = choose(train, config)
    ranks = rank_of_label(_scores(choice.probe, test.values)[0], test.labels)
    chosen = next(
        row for row in choice.candidates if Candidate(row["lr"], row["weight_decay"]) == choice.candidate
    )
    protocol = config.model_dump(mode="json", include=set(LinearConfig.model_fields) - {"lr", "weight_decay"})
    return {
        "evaluator": "linear",
        **accuracies(ranks, len(train.classes)),
        **chosen,
        "candidates": choice.candidates,
        "protocol": protocol | {"num_fit": choice.num_fit, "num_validation": choice.num_validation},
        "train": train.info,
        "test": test.info,
    }


def choose(train: Features, config: LinearConfig) -> Choice:
    """The best candidate on a stratified validation split of train: highest accuracy, then lowest loss.

    A candidate whose weights are not finite cannot be chosen. Raises DataError if no class has two images,
    NumericsError if every candidate diverged.
    """
    candidates = [Candidate(lr, decay) for decay in config.weight_decay for lr in config.lr]
    num_classes = len(train.classes)
    fit_rows, validation_rows = validation_split(train.labels, config.validation_ratio, seed=config.seed)
    if len(validation_rows) == 0:
        raise DataError(
            f"no class has two images among the {len(train.labels)} training images: nothing to compare on",
            "add labelled images",
        )
    fitted = fit(
        train.values[fit_rows], train.labels[fit_rows], num_classes, candidates=candidates, config=config
    )
    table = _compare(fitted, train.values[validation_rows], train.labels[validation_rows], candidates)
    alive = [k for k, row in enumerate(table) if row["validation_loss"] is not None]
    if not alive:
        lrs = ", ".join(f"{lr:g}" for lr in config.lr)
        raise NumericsError(
            f"the linear probe diverged at every learning rate tried: {lrs}", "add smaller ones"
        )
    best = min(alive, key=lambda k: (-table[k]["validation_top1"], table[k]["validation_loss"]))
    _warn_at_edge(candidates[best].lr, config.lr)
    if config.refit:
        probe = fit(train.values, train.labels, num_classes, candidates=[candidates[best]], config=config)
        if not probe.weight.isfinite().all():
            raise NumericsError(f"the chosen {candidates[best]} diverged on all of train", "try --no-refit")
    else:
        probe = Probe(fitted.weight[best : best + 1], fitted.bias[best : best + 1])
    return Choice(probe, candidates[best], table, len(fit_rows), len(validation_rows))


def fit(
    values: Tensor, labels: Tensor, num_classes: int, *, candidates: list[Candidate], config: LinearConfig
) -> Probe:
    """K classifiers trained on features (N, D) and labels (N,), one a candidate, each as if it were alone.

    They start from zero: the loss is convex, so a random start would only add noise. Of config, the training
    fields are read; the order of batches depends on config.seed and N alone.
    """
    mean, scale = _standardizer(values) if config.standardize else (values.new_zeros(()), values.new_ones(()))
    inputs = F.pad((values - mean) * scale, (0, 1), value=1.0)  # (N, D + 1): the last column carries the bias
    weight = inputs.new_zeros(len(candidates), num_classes, inputs.shape[1])
    velocity = torch.zeros_like(weight)
    peak_lr = inputs.new_tensor([candidate.lr for candidate in candidates])[:, None, None]
    decay = inputs.new_tensor([candidate.weight_decay for candidate in candidates])[:, None, None]
    has_decay = any(candidate.weight_decay > 0 for candidate in candidates)
    order = torch.Generator().manual_seed(config.seed)
    steps_per_epoch = math.ceil(len(labels) / config.train_batch_size)
    for epoch in range(config.epochs):
        shuffled = torch.randperm(len(labels), generator=order).to(labels.device)
        for step, rows in enumerate(shuffled.split(config.train_batch_size), epoch * steps_per_epoch):
            gradient = _gradient(weight, inputs[rows], labels[rows])
            if has_decay:
                gradient[..., :-1] += decay * weight[..., :-1]
            velocity.mul_(config.momentum).add_(gradient)
            progress = step / (config.epochs * steps_per_epoch)
            weight.addcmul_(velocity, peak_lr, value=-0.5 * (1 + math.cos(math.pi * progress)))
    folded = weight[..., :-1] * scale
    return Probe(folded, weight[..., -1] - (folded * mean).sum(dim=-1))


def validation_split(labels: Tensor, validation_ratio: float, *, seed: int) -> tuple[Tensor, Tensor]:
    """Rows to fit and rows to compare on, both ascending; round(validation_ratio * images) of each class compare.

    A class of two or more images gives at least one row to each side; a class of one image is only fitted.
    labels: (N,) int64. The split depends on the labels and the seed alone.
    """
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).to(labels.device)
    by_class = shuffled[labels[shuffled].sort(stable=True).indices]
    counts = torch.bincount(labels)
    first = counts.cumsum(0) - counts
    place = torch.arange(len(labels), device=labels.device) - first[labels[by_class]]
    quota = (counts * validation_ratio).round().long().clamp_min(1).minimum(counts - 1)
    is_validation = place < quota[labels[by_class]]
    return by_class[~is_validation].sort().values, by_class[is_validation].sort().values


def _standardizer(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and 1 / standard deviation of each channel, both (D,)."""
    variance, mean = torch.var_mean(values, dim=0, correction=0)
    return mean, (variance + VARIANCE_FLOOR).rsqrt()


def _gradient(weight: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
    """Gradient of each head's mean cross-entropy, (K, C, D); in closed form, (softmax - one-hot) inputs / B.

    weight: (K, C, D); inputs: (B, D); labels: (B,).
    """
    heads, num_classes, width = weight.shape
    scores = (inputs @ weight.view(-1, width).T).view(-1, heads, num_classes)
    error = scores.softmax(dim=-1)
    error.scatter_add_(
        2, labels[:, None, None].expand(-1, heads, 1), error.new_full((len(labels), heads, 1), -1.0)
    )
    return (error.view(len(labels), -1).T @ inputs).div_(len(labels)).view_as(weight)


def _scores(probe: Probe, values: Tensor) -> Tensor:
    """Scores of every classifier for features (N, D): (K, N, C)."""
    weight = probe.weight.flatten(0, 1)
    scores = torch.cat([block @ weight.T for block in values.split(SCORED_AT_ONCE)])
    return (scores.view(len(values), *probe.bias.shape) + probe.bias).transpose(0, 1)


def _compare(
    probe: Probe, values: Tensor, labels: Tensor, candidates: list[Candidate]
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for candidate, scores in zip(candidates, _scores(probe, values), strict=True):
        loss = float(F.cross_entropy(scores, labels))
        top1 = int((rank_of_label(scores, labels) == 0).sum()) / len(labels)
        diverged = not math.isfinite(loss)
        rows.append(
            candidate._asdict()
            | {"validation_top1": None if diverged else top1, "validation_loss": None if diverged else loss}
        )
    return rows


def _warn_at_edge(lr: float, tried: tuple[float, ...]) -> None:
    if len(tried) > 2 and lr in (min(tried), max(tried)):
        log.warning("the best learning rate %g is the edge of those tried: a wider range may do better", lr)
