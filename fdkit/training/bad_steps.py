"""Steps whose loss or gradient was not finite: left out, counted, and borne for a few in a row."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

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


class BufferGuard:
    """The buffers of a method as they were before a step, so that one that is left out leaves no mark.

    Running statistics, queues and centres change before anyone knows whether the step is good. They are put back on
    the device, without waiting for it. Buffers that are in no checkpoint never change and are not kept.
    """

    def __init__(self, method: nn.Module) -> None:
        saved = method.state_dict().keys()
        self._buffers: dict[torch.dtype, list[Tensor]] = {}
        for name, buffer in method.named_buffers():
            if name in saved and buffer.numel():
                self._buffers.setdefault(buffer.dtype, []).append(buffer)
        self._kept = self._joined()

    def keep(self) -> None:
        """Remember the buffers as they are."""
        self._kept = self._joined()

    @torch.no_grad()
    def put_back(self, bad: Tensor) -> None:
        """Make the buffers what they were when last kept, if `bad`, a scalar on the device, is above 0."""
        for dtype, now in self._joined().items():
            buffers = self._buffers[dtype]
            parts = torch.where(bad > 0, self._kept[dtype], now).split([one.numel() for one in buffers])
            shaped = [part.view(one.shape) for part, one in zip(parts, buffers, strict=True)]
            torch._foreach_copy_(buffers, shaped)

    @torch.no_grad()
    def _joined(self) -> dict[torch.dtype, Tensor]:
        """A copy of all buffers of a type, end to end: few kernels, however many buffers."""
        return {
            dtype: torch.cat([one.reshape(-1) for one in buffers]) for dtype, buffers in self._buffers.items()
        }


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
