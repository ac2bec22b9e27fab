import math

import numpy as np
import pytest
import torch
from scipy import stats

from fdkit.errors import ConfigError, DataError, NumericsError
from fdkit.evaluation import _statistics
from fdkit.evaluation._statistics import bootstrap_interval, mean_interval, paired_difference


def hits(count: int = 301, accuracy: float = 0.8, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed)) < accuracy


def precisions(count: int = 157, seed: int = 0) -> torch.Tensor:
    """Skewed numbers in [0, 1], as average precisions are."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed)) ** 3


@pytest.mark.parametrize("level", [0.5, 0.95])
@pytest.mark.parametrize("values", [hits(), precisions()], ids=["hits", "precisions"])
def test_equals_scipys_percentile_bootstrap(values, level):
    sample = values.double().numpy()
    oracle = stats.bootstrap(
        (sample,), np.mean, n_resamples=20_000, confidence_level=level, method="percentile", rng=1
    ).confidence_interval
    found = bootstrap_interval(values, num_resamples=20_000, level=level)
    error = sample.std() / math.sqrt(len(sample))
    assert found == pytest.approx(tuple(oracle), abs=0.05 * error)  # 20,000 resamples leave about 0.02 of it


def test_of_hits_it_is_the_interval_of_a_binomial_count():
    # A resample of 0/1 values is a binomial count of n draws with the observed share of hits.
    values = hits(400, 0.7)
    count = stats.binom(400, float(values.double().mean()))
    low, high = bootstrap_interval(values, num_resamples=50_000)
    assert (low, high) == pytest.approx((count.ppf(0.025) / 400, count.ppf(0.975) / 400), abs=1.01 / 400)
    mean = float(values.double().mean())
    normal = 1.96 * math.sqrt(mean * (1 - mean) / 400)
    assert (mean - low, high - mean) == pytest.approx((normal, normal), rel=0.06)


def test_it_covers_the_truth_about_as_often_as_it_says():
    covered = 0
    for seed in range(200):
        low, high = bootstrap_interval(hits(200, 0.7, seed), num_resamples=400, level=0.9, seed=seed)
        covered += low <= 0.7 <= high
    assert 160 <= covered <= 195  # 180 expected; the percentile interval is a little narrow


def test_draws_are_repeatable_and_the_same_in_any_chunks(monkeypatch):
    values = precisions()
    whole = bootstrap_interval(values, num_resamples=500)
    assert bootstrap_interval(values, num_resamples=500) == whole
    assert bootstrap_interval(values, num_resamples=500, seed=1) != whole
    for budget in (1, 1000, 7 * 157):
        monkeypatch.setattr(_statistics, "DRAWN_AT_ONCE", budget)
        assert bootstrap_interval(values, num_resamples=500) == whole


def test_the_global_generator_is_left_alone():
    state = torch.get_rng_state()
    bootstrap_interval(hits())
    assert torch.equal(torch.get_rng_state(), state)


def test_memory_does_not_grow_with_the_resamples(monkeypatch):
    monkeypatch.setattr(_statistics, "DRAWN_AT_ONCE", 10_000)
    sizes = [rows.size for rows in _statistics._draws(999, 333, 0)]
    assert max(sizes) <= 10_000
    assert sum(sizes) == 999 * 333


def test_images_all_right_have_no_width_and_one_image_is_itself():
    assert bootstrap_interval(torch.ones(50, dtype=torch.bool)) == (1.0, 1.0)
    assert bootstrap_interval(torch.tensor([0.25])) == (0.25, 0.25)


def test_paired_difference_draws_the_same_images_for_both():
    a, b = hits(301, 0.8), hits(301, 0.8)
    b[:20] = False  # b is a with some images wrong
    b &= a
    found = paired_difference(a, b, num_resamples=20_000)
    gaps = (a.double() - b.double()).numpy()
    oracle = stats.bootstrap(
        (a.double().numpy(), b.double().numpy()),
        lambda x, y, axis: x.mean(axis) - y.mean(axis),
        paired=True,
        n_resamples=20_000,
        method="percentile",
        rng=1,
    ).confidence_interval
    assert found.difference == pytest.approx(gaps.mean())
    assert (found.low, found.high) == pytest.approx(tuple(oracle), abs=1.01 / 301)  # means lie on a grid
    separate = [bootstrap_interval(part) for part in (a, b)]
    widths = [high - low for low, high in separate]
    assert found.high - found.low < 0.6 * math.hypot(*widths)  # drawn apart, they would vary more
    assert found.low > 0
    assert found.other_sign == 0.0


def test_share_of_the_other_sign_is_that_of_a_naive_loop():
    a, b = hits(80, 0.75, seed=3), hits(80, 0.7, seed=4)
    found = paired_difference(a, b, num_resamples=300, seed=5)
    gaps, turned = (a.double() - b.double()).tolist(), 0
    draws = np.concatenate(list(_statistics._draws(80, 300, 5)))
    for rows in draws:
        mean = sum(gaps[row] for row in rows) / 80
        turned += (mean <= 0) if found.difference > 0 else (mean >= 0)
    assert found.difference != 0
    assert found.other_sign == turned / 300
    assert 0 < found.other_sign < 0.5
    back = paired_difference(b, a, num_resamples=300, seed=5)
    assert back == (
        -found.difference,
        pytest.approx(-found.high),
        pytest.approx(-found.low),
        found.other_sign,
    )


def test_a_model_does_not_differ_from_itself():
    assert paired_difference(hits(), hits()) == (0.0, 0.0, 0.0, 1.0)


def test_interval_over_seeds_is_students():
    values = [0.71, 0.74, 0.70, 0.78]
    expected = stats.t.interval(0.9, 3, loc=np.mean(values), scale=stats.sem(values))
    assert mean_interval(values, level=0.9) == pytest.approx(expected, abs=1e-12)
    # By hand: s = 0.05 / sqrt(2) * sqrt(2) = 0.05 * sqrt(2), t(0.975, 1) = 12.706.
    assert mean_interval([0.5, 0.6]) == pytest.approx(
        (0.55 - 12.7062 * 0.05, 0.55 + 12.7062 * 0.05), abs=1e-4
    )
    assert mean_interval([0.5]) is None
    assert mean_interval([0.5, 0.5, 0.5]) == (0.5, 0.5)


def test_refusals_name_the_value():
    with pytest.raises(DataError, match="an interval needs at least one result"):
        bootstrap_interval(torch.empty(0))
    with pytest.raises(DataError, match="an interval needs at least one result"):
        mean_interval([])
    with pytest.raises(NumericsError, match="2 of 3 results are not finite"):
        bootstrap_interval(torch.tensor([0.5, float("nan"), float("inf")]))
    with pytest.raises(ConfigError, match="results compared are of 3 and 4 test images"):
        paired_difference(torch.ones(3), torch.ones(4))
    with pytest.raises(ConfigError, match="0 resamples are too few"):
        bootstrap_interval(torch.ones(3), num_resamples=0)
    for wrong in (0.0, 1.0, 95.0, float("nan")):
        with pytest.raises(ConfigError, match="must lie between 0 and 1"):
            bootstrap_interval(torch.ones(3), level=wrong)
        with pytest.raises(ConfigError, match="must lie between 0 and 1"):
            mean_interval([0.5, 0.6], level=wrong)
