"""`fdkit teachers`: the teachers known by a short name, as a list or one of them whole.

Nothing here needs torch, which takes seconds to import.
"""

import textwrap
from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple

import tyro
from pydantic import Field
from rich.console import Console
from rich.table import Table

from fdkit.commands._outcome import Outcome
from fdkit.config import Config
from fdkit.errors import ConfigError
from fdkit.teachers.catalog import Entry, Official, find, list_teachers

WIDE = 118
"""Columns of the terminal from which on the list has every column."""
WIDE_TITLES = (
    "teacher", "architecture", "px", "patch", "dim", "prefix", "licence", "linear", "k-NN", "tuned", "zero-shot", "from"
)  # fmt: skip
NARROW_TITLES = ("teacher", "architecture", "px/p", "licence", "top-1", "from")
NARROW_LICENCE = 12
"""Characters of a licence in the narrow list."""
WORDS = ("teacher", "architecture", "licence", "from")
"""Columns of words, on the left; numbers stand on the right."""


class Figure(NamedTuple):
    """What a published figure is called."""

    short: str
    long: str


FIGURES = {
    "linear": Figure("linear", "linear"),
    "linear_real": Figure("ReaL", "linear (ReaL)"),
    "knn": Figure("k-NN", "k-NN"),
    "finetune": Figure("tuned", "fine-tuned"),
    "supervised": Figure("own", "own classifier"),
    "zeroshot": Figure("0-shot", "zero-shot"),
}


class TeachersConfig(Config):
    """List the teachers known by a short name, or show one whole.

    Example: fdkit teachers --license permissive
    """

    name: tyro.conf.Positional[str | None] = None
    """A short name: shows that teacher alone, with where its weights come from and a command that uses it."""
    family: str | None = None
    """Only this family, such as dinov2."""
    license: Literal["permissive", "noncommercial"] | None = None
    """Only weights under a permissive licence (Apache-2.0, MIT and the like), or only those whose licence forbids
    commercial use. A licence with terms of its own, such as DINOv3's, is neither."""
    search: str | None = None
    """Only teachers with this text in their name, architecture, model or licence."""
    json_output: Annotated[bool, tyro.conf.arg(name="json")] = Field(default=False, exclude=True)
    """Print one JSON document on standard output and nothing else there."""


def config_class() -> type[Config]:
    """The configuration of the command."""
    return TeachersConfig


def run(config: TeachersConfig) -> Outcome:
    """The teachers asked for; ConfigError for a name or family there is not, and for a name with filters."""
    if config.name is None:
        known = list_teachers(family=config.family, license=config.license)
        entries = [entry for entry in known if _mentions(entry, config.search or "")]
        return Outcome(_numbers(entries), lambda: _show_list(entries))
    for option in ("family", "license", "search"):
        if getattr(config, option) is not None:
            raise ConfigError(f"--{option} filters the list, and {config.name} names one teacher: give one")
    entry = find(config.name)
    return Outcome(_numbers([entry]), lambda: _show_one(entry))


def _mentions(entry: Entry, text: str) -> bool:
    words = (entry.name, entry.family, entry.architecture, entry.model, entry.license)
    return any(text.lower() in word.lower() for word in words)


def _numbers(entries: list[Entry]) -> dict[str, Any]:
    return {"teachers": [{**entry.to_json(), "command": command_for(entry)} for entry in entries]}


def command_for(entry: Entry) -> str:
    """A command that distils from the teacher; PATH and FILE are the user's own."""
    if entry.model or (entry.official and entry.official.url):
        return f"fdkit distill --teacher {entry.name} --data PATH"
    return _command_with_file(entry, "FILE")


def _command_with_file(entry: Entry, file: str) -> str:
    """The name beside the file brings the catalog's statistics and licence with it, and checks the file against it."""
    return f"fdkit distill --teacher {file} --architecture {entry.name} --data PATH"


def _show_list(entries: list[Entry]) -> None:
    console = Console(markup=False, highlight=False)
    if not entries:
        console.print("no teacher is like that; `fdkit teachers` lists all")
        return
    is_wide = console.width >= WIDE
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in WIDE_TITLES if is_wide else NARROW_TITLES:
        width = None if is_wide or title != "licence" else NARROW_LICENCE
        justify: Literal["left", "right"] = "left" if title in WORDS else "right"
        table.add_column(title, justify=justify, no_wrap=True, overflow="ellipsis", max_width=width)
    for entry in entries:
        table.add_row(*(_wide_cells(entry) if is_wide else _narrow_cells(entry)))
    console.print(table)
    count = f"{len(entries)} teacher{'s' if len(entries) > 1 else ''}"
    console.print(f"\n{count}; figures: top-1 in % on ImageNet-1K, as their authors publish it")
    if is_wide:
        console.print(
            "(tuned: fine-tuned, or of the network's own classifier; *: linear, on the ReaL labels)"
        )
    console.print("`fdkit teachers NAME` shows one whole; from file: no library hosts it")


def _wide_cells(entry: Entry) -> Iterator[str]:
    figures = entry.published
    yield from (entry.name, entry.architecture, str(entry.image_size), str(entry.patch_size))
    yield from (str(entry.embed_dim), str(entry.num_prefix_tokens), _licence(entry))
    yield f"{_percent(figures['linear_real'])}*" if "linear_real" in figures else _figure(entry, "linear")
    yield _figure(entry, "knn")
    yield _figure(entry, "finetune") or _figure(entry, "supervised")
    yield _figure(entry, "zeroshot")
    yield _host(entry)


def _narrow_cells(entry: Entry) -> Iterator[str]:
    """One figure a teacher: the first it has of those in FIGURES."""
    name = next((name for name in FIGURES if name in entry.published), None)
    yield from (entry.name, entry.architecture, f"{entry.image_size}/{entry.patch_size}", _licence(entry))
    yield f"{FIGURES[name].short} {_figure(entry, name)}" if name else ""
    yield _host(entry)


def _licence(entry: Entry) -> str:
    return entry.license.removesuffix("-license")


def _host(entry: Entry) -> str:
    return entry.model.partition(":")[0] or "file"


def _figure(entry: Entry, name: str) -> str:
    return _percent(entry.published[name]) if name in entry.published else ""


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}"


def _show_one(entry: Entry) -> None:
    """Facts in two columns, then commands; an address or a command stays on one line, to be copied."""
    console = Console(markup=False, highlight=False)
    facts = list(_facts(entry))
    indent = 2 + max(len(name) for name, _ in facts)
    for name, value in facts:
        width = max(20, console.width - indent)
        lines = textwrap.wrap(value, width, break_long_words=False, break_on_hyphens=False)
        for number, line in enumerate(lines):
            console.print(f"{'' if number else name:<{indent}}{line}", soft_wrap=True)
    console.print()
    for line in _how_to_use(entry):
        console.print(line, soft_wrap=True)


def _facts(entry: Entry) -> Iterator[tuple[str, str]]:
    """What is known of a teacher, in reading order."""
    side = entry.image_size // entry.patch_size
    plural = "s" if entry.num_prefix_tokens > 1 else ""
    prefix = f", after {entry.num_prefix_tokens} prefix token{plural}" if entry.num_prefix_tokens else ""
    yield "teacher", f"{entry.name} ({entry.architecture}, family {entry.family})"
    yield "model", entry.model or "hosted by no library: the authors' own file"
    if entry.official:
        yield from _official_facts(entry.official)
    yield "licence", entry.license + (", for non-commercial use alone" if entry.is_noncommercial else "")
    yield "paper", f"https://arxiv.org/abs/{entry.paper}"
    yield "input", f"{entry.image_size} x {entry.image_size} pixels, RGB in [0, 1]"
    yield "mean", ", ".join(f"{value:g}" for value in entry.mean)
    yield "std", ", ".join(f"{value:g}" for value in entry.std)
    yield "tokens", f"{side} x {side}, {entry.patch_size} pixels apart and {entry.embed_dim} wide{prefix}"
    for name in entry.published:
        yield FIGURES[name].long, f"{_figure(entry, name)} % top-1 on ImageNet-1K"
    if entry.published:
        yield "source", entry.published_source
    if entry.note:
        yield "note", entry.note


def _official_facts(official: Official) -> Iterator[tuple[str, str]]:
    args = ", ".join(f"{name}={value}" for name, value in official.model_args.items())
    if official.url:
        yield "official file", official.url
    for kind, digest, length in (("SHA-256", official.sha256, 64), ("MD5", official.md5, 32)):
        if digest:
            yield kind, digest if len(digest) == length else f"starts with {digest}"
    yield "documented at", official.page
    yield "fits", f"timm's {official.architecture}" + (f" with {args}" if args else "")


def _how_to_use(entry: Entry) -> Iterator[str]:
    """Commands that use the teacher, and how to get its file where no library hosts it."""
    official = entry.official
    if entry.model or official is None:
        yield from ("To distil from it:", f"  {command_for(entry)}")
    elif official.url:
        file = official.url.rpartition("/")[2]
        yield from ("To distil from it (its file is downloaded once):", f"  {command_for(entry)}")
        yield "Or with the file at hand:"
        yield from (f"  curl -L -C - -O {official.url}", f"  {_command_with_file(entry, file)}")
    else:
        yield "To distil from it, get its file from this page and give its path:"
        yield from (f"  {official.page}", f"  {command_for(entry)}")
