"""Flags: every field of a configuration, nested ones with a dot, as tyro shows and reads them, and the way back.

tyro only turns words into values of the right type; what may be given is decided by the configuration itself, so
that a flag and a recipe are refused in the same words.
"""

import json
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, get_args, get_origin

import tyro
from pydantic.fields import FieldInfo
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

from fdkit.config import Config, Values
from fdkit.errors import ConfigError


def parse_flags(kind: type[Config], arguments: Sequence[str], recipe: Values, program: str) -> Values:
    """All values of a configuration of `kind`: the flags given, over the recipe's, over the defaults.

    program: what the help calls the command. Leaves with code 2 (or 0 after the help), as tyro does, if a word is no
    flag, a value has the wrong type, or one is missing; nothing else is checked here.
    """
    registry = ConstructorRegistry()
    registry.struct_rule(_rule)
    shape: Any = kind  # what tyro returns is the dictionary that _collector makes of it
    defaults: Any = kind.model_construct(**recipe)
    values: Values = tyro.cli(
        shape,
        args=list(_words(kind, arguments)),
        default=defaults,
        prog=program,
        registry=registry,
    )
    return values


def _rule(info: StructTypeInfo) -> StructConstructorSpec | None:
    """How tyro sees a configuration: a group of flags whose values come back as a plain dictionary."""
    if not (isinstance(info.type, type) and issubclass(info.type, Config)):
        return None
    given = vars(info.default) if isinstance(info.default, Config) else {}
    given = {name: value for name, value in given.items() if name in info.default.model_fields_set}
    fields = sorted(info.type.model_fields.items(), key=lambda item: not item[1].is_required())
    flags = tuple(_flag(name, field, given) for name, field in fields)
    return StructConstructorSpec(_collector(info.type), flags)


def _flag(name: str, field: FieldInfo, given: Values) -> StructFieldSpec:
    kind: Any = field.rebuild_annotation()
    default = given[name] if name in given else field.get_default(call_default_factory=True)
    nested = nested_config(kind)
    if nested is not None:
        if not isinstance(default, (dict, Config)):
            raise ConfigError(f"recipe: {name}: {default!r} is not a section of fields")
        values = vars(default) if isinstance(default, Config) else default
        return StructFieldSpec(name, nested, nested.model_construct(**values), field.description)
    if _is_mapping(field):
        return StructFieldSpec(name, str, json.dumps(default), f"{field.description} As JSON.")
    if field.is_required() and name not in given:
        default = tyro.MISSING
    if isinstance(default, list):
        default = tuple(default)
    return StructFieldSpec(name, _without_constraints(kind), default, field.description)


def _collector(kind: type[Config]) -> Callable[..., Values]:
    """What makes a plain dictionary of a group's values; mappings are read from the JSON they are written in."""

    def collect(**values: Any) -> Values:
        for name, field in kind.model_fields.items():
            if _is_mapping(field):
                try:
                    values[name] = json.loads(values[name])
                except json.JSONDecodeError as error:
                    raise ConfigError(f"flags: {name}: {values[name]!r} is not JSON: {error.msg}") from error
        return values

    collect.__doc__ = kind.__doc__  # what the help says of the group
    return collect


def _is_mapping(field: FieldInfo) -> bool:
    return get_origin(field.annotation) is dict or field.annotation is dict


def _without_constraints(kind: Any) -> Any:
    """The type alone: limits are checked by the configuration; only tyro's own marks are kept."""
    if get_origin(kind) is Annotated:
        bare, *marks = get_args(kind)
        kept = [mark for mark in marks if type(mark).__module__.startswith("tyro")]
        bare = _without_constraints(bare)
        return Annotated[bare, *kept] if kept else bare
    if get_origin(kind) is tuple:
        return tuple[tuple(_without_constraints(part) for part in get_args(kind))]  # type: ignore[misc]
    return kind


def nested_config(annotation: Any) -> type[Config] | None:
    """The configuration class a field holds, if it holds one."""
    for option in (annotation, *get_args(annotation)):
        if isinstance(option, type) and issubclass(option, Config):
            return option
    return None


def _words(kind: type[Config], arguments: Sequence[str]) -> Iterator[str]:
    """The arguments as tyro wants them: `--flag true` as a switch, `10,20` as two numbers, aliases written out."""
    switches = set(_switches(kind))
    aliases = {short: flag for base in kind.__mro__ for short, flag in vars(base).get("ALIASES", {}).items()}
    queue = list(arguments)
    while queue:
        word = queue.pop(0)
        name, equals, value = word.partition("=")
        following = value if equals else (queue[0] if queue else "")
        if name.removeprefix("--").replace("-", "_") in switches and following.lower() in {"true", "false"}:
            if not equals:
                queue.pop(0)
            yield name if following.lower() == "true" else _negated(name)
        elif name in aliases:
            yield f"{aliases[name]}{equals}{value}"
        elif re.fullmatch(r"[-+.\deE]+(,[-+.\deE]+)+", word):
            yield from word.split(",")
        else:
            yield word


def _negated(flag: str) -> str:
    parent, dot, leaf = flag.removeprefix("--").rpartition(".")
    return f"--{parent}{dot}no-{leaf}"


def _switches(kind: type[Config], prefix: str = "") -> Iterator[str]:
    for name, field in kind.model_fields.items():
        nested = nested_config(field.annotation)
        if nested is not None:
            yield from _switches(nested, f"{prefix}{name}.")
        elif field.annotation is bool:
            yield f"{prefix}{name}"


def command_line(config: Config, command: str, choice: str = "") -> str:
    """What to type to get this configuration again: its models, and every flag that differs from its default.

    Fields that are no part of a configuration file, such as --output, are left out.
    """
    positional = getattr(config, "model", ())
    models = [positional] if isinstance(positional, str) else list(positional)
    words = ["fdkit", *command.split(), *([choice] if choice else []), *models]
    return shlex.join([*words, *_flag_words(config, "--")])


def _flag_words(config: Config, prefix: str) -> Iterator[str]:
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        flag = f"{prefix}{name.replace('_', '-')}"
        if isinstance(value, Config):
            yield from _flag_words(value, f"{flag}.")
        elif name == "model" or field.exclude or value == field.get_default(call_default_factory=True):
            continue
        elif _is_mapping(field):
            yield from (flag, json.dumps(value))
        elif isinstance(value, bool):
            yield from (flag, str(value).lower())
        else:
            yield from (flag, *(str(one) for one in (value if isinstance(value, (tuple, list)) else [value])))
