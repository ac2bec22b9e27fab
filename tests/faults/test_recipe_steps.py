"""Every shipped recipe takes two real steps, and the trial of that can fail."""

from pathlib import Path
from typing import Any

import pytest
import torch
from faults.recipe_steps import STUDENTS, report, two_steps, two_steps_of_every_recipe

from fdkit.config import recipe_names

SOME = ("finetune/tinymim_vitt", "pretrain/swav_2x224")


@pytest.mark.slow
@pytest.mark.parametrize("name", SOME)
def test_recipes_of_every_command_take_two_steps(name: str, tmp_path: Path) -> None:
    found = two_steps(name, tmp_path, seed=0)
    assert found.failures == []
    assert found.moved > 0.5
    assert found.cut["train.batch_size"].endswith("-> 2")


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(recipe_names(), key=lambda name: name not in STUDENTS.values()))
def test_every_recipe_takes_two_steps(name: str, every: Path) -> None:
    assert two_steps(name, every, seed=0).failures == []


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all recipes train, those that go on with another's run too."""
    return tmp_path_factory.mktemp("recipes")


@pytest.mark.long
def test_recipes_drawn_from_all(tmp_path: Path) -> None:
    outcome = two_steps_of_every_recipe(tmp_path, amount=2, seed=3)
    assert outcome["failures"] == []
    assert outcome["tried"] == len(outcome["recipes"]) == 2


def no_update() -> None:
    """An optimiser that does nothing."""

    def step(self: Any, closure: Any = None) -> None:
        return None

    torch.optim.AdamW.step = step  # type: ignore[method-assign]


def test_an_optimiser_that_does_nothing_is_found(tmp_path: Path) -> None:
    found = two_steps("distill/demo", tmp_path, seed=0, prepare=no_update)
    assert found.failures == ["no weight moved: 0.0"]
    assert report([found])["failures"] == ["distill/demo: no weight moved: 0.0"]
