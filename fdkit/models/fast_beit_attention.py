"""Attention of timm's `Beit` through `bias_attention`, and its bias table read by one index_select.

The numbers are those of timm's modules; so are the parameters and their names.
"""

import torch
import torch.nn.functional as F
from timm.models.beit import Attention, RelativePositionBias
from torch import Tensor

from fdkit.models.attention import bias_attention


class FastAttention(Attention):
    """timm's Beit attention through `bias_attention`, where there is a bias and no dropout.

    With `fused_attn` off, timm's own unfused path runs, so that what reads attention weights still can.
    """

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        """Attended tokens (B, N, C) of tokens (B, N, C); the shared bias is (H, N, N) or None."""
        has_bias = shared_rel_pos_bias is not None or self.relative_position_bias_table is not None
        if not has_bias or not self.fused_attn or (self.training and self.attn_drop.p > 0):
            return super().forward(x, shared_rel_pos_bias)
        linear_bias = None if self.q_bias is None else torch.cat((self.q_bias, self.k_bias, self.v_bias))
        qkv = F.linear(x, self.qkv.weight, linear_bias)
        query, key, value = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        attended = bias_attention(query, key, value, self._bias(shared_rel_pos_bias))
        return self.proj_drop(self.proj(attended.transpose(1, 2).flatten(2)))

    def _bias(self, shared: Tensor | None) -> Tensor:
        """(H, N, N): the shared bias, this layer's own, or their sum."""
        if self.relative_position_bias_table is None:
            assert shared is not None, "attention without any bias takes timm's path"
            return shared
        own = _read_table(self.relative_position_bias_table, self.relative_position_index)
        return own if shared is None else own + shared


class FastRelativePositionBias(RelativePositionBias):
    """timm's shared bias, read from its table the fast way."""

    def forward(self) -> Tensor:
        """(H, N, N): the bias of every pair of tokens, class token first."""
        return _read_table(self.relative_position_bias_table, self.relative_position_index)


def _read_table(table: Tensor, index: Tensor) -> Tensor:
    """(H, N, N) from a bias table (R, H) and an index (N, N) into its rows."""
    if table.device.type == "cpu":
        return table.t().index_select(1, index.flatten()).unflatten(1, index.shape)
    # Indexing sorts in its backward where index_select adds atomically, so the gradient repeats to the bit.
    return table[index.flatten()].unflatten(0, index.shape).permute(2, 0, 1).contiguous()
