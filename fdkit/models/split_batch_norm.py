"""Batch normalisation in groups of a batch, as if every group lay on a device of its own.

MoCo v1 and v2 keep batch norms from telling a query its own key: keys are computed among other images than queries
are. That takes several groups, which were devices in the paper; here one device may hold several.
Source: He et al. 2019 (MoCo), section 3.3, "Shuffling BN".
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fdkit.errors import ConfigError
from fdkit.models.collectives import world_size


class SplitBatchNorm(_BatchNorm):
    """Batch norm of any number of dimensions, over one group of rows at a time in training; state dict as torch's.

    Row i of this rank belongs to its group i modulo the number of its groups: `deal` puts rows into that order.
    Running statistics follow the first group, as those of a checkpoint follow the first of several devices.
    """

    num_groups: int = 1
    """Over all ranks; a multiple of their number."""
    _check_input_dim = nn.SyncBatchNorm._check_input_dim

    def forward(self, inputs: Tensor) -> Tensor:
        """Normalised inputs (B, C, ...); B is a multiple of the groups of this rank."""
        groups = groups_of_rank(self.num_groups)
        if not self.training or groups == 1:
            return super().forward(inputs)
        channels = inputs.shape[1]
        # A group's rows lie one behind another once groups count as channels, and torch normalises channel by channel.
        folded = inputs.reshape(len(inputs) // groups, groups * channels, *inputs.shape[2:])
        mean, variance, weight, bias = (
            None if values is None else values.repeat(groups)
            for values in (self.running_mean, self.running_var, self.weight, self.bias)
        )
        assert self.momentum is not None, "cumulative averages are not used here"
        normalised = F.batch_norm(folded, mean, variance, weight, bias, True, self.momentum, self.eps)
        if mean is not None and variance is not None:
            self._track(mean[:channels], variance[:channels])
        return normalised.reshape(inputs.shape)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        for own, tracked in ((self.running_mean, mean), (self.running_var, variance)):
            assert own is not None
            own.copy_(tracked)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)


def split_batch_norm(module: nn.Module, num_groups: int) -> bool:
    """Turns the batch norms inside a module into ones of num_groups groups, in place; whether there are any.

    Raises ConfigError if a batch norm is of a kind of its own, such as one fused with its activation.
    """
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm)]
    for norm in norms:
        if type(norm) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            raise ConfigError(
                f"{type(norm).__name__} cannot normalise a batch in groups",
                "choose a network with plain batch norms, such as resnet50, or with none, such as a ViT",
            )
        norm.__class__ = SplitBatchNorm
        norm.num_groups = num_groups  # type: ignore[assignment]
    return bool(norms)


def groups_of_rank(num_groups: int) -> int:
    """How many of all groups lie on one rank."""
    return num_groups // world_size()


def deal(rows: Tensor, num_groups: int) -> Tensor:
    """Rows (B, ...) in the order in which the groups of `SplitBatchNorm` are slices of B / groups rows as given."""
    return _transposed(rows, groups_of_rank(num_groups))


def undo_deal(rows: Tensor, num_groups: int) -> Tensor:
    """Rows (B, ...) in the order they had before `deal`."""
    return _transposed(rows, len(rows) // groups_of_rank(num_groups))


def _transposed(rows: Tensor, height: int) -> Tensor:
    """The rows, read column by column from a table of `height` lines that holds them line by line."""
    return rows.unflatten(0, (height, -1)).transpose(0, 1).flatten(0, 1)
