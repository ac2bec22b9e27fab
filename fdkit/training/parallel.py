"""A method as every process calls it."""

from inspect import signature
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fdkit.methods._method import Method
from fdkit.training.compiling import compile_regions
from fdkit.training.distributed import World


def parallel(method: Method, world: World, device: torch.device, *, compile: bool) -> nn.Module:
    """The method, compiled and with its gradients averaged over the processes, as far as asked for."""
    if compile:
        compile_regions(method)
    if world.size == 1:
        return method
    devices = [device.index] if device.type == "cuda" else None
    # Every process computes the same buffers; newer torch names the option that says so differently.
    names = signature(DistributedDataParallel).parameters
    quiet = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    options: dict[str, Any] = {"gradient_as_bucket_view": True, quiet: False}
    return DistributedDataParallel(method, device_ids=devices, **options)
