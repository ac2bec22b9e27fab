"""Processes that train together, one of which is lost, or has something else than the others."""

from pathlib import Path

import pytest
from faults.processes import DIFFERENCES, lose_processes, set_apart

pytestmark = pytest.mark.distributed


@pytest.mark.slow
def test_what_one_rank_has_otherwise_is_found_before_the_first_step(tmp_path: Path) -> None:
    found = set_apart(tmp_path, amount=len(DIFFERENCES), seed=0)
    assert found["failures"] == []
    assert found["tried"] == len(DIFFERENCES)
    assert found["longest_seconds"] < 60


@pytest.mark.long
def test_a_lost_rank_is_named_and_costs_no_bit(tmp_path: Path) -> None:
    found = lose_processes(tmp_path, amount=3, seed=0)
    assert found["failures"] == []
    assert found["bit_exact"] == 3
