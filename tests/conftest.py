"""What every test shares: one thread, no network, and the real data where it is at hand."""

import logging
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


@pytest.fixture(autouse=True)
def _fresh_log() -> None:
    """The log as a program finds it that has called no command: pytest hears it, and nobody else."""
    log = logging.getLogger("fdkit")
    log.handlers.clear()
    log.setLevel(logging.NOTSET)
    log.propagate = True


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real images, real weights and golden values beside the repository."""
    if not SHARED.is_dir():
        pytest.skip("the folder ../shared with real data and golden values is not here")
    return SHARED


LAST = ("test_plan_command", "test_profile_command", "test_cost", "test_compiling")
"""Modules that have autograd work on tensors without values, which starts threads of its own: a process that had them
can fork no other that computes gradients."""
FORKING = ("start_ranks", "os.fork(", "from training_toys import", "from faults")
"""What modules say whose tests fork."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every process comes to tests that fork before all others, and to those that bar it at the end."""
    texts = {path: path.read_text() for path in {item.path for item in items}}
    places = {
        path: 2 if path.stem in LAST else 0 if any(word in text for word in FORKING) else 1
        for path, text in texts.items()
    }
    items.sort(key=lambda item: places[item.path])
