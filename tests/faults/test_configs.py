"""Drawn recipes and command lines: what is wrong is refused in words, and what is sound trains."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
from faults.configs import fields_of, flags_of, recipes_of, subjects, try_configs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fdkit.commands._flags import parse_flags
from fdkit.config import parse_yaml, to_yaml, validate
from fdkit.errors import ConfigError

SUBJECTS = subjects()
KINDS = {name: subject.kind() for name, subject in SUBJECTS.items()}
DRAWN = settings(
    max_examples=150, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)


@given(data=st.data(), name=st.sampled_from(sorted(KINDS)))
@DRAWN
def test_a_drawn_recipe_is_a_configuration_or_refused(data: st.DataObject, name: str) -> None:
    """And what is one reads back equal from the YAML that a run folder keeps."""
    values: dict[str, Any] = data.draw(recipes_of(KINDS[name], base=SUBJECTS[name].base))
    fields = KINDS[name].model_fields
    required: dict[str, Any] = {"teacher": "demo", "data": "digits", "run": "x", "path": "x", "output": "x"}
    if "model" in fields:
        required["model"] = "demo" if fields["model"].annotation is str else ("demo",)
    by_flags = {key: value for key, value in required.items() if key in fields}
    with contextlib.suppress(ConfigError):
        config = validate(KINDS[name], by_flags | values, "recipe.yaml")
        kept = parse_yaml(to_yaml(config), "config.yaml")
        again = KINDS[name].model_validate(by_flags | kept)
        assert to_yaml(again) == to_yaml(config)


@given(data=st.data(), name=st.sampled_from(sorted(KINDS)))
@settings(DRAWN, max_examples=60)
def test_drawn_flags_are_values_or_refused(data: st.DataObject, name: str) -> None:
    flags = data.draw(flags_of(KINDS[name]))
    code: Any = 0
    try:
        parse_flags(KINDS[name], [flag for flag in flags if flag != "--debug"], {}, f"fdkit {name}")
    except SystemExit as ended:
        code = ended.code
    except ConfigError:
        code = 2
    assert code in (0, 2)


def test_every_field_of_every_command_is_drawn_from() -> None:
    """Fields of sections among them, such as optim.betas, and of all the methods."""
    paths = {".".join(field.path) for field in fields_of(KINDS["distill"], excluded=True)}
    assert {"optim.betas", "train.batch_size", "loader.workers", "output", "student.depth"} <= paths
    assert len(KINDS) > 40
    assert len(fields_of(KINDS["pretrain dino"])) > 60


@pytest.mark.slow
def test_a_few_drawn_command_lines_end_with_a_code_of_their_own(tmp_path: Path) -> None:
    names = ("distill", "pack", "evaluate knn", "teachers", "plan", "pretrain mae")
    result = try_configs(tmp_path, amount=12, seed=0, names=names)
    assert result["failures"] == []
    assert result["tried"] == 12
    assert result["codes"].get("2", 0) > 0


@pytest.mark.long
def test_drawn_command_lines_of_every_command_end_with_a_code_of_their_own(tmp_path: Path) -> None:
    result = try_configs(tmp_path, amount=110, seed=1)
    assert result["failures"] == []
    assert result["took_steps"] >= 2  # most of what is drawn is refused
    assert result["slow"] < 6


@pytest.mark.parametrize(
    ("field", "value"),
    [("loader.workers", 2**31), ("loader.timeout_seconds", 1e300), ("loader.retry_seconds", 1e300)],
)
def test_amounts_no_machine_has_are_refused(field: str, value: float) -> None:
    """Each of so many workers was forked, one by one, until somebody ended it."""
    section, _, name = field.partition(".")
    with pytest.raises(ConfigError, match=rf"{field}: .*less than or equal"):
        validate(KINDS["distill"], {"teacher": "demo", "data": "digits", section: {name: value}}, "x")


def test_a_zero_byte_is_refused_with_its_place() -> None:
    with pytest.raises(ConfigError, match=r"x: student\.name: 'a\\x00b' holds a zero byte"):
        validate(KINDS["distill"], {"teacher": "demo", "data": "digits", "student": {"name": "a\0b"}}, "x")
