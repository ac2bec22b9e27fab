"""Hostile and damaged files of weights: refused in words, nothing run, nothing written, nothing half-loaded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from faults.limits import try_all
from faults.weight_files import (
    damaged,
    evil_pickles,
    lying_safetensors,
    odd_tensors,
    strange_archives,
    tiny_state,
    whole_weights,
)

from fdkit.errors import FdkitError, WeightsError
from fdkit.teachers.files import read_file
from fdkit.teachers.loading import load_teacher

pytestmark = pytest.mark.filterwarnings("ignore")  # PyTorch's own words about damaged pickles

HOSTILE = {
    "pickles": lambda folder: evil_pickles(str(folder / "marker")),
    "archives": lambda folder: strange_archives(),
    "headers": lambda folder: lying_safetensors(),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_are_refused_and_nothing_of_them_is_run_or_kept(kind: str, tmp_path: Path) -> None:
    outside = Path("/tmp/fdkit-owned")
    assert not outside.exists()
    path = tmp_path / "weights.pth"

    def load(data: bytes) -> None:
        path.write_bytes(data)
        load_teacher(str(path), architecture="vit_tiny_patch16_224")

    trial = try_all(load, list(HOSTILE[kind](tmp_path).items()), refusals=(FdkitError,))
    assert trial.failures == []
    assert (trial.read, trial.refused) == (0, trial.tried)
    assert [entry.name for entry in tmp_path.iterdir()] == ["weights.pth"]
    assert not outside.exists()


def test_the_traps_work(tmp_path: Path) -> None:
    """Read without a guard, these pickles do make the marker: the test above can fail."""
    import pickle

    marker = tmp_path / "marker"
    sprung = 0
    for name, data in evil_pickles(str(marker)).items():
        if name in ("os.system, pickle", "GLOBAL, alone", "INST, alone", "OBJ, alone", "STACK_GLOBAL, alone"):
            start = 0 if "alone" in name else data.rindex(b"\x80\x02}q")
            pickle.loads(data[start:])
            sprung += marker.exists()
            marker.unlink(missing_ok=True)
    assert sprung == 5


def load_state(state: dict[str, Any], folder: Path) -> None:
    path = folder / "weights.pth"
    torch.save(state, path)
    load_teacher(str(path), image_size=32)


def test_states_of_the_right_names_that_are_no_weights(tmp_path: Path) -> None:
    load_state(tiny_state(), tmp_path)
    for name, state in odd_tensors().items():
        if name == "expanded from one number":  # of zeros, which are weights
            load_state(state, tmp_path)
            continue
        with pytest.raises(WeightsError) as refused:
            load_state(state, tmp_path)
        assert str(tmp_path) in refused.value.message, name


def test_random_damage_is_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        read_file(path)

    trial = try_all(read, damaged(whole_weights(), 1500, seed=1), refusals=(FdkitError,))
    assert trial.failures == []
    assert trial.refused > trial.tried / 2
    assert trial.read > 0
