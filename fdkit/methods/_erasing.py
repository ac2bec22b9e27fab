"""Random erasing of a whole batch on its device: a box of noise in a share of the images.

Source: Zhong et al. 2020 (Random Erasing); the box and the noise of every pixel are those of timm's
data/random_erasing.py in mode "pixel" with one box.
"""

import math

import torch
from torch import Tensor

MIN_AREA, MAX_AREA = 0.02, 1 / 3
"""Share of the image that a box covers, drawn evenly between these."""
MIN_ASPECT = 0.3
"""Height over width, its logarithm drawn evenly between this and its inverse."""
NUM_TRIES = 10
"""Boxes drawn until one is smaller than the image on both sides; else nothing is erased."""


def erase(images: Tensor, probability: float, *, mean: Tensor, std: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [0, 1], some with a box of noise: normal once normalised, so not bound to [0, 1].

    mean, std: (3, 1, 1), what the network normalises with. Draws from the device's generator; nothing waits for it.
    """
    height, width = images.shape[-2:]
    boxes = draw_boxes(len(images), (height, width), probability, images.device)
    rows = torch.arange(height, device=images.device).view(1, 1, height, 1)
    columns = torch.arange(width, device=images.device).view(1, 1, 1, width)
    top, bottom, left, right = (edge.view(-1, 1, 1, 1) for edge in boxes.unbind(1))
    inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
    return torch.where(inside, mean + std * torch.randn_like(images), images)


def draw_boxes(count: int, size: tuple[int, int], probability: float, device: torch.device) -> Tensor:
    """(count, 4) float: top, bottom, left and right (excluded) of the box of each image; all 0 for none."""
    height, width = size
    erased, area, aspect, vertical, horizontal = torch.rand(5, count, NUM_TRIES, device=device).unbind(0)
    area = (MIN_AREA + (MAX_AREA - MIN_AREA) * area) * height * width
    aspect = torch.exp((2 * aspect - 1) * math.log(1 / MIN_ASPECT))
    tall, wide = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (tall < height) & (wide < width)
    first = fits.int().argmax(dim=1, keepdim=True)
    tall, wide, vertical, horizontal = (
        drawn.gather(1, first)[:, 0] for drawn in (tall, wide, vertical, horizontal)
    )
    top, left = (vertical * (height - tall + 1)).floor(), (horizontal * (width - wide + 1)).floor()
    happens = fits.any(dim=1) & (erased[:, 0] < probability)
    return torch.stack([top, top + tall, left, left + wide], dim=1) * happens[:, None]
