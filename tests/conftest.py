"""What every test shares: one thread, no network, and the real data where it is at hand."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real images, real weights and golden values beside the repository."""
    if not SHARED.is_dir():
        pytest.skip("the folder ../shared with real data and golden values is not here")
    return SHARED
