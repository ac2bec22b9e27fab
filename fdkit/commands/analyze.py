"""`fdkit analyze attention-distance MODEL [MODEL ...] --data PATH`: what differs between models."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import tyro
from pydantic import Field, create_model
from rich.console import Console
from rich.table import Table

from fdkit.commands._analyses import (
    ATTENTION,
    analyses,
    files_of,
    needs_head,
    own_config,
    perform,
    save,
)
from fdkit.commands._command import (
    Command,
    ModelOptions,
    config_of,
    default_output,
    observe_on,
    plugin,
    refuse_existing,
    resolve,
)
from fdkit.commands._flags import command_line
from fdkit.commands._outcome import Outcome
from fdkit.config import Config
from fdkit.data.loader import LoaderConfig
from fdkit.data.sources import open_source
from fdkit.errors import ConfigError
from fdkit.teachers.teacher import short_names
from fdkit.training.distributed import local_device

DESCRIPTIONS = {"attention": f"All statistics of attention from one pass: {', '.join(ATTENTION)}."}
"""Of the choices that are no file of their own."""
GROUPS = {"attention": ATTENTION}


class AnalyzeConfig(ModelOptions, Command):
    """Look into one model, or compare several.

    Example: fdkit analyze attention-distance demo RUN --data demo
    """

    model: tyro.conf.Positional[tuple[str, ...]]
    """Models: catalog names, timm:NAME, open_clip:ARCH/TAG, hf:ORG/REPO, checkpoint files, run folders, or demo."""
    data: str
    """Images: a folder, digits, or demo; few analyses need labels, and say so."""
    split: str = "all"
    """Which images: all, train, test, or a split folder's name."""
    names: tuple[str, ...] = ()
    """What figures and tables call the models, in their order; left out, short forms of what was typed."""
    output: Path | None = Field(default=None, exclude=True)
    """Folder for the numbers (JSON, CSV) and the figure (SVG, PNG); by default a fresh one under runs/. In RUN/results,
    `fdkit report RUN` shows them."""
    overwrite: bool = Field(default=False, exclude=True)
    """Replace results that are there already."""
    loader: LoaderConfig = LoaderConfig()

    def shown_names(self) -> list[str]:
        """What the models are called. Raises ConfigError if there are not as many names as models."""
        if self.names and len(self.names) != len(self.model):
            raise ConfigError(
                f"{len(self.names)} names for {len(self.model)} models: {', '.join(self.names)}",
                "give one for each, or leave --names out",
            )
        return list(self.names) or short_names(self.model)


def choices() -> list[str]:
    """The analyses, and groups of them."""
    return sorted([*analyses(), *GROUPS])


def members(choice: str) -> tuple[str, ...]:
    """The analyses that a choice stands for."""
    return GROUPS.get(choice, (choice,))


def config_class(choice: str) -> type[Config]:
    """The configuration of one analysis, or of a group: the command's fields and theirs."""
    own = [config_of(plugin("analysis", name).analyze) for name in members(choice)]
    fields: dict[str, Any] = {"analysis": (Literal[choice], Field(default=choice, exclude=True))}
    return create_model(
        f"Analyze_{choice}", __base__=(AnalyzeConfig, *own), __doc__=AnalyzeConfig.__doc__, **fields
    )


def run(config: Any) -> Outcome:
    """Observe every model on the same images, and write numbers and figures."""
    if not config.model:
        raise ConfigError("no model given", f"fdkit analyze {config.analysis} MODEL [MODEL ...] --data PATH")
    names = members(config.analysis)
    folder = config.output or default_output(config.analysis)
    files = {name: files_of(folder, name) for name in names}
    refuse_existing([path for paths in files.values() for path in paths.values()], overwrite=config.overwrite)
    shown_names = config.shown_names()
    device = local_device(config.device)
    source = open_source(config.data, config.split)
    keep_head = needs_head(names)
    models = [config.load(name, seed=config.seed, keep_head=keep_head).to(device) for name in config.model]
    observed = [
        observe_on(name, model, source, config.loader, batch_size=config.batch_size)
        for name, model in zip(shown_names, models, strict=True)
    ]
    values = {key: getattr(config, key) for key in type(config).model_fields}
    found = perform(names, observed, lambda name: own_config(name, values))
    facts = {
        "command": config.model_dump(mode="json"),
        "command_line": command_line(config, "analyze", config.analysis),
    }
    numbers = {name: save(folder, name, analysis, facts) for name, analysis in found.items()}
    only = numbers[names[0]] if len(names) == 1 else numbers
    return Outcome(only, lambda: _show(numbers, files))


def analyze(
    analysis: str, model: str | Path | Sequence[str | Path], data: str | Path, **fields: Any
) -> dict[str, Any]:
    """The numbers of `fdkit analyze`; fields are those of its configuration.

    Example: fdkit.analyze("attention-distance", ["dino_vitb", "runs/a"], data="photos/")["models"][0]["mean"]
    """
    names = [model] if isinstance(model, (str, Path)) else list(model)
    values = {"model": tuple(str(name) for name in names), "data": str(data), **fields}
    return run(resolve(config_class(analysis), values, "analyze", analysis)).numbers


def _show(numbers: dict[str, dict[str, Any]], files: dict[str, dict[str, Path]]) -> None:
    """Each analysis's own table, and where its files are."""
    console = Console(markup=False, highlight=False)
    for name, found in numbers.items():
        title, (header, *rows) = plugin("analysis", name).summary(found)
        table = Table(title=title, title_justify="left")
        for column in header:
            table.add_column(column, justify="right")
        for row in rows:
            table.add_row(*row)
        console.print(table)
        console.print(
            f"saved {files[name]['json']} (and .csv) and the figure {files[name]['svg']} (and .png)",
            soft_wrap=True,
        )
