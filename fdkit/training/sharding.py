"""A method whose networks' blocks lie in parts on the processes (FSDP2), and what the loop needs to know of that.

Blocks hold nearly all of a large network, so they alone are cut: each process keeps a slice of rows of every parameter
in them, of its gradient and of the optimiser's state, and a block's parameters come together while it is computed. What
is left, such as embeddings, norms and heads, stays whole on every process with DistributedDataParallel around it; so a
head is free to write to its weights in the middle of a step, as SwAV's does. Momentum copies are cut like what they
follow. Teachers are no part of a method's parameters and stay whole.

The optimiser gets the slices as plain tensors: fused updates of them are those of the whole.
Source: Zhao et al. 2023 (PyTorch FSDP, arXiv 2304.11277); torch.distributed.fsdp.fully_shard cuts by parameter.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from fdkit.errors import ConfigError
from fdkit.methods._method import Method
from fdkit.models.backbone import Backbone
from fdkit.teachers.shards import Rows
from fdkit.training.compiling import repeated_blocks
from fdkit.training.distributed import World
from fdkit.training.parts import teachers_of

SHARE_OF_MEMORY = 0.25
"""Weights, gradients and optimiser's state together may take this share of a device before they are cut."""
BY_ELEMENT = {torch.optim.AdamW: ("exp_avg", "exp_avg_sq"), torch.optim.SGD: ("momentum_buffer",)}
"""Optimisers that treat every number by itself, so that a slice is updated as the whole would be, and what they keep of
each parameter in its shape."""


class Shards:
    """A method cut in place. Every process makes one, before the optimiser is built.

    twin: from `whole_twin`, before the method was compiled.
    is_bf16: a block's weights travel and compute in bfloat16; gradients are summed in float32 either way.
    Raises ConfigError for a method without blocks to cut.
    """

    def __init__(
        self, method: Method, twin: Method, world: World, device: torch.device, *, is_bf16: bool
    ) -> None:
        self.method = method
        self.world = world
        self._whole = twin
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if is_bf16 else None,
            reduce_dtype=torch.float32 if is_bf16 else None,
            cast_forward_inputs=False,  # autocast decides, as everywhere
        )
        backbones = [part for part in method.modules() if isinstance(part, Backbone)]
        blocks = [block for one in backbones for block in repeated_blocks(one) if can_be_cut(block)]
        if not blocks:
            raise ConfigError(
                f"train.parallel fsdp: {type(method.student.network).__name__} repeats no blocks that could be cut",
                "use --train.parallel ddp",
            )
        inside = {parameter for block in blocks for parameter in block.parameters()}
        outside = {parameter for parameter in method.parameters() if parameter not in inside}
        mesh = init_device_mesh(device.type, (world.size,))
        for block in blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        fully_shard(method, mesh=mesh, mp_policy=policy, ignored_params=outside)
        self.blocks: list[FSDPModule] = [block for block in blocks if isinstance(block, FSDPModule)]
        self.names = [name for name, value in method.named_parameters() if isinstance(value, DTensor)]
        self._pairs: list[tuple[DTensor, nn.Parameter]] = []
        self._marked: tuple[tuple[int, ...], Tensor] | None = None

    def take_over(self, optimizer: Optimizer) -> None:
        """Have the optimiser move this process's slices, as plain tensors.

        Raises ConfigError for one that looks at whole tensors.
        """
        if type(optimizer) not in BY_ELEMENT:
            raise ConfigError(
                f"train.parallel fsdp: {type(optimizer).__name__} needs norms of whole tensors, which lie in parts",
                "use --optim.name adamw or sgd, or --train.parallel ddp",
            )
        for group in optimizer.param_groups:
            group["params"] = [self._slice(parameter, optimizer) for parameter in group["params"]]

    def _slice(self, parameter: nn.Parameter, optimizer: Optimizer) -> nn.Parameter:
        if not isinstance(parameter, DTensor):
            return parameter
        own = nn.Parameter(parameter.to_local().detach())
        self._pairs.append((parameter, own))
        state = optimizer.state.pop(parameter, None)
        if state is not None:
            optimizer.state[own] = {
                key: value.to_local() if isinstance(value, DTensor) else value for key, value in state.items()
            }
        return own

    def take_gradients(self) -> None:
        """Hand what the backward pass left on to what the optimiser moves."""
        for parameter, own in self._pairs:
            gradient: Any = parameter.grad
            own.grad = None if gradient is None else gradient.to_local()
            parameter.grad = None

    def gradient_norms(self, parameters: list[nn.Parameter]) -> Tensor:
        """(P,): the norm of every parameter's whole gradient, in order; one exchange for all."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        squares = torch.stack(torch._foreach_norm(gradients)).square()
        is_cut = self._marks(tuple(id(one) for one in parameters if one.grad is not None), squares.device)
        total = squares * is_cut
        dist.all_reduce(total)
        return torch.where(is_cut, total, squares).sqrt()

    def _marks(self, identities: tuple[int, ...], device: torch.device) -> Tensor:
        """(P,): which of these are slices; kept on the device, as what trains seldom changes."""
        if self._marked is None or self._marked[0] != identities:
            own = {id(slice_) for _, slice_ in self._pairs}
            self._marked = (identities, torch.tensor([one in own for one in identities], device=device))
        return self._marked[1]

    def rows_of_slices(self) -> dict[int, Rows]:
        """By the identity of what the optimiser moves, which rows of a parameter it is."""
        return {id(own): rows_of(parameter, self.world) for parameter, own in self._pairs}

    def slice_of(self, parameter: nn.Parameter | None) -> nn.Parameter | None:
        """What the optimiser moves in place of a parameter."""
        return next((own for whole, own in self._pairs if id(whole) == id(parameter)), parameter)

    def synchronise_gradients(self, wanted: bool) -> None:
        """Whether the next backward passes add up over the processes, or only here until one does."""
        for block in self.blocks:
            block.set_requires_gradient_sync(wanted)

    @contextmanager
    def whole(self) -> Iterator[Method]:
        """The method as one process would hold it, on rank 0, to be read; every process takes part.

        Elsewhere it has no weights. Its weights are gone after the block.
        """
        state = self._gathered(everywhere=False)
        if self.world.is_main:
            self._whole.load_state_dict(state, assign=True)
        del state
        self._whole.train(self.method.training)
        try:
            yield self._whole
        finally:
            _forget_weights(self._whole)

    def put_together(self) -> None:
        """Make the method whole on every process again, as it was before it was cut; for when training is done."""
        self._whole.load_state_dict(self._gathered(everywhere=True), assign=True)
        self._whole.train(self.method.training)
        self.method.__class__ = type(self._whole)
        vars(self.method).clear()
        vars(self.method).update(vars(self._whole))
        self._pairs.clear()

    def _gathered(self, *, everywhere: bool) -> dict[str, Tensor]:
        """The whole tensors of the method's state, on rank 0 alone or on every process."""
        state = {}
        for name, value in self.method.state_dict().items():
            value = value.full_tensor() if isinstance(value, DTensor) else value
            if everywhere or self.world.is_main:
                state[name] = value
        return state


def whole_twin(method: Method) -> Method:
    """A copy of a method without its weights: parameters have shapes alone, teachers are shared."""
    memo: dict[int, Any] = {id(one): one for one in teachers_of(method)}
    inside = {"_parameters", "_buffers", "_modules"}
    memo |= {
        id(value): value for name, value in vars(method).items() if name not in inside and _is_shared(value)
    }
    for parameter in method.parameters():
        memo[id(parameter)] = nn.Parameter(
            torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad
        )
    return copy.deepcopy(method, memo)


def _is_shared(value: object) -> bool:
    """Whether a method's own attribute, such as its views or a cache, is no container of torch's."""
    return not isinstance(value, (bool, int, float, str, dict, nn.Module, Tensor, type(None)))


def _forget_weights(method: nn.Module) -> None:
    for module in method.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(
                    torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad
                )


def can_be_cut(block: nn.Module) -> bool:
    """Whether every parameter of a block has rows, and each forward pass of it is like the others."""
    parameters = list(block.parameters())
    has_norms = any(isinstance(part, _BatchNorm) for part in block.modules())
    return bool(parameters) and all(one.ndim > 0 for one in parameters) and not has_norms


def rows_of(parameter: DTensor, world: World) -> Rows:
    """The rows of a cut parameter that lie on this process."""
    size = parameter.shape[0]
    per_rank = -(-size // world.size)
    start, stop = (min(size, per_rank * number) for number in (world.rank, world.rank + 1))
    assert parameter.to_local().shape[0] == stop - start, f"{parameter.to_local().shape}, {start} to {stop}"
    return Rows(start, stop, tuple(parameter.shape))


def is_too_large(method: Method, device: torch.device) -> bool:
    """Whether training takes more than SHARE_OF_MEMORY of a CUDA device, counted as 16 bytes a trained number."""
    if device.type != "cuda":
        return False
    needed = sum((16 if one.requires_grad else 4) * one.numel() for one in method.parameters())
    return needed > SHARE_OF_MEMORY * torch.cuda.get_device_properties(device).total_memory
