"""Several processes that train one model: started by torchrun, agreeing on what to do next."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fdkit.errors import ConfigError, DistributedError, ResourceError

T = TypeVar("T")

TIMEOUT_SECONDS = 600.0
_COLLECTIVE_FAILURE = re.compile(
    r"gloo|nccl|connection (closed|reset|refused)|broken pipe|timed out|process group", re.IGNORECASE
)


class World(NamedTuple):
    """Which of how many processes this one is; (0, 1, 0) without torchrun."""

    rank: int
    size: int
    local_rank: int

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run folder."""
        return self.rank == 0


def current_world() -> World:
    """The place of this process, as torchrun's environment variables give it."""
    try:
        rank, size, local = (
            int(os.environ.get(name, default))
            for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
        )
    except ValueError as error:
        raise ConfigError(f"RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers: {error}") from error
    return World(rank, size, local)


def local_device(name: str = "auto") -> torch.device:
    """The device of this process: "auto" is its CUDA device if there is one, else the CPU.

    Under torchrun, "cuda" is the device of the local rank. Raises ResourceError if the device is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device {name}: not a device; use auto, cpu, cuda or cuda:N") from error
    if device.type != "cuda":
        return device
    count = torch.cuda.device_count()
    world = current_world()
    index = world.local_rank if world.size > 1 or device.index is None else device.index
    if index >= count:
        raise ResourceError(
            f"--device {name}: CUDA device {index} is not there; found {count}",
            "use --device cpu, or start no more processes than there are devices",
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


@contextmanager
def process_group(device: torch.device, timeout_seconds: float = TIMEOUT_SECONDS) -> Iterator[World]:
    """Join the other processes (nccl on CUDA, gloo elsewhere) while the block runs; nothing to join if alone.

    A collective that fails inside the block, because a process died or did not answer, raises DistributedError.
    """
    world = current_world()
    if world.size == 1:
        yield world
        return
    started_here = not dist.is_initialized()
    try:
        if started_here:
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout_seconds)
            )
        yield world
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not _COLLECTIVE_FAILURE.search(str(error)):
            raise
        raise DistributedError(
            f"rank {world.rank} of {world.size} lost the others: {str(error).strip().splitlines()[0]}",
            "see the rank that ended first in torchrun's output; then run the same command with --resume",
        ) from error
    finally:
        if started_here and dist.is_initialized():
            dist.destroy_process_group()


def reduce_max(values: Tensor, world: World) -> Tensor:
    """Elementwise maximum over the processes, in place."""
    if world.size > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


def reduce_mean(values: Tensor, world: World) -> Tensor:
    """Elementwise mean over the processes, in place."""
    if world.size > 1:
        dist.all_reduce(values)
        values /= world.size
    return values


def gather(value: T, world: World) -> list[T]:
    """The value of every process, by rank, on every process."""
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value)
    return values


def broadcast(value: T, world: World) -> T:
    """The value of rank 0, on every process."""
    if world.size == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def wait_for_all(world: World) -> None:
    """Return when every process has called this."""
    if world.size > 1:
        dist.barrier()
