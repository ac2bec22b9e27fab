"""Recipes drawn at random from the fields a command has: right names and types with odd values, and wrong ones."""

import random
import types
from enum import Enum
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from fdkit.config import Config

INTEGERS = (-1, 0, 1, 2, 3, 5, 8, 16, 31, 10**6, 10**12)
REALS = (-1.0, -0.0, 0.0, 1e-12, 1e-3, 0.1, 0.5, 0.9, 1.0, 1.5, 30.0, 1e9, 1e300)
TEXTS = (
    "",
    "auto",
    "digits",
    "none",
    "cls",
    "a b",
    "../..",
    "vit_tiny_patch16_224",
    "<b>",
    "ü\n",
    "0",
    "1e-3",
)
OF_WRONG_TYPE = (None, True, -3, 2.5, "text", [], [1, "a"], {}, {"a": 1}, [[1.0]], "nan", ".inf")


def drawn(annotation: Any, draw: random.Random) -> Any:
    """A value of a type, odd ones among them; of another type now and then."""
    if draw.random() < 0.04:
        return draw.choice(OF_WRONG_TYPE)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return drawn(arguments[0], draw)
    if origin in (Union, types.UnionType):
        return drawn(draw.choice(arguments), draw)
    if origin is Literal:
        return draw.choice(arguments)
    if annotation is type(None):
        return None
    if annotation is bool:
        return draw.random() < 0.5
    if annotation is int:
        return draw.choice(INTEGERS)
    if annotation is float:
        return draw.choice(REALS)
    if origin is tuple:
        kinds = [arguments[0]] * draw.randint(0, 3) if Ellipsis in arguments else arguments
        return [drawn(kind, draw) for kind in kinds]
    if origin in (list, set):
        return [drawn(arguments[0], draw) for _ in range(draw.randint(0, 3))]
    if origin is dict:
        return {str(drawn(arguments[0], draw)): drawn(arguments[1], draw) for _ in range(draw.randint(0, 2))}
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return draw.choice(list(annotation)).value
    return draw.choice(TEXTS)


def changed(kind: type[Config], base: dict[str, Any], draw: random.Random, changes: int) -> dict[str, Any]:
    """A recipe with some fields, at any depth, set to drawn values over `base`; a name that is none among them."""
    values = {key: dict(value) if isinstance(value, dict) else value for key, value in base.items()}
    for _ in range(changes):
        target, current = values, kind
        while True:
            name = draw.choice([name for name, field in current.model_fields.items() if not field.exclude])
            annotation = current.model_fields[name].annotation
            if not (isinstance(annotation, type) and issubclass(annotation, Config)):
                break
            inner = target.setdefault(name, {})
            if not isinstance(inner, dict):
                break
            target, current = inner, annotation
        target[name if draw.random() > 0.02 else f"{name}s"] = drawn(annotation, draw)
    return values
