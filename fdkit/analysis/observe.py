"""Attention of every block of a model, one block at a time.

Attention is computed inside fused kernels that never write it to memory. Here the fused path is off for one
forward pass and each block's softmax output is handed to a callback the moment it exists, so that no more than
one block's attention is alive, whatever the depth of the model or the number of images.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fdkit.errors import ConfigError
from fdkit.models.backbone import Backbone, Tokens
from fdkit.models.patches import patch_grid

if TYPE_CHECKING:
    from fdkit.teachers.teacher import Teacher

Visit: TypeAlias = Callable[[int, Tensor], None]
"""Called with a layer's number, from 0, and its attention (B, H, N, N): each row a softmax, prefix tokens first."""

READABLE = "global self-attention is read: ViT, BEiT, EVA and DINOv3 of timm, and CLIP of timm or open_clip"


class Observed(NamedTuple):
    """A model, and the images to observe it on."""

    name: str
    """What figures and tables call the model."""
    model: "Backbone | Teacher"
    batches: Iterable[Tensor]
    """Images (B, 3, H, W), RGB in [0, 1]; read once, batch by batch."""


def backbone_of(model: "Backbone | Teacher") -> Backbone:
    """The network behind a teacher or a student."""
    return model if isinstance(model, Backbone) else model.backbone


def num_attended_prefix_tokens(backbone: Backbone) -> int:
    """Class and register tokens that take part in attention, also those the backbone leaves out of its Tokens."""
    network = getattr(backbone.network, "trunk", backbone.network)  # open_clip wraps timm models as a trunk
    return int(getattr(network, "num_prefix_tokens", backbone.num_prefix_tokens))


@torch.no_grad()
def observe_attention(model: "Backbone | Teacher", images: Tensor, visit: Visit) -> Tokens:
    """Final tokens of the images, after `visit` saw the attention of every block in turn.

    images: (B, 3, H, W), RGB in [0, 1]. The model runs in evaluation mode without gradients and is left as it was
    found. The attention is the one the model multiplies its values with, biases and rotations included; a visitor
    that keeps the tensor keeps its memory.
    Raises ConfigError if the attention of a block cannot be read.
    """
    backbone = backbone_of(model)
    rows, columns = patch_grid(backbone)
    num_tokens = num_attended_prefix_tokens(backbone) + rows * columns
    reader = _Reader(visit, batch_size=len(images), num_tokens=num_tokens)
    with _evaluating(backbone), _reading(backbone.network, reader):
        # Not the compiled call, if there is one: hooks must see each block.
        tokens: Tokens = backbone.forward(images.to(backbone.mean.device))
    if reader.num_layers == 0:
        raise ConfigError(f"{type(backbone.network).__name__} has no attention to observe", READABLE)
    return tokens


class _Reader:
    """Checks each attention and passes it on, numbered in the order of execution."""

    def __init__(self, visit: Visit, *, batch_size: int, num_tokens: int) -> None:
        self.visit = visit
        self.batch_size = batch_size
        self.num_tokens = num_tokens
        self.num_layers = 0

    def read(self, module: Any, attention: Tensor) -> None:
        expected = (self.batch_size, module.num_heads, self.num_tokens, self.num_tokens)
        if tuple(attention.shape) != expected:
            raise ConfigError(
                f"{type(module).__name__} attends in a shape that is not read: {tuple(attention.shape)}, "
                f"while all {self.num_tokens} tokens attending to all would be {expected}; "
                "windowed and pooled attention is not read",
                READABLE,
            )
        self.visit(self.num_layers, attention)
        self.num_layers += 1


@contextmanager
def _evaluating(backbone: Backbone) -> Iterator[None]:
    modes = [(module, module.training) for module in backbone.modules()]
    backbone.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _reading(network: nn.Module, reader: _Reader) -> Iterator[None]:
    """Attention reaches the reader while the context lasts; afterwards, error or not, the network is as before."""
    fused: list[Any] = [module for module in network.modules() if getattr(module, "fused_attn", False)]
    handles: list[RemovableHandle] = []
    try:
        for module in fused:
            module.fused_attn = False
        for module in network.modules():
            handles += _attach(module, reader)
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in fused:
            module.fused_attn = True


def _attach(module: nn.Module, reader: _Reader) -> list[RemovableHandle]:
    if isinstance(module, nn.MultiheadAttention):
        return _attach_multihead(module, reader)
    if not hasattr(module, "attn_drop") and not hasattr(module, "fused_attn"):
        return []
    return _attach_dropout(module, reader)


def _attach_multihead(module: nn.MultiheadAttention, reader: _Reader) -> list[RemovableHandle]:
    """PyTorch's own module returns its weights on request."""

    def ask(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | {"need_weights": True, "average_attn_weights": False}

    def answer(module: nn.Module, args: Any, output: tuple[Tensor, Tensor]) -> None:
        reader.read(module, output[1])

    return [module.register_forward_pre_hook(ask, with_kwargs=True), module.register_forward_hook(answer)]


def _attach_dropout(module: nn.Module, reader: _Reader) -> list[RemovableHandle]:
    """The unfused path of timm sends the softmax through `attn_drop`, the identity in evaluation mode."""
    num_layers_before = 0

    def start(module: nn.Module, args: Any) -> None:
        nonlocal num_layers_before
        num_layers_before = reader.num_layers

    def read(dropout: nn.Module, args: tuple[Tensor]) -> None:
        reader.read(module, args[0])

    def end(module: nn.Module, args: Any, output: Any) -> None:
        # A block that computes attention some other way must not be left out of the numbers unnoticed.
        if reader.num_layers != num_layers_before + 1:
            raise ConfigError(f"the attention of {type(module).__name__} cannot be read", READABLE)

    handles = [module.register_forward_pre_hook(start), module.register_forward_hook(end)]
    dropout = getattr(module, "attn_drop", None)
    if isinstance(dropout, nn.Module):
        handles.append(dropout.register_forward_pre_hook(read))
    return handles
