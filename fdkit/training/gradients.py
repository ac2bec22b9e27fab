"""Gradients between the backward pass and the update."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def first_matrix(network: nn.Module) -> nn.Parameter | None:
    """The weight of the first layer that trains: in a ViT the patch projection, or what follows a frozen one."""
    matrices = (
        parameter
        for name, parameter in network.named_parameters()
        if parameter.requires_grad and parameter.ndim > 1 and name.endswith("weight")
    )
    return next(matrices, None)


def clip_each(gradients: list[Tensor], max_norm: float, norms: Sequence[Tensor] | None = None) -> None:
    """Scale each gradient down to a norm of max_norm, in place. Source: facebookresearch/dino, utils.py.

    norms: of the gradients, where they are more than what is given here, as of slices.
    """
    norms = torch._foreach_norm(gradients) if norms is None else norms
    # As one tensor: a kernel or four for each of hundreds of gradients is what a GPU would wait for.
    factors = (max_norm / (torch.stack(tuple(norms)) + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(gradients, factors.unbind())
