"""What the loader makes of one image: crops drawn in the worker as uint8, colour applied to batches on the device."""

import math
from typing import Annotated, Literal, NamedTuple, Protocol, Self

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor

from fdkit.config import C, Config, Values
from fdkit.data import colour as colour_ops
from fdkit.data.colour import ColourStrengths
from fdkit.errors import ConfigError

Interpolation = Literal["bilinear", "bicubic"]
Probability = Annotated[float, Field(ge=0, le=1)]
Strength = Annotated[float, Field(ge=0)]
Sigma = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Box = tuple[int, int, int, int]
"""left, top, right, bottom; the last two excluded."""


Pixels = Image.Image | Tensor
"""An RGB image: Pillow's, or uint8 (H, W, 3)."""


class Sample(NamedTuple):
    """What a worker makes of one image."""

    crops: list[Tensor]
    """One a view: uint8 (3, H, W), in either memory layout."""
    colour: list[Tensor]
    """One a view: float32 (P,), its colour parameters; empty when the views change no colour."""


class Views(Protocol):
    """How one image becomes the views a method trains or evaluates on."""

    num_views: int
    image_size: int

    def __call__(self, image: Pixels, random: np.random.Generator) -> Sample:
        """The views of an image, as uint8; runs in the worker."""

    def finish(self, crops: list[Tensor], colour: list[Tensor]) -> list[Tensor]:
        """(B, 3, H, W) float32 in [0, 1] a view; runs on the device of the crops."""


class CropConfig(Config):
    """A random crop, resized to a square."""

    image_size: int = Field(224, gt=0)
    """Height and width of the views, in pixels."""
    min_scale: Share = 0.08
    """Smallest share of the image's area that a crop covers."""
    max_scale: Share = 1
    """Largest share of the image's area that a crop covers."""
    flip: bool = True
    """Mirror left and right in half of the views."""
    interpolation: Interpolation = "bilinear"
    """How crops are resized, always antialiased."""

    @model_validator(mode="after")
    def _has_a_range_of_scales(self) -> Self:
        if self.max_scale < self.min_scale:
            raise ConfigError(
                f"views.max_scale {self.max_scale} is smaller than views.min_scale {self.min_scale}",
                f"use --views.max-scale {self.min_scale} for crops of one size",
            )
        return self


class RandomCrop:
    """One randomly resized crop of any image, flipped half the time; no colour changes (feature distillation)."""

    num_views = 1

    def __init__(self, config: CropConfig) -> None:
        self.config = _fields(CropConfig, config)
        self.image_size = config.image_size

    def __call__(self, image: Pixels, random: np.random.Generator) -> Sample:
        """One crop."""
        return Sample([_random_crop(image, self.config, random)], [])

    def finish(self, crops: list[Tensor], colour: list[Tensor]) -> list[Tensor]:
        """(B, 3, H, W) float32 in [0, 1]."""
        return [_to_float(batch) for batch in crops]


class TwoViewsConfig(CropConfig):
    """Two crops of an image with different blur and solarisation: the augmentation of BYOL, used by MoCo v3."""

    brightness: Strength = 0.4
    """Brightness factors are drawn from [1 - this, 1 + this]; 0 switches it off."""
    contrast: Strength = 0.4
    """Contrast factors are drawn from [1 - this, 1 + this]; 0 switches it off."""
    saturation: Strength = 0.2
    """Saturation factors are drawn from [1 - this, 1 + this]; 0 switches it off."""
    hue: float = Field(0.1, ge=0, le=0.5)
    """Hue shifts are drawn from [-this, this], in full turns; 0 switches it off."""
    jitter_probability: Probability = 0.8
    """Share of the views whose brightness, contrast, saturation and hue change."""
    grayscale_probability: Probability = 0.2
    """Share of the views turned grey."""
    grayscale_first: bool = False
    """Turn views grey before their colours are jittered, as MoCo v1 and InstDisc do, rather than after."""
    blur_probability: tuple[Probability, Probability] = (1.0, 0.1)
    """Share of the first and of the second views that are blurred."""
    blur_sigma: tuple[Sigma, Sigma] = (0.1, 2.0)
    """Range of the blur's standard deviation, in pixels of a 224-pixel view; it shrinks with image_size."""
    solarize_probability: tuple[Probability, Probability] = (0.0, 0.2)
    """Share of the first and of the second views whose bright pixels are inverted."""


class TwoViews:
    """Two asymmetric views of each image.

    Crop, jitter, grey, blur and solarise follow in that order, or grey before jitter with grayscale_first; the flip
    comes with the crop, which gives the same pixels as flipping last.
    Source: Grill et al. 2020 (BYOL), appendix B; Chen et al. 2021 (MoCo v3), facebookresearch/moco-v3@c349e6e
    main_moco.py; grey first: facebookresearch/moco@132aea9 main_moco.py, without --aug-plus.
    """

    num_views = 2

    def __init__(self, config: TwoViewsConfig) -> None:
        self.config = _fields(TwoViewsConfig, config)
        self.image_size = config.image_size
        self.strengths = [_strengths(config, view) for view in range(2)]

    def __call__(self, image: Pixels, random: np.random.Generator) -> Sample:
        """Two crops and the colour parameters of each."""
        crops = [_random_crop(image, self.config, random) for _ in range(2)]
        return Sample(crops, [colour_ops.draw(strengths, random) for strengths in self.strengths])

    @torch.no_grad()
    def finish(self, crops: list[Tensor], colour: list[Tensor]) -> list[Tensor]:
        """Both views (B, 3, H, W), float32 in [0, 1], with their colours changed."""
        with torch.autocast(crops[0].device.type, enabled=False):
            return [
                colour_ops.apply(_to_float(batch), parameters, strengths)
                for batch, parameters, strengths in zip(crops, colour, self.strengths, strict=True)
            ]


class MultiCropConfig(TwoViewsConfig):
    """Two crops of an image and several smaller ones of smaller parts of it: the multi-crop of SwAV and DINO."""

    num_local: int = Field(8, ge=0)
    """How many local views an image has, beside the two global ones."""
    local_size: int = Field(96, gt=0)
    """Height and width of the local views, in pixels."""
    local_scale: tuple[Share, Share] = (0.05, 0.4)
    """Smallest and largest share of the image's area that a local view covers."""
    local_blur_probability: Probability = 0.5
    """Share of the local views that are blurred, as much as the global ones in pixels; none is solarised."""

    @model_validator(mode="after")
    def _has_smaller_local_views(self) -> Self:
        if self.num_local and self.local_size > self.image_size:
            raise ConfigError(
                f"views.local_size {self.local_size} is larger than views.image_size {self.image_size}",
                f"use --views.local-size {max(1, self.image_size * 3 // 7)}, or --views.num-local 0 for none",
            )
        low, high = self.local_scale
        if high < low:
            raise ConfigError(
                f"views.local_scale ({low}, {high}) ends below its beginning",
                f"write the smaller share first: ({high}, {low})",
            )
        return self


class MultiCrop:
    """Two global views of each image, those of `TwoViews` for the same seed, then the local ones.

    Source: Caron et al. 2020 (SwAV), section 3.3; Caron et al. 2021 (DINO), whose strengths these are but for
    min_scale (0.4 there) and interpolation (bicubic there).
    """

    def __init__(self, config: MultiCropConfig) -> None:
        self.config = _fields(MultiCropConfig, config)
        self.num_views = 2 + config.num_local
        self.image_size = config.image_size
        self.local_size = config.local_size
        self.sizes = [config.image_size] * 2 + [config.local_size] * config.num_local
        """Height and width of each view, in pixels."""
        self._global_views = TwoViews(config)
        low, high = config.local_scale
        local = {"image_size": config.local_size, "min_scale": low, "max_scale": high}
        self._local_crop = _fields(CropConfig, config, local)
        self._local_strengths = _strengths(config, 1)._replace(
            blur_probability=config.local_blur_probability, solarize_probability=0.0
        )

    def __call__(self, image: Pixels, random: np.random.Generator) -> Sample:
        """All crops and the colour parameters of each."""
        crops, colour = self._global_views(image, random)
        num_local = self.config.num_local
        crops += [_random_crop(image, self._local_crop, random) for _ in range(num_local)]
        colour += [colour_ops.draw(self._local_strengths, random) for _ in range(num_local)]
        return Sample(crops, colour)

    @torch.no_grad()
    def finish(self, crops: list[Tensor], colour: list[Tensor]) -> list[Tensor]:
        """Every view (B, 3, S, S), float32 in [0, 1], with its colours changed; the local ones as one batch."""
        views = self._global_views.finish(crops[:2], colour[:2])
        if self.config.num_local:
            with torch.autocast(crops[0].device.type, enabled=False):
                batch = _to_float(torch.cat(crops[2:]))
                local = colour_ops.apply(batch, torch.cat(colour[2:]), self._local_strengths)
            views += local.chunk(self.config.num_local)
        return views


class CenterCrop:
    """The evaluation view: short side resized to floor(image_size / crop_ratio), then the central square.

    The pixels are those of timm's evaluation transform, which resizes with Pillow.
    """

    num_views = 1

    def __init__(
        self, image_size: int = 224, *, crop_ratio: float = 0.875, interpolation: Interpolation = "bicubic"
    ) -> None:
        """image_size: pixels; crop_ratio: in (0, 1], image_size / short side after resizing."""
        if not 0 < crop_ratio <= 1:
            raise ValueError(f"crop_ratio {crop_ratio} is not in (0, 1]")
        self.image_size = image_size
        self.crop_ratio = crop_ratio
        self.interpolation = Image.Resampling[interpolation.upper()]

    def __call__(self, image: Pixels, random: np.random.Generator) -> Sample:
        """The one central crop; nothing is random."""
        short, size = math.floor(self.image_size / self.crop_ratio), self.image_size
        image = image if isinstance(image, Image.Image) else Image.fromarray(image.numpy())
        width, height = image.size
        if min(width, height) != short:
            tall = height > width
            width, height = (short, short * height // width) if tall else (short * width // height, short)
            image = image.resize((width, height), self.interpolation)
        left, top = round((width - size) / 2), round((height - size) / 2)
        return Sample([_to_tensor(image, (left, top, left + size, top + size))[0]], [])

    def finish(self, crops: list[Tensor], colour: list[Tensor]) -> list[Tensor]:
        """(B, 3, H, W) float32 in [0, 1]."""
        return [_to_float(batch) for batch in crops]


def draw_box(
    width: int,
    height: int,
    random: np.random.Generator,
    *,
    min_scale: float,
    max_scale: float = 1.0,
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Box:
    """A random box whose share of the area is uniform in [min_scale, max_scale] and log aspect ratio uniform.

    Boxes that do not fit are drawn again, ten times at most; then the largest central box within the ratios is taken.
    The distribution is that of torchvision's RandomResizedCrop.
    """
    log_ratio = (math.log(ratio[0]), math.log(ratio[1]))
    for _ in range(10):
        area = width * height * random.uniform(min_scale, max_scale)
        aspect = math.exp(random.uniform(*log_ratio))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(random.integers(0, height - h + 1)), int(random.integers(0, width - w + 1))
            return left, top, left + w, top + h
    w = max(1, min(width, round(height * ratio[1])))
    h = max(1, min(height, round(width / ratio[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _fields(kind: type[C], config: Config, changes: Values | None = None) -> C:
    """The fields of `kind` that a configuration has, some of them changed, as that very class.

    A command's configuration may be of a class made while it runs, which workers cannot be sent.
    """
    return kind(**{name: getattr(config, name) for name in kind.model_fields} | (changes or {}))


def _random_crop(image: Pixels, config: CropConfig, random: np.random.Generator) -> Tensor:
    width, height = image.size if isinstance(image, Image.Image) else (image.shape[1], image.shape[0])
    box = draw_box(width, height, random, min_scale=config.min_scale, max_scale=config.max_scale)
    crop = _to_tensor(image, box)
    if crop.shape[-2:] != (config.image_size, config.image_size):
        # torch resizes uint8 with vector instructions, Pillow does not: twice as fast, within one level of its pixels.
        size = (config.image_size, config.image_size)
        crop = F.interpolate(crop, size, mode=config.interpolation, antialias=True)
    crop = crop[0]
    return crop.flip(-1) if config.flip and random.random() < 0.5 else crop


def _to_tensor(image: Pixels, box: Box) -> Tensor:
    """uint8 (1, 3, H, W), the part of an RGB image inside the box.

    Channels vary fastest in memory, and the strides say so as torch expects of a batch: else it would transpose.
    """
    left, top, right, bottom = box
    if isinstance(image, Image.Image):
        if image.mode != "RGB":
            raise ValueError(f"views need RGB images, not mode {image.mode}")
        pixels = torch.from_numpy(np.array(image.crop(box)))
    else:
        pixels = image[top:bottom, left:right].contiguous()
    return pixels[None].permute(0, 3, 1, 2)


def _to_float(crops: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) of any memory layout as float32 in [0, 1], channels first in memory."""
    return crops.to(torch.float32, memory_format=torch.contiguous_format).div_(255)


def _strengths(config: TwoViewsConfig, view: int) -> ColourStrengths:
    low, high = (sigma * config.image_size / 224 for sigma in config.blur_sigma)
    return ColourStrengths(
        brightness=config.brightness,
        contrast=config.contrast,
        saturation=config.saturation,
        hue=config.hue,
        jitter_probability=config.jitter_probability,
        grayscale_probability=config.grayscale_probability,
        grayscale_first=config.grayscale_first,
        blur_probability=config.blur_probability[view],
        blur_sigma=(low, high),
        solarize_probability=config.solarize_probability[view],
    )
