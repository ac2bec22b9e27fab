"""Views that come again: every V-th epoch shows an image the same crops, so that what is known of them can be kept."""

from typing import Any

import numpy as np
from torch import Tensor

from fdkit.data.views import Pixels, Sample, Views


class RepeatedViews:
    """Views drawn in epoch e as in epoch e % num_epochs; the order of the images stays each epoch's own.

    The loader hands out a Philox generator whose counter says where it stands: (.., .., index, epoch).
    """

    def __init__(self, views: Views, num_epochs: int) -> None:
        self.views = views
        self.num_views = views.num_views
        self.image_size = views.image_size
        self.num_epochs = num_epochs

    def __call__(self, image: Pixels, random: np.random.Generator) -> Sample:
        """The views of an image, drawn as in one of the first epochs."""
        self.rewind(random)
        return self.views(image, random)

    def rewind(self, random: np.random.Generator) -> tuple[int, int]:
        """Set the generator to the epoch that is repeated; that epoch and the index of the image."""
        state: dict[str, Any] = dict(random.bit_generator.state)
        if state["bit_generator"] != "Philox":
            raise ValueError(f"views repeat with the loader's Philox generator, not {state['bit_generator']}")
        counter = state["state"]["counter"].copy()
        index, epoch = int(counter[2]), int(counter[3]) % self.num_epochs
        counter[3] = epoch
        random.bit_generator.state = state | {"state": state["state"] | {"counter": counter}}
        return epoch, index

    def finish(self, crops: list[Tensor], colour: list[Tensor]) -> list[Tensor]:
        """(B, 3, H, W) float32 in [0, 1] a view."""
        return self.views.finish(crops, colour)
