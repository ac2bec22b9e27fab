"""`fdkit analyze attention-distance MODEL [MODEL ...] --data PATH`: what differs between models."""

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import tyro
from pydantic import Field, create_model
from rich.console import Console
from rich.table import Table

from fdkit.analysis._analysis import Analysis
from fdkit.analysis._attention import AttentionConfig
from fdkit.analysis.observe import Observed
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
from fdkit.commands._trajectory import along_checkpoints
from fdkit.config import Config
from fdkit.data.loader import LoaderConfig
from fdkit.data.sources import open_source
from fdkit.errors import ConfigError, did_you_mean
from fdkit.teachers.teacher import short_names
from fdkit.training.distributed import local_device

TRAJECTORY = "trajectory"
DESCRIPTIONS = {
    "attention": "From one pass over the images: distance, similarity of heads, maps and entropy.",
    TRAJECTORY: "Other analyses (--of) along the checkpoints of a run, or of several.",
}
"""Of the choices that are no file of their own."""
GROUPS = {"attention": ATTENTION}


class TrajectoryConfig(Config):
    """What is followed along runs."""

    of: tuple[str, ...] = Field(("attention-distance", "spectrum"), min_length=1)
    """The analyses that are made of every checkpoint kept."""
    num_images: int = Field(default=128, ge=1)
    """Images each of them reads, drawn from the data with the seed."""
    batch_size: int = Field(default=16, ge=1)
    """Images a forward pass."""


class AnalyzeConfig(ModelOptions, Command):
    """Look into one model, or compare several.

    Example: fdkit analyze attention-distance demo RUN --data demo
    """

    model: tyro.conf.Positional[tuple[str, ...]]
    """Models: catalog names, timm:NAME, open_clip:ARCH/TAG, hf:ORG/REPO, checkpoint files, run folders,
    checkpoints of a run (RUN/checkpoints/step-00000200), or demo."""
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
    return sorted([*analyses(), *DESCRIPTIONS])


def members(choice: str) -> tuple[str, ...]:
    """The analyses that a choice stands for."""
    return GROUPS.get(choice, (choice,))


def config_class(choice: str) -> type[Config]:
    """The configuration of one analysis, or of several: the command's fields and theirs."""
    own = _own_fields(choice)
    fields: dict[str, Any] = {"analysis": (Literal[choice], Field(default=choice, exclude=True))}
    return create_model(
        f"Analyze_{choice}", __base__=(AnalyzeConfig, own), __doc__=AnalyzeConfig.__doc__, **fields
    )


def _own_fields(choice: str) -> type[Config]:
    """What is set beside the command's fields; the members of a group keep their own defaults."""
    if choice == TRAJECTORY:
        return TrajectoryConfig
    return AttentionConfig if choice in GROUPS else config_of(_module(choice).analyze)


def run(config: Any) -> Outcome:
    """Observe every model on the same images, and write numbers and figures."""
    if not config.model:
        raise ConfigError("no model given", f"fdkit analyze {config.analysis} MODEL [MODEL ...] --data PATH")
    names = _files_made(config)
    folder = config.output or default_output(config.analysis)
    files = {name: files_of(folder, name) for name in names}
    refuse_existing([path for paths in files.values() for path in paths.values()], overwrite=config.overwrite)
    observe = _Observer(config)
    found = (_follow if config.analysis == TRAJECTORY else _compare)(config, observe)
    facts = {
        "command": config.model_dump(mode="json"),
        "command_line": command_line(config, "analyze", config.analysis),
        "identities": observe.identities,
    }
    numbers = {name: save(folder, name, analysis, facts) for name, analysis in found.items()}
    only = numbers[names[0]] if len(names) == 1 else numbers
    return Outcome(only, lambda: _show(numbers, files))


def _files_made(config: Any) -> list[str]:
    """Names of the files written, without their endings. Raises ConfigError for a --of that is no analysis."""
    if config.analysis != TRAJECTORY:
        return list(members(config.analysis))
    for name in config.of:
        if name not in analyses():
            hint = did_you_mean(name, analyses()) or f"there are {', '.join(analyses())}"
            raise ConfigError(f"of: {name} is no analysis", hint)
    return [f"{TRAJECTORY}-{name}" for name in config.of]


def _compare(config: Any, observe: "_Observer") -> dict[str, Analysis]:
    """The analyses of all models together."""
    names, shown_names = members(config.analysis), config.shown_names()
    observed = [observe(model, name) for model, name in zip(config.model, shown_names, strict=True)]
    fields = _own_fields(config.analysis).model_fields
    values = {key: getattr(config, key) for key in fields}
    return perform(names, observed, lambda name: own_config(name, values))


def _follow(config: Any, observe: "_Observer") -> dict[str, Analysis]:
    """Each analysis along the checkpoints of the runs."""
    runs, names = [Path(model) for model in config.model], config.shown_names()
    fields = {"num_images": config.num_images, "batch_size": config.batch_size, "seed": config.seed}
    return {
        f"{TRAJECTORY}-{name}": along_checkpoints(
            _module(name), runs, observe, own_config(name, fields), names=names
        )
        for name in config.of
    }


class _Observer:
    """Loads a MODEL and gives it, under a name, with the images that the analyses read."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.device = local_device(config.device)
        self.source = open_source(config.data, config.split)
        self.keep_head = needs_head(config.of if config.analysis == TRAJECTORY else members(config.analysis))
        self.identities: list[dict[str, Any]] = []
        """Which weights were loaded, with their checksums, in order and each once."""

    def __call__(self, model: str, name: str) -> Observed:
        config = self.config
        loaded = config.load(model, seed=config.seed, keep_head=self.keep_head).to(self.device)
        if (identity := loaded.identity()) not in self.identities:
            self.identities.append(identity)
        return observe_on(
            name, loaded, self.source, config.loader, batch_size=config.batch_size, seed=config.seed
        )


def _module(name: str) -> ModuleType:
    """The module of an analysis, or that which shows what is found along a run."""
    return plugin("analysis", "-" + TRAJECTORY if name.startswith(TRAJECTORY) else name)


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
        title, (header, *rows) = _module(name).summary(found)
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
