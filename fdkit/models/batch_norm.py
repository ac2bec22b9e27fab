"""Batch normalisation over the whole batch, wherever its rows lie.

In contrastive learning a rank's own statistics would mark which keys are its own, so every batch norm is synchronised.
torch synchronises on accelerators only, and DistributedDataParallel refuses its class on a CPU; here both work.
"""

from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fdkit.errors import ConfigError
from fdkit.models.collectives import mean_over_ranks, world_size

Module = TypeVar("Module", bound=nn.Module)


class BatchNorm(_BatchNorm):
    """Batch norm of any number of dimensions, over all ranks' batches in training; state dict as torch's."""

    process_group = None
    _check_input_dim = nn.SyncBatchNorm._check_input_dim
    _check_non_zero_input_channels = nn.SyncBatchNorm._check_non_zero_input_channels

    def forward(self, inputs: Tensor) -> Tensor:
        """Normalised inputs (B, C, ...); every rank holds equally many."""
        if not self.training or world_size() == 1:
            return super().forward(inputs)
        if inputs.device.type == "cpu":
            return self._normalise_over_ranks(inputs)
        return nn.SyncBatchNorm.forward(self, inputs)  # type: ignore[arg-type]

    def _normalise_over_ranks(self, inputs: Tensor) -> Tensor:
        values = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
        dims = [dim for dim in range(inputs.ndim) if dim != 1]
        shape = (1, -1, *[1] * (inputs.ndim - 2))
        mean = mean_over_ranks(values.mean(dims))
        centred = values - mean.view(shape)
        variance = mean_over_ranks(centred.square().mean(dims))
        self._track(mean.detach(), variance.detach(), count=inputs.numel() // inputs.shape[1] * world_size())
        normalised = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            normalised = normalised * self.weight.view(shape) + self.bias.view(shape)
        return normalised.to(inputs.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, *, count: int) -> None:
        """Move the running statistics; their variance is the unbiased one, as in torch."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        assert self.momentum is not None, "cumulative averages are not used here"
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        self.num_batches_tracked.add_(1)


def synchronise_batch_norm(module: Module) -> Module:
    """The same module with the batch norms inside it turned into synchronised ones, in place.

    Raises ConfigError if a batch norm is of a kind of its own, such as one fused with its activation.
    """
    for part in module.modules():
        if type(part) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            part.__class__ = BatchNorm
        elif isinstance(part, _BatchNorm) and type(part) is not BatchNorm:
            raise ConfigError(
                f"{type(part).__name__} cannot be synchronised between processes",
                "choose a network with plain batch norms, such as resnet50, or with none, such as a ViT",
            )
    return module
