"""What is gathered of attention while it streams by: several statistics of a model from one pass over the images.

An analysis of attention is an analysis (see `_analysis.py`) whose module also holds

- `statistic(observed, config) -> Statistic`: what gathers its numbers for one model;
- `collect(models, config) -> Analysis`: the analysis made of one table a model, as `measure` gives them.

So that several of them share one pass, the expensive part.
"""

import math
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from pydantic import Field
from torch import Tensor

from fdkit.analysis.observe import Attention, Images, Observed, backbone_of, first_images, observe_attention
from fdkit.config import Config
from fdkit.errors import ConfigError, NumericsError
from fdkit.models.backbone import Tokens


class AttentionConfig(Config):
    """On how many images attention is observed."""

    num_images: int = Field(default=128, ge=1)
    """Images averaged over, drawn from the data with the seed."""
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


@runtime_checkable
class ReadsTokens(Protocol):
    """A statistic that also reads what the model ends with."""

    def end(self, tokens: Tokens) -> None:
        """Called with the final tokens of each batch, after its last layer."""


def measure(
    observed: Observed, statistics: Sequence[Statistic], config: AttentionConfig
) -> list[dict[str, Any]]:
    """For each statistic, its numbers of one model: "name", "num_images", "image_size", "patch_size" and its own.

    Raises ConfigError if the model's attention cannot be read, DataError if there are no images, NumericsError if a
    number is not finite.
    """
    backbone = backbone_of(observed.model)
    num_images = 0

    def visit(layer: int, attention: Attention) -> None:
        for statistic in statistics:
            statistic.add(layer, attention)

    for images in first_images(observed, config.num_images):
        for statistic in statistics:
            statistic.begin(images)
        tokens = observe_attention(observed.model, images.pixels, visit)
        for statistic in statistics:
            if isinstance(statistic, ReadsTokens):
                statistic.end(tokens)
        num_images += len(images.pixels)
    common = {
        "name": observed.name,
        "num_images": num_images,
        "image_size": backbone.image_size,
        "patch_size": backbone.patch_size,
    }
    tables = [common | statistic.numbers() for statistic in statistics]
    if not all(_is_finite(table) for table in tables):
        raise NumericsError(
            f"the attention of {observed.name} holds values that are not finite",
            "the weights are damaged, or overflow in this precision: use float32",
        )
    return tables


def _is_finite(numbers: Any) -> bool:
    if isinstance(numbers, dict):
        return all(_is_finite(value) for value in numbers.values())
    if isinstance(numbers, list):
        return all(_is_finite(value) for value in numbers)
    return not isinstance(numbers, float) or math.isfinite(numbers)


class LayerMeans:
    """Means over images of what each layer gives, on the CPU; dtype: of the sums."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        self._dtype = dtype
        self._sums: list[Tensor] = []
        self._num_images: list[int] = []

    def __len__(self) -> int:
        """Layers met so far."""
        return len(self._sums)

    def add(self, layer: int, means: Tensor, num_images: int) -> None:
        """means: of the images of one batch, of any shape, the same each time."""
        if layer == len(self._sums):
            self._sums.append(torch.zeros(means.shape, dtype=self._dtype))
            self._num_images.append(0)
        # In place: small tensors made between large ones would keep the allocator from reusing memory.
        self._sums[layer].add_(means.to(self._dtype).cpu(), alpha=num_images)
        self._num_images[layer] += num_images

    def means(self) -> list[Tensor]:
        """One a layer, each image counting alike."""
        return [total / count for total, count in zip(self._sums, self._num_images, strict=True)]


def layer_position(layer: int, num_layers: int, *, name: str) -> int:
    """The layer's number from 0, where negative numbers count from the end. Raises ConfigError if there is none."""
    if not -num_layers <= layer < num_layers:
        raise ConfigError(
            f"layer {layer}: {name} has {num_layers} layers with attention",
            f"use 0 to {num_layers - 1}, or -{num_layers} to -1 to count from the end",
        )
    return layer % num_layers


def require_models(count: int, analysis: str) -> None:
    """Raises ConfigError if there is no model to observe."""
    if count == 0:
        raise ConfigError(f"{analysis} needs a model")
