"""Crops for learning from labels, changed by RandAugment in the worker or by colour jitter on the device.

timm's RandAugment draws from the global generators of Python and NumPy. Here both are seeded from the image's own
generator while it runs and put back afterwards, so that an image's crop is a function of (seed, epoch, index) as all
others are, and nothing else notices.
"""

import random as python_random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from fdkit.config import Config
from fdkit.data import colour as colour_ops
from fdkit.data.colour import ColourStrengths
from fdkit.data.views import CropConfig, Interpolation, Pixels, RandomCrop, Sample, Share, Strength
from fdkit.errors import ConfigError

WORDS = re.compile(
    r"rand(-(m\d+|mstd\d+(\.\d+)?|mmax\d+|inc[01]|n[1-9]\d*|p(0(\.\d+)?|1(\.0+)?)|t(weights|3a|3aw)))*"
)
"""What timm reads; it passes over, or takes for its default, what it does not know."""
TRANSLATION = 0.45
"""Largest translation of RandAugment, as a share of the side: what timm's training transform sets."""


class SupervisedViewsConfig(Config):
    """A random crop for learning from labels; its size is that of the network's input."""

    min_scale: Share = 0.08
    """Smallest share of the image's area that a crop covers."""
    max_scale: Share = 1
    """Largest share of the image's area that a crop covers."""
    flip: bool = True
    """Mirror left and right in half of the crops."""
    interpolation: Interpolation = "bicubic"
    """How crops are resized, always antialiased, and how RandAugment turns and shears them."""
    randaugment: str | None = "rand-m9-mstd0.5-inc1"
    """RandAugment in timm's words: m, its magnitude; mstd, the deviation of that; inc1, operations that all grow with
    it; n, how many (2); p, the share applied (0.5). null: off."""
    colour_jitter: Strength = 0.0
    """Brightness, contrast and saturation factors are drawn from [1 - this, 1 + this]; only without RandAugment."""
    repeats: int = Field(1, ge=1)
    """Crops of each image in a batch: repeated augmentation, as in DeiT, where it is 3. A step then trains on
    train.batch_size times this many crops, and an epoch on each image as often."""

    @field_validator("randaugment")
    @classmethod
    def _is_known(cls, value: str | None) -> str | None:
        if value is not None and not WORDS.fullmatch(value):
            raise ConfigError(
                f"views.randaugment {value!r} is not RandAugment in timm's words",
                "write it as rand-m9-mstd0.5-inc1: rand, then any of m9, mstd0.5, mmax10, inc1, n2, p0.5 and t3a",
            )
        return value

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        if self.randaugment is not None and self.colour_jitter:
            raise ConfigError(
                f"views.colour_jitter {self.colour_jitter:g} has no effect beside views.randaugment {self.randaugment}",
                "use one of them: --views.colour-jitter 0 or --views.randaugment None",
            )
        return self


class SupervisedViews:
    """Crops of each image, one or config.repeats of them.

    image_size: of the crops, in pixels; mean: of RGB in [0, 1], which fills what RandAugment moves into the picture.
    Raises ConfigError if min_scale is more than max_scale.
    """

    def __init__(
        self, config: SupervisedViewsConfig, *, image_size: int, mean: tuple[float, float, float]
    ) -> None:
        self.num_views = config.repeats
        self.image_size = image_size
        names = CropConfig.model_fields.keys() & SupervisedViewsConfig.model_fields.keys()
        values = {name: getattr(config, name) for name in names}
        self._crop = RandomCrop(CropConfig(image_size=image_size, **values))
        self._words, self._mean = config.randaugment, mean
        self._interpolation: Interpolation = config.interpolation
        jitter = config.colour_jitter
        self._strengths = ColourStrengths(jitter, jitter, jitter, jitter_probability=1.0) if jitter else None

    def __call__(self, image: Pixels, random: np.random.Generator) -> Sample:
        """The crops of an image, and the colour parameters of each where there is jitter."""
        crops = [self._augmented(image, random) for _ in range(self.num_views)]
        if self._strengths is None:
            return Sample(crops, [])
        return Sample(crops, [colour_ops.draw(self._strengths, random) for _ in crops])

    @torch.no_grad()
    def finish(self, crops: list[Tensor], colour: list[Tensor]) -> list[Tensor]:
        """(B, 3, H, W) float32 in [0, 1] a crop, with their colours changed."""
        batches = self._crop.finish(crops, colour)
        if self._strengths is None:
            return batches
        with torch.autocast(crops[0].device.type, enabled=False):
            return [
                colour_ops.apply(batch, drawn, self._strengths)
                for batch, drawn in zip(batches, colour, strict=True)
            ]

    @cached_property
    def _randaugment(self) -> Any:
        """The transform; made in each worker when it is first needed."""
        assert self._words is not None, "asked for where RandAugment is on"
        return _rand_augment(self._words, self.image_size, self._mean, self._interpolation)

    def _augmented(self, image: Pixels, random: np.random.Generator) -> Tensor:
        crop = self._crop(image, random).crops[0]
        if self._words is None:
            return crop
        picture = Image.fromarray(crop.permute(1, 2, 0).numpy())
        with seeded_globals(random):
            picture = self._randaugment(picture)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


@contextmanager
def seeded_globals(random: np.random.Generator) -> Iterator[None]:
    """Python's and NumPy's global generators, seeded from `random` inside and as they were afterwards."""
    before = python_random.getstate(), np.random.get_state()
    first, second = random.integers(0, 2**32, 2).tolist()
    try:
        python_random.seed(first)
        np.random.seed(second)
        yield
    finally:
        python_random.setstate(before[0])
        np.random.set_state(before[1])


def _rand_augment(
    words: str, image_size: int, mean: tuple[float, float, float], interpolation: Interpolation
) -> Any:
    """RandAugment as timm's training transform builds it."""
    from timm.data.auto_augment import rand_augment_transform

    settings = {
        "translate_const": int(image_size * TRANSLATION),
        "img_mean": tuple(min(255, round(255 * value)) for value in mean),
        "interpolation": Image.Resampling[interpolation.upper()],
    }
    transform = rand_augment_transform(words, settings)
    for operation in transform.ops:
        if operation.name.startswith("Posterize"):
            operation.aug_fn = partial(_posterize, operation.aug_fn)
    return transform


def _posterize(posterize: Any, image: Image.Image, num_bits: int, **options: Any) -> Image.Image:
    """The image with this many bits a channel; none at all, which newer Pillows refuse, leaves it black."""
    if num_bits > 0:
        posterized: Image.Image = posterize(image, num_bits, **options)
        return posterized
    return Image.new(image.mode, image.size)
