"""One vector an image of any layer, and how many images an analysis of such vectors reads."""

from collections.abc import Sequence
from typing import Any

from pydantic import Field
from torch import Tensor

from fdkit.analysis.observe import Observed, observe_layers, observe_tokens
from fdkit.config import Config
from fdkit.errors import ConfigError, NumericsError
from fdkit.models.backbone import Pooling, Tokens, pool

POOLING_WORDS: dict[str, str] = {"patches": "mean of patch tokens", "cls": "class token"}


class FeatureConfig(Config):
    """Which vector stands for an image, and on how many images it is read."""

    pooling: Pooling = "patches"
    """One vector an image: patches, the mean of its patch tokens, or cls, the class token."""
    num_images: int = Field(default=512, ge=1)
    """Images read, drawn from the data with the seed."""
    batch_size: int = Field(default=32, ge=1)
    """Images a forward pass; memory grows with it."""


def final_features(observed: Observed, images: Tensor, pooling: Pooling) -> Tensor:
    """What the model says of images (B, 3, H, W) at its end, its final norm included; (B, C) float32 on the CPU.

    Raises ConfigError for the class token of a model without one, NumericsError if a value is not finite.
    """
    return _pooled(observed, observe_tokens(observed.model, images), pooling, "the final features")


def layer_features(observed: Observed, images: Tensor, pooling: Pooling) -> list[Tensor]:
    """The same of every layer, first to last, as the layer leaves it: no final norm. Widths may differ.

    Raises ConfigError, too, for a model whose layers are not known.
    """
    layers = observe_layers(observed.model, images)
    return [
        _pooled(observed, tokens, pooling, f"the features of layer {number}")
        for number, tokens in enumerate(layers, start=1)
    ]


def _pooled(observed: Observed, tokens: Tokens, pooling: Pooling, what: str) -> Tensor:
    try:
        features = pool(tokens, pooling).float().cpu()
    except ConfigError as error:
        raise ConfigError(f"{observed.name}: {error.message}", error.hint) from error
    if not features.isfinite().all():
        raise NumericsError(
            f"{what} of {observed.name} are not finite",
            "the weights may be damaged, or training has diverged; if --precision is bf16, try fp32",
        )
    return features


def need_models(observed: Sequence[Observed], analysis: str) -> None:
    """Raises ConfigError if there is no model, or if two have one name, which figures could not tell apart."""
    if not observed:
        raise ConfigError(f"{analysis} needs a model")
    names = [one.name for one in observed]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"{analysis}: two models are called {', '.join(twice)}", "give each its own name")


def each_model(models: Sequence[dict[str, Any]], field: str) -> str:
    """For messages: each model's name with one of its numbers."""
    return ", ".join(f"{model['name']} {model[field]}" for model in models)
