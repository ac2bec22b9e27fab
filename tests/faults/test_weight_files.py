"""Hostile and damaged files of weights: refused in words, nothing run, nothing written, nothing half-loaded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from faults.weight_files import evil_pickles, odd_tensors, tiny_state, try_weights

from fdkit.errors import WeightsError
from fdkit.teachers.loading import load_teacher

pytestmark = pytest.mark.filterwarnings("ignore")  # PyTorch's own words about damaged pickles


def test_hostile_and_damaged_files_are_refused_and_nothing_of_them_is_run_or_kept(tmp_path: Path) -> None:
    result = try_weights(tmp_path, amount=1500, seed=1)
    assert result["failures"] == []
    assert result["executions"] == 0
    assert result["hostile"] > 45
    assert result["damaged"] == 1500
    assert result["refused"] > result["tried"] / 2
    assert result["read"] > 0


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
