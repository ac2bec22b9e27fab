"""Running analyses, several of them from one pass over the images, and writing their files."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fdkit.analysis._analysis import Analysis
from fdkit.analysis._attention import measure
from fdkit.analysis._figure import save_figure
from fdkit.analysis._rows import numbers_to_csv
from fdkit.analysis.observe import Observed
from fdkit.commands._command import config_of, plugin, plugins, write_result
from fdkit.config import Config, validate
from fdkit.errors import ConfigError, OutputError, write_failure

SUFFIXES = ("json", "csv", "svg", "png")
ATTENTION = ("attention-distance", "head-similarity", "attention-maps", "attention-entropy")
"""The statistics of attention that every model whose attention is read has, and that share a pass."""


def analyses() -> list[str]:
    """The names of all analyses."""
    return plugins("analysis")


def needs_head(names: Sequence[str]) -> bool:
    """Whether one of these analyses reads the model's own classifier."""
    return any(getattr(plugin("analysis", name), "NEEDS_HEAD", False) for name in names)


def own_config(name: str, fields: Mapping[str, Any]) -> Any:
    """The configuration of an analysis with those of the fields that it has. Raises ConfigError if one is refused."""
    kind: type[Config] = config_of(plugin("analysis", name).analyze)
    return validate(kind, {key: value for key, value in fields.items() if key in kind.model_fields}, name)


def perform(
    names: Sequence[str], observed: Sequence[Observed], config_for: Callable[[str], Any]
) -> dict[str, Analysis]:
    """What analyses find; those of attention share one pass over each model's images.

    config_for: gives the configuration of an analysis by its name.
    """
    if not observed:
        raise ConfigError("an analysis needs a model")
    passes: dict[int, list[str]] = {}
    for name in names:
        if hasattr(plugin("analysis", name), "statistic"):
            passes.setdefault(config_for(name).num_images, []).append(name)
    found: dict[str, Analysis] = {}
    for shared in passes.values():
        found |= _from_one_pass(shared, observed, config_for)
    for name in names:
        if name not in found:
            found[name] = plugin("analysis", name).analyze(observed, config_for(name))
    return {name: found[name] for name in names}


def _from_one_pass(
    names: Sequence[str], observed: Sequence[Observed], config_for: Callable[[str], Any]
) -> dict[str, Analysis]:
    modules = {name: plugin("analysis", name) for name in names}
    tables: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for one in observed:
        statistics = [module.statistic(one, config_for(name)) for name, module in modules.items()]
        for name, table in zip(names, measure(one, statistics, config_for(names[0])), strict=True):
            tables[name].append(table)
    return {name: module.collect(tables[name], config_for(name)) for name, module in modules.items()}


def files_of(folder: Path, name: str) -> dict[str, Path]:
    """Where the numbers (JSON, CSV) and the figure (SVG, PNG) of an analysis are written."""
    return {suffix: folder / f"{name}.{suffix}" for suffix in SUFFIXES}


def save(folder: Path, name: str, analysis: Analysis, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Write numbers and figure of an analysis, and give back the numbers; facts: what else the JSON is to hold."""
    files = files_of(folder, name)
    numbers = analysis.numbers | dict(facts)
    write_result(files["json"], numbers)
    try:
        files["csv"].write_text(numbers_to_csv(analysis.numbers), encoding="utf-8")
        save_figure(analysis.figure(), folder / name)
    except OSError as error:
        failed = write_failure(error) or OutputError(f"{folder}: cannot be written: {error.strerror}")
        raise failed from error
    return numbers
