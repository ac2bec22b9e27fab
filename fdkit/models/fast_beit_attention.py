"""Attention of timm's `Beit` through `bias_attention`, and its bias table read by one index_select.

The numbers are those of timm's modules; so are the parameters and their names.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.models.beit import Attention, RelativePositionBias
from torch import Tensor, nn

from fdkit.errors import ConfigError
from fdkit.models.attention import WantedAttention, attention_path, bias_attention, sdpa_backend


class FastAttention(Attention):
    """timm's Beit attention through `bias_attention`, where there is a bias and no dropout.

    With `fused_attn` off, timm's own unfused path runs, so that what reads attention weights still can.
    """

    wanted_attention: WantedAttention = "auto"

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        """Attended tokens (B, N, C) of tokens (B, N, C); the shared bias is (H, N, N) or None."""
        has_bias = shared_rel_pos_bias is not None or self.relative_position_bias_table is not None
        if not has_bias or not self.fused_attn or (self.training and self.attn_drop.p > 0):
            return super().forward(x, shared_rel_pos_bias)
        linear_bias = None if self.q_bias is None else torch.cat((self.q_bias, self.k_bias, self.v_bias))
        qkv = F.linear(x, self.qkv.weight, linear_bias)
        query, key, value = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self._bias(shared_rel_pos_bias)
        attended = bias_attention(query, key, value, bias, wanted=self.wanted_attention)
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


def use_attention(network: nn.Module, wanted: WantedAttention) -> None:
    """Have every layer of an accelerated `Beit` compute its attention this way, in place.

    Raises ConfigError if a way is asked for and the network has no attention with a learned bias.
    """
    layers = _biased_layers(network)
    if wanted != "auto" and not layers:
        raise ConfigError(
            f"student.attention {wanted} has no effect: {type(network).__name__} has no attention with a learned bias",
            "leave --student.attention out, or use --student.position shared_rpb",
        )
    for layer in layers:
        layer.wanted_attention = wanted


def attention_facts(network: nn.Module, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What a run records of its attention: "attention", and "attention_kernel" where a library's kernel is chosen.

    dtype: of the operands. Empty for a network without attention with a learned bias. Raises ConfigError if the device
    cannot take what is asked for.
    """
    layers = _biased_layers(network)
    if not layers:
        return {}
    width = layers[0].qkv.out_features // 3 // layers[0].num_heads
    path = attention_path(device, dtype, wanted=layers[0].wanted_attention, head_width=width)
    if path == "fused":
        return {"attention": path, "attention_kernel": "memory-efficient, bias gradient in Triton"}
    if path == "sdpa":
        tokens = _num_tokens(network)
        return {
            "attention": path,
            "attention_kernel": sdpa_backend(device, dtype, num_tokens=tokens, head_width=width),
        }
    return {"attention": path}


def _biased_layers(network: nn.Module) -> list[FastAttention]:
    shared = any(isinstance(module, RelativePositionBias) for module in network.modules())
    layers = [module for module in network.modules() if isinstance(module, FastAttention)]
    return [layer for layer in layers if shared or layer.relative_position_bias_table is not None]


def _num_tokens(network: nn.Module) -> int:
    """Tokens of the image size that the network was built for, from an index into its bias table."""
    indices = [buffer for name, buffer in network.named_buffers() if name.endswith("relative_position_index")]
    return len(indices[0])


def _read_table(table: Tensor, index: Tensor) -> Tensor:
    """(H, N, N) from a bias table (R, H) and an index (N, N) into its rows."""
    if table.device.type == "cpu":
        return table.t().index_select(1, index.flatten()).unflatten(1, index.shape)
    # Indexing sorts in its backward where index_select adds atomically, so the gradient repeats to the bit.
    return table[index.flatten()].unflatten(0, index.shape).permute(2, 0, 1).contiguous()
