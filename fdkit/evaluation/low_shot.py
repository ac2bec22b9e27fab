"""Accuracy from few labels: a frozen network, and only some labelled images of each class to learn from.

A subset is a fraction of the images of every class (10%), or so many of every class (5-shot). Each is drawn several
times with different seeds; a number is the mean over draws, with its spread, and all of test is the judge of each.
Draws of one seed lie within each other, so subsets differ by the images added and not by luck.
Nothing is chosen by the result: the classifier's settings are fixed by the configuration, since images to choose on
would be labels too. Source: Assran et al. 2022 (MSN) for several draws of one to few images a class on frozen features.
"""

import logging
from collections.abc import Callable
from statistics import fmean, stdev
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fdkit.config import Config
from fdkit.errors import ConfigError, DataError
from fdkit.evaluation import knn, prototype
from fdkit.evaluation._draws import fingerprint, places
from fdkit.evaluation._inputs import comparable
from fdkit.evaluation._metrics import Metrics, accuracies, rank_of_label
from fdkit.evaluation._softmax_regression import fit_path
from fdkit.evaluation._statistics import mean_interval
from fdkit.evaluation.features import Features

log = logging.getLogger("fdkit")

READ_BY = {"logistic": ("c", "tolerance"), "prototype": ("metric",), "knn": ("k", "temperature")}


class LowShotConfig(Config):
    """The subsets, how often each is drawn, and what learns from them."""

    fraction: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (0.01, 0.1)
    """Fractions of the images of each class, rounded to whole images (half to even), at least one; may be empty."""
    shots: tuple[Annotated[int, Field(ge=1)], ...] = (1, 2, 5, 10)
    """Numbers of images of each class, which every class must have; may be empty."""
    repeats: int = Field(5, ge=1)
    """Draws of each subset, with seeds seed, seed + 1 and so on."""
    classifier: Literal["logistic", "prototype", "knn"] = "logistic"
    """What learns from a subset: logistic regression, the nearest class mean, or a vote of neighbours."""
    c: float = Field(1.0, gt=0)
    """Inverse regularisation of the logistic regression on features standardised over the subset, for every subset the
    same and not chosen; 1 is scikit-learn's default."""
    tolerance: float = Field(1e-6, gt=0)
    """Gradient at which the logistic regression may stop, as of the evaluator logistic."""
    metric: prototype.Metric = "cosine"
    """What the nearest class mean is near by, as of the evaluator prototype."""
    k: int = Field(1, ge=1)
    """Voting neighbours; at most the images of the smallest subset."""
    temperature: float = Field(0.07, gt=0)
    """Divides the cosine similarity of voting neighbours before the exponential."""
    seed: int = Field(0, ge=0)
    """Seed of the first draw."""

    @model_validator(mode="after")
    def _sets_what_is_read(self) -> Self:
        for classifier, names in READ_BY.items():
            unread = [
                name for name in names if getattr(self, name) != LowShotConfig.model_fields[name].default
            ]
            if classifier != self.classifier and unread:
                raise ConfigError(
                    f"{unread[0]} is {getattr(self, unread[0])}, but the classifier {self.classifier} does not read it",
                    f"use --classifier {classifier}, or leave --{unread[0]} out",
                )
        if not self.fraction and not self.shots:
            raise ConfigError(
                "fraction and shots are both empty, so there is nothing to draw", "give one of them"
            )
        return self


def evaluate(train: Features, test: Features, config: LowShotConfig) -> Metrics:
    """Accuracy on test from every subset of train, averaged over draws; on the device of train.values.

    Returns {"evaluator", "classifier", the first row without its runs, "results": [a row a fraction, then a number of
    shots: "subset" (such as "10%" or "5-shot"), "num_images", "top1" and "top5" (means; top5 of 5 classes or more),
    "interval" (95 % Student-t of top1 over draws; None of a single draw), "std", "min", "max" (of top1), "runs":
    [{"seed", "fingerprint", "top1", "top5"}]], "protocol", "train", "test"}. A fingerprint is the SHA-256 of the
    drawn rows of train, ascending, as int64.
    Raises what `comparable` raises, DataError if a class has fewer images than shots, ConfigError if k exceeds the
    images of a subset.
    """
    train, test = comparable(train, test)
    quotas = {
        f"{100 * fraction:g}%": fraction_of_each(train.labels, fraction) for fraction in config.fraction
    }
    quotas |= {f"{shots}-shot": shots_of_each(train, shots) for shots in config.shots}
    learn = _classifier(config)
    results = []
    for subset, images in quotas.items():
        runs = []
        for seed in range(config.seed, config.seed + config.repeats):
            rows = draw(train.labels, images, seed)
            part = train._replace(values=train.values[rows], labels=train.labels[rows])
            runs.append({"seed": seed, "fingerprint": fingerprint(rows), **learn(part, test)})
        results.append({"subset": subset, "num_images": int(images.sum()), **_summary(runs), "runs": runs})
    headline = {key: value for key, value in results[0].items() if key != "runs"}
    names = ("repeats", "seed", *READ_BY[config.classifier])
    return {
        "evaluator": "low-shot",
        "classifier": config.classifier,
        **headline,
        "results": results,
        "protocol": {name: getattr(config, name) for name in names},
        "train": train.info,
        "test": test.info,
    }


def fraction_of_each(labels: Tensor, fraction: float) -> Tensor:
    """How many images of each class a fraction in (0, 1] is, (C,) int64: at least one of a class that has any."""
    counts = torch.bincount(labels)
    return (counts * fraction).round().long().clamp_min(1).minimum(counts)


def shots_of_each(train: Features, shots: int) -> Tensor:
    """`shots` for each class that has images, (C,) int64. Raises DataError if such a class has fewer."""
    counts = torch.bincount(train.labels)
    short = ((counts > 0) & (counts < shots)).nonzero()[:, 0]
    if len(short):
        smallest = int(short[counts[short].argmin()])
        fewest = int(counts[smallest])
        raise DataError(
            f"class {train.classes[smallest]} has {fewest} training images, fewer than the {shots} a class asked for",
            f"ask for --shots {fewest} or less",
        )
    return shots * (counts > 0)


def draw(labels: Tensor, quota: Tensor, seed: int) -> Tensor:
    """Rows of a subset with quota[c] images of each class c, ascending; a larger quota holds the smaller one's rows."""
    return (places(labels, seed) < quota[labels]).nonzero()[:, 0]


def _classifier(config: LowShotConfig) -> Callable[[Features, Features], dict[str, Any]]:
    """What learns from a subset and returns its accuracies on test."""
    if config.classifier == "logistic":
        return lambda train, test: _logistic(train, test, config)
    if config.classifier == "prototype":
        return lambda train, test: accuracies(prototype.ranks(train, test, config.metric), len(train.classes))
    return lambda train, test: _knn(train, test, config)


def _logistic(train: Features, test: Features, config: LowShotConfig) -> dict[str, Any]:
    fit = fit_path(train.values, train.labels, len(train.classes), [config.c], tolerance=config.tolerance)[0]
    if not fit.converged:
        log.warning(
            "logistic regression on %d images stopped at a gradient of %.1e (tolerance %.1e)",
            *(len(train.labels), fit.gradient, config.tolerance),
        )
    ranks = rank_of_label(fit.scores(test.values), test.labels)
    return {**accuracies(ranks, len(train.classes)), "converged": fit.converged}


def _knn(train: Features, test: Features, config: LowShotConfig) -> dict[str, Any]:
    settings = knn.KNNConfig(k=(config.k,), temperature=(config.temperature,))
    found = knn.evaluate(train, test, settings)
    return {key: found[key] for key in ("top1", "top5") if key in found}


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean accuracies over draws and the spread of top1."""
    top1 = [run["top1"] for run in runs]
    interval = mean_interval(top1)
    return {
        **{key: fmean(run[key] for run in runs) for key in ("top1", "top5") if key in runs[0]},
        "interval": None if interval is None else list(interval),
        "std": stdev(top1) if len(top1) > 1 else None,
        "min": min(top1),
        "max": max(top1),
    }
