"""Logistic regression of frozen features: one convex problem solved to its optimum, one number to choose.

Unlike the linear probe trained by SGD there is no learning rate, schedule or batch order to get wrong: the optimum
is unique, and only the inverse regularisation C is chosen, on a part of train. Test is read once, at the end.
Objective: C * (sum of cross-entropies) + |weight|^2 / 2 with free biases, as scikit-learn's LogisticRegression, on
features standardised with the mean and variance of the images fitted.
Source: Radford et al. 2021 (CLIP), appendix A.3, for L-BFGS and a sweep of C on a validation split; Guo et al. 2017
for the calibration error.
"""

import logging
from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from fdkit.config import Config
from fdkit.errors import ConfigError, DataError
from fdkit.evaluation._draws import folds, validation_split
from fdkit.evaluation._inputs import comparable
from fdkit.evaluation._metrics import (
    Metrics,
    accuracies,
    brier_score,
    expected_calibration_error,
    hits_to_text,
    negative_log_likelihood,
    rank_of_label,
)
from fdkit.evaluation._softmax_regression import Fit, fit_path
from fdkit.evaluation._statistics import bootstrap_interval
from fdkit.evaluation.features import Features

log = logging.getLogger("fdkit")

VALIDATION_RATIO = 0.1


class LogisticConfig(Config):
    """The regularisations to try, how one is chosen, and how near the optimum is near enough."""

    c: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0), min_length=1
    )
    """Inverse regularisations to try, as scikit-learn's C: they multiply the sum of losses, so more images regularise
    less. A single one is used as it is."""
    standardize: bool = True
    """Whether each channel is shifted and scaled to mean 0 and variance 1 over the images fitted."""
    validation_ratio: float = Field(VALIDATION_RATIO, gt=0, lt=1)
    """Fraction of the training images of each class on which C is chosen."""
    cross_validation: int | None = Field(None, ge=2)
    """Number of stratified folds of train on which C is chosen; none means one validation split instead."""
    tolerance: float = Field(1e-6, gt=0)
    """Largest component of the gradient of objective / (C * images) at which the solver may stop."""
    max_iterations: int = Field(1000, ge=1)
    """Most steps of L-BFGS a fit may take; stopping there is said."""
    seed: int = Field(0, ge=0)
    """Seed of the validation split or folds, and of the interval."""

    @model_validator(mode="after")
    def _has_one_way_to_choose(self) -> Self:
        if self.cross_validation is not None and self.validation_ratio != VALIDATION_RATIO:
            raise ConfigError(
                f"validation_ratio is {self.validation_ratio:g}, but cross_validation {self.cross_validation} "
                "chooses on folds",
                "give one of --validation-ratio and --cross-validation",
            )
        return self


class Choice(NamedTuple):
    """The regularisation chosen without looking at test."""

    c: float
    """Inverse regularisation."""
    candidates: list[dict[str, Any]]
    """Of each C in the order asked: c, validation_top1, validation_loss, iterations and converged (of its fits: the
    most, and all). Empty if there was nothing to choose."""
    num_validation: int
    """Images they were compared on."""


def evaluate(train: Features, test: Features, config: LogisticConfig) -> Metrics:
    """Accuracy and calibration on test of the C chosen on a part of train and fitted to all of it.

    Runs on the device of train.values, in float64. Returns {"evaluator", "top1", "top5" (of 5 classes or more),
    "interval" (95 % of top1 over test images), "ece", "nll", "brier", "c", "validation_top1" and "validation_loss"
    (unless a single C was given), "converged", "gradient", "iterations", "candidates", "protocol", "hits" (which test
    images were right, see `hits_to_text`), "train", "test"}.
    Logs a warning if the solver did not converge or the choice stands at the edge of those tried.
    Raises what `comparable` raises, DataError if no class has two images to compare on.
    """
    train, test = comparable(train, test)
    choice = choose(train, config)
    fit = _fits(train.values, train.labels, [choice.c], len(train.classes), config)[0]
    if not fit.converged:
        log.warning(
            "logistic regression with C %g stopped after %d steps at a gradient of %.1e (tolerance %.1e): "
            "raise --max-iterations or --tolerance",
            *(choice.c, fit.iterations, fit.gradient, config.tolerance),
        )
    chosen = next((row for row in choice.candidates if row["c"] == choice.c), {})
    protocol = config.model_dump(mode="json", include=set(LogisticConfig.model_fields) - {"c"})
    return {
        "evaluator": "logistic",
        **_measured(fit.scores(test.values), test.labels, config.seed),
        "c": choice.c,
        **{key: chosen[key] for key in ("validation_top1", "validation_loss") if key in chosen},
        "converged": fit.converged,
        "gradient": fit.gradient,
        "iterations": fit.iterations,
        "candidates": choice.candidates,
        "protocol": protocol | {"num_fit": len(train.labels), "num_validation": choice.num_validation},
        "train": train.info,
        "test": test.info,
    }


def choose(train: Features, config: LogisticConfig) -> Choice:
    """The best C on held-out parts of train: highest accuracy, then lowest loss, then strongest regularisation.

    With folds, every image held out once counts once. Raises DataError if no class has two images.
    """
    if len(config.c) == 1:
        return Choice(config.c[0], [], 0)
    totals, num_validation = torch.zeros(len(config.c), 2, dtype=torch.float64), 0
    fits: list[list[Fit]] = []
    for fit_rows, held_rows in _parts(train.labels, config):
        path = _fits(train.values[fit_rows], train.labels[fit_rows], config.c, len(train.classes), config)
        held, labels = train.values[held_rows], train.labels[held_rows]
        totals += torch.stack([_hits_and_loss(fit.scores(held), labels) for fit in path])
        num_validation += len(labels)
        fits.append(path)
    means = (totals / num_validation).tolist()
    table = [
        {
            "c": c,
            "validation_top1": top1,
            "validation_loss": loss,
            "iterations": max(path[k].iterations for path in fits),
            "converged": all(path[k].converged for path in fits),
        }
        for k, (c, (top1, loss)) in enumerate(zip(config.c, means, strict=True))
    ]
    best = min(table, key=lambda row: (-row["validation_top1"], row["validation_loss"], row["c"]))
    if len(config.c) > 2 and best["c"] in (min(config.c), max(config.c)):
        log.warning("the best C %g is the edge of those tried: a wider range may do better", best["c"])
    return Choice(best["c"], table, num_validation)


def _hits_and_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """How many of the scores (N, C) are right, and the sum of their cross-entropies; (2,) float64 on the CPU."""
    hits = (rank_of_label(scores, labels) == 0).sum()
    return torch.tensor(
        [float(hits), float(F.cross_entropy(scores, labels, reduction="sum"))], dtype=torch.float64
    )


def _parts(labels: Tensor, config: LogisticConfig) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows to fit and rows held out, once or once a fold."""
    if config.cross_validation is not None:
        fold = folds(labels, config.cross_validation, seed=config.seed)
        for number in range(config.cross_validation):
            yield (fold != number).nonzero()[:, 0], (fold == number).nonzero()[:, 0]
        return
    fit_rows, held_rows = validation_split(labels, config.validation_ratio, seed=config.seed)
    if len(held_rows) == 0:
        raise DataError(
            f"no class has two images among the {len(labels)} training images: nothing to compare on",
            "add labelled images, or give a single --c",
        )
    yield fit_rows, held_rows


def _fits(
    values: Tensor,
    labels: Tensor,
    cs: tuple[float, ...] | list[float],
    num_classes: int,
    config: LogisticConfig,
) -> list[Fit]:
    return fit_path(
        values,
        labels,
        num_classes,
        cs,
        standardize=config.standardize,
        tolerance=config.tolerance,
        max_iterations=config.max_iterations,
    )


def _measured(scores: Tensor, labels: Tensor, seed: int) -> Metrics:
    """Accuracy, its interval, and how far the probabilities can be trusted; scores: (N, C) logits."""
    ranks, probabilities = rank_of_label(scores, labels), scores.softmax(dim=1)
    return {
        **accuracies(ranks, scores.shape[1]),
        "interval": list(bootstrap_interval(ranks == 0, seed=seed)),
        "ece": expected_calibration_error(probabilities, labels),
        "nll": negative_log_likelihood(scores, labels),
        "brier": brier_score(probabilities, labels),
        "hits": hits_to_text(ranks == 0),
    }
