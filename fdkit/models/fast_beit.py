"""Blocks of timm's `Beit` that compute the same numbers in less time on a CPU.

Three things differ from timm's blocks, none of them in the result: attention goes through `bias_attention`; the bias
table is read by one index_select; and a branch that stochastic depth drops is not computed at all for that sample.
The last draws the same random numbers in the same order, so a seeded run takes the same course. It is for the CPU
alone: elsewhere, choosing samples would make the host wait for the device.
"""

from collections.abc import Callable
from typing import Any

import torch
from timm.layers import DropPath
from timm.models.beit import Attention, Beit, Block, RelativePositionBias
from torch import Tensor, nn

from fdkit.errors import ConfigError
from fdkit.models.fast_beit_attention import FastAttention, FastRelativePositionBias
from fdkit.models.stochastic_depth import BufferedDropPath, draw_kept

DROPPING = (DropPath, BufferedDropPath)


def accelerate(network: nn.Module) -> None:
    """Turns the blocks of a timm `Beit` into their fast forms, in place; parameters and their names stay.

    Other networks are left as they are.
    """
    if not isinstance(network, Beit):
        return
    fast = {Attention: FastAttention, Block: FastBlock, RelativePositionBias: FastRelativePositionBias}
    for module in network.modules():
        # A changed class, unlike a changed method, survives a deep copy such as a momentum encoder's.
        module.__class__ = fast.get(type(module), type(module))


class FastBlock(Block):
    """timm's Beit block that leaves out dropped samples instead of multiplying them by zero."""

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        """Tokens (B, N, C) after attention and MLP; the shared bias is (H, N, N) or None."""
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x, shared_rel_pos_bias)

        def attend(tokens: Tensor) -> Tensor:
            return self.attn(self.norm1(tokens), shared_rel_pos_bias=shared_rel_pos_bias)

        def mix(tokens: Tensor) -> Tensor:
            return self.mlp(self.norm2(tokens))

        x = _residual(x, attend, self.gamma_1, self.drop_path1)
        return _residual(x, mix, self.gamma_2, self.drop_path2)


class BatchedBlock(FastBlock):
    """timm's Beit block with batched stochastic depth: a branch runs for a fixed number of samples of the batch.

    They are drawn anew for each branch, and what they add is scaled so that its mean stays. Against Bernoulli's draws a
    branch's share of the batch has no variance, which is another distribution with the same mean; shapes are fixed and
    nothing waits for the device. Source: Oquab et al. 2023 (DINOv2, arXiv 2304.07193), section 4.
    """

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        """Tokens (B, N, C) after attention and MLP; the shared bias is (H, N, N) or None."""
        if not self.training:
            return super().forward(x, shared_rel_pos_bias)
        attended, mixed = (_drawn(x, drop_path) for drop_path in (self.drop_path1, self.drop_path2))
        run = self.__dict__.get("_compiled_kept", self._forward_kept)
        return run(x, shared_rel_pos_bias, attended, mixed)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile what follows the draws: inside a graph, every block's number of samples would be one of its own.

        So that number is left open, whatever `dynamic` asks for.
        """
        self.__dict__["_compiled_kept"] = torch.compile(
            self._forward_kept, *args, **{**kwargs, "dynamic": None}
        )

    def __getstate__(self) -> dict[str, Any]:
        # A copy is not compiled, as with nn.Module's own: the compiled function belongs to this very block.
        return {name: value for name, value in super().__getstate__().items() if name != "_compiled_kept"}

    def _forward_kept(
        self, x: Tensor, shared: Tensor | None, attended: Tensor | None, mixed: Tensor | None
    ) -> Tensor:
        """The block where each branch runs for the samples (K,) given for it, all of them for None."""

        def attend(tokens: Tensor) -> Tensor:
            return self.attn(self.norm1(tokens), shared_rel_pos_bias=shared)

        def mix(tokens: Tensor) -> Tensor:
            return self.mlp(self.norm2(tokens))

        x = _add_kept(x, attend, self.gamma_1, attended)
        return _add_kept(x, mix, self.gamma_2, mixed)


def use_batched_depth(network: nn.Module) -> None:
    """Make the dropping blocks of an accelerated `Beit` batched, in place; parameters and their names stay.

    Raises ConfigError for another network, and for one that drops nothing.
    """
    blocks = [module for module in network.modules() if isinstance(module, FastBlock)]
    if not blocks:
        raise ConfigError(
            f"student.drop_path_mode batched: {type(network).__name__} has no batched stochastic depth",
            "use --student.drop-path-mode bernoulli, or a ViT student built like its teacher",
        )
    if not any(isinstance(module, DROPPING) for module in network.modules()):
        raise ConfigError(
            "student.drop_path_mode batched has no effect with student.drop_path 0",
            "set --student.drop-path 0.2",
        )
    for block in blocks:
        block.__class__ = BatchedBlock


def _drawn(x: Tensor, drop_path: nn.Module) -> Tensor | None:
    """Which samples of x (B, ...) take part in a branch; None for all."""
    if not isinstance(drop_path, DROPPING):
        return None
    return draw_kept(x.shape[0], drop_path.drop_prob, x.device)


def _add_kept(
    x: Tensor, branch: Callable[[Tensor], Tensor], gamma: Tensor | None, kept: Tensor | None
) -> Tensor:
    """The sum x + gamma * branch(x), with the branch of the samples `kept` alone, scaled by B / K."""
    if kept is None:
        return x + _scaled(branch(x), gamma, 1.0)
    scale = x.shape[0] / kept.shape[0]
    return x.index_add(0, kept, _scaled(branch(x[kept]), gamma, scale).to(x.dtype))


def _residual(
    x: Tensor, branch: Callable[[Tensor], Tensor], gamma: Tensor | None, drop_path: nn.Module
) -> Tensor:
    """The sum x + drop_path(gamma * branch(x)), x (B, N, C), with the branch computed for the kept samples alone."""
    if not isinstance(drop_path, DROPPING) or not drop_path.training or drop_path.drop_prob == 0:
        return x + _scaled(branch(x), gamma, 1.0)
    keep_prob = 1 - drop_path.drop_prob
    kept = x.new_empty(x.shape[0]).bernoulli_(keep_prob).nonzero().squeeze(1)
    scale = 1 / keep_prob if drop_path.scale_by_keep else 1.0
    if len(kept) == 0:
        # Every parameter must still get a gradient, if a zero one: data-parallel training waits for all of them.
        kept, scale = kept.new_zeros(1), 0.0
    if len(kept) == x.shape[0]:
        return x + _scaled(branch(x), gamma, scale)
    return x.index_add(0, kept, _scaled(branch(x[kept]), gamma, scale).to(x.dtype))


def _scaled(values: Tensor, gamma: Tensor | None, scale: float) -> Tensor:
    return values * scale if gamma is None else values * (gamma * scale)
