"""A part of a source, as a source."""

import hashlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from fdkit.data.sources import ImageSource
from fdkit.data.views import Pixels


class Subset:
    """The images of a source at the given positions, in that order; classes keep their numbers."""

    def __init__(self, source: ImageSource, indices: Sequence[int] | np.ndarray) -> None:
        self.source = source
        self.indices = np.asarray(indices, dtype=np.int64)
        self.name = source.name
        self.classes = source.classes
        self.labels = None if source.labels is None else source.labels[self.indices]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the whole source's fingerprint and the positions."""
        return self._stamped(self.source.fingerprint)

    @property
    def content_stamp(self) -> str:
        """Likewise of its content stamp, where it has one."""
        return self._stamped(getattr(self.source, "content_stamp", self.source.fingerprint))

    def _stamped(self, stamp: str) -> str:
        digest = hashlib.sha256(stamp.encode())
        digest.update(self.indices.tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> Image.Image:
        """The image; raises BadImage if it cannot be read."""
        return self.source.read(int(self.indices[index]))

    def read_pixels(self, index: int) -> Pixels:
        """The image by the source's quickest way; raises BadImage if it cannot be read."""
        read = getattr(self.source, "read_pixels", self.source.read)
        pixels: Pixels = read(int(self.indices[index]))
        return pixels

    def describe(self, index: int) -> str:
        """What messages call the image."""
        return self.source.describe(int(self.indices[index]))
