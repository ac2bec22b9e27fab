"""Attention, tokens and images of a model, one block and one batch at a time.

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

from fdkit.errors import ConfigError, DataError
from fdkit.models.backbone import Backbone, Tokens
from fdkit.models.layers import list_layers
from fdkit.models.patches import patch_grid

if TYPE_CHECKING:
    from fdkit.teachers.teacher import Teacher

READABLE = (
    "attention is read of ViT, BEiT, EVA, DINOv3, Swin and Swin V2 of timm, and of CLIP of timm or open_clip"
)


class Images(NamedTuple):
    """Some of the images, in the order of the data."""

    pixels: Tensor
    """(B, 3, H, W), RGB in [0, 1]."""
    labels: Tensor | None = None
    """(B,) int64, positions in the classes; -1 or None where unlabelled."""
    indices: Tensor | None = None
    """(B,) int64, which images of the data these are; None where nobody counts."""


class Observed(NamedTuple):
    """A model, and the images to observe it on."""

    name: str
    """What figures and tables call the model."""
    model: "Backbone | Teacher"
    batches: Iterable[Images]
    """The model's own evaluation crops, batch by batch; iterating again reads them again."""
    classes: tuple[str, ...] = ()
    """Class names, in the order of the labels."""
    describe: Callable[[int], str] = str
    """What messages call an image, by its index."""


class Attention(NamedTuple):
    """The attention of one block for B images, in W windows each; global attention is one window of all tokens."""

    weights: Tensor
    """(B, W, H, N, N): each row a softmax over the N tokens of its window."""
    places: Tensor
    """(W, N) int64: the patch of the block's grid, row-major, that a token is; -1 for prefix tokens and padding."""
    grid: tuple[int, int]
    """(h, w): rows and columns of patches in this block."""
    stride: float
    """Input pixels between neighbouring patches."""

    @property
    def num_heads(self) -> int:
        """H."""
        return self.weights.shape[2]


Visit: TypeAlias = Callable[[int, Attention], None]
"""Called with a layer's number, from 0, and its attention."""


def first_images(observed: Observed, count: int, *, at_least: int = 1) -> Iterator[Images]:
    """The first `count` images on the model's device, or all if there are fewer, batch by batch.

    Raises DataError, at the end, if there are fewer than `at_least`.
    """
    device = backbone_of(observed.model).mean.device
    num_images = 0
    for batch in observed.batches:
        left = count - num_images
        labels, indices = (None if part is None else part[:left] for part in (batch.labels, batch.indices))
        pixels = batch.pixels[:left].to(device)
        num_images += len(pixels)
        yield Images(pixels, labels, indices)
        if num_images >= count:
            break
    if num_images == 0:
        raise DataError(f"there are no images to observe {observed.name} on")
    if num_images < at_least:
        raise DataError(
            f"{num_images} images are too few to observe {observed.name} on: {at_least} are needed",
            "give more images" if count >= at_least else f"use --num-images {at_least} or more",
        )


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
    found. The attention is the one the model multiplies its values with, biases, rotations and masks of shifted
    windows included; a visitor that keeps the tensor keeps its memory.
    Raises ConfigError if the attention of a block cannot be read.
    """
    backbone = backbone_of(model)
    reader = _Reader(visit, batch_size=len(images), layout=_global_layout(backbone))
    with _evaluating(backbone), _reading(backbone.network, reader):
        # Not the compiled call, if there is one: hooks must see each block.
        tokens: Tokens = backbone.forward(images.to(backbone.mean.device))
    if reader.num_layers == 0:
        raise ConfigError(f"{type(backbone.network).__name__} has no attention to observe", READABLE)
    return tokens


@torch.no_grad()
def observe_layers(model: "Backbone | Teacher", images: Tensor) -> tuple[Tokens, ...]:
    """Tokens of every layer of images (B, 3, H, W) in [0, 1], first to last, as the layer leaves them: no final norm.

    Layers are the blocks of a transformer and the stages of a Swin, ConvNeXt or ResNet. Evaluation mode, no gradients.
    Raises ConfigError for a network whose layers are not known.
    """
    backbone = backbone_of(model)
    layers = range(len(list_layers(backbone.network)))
    with _evaluating(backbone):
        return backbone.encode_layers(images.to(backbone.mean.device), layers, norm=False)


@torch.no_grad()
def observe_tokens(model: "Backbone | Teacher", images: Tensor) -> Tokens:
    """Final tokens of images (B, 3, H, W) in [0, 1], in evaluation mode and without gradients."""
    backbone = backbone_of(model)
    with _evaluating(backbone):
        tokens: Tokens = backbone(images.to(backbone.mean.device))
    return tokens


class _Layout(NamedTuple):
    """Where the tokens of a block stand, see Attention."""

    places: Tensor
    grid: tuple[int, int]
    stride: float


def _global_layout(backbone: Backbone) -> _Layout:
    rows, columns = patch_grid(backbone)
    prefix = torch.full((num_attended_prefix_tokens(backbone),), -1)
    places = torch.cat([prefix, torch.arange(rows * columns)])
    return _Layout(places[None].to(backbone.mean.device), (rows, columns), float(backbone.patch_size))


class _Reader:
    """Checks each attention and passes it on, numbered in the order of execution."""

    def __init__(self, visit: Visit, *, batch_size: int, layout: _Layout) -> None:
        self.visit = visit
        self.batch_size = batch_size
        self.global_layout = layout
        self.windows: _Layout | None = None
        """Of the windowed block that is being run, if one is."""
        self.num_layers = 0

    def read(self, module: Any, attention: Tensor) -> None:
        layout = self.windows or self.global_layout
        num_windows, num_tokens = layout.places.shape
        expected = (self.batch_size * num_windows, module.num_heads, num_tokens, num_tokens)
        if tuple(attention.shape) != expected:
            raise ConfigError(
                f"{type(module).__name__} attends in a shape that is not read: {tuple(attention.shape)}, "
                f"while all {num_tokens} tokens attending to all would be {expected}",
                READABLE,
            )
        weights = attention.unflatten(0, (self.batch_size, num_windows))
        self.visit(self.num_layers, Attention(weights, *layout))
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
    if _is_windowed_block(module):
        return _attach_windows(module, reader)
    if not hasattr(module, "attn_drop") and not hasattr(module, "fused_attn"):
        return []
    return _attach_dropout(module, reader)


def _is_windowed_block(module: nn.Module) -> bool:
    from timm.models.swin_transformer import SwinTransformerBlock
    from timm.models.swin_transformer_v2 import SwinTransformerV2Block

    return isinstance(module, (SwinTransformerBlock, SwinTransformerV2Block))


def _attach_windows(block: nn.Module, reader: _Reader) -> list[RemovableHandle]:
    """While the block runs, the reader knows where the tokens of its windows stand."""

    def enter(block: nn.Module, args: tuple[Tensor]) -> None:
        height, width = args[0].shape[1:3]
        layout = reader.global_layout
        pixels = layout.grid[1] * layout.stride
        places = _window_places(block, height, width).to(layout.places.device)
        reader.windows = _Layout(places, (height, width), pixels / width)

    def leave(block: nn.Module, args: Any, output: Any) -> None:
        reader.windows = None

    return [block.register_forward_pre_hook(enter), block.register_forward_hook(leave)]


class _SeenWindows(nn.Module):
    """Stands in for a block's attention and keeps what it is given, (W, N, 1)."""

    windows: Tensor

    def forward(self, windows: Tensor, mask: Tensor | None = None) -> Tensor:
        self.windows = windows
        return windows


def _window_places(block: Any, height: int, width: int) -> Tensor:
    """(W, N): which place of the map each token of each window is, from the block's own shift and partition.

    The number of every place takes the way of the tokens; padding brings zeros.
    """
    numbers = torch.arange(1, height * width + 1, dtype=torch.float32, device=block.norm1.weight.device)
    seen, attention = _SeenWindows(), block.attn
    block.attn = seen
    try:
        block._attn(numbers.view(1, height, width, 1))
    finally:
        block.attn = attention
    return seen.windows.squeeze(-1).long() - 1


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
