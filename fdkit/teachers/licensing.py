"""Licences that travel: what binds the weights of a model also binds, or may bind, what is distilled from it."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from fdkit.data.json_file import read_object
from fdkit.errors import WeightsError

UNSTATED = "unstated"
RUN_FILE = "run.json"
_RESEARCH_ONLY = ("apple-amlr",)
"""Names that do not say themselves that commercial use is forbidden."""


class Terms(NamedTuple):
    """Under what a model's weights may be used."""

    license: str
    """An SPDX name where there is one; several are joined by AND, as in SPDX expressions."""
    is_noncommercial: bool


def forbids_commerce(license: str) -> bool:
    """Whether a licence's name says that commercial use is forbidden, such as cc-by-nc-4.0."""
    words = license.lower().replace("non-commercial", "noncommercial").split("-")
    return "nc" in words or "noncommercial" in words or license.lower() in _RESEARCH_ONLY


def terms_of_run(folder: Path) -> Terms:
    """The terms a run folder's student inherits from the teacher or teachers that its run.json names.

    Teachers that were students themselves hand on what they inherited. Unstated, and not forbidden, for a run without
    a teacher and a folder without run.json. Raises WeightsError if run.json cannot be read: a licence could be lost.
    """
    path = folder / RUN_FILE
    if not path.is_file():
        return Terms(UNSTATED, False)
    try:
        return combined_terms(terms_of_identity(teacher) for teacher in recorded_teachers(read_object(path)))
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"{path}: cannot read the teacher's licence: {error}",
            "put the run's own run.json back, or remove the file if you know under what terms the student stands",
        ) from error


def recorded_teachers(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The identities of a run's teachers in its run.json: under "teacher" for one, under "teachers" for several.

    Raises ValueError for what are no identities.
    """
    one = facts.get("teacher")
    found = [one] if one else facts.get("teachers") or []
    if not isinstance(found, list) or not all(isinstance(teacher, dict) for teacher in found):
        raise ValueError(f"teachers that are none: {str(found)[:80]}")
    return found


def terms_of_identity(teacher: dict[str, Any]) -> Terms:
    """The terms in a teacher's identity; its licence's name decides where an older one does not say what it forbids."""
    license = str(teacher.get("license") or UNSTATED)
    return Terms(license, bool(teacher.get("is_noncommercial", forbids_commerce(license))))


def combined_terms(terms: Iterable[Terms]) -> Terms:
    """What binds something made from all of these: every licence, and non-commercial if one of them is."""
    terms = list(terms)
    licenses = {part: None for one in terms for part in one.license.split(" AND ")}
    return Terms(" AND ".join(licenses) or UNSTATED, any(one.is_noncommercial for one in terms))
