"""Mixup and CutMix against timm's own, for its mode "batch"."""

from typing import Any

import numpy as np
import pytest
import timm.data.mixup as timms
import torch
from scipy.stats import ks_2samp
from torch import Tensor

from fdkit.methods._mixing import Mixture, cut_box, draw_mixture, mix, soft_targets

UNLIKELY = 1e-3
SIZE = (9, 14)
ON: dict[str, Any] = {"mixup": 0.8, "cutmix": 1.0, "probability": 1.0, "switch_probability": 0.5}


def batch(count: int = 4) -> tuple[Tensor, Tensor]:
    return torch.rand(count, 3, *SIZE), torch.tensor([0, 4, 2, 2, 1, 3])[:count]


def timms_mixture(
    monkeypatch: pytest.MonkeyPatch, share: float, box: tuple[int, int, int, int] | None
) -> Any:
    """timm's Mixup, whose draws are these."""
    mixup = timms.Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=5)
    monkeypatch.setattr(mixup, "_params_per_batch", lambda: (share, box is not None))
    monkeypatch.setattr(timms, "rand_bbox", lambda *args, **kwargs: box)
    return mixup


@pytest.mark.parametrize("share", [0.3, 0.77, 1.0])
def test_mixup_and_its_targets_are_timms(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = batch()
    expected, targets = timms_mixture(monkeypatch, share, None)(images.clone(), labels)
    mixed = mix(images, Mixture(share))
    torch.testing.assert_close(mixed, expected)
    torch.testing.assert_close(soft_targets(labels, 5, share=share, smoothing=0.1), targets)


@pytest.mark.parametrize("box", [(2, 7, 3, 14), (0, 9, 0, 14), (4, 4, 1, 5)])
def test_cutmix_and_its_targets_are_timms(
    box: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = batch(6)
    expected, targets = timms_mixture(monkeypatch, 0.6, box)(images.clone(), labels)
    share = 1 - (box[1] - box[0]) * (box[3] - box[2]) / (9 * 14)
    torch.testing.assert_close(mix(images, Mixture(share, box)), expected)
    torch.testing.assert_close(soft_targets(labels, 5, share=share, smoothing=0.1), targets)


def test_soft_targets_by_hand() -> None:
    """Smoothing keeps 1 - 0.2 and spreads 0.2 over all four classes, the label's own among them."""
    found = soft_targets(torch.tensor([0, 1, 3]), 4, share=0.75, smoothing=0.2)
    expected = torch.tensor([[0.65, 0.05, 0.05, 0.25], [0.05, 0.85, 0.05, 0.05], [0.25, 0.05, 0.05, 0.65]])
    torch.testing.assert_close(found, expected)


def test_no_image_is_changed_in_place() -> None:
    images, _ = batch()
    before = images.clone()
    mix(images, Mixture(0.5))
    mix(images, Mixture(0.5, (1, 3, 2, 5)))
    assert torch.equal(images, before)


@pytest.mark.parametrize("share", [0.0, 0.13, 0.5, 0.999])
@pytest.mark.parametrize("centre", [(0, 0), (8, 13), (4, 6)])
def test_boxes_are_timms(share: float, centre: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = iter(centre)
    monkeypatch.setattr(np.random, "randint", lambda *args, **kwargs: next(drawn))
    assert cut_box(SIZE, share, centre) == tuple(int(edge) for edge in timms.rand_bbox((3, *SIZE), share))


def draws(count: int, **settings: Any) -> list[Mixture]:
    return [draw_mixture(SIZE, **(ON | settings)) for _ in range(count)]


def timms_draws(count: int, **settings: Any) -> list[tuple[float, bool]]:
    np.random.seed(0)
    mixup, found = timms.Mixup(0.8, 1.0, prob=1.0, switch_prob=0.5, **settings), []
    for _ in range(count):
        share, cuts = mixup._params_per_batch()
        found.append((float(timms.cutmix_bbox_and_lam((3, *SIZE), share)[1]) if cuts else share, bool(cuts)))
    return found


def test_what_is_drawn_has_timms_distribution() -> None:
    found, expected = draws(4000), timms_draws(4000)
    assert np.mean([one.box is not None for one in found]) == pytest.approx(0.5, abs=0.03)
    for cuts in (False, True):
        ours = [one.share for one in found if (one.box is not None) == cuts]
        theirs = [share for share, is_cut in expected if is_cut == cuts]
        assert ks_2samp(ours, theirs).pvalue > UNLIKELY


def test_another_distribution_would_show() -> None:
    """A CutMix share that is not corrected for what falls off the edge, and one alpha for both."""
    uncorrected = np.random.default_rng(0).beta(1, 1, 2000)
    theirs = [share for share, cuts in timms_draws(4000) if cuts]
    assert ks_2samp(uncorrected, theirs).pvalue < UNLIKELY
    ours = [one.share for one in draws(4000, mixup=1.3, cutmix=0.0)]
    assert ks_2samp(ours, [share for share, cuts in timms_draws(4000) if not cuts]).pvalue < UNLIKELY


def test_either_alone_or_none_and_only_so_often() -> None:
    assert all(one.box is None and one.share < 1 for one in draws(50, cutmix=0.0))
    assert all(one.box is not None for one in draws(50, mixup=0.0))
    assert all(one == Mixture() for one in draws(50, mixup=0.0, cutmix=0.0))
    assert np.mean([one == Mixture() for one in draws(2000, probability=0.3)]) == pytest.approx(0.7, abs=0.04)
    assert np.mean([one.box is not None for one in draws(2000, switch_probability=0.2)]) == pytest.approx(
        0.2, abs=0.04
    )
