"""Blocks of timm's `Beit` that compute the same numbers in less time on a CPU.

Three things differ from timm's blocks, none of them in the result: attention goes through `bias_attention`; the bias
table is read by one index_select; and a branch that stochastic depth drops is not computed at all for that sample.
The last draws the same random numbers in the same order, so a seeded run takes the same course. It is for the CPU
alone: elsewhere, choosing samples would make the host wait for the device.
"""

from collections.abc import Callable

from timm.layers import DropPath
from timm.models.beit import Attention, Beit, Block, RelativePositionBias
from torch import Tensor, nn

from fdkit.models.fast_beit_attention import FastAttention, FastRelativePositionBias


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
        if x.device.type != "cpu":
            return super().forward(x, shared_rel_pos_bias)

        def attend(tokens: Tensor) -> Tensor:
            return self.attn(self.norm1(tokens), shared_rel_pos_bias=shared_rel_pos_bias)

        def mix(tokens: Tensor) -> Tensor:
            return self.mlp(self.norm2(tokens))

        x = _residual(x, attend, self.gamma_1, self.drop_path1)
        return _residual(x, mix, self.gamma_2, self.drop_path2)


def _residual(
    x: Tensor, branch: Callable[[Tensor], Tensor], gamma: Tensor | None, drop_path: nn.Module
) -> Tensor:
    """The sum x + drop_path(gamma * branch(x)), x (B, N, C), with the branch computed for the kept samples alone."""
    if not isinstance(drop_path, DropPath) or not drop_path.training or drop_path.drop_prob == 0:
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
