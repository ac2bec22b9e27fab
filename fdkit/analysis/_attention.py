"""What is gathered of attention while it streams by: several statistics of a model from one pass over the images.

An analysis of attention is an analysis (see `_analysis.py`) whose module also holds

- `statistic(observed, config) -> Statistic`: what gathers its numbers for one model;
- `collect(models, config) -> Analysis`: the analysis made of one table a model, as `measure` gives them.

So that several of them share one pass, the expensive part.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from pydantic import Field

from fdkit.analysis.observe import Attention, Images, Observed, backbone_of, first_images, observe_attention
from fdkit.config import Config


class AttentionConfig(Config):
    """On how many images attention is observed."""

    num_images: int = Field(default=128, ge=1)
    """Images averaged over, the first ones of the data."""
    batch_size: int = Field(default=8, ge=1)
    """Images a forward pass; memory grows with it, and not with the number of images."""


class Statistic(Protocol):
    """Something gathered of one model's attention, block by block; its memory does not grow with the images."""

    def begin(self, images: Images) -> None:
        """Called before the attention of a batch."""

    def add(self, layer: int, attention: Attention) -> None:
        """Called with each layer's attention of the batch; the tensor must not be kept."""

    def numbers(self) -> dict[str, Any]:
        """Plain data, once all images were seen."""


def measure(
    observed: Observed, statistics: Sequence[Statistic], config: AttentionConfig
) -> list[dict[str, Any]]:
    """For each statistic, its numbers of one model: "name", "num_images", "image_size", "patch_size" and its own.

    Raises ConfigError if the model's attention cannot be read, DataError if there are no images.
    """
    backbone = backbone_of(observed.model)
    num_images = 0

    def visit(layer: int, attention: Attention) -> None:
        for statistic in statistics:
            statistic.add(layer, attention)

    for images in first_images(observed, config.num_images):
        for statistic in statistics:
            statistic.begin(images)
        observe_attention(observed.model, images.pixels, visit)
        num_images += len(images.pixels)
    common = {
        "name": observed.name,
        "num_images": num_images,
        "image_size": backbone.image_size,
        "patch_size": backbone.patch_size,
    }
    return [common | statistic.numbers() for statistic in statistics]
