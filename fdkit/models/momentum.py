"""Momentum copies: networks that follow another as an exponential moving average of its parameters."""

import copy
import math
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

Module = TypeVar("Module", bound=nn.Module)
MomentumSchedule = Literal["cosine", "constant"]


def momentum_copy(module: Module) -> Module:
    """An equal copy that takes no gradient."""
    return copy.deepcopy(module).requires_grad_(False)


@torch.no_grad()
def follow(target: nn.Module, source: nn.Module, momentum: float) -> None:
    """Move target's parameters: target = momentum * target + (1 - momentum) * source, in place.

    Parameters only: buffers, such as batch-norm statistics, stay as target's own forward passes leave them.
    """
    torch._foreach_lerp_(_here(target), _here(source), 1 - momentum)


def _here(module: nn.Module) -> list[Tensor]:
    """What lies on this process of a module's parameters: all, or slices of those cut over the processes."""
    return [one.to_local() if isinstance(one, DTensor) else one for one in module.parameters()]


def momentum_at(progress: float, start: float, schedule: MomentumSchedule) -> float:
    """The momentum after a share `progress` of the training, in [0, 1].

    "cosine" rises from start to 1 along half a cosine; "constant" stays. Source: Grill et al. 2020 (BYOL), section 3.2.
    """
    if schedule == "constant":
        return start
    return 1 - (1 - start) * (1 + math.cos(math.pi * progress)) / 2
