"""Random colour operations on a whole batch at once, on the device, each image with its own parameters.

Workers draw the parameters (`draw`), the device applies them (`apply`): jitter in a random order of its four parts,
grey (or grey before jitter), blur, solarise. Images stay floating point throughout, where the Pillow pipelines round
to 8 bits in between.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
NUM_PARAMETERS = 11
"""A row: 4 factors (brightness, contrast, saturation, hue), 4 operations in order, grey, blur sigma, solarise."""

LUMA = (0.2989, 0.587, 0.114)
SOLARIZE_THRESHOLD = 128 / 255
CACHED_PIXELS = 2**17
"""How many pixels a processor changes at a time: more leave its cache, fewer make more calls."""


class ColourStrengths(NamedTuple):
    """How strongly and how often each operation changes an image; 0 switches it off."""

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    jitter_probability: float = 0.0
    grayscale_probability: float = 0.0
    blur_probability: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Range of the blur's standard deviation, in pixels of this image."""
    solarize_probability: float = 0.0
    grayscale_first: bool = False
    """Whether grey comes before the jitter, not after it."""


def draw(strengths: ColourStrengths, random: np.random.Generator) -> Tensor:
    """(11,) float32: one image's parameters, in which an operation that does not happen is the identity.

    Factors are uniform in [max(0, 1 - s), 1 + s], hue shifts in [-s, s] turns, as in torchvision's ColorJitter.
    Every call draws the same count of numbers, so changing one strength leaves the others' draws alone.
    """
    change, *uniform, grays, blurs, radius, solarizes = random.random(9).tolist()
    factors = [1.0, 1.0, 1.0, 0.0]
    if change < strengths.jitter_probability:
        parts = (strengths.brightness, strengths.contrast, strengths.saturation)
        for part, (strength, u) in enumerate(zip(parts, uniform, strict=False)):
            low = max(0.0, 1 - strength)
            factors[part] = low + u * (1 + strength - low)
        factors[HUE] = strengths.hue * (2 * uniform[HUE] - 1)
    low, high = strengths.blur_sigma
    sigma = low + radius * (high - low) if blurs < strengths.blur_probability else 0.0
    gray, solarize = grays < strengths.grayscale_probability, solarizes < strengths.solarize_probability
    order = random.permutation(4).tolist()
    return torch.from_numpy(np.array([*factors, *order, gray, sigma, solarize], dtype=np.float32))


def apply(images: Tensor, parameters: Tensor, strengths: ColourStrengths) -> Tensor:
    """The images after their colour operations; (B, 3, H, W) float32 in [0, 1], as are the images.

    parameters: (B, 11) from `draw`; strengths: the same, read only to leave out what cannot happen and to size the
    blur's kernel, so nothing waits for the device. A processor takes few images at a time, which stay in its cache,
    and leaves out what happens to none of them: at 224 pixels twice as fast, to the same pixels.
    """
    few = max(1, CACHED_PIXELS // (images.shape[-2] * images.shape[-1]))
    if images.device.type != "cpu" or len(images) <= few:
        return _apply(images, parameters, strengths)
    parts = zip(images.split(few), parameters.split(few), strict=True)
    return torch.cat([_apply(part, rows, strengths) for part, rows in parts])


def _apply(images: Tensor, parameters: Tensor, strengths: ColourStrengths) -> Tensor:
    column = parameters.to(images)[..., None, None, None].unbind(1)  # each (B, 1, 1, 1)
    factors, order, is_gray = torch.stack(column[:4]), torch.stack(column[4:8]), column[8] > 0
    if strengths.grayscale_first:
        images = _where(is_gray, grayscale, images) if strengths.grayscale_probability else images
    if strengths.jitter_probability:
        images = jitter(images, factors, order, with_hue=strengths.hue > 0)
    if strengths.grayscale_probability and not strengths.grayscale_first:
        images = _where(is_gray, grayscale, images)
    if strengths.blur_probability and not _is_none(column[9] > 0):
        radius = max(1, math.ceil(3 * strengths.blur_sigma[1]))
        images = blur(images, parameters[:, 9], min(radius, min(images.shape[-2:]) - 1))
    if strengths.solarize_probability:
        images = _where(column[10] > 0, solarize, images)
    return images


def _where(chosen: Tensor, change: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """The images, the chosen ones changed; chosen: (B, 1, 1, 1); change: may give one channel for all."""
    if _is_none(chosen):
        return images
    changed = change(images)
    if _is_none(~chosen):
        return changed.expand_as(images).contiguous()
    return torch.where(chosen, changed, images)


def _is_none(chosen: Tensor) -> bool:
    """Whether no image is chosen, where that is known without waiting for a device."""
    return chosen.device.type == "cpu" and not bool(chosen.any())


def jitter(images: Tensor, factors: Tensor, order: Tensor, *, with_hue: bool = True) -> Tensor:
    """Brightness, contrast, saturation and hue changes, each image in its own order.

    factors: (4, B, 1, 1, 1) by operation; order: (4, B, 1, 1, 1), the operation at each position. The hue shift is
    costly and every image has exactly one, so the batch takes it together: before it run the blends that an image's
    order puts earlier, after it the others. A blend with factor 1 is the identity.
    """
    hue_position = (order == HUE).to(torch.uint8).argmax(dim=0)
    for position in range(3):
        images = _blend(images, factors, order[position], position < hue_position)
    if with_hue:
        images = _where(factors[HUE] != 0, lambda batch: shift_hue(batch, factors[HUE]), images)
    for position in range(1, 4):
        images = _blend(images, factors, order[position], position > hue_position)
    return images


def _blend(images: Tensor, factors: Tensor, operation: Tensor, active: Tensor) -> Tensor:
    """The mix factor * image + (1 - factor) * other, where other is black, the mean grey or the grey image."""
    factor = torch.ones_like(factors[0])
    for part in (BRIGHTNESS, CONTRAST, SATURATION):
        factor = torch.where(active & (operation == part), factors[part], factor)
    if _is_none(factor != 1):
        return images
    gray = grayscale(images)
    mean = gray.mean(dim=(1, 2, 3), keepdim=True)
    other = torch.addcmul(mean * (operation == CONTRAST), gray, (operation == SATURATION).to(gray))
    return torch.lerp(other, images, factor).clamp_(0, 1)


def grayscale(images: Tensor) -> Tensor:
    """(B, 1, H, W): the luma of RGB images, torchvision's weights."""
    red, green, blue = images.unbind(dim=-3)
    return (LUMA[0] * red).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2]).unsqueeze(-3)


def shift_hue(images: Tensor, turns: Tensor) -> Tensor:
    """The images with their HSV hue turned; turns: (B, 1, 1, 1) in [-0.5, 0.5], shares of a full turn.

    With hue h in sixths of a turn, value v and chroma c, channel n of (5, 3, 1) is v - c * clamp(min(k, 4 - k), 0, 1)
    where k = (n + h) mod 6.
    """
    value, chroma, hue = _hue(images)
    offsets = torch.arange(5, 0, -2, device=images.device, dtype=images.dtype).view(3, 1, 1)
    k = offsets + (hue + 6 * turns)
    k.sub_((k / 6).floor_(), alpha=6)  # a third of the time of the remainder
    share = k.sub_(2).abs_().neg_().add_(2).clamp_(0, 1)  # min(k, 4 - k) is 2 - |k - 2|
    return value - share.mul_(chroma)


def _hue(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value, chroma and hue (sixths of a turn), each (B, 1, H, W); the hue of grey is 0."""
    red, green, blue = images.split(1, dim=1)
    value = images.amax(dim=1, keepdim=True)
    chroma = value - images.amin(dim=1, keepdim=True)
    divisor = torch.where(chroma == 0, torch.ones_like(chroma), chroma)
    of_red, of_green, of_blue = (
        (green - blue) / divisor,
        2 + (blue - red) / divisor,
        4 + (red - green) / divisor,
    )
    hue = torch.where(value == red, of_red, torch.where(value == green, of_green, of_blue))
    return value, chroma, hue


def blur(images: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Gaussian blur with its own standard deviation for each image, edges mirrored; 0 leaves an image as it is.

    sigma: (B,) pixels; radius: taps on each side, less than height and width.
    """
    batch, channels, height, width = images.shape
    taps = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    weights = torch.exp(-0.5 * (taps / sigma.to(images).clamp(min=1e-6)[:, None]) ** 2)
    weights = (weights / weights.sum(dim=1, keepdim=True)).repeat_interleave(channels, dim=0)  # (B * 3, taps)
    flat = F.pad(images.reshape(1, batch * channels, height, width), [radius] * 4, mode="reflect")
    flat = F.conv2d(flat, weights[:, None, :, None], groups=batch * channels)
    flat = F.conv2d(flat, weights[:, None, None, :], groups=batch * channels)
    return flat.view_as(images)


def solarize(images: Tensor) -> Tensor:
    """The images with values from 128/255 up inverted."""
    return torch.where(images >= SOLARIZE_THRESHOLD, 1 - images, images)
