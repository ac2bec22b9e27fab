"""Reads ../shared/golden: outputs of reference implementations, and the seeded weights and images behind them.

A weight's values follow from its name, shape and seed through numpy's frozen legacy generator. The name is the key as
stored, or the stored key without a prefix where a golden file says so.
"""

import json
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

TOLERANCE = 2e-4
EMBEDDINGS = ("pos", "token", "table")


def weight(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """The weight of this name, shape and seed."""
    generator = np.random.RandomState((zlib.crc32(name.encode()) + 7919 * seed) % 2**31)
    normal = generator.standard_normal(shape or 1).reshape(shape)
    return torch.from_numpy(np.asarray(_spread(name.rpartition(".")[2], normal), dtype=np.float32))


def state_dict(file: Path, seed: int, *, prefix: str = "") -> dict[str, Tensor]:
    """The weights of every key the file lists that starts with the prefix; names leave the prefix out."""
    with np.load(file) as content:
        shapes = json.loads(str(content["shapes"]))
    names = {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}
    return {name: weight(name, tuple(shape), seed) for name, shape in names.items()}


def arrays(file: Path) -> dict[str, Tensor]:
    """The numeric arrays in a golden file."""
    with np.load(file) as content:
        return {
            key: torch.from_numpy(content[key]) for key in content.files if content[key].dtype.kind in "fiub"
        }


def images(batch: int = 2, size: int = 224) -> Tensor:
    """(batch, 3, size, size) in [0, 1]: smooth, from seeded 8x8 noise."""
    noise = torch.from_numpy(np.random.RandomState(123).rand(batch, 3, 8, 8).astype(np.float32))
    return F.interpolate(noise, size=(size, size), mode="bicubic", align_corners=False).clamp(0, 1)


def _spread(leaf: str, normal: np.ndarray) -> np.ndarray:
    """The spread that suits a kind of weight, told by the last part of its name and its number of axes."""
    if leaf == "running_var":
        return 1 + 0.1 * np.abs(normal)
    if leaf.startswith("gamma"):
        return 0.1 + 0.02 * normal
    if normal.ndim >= 2:
        is_embedding = leaf == "class_embedding" or any(part in leaf for part in EMBEDDINGS)
        return 0.1 * normal if is_embedding else normal / np.sqrt(max(np.prod(normal.shape[1:]), 1))
    return 1 + 0.1 * normal if leaf == "weight" else 0.1 * normal
