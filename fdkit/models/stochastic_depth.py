"""Stochastic depth for a network that otherwise stays in evaluation mode."""

from typing import Any

import torch
from torch import Tensor, nn

from fdkit.errors import ConfigError


class ConstantDropPath(nn.Module):
    """Drops a residual branch for whole samples, in evaluation mode too.

    drop_prob: probability of dropping a sample's branch; kept ones are divided by 1 - drop_prob.
    """

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        """The branch (B, ...), zero for dropped samples."""
        keep_prob = 1 - self.drop_prob
        mask = x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(keep_prob)
        return x * mask / keep_prob


def add_stochastic_depth(network: nn.Module, rate: float) -> None:
    """Makes the blocks of a timm transformer drop branches, from 0 at the first block to `rate` at the last.

    Raises ConfigError if the network has no blocks with timm's drop-path places.
    """
    blocks: list[Any] = [
        m for m in network.modules() if hasattr(m, "drop_path1") and hasattr(m, "drop_path2")
    ]
    if not blocks:
        raise ConfigError(
            f"stochastic depth {rate}: {type(network).__name__} has no place for it in its blocks"
        )
    for block, drop_prob in zip(blocks, torch.linspace(0, rate, len(blocks)).tolist(), strict=True):
        block.drop_path1 = ConstantDropPath(drop_prob)
        block.drop_path2 = ConstantDropPath(drop_prob)
