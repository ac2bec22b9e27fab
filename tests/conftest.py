"""What every test shares: one thread, no network, and the real data where it is at hand."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

torch.set_num_threads(
    1
)  # sums, and so bits, depend on the number of threads; tests start processes of one thread

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Features of tests are kept apart from the user's, and go with them."""
    os.environ["FDKIT_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real images, real weights and golden values beside the repository."""
    if not SHARED.is_dir():
        pytest.skip("the folder ../shared with real data and golden values is not here")
    return SHARED


LAST = ("test_plan_command", "test_profile_command", "test_cost")
"""Modules that have autograd work on tensors without values, which starts threads of its own: a process that had them
can fork no other that computes gradients."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every process comes to those modules after all others."""
    items.sort(key=lambda item: item.path.stem in LAST)
