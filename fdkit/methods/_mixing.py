"""Mixup and CutMix of a batch with itself in reverse order, and the soft targets that go with it.

One mixture a batch, as timm's mode "batch": image i is mixed with image B - 1 - i, all in the same share.
Source: Zhang et al. 2018 (mixup); Yun et al. 2019 (CutMix); timm's data/mixup.py for how they are combined.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Box = tuple[int, int, int, int]
"""top, bottom, left, right; bottom and right excluded."""


class Mixture(NamedTuple):
    """How a batch is mixed."""

    share: float = 1.0
    """Of the image itself, in [0, 1]; the other has the rest."""
    box: Box | None = None
    """CutMix's box, which shows the other image; None mixes all pixels."""


def draw_mixture(
    size: tuple[int, int],
    *,
    mixup: float,
    cutmix: float,
    probability: float,
    switch_probability: float,
) -> Mixture:
    """A mixture for images of `size` (height, width), drawn from torch's CPU generator.

    mixup, cutmix: alpha of the Beta(alpha, alpha) that the share is drawn from; 0 turns one off. probability: of mixing
    at all; switch_probability: of CutMix where both are on. CutMix's share is that of the pixels left of the image.
    """
    mixes, switches, vertical, horizontal = torch.rand(4).tolist()
    if not (mixup or cutmix) or mixes >= probability:
        return Mixture()
    cuts = switches < switch_probability if mixup and cutmix else not mixup
    alpha = cutmix if cuts else mixup
    share = float(torch.distributions.Beta(alpha, alpha).sample())
    if not cuts:
        return Mixture(share)
    height, width = size
    box = cut_box(size, share, (int(vertical * height), int(horizontal * width)))
    top, bottom, left, right = box
    return Mixture(1 - (bottom - top) * (right - left) / (height * width), box)


def cut_box(size: tuple[int, int], share: float, centre: tuple[int, int]) -> Box:
    """The box about `centre` (row, column) that covers 1 - share of an image, cut off at the edges."""
    bounds: list[int] = []
    for length, middle in zip(size, centre, strict=True):
        side = int(length * math.sqrt(1 - share))
        bounds += [max(0, middle - side // 2), min(length, middle + (side + 1) // 2)]
    top, bottom, left, right = bounds
    return top, bottom, left, right


def mix(images: Tensor, mixture: Mixture) -> Tensor:
    """Images (B, 3, H, W) mixed with their reverse; a new tensor."""
    other = images.flip(0)
    if mixture.box is None:
        return images * mixture.share + other * (1 - mixture.share)
    top, bottom, left, right = mixture.box
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = other[:, :, top:bottom, left:right]
    return mixed


def soft_targets(labels: Tensor, num_classes: int, *, share: float, smoothing: float) -> Tensor:
    """(B, K) float32, rows sum to 1: the mixture of both images' smoothed labels.

    labels: (B,) int64. smoothing: the share of a label spread evenly over all K classes, its own among them.
    """
    smooth = F.one_hot(labels, num_classes).float() * (1 - smoothing) + smoothing / num_classes
    return smooth * share + smooth.flip(0) * (1 - share)
