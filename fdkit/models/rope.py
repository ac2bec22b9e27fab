"""Rotary positions with the periods a file of weights holds, where timm computes them itself."""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers.pos_embed_sincos import RotaryEmbeddingDinoV3
from torch import Tensor

from fdkit.errors import ConfigError


class StatedPeriods(RotaryEmbeddingDinoV3):
    """timm's rotary positions of DINOv3, but the periods are given.

    Meta trained with periods in bfloat16 and publishes those, off by up to 0.4 % from the exact powers.
    """

    stated: tuple[float, ...]

    def _compute_periods(self, device: Any = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(self.stated, device=device, dtype=dtype)


def state_periods(network: Any, periods: Sequence[float]) -> None:
    """Give a timm DINOv3 the periods of its rotary positions, one for four channels of a head, in place.

    Raises ConfigError if the network has no such positions, or heads of another width.
    """
    rope = getattr(network, "rope", None)
    if not isinstance(rope, RotaryEmbeddingDinoV3) or len(periods) != rope.dim // 4:
        raise ConfigError(f"{len(periods)} periods of rotary positions do not fit {type(network).__name__}")
    # A changed class, unlike a changed method, survives a deep copy such as a momentum encoder's.
    rope.__class__ = StatedPeriods
    rope.stated = tuple(periods)
    rope.init_non_persistent_buffers()
