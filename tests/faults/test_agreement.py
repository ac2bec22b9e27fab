"""bf16 and fp32 agree within stated bounds, wrong versions do not; a seed gives the same bits, another one others."""

from pathlib import Path

import pytest
import torch
from faults.agreement import (
    BOUNDS,
    WRONG,
    beyond,
    curves,
    difference,
    precisions_agree,
    repeated,
    repeated_on_a_gpu,
    seeds_repeat,
    ways,
)

WAYS = {way.name: way for way in ways()}


def test_every_way_has_bounds() -> None:
    assert BOUNDS.keys() == WAYS.keys()


@pytest.mark.slow
def test_bf16_agrees_and_losses_in_bf16_do_not(tmp_path: Path) -> None:
    exact = curves(WAYS["distill"], tmp_path, seed=0, precision="fp32")
    assert beyond("distill", difference(exact, exact)) == []
    right = curves(WAYS["distill"], tmp_path, seed=0, precision="bf16")
    assert beyond("distill", difference(exact, right)) == []
    wrong = curves(WAYS["distill"], tmp_path, seed=0, precision="bf16", prepare=WRONG["losses in bf16"])
    assert beyond("distill", difference(exact, wrong)) != []


@pytest.mark.long
@pytest.mark.parametrize("name", WAYS)
def test_bf16_and_fp32_agree(name: str, tmp_path: Path) -> None:
    exact = curves(WAYS[name], tmp_path, seed=1, precision="fp32")
    assert beyond(name, difference(exact, curves(WAYS[name], tmp_path, seed=1, precision="bf16"))) == []


@pytest.mark.long
@pytest.mark.parametrize(("name", "version"), [("mocov1", "copies in bf16"), ("distill", "weights in bf16")])
def test_wrong_versions_are_beyond_the_bounds(name: str, version: str, tmp_path: Path) -> None:
    exact = curves(WAYS[name], tmp_path, seed=0, precision="fp32")
    wrong = curves(WAYS[name], tmp_path, seed=0, precision="bf16", prepare=WRONG[version])
    assert beyond(name, difference(exact, wrong)) != []


@pytest.mark.long
def test_precisions_of_ways_drawn_from_all(tmp_path: Path) -> None:
    outcome = precisions_agree(tmp_path, amount=2, seed=2)
    assert outcome["failures"] == []
    assert outcome["tried"] == len(outcome["differences"]) == 2


@pytest.mark.slow
def test_a_seed_gives_the_same_bits_and_another_others(tmp_path: Path) -> None:
    assert repeated(WAYS["mocov2"], tmp_path, seed=0).failures == []


@pytest.mark.long
@pytest.mark.parametrize("name", WAYS)
def test_seeds_repeat_in_every_method(name: str, tmp_path: Path) -> None:
    assert repeated(WAYS[name], tmp_path, seed=3).failures == []


@pytest.mark.long
def test_repeats_of_ways_drawn_from_all(tmp_path: Path) -> None:
    outcome = seeds_repeat(tmp_path, amount=1, seed=4)
    assert outcome["failures"] == []
    assert (outcome["tried"], outcome["runs"]) == (1, 5)


@pytest.mark.gpu
@pytest.mark.parametrize("name", WAYS)
def test_deterministic_runs_on_a_gpu_are_the_same_to_the_bit(name: str, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    assert repeated_on_a_gpu(WAYS[name], tmp_path) == []
