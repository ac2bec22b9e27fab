import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdkit.config import Config, find_recipe, parse_yaml, read_yaml, recipe_names, to_yaml, validate
from fdkit.errors import ConfigError


class Inner(Config):
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)


class Outer(Config):
    name: str
    epochs: float = 1.0
    note: str | None = None
    optim: Inner = Inner()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("3", 3),
        ("-1_000", -1000),
        (".5", 0.5),
        ("1.", 1.0),
        ("true", True),
        ("no", "no"),
        ("12:30:45", "12:30:45"),
        ("~", None),
        ("2021-01-01", "2021-01-01"),
        ("'1'", "1"),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: object) -> None:
    assert parse_yaml(f"a: {text}", "x") == {"a": value}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "line 3: not a recipe: a is given twice"),
        ("a: &x 1\nb: *x", r"line 2: .*aliases"),
        ("a: !!python/object/apply:os.system [id]", "line 1: .*python/object"),
        ("- 1\n- 2", "holds list"),
        ("", "holds NoneType"),
        ("a: [1", "line 1"),
        ("1: 2", "key 1 is not text"),
        ("a:\n\t- 1", "line 2"),
        ("a: " + "x" * 1_000_001, "at most"),
        ("a: " + "x" * 10_000_000, "10,000,003 characters; a recipe has at most"),
        ("a: 1\nb: !!python/name:os.system", r"line 2: .*python/name"),
        ("a: !!python/object/new:os.system [id]", r"line 1: .*python/object"),
        ("a: !!binary aGk=", r"line 1: .*binary"),
        ("a: !!set {x, y}", r"line 1: .*set"),
        ("a: !!timestamp 2021-01-01", r"line 1: .*timestamp"),
        ("a: !mine 3", r"line 1: .*!mine"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", r"line 2: .*aliases"),
        ("a: 1\n<<: {b: 2}\n<<: {c: 3}", r"given twice|<<"),
        ("optim:\n  lr: 1\n  wd: 2\n  lr: 3", "line 4: not a recipe: lr is given twice"),
        ("a: 1\n\tb: 2", "line 2"),
        ("a: 1\n---\nb: 2", "line 2|line 3"),
        ("[" * 5000, "not a recipe"),
        ("a: " + "{b: " * 3000, "not a recipe"),
        ("a: \x00", "not a recipe"),
    ],
)
def test_anything_but_a_plain_mapping_is_refused_with_its_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_yaml(text, "recipe.yaml")


@given(st.text(max_size=200))
def test_no_text_makes_the_reader_fail_in_another_way(text: str) -> None:
    with contextlib.suppress(ConfigError):
        assert isinstance(parse_yaml(text, "x"), dict)


TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30)


@given(name=TEXT, note=st.none() | TEXT, decay=st.floats(0, 1))
def test_a_saved_configuration_reads_back_equal(name: str, note: str | None, decay: float) -> None:
    config = Outer(name=name, note=note, optim=Inner(weight_decay=decay))
    assert validate(Outer, parse_yaml(to_yaml(config), "x"), "x") == config


def test_all_problems_are_told_at_once_with_the_right_field_suggested() -> None:
    values = {"epochs": "many", "optim": {"wieght_decay": 1}, "zzz": 1}
    with pytest.raises(ConfigError) as caught:
        validate(Outer, values, "r.yaml")
    lines = caught.value.message.splitlines()
    assert "r.yaml: name: missing" in lines
    assert "r.yaml: optim.wieght_decay: unknown field; did you mean weight_decay?" in lines
    assert any(line.startswith("r.yaml: epochs: 'many':") for line in lines)
    assert any("zzz: unknown field; known: epochs, name, note, optim" in line for line in lines)


def test_configurations_are_frozen_and_finite() -> None:
    config = Outer(name="a")
    with pytest.raises(ValueError, match="frozen"):
        config.name = "b"  # type: ignore[misc]
    with pytest.raises(ConfigError, match="epochs"):
        validate(Outer, {"name": "a", "epochs": float("nan")}, "x")


def test_recipes_are_found_by_name_and_a_misspelt_one_is_suggested() -> None:
    assert "distill/clip_vitl" in recipe_names()
    assert find_recipe("clip_vitl", "distill") == find_recipe("distill/clip_vitl", "distill")
    with pytest.raises(ConfigError, match="did you mean clip_vitl"):
        find_recipe("clip_vit_l", "distill")
    with pytest.raises(ConfigError, match="no such file"):
        find_recipe("mine.yaml", "distill")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfea\x00:\x00", "cannot be read as a recipe"),
        (b"a: \x80", "cannot be read as a recipe"),
        (b"a: " + b"x" * 10_000_000, "larger than 1,000,000 bytes"),
        (b"", "holds NoneType"),
    ],
)
def test_files_that_are_no_recipes_are_refused_by_name(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"mine\.yaml.*{message}"):
        read_yaml(tmp_path / "mine.yaml")


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes(b"\xef\xbb\xbfa: 1e-4\r\nb: no\r\n")
    assert read_yaml(tmp_path / "mine.yaml") == {"a": 1e-4, "b": "no"}
