"""The teachers known by a short name: a row each, data and no code.

Nothing heavy is imported, so that looking a teacher up costs no import of torch.
"""

from typing import Literal, get_args

from fdkit.errors import ConfigError, did_you_mean
from fdkit.teachers.catalog._entry import Entry, Official
from fdkit.teachers.catalog.image_text import IMAGE_TEXT
from fdkit.teachers.catalog.masked import MASKED
from fdkit.teachers.catalog.self_supervised import SELF_SUPERVISED
from fdkit.teachers.catalog.supervised import SUPERVISED

__all__ = ["CATALOG", "Entry", "Official", "families", "find", "list_teachers"]

CATALOG: dict[str, Entry] = {row.name: row for row in (*IMAGE_TEXT, *SELF_SUPERVISED, *MASKED, *SUPERVISED)}

LicenseKind = Literal["permissive", "noncommercial"]


def list_teachers(*, family: str | None = None, license: LicenseKind | None = None) -> list[Entry]:
    """The teachers with a short name, in the order of the catalog.

    family: only this one, such as dinov2.
    license: "permissive" for licences that allow any use (Apache-2.0, MIT and the like), "noncommercial" for those
        that forbid commercial use. A licence with terms of its own is neither.
    Raises ConfigError for a family or kind of licence there is not.
    """
    if family is not None and family not in families():
        known = did_you_mean(family, families()) or f"families: {', '.join(families())}"
        raise ConfigError(f"no family of teachers is called {family}", hint=known)
    if license not in (None, *get_args(LicenseKind)):
        raise ConfigError(f"license {license} is neither of {', '.join(get_args(LicenseKind))}")
    return [
        entry
        for entry in CATALOG.values()
        if family in (None, entry.family)
        and (license != "permissive" or entry.is_permissive)
        and (license != "noncommercial" or entry.is_noncommercial)
    ]


def families() -> list[str]:
    """The families of the catalog, each once, in its order."""
    return list(dict.fromkeys(entry.family for entry in CATALOG.values()))


def find(name: str) -> Entry:
    """The teacher of that short name; ConfigError naming the nearest ones if there is none."""
    if name in CATALOG:
        return CATALOG[name]
    if name in families():
        raise ConfigError(
            f"{name} is a family of teachers, not a teacher",
            hint=f"`fdkit teachers --family {name}` lists it",
        )
    raise ConfigError(
        f"no teacher is called {name}", hint=did_you_mean(name, CATALOG) or "`fdkit teachers` lists all"
    )
