"""What the training loop asks of a monitor."""

from typing import Protocol

from fdkit.methods._method import Method


class Monitor(Protocol):
    """Something measured now and then during training, such as online kNN accuracy; rank 0 calls it."""

    every_steps: int

    def __call__(self, method: Method, step: int) -> dict[str, float]:
        """Named numbers for metrics.jsonl; may switch modules to eval and draw from torch's generators."""
        ...
