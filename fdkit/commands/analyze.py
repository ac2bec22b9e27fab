"""`fdkit analyze attention-distance MODEL [MODEL ...] --data PATH`: what differs between models."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import tyro
from pydantic import Field, create_model
from rich.console import Console
from rich.table import Table

from fdkit.analysis._figure import save_figure
from fdkit.commands._command import (
    Command,
    ModelOptions,
    config_of,
    default_output,
    observe_on,
    plugin,
    plugins,
    refuse_existing,
    resolve,
    write_result,
)
from fdkit.commands._outcome import Outcome
from fdkit.config import Config
from fdkit.data.loader import LoaderConfig
from fdkit.data.sources import open_source
from fdkit.errors import ConfigError
from fdkit.teachers.teacher import short_names
from fdkit.training.distributed import local_device

SHARED_FILES = {"observe"}


class AnalyzeConfig(ModelOptions, Command):
    """Look into one model, or compare several.

    Example: fdkit analyze attention-distance demo RUN --data demo
    """

    model: tyro.conf.Positional[tuple[str, ...]]
    """Models: catalog names, timm:NAME, open_clip:ARCH/TAG, hf:ORG/REPO, checkpoint files, run folders, or demo."""
    data: str
    """Images: a folder, digits, or demo; labels are not needed."""
    split: str = "all"
    """Which images: all, train, test, or a split folder's name."""
    output: Path | None = Field(default=None, exclude=True)
    """Folder for the numbers (JSON) and the figure (SVG, PNG); by default a fresh one under runs/."""
    overwrite: bool = Field(default=False, exclude=True)
    """Replace results that are there already."""
    loader: LoaderConfig = LoaderConfig()


def choices() -> list[str]:
    """The analyses."""
    return [name for name in plugins("analysis") if name not in SHARED_FILES]


def config_class(choice: str) -> type[Config]:
    """The configuration of one analysis: the command's fields and its own."""
    own = config_of(plugin("analysis", choice).analyze)
    fields: dict[str, Any] = {"analysis": (Literal[choice], Field(default=choice, exclude=True))}
    return create_model(
        f"Analyze_{choice}", __base__=(AnalyzeConfig, own), __doc__=AnalyzeConfig.__doc__, **fields
    )


def run(config: Any) -> Outcome:
    """Observe every model on the same images, and write numbers and figure."""
    if not config.model:
        raise ConfigError("no model given", f"fdkit analyze {config.analysis} MODEL [MODEL ...] --data PATH")
    folder = config.output or default_output(config.analysis)
    files = {suffix: folder / f"{config.analysis}.{suffix}" for suffix in ("json", "svg", "png")}
    refuse_existing(files.values(), overwrite=config.overwrite)
    device = local_device(config.device)
    source = open_source(config.data, config.split)
    models = [config.load(name, seed=config.seed).to(device) for name in config.model]
    observed = [
        observe_on(name, model, source, config.loader, batch_size=config.batch_size)
        for name, model in zip(short_names(config.model), models, strict=True)
    ]
    analysis = plugin("analysis", config.analysis).analyze(observed, config)
    numbers = analysis.numbers | {"command": config.model_dump(mode="json")}
    write_result(files["json"], numbers)
    save_figure(analysis.figure(), folder / config.analysis)
    summary = plugin("analysis", config.analysis).summary
    return Outcome(numbers, lambda: _show(summary(numbers), files))


def analyze(
    analysis: str, model: str | Path | Sequence[str | Path], data: str | Path, **fields: Any
) -> dict[str, Any]:
    """The numbers of `fdkit analyze`; fields are those of its configuration.

    Example: fdkit.analyze("attention-distance", ["dino_vitb", "runs/a"], data="photos/")["models"][0]["mean"]
    """
    names = [model] if isinstance(model, (str, Path)) else list(model)
    values = {"model": tuple(str(name) for name in names), "data": str(data), **fields}
    return run(resolve(config_class(analysis), values, "analyze", analysis)).numbers


def _show(summary: tuple[str, list[list[str]]], files: dict[str, Path]) -> None:
    """The analysis's own table, and where the files are."""
    title, (header, *rows) = summary
    table = Table(title=title, title_justify="left")
    for name in header:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    console = Console(markup=False, highlight=False)
    console.print(table)
    console.print(f"saved {files['json']} and the figure {files['svg']}")
