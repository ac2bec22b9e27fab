"""What a run holds does not grow with its steps; growth that is planted is found; a million files are no trouble."""

import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults.soak import LIMITS, distillation, grown, million_files, pictures, soak, soak_one

HELD: list[Any] = []


def leak_memory(num_bytes: int) -> Callable[[Any], None]:
    """So many bytes a step that are never given back, beside the allocator, which may have freed ones left."""

    def leak(trainer: Any) -> None:
        HELD.append(mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        HELD[-1].write(b"x" * num_bytes)

    return leak


def leak_files(trainer: Any) -> None:
    """One open file for every checkpoint."""
    if trainer.step % 50 == 0:
        os.open("/dev/null", os.O_RDONLY)


def test_slopes_are_those_of_a_line() -> None:
    steps = np.arange(0, 1000, 10)
    noise = np.random.default_rng(0).normal(0, 1, len(steps))
    rows = [
        {"step": int(step), "held": 5 + 0.02 * step + one} for step, one in zip(steps, noise, strict=True)
    ]
    found = grown(rows, "held", warm_up=300)
    design = np.stack([np.ones(70), steps[30:]], axis=1)
    values = np.array([row["held"] for row in rows[30:]])
    wanted, [rest], *_ = np.linalg.lstsq(design, values, rcond=None)
    assert found.slope == pytest.approx(1000 * wanted[1])
    error = np.sqrt(rest / 68 * np.linalg.inv(design.T @ design)[1, 1])
    assert found.error == pytest.approx(1000 * error)
    assert (found.start, found.end) == (values[0], values[-1])


@pytest.mark.slow
def test_a_run_with_leaks_is_told_from_one_without(tmp_path: Path) -> None:
    """One open file a checkpoint and 50 kB a step are found in 300 steps; nothing else is said to grow."""
    pictures(tmp_path / "images", 0)
    memory = leak_memory(50_000)

    def both(trainer: Any) -> None:
        memory(trainer)
        leak_files(trainer)

    found = soak_one(distillation(tmp_path), tmp_path, steps=300, seed=0, leak=both)
    assert [failure.split(" grew")[0] for failure in found["failures"]] == ["memory", "open files"]
    assert found["growth_in_1000_steps"].keys() == LIMITS.keys()


@pytest.mark.long
def test_many_steps_leave_nothing_behind(tmp_path: Path) -> None:
    outcome = soak(tmp_path, amount=2000, seed=0)
    assert outcome["failures"] == []
    assert outcome["tried"] == 3000


@pytest.mark.long
def test_a_kilobyte_a_step_is_found(tmp_path: Path) -> None:
    pictures(tmp_path / "images", 0)
    found = soak_one(distillation(tmp_path), tmp_path, steps=3000, seed=0, leak=leak_memory(1000))
    assert any(failure.startswith("memory grew") for failure in found["failures"])


def test_ten_thousand_files_are_listed_and_sampled(tmp_path: Path) -> None:
    outcome = million_files(tmp_path, amount=10_000, seed=0)
    assert outcome["failures"] == []
    assert outcome["tried"] == 10_000
    assert set(outcome["seconds_for"]) >= {"list and fingerprint", "read samples"}
