"""One self-contained HTML page: no remote asset, readable on a phone, in the dark and on paper.

Its policy lets no script run but the attention viewer's own, which it names by its hash, and loads nothing.
"""

import base64
import hashlib
import io
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from fdkit.analysis._figure import NARROW, WIDE, figure_bytes
from fdkit.errors import OutputError, write_failure

if TYPE_CHECKING:
    from PIL.Image import Image


MAX_PAGE_MEGABYTES = 15
"""What a page should stay under, so that it can be sent and opens at once."""


class Column(NamedTuple):
    """A column of a table."""

    header: str
    format: str = ""
    """How its numbers are written: a format specification such as ".1%" or ",.0f"."""
    best: Literal["max", "min"] | None = None
    """Which of its numbers is set in bold; none if left out."""


class Table(NamedTuple):
    """Rows of text and numbers; None is an empty cell."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[str | float | None]]
    caption: str = ""


class Picture(NamedTuple):
    """An image of SVG, PNG, JPEG or WebP bytes, and the words for those who do not see it."""

    image: bytes
    alt: str
    caption: str = ""
    narrow: bytes | None = None
    """The same for a phone's width; None shows `image` everywhere."""
    photo: bool = False
    """Shown as it is in the dark; drawings have their lightness turned around instead."""


class Drawing(NamedTuple):
    """What `picture` makes a Picture of, once all drawings of a page are known: see `drawing.with_pictures`."""

    draw: Callable[[float], Any]
    """Gives the matplotlib figure for a width in inches."""
    alt: str
    photo: bool = False


class Thumbnail(NamedTuple):
    """One image of a gallery."""

    image: bytes
    """PNG or JPEG."""
    label: str
    is_pixelated: bool = False
    """Enlarged with visible pixels, as images of a few pixels should be."""


class Details(NamedTuple):
    """Something to unfold: a text whose lines are kept, a table, or both."""

    summary: str
    text: str = ""
    table: Table | None = None


class Section(NamedTuple):
    """A heading and what stands below it, in the order of the fields; backticks in a paragraph set code."""

    heading: str
    paragraphs: Sequence[str] = ()
    facts: Sequence[tuple[str, str]] = ()
    """Names and values, which may be long."""
    table: Table | None = None
    viewer: Mapping[str, Any] | None = None
    """Numbers of the analysis attention-viewer, to explore; one section of a page may have them."""
    pictures: "Sequence[Picture | Drawing]" = ()
    """Drawings have to be made into pictures before the page is written."""
    gallery: Sequence[Thumbnail] = ()
    code: str = ""
    """A command to copy."""
    details: Sequence[Details] = ()


def picture(draw: Callable[[float], Any], alt: str, caption: str = "", *, photo: bool = False) -> Picture:
    """A drawing in both widths; draw: gives the matplotlib figure for a width in inches.

    photo: it holds photos or colour maps: stored as pixels, which take less room, and left as it is in the dark.
    """
    kind = "webp" if photo else "svg"
    wide, narrow = (figure_bytes(draw(width), kind, transparent=not photo) for width in (WIDE, NARROW))
    return Picture(wide, alt, caption, narrow=narrow, photo=photo)


def thumbnail(image: "Image", label: str, *, max_side: int = 192) -> Thumbnail:
    """An image small enough for a page; images of 64 pixels or less keep every pixel."""
    buffer = io.BytesIO()
    if max(image.size) <= 64:
        image.save(buffer, format="PNG")
        return Thumbnail(buffer.getvalue(), label, is_pixelated=True)
    small = image.convert("RGB")
    small.thumbnail((max_side, max_side))
    small.save(buffer, format="JPEG", quality=85)
    return Thumbnail(buffer.getvalue(), label)


def write_page(
    path: Path, title: str, *, lead: str, sections: Sequence[Section], facts: Sequence[tuple[str, str]] = ()
) -> Path:
    """Writes the page in one step, so that a reader never meets half of it, and returns its path.

    lead: the result in one or two sentences; facts: names and values shown below it, such as the commit or a licence.
    Raises OutputError if the page cannot be written.
    """
    content = render_page(title, lead=lead, sections=sections, facts=facts)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(content, encoding="utf-8", errors="backslashreplace")
        temporary.replace(path)
    except OSError as error:
        failed = write_failure(error) or OutputError(f"cannot write the page {path}: {error.strerror}")
        raise failed from error
    return path


def render_page(
    title: str, *, lead: str, sections: Sequence[Section], facts: Sequence[tuple[str, str]] = ()
) -> str:
    """The page as HTML. Every text is escaped, in the viewer's data too.

    Raises ValueError if more than one section holds a viewer, or one a drawing.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    if any(isinstance(one, Drawing) for section in sections for one in section.pictures):
        raise ValueError(
            "a page takes pictures, and a section still holds a drawing: see drawing.with_pictures"
        )
    num_viewers = sum(section.viewer is not None for section in sections)
    if num_viewers > 1:
        raise ValueError(f"a page holds one attention viewer, not {num_viewers}")
    scripts = [(Path(__file__).parent / "viewer.js").read_text(encoding="utf-8")] if num_viewers else []

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"data_uri": _data_uri, "cells": _cells}
    template = environment.get_template("page.html.j2")
    return template.render(
        title=title,
        lead=lead,
        sections=sections,
        facts=facts,
        scripts=[Markup(script) for script in scripts],
        script_policy=Markup("".join(f"; script-src '{_policy_hash(script)}'" for script in scripts)),
    )


def _policy_hash(script: str) -> str:
    """How a content security policy names a script, so that no other may run."""
    digest = hashlib.sha256(script.encode("utf-8")).digest()
    return f"sha256-{base64.b64encode(digest).decode('ascii')}"


class _Cell(NamedTuple):
    text: str
    in_numbers: bool
    """Whether its column holds numbers, which stand on the right."""
    is_best: bool


def _cells(table: Table) -> list[list[_Cell]]:
    """The table's rows as they are shown, with the best number of each column marked."""
    for row in table.rows:
        if len(row) != len(table.columns):
            raise ValueError(f"a table of {len(table.columns)} columns has the row {tuple(row)}")
    by_column = [
        _column_cells(column, [row[place] for row in table.rows])
        for place, column in enumerate(table.columns)
    ]
    return [list(row) for row in zip(*by_column, strict=True)]


def _column_cells(column: Column, values: list[str | float | None]) -> list[_Cell]:
    numbers = [value for value in values if isinstance(value, int | float)]
    best = {"max": max, "min": min}[column.best](numbers) if column.best and len(numbers) > 1 else None
    return [
        _Cell(_written(value, column.format), bool(numbers), best is not None and value == best)
        for value in values
    ]


def _written(value: str | float | None, number_format: str) -> str:
    if value is None:
        return "–"
    return value if isinstance(value, str) else format(value, number_format)


def _data_uri(image: bytes) -> str:
    kinds = {b"\x89PN": "png", b"\xff\xd8\xff": "jpeg", b"RIF": "webp", b"<?x": "svg+xml", b"<sv": "svg+xml"}
    kind = kinds.get(image[:3])
    if kind is None:
        raise ValueError(f"a picture must be SVG, PNG, JPEG or WebP, and this one starts with {image[:8]!r}")
    return f"data:image/{kind};base64,{base64.b64encode(image).decode('ascii')}"
