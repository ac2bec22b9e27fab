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

from fdkit.errors import ConfigError, DataError, NumericsError
from fdkit.models.backbone import Backbone, Tokens
from fdkit.models.layers import list_layers
from fdkit.models.patches import patch_grid

if TYPE_CHECKING:
    from fdkit.teachers.teacher import Teacher

READABLE = (
    "attention is read of ViT, BEiT, EVA, DINOv3, Swin and Swin V2 of timm, and of CLIP of timm or open_clip"
)
ROW_SUM_TOLERANCE = 0.02
"""A softmax in bfloat16 sums to 1 within this."""


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
    visible: Tensor | None = None
    """(W, N, N) bool: whether a query sees a key; None where all tokens of a window see all. Windows that a shift
    makes of parts from opposite edges hide the parts from each other."""

    @property
    def num_heads(self) -> int:
        """H."""
        return self.weights.shape[2]

    @property
    def is_patch(self) -> Tensor:
        """(W, N) bool: which tokens are patches; the others are prefix tokens and padding."""
        return self.places >= 0

    def sees(self) -> Tensor:
        """(W, N, N) bool: whether a query sees a key."""
        num_windows, num_tokens = self.places.shape
        if self.visible is not None:
            return self.visible
        return self.places.new_ones(num_windows, num_tokens, num_tokens, dtype=torch.bool)

    def among_patches(self) -> Tensor:
        """(B, H, h*w, h*w): attention of each patch of the map to each, row-major; 0 between different windows.

        Rows sum to less than 1 by what prefix tokens and padding get. For large maps in windows this is large.
        """
        return on_map(self.weights.transpose(1, 2), self.places, self.grid[0] * self.grid[1])


def on_map(weights: Tensor, places: Tensor, num_patches: int) -> Tensor:
    """(..., h*w, h*w) of attention in windows (..., W, N, N): patches at their places, 0 between windows.

    places: (W, N) as in `Attention`.
    """
    window, token = (places >= 0).nonzero(as_tuple=True)
    queries = weights[..., window, token, :]  # (..., h*w, N), as every patch lies in one window
    keys = places[window].clamp_min(0).expand(queries.shape)
    queries = queries * (places[window] >= 0)
    rows = torch.zeros(*queries.shape[:-1], num_patches, dtype=weights.dtype, device=weights.device)
    rows.scatter_add_(-1, keys, queries)
    whole = torch.zeros_like(rows)
    whole[..., places[window, token], :] = rows
    return whole


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
    reader = _Reader(visit, batch_size=len(images), layout=_global_layout(backbone, images))
    with evaluating(backbone), _reading(backbone.network, reader):
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
    with evaluating(backbone):
        return backbone.encode_layers(images.to(backbone.mean.device), layers, norm=False)


@torch.no_grad()
def observe_tokens(model: "Backbone | Teacher", images: Tensor) -> Tokens:
    """Final tokens of images (B, 3, H, W) in [0, 1], in evaluation mode and without gradients."""
    backbone = backbone_of(model)
    with evaluating(backbone):
        tokens: Tokens = backbone(images.to(backbone.mean.device))
    return tokens


@torch.no_grad()
def observe_pooling(model: "Backbone | Teacher", tokens: Tokens) -> Tensor | None:
    """Attention of the query by which a model pools its final tokens, (B, H, N); None if it pools otherwise.

    tokens: all final tokens, as `observe_attention` returns them; N: those that the pooling reads, patches last, and
    each row sums to 1. Several queries are averaged, as far as the model's own pooling averages them.
    Raises ConfigError if the pooling cannot be read.
    """
    from timm.layers import AttentionPoolLatent

    backbone = backbone_of(model)
    network: Any = getattr(backbone.network, "trunk", backbone.network)
    pooling = getattr(network, "attn_pool", None)
    if not isinstance(pooling, AttentionPoolLatent):
        return None
    features = tokens.all()
    if tokens.prefix.shape[1] != num_attended_prefix_tokens(backbone):
        raise ConfigError(
            f"{type(network).__name__} pools {num_attended_prefix_tokens(backbone)} register tokens by attention, "
            "which are not among its final tokens"
        )
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        seen.append(output)

    handles = [part.register_forward_hook(keep) for part in (pooling.q_norm, pooling.k_norm)]
    try:
        with evaluating(backbone):
            network.forward_head(features, pre_logits=True)
    finally:
        for handle in handles:
            handle.remove()
    query, key = seen
    attention = (pooling.scale * query @ key.transpose(-2, -1)).softmax(-1)
    return attention.mean(2) if pooling.pool == "avg" else attention[:, :, 0]


class _Layout(NamedTuple):
    """Where the tokens of a block stand, see Attention."""

    places: Tensor
    grid: tuple[int, int]
    stride: float
    visible: Tensor | None = None


def _global_layout(backbone: Backbone, images: Tensor) -> _Layout:
    """Of all tokens together; images of a further size that the backbone takes as it is have a grid of their own."""
    rows, columns = patch_grid(backbone)
    height, width = images.shape[-2:]
    if height == width and height in backbone.sizes:
        rows = columns = height // backbone.patch_size
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
        _check_softmax(module, attention[0])
        weights = attention.unflatten(0, (self.batch_size, num_windows))
        self.visit(self.num_layers, Attention(weights, *layout))
        self.num_layers += 1


def _check_softmax(module: nn.Module, attention: Tensor) -> None:
    """Raises ConfigError if the rows of (H, N, N) are no distribution, NumericsError if they are not finite."""
    sums = attention.sum(-1, dtype=torch.float32)
    name = type(module).__name__
    if not bool(sums.isfinite().all()):
        raise NumericsError(
            f"the attention of {name} holds values that are not finite",
            "the weights are damaged, or overflow in this precision: use float32",
        )
    if float((sums - 1).abs().max()) > ROW_SUM_TOLERANCE:
        raise ConfigError(
            f"what {name} multiplies its values with does not sum to 1 for each query", READABLE
        )


@contextmanager
def evaluating(backbone: Backbone) -> Iterator[None]:
    """The whole batch goes through in evaluation mode, in one part; afterwards all is as before."""
    modes = [(module, module.training) for module in backbone.modules()]
    num_parts = backbone.num_parts
    backbone.num_parts = 1
    backbone.eval()
    try:
        yield
    finally:
        backbone.num_parts = num_parts
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
        for name, module in network.named_modules():
            handles += _attach(module, reader, stride=_stage_stride(network, name))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in fused:
            module.fused_attn = True


def _stage_stride(network: nn.Module, name: str) -> float:
    """Input pixels between the tokens of a module of this name, where its network has stages and states them; or 0."""
    owner, name = getattr(network, "trunk", network), name.removeprefix("trunk.")
    for info in getattr(owner, "feature_info", None) or []:
        if name.startswith(f"{info['module']}."):
            return float(info["reduction"])
    return 0.0


def _attach(module: nn.Module, reader: _Reader, *, stride: float) -> list[RemovableHandle]:
    if isinstance(module, nn.MultiheadAttention):
        return _attach_multihead(module, reader)
    if _is_windowed_block(module):
        return _attach_windows(module, reader, stride)
    if not hasattr(module, "attn_drop") and not hasattr(module, "fused_attn"):
        return []
    return _attach_dropout(module, reader)


def _is_windowed_block(module: nn.Module) -> bool:
    from timm.models.swin_transformer import SwinTransformerBlock
    from timm.models.swin_transformer_v2 import SwinTransformerV2Block

    return isinstance(module, (SwinTransformerBlock, SwinTransformerV2Block))


def _attach_windows(block: nn.Module, reader: _Reader, stride: float) -> list[RemovableHandle]:
    """While the block runs, the reader knows where the tokens of its windows stand; stride: see `Attention`."""

    def enter(block: nn.Module, args: tuple[Tensor]) -> None:
        height, width = args[0].shape[1:3]
        places, visible = _window_places(block, height, width)
        reader.windows = _Layout(places, (height, width), stride, visible)

    def leave(block: nn.Module, args: Any, output: Any) -> None:
        reader.windows = None

    return [block.register_forward_pre_hook(enter), block.register_forward_hook(leave)]


class _SeenWindows(nn.Module):
    """Stands in for a block's attention and keeps what it is given: windows (W, N, 1) and their mask."""

    windows: Tensor
    mask: Tensor | None

    def forward(self, windows: Tensor, mask: Tensor | None = None) -> Tensor:
        self.windows, self.mask = windows, mask
        return windows


def _window_places(block: Any, height: int, width: int) -> tuple[Tensor, Tensor | None]:
    """Places and visible of `Attention` for a map of this size, from the block's own shift, partition and mask.

    The number of every place takes the way of the tokens; padding brings zeros.
    """
    # float32 whatever the weights: a narrow type cannot hold the numbers
    device = block.norm1.weight.device
    numbers = torch.arange(1, height * width + 1, dtype=torch.float32, device=device)
    seen, attention = _SeenWindows(), block.attn
    kept = dict(getattr(block, "masks", {}))
    block.attn = seen
    try:
        block._attn(numbers.view(1, height, width, 1))
    finally:
        block.attn = attention
        if hasattr(block, "masks"):
            block.masks = kept
    visible = None if seen.mask is None else seen.mask == 0
    return seen.windows.squeeze(-1).long() - 1, visible


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
