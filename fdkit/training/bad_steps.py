"""Steps whose loss or gradient was not finite: left out, counted, and borne for a few in a row."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fdkit.training.distributed import World, reduce_max

MOST_REPORTS = 20
"""Files about such steps that a run writes; a diverging run would else write one a step."""


class BadSteps:
    """How many steps were left out, in all and since the last good one."""

    def __init__(self, most_in_a_row: int) -> None:
        self.most_in_a_row = most_in_a_row
        self.total = 0
        self.in_a_row = 0
        self._last: int | None = None

    def add(self, step: int) -> None:
        """Count a step; steps come in order."""
        self.in_a_row = self.in_a_row + 1 if self._last == step - 1 else 1
        self.total += 1
        self._last = step

    @property
    def are_too_many(self) -> bool:
        """Whether more came in a row than are borne."""
        return self.in_a_row > self.most_in_a_row

    def state(self) -> dict[str, Any]:
        """The counts as plain JSON."""
        return {"total": self.total, "in_a_row": self.in_a_row, "last": self._last}

    def load(self, state: dict[str, Any]) -> None:
        """Put back what `state` gave."""
        self.total, self.in_a_row, self._last = state["total"], state["in_a_row"], state["last"]


def first_damage(tensors: Mapping[str, Tensor], world: World, device: torch.device) -> str:
    """The name of a tensor that is not finite; "" if all are, on all processes.

    All processes call this, each with what it holds, and learn of the damage on any of them. It waits for the device.
    """
    numbers = {name: one for name, one in tensors.items() if one.is_floating_point() and one.numel()}
    sound = [one.isfinite().all().to(device) for one in numbers.values()]
    damaged = ~torch.stack(sound) if sound else torch.zeros(1, dtype=torch.bool, device=device)
    if not bool(reduce_max(damaged.any().float().reshape(1), world)):
        return ""
    names = [name for name, is_damaged in zip(numbers, damaged.tolist(), strict=False) if is_damaged]
    return names[0] if names else "something on another process"
