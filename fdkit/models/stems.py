"""Convolutional stems: a few small strided convolutions in place of a vision transformer's patch projection."""

from typing import Any

from torch import Tensor, nn


class ConvStem(nn.Module):
    """Placeholder."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Placeholder."""
        raise NotImplementedError
