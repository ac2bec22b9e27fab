"""Augmented views of images: what an analysis takes as saying the same thing twice.

A view is a random crop of the evaluation crop, its width 3/4 to 4/3 of its height, brought back to full size. Half of
the views are mirrored, four of five have other colours: brightness, contrast and saturation by a factor of 0.6 to 1.4
and hue by up to a tenth of the circle. That is MoCo v2's crop and colour jitter (Chen et al. 2020, arXiv 2003.04297)
without its grey and blur, by torchvision's transforms. A view depends on a seed and on which image and which view it
is, and not on the size of the image or of the batch, so that models of any input size see the same views.
"""

from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fdkit.config import Config

ASPECT = [3 / 4, 4 / 3]
CANVAS = 4096
"""Pixels a side of the square that crops are drawn in, and scaled from."""
COLOUR_CHANCE = 0.8


class ViewConfig(Config):
    """How augmented views are drawn."""

    crop_area: float = Field(default=0.2, gt=0, le=1)
    """Smallest share of the evaluation crop that a view shows; the largest is all of it. Higher means milder views."""
    view_seed: int = Field(default=0, ge=0)
    """Seed of crops, mirroring and colours."""


def draw_views(images: Tensor, *, first: int, view: int, config: ViewConfig) -> Tensor:
    """A view of each image (B, 3, H, W) in [0, 1], in the same form.

    first: which of all images the first one is; view: which view, from 0. Generators are left as they were.
    """
    with torch.random.fork_rng(devices=[]):  # torchvision draws from the CPU's generator, whatever the device
        views = []
        for number, image in enumerate(images, start=first):
            seed = np.random.SeedSequence([config.view_seed, number, view]).generate_state(1, np.uint64)[0]
            torch.set_rng_state(torch.Generator().manual_seed(int(seed >> 1)).get_state())
            views.append(_view(image, config.crop_area))
    return torch.stack(views)


def _view(image: Tensor, crop_area: float) -> Tensor:
    from torchvision.transforms import v2
    from torchvision.transforms.v2 import functional as F

    height, width = image.shape[-2:]
    canvas = torch.empty(1, 1, 1).expand(1, CANVAS, CANVAS)
    box: Any = v2.RandomResizedCrop.get_params(canvas, scale=[crop_area, 1.0], ratio=ASPECT)
    top, left, rows, columns = (
        round(part * side / CANVAS) for part, side in zip(box, (height, width, height, width), strict=True)
    )
    rows, columns = max(rows, 1), max(columns, 1)
    top, left = min(top, height - rows), min(left, width - columns)
    view = F.resized_crop(image, top, left, rows, columns, [height, width], antialias=True)
    if torch.rand(()) < 0.5:
        view = F.horizontal_flip(view)
    if torch.rand(()) < COLOUR_CHANCE:
        view = v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)(view)
    return view.clamp(0, 1)
