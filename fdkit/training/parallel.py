"""A method as every process calls it."""

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fdkit.errors import ConfigError
from fdkit.methods._method import Method
from fdkit.training.compiling import compile_regions
from fdkit.training.distributed import World
from fdkit.training.sharding import Shards, is_too_large, whole_twin

BUCKET_MEGABYTES = 64
"""Gradients that travel together: fewer and larger messages than by default, and still many while the rest computes."""
Wanted = Literal["auto", "ddp", "fsdp"]


class Parallel(NamedTuple):
    """A method spread over the processes."""

    module: nn.Module
    """What to call in place of the method."""
    shards: Shards | None
    """What of the method lies in slices; None if every process holds all."""

    @contextmanager
    def adding_up(self, wanted: bool) -> Iterator[None]:
        """Whether backward passes inside end with gradients that are added up over the processes."""
        if self.shards is not None:
            self.shards.synchronise_gradients(wanted)
        if wanted or not isinstance(self.module, DistributedDataParallel):
            yield
            return
        with self.module.no_sync():
            yield

    @contextmanager
    def whole(self, method: Method) -> Iterator[Method]:
        """The method with all its weights, on rank 0, to be read; every process takes part."""
        if self.shards is None:
            yield method
            return
        with self.shards.whole() as whole:
            yield whole

    @property
    def kind(self) -> str:
        """What run.json says: fsdp, ddp, or one process."""
        if self.shards is not None:
            return "fsdp"
        return "ddp" if isinstance(self.module, DistributedDataParallel) else "one process"


def parallel(
    method: Method,
    world: World,
    device: torch.device,
    *,
    compile: bool = False,
    wanted: Wanted = "auto",
    is_bf16: bool = False,
) -> Parallel:
    """The method, compiled, cut, and with its gradients averaged over the processes, as far as asked for.

    wanted: "auto" cuts a method that is too large for a device, see `is_too_large`. The optimiser is built after this.
    Raises ConfigError for "fsdp" with one process, and where `Shards` does.
    """
    if wanted == "fsdp" and world.size == 1:
        raise ConfigError(
            "train.parallel fsdp has no effect with one process",
            "start several: torchrun --nproc-per-node 8 -m fdkit ..., or leave it at auto",
        )
    cuts = world.size > 1 and (wanted == "fsdp" or (wanted == "auto" and is_too_large(method, device)))
    twin = whole_twin(method) if cuts else None  # before anything is done to what it is a copy of
    if compile:
        compile_regions(method)
    if world.size == 1:
        return Parallel(method, None)
    shards = None if twin is None else Shards(method, twin, world, device, is_bf16=is_bf16)
    if shards is not None:
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(method, shards.names)
    devices = [device.index] if device.type == "cuda" else None
    # Every process computes the same buffers; newer torch names the option that says so differently.
    names = signature(DistributedDataParallel).parameters
    quiet = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    options: dict[str, Any] = {
        "gradient_as_bucket_view": True,
        "bucket_cap_mb": BUCKET_MEGABYTES,
        quiet: False,
    }
    return Parallel(DistributedDataParallel(method, device_ids=devices, **options), shards)
