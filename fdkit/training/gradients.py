"""Gradients between the backward pass and the update."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fdkit.training.optimizer import OptimizerConfig
from fdkit.training.sharding import Shards


def first_matrix(network: nn.Module) -> nn.Parameter | None:
    """The weight of the first layer that trains: in a ViT the patch projection, or what follows a frozen one."""
    matrices = (
        parameter
        for name, parameter in network.named_parameters()
        if parameter.requires_grad and parameter.ndim > 1 and name.endswith("weight")
    )
    return next(matrices, None)


def clip_gradients(
    parameters: Sequence[nn.Parameter],
    optim: OptimizerConfig,
    *,
    first_layer: nn.Parameter | None,
    shards: Shards | None,
) -> dict[str, Tensor]:
    """Scale gradients down to the largest norm allowed; norms before: of all, its maximum, the first layer's.

    shards: says the norms of whole gradients where a process holds slices of them.
    """
    with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
    gradients = [parameter.grad for parameter in with_gradient if parameter.grad is not None]
    if shards is None:
        each = list(torch._foreach_norm(gradients))
    else:
        each = list(shards.gradient_norms(with_gradient).unbind())
    norms = {"grad_norm": torch.linalg.vector_norm(torch.stack(each))}
    norms["grad_norm_max"] = norms["grad_norm"]
    for parameter, norm in zip(with_gradient, each, strict=True):
        if parameter is first_layer:
            norms["first_layer_grad_norm_max"] = norm
    if optim.clip_grad is not None and optim.clip_each_parameter:
        clip_each(gradients, optim.clip_grad, each)
    elif optim.clip_grad is not None:
        nn.utils.clip_grads_with_norm_(parameters, optim.clip_grad, norms["grad_norm"])
    return norms


def clip_each(gradients: list[Tensor], max_norm: float, norms: Sequence[Tensor] | None = None) -> None:
    """Scale each gradient down to a norm of max_norm, in place. Source: facebookresearch/dino, utils.py.

    norms: of the gradients, where they are more than what is given here, as of slices.
    """
    norms = torch._foreach_norm(gradients) if norms is None else norms
    # As one tensor: a kernel or four for each of hundreds of gradients is what a GPU would wait for.
    factors = (max_norm / (torch.stack(tuple(norms)) + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(gradients, factors.unbind())
