"""What processes agree on and measure at every step without holding up the device."""

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fdkit.training.distributed import World, reduce_max, reduce_mean


class Verdict(NamedTuple):
    """What all processes agree on about one step."""

    step: int
    indices: Tensor
    """(b,) dataset indices of this process's share of the batch."""
    is_bad: bool
    """Some process's loss or gradient was not finite."""
    stop: bool
    save: bool


class Votes:
    """Three flags a step, maximised over the processes, and read without holding up the device.

    lag: 0 reads a step's flags at once. 1 reads those of the step before, which the device has long computed; the
    optimiser must then itself refuse a bad update, as fused AdamW and SGD do by their `found_inf`.
    """

    def __init__(self, world: World, device: torch.device, *, lag: int) -> None:
        self._world = world
        self._device = device
        self._lag = lag
        self._cast: deque[tuple[int, Tensor, Tensor, torch.cuda.Event | None]] = deque()

    def cast(self, step: int, indices: Tensor, bad: Tensor, *, stop: bool, save: bool) -> Tensor:
        """Vote on a step; the agreed `bad` flag, a float scalar on the device."""
        wishes = torch.tensor([stop, save], dtype=torch.float32).to(self._device, non_blocking=True)
        flags = reduce_max(torch.cat([bad.float().reshape(1), wishes]), self._world)
        event = None
        if self._device.type == "cuda":
            copy = torch.empty(3, pin_memory=True).copy_(flags, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        else:
            copy = flags
        self._cast.append((step, indices, copy, event))
        return flags[0]

    def read(self, lag: int | None = None) -> list[Verdict]:
        """The verdicts that are due, oldest first; lag=0 waits for all of them."""
        verdicts = []
        while len(self._cast) > (self._lag if lag is None else lag):
            step, indices, flags, event = self._cast.popleft()
            if event is not None:
                event.synchronize()
            bad, stop, save = (bool(flag) for flag in flags.tolist())
            verdicts.append(Verdict(step, indices, bad, stop, save))
        return verdicts


MAXIMUM = "_max"
"""How the names of scalars end of which a line holds the largest, not the mean."""


class Window:
    """Sums of the steps' scalars since the last logged line, or maxima; they stay on the device until read."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count = 0
        self.bad: Tensor | None = None

    def add(self, metrics: dict[str, Tensor], bad: Tensor | None = None) -> None:
        """Count one step's scalars; those of a step that was left out, where `bad` is 1, as if it had not been."""
        is_bad = None if bad is None else bad > 0
        if bad is not None:
            self.bad = bad if self.bad is None else self.bad + bad
        for name, value in metrics.items():
            value = value.detach().float()
            if is_bad is not None:
                value = torch.where(is_bad, 0.0, value)
            if name not in self.sums:
                self.sums[name] = value
            elif name.endswith(MAXIMUM):
                self.sums[name] = torch.maximum(self.sums[name], value)
            else:
                self.sums[name] = self.sums[name] + value
        self.count += 1

    def read(self, world: World) -> dict[str, float]:
        """Means, or maxima, over the steps and processes, and begin anew; "bad_steps" says how many were left out.

        Nothing else is there if all of them were.
        """
        num_bad = 0 if self.bad is None else round(float(self.bad))
        said = {"bad_steps": float(num_bad)} if num_bad else {}
        if num_bad == self.count:
            self._begin()
            return said
        maxima = [name for name in self.sums if name.endswith(MAXIMUM)]
        means = [name for name in self.sums if name not in maxima]
        values = self._reduced(means, reduce_mean, world, divisor=self.count - num_bad)
        values |= self._reduced(maxima, reduce_max, world)
        values = {name: values[name] for name in self.sums}
        self._begin()
        return values | said

    def _begin(self) -> None:
        self.sums, self.count, self.bad = {}, 0, None

    def _reduced(
        self, names: list[str], reduce: Callable[[Tensor, World], Tensor], world: World, *, divisor: int = 1
    ) -> dict[str, float]:
        if not names:
            return {}
        numbers = reduce(torch.stack([self.sums[name] for name in names]), world) / divisor
        return dict(zip(names, numbers.tolist(), strict=True))

    def numbers(self) -> dict[str, Any]:
        """The window as plain JSON, exact."""
        sums = {name: value.item() for name, value in self.sums.items()}
        return {"count": self.count, "bad": 0.0 if self.bad is None else self.bad.item(), "sums": sums}

    def load(self, numbers: dict[str, Any], device: torch.device) -> None:
        """Put back what `numbers` gave."""
        self.count = numbers["count"]
        self.bad = torch.tensor(numbers["bad"], device=device)
        self.sums = {name: torch.tensor(value, device=device) for name, value in numbers["sums"].items()}
