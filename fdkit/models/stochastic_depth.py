"""Stochastic depth in the forms that timm's own does not have."""

from typing import Any

import torch
from timm.layers import DropPath
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


class BufferedDropPath(nn.Module):
    """timm's DropPath whose rate is a tensor, so that blocks that differ in nothing else share one compiled graph.

    A compiler takes a Python number for a constant: with timm's own, every block is a graph of its own, and those
    beyond the compiler's limit run uncompiled. The distribution is timm's; the draws are `rand` < kept, others than
    those of its `bernoulli_`. The buffer is no part of the state.
    """

    keep_prob: Tensor

    def __init__(self, drop_prob: float, *, scale_by_keep: bool = True, always: bool = False) -> None:
        """drop_prob: in [0, 1); scale_by_keep: divide what is kept by 1 - drop_prob; always: in evaluation mode too."""
        super().__init__()
        self.register_buffer("keep_prob", torch.tensor(1 - drop_prob), persistent=False)
        self.drop_prob = drop_prob  # for what runs outside a graph
        self.scale_by_keep = scale_by_keep
        self.always = always

    def forward(self, x: Tensor) -> Tensor:
        """The branch (B, ...), zero for dropped samples."""
        if not self.training and not self.always:
            return x
        draws = torch.rand((x.shape[0], *[1] * (x.ndim - 1)), device=x.device)
        kept = (draws < self.keep_prob).to(x.dtype)
        return x * (kept / self.keep_prob.to(x.dtype)) if self.scale_by_keep else x * kept


def buffer_drop_rates(module: nn.Module) -> None:
    """Put `BufferedDropPath` in the place of every drop path inside a module, in place."""
    for name, child in module.named_children():
        if isinstance(child, DropPath):
            setattr(module, name, BufferedDropPath(child.drop_prob, scale_by_keep=child.scale_by_keep))
        elif isinstance(child, ConstantDropPath):
            setattr(module, name, BufferedDropPath(child.drop_prob, always=True))
        else:
            buffer_drop_rates(child)


def draw_kept(num_samples: int, drop_prob: float, device: torch.device) -> Tensor:
    """(K,) int64 indices of the samples whose branch is computed, K = round(num_samples * (1 - drop_prob)), at least 1.

    K is fixed, so the shapes of a compiled or recorded step are, and nothing waits for the device. Each sample is as
    likely to be kept as any other. Source: Oquab et al. 2023 (DINOv2, arXiv 2304.07193), section 4, stochastic depth.
    """
    num_kept = max(1, round(num_samples * (1 - drop_prob)))
    return torch.randperm(num_samples, device=device)[:num_kept]


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
