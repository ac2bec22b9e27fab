"""The built-in demonstration set: coloured handwritten digits on crops of two photos, 32 x 32, made where it is used.

Made of what scikit-learn installs, so it needs no network. Pixels alone tell little: size, place, slant and colours
of a stroke are drawn anew in every image, and its background is a faint piece of a photo. Measured accuracy on the
test split, of 10 classes: raw pixels, 20 cosine nearest neighbours, PLACEHOLDER.

No digit is in both splits: 1,347 are for training, in four renderings each, 450 for testing, in two.
"""

from functools import cache

import numpy as np
from PIL import Image

from fdkit.data.sources import ArraySource
from fdkit.errors import DataError

SIZE = 32
"""Height and width of the images, in pixels."""
RENDERINGS = {"train": 4, "test": 2}
"""Images of each digit."""
CROP = (16.0, 96.0)
"""Side of the square of photo behind a digit, in its pixels."""
PHOTO_CONTRAST = 0.1
"""What is left of the photo's contrast: its structure, alike in all crops of an image, is to tell less than shape."""
BACKGROUND = (15.0, 100.0)
"""Mean luma, of 255, of a background."""
STROKE = 80.0
"""A stroke's luma is above the background's by this at least."""
ZOOM = (1.9, 2.9)
"""Image pixels to one of the 8 pixels of scikit-learn's digits: digits are 15 to 23 pixels high."""
SHIFT = 4.0
"""A digit's centre is at most this far, in pixels, from the image's, along each axis."""
SLANT = 20.0
"""Digits are turned by at most this, in degrees, either way."""
INK = (0.35, 0.65)
"""Ink, of 1, from which a pixel is partly, and from which it is wholly, stroke; sharpens the enlarged digits."""

LUMA = np.array([0.299, 0.587, 0.114])


def open_demo(split: str) -> ArraySource:
    """The demonstration images of a split, labelled 0 to 9: "train" (5,388), "test" (900) or "all", in that order.

    Image i of a split is always the same. Raises DataError for another split.
    """
    if split not in ("train", "test", "all"):
        raise DataError(f"demo: no split '{split}'", "there are train, test and all")
    parts = [_render_split(part) for part in (("train", "test") if split == "all" else (split,))]
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return ArraySource("demo", images, labels, [str(digit) for digit in range(10)])


def split_digits(split: str) -> np.ndarray:
    """(N,) positions in scikit-learn's load_digits of the split's digits, in order; every class has its share."""
    from sklearn.datasets import load_digits

    by_class = np.argsort(load_digits().target, kind="stable")
    # Of the digits sorted by class every fourth is for testing.
    return np.sort(by_class[::4] if split == "test" else np.delete(by_class, np.s_[::4]))


@cache
def _render_split(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 32, 32, 3) uint8 and labels (N,) int64; one rendering of every digit follows the other."""
    from sklearn.datasets import load_digits, load_sample_images

    bunch = load_digits()
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    digits = np.tile(split_digits(split), RENDERINGS[split])
    stream = list(RENDERINGS).index(split)
    images = np.empty((len(digits), SIZE, SIZE, 3), np.uint8)
    for index, digit in enumerate(digits):
        random = np.random.Generator(np.random.Philox(key=[stream, index]))
        images[index] = _render(bunch.images[digit], photos, random)
    return images, bunch.target[digits].astype(np.int64)


def _render(digit: np.ndarray, photos: list[Image.Image], random: np.random.Generator) -> np.ndarray:
    """(32, 32, 3) uint8; digit: (8, 8) in [0, 16]."""
    background = _background(photos[random.integers(len(photos))], random)
    colour = _brighter_colour(float((background @ LUMA).mean()) + STROKE, random)
    ink = _ink(digit, random)[..., None]
    return np.rint(np.clip(background + (colour - background) * ink, 0, 255)).astype(np.uint8)


def _background(photo: Image.Image, random: np.random.Generator) -> np.ndarray:
    """(32, 32, 3) in levels of 255: a faint, dark piece of the photo in its own tint."""
    side = random.uniform(*CROP)
    left, top = random.uniform(0, photo.width - side), random.uniform(0, photo.height - side)
    crop = photo.resize((SIZE, SIZE), Image.Resampling.BILINEAR, (left, top, left + side, top + side))
    pixels = np.asarray(crop, dtype=np.float64)
    mean = pixels.mean(axis=(0, 1))
    tint = mean * (random.uniform(*BACKGROUND) / max(1.0, float(mean @ LUMA)))
    return tint + PHOTO_CONTRAST * (pixels - mean)


def _brighter_colour(luma: float, random: np.random.Generator) -> np.ndarray:
    """(3,) in levels of 255: a colour of any hue, mixed with white until it is at least this bright."""
    colour = random.uniform(0, 255, 3)
    missing = (luma - colour @ LUMA) / (255 - colour @ LUMA)
    return colour + max(0.0, missing) * (255 - colour)


def _ink(digit: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """(32, 32) in [0, 1], 1 where the enlarged, turned and shifted digit covers the image."""
    angle, zoom = np.deg2rad(random.uniform(-SLANT, SLANT)), random.uniform(*ZOOM)
    x, y = SIZE / 2 + random.uniform(-SHIFT, SHIFT, 2)
    cos, sin = np.cos(angle) / zoom, np.sin(angle) / zoom
    # Maps a point of the image to one of the digit, whose centre, with the margin, is (8, 8).
    inverse = (cos, sin, 8 - cos * x - sin * y, -sin, cos, 8 + sin * x - cos * y)
    small = Image.fromarray(np.pad(np.rint(digit * (255 / 16)).astype(np.uint8), 4))
    large = small.transform((SIZE, SIZE), Image.Transform.AFFINE, inverse, Image.Resampling.BICUBIC)
    low, high = INK
    return np.clip((np.asarray(large) / 255 - low) / (high - low), 0, 1)
