"""Batch normalisation over the whole batch, wherever its rows lie.

In contrastive learning a rank's own statistics would mark which keys are its own, so every batch norm is synchronised.
torch synchronises on accelerators only; here it also works on CPUs, so that two processes can be tested against one.
"""

from typing import TypeVar

import torch
from torch import Tensor, nn

from fdkit.models.collectives import in_group, mean_over_ranks, world_size

Module = TypeVar("Module", bound=nn.Module)


class BatchNorm(nn.SyncBatchNorm):
    """torch's synchronised batch norm, on any device and with or without a process group; same state dict."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Normalised inputs (B, C, ...); statistics over all ranks' batches in training."""
        if self.training and inputs.device.type == "cpu" and in_group():
            return self._normalise_over_ranks(inputs)
        return super().forward(inputs)

    def _normalise_over_ranks(self, inputs: Tensor) -> Tensor:
        values = inputs.float()
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

    def _track(self, mean: Tensor, variance: Tensor, *, count: int) -> None:
        """Move the running statistics; their variance is the unbiased one, as in torch."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        assert self.momentum is not None, "cumulative averages are not used here"
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
            self.num_batches_tracked.add_(1)


def synchronise_batch_norm(module: Module) -> Module:
    """The same module with every batch norm in it, itself included, turned into a synchronised one."""
    converted: Module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for part in converted.modules():
        if type(part) is nn.SyncBatchNorm:
            part.__class__ = BatchNorm
    return converted


def has_batch_norm(module: nn.Module) -> bool:
    """Whether what the module makes of an image depends on the other images of its batch."""
    return any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules())
