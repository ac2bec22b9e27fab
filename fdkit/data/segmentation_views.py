"""Views of an image and its mask: random squares to train on, the whole image to test, and windows over it.

Both come as uint8 (H, W, 4), the mask as fourth channel. Every network here reads squares of one size, so an image of
any shape is tested in squares that overlap, and the scores of a pixel are averaged.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import Field
from torch import Tensor

from fdkit.config import Config
from fdkit.data import colour as colour_ops
from fdkit.data.colour import ColourStrengths
from fdkit.data.segmentation import IGNORED
from fdkit.data.views import Pixels, Sample, Share, Strength
from fdkit.errors import ConfigError

NUM_TRIES = 10


class SegmentationCropConfig(Config):
    """A random square of an image resized by a random factor."""

    short_side: int | None = Field(default=None, ge=1)
    """Pixels of the shorter side that images are resized to, in testing; in training, times a random factor. None
    means as many as the network sees."""
    min_scale: float = Field(default=0.5, gt=0)
    """Smallest random factor."""
    max_scale: float = Field(default=2.0, gt=0)
    """Largest random factor."""
    max_class_ratio: Share = 0.75
    """Squares in which one class has a larger share of the pixels that count are drawn again, ten times at most."""
    flip: bool = True
    """Mirror left and right in half of the views."""
    brightness: Strength = 0
    """Brightness factors are drawn from [1 - this, 1 + this]; 0 switches it off."""
    contrast: Strength = 0
    """Contrast factors are drawn from [1 - this, 1 + this]; 0 switches it off."""
    saturation: Strength = 0
    """Saturation factors are drawn from [1 - this, 1 + this]; 0 switches it off."""
    hue: float = Field(default=0, ge=0, le=0.5)
    """Hue shifts are drawn from [-this, this], in full turns; 0 switches it off."""


class SegmentationCrop:
    """A random square of the image and the same of its mask, as two views.

    The image is resized so that its shorter side is short_side times a factor uniform in [min_scale, max_scale], and
    a square is cut out at a uniform place; what lies beyond the image is black, and ignored in the mask. Colours are
    changed on the device, if at all.
    Source: the training pipeline of mmsegmentation, as DINOv2, BEiT and MAE use it; its brightness is a shift, and
    each of its changes of colour happens in half of the views.
    """

    num_views = 2

    def __init__(self, config: SegmentationCropConfig, image_size: int) -> None:
        """image_size: height and width of the squares, in pixels."""
        # A command's configuration may be of a class made while it runs, which workers cannot be sent.
        self.config = SegmentationCropConfig(
            **{name: getattr(config, name) for name in SegmentationCropConfig.model_fields}
        )
        if config.max_scale < config.min_scale:
            raise ConfigError(
                f"views.max_scale {config.max_scale} is smaller than views.min_scale {config.min_scale}",
                f"use --views.max-scale {config.min_scale} for one scale",
            )
        self.image_size = image_size
        self.short_side = config.short_side or image_size
        parts = {name: getattr(config, name) for name in ("brightness", "contrast", "saturation", "hue")}
        self.strengths = ColourStrengths(**parts, jitter_probability=float(any(parts.values())))

    def __call__(self, image: Pixels, random: np.random.Generator) -> Sample:
        """The image uint8 (3, S, S) and the mask uint8 (1, S, S)."""
        pixels = _with_mask(image)
        height, width = pixels.shape[:2]
        scale = random.uniform(self.config.min_scale, self.config.max_scale)
        factor = self.short_side * scale / min(height, width)
        part = self._draw(pixels, self.image_size / factor, random)
        size = [min(self.image_size, max(1, round(side * factor))) for side in part.shape[:2]]
        views = [_resize_image(part, size), _resize_mask(part, size)]
        # The same square for image and mask; only its right and bottom can lie beyond the image.
        padding = (0, self.image_size - size[1], 0, self.image_size - size[0])
        views = [F.pad(view, padding, value=fill) for view, fill in zip(views, (0, IGNORED), strict=True)]
        if self.config.flip and random.random() < 0.5:
            views = [view.flip(-1) for view in views]
        changes = self.strengths.jitter_probability > 0
        colour = [colour_ops.draw(self.strengths, random)] if changes else []
        return Sample([view.contiguous() for view in views], colour)

    def _draw(self, pixels: Tensor, side: float, random: np.random.Generator) -> Tensor:
        """A random square of this side, or as much of one as there is; again if one class fills it."""
        height, width = (min(length, max(1, round(side))) for length in pixels.shape[:2])
        part = pixels
        for _ in range(NUM_TRIES):
            top = int(random.integers(0, pixels.shape[0] - height + 1))
            left = int(random.integers(0, pixels.shape[1] - width + 1))
            part = pixels[top : top + height, left : left + width]
            if _largest_share(part[..., 3]) <= self.config.max_class_ratio:
                break
        return part

    @torch.no_grad()
    def finish(self, crops: list[Tensor], colour: list[Tensor]) -> list[Tensor]:
        """Images (B, 3, S, S) float32 in [0, 1], and classes (B, S, S) int64 with IGNORED where nothing counts."""
        images, masks = finish(crops)
        for parameters in colour:
            with torch.autocast(images.device.type, enabled=False):
                images = colour_ops.apply(images, parameters, self.strengths)
        return [images, masks]


class WholeImage:
    """The whole image, resized to a shorter side in pixels, and its mask at its own size, as two views.

    Images differ in size, so a batch is one image.
    """

    num_views = 2

    def __init__(self, short_side: int) -> None:
        self.image_size = short_side

    def __call__(self, image: Pixels, random: np.random.Generator) -> Sample:
        """The image uint8 (3, h, w) and the mask uint8 (1, H, W); nothing is random."""
        pixels = _with_mask(image)
        factor = self.image_size / min(pixels.shape[:2])
        size = [max(1, round(side * factor)) for side in pixels.shape[:2]]
        mask = pixels[..., 3][None].contiguous()
        return Sample([_resize_image(pixels, size).contiguous(), mask], [])

    def finish(self, crops: list[Tensor], colour: list[Tensor]) -> list[Tensor]:
        """The image (1, 3, h, w) float32 in [0, 1], and its classes (1, H, W) int64, with IGNORED among them."""
        return finish(crops)


def finish(crops: list[Tensor]) -> list[Tensor]:
    """Images (B, 3, h, w) float32 in [0, 1] and masks (B, H, W) int64, of both as uint8."""
    images, masks = crops
    return [images.to(torch.float32, memory_format=torch.contiguous_format).div_(255), masks[:, 0].long()]


def window_starts(length: int, size: int, stride: int) -> list[int]:
    """Where windows of a size begin on an axis of a length, in pixels: every stride, and the last one at the end.

    A single window begins at 0 where the axis is no longer than it. Raises ConfigError for a stride that leaves gaps.
    """
    if not 1 <= stride <= size:
        raise ConfigError(
            f"stride {stride}: windows of {size} pixels would leave gaps, or never end",
            f"use a --stride from 1 to {size}",
        )
    num_more = max(0, math.ceil((length - size) / stride))
    return [min(number * stride, max(0, length - size)) for number in range(num_more + 1)]


def window_corners(height: int, width: int, size: int, stride: int) -> list[tuple[int, int]]:
    """Top and left of the windows over an image, row by row; raises ConfigError as `window_starts` does."""
    lefts = window_starts(width, size, stride)
    return [(top, left) for top in window_starts(height, size, stride) for left in lefts]


def cut_windows(image: Tensor, size: int, stride: int, *, fill: int = 0) -> Tensor:
    """The windows (n, C, size, size) over an image (C, h, w), in the order of `window_corners`.

    An image smaller than a window is padded with `fill` at right and bottom.
    """
    height, width = image.shape[-2:]
    padded = F.pad(image, (0, max(0, size - width), 0, max(0, size - height)), value=fill)
    corners = window_corners(height, width, size, stride)
    return torch.stack([padded[:, top : top + size, left : left + size] for top, left in corners])


def sliding_scores(
    image: Tensor, score: Callable[[Tensor], Tensor], *, size: int, stride: int, batch_size: int
) -> Tensor:
    """Scores (K, h, w) of every pixel of an image (3, h, w), averaged over the windows that see it.

    score: maps windows (b, 3, size, size), b <= batch_size, to scores (b, K, r, c) on any grid, which is resized
    bilinearly to the pixels of the window. An image smaller than a window is padded with black.
    """
    height, width = image.shape[-2:]
    windows = cut_windows(image, size, stride)
    corners = window_corners(height, width, size, stride)
    total = count = torch.empty(0)
    for start in range(0, len(corners), batch_size):
        found = score(windows[start : start + batch_size]).float()
        found = F.interpolate(found, size=(size, size), mode="bilinear", align_corners=False)
        if start == 0:
            total = found.new_zeros(found.shape[1], max(height, size), max(width, size))
            count = found.new_zeros(total.shape[1:])
        for one, (top, left) in zip(found, corners[start : start + batch_size], strict=True):
            total[:, top : top + size, left : left + size] += one
            count[top : top + size, left : left + size] += 1
    return (total / count)[:, :height, :width]


def _with_mask(image: Pixels) -> Tensor:
    assert not isinstance(image, Image.Image), "views of a mask need uint8 (H, W, 4)"
    assert image.shape[2] == 4, f"no mask beside the image in {tuple(image.shape)}"
    return image


def _resize_image(pixels: Tensor, size: list[int]) -> Tensor:
    """uint8 (3, h, w) of uint8 (H, W, 4): bilinear, antialiased."""
    image = pixels[..., :3].permute(2, 0, 1)[None]
    if list(image.shape[-2:]) != size:
        image = F.interpolate(image, size, mode="bilinear", antialias=True)
    return image[0]


def _resize_mask(pixels: Tensor, size: list[int]) -> Tensor:
    """uint8 (1, h, w) of uint8 (H, W, 4): the class of the nearest pixel."""
    mask = pixels[None, None, ..., 3]
    if list(mask.shape[-2:]) != size:
        mask = F.interpolate(mask, size, mode="nearest-exact")
    return mask[0]


def _largest_share(mask: Tensor) -> float:
    """Of one class among the pixels of a mask that count; 0 if none counts."""
    counts = torch.bincount(mask.reshape(-1), minlength=256)[:IGNORED]
    return float(counts.max() / counts.sum().clamp_min(1))
