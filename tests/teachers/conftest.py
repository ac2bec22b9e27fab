"""Golden values, seeded weights, and small files of weights."""

import json
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import Tensor


def seeded(key: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """A tensor that depends on its name, its shape and the seed alone; the rule behind the golden files."""
    stream = np.random.RandomState((zlib.crc32(key.encode()) + 7919 * seed) % 2**31)
    values = stream.standard_normal(int(np.prod(shape)) if shape else 1).reshape(shape)
    leaf = key.split(".")[-1]
    if leaf == "weight" and len(shape) == 1:
        values = 1 + 0.1 * values
    elif len(shape) < 2 or any(part in leaf for part in ("pos", "token", "table")):
        values = 0.1 * values
    else:
        values = values / np.sqrt(max(int(np.prod(shape[1:])), 1))
    return torch.from_numpy(values.astype(np.float32))


class Golden:
    """One golden file: its arrays, and the weights behind it in the official key layout."""

    def __init__(self, path: Path, seed: int) -> None:
        self.arrays = np.load(path)
        shapes = json.loads(str(self.arrays["shapes"]))
        self.state = {key: seeded(key, tuple(shape), seed) for key, shape in shapes.items()}

    def __getitem__(self, name: str) -> Tensor:
        return torch.from_numpy(self.arrays[name])


@pytest.fixture(scope="session")
def golden(shared: Path) -> Callable[[str, int], Golden]:
    return lambda name, seed: Golden(shared / "golden" / f"{name}.npz", seed)


@pytest.fixture(scope="session")
def golden_images() -> Tensor:
    """(2, 3, 224, 224) in [0, 1]."""
    coarse = np.random.RandomState(123).rand(2, 3, 8, 8).astype(np.float32)
    images = torch.nn.functional.interpolate(
        torch.from_numpy(coarse), size=(224, 224), mode="bicubic", align_corners=False
    )
    return images.clamp(0, 1)


SMALL_VIT = {"embed_dim": 192, "depth": 2, "num_heads": 3, "img_size": 32, "patch_size": 8, "num_classes": 5}


@pytest.fixture
def small_vit() -> torch.nn.Module:
    """A timm ViT of width 192 with a classifier, 4x4 patches."""
    return timm.create_model("vit_tiny_patch16_224", **SMALL_VIT).eval()
