"""Configuration: recipes (strict YAML) and flags become one frozen, validated model."""

import copy
import re
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, create_model
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from fdkit.errors import ConfigError, did_you_mean

MAX_RECIPE_BYTES = 1_000_000


class Config(BaseModel):
    """Base of every configuration: frozen, unknown fields refused, field docs written below the field."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )


C = TypeVar("C", bound=Config)
Values = dict[str, Any]


def with_defaults(kind: type[C], defaults: Values) -> type[C]:
    """The same kind of configuration with other defaults; its fields, their rules and words stay."""
    if not defaults:
        return kind
    unknown = defaults.keys() - kind.model_fields.keys()
    assert not unknown, f"{kind.__name__} has no fields {sorted(unknown)}"
    fields: Any = {
        name: (kind.model_fields[name].rebuild_annotation(), _with_default(kind.model_fields[name], value))
        for name, value in defaults.items()
    }
    return create_model(kind.__name__, __base__=kind, __doc__=kind.__doc__, **fields)


def _with_default(field: FieldInfo, value: Any) -> FieldInfo:
    other = copy.copy(field)
    other.default, other.default_factory = value, None
    return other


class _StrictLoader(yaml.SafeLoader):
    """YAML 1.2 scalars (1e-4 is a number, `no` a word), each key once, no aliases."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.constructor.ConstructorError(None, None, "aliases (*name) are not allowed", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is not text", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_PLAIN_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map")}
_StrictLoader.yaml_constructors = {
    tag: make for tag, make in yaml.SafeLoader.yaml_constructors.items() if tag is None or tag in _PLAIN_TAGS
}
_StrictLoader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in [
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("int", r"^[-+]?[0-9][0-9_]*$", "-+0123456789"),
    ("float", r"^[-+]?(?:[0-9][0-9_]*)?\.?[0-9]+(?:[eE][-+]?[0-9]+)?$", "-+.0123456789"),
    ("float", r"^[-+]?[0-9]+\.(?:[eE][-+]?[0-9]+)?$", "-+0123456789"),
    ("null", r"^(?:~|null|Null|NULL|)$", "~nN\0"),
]:
    _StrictLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), [*_first.replace("\0", ""), ""]
    )


class _StrictDumper(yaml.SafeDumper):
    """Quotes every text that either reading of YAML would take for something else."""


for _letter, _resolvers in _StrictLoader.yaml_implicit_resolvers.items():
    for _tag_name, _regexp in _resolvers:
        _StrictDumper.add_implicit_resolver(_tag_name, _regexp, [_letter])


def parse_yaml(text: str, origin: str) -> Values:
    """The mapping that YAML text holds; origin names it in errors.

    Raises ConfigError with the line for anything but one plain mapping: other tags, a repeated key, an alias.
    """
    if len(text) > MAX_RECIPE_BYTES:
        raise ConfigError(f"{origin}: {len(text):,} characters; a recipe has at most {MAX_RECIPE_BYTES:,}")
    try:
        values = yaml.load(text, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{origin}:{line}: not a recipe: {error.problem}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{origin}: not a recipe: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{origin}: holds {type(values).__name__}, not `field: value` lines")
    return values


def read_yaml(path: Path) -> Values:
    """The mapping in a YAML file. Raises ConfigError if it cannot be read or is no plain mapping."""
    try:
        if path.stat().st_size > MAX_RECIPE_BYTES:
            raise ConfigError(f"{path}: larger than {MAX_RECIPE_BYTES:,} bytes; no recipe")
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a recipe: {error}") from error
    return parse_yaml(text, str(path))


def to_yaml(config: Config) -> str:
    """The whole configuration as YAML: what `--recipe` reads back to an equal configuration."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_StrictDumper, sort_keys=False)


def recipes_folder() -> Path:
    """The folder of shipped recipes: inside the wheel, or beside the package in a checkout."""
    inside = Path(__file__).parent / "recipes"
    return inside if inside.is_dir() else Path(__file__).parents[1] / "recipes"


def recipe_names() -> list[str]:
    """Names of the shipped recipes, such as "distill/clip_vitl"."""
    root = recipes_folder()
    return sorted(str(path.relative_to(root).with_suffix("")) for path in root.glob("*/*.yaml"))


def find_recipe(name: str, command: str) -> Path:
    """The file of a recipe: a path, or a shipped name with or without its folder ("clip_vitl").

    Raises ConfigError naming the nearest shipped recipes.
    """
    path = Path(name)
    if path.suffix in {".yaml", ".yml"}:
        if path.is_file():
            return path
        raise ConfigError(
            f"--recipe {name}: no such file", "a shipped recipe is named without .yaml, such as clip_vitl"
        )
    for candidate in (name, f"{command}/{name}"):
        shipped = recipes_folder() / f"{candidate}.yaml"
        if candidate in recipe_names():
            return shipped
    known = [recipe.removeprefix(f"{command}/") for recipe in recipe_names() if recipe.startswith(command)]
    hint = (
        did_you_mean(name.removeprefix(f"{command}/"), known) or f"recipes for {command}: {', '.join(known)}"
    )
    raise ConfigError(f"--recipe {name}: no file and no shipped recipe has this name", hint)


def validate(kind: type[C], values: Values, origin: str) -> C:
    """A configuration of `kind` from plain values; origin (a file, "flags") leads every error line.

    Raises ConfigError with all problems, one a line: "recipe.yaml: optim.wieght_decay: unknown field; ...".
    """
    _refuse_zero_bytes(values, origin)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(explain(kind, error, origin))) from None


def _refuse_zero_bytes(value: Any, origin: str, place: str = "") -> None:
    """Raises ConfigError for a text that no file or process can be named by."""
    if isinstance(value, str) and "\0" in value:
        raise ConfigError(f"{origin}: {place}: {value[:60]!r} holds a zero byte", "leave it out")
    if isinstance(value, dict | list | tuple):
        for key, one in value.items() if isinstance(value, dict) else enumerate(value):
            _refuse_zero_bytes(one, origin, f"{place}.{key}".removeprefix("."))


def check_recipe(kind: type[Config], values: Values, origin: str) -> None:
    """Raises ConfigError for what is wrong in a recipe itself; what it leaves to the flags may be missing."""
    try:
        kind.model_validate(values)
    except ValidationError as error:
        problems = explain(kind, error, origin, ignore_missing=True)
        if problems:
            raise ConfigError("\n".join(problems)) from None


def explain(
    kind: type[Config], error: ValidationError, origin: str, ignore_missing: bool = False
) -> list[str]:
    """Every problem of a refused configuration in one line each, led by origin."""
    return [
        f"{origin}: {_explain(kind, details)}"
        for details in error.errors(include_url=False)
        if not (ignore_missing and details["type"] == "missing")
    ]


def _explain(kind: type[Config], details: ErrorDetails) -> str:
    """One problem in the user's words: where, what was given, what is wanted."""
    location = ".".join(str(part) for part in details["loc"])
    if details["type"] == "extra_forbidden":
        *parents, name = [str(part) for part in details["loc"]]
        fields = sorted(_fields_at(kind, parents))
        known = "known: " + ", ".join(fields)
        return f"{location}: unknown field; {did_you_mean(name, fields) or known}"
    if details["type"] == "missing":
        return f"{location}: missing"
    wanted = details["msg"][0].lower() + details["msg"][1:]
    wanted = wanted.removeprefix("value error, ").removeprefix("assertion failed, ")
    return f"{location}: {details['input']!r}: {wanted}" if location else wanted


def _fields_at(kind: type[Config], parents: list[str]) -> Iterator[str]:
    """Field names of the nested configuration that the path of parents leads to."""
    current: Any = kind
    for parent in parents:
        field = current.model_fields.get(parent)
        if field is None:
            return
        options = [field.annotation, *get_args(field.annotation)]
        nested = [option for option in options if isinstance(option, type) and issubclass(option, Config)]
        if not nested:
            return
        current = nested[0]
    yield from current.model_fields
