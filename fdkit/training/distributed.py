"""Several processes that train one model: started by torchrun, agreeing on what to do next."""

import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fdkit.errors import ConfigError, DistributedError, ResourceError
from fdkit.training.meeting import is_kept_by_torchrun, meet, open_store
from fdkit.training.watch import Watch, end_process, lost

T = TypeVar("T")

TIMEOUT_SECONDS = 600.0
_COLLECTIVE_FAILURE = re.compile(
    r"gloo|nccl|connection (closed|reset|refused)|broken pipe|timed out|process group", re.IGNORECASE
)
_watches: list[Watch] = []
"""The watch of this process, if it has one."""
_loss_listeners: list[Callable[[DistributedError], None]] = []


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
        raise ConfigError(
            f"RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers: {error}",
            "start processes with torchrun, which sets them",
        ) from error
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

    A collective that fails inside the block, because a process died or did not answer within timeout_seconds, raises
    DistributedError, which names that process. Where no collective returns, as on a GPU, this process ends so.
    """
    world = current_world()
    if world.size == 1 or dist.is_initialized():
        with _explained_loss(world):
            yield world
        return
    is_cuda = device.type == "cuda"
    # NCCL ends a process without a word when its time is up; the watch, which has one, comes first.
    seconds = timeout_seconds + 60 if is_cuda else timeout_seconds
    try:
        with _explained_loss(world):
            watch = _join(world, "nccl" if is_cuda else "gloo", timeout_seconds, seconds)
        _watches.append(watch)
        with _farewell(world, watch), _explained_loss(world):
            yield world
    finally:
        _watches.clear()
        if dist.is_initialized():
            dist.destroy_process_group()


def mark(step: int, doing: str) -> None:
    """Say where this process is, for the others to read should it hang; doing: one of `fdkit.training.watch.DOINGS`."""
    for watch in _watches:
        watch.mark(step, doing)


@contextmanager
def told_of_loss(listener: Callable[[DistributedError], None]) -> Iterator[None]:
    """Call the listener should this process be ended inside the block because another one is lost.

    The call comes from another thread, while this one waits in a collective that does not return.
    """
    _loss_listeners.append(listener)
    try:
        yield
    finally:
        _loss_listeners.remove(listener)


def launchers(world: World) -> list[str]:
    """The torchrun agents that started the processes, sorted; [] where torchrun did not, or they are not joined yet.

    An agent stays the same process through all restarts of what it starts.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or (world.size > 1 and not dist.is_initialized()):
        return []
    parent, begun = os.getppid(), ""
    with suppress(
        OSError
    ):  # a system without /proc tells no start times, which tell processes of one number apart
        begun = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
    return sorted(set(gather(f"{socket.gethostname()}:{parent}:{begun}", world)))


def _join(world: World, backend: str, timeout_seconds: float, collective_seconds: float) -> Watch:
    """Meet the other processes, form the process group, and begin to watch."""
    serves = world.is_main and not is_kept_by_torchrun()
    store = open_store(timeout_seconds, serves=serves)
    name = meet(store, world.rank, world.size, timeout_seconds)
    dist.init_process_group(
        backend,
        store=dist.PrefixStore(f"fdkit/{name}", store),  # type: ignore[attr-defined]  # public, but in no list
        rank=world.rank,
        world_size=world.size,
        timeout=timedelta(seconds=collective_seconds),
    )
    own = open_store(timeout_seconds, serves=False)  # two threads would wait for each other at one connection
    watch = Watch(
        own,
        f"fdkit/{name}/pulse",
        world.rank,
        world.size,
        timeout_seconds=timeout_seconds,
        on_lost=_end,
    )
    wait_for_all(world)  # so that every pulse is there to be read
    watch.start()
    return watch


def _end(error: DistributedError) -> None:
    for listener in _loss_listeners:
        with suppress(Exception):  # whatever else fails now, the message below is what counts
            listener(error)
    end_process(error)


@contextmanager
def _explained_loss(world: World) -> Iterator[None]:
    """Turn a failed collective into the error that names who is missing."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not _COLLECTIVE_FAILURE.search(str(error)):
            raise
        sentence = _watches[0].explain() if _watches else _first_line(error)
        raise lost(world.rank, world.size, sentence) from error


@contextmanager
def _farewell(world: World, watch: Watch) -> Iterator[None]:
    """Tell the others how this process leaves the block."""
    reason = ""
    try:
        yield
    except BaseException as error:
        reason = _first_line(error)
        raise
    finally:
        watch.leave(reason)
        if reason and world.is_main and not is_kept_by_torchrun():
            watch.wait_until_read()  # the store that the others look at is in this process


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


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
