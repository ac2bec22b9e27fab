"""Steps whose loss or gradient was not finite: left out, counted, and borne for a few in a row."""

from typing import Any

import torch
from torch import nn

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


def first_damage(method: nn.Module, world: World, device: torch.device) -> str:
    """Whether a step that was left out has left its mark: the name of a buffer that is not finite; "" if none is.

    Running statistics, queues and centres change in the forward pass, before anyone knows. All processes call this, and
    learn of the damage on any of them. It waits for the device.
    """
    buffers = {name: value for name, value in method.named_buffers() if value.is_floating_point()}
    names = [name for name, value in buffers.items() if value.numel() and not bool(value.isfinite().all())]
    found = reduce_max(torch.tensor([float(bool(names))], device=device), world)
    if not bool(found):
        return ""
    return names[0] if names else "a buffer of another process"
