"""The built-in demonstration set: coloured handwritten digits, 32 x 32, made on opening from scikit-learn's 8 x 8 ones.

The shape of the stroke tells the digit. Every stroke is as much brighter than its flat background, but the hues of
both and the size, place and slant of the digit are drawn anew in every image, so that pixels tell little. Of the test
images the 20 cosine nearest neighbours get right: 43 % by raw pixels, and 86 % by pixels turned grey, the invariance
that a model has to find by itself. Chance is 10 %.

Brightness is the same in all images by design, and no photo lies behind a digit: whatever tells images apart more
easily than shape, and both views of an image share, self-supervised training learns instead of shape.

No handwritten digit is in both splits: 1,347 are for training, in four renderings each, 450 for testing, in two.
"""

import math

import numpy as np
from PIL import Image

from fdkit.data.sources import ArraySource
from fdkit.errors import DataError

SIZE = 32
"""Height and width of the images, in pixels."""
RENDERINGS = {"train": 4, "test": 2}
"""Images of each digit."""
BACKGROUND, STROKE = 70, 160
"""Luma of every background and of every stroke, of 255; the nearer, the more of an image is hue."""
ZOOM = (2.0, 3.0)
"""Image pixels to one of the 8 pixels of scikit-learn's digits: digits are 16 to 24 pixels high."""
SHIFT = 4.0
"""A digit's centre is at most this far, in pixels, from the image's, along each axis."""
SLANT = 20.0
"""Digits are turned by at most this, in degrees, either way."""
INK = (0.35, 0.65)
"""Ink, of 1, from which a pixel is partly, and from which it is wholly, stroke; sharpens the enlarged digits."""
MARGIN = 2
"""Blank pixels put around scikit-learn's digits, whose strokes reach the edge, so that they end softly there too."""

LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)


def open_demo(split: str) -> ArraySource:
    """The demonstration images of a split, labelled 0 to 9: "train" (5,388), "test" (900) or "all", in that order.

    Image i of a split is always the same. Raises DataError for another split.
    """
    if split not in ("train", "test", "all"):
        raise DataError(f"demo: no split '{split}'", "there are train, test and all")
    parts = [_render_split(part) for part in (("train", "test") if split == "all" else (split,))]
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return ArraySource("demo", images, labels, [str(digit) for digit in range(10)])


def digits_of(split: str) -> np.ndarray:
    """(N,) int64: which of scikit-learn's digits the images of a split, "train" or "test", show."""
    from sklearn.datasets import load_digits

    by_class = np.argsort(load_digits().target, kind="stable")
    # Every fourth digit of each class is for testing.
    chosen = by_class[::4] if split == "test" else np.delete(by_class, np.s_[::4])
    return np.tile(np.sort(chosen), RENDERINGS[split])


def _render_split(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 32, 32, 3) uint8 and labels (N,)."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    digits = digits_of(split)
    stream = list(RENDERINGS).index(split)
    # Row i holds all that is random in image i, whatever the number of rows.
    uniform = np.random.Generator(np.random.Philox(stream)).random((len(digits), 10), dtype=np.float32)
    small = np.pad(
        np.rint(bunch.images * (255 / 16)).astype(np.uint8), ((0, 0), (MARGIN,) * 2, (MARGIN,) * 2)
    )
    large = [_place(small[digit], *row) for digit, row in zip(digits, uniform[:, 6:].tolist(), strict=True)]
    ink = np.clip((np.stack(large) / np.float32(255) - INK[0]) / (INK[1] - INK[0]), 0, 1)[..., None]
    background, stroke = (
        colours[:, None, None]  # (N, 1, 1, 3)
        for colours in (_with_luma(uniform[:, :3], BACKGROUND), _with_luma(uniform[:, 3:6], STROKE))
    )
    images = np.rint(background + (stroke - background) * ink).astype(np.uint8)
    return images, bunch.target[digits]


def _with_luma(colours: np.ndarray, luma: float) -> np.ndarray:
    """(N, 3) in [0, 255]: colours of this luma with the hues of `colours`, (N, 3) in [0, 1)."""
    colours = colours * (luma / (colours @ LUMA))[:, None]
    # Grey of this luma is mixed in until no channel exceeds 255, which leaves the luma as it is.
    room = (255 - luma) / (colours.max(axis=1) - luma)
    return luma + (colours - luma) * np.minimum(1, room)[:, None]


def _place(digit: np.ndarray, slant: float, size: float, across: float, down: float) -> np.ndarray:
    """(32, 32) uint8: the digit, uint8 with its margin, turned, enlarged and shifted.

    All four numbers are in [0, 1), from the least to the most.
    """
    angle, zoom = math.radians(SLANT * (2 * slant - 1)), ZOOM[0] + (ZOOM[1] - ZOOM[0]) * size
    x, y = SIZE / 2 + SHIFT * (2 * across - 1), SIZE / 2 + SHIFT * (2 * down - 1)
    cos, sin, centre = math.cos(angle) / zoom, math.sin(angle) / zoom, len(digit) / 2
    # Maps a point of the image to one of the digit: (x, y) to its centre.
    inverse = (cos, sin, centre - cos * x - sin * y, -sin, cos, centre + sin * x - cos * y)
    image = Image.fromarray(digit)
    return np.asarray(
        image.transform((SIZE, SIZE), Image.Transform.AFFINE, inverse, Image.Resampling.BICUBIC)
    )
