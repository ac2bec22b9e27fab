"""A source of images that are corrupted as they are read."""

import hashlib
import json
import zlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from fdkit.data.corruptions import REFERENCE_SIDE, check_name, check_severity, corrupt
from fdkit.data.sources import ImageSource

FORMAT = 1
"""Counted up when the same names and seeds would give other pixels."""


class CorruptedSource:
    """The images of a source, corrupted after decoding; their order, labels and classes stay.

    Larger images are first reduced to a short side of `short_side` pixels, bilinear, as for ImageNet-C, so that every
    model is shown the same pictures and the noise of large photographs does not vanish when they are shrunk; smaller
    ones stay as they are. Severity 0 does that alone: what corrupted images are compared with.
    An image is a function of its position in the source, the seed, the corruption and the severity.
    """

    def __init__(
        self,
        source: ImageSource,
        name: str,
        severity: int,
        *,
        seed: int = 0,
        short_side: int = REFERENCE_SIDE,
    ) -> None:
        check_name(name)
        if severity != 0:
            check_severity(severity)
        self.source = source
        self.name = source.name
        self.labels = source.labels
        self.classes = source.classes
        self.corruption = name
        self.severity = severity
        self.seed = seed
        self.short_side = short_side

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the source's fingerprint and what is done to its images."""
        return self._stamped(self.source.fingerprint)

    @property
    def content_stamp(self) -> str:
        """Likewise of its content stamp, where it has one."""
        return self._stamped(getattr(self.source, "content_stamp", self.source.fingerprint))

    def __len__(self) -> int:
        return len(self.source)

    def read(self, index: int) -> Image.Image:
        """Image `index`, corrupted. Raises BadImage if it cannot be read."""
        image = reduced(self.source.read(index), self.short_side)
        if self.severity == 0:
            return image
        random = np.random.default_rng(
            [self.seed, index, zlib.crc32(self.corruption.encode()), self.severity]
        )
        return Image.fromarray(corrupt(np.asarray(image), self.corruption, self.severity, random))

    def describe(self, index: int) -> str:
        """What messages call the image: its own name."""
        return self.source.describe(index)

    def _stamped(self, stamp: str) -> str:
        name = self.corruption if self.severity else ""  # uncorrupted images are the same, whatever the seed
        seed = self.seed if self.severity else 0
        what = [stamp, "corrupted", FORMAT, name, self.severity, seed, self.short_side]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def reduced(image: Image.Image, short_side: int) -> Image.Image:
    """The image with that short side, in pixels, if it is larger; the long side is rounded down."""
    width, height = image.size
    short = min(width, height)
    if short <= short_side:
        return image
    size = (width * short_side // short, height * short_side // short)
    return image.resize(size, Image.Resampling.BILINEAR)


def spread_positions(labels: Sequence[int] | np.ndarray, limit: int) -> np.ndarray:
    """At most `limit` positions, ascending: equally spaced in the list sorted by label: classes keep their shares."""
    order = np.argsort(np.asarray(labels), kind="stable")
    if limit >= len(order):
        return np.sort(order)
    return np.sort(order[(np.arange(limit) * len(order)) // limit])
