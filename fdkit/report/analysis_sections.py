"""What a report says of analyses: for each the figure, one sentence that tells how to read it, and its numbers."""

import logging
from collections.abc import Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from fdkit.report.page import Column, Details, Drawing, Section, Table

log = logging.getLogger("fdkit")

ORDER = (
    *("attention-viewer", "attention-distance", "head-similarity", "attention-maps", "attention-entropy"),
    *(
        "class-attention",
        "attention-rollout",
        "cka",
        "spectrum",
        "alignment",
        "fourier",
        "layer-knn",
        "patch-pca",
    ),
    *("target-statistics", "distillation-residual", "occlusion-invariance", "loss-landscape"),
)
"""In which analyses are told; others follow by name."""
ACRONYMS = {"cka": "CKA", "knn": "kNN", "pca": "PCA"}
NO_MODULES = {"observe"}


def analysis_module(name: str) -> ModuleType | None:
    """The module of an analysis by its name, None if this version has none of that name."""
    folder = Path(import_module("fdkit.analysis").__path__[0])
    stem = "_trajectory" if name.startswith("trajectory-") else name.replace("-", "_")
    known = {path.stem for path in folder.glob("*.py") if not path.stem.startswith("_")} - NO_MODULES
    return import_module(f"fdkit.analysis.{stem}") if stem in known | {"_trajectory"} else None


def analysis_sections(analyses: Mapping[str, Mapping[str, Any]], problems: list[str]) -> list[Section]:
    """A section an analysis, in the order of ORDER, its figure still to be drawn.

    analyses: the numbers of each by its name. Those that this version has no words for are told in `problems`.
    """
    sections = []
    for name in sorted(analyses, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name)):
        module = analysis_module(name)
        if module is None:
            problems.append(f"{name}: this version of fdkit has no analysis of that name")
            continue
        try:
            sections.append(_section(name, module, analyses[name]))
        except Exception as error:  # numbers of another version can fail anywhere
            log.debug("the analysis %s cannot be shown", name, exc_info=True)
            problems.append(cannot_be_shown(heading_of(name), error, numbers_command(analyses[name])))
    return sections


def cannot_be_shown(heading: str, error: Exception, command: str) -> str:
    """What a page says of numbers that it cannot show."""
    return f"{heading}: its numbers cannot be shown ({type(error).__name__}: {error}); make them again with {command}"


def numbers_command(numbers: Mapping[str, Any]) -> str:
    """What to type to get an analysis again, as far as it is known."""
    return str(numbers.get("command_line") or f"fdkit analyze {numbers.get('analysis')} MODEL --data PATH")


def heading_of(name: str) -> str:
    """An analysis's name in words, such as "Attention distance"."""
    name = name.replace("trajectory-", "along training: ")
    words = [ACRONYMS.get(word, word) for word in name.replace("-", " ").split()]
    return " ".join([words[0][0].upper() + words[0][1:], *words[1:]])


def _section(name: str, module: ModuleType, numbers: Mapping[str, Any]) -> Section:
    title, (header, *rows) = module.summary(numbers)
    table = Table([Column(word) for word in header], rows, title)
    models = ", ".join(str(model["name"]) for model in numbers["models"])
    keeps_colours = bool(getattr(module, "KEEPS_COLOURS", False))
    figure = Drawing(partial(module.draw, numbers), f"{heading_of(name)} of {models}", keeps_colours)
    return Section(
        heading_of(name),
        [module.READING, *_provenance(numbers)],
        table=_scalars(module, numbers),
        viewer=numbers if name == "attention-viewer" else None,
        pictures=[figure],
        details=[Details("The numbers", table=table), Details("Make it again", numbers_command(numbers))],
    )


def _scalars(module: ModuleType, numbers: Mapping[str, Any]) -> Table | None:
    """The few numbers that say it shortly, a row a model; None where there are none."""
    found = {str(model["name"]): module.scalars(model) for model in numbers["models"]}
    labels = list(dict.fromkeys(label for scalars in found.values() for label in scalars))
    if not labels:
        return None
    columns = [Column("model"), *(Column(label, ".4g") for label in labels)]
    return Table(
        columns, [[name, *(scalars.get(label) for label in labels)] for name, scalars in found.items()]
    )


def _provenance(numbers: Mapping[str, Any]) -> list[str]:
    """On how many of which images."""
    counts = {model.get("num_images") for model in numbers["models"]} - {None}
    command = numbers.get("command") or {}
    if len(counts) != 1 or not command.get("data"):
        return []
    return [f"Measured on {counts.pop():,} images of `{command['data']}` ({command.get('split', 'all')})."]
