"""Numbers of an analysis as rows of a table that any spreadsheet reads."""

import csv
import io
from collections.abc import Iterator, Mapping
from typing import Any

HEADER = ("model", "quantity", "index_1", "index_2", "value")
MAX_DEPTH = 2
"""Lists in lists in lists, such as pictures and matrices for each layer, are in the JSON alone."""


def numbers_to_csv(numbers: Mapping[str, Any]) -> str:
    """Every number of an analysis, one a row: model, quantity, up to two positions counted from 0, and value.

    Positions are those of the numbers: of "distance", a list a layer with a number a head, layer and head. Quantities
    of no model have an empty one.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(HEADER)
    for key, value in numbers.items():
        if key == "models":
            for model in value:
                writer.writerows(_rows(str(model["name"]), model))
        elif key != "command":
            writer.writerows(_rows("", {key: value}))
    return buffer.getvalue()


def _rows(model: str, table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str | float, ...]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _rows(model, value, f"{prefix}{key}.")
        elif _depth(value) <= MAX_DEPTH:
            for place, number in _numbers(value):
                yield (model, f"{prefix}{key}", *place, *[""] * (MAX_DEPTH - len(place)), number)


def _depth(value: Any) -> int:
    return 1 + max((_depth(one) for one in value), default=0) if isinstance(value, list) else 0


def _numbers(value: Any, place: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], float]]:
    if isinstance(value, list):
        for number, one in enumerate(value):
            yield from _numbers(one, (*place, number))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield place, value
