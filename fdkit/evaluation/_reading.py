"""What is read of an image's tokens: which of them, pooled to one vector each, of how many of the last layers."""

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from fdkit.errors import ConfigError
from fdkit.models.backbone import Backbone, Tokens
from fdkit.models.layers import final_norm_fits_every_layer, list_layers

Token = Literal["cls", "registers", "patches"]
TOKENS: tuple[Token, ...] = get_args(Token)


class Part(NamedTuple):
    """The columns of a feature that one kind of token of one layer fills."""

    layer: int
    """Counted from the end: -1 is the last."""
    token: Token
    start: int
    """First column."""
    stop: int
    """Column behind the last."""

    @property
    def name(self) -> str:
        """Such as "patches of layer -1"."""
        return f"{self.token} of layer {self.layer}"


class Reading(NamedTuple):
    """Tokens of the last layers, in the order in which they stand in a feature: layer by layer, deepest last."""

    tokens: tuple[Token, ...]
    num_layers: int = 1

    @property
    def pooling(self) -> str:
        """As `resolve_reading` takes it, such as "cls+patches"."""
        return "+".join(self.tokens)

    def places(self) -> list[tuple[int, Token]]:
        """(layer, token) of every part."""
        return [(layer, token) for layer in range(-self.num_layers, 0) for token in self.tokens]


def resolve_reading(backbone: Backbone, pooling: str, num_layers: int = 1) -> Reading:
    """The tokens that a pooling names, in the order class token, registers, patches.

    pooling: "cls", "patches" (their mean), "registers" (their mean), several with + between; or "auto", the class
    token where the model has one, else the patches.
    Raises ConfigError for a token the model does not have, an unknown word, or more layers than there are.
    """
    num_prefix = backbone.num_prefix_tokens
    words = pooling.split("+") if pooling != "auto" else ["cls" if num_prefix else "patches"]
    if unknown := [word for word in words if word not in TOKENS]:
        raise ConfigError(
            f"pooling {pooling}: {unknown[0]!r} is no kind of token",
            f"use auto, {', '.join(TOKENS)}, or several such as cls+patches",
        )
    if len(set(words)) < len(words):
        raise ConfigError(f"pooling {pooling} names a token twice", "name each once")
    if "cls" in words and num_prefix == 0:
        raise ConfigError(f"pooling is {pooling}, but the model has no class token", "use --pooling patches")
    if "registers" in words and num_prefix < 2:
        raise ConfigError(
            f"pooling is {pooling}, but the model has no register tokens", "leave registers out of --pooling"
        )
    if num_layers > 1 and num_layers > (depth := len(list_layers(backbone.network))):
        raise ConfigError(
            f"the last {num_layers} layers are asked for, but the model has {depth}", f"use --layers {depth}"
        )
    return Reading(tuple(token for token in TOKENS if token in words), num_layers)


def reader(backbone: Backbone, reading: Reading) -> Callable[[Tensor], list[Tensor]]:
    """What maps images (B, 3, H, W), RGB in [0, 1], to one (B, C) a part, in the order of `reading.places()`.

    Earlier layers go through the final norm, as in DINO's linear evaluation (Caron et al. 2021), where it fits them;
    stages of a Swin, ConvNeXt or ResNet before the last are read as they are, as in EsViT's.
    """
    if reading == Reading(("cls",)) or reading == Reading(("patches",)):
        (token,) = reading.tokens
        only: Literal["cls", "patches"] = "cls" if token == "cls" else "patches"
        return lambda images: [backbone.pooled(images, only)]
    if reading.num_layers == 1:
        return lambda images: _pooled(backbone(images), reading.tokens)
    layers = range(-reading.num_layers, 0)
    fits = final_norm_fits_every_layer(backbone.network)
    norms = [fits or layer == -1 for layer in layers]

    def read(images: Tensor) -> list[Tensor]:
        per_layer = backbone.encode_layers(images, layers, norm=norms)
        return [vector for tokens in per_layer for vector in _pooled(tokens, reading.tokens)]

    return read


def parts_of(backbone: Backbone, reading: Reading, device: torch.device) -> tuple[Part, ...]:
    """The columns of every part, from one black image."""
    size = backbone.image_size
    with torch.no_grad():
        vectors = reader(backbone, reading)(torch.zeros(1, 3, size, size, device=device))
    parts, start = [], 0
    for (layer, token), vector in zip(reading.places(), vectors, strict=True):
        parts.append(Part(layer, token, start, start + vector.shape[1]))
        start += vector.shape[1]
    return tuple(parts)


def _pooled(tokens: Tokens, wanted: tuple[Token, ...]) -> list[Tensor]:
    values: dict[Token, Callable[[], Tensor]] = {
        "cls": lambda: tokens.prefix[:, 0],
        "registers": lambda: tokens.prefix[:, 1:].mean(dim=1),
        "patches": lambda: tokens.patches.mean(dim=1),
    }
    return [values[token]() for token in wanted]
