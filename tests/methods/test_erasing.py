import random

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from timm.data.random_erasing import RandomErasing

from fdkit.methods._erasing import draw_boxes, erase

UNLIKELY = 1e-3
CPU = torch.device("cpu")
MEAN, STD = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.1]).view(3, 1, 1)


def boxes_of(erased: torch.Tensor) -> np.ndarray:
    """(N, 4): top, left, height and width of what is not zero in images (B, 1, H, W); images without a box left out."""
    found = []
    for image in erased[:, 0]:
        rows, columns = (image != 0).any(dim=1).nonzero(), (image != 0).any(dim=0).nonzero()
        if len(rows):
            top, left = int(rows[0]), int(columns[0])
            found.append((top, left, int(rows[-1]) + 1 - top, int(columns[-1]) + 1 - left))
    return np.array(found, dtype=float)


@pytest.mark.parametrize("size", [(20, 31), (8, 40)])
def test_boxes_have_timms_distribution(size: tuple[int, int]) -> None:
    """The narrow image makes many tries fail, so that trying again counts too."""
    random.seed(0)
    count = 4000
    images = torch.zeros(count, 1, *size)
    RandomErasing(0.6, mode="pixel", device="cpu")(images)
    expected = boxes_of(images)
    top, bottom, left, right = draw_boxes(count, size, 0.6, CPU).unbind(1)
    ours = torch.stack([top, left, bottom - top, right - left], dim=1)
    ours = ours[bottom > top].double()
    assert len(ours) == pytest.approx(len(expected), abs=150)
    for column in range(4):
        assert ks_2samp(ours[:, column].numpy(), expected[:, column]).pvalue > UNLIKELY
    areas = (ours[:, 2] * ours[:, 3]).numpy(), expected[:, 2] * expected[:, 3]
    assert ks_2samp(*areas).pvalue > UNLIKELY


def test_boxes_lie_inside_and_reach_every_edge() -> None:
    top, bottom, left, right = draw_boxes(5000, (10, 13), 1.0, CPU).unbind(1)
    assert bool(((top >= 0) & (left >= 0) & (bottom <= 10) & (right <= 13)).all())
    assert {int(bottom.max()), int(right.max()), int(top.min()), int(left.min())} == {10, 13, 0}


def test_a_box_of_noise_is_normal_once_normalised_and_nothing_else_changes() -> None:
    images = torch.rand(300, 3, 24, 18)
    erased = erase(images, 1.0, mean=MEAN, std=STD)
    inside = erased != images
    assert torch.equal(inside.all(dim=1), inside.any(dim=1))  # the same box in all channels
    noise = ((erased - MEAN) / STD).transpose(0, 1)[inside.transpose(0, 1)].view(3, -1)
    assert noise.mean(dim=1).abs().max() < 0.02
    assert noise.std(dim=1).sub(1).abs().max() < 0.02
    assert (erased < 0).any()  # not bound to [0, 1]
    share = inside[:, 0].float().mean(dim=(1, 2))
    assert 0.01 < float(share.min()) < 0.05  # from 2 % to a third, but for rounding
    assert 0.3 < float(share.max()) < 0.37


def test_only_so_many_images_are_erased() -> None:
    images = torch.rand(1000, 3, 16, 16)
    changed = (erase(images, 0.25, mean=MEAN, std=STD) != images).flatten(1).any(dim=1)
    assert float(changed.float().mean()) == pytest.approx(0.25, abs=0.05)
    assert torch.equal(erase(images, 0.0, mean=MEAN, std=STD), images)
