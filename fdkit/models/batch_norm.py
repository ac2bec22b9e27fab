"""Batch normalisation over the whole batch, wherever its rows lie.

In contrastive learning a rank's own statistics would mark which keys are its own, so every batch norm is synchronised.
torch synchronises on accelerators only, and DistributedDataParallel refuses its class on a CPU; here both work.
Ranks tell each other mean and variance in one message, those of several views together (`each_apart`).
"""

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fdkit.errors import ConfigError
from fdkit.models.collectives import gather_rows_with_gradient, world_size

Module = TypeVar("Module", bound=nn.Module)


class BatchNorm(_BatchNorm):
    """Batch norm of any number of dimensions, over all ranks' batches in training; state dict as torch's."""

    process_group = None
    num_batches: int = 1
    """How many batches, of equally many rows, come one behind another; each has statistics of its own."""
    _check_input_dim = nn.SyncBatchNorm._check_input_dim
    _check_non_zero_input_channels = nn.SyncBatchNorm._check_non_zero_input_channels

    def forward(self, inputs: Tensor) -> Tensor:
        """Normalised inputs (B, C, ...); every rank holds equally many."""
        if not self.training or world_size() == 1:
            assert self.num_batches == 1, "each_apart goes batch by batch then"
            return super().forward(inputs)
        if inputs.device.type == "cpu" or self.num_batches > 1:
            return self._normalise_over_ranks(inputs)
        return nn.SyncBatchNorm.forward(self, inputs)  # type: ignore[arg-type]

    def _normalise_over_ranks(self, inputs: Tensor) -> Tensor:
        values = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
        values = values.unflatten(0, (self.num_batches, -1))  # (V, B, C, ...)
        dims = [dim for dim in range(values.ndim) if dim not in (0, 2)]
        shape = (self.num_batches, 1, -1, *[1] * (values.ndim - 3))
        variance, mean = torch.var_mean(values, dims, correction=0)
        means, variances = gather_rows_with_gradient(torch.stack([mean, variance])[None]).unbind(1)
        mean = means.mean(0)  # (V, C), over ranks
        variance = variances.mean(0) + (means - mean).square().mean(0)
        count = values[0].numel() // values.shape[2] * world_size()
        for one_mean, one_variance in zip(mean.detach(), variance.detach(), strict=True):
            self._track(one_mean, one_variance, count=count)
        normalised = (values - mean.view(shape)) * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            shape = (1, *shape[1:])
            normalised = normalised * self.weight.view(shape) + self.bias.view(shape)
        return normalised.flatten(0, 1).to(inputs.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, *, count: int) -> None:
        """Move the running statistics; their variance is the unbiased one, as in torch."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        assert self.momentum is not None, "cumulative averages are not used here"
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        self.num_batches_tracked.add_(1)


def each_apart(module: nn.Module, batches: Sequence[Tensor]) -> list[Tensor]:
    """What a module makes of each batch of rows, (B, ...), where batch norms see one batch at a time.

    On several ranks all batches, of equally many rows, go through at once, so that a batch norm sends one message for
    all of them. The module treats rows alike but for its batch norms, and computes in any number of dimensions.
    """
    norms = [part for part in module.modules() if isinstance(part, BatchNorm)]
    if world_size() == 1 or not module.training or not norms:
        return [module(batch) for batch in batches]
    for norm in norms:
        norm.num_batches = len(batches)
    try:
        rows: Tensor = module(torch.cat(list(batches)))
    finally:
        for norm in norms:
            norm.num_batches = 1
    return list(rows.chunk(len(batches)))


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
