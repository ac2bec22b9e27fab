"""A queue of features from earlier batches, which MoCo v1 and v2 and SwAV share."""

from typing import Any

import torch
from torch import Tensor

from fdkit.errors import ConfigError
from fdkit.methods._method import Holding


class Queue(Holding):
    """The newest features of earlier batches, equal on all ranks; it is saved with the method and resumes exactly.

    Rows that are held wait until `push_held`, which belongs after the optimiser's step: a step's parts all meet the
    queue as it was before the step, and the backward pass finds it unchanged.
    """

    rows: Tensor
    """(K, ...): the features; where the next ones go is num_pushed modulo K."""
    num_pushed: Tensor
    """Scalar int64: rows pushed since the beginning."""

    def __init__(self, rows: Tensor) -> None:
        """rows: what the queue begins with."""
        super().__init__()
        self.register_buffer("rows", rows)
        self.register_buffer("num_pushed", torch.zeros((), dtype=torch.long))
        self._held: list[Tensor] = []
        self._is_known_full = False
        self.register_load_state_dict_post_hook(_forget)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a compiled graph cannot keep rows for later
    def hold(self, rows: Tensor) -> None:
        """Have rows (N, ...), those of all ranks, join at the next `push_held`."""
        self._held.append(rows.detach())

    @torch.no_grad()
    def push_held(self) -> None:
        """Replace the oldest rows by those held, without waiting for the device."""
        for rows in self._held:
            places = self.num_pushed + torch.arange(len(rows), device=self.rows.device)
            self.rows.index_copy_(0, places % len(self.rows), rows.to(self.rows.dtype))
            self.num_pushed += len(rows)
        self._held.clear()

    def forget_held(self) -> None:
        """Drop the rows held since the last step, which was left out."""
        self._held.clear()

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # it reads a number from the device
    def is_full(self) -> bool:
        """Whether none of the rows it began with is left; once it is so, the device is not asked again."""
        self._is_known_full = self._is_known_full or bool(self.num_pushed >= len(self.rows))
        return self._is_known_full


def _forget(queue: Any, incompatible_keys: Any) -> None:
    """What was held or known belongs to the state before the one just loaded."""
    queue._held.clear()
    queue._is_known_full = False


def check_queue(size: int, batch_size: int, *, section: str) -> None:
    """Raises ConfigError unless batches fill the queue exactly; section: of the recipe that names its size."""
    if size % batch_size:
        raise ConfigError(
            f"{section}.queue_size {size} is no multiple of the {batch_size} images of a batch, which fill it in turn",
            f"use --{section}.queue-size {max(1, round(size / batch_size)) * batch_size}",
        )
