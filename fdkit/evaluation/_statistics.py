"""How far a number can be trusted: intervals over test images by bootstrap, and over seeds by Student's t.

An interval over test images answers for another draw of test images and nothing else: the model, the training
images and the seed stay as they are. An interval over seeds answers for another seed and keeps the test images.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fdkit.errors import ConfigError, DataError, NumericsError

# Images drawn at a time, over as many resamples as fit: their indices and values take 12 MB.
DRAWN_AT_ONCE = 1 << 20


class PairedDifference(NamedTuple):
    """How much better a is than b on the same test images."""

    difference: float
    """Mean of a minus mean of b."""
    low: float
    """Lower end of the interval of the difference."""
    high: float
    """Upper end."""
    other_sign: float
    """Share of resamples in which the model that is ahead is not: the difference is 0 or of the other sign. 1 if
    there is no difference."""


def bootstrap_interval(
    hits: Tensor, *, num_resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the mean of hits over test images, (low, high).

    hits: (N,), one bool or number an image, on any device. The N images are drawn N times with replacement,
    `num_resamples` times over. Images that are all right (or all wrong) give an interval of no width: the
    bootstrap cannot know of what it has not seen.
    Raises DataError without images, NumericsError if a value is not finite, ConfigError for a level outside (0, 1).
    Source: Efron and Tibshirani 1993 (An introduction to the bootstrap), section 13.3.
    """
    means = _resampled_means(_checked(hits), num_resamples, seed)
    return _percentiles(means, level)


def paired_difference(
    hits_a: Tensor, hits_b: Tensor, *, num_resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> PairedDifference:
    """The difference of two means over the same test images, which are drawn together.

    What is easy for one model is mostly easy for the other; drawn together that cancels, so the interval is
    narrower than two separate intervals suggest.
    hits_a, hits_b: (N,), one bool or number an image, in the same order of images.
    Raises ConfigError if their lengths differ, and what `bootstrap_interval` raises.
    """
    if len(hits_a) != len(hits_b):
        raise ConfigError(
            f"the results compared are of {len(hits_a)} and {len(hits_b)} test images",
            "evaluate both models on the same images",
        )
    gaps = _checked(hits_a) - _checked(hits_b)
    difference = float(gaps.mean())
    means = _resampled_means(gaps, num_resamples, seed)
    low, high = _percentiles(means, level)
    turned = means * math.copysign(1.0, difference) <= 0 if difference else torch.ones_like(means)
    return PairedDifference(difference, low, high, float(turned.double().mean()))


def mean_interval(values: Sequence[float], *, level: float = 0.95) -> tuple[float, float] | None:
    """Student's t interval of the mean of results that differ in their seed alone, (low, high).

    mean ± t((1 + level) / 2, n - 1) s / sqrt(n), where s is the sample standard deviation. None for a single
    value, which says nothing of the spread. Raises DataError without values, NumericsError if one is not finite,
    ConfigError for a level outside (0, 1).
    """
    sample = _checked(torch.tensor(values, dtype=torch.float64))
    _check_level(level)
    if len(sample) == 1:
        return None
    mean, error = float(sample.mean()), float(sample.std(correction=1)) / math.sqrt(len(sample))
    from scipy import stats  # type: ignore[import-untyped]  # half a second, for those who have several seeds

    half = float(stats.t.ppf((1 + level) / 2, len(sample) - 1)) * error
    return mean - half, mean + half


def _resampled_means(values: Tensor, num_resamples: int, seed: int) -> Tensor:
    """Means of `num_resamples` draws of N from values (N,) with replacement; they depend on N, values and seed."""
    sample = values.numpy()
    means = [sample.take(rows).mean(axis=1) for rows in _draws(len(sample), num_resamples, seed)]
    return torch.from_numpy(np.concatenate(means))


def _draws(count: int, num_resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Rows in [0, count), (some, count) int32 at a time; `num_resamples` times count in all, in any blocks the same."""
    if num_resamples < 1:
        raise ConfigError(f"{num_resamples} resamples are too few for an interval", "ask for 1000 or more")
    random = np.random.default_rng(seed)  # about ten times as fast as torch's generator
    together = max(1, DRAWN_AT_ONCE // count)
    for start in range(0, num_resamples, together):
        size = (min(together, num_resamples - start), count)
        yield random.integers(count, size=size, dtype=np.int32)


def _percentiles(means: Tensor, level: float) -> tuple[float, float]:
    _check_level(level)
    tail = (1 - level) / 2
    low, high = means.quantile(means.new_tensor([tail, 1 - tail])).tolist()
    return low, high


def _checked(values: Tensor) -> Tensor:
    values = values.detach().double().cpu()
    if len(values) == 0:
        raise DataError("an interval needs at least one result, and there is none")
    wrong = int((~values.isfinite()).sum())
    if wrong:
        raise NumericsError(f"{wrong} of {len(values)} results are not finite: they have no interval")
    return values


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ConfigError(f"the level of an interval is {level:g}, and it must lie between 0 and 1")
