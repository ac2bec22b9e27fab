"""What one training step of a method does, found out without doing it: operations, memory and traffic.

The method's own forward and backward run on tensors that have shapes and no values, so every method, network and
loss is counted as it stands, a large one in seconds. Nothing is computed, downloaded or changed.
"""

import copy
import weakref
from collections import Counter
from contextlib import ExitStack
from typing import Any, Literal, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from fdkit.data.segmentation_views import SegmentationCrop
from fdkit.methods._method import Duration, Method
from fdkit.models import attention
from fdkit.training.activations import cache_batch, checkpoint_activations
from fdkit.training.parts import PARTS, Part, teachers_of, watched

PICTURE = (384, 512)
"""Height and width of the image that views are tried on; only the shapes of what they make count."""


class Trace(NamedTuple):
    """One process's step for one batch."""

    batch_size: int
    flops: dict[str, float]
    """Floating-point operations an image, a multiplication and an addition being two: of each part's forward pass,
    and "backward" for all of them. Stochastic depth counts as if it dropped nothing."""
    traffic: float
    """Bytes an image read and written by operations that are no matrix products, each for itself: uncompiled."""
    num_operations: int
    """Operations of the step that start work on the device, without the optimiser's."""
    peak_bytes: int
    """Most memory of the step at once, weights, optimiser and teachers not counted, gradients counted."""

    @property
    def total_flops(self) -> float:
        """Operations an image, of everything."""
        return sum(self.flops.values())


def trace_step(
    method: Method,
    *,
    batch_size: int,
    precision: Literal["fp32", "bf16"],
    on_gpu: bool,
    duration: Duration | None = None,
    checkpoint_every: int = 0,
    cached_parts: int = 1,
) -> Trace:
    """Forward and backward of a batch of one process, without computing.

    The method may be on any device, also on "meta", and stays as it is. on_gpu: attention takes the way it takes there,
    fused also with a learned bias, rather than a CPU's. checkpoint_every: how many-th block computes its activations
    twice, 0 for none. cached_parts: that networks take the batch in, as train.cached_batch has them.
    duration: of the run, with this batch_size as its part_size.
    Raises what the method raises for a batch it cannot use.
    """
    views = _view_shapes(method)
    twin, mode = _twin(method)
    if checkpoint_every:
        checkpoint_activations(twin, every=checkpoint_every)
    if cached_parts > 1:
        cache_batch(twin, cached_parts)
    for part in twin.modules():
        if isinstance(part, DropPath):
            part.drop_prob = 0.0
    twin.train()
    sizes = {"batch_size": batch_size * (duration or Duration()).world_size, "part_size": batch_size}
    twin.begin((duration or Duration())._replace(**sizes))
    counter = _Counter()
    with ExitStack() as stack:
        stack.enter_context(mode)
        # Attention that PyTorch does itself is fused on any device; a mode would not reach what is computed twice.
        stack.enter_context(patch.object(F, "scaled_dot_product_attention", _FusedAttention(counter)))
        if on_gpu:
            stack.enter_context(patch.object(attention, "attention_path", lambda *_, **__: "sdpa"))
        stack.enter_context(counter)
        batch: list[Tensor] = [
            torch.zeros(rate * batch_size, *shape, dtype=dtype) for rate, shape, dtype in views
        ]
        labels = [torch.zeros(batch_size, dtype=torch.int64)] if method.needs_labels else []
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
        with watched(twin, counter.enter, counter.leave), autocast:
            loss = twin(batch, 0.5, *labels)["loss"]
        counter.enter("backward")
        loss.backward()
    flops = {name: counter.flops[name] / batch_size for name in (*PARTS, "backward")}
    if not flops["student"]:  # a method that takes its network apart, as MAE does
        flops["student"], flops["loss"] = flops["loss"], 0.0
    return Trace(batch_size, flops, counter.traffic / batch_size, counter.num_operations, counter.peak)


def _view_shapes(method: Method) -> list[tuple[int, tuple[int, ...], torch.dtype]]:
    """Of each view of a batch: rows an image, the shape of a row, and the dtype."""
    has_mask = isinstance(method.views, SegmentationCrop)
    picture = torch.zeros(*PICTURE, 4 if has_mask else 3, dtype=torch.uint8)
    generator = np.random.Generator(np.random.Philox(0))
    samples = [method.views(picture, generator) for _ in range(2)]
    crops = [torch.stack(list(view)) for view in zip(*(one.crops for one in samples), strict=True)]
    colour = [torch.stack(list(view)) for view in zip(*(one.colour for one in samples), strict=True)]
    views = method.views.finish(crops, colour)
    return [(len(view) // 2, tuple(view.shape[1:]), view.dtype) for view in views]


def _twin(method: Method) -> tuple[Method, FakeTensorMode]:
    """A copy of the method whose tensors have no values, and the mode in which it runs."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    memo: dict[int, Any] = {}
    roots: list[nn.Module] = [method, *(teacher.backbone for teacher in teachers_of(method))]
    with mode:
        for module in [part for root in roots for part in root.modules()]:
            for weight in module.parameters(recurse=False):
                empty = torch.empty(weight.shape, dtype=weight.dtype, device="cpu")
                memo[id(weight)] = nn.Parameter(empty, requires_grad=weight.requires_grad)
            for buffer in module.buffers(recurse=False):
                memo[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")
    return copy.deepcopy(method, memo), mode


def _some_number(tensor: Tensor) -> float | int | bool:
    """What code reads that looks into a tensor without values, such as the share of a mixture."""
    return 0.5 if tensor.is_floating_point() else True if tensor.dtype == torch.bool else 1


_LOOKED_AT = {
    torch.ops.aten._local_scalar_dense.default: _some_number,
    torch.ops.aten.allclose.default: lambda tensor: True,
    torch.ops.aten.equal.default: lambda tensor: True,
}


class _Counter(TorchDispatchMode):
    """Counts what runs, part by part, and the memory of the tensors that live."""

    def __init__(self) -> None:
        super().__init__()
        self.part: Part | Literal["backward"] = "loss"
        self.flops: Counter[str] = Counter()
        self.traffic = 0
        self.num_operations = 0
        self.live = 0
        self.peak = 0
        self._known: set[int] = set()

    def enter(self, part: Any) -> None:
        if self.part != "backward":
            self.part = part

    def leave(self, part: Any) -> None:
        if self.part != "backward":  # where activation checkpointing enters a part again
            self.part = "loss"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _LOOKED_AT:
            return _LOOKED_AT[func](args[0])
        out = func(*args, **kwargs)
        if func.namespace == "prim":  # asking a tensor for its device
            return out
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        for tensor in outputs:
            self._remember(tensor)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops[self.part] += formula(*args, **kwargs, out_val=out)
        elif not _is_view(func) and inputs:
            self.traffic += sum(tensor.numel() * tensor.element_size() for tensor in [*inputs, *outputs])
        self.num_operations += bool(inputs) and not _is_view(func)
        return out

    def attended(self, query: Tensor, key: Tensor, value: Tensor, *, num_passes: int) -> None:
        """Count attention of (..., N, D) queries to (..., M, D) keys: two products a pass."""
        pairs = query.numel() // query.shape[-1] * key.shape[-2]
        self.flops[self.part] += num_passes * 2 * pairs * (query.shape[-1] + value.shape[-1])
        self.num_operations += 1

    def _remember(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def _is_view(func: Any) -> bool:
    """Whether an operation gives back its input under another shape, or nothing new, and so does no work."""
    arguments = func._schema.arguments
    reads = [argument.alias_info for argument in arguments if argument.alias_info is not None]
    return bool(reads) and not any(info.is_write for info in reads)


class _FusedAttention:
    """Attention as a fused kernel does it: scores are never kept, and made again in the backward pass."""

    def __init__(self, counter: _Counter) -> None:
        self.counter = counter

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any
    ) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            query, key, value = (part.to(torch.bfloat16) for part in (query, key, value))
        attended: Tensor = _Attention.apply(self.counter, query, key, value, attn_mask)
        return attended


class _Attention(torch.autograd.Function):
    """Counts two products forward and four backward; keeps what a fused kernel keeps."""

    @staticmethod
    def forward(
        ctx: Any, counter: _Counter, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.counter = counter
        ctx.mask_shape = None if mask is None or not mask.requires_grad else mask.shape
        counter.attended(query, key, value, num_passes=1)
        return query.new_empty(*query.shape[:-1], value.shape[-1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        query, key, value = ctx.saved_tensors
        ctx.counter.attended(query, key, value, num_passes=2)
        mask = None
        if ctx.mask_shape is not None:  # the kernel writes one of every image, and adds them up
            mask = query.new_empty(*query.shape[:-1], key.shape[-2]).sum_to_size(ctx.mask_shape)
        return None, torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), mask
