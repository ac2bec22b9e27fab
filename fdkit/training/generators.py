"""The random generators that training itself draws from, such as for stochastic depth: seeded, saved, put back.

Views and the order of images have generators of their own, keyed by seed, epoch and index.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


def seed_generators(seed: int, rank: int) -> None:
    """Seed torch's generators, on every device, differently for each process."""
    torch.manual_seed(int(np.random.SeedSequence([seed, rank]).generate_state(1, np.uint64)[0] >> 1))


def get_generators(device: torch.device) -> dict[str, Tensor]:
    """States of the generators of the CPU and of this device, as bytes."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_generators(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Put back what `get_generators` gave; a device it was not given for keeps its state."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


@contextmanager
def undisturbed_generators(device: torch.device) -> Iterator[None]:
    """Leave the generators as they were, whatever the block draws."""
    before = get_generators(device)
    try:
        yield
    finally:
        set_generators(before, device)


@contextmanager
def deterministic_kernels(wanted: bool) -> Iterator[None]:
    """Inside, if wanted, PyTorch chooses kernels that give the same bits every time, and refuses where it has none.

    cuBLAS takes a workspace of its own for that, which has to be asked for before its first use in the process.
    """
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    filling: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    fills = filling.fill_uninitialized_memory
    try:
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
        filling.fill_uninitialized_memory = False  # it guards against bugs, not against chance
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
        filling.fill_uninitialized_memory = fills
