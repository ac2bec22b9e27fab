"""`fdkit report RUN|MODEL [...]`: everything known of them on one page, measured first where images are given."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tyro
from pydantic import Field

from fdkit.commands._analyses import analyses
from fdkit.commands._command import (
    Command,
    ModelOptions,
    default_output,
    plugins,
    refuse_existing,
    resolve,
)
from fdkit.commands._flags import command_line
from fdkit.commands._outcome import Outcome
from fdkit.config import Config
from fdkit.data.loader import LoaderConfig
from fdkit.errors import ConfigError, did_you_mean
from fdkit.models.libraries import WEIGHTS_FILE
from fdkit.report.report import Report, write_report
from fdkit.report.results import collect
from fdkit.report.run_sections import RunFolder, read_run
from fdkit.teachers.teacher import short_names
from fdkit.training.checkpoint import list_steps

PAGE = "index.html"
WITHOUT_DATA = frozenset({"model", "data", "names", "output", "overwrite", "json_output", "device", "seed"})
"""Fields that say something also where nothing is measured, or that every command has."""
DEFAULT_ANALYSES = (
    *("attention-viewer", "attention-distance", "head-similarity", "attention-maps", "attention-entropy"),
    *("class-attention", "cka", "spectrum", "alignment", "fourier", "layer-knn", "patch-pca"),
    *("target-statistics", "distillation-residual", "occlusion-invariance"),
)


class ReportConfig(ModelOptions, Command):
    """Put runs, evaluations and analyses on one page that opens from disk, without a network.

    Without --data the page shows what lies in the folders. With it, models are evaluated and analysed first.

    Example: fdkit report runs/student --data photos/
    """

    model: tyro.conf.Positional[tuple[str, ...]]
    """Run folders, folders of results, or, with --data, any MODEL; others are compared with the first."""
    data: str | None = None
    """Images to evaluate and analyse on: a folder (with labels, accuracies are measured), digits, or demo."""
    split: str = "auto"
    """Which images are analysed: all, train, test, a split folder's name, or auto: test where there is one, else all.
    Accuracies are always of test."""
    teacher: bool = True
    """Show a distilled run beside its teacher, which then comes first; needs --data."""
    analyses: tuple[str, ...] = DEFAULT_ANALYSES
    """Which analyses are made of --data; `fdkit analyze` lists them."""
    evaluators: tuple[str, ...] = ("knn", "linear")
    """Which accuracies are measured on --data, if it has labels and a train and a test split."""
    num_images: int = Field(default=128, ge=1)
    """Images analysed, drawn with the seed, the same for all models."""
    batch_size: int = Field(default=16, ge=1)
    """Images a forward pass."""
    names: tuple[str, ...] = ()
    """What the page calls the models, in their order; left out, short forms of what was typed."""
    output: Path | None = Field(default=None, exclude=True)
    """Folder for the page (index.html) and, with --data, results/ with numbers and figures; by default a fresh one
    under runs/."""
    overwrite: bool = Field(default=False, exclude=True)
    """Replace a page and results that are there already."""
    loader: LoaderConfig = LoaderConfig()


class Subjects(NamedTuple):
    """What was named on the command line."""

    models: dict[str, str]
    """MODEL by the name shown, those that weights can be loaded of."""
    runs: list[RunFolder]
    folders: list[tuple[str, Path]]
    """Where results lie, each with the name of the model they are of; "" for those that say it themselves."""


def config_class() -> type[Config]:
    """The configuration of the command."""
    return ReportConfig


def run(config: ReportConfig) -> Outcome:
    """Measure what is asked for, read everything there is, and write the page."""
    _check(config)
    folder = config.output or default_output("report", Path(config.model[0]).name)
    results = folder / "results"
    replaced = results.glob("*.json") if config.data is not None else []
    refuse_existing([folder / PAGE, *replaced], overwrite=config.overwrite)
    subjects = _subjects(config)
    left_out: list[str] = []
    if config.data is not None:
        from fdkit.commands._measuring import measure_models  # which imports the model libraries: seconds

        left_out += measure_models(config, subjects.models, results)
    found = collect([*subjects.folders, *([("", results)] if config.data is not None else [])])
    names = list(subjects.models) or [run.name for run in subjects.runs] or found.models()
    if not subjects.runs and not found.evaluations and not found.analyses and not found.others:
        raise ConfigError(
            f"there is nothing to report of {', '.join(config.model)}",
            "give --data PATH to evaluate and analyse them, or folders that hold results",
        )
    report = Report(names, subjects.runs, found, left_out, command_line(config, "report"))
    folder.mkdir(parents=True, exist_ok=True)
    page = write_report(folder / PAGE, report)
    numbers = {
        "page": str(page),
        "runs": [str(run.path) for run in subjects.runs],
        "evaluations": len(found.evaluations),
        "analyses": sorted(found.analyses),
        "left_out": [*left_out, *found.problems],
    }
    return Outcome(numbers, lambda: _show(page, numbers))


def make_report(
    model: str | Path | Sequence[str | Path], data: str | Path | None = None, **fields: Any
) -> dict[str, Any]:
    """What `fdkit report` made, its "page" among it; fields are those of its configuration.

    Example: fdkit.make_report("runs/student", data="photos/")["page"]
    """
    names = [model] if isinstance(model, (str, Path)) else list(model)
    values = {"model": tuple(str(name) for name in names), **fields}
    values |= {} if data is None else {"data": str(data)}
    return run(resolve(ReportConfig, values, "report", "report")).numbers


def _check(config: ReportConfig) -> None:
    """Raises ConfigError for what cannot be meant, before anything is loaded."""
    if not config.model:
        raise ConfigError("nothing is named", "fdkit report RUN [RUN ...], or fdkit report MODEL --data PATH")
    if config.data is None:
        fields = {
            name: field for name, field in ReportConfig.model_fields.items() if name not in WITHOUT_DATA
        }
        changed = [name for name, field in fields.items() if getattr(config, name) != field.get_default()]
        if changed:
            raise ConfigError(
                f"{', '.join(changed)} tells how models are measured, and without images none is",
                "give --data PATH, or leave it out",
            )
    if config.names and len(config.names) != len(config.model):
        raise ConfigError(
            f"{len(config.names)} names for {len(config.model)} models: {', '.join(config.names)}",
            "give one for each, or leave --names out",
        )
    for chosen, known, field in (
        (config.analyses, analyses(), "analyses"),
        (config.evaluators, plugins("evaluation"), "evaluators"),
    ):
        for name in chosen:
            if name not in known:
                raise ConfigError(
                    f"{field}: {name} is none", did_you_mean(name, known) or f"there are {', '.join(known)}"
                )


def _subjects(config: ReportConfig) -> Subjects:
    found = Subjects({}, [], [])
    names = list(config.names) or short_names(config.model)
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"two models are called {twice[0]}", "give each its own name with --names")
    for name, given in zip(names, config.model, strict=True):
        path = Path(given)
        is_run = path.is_dir() and any((path / file).is_file() for file in ("run.json", "config.yaml"))
        if is_run:
            found.runs.append(read_run(name, path))
            found.folders.append((name, path))
            _add_run(found, config, name, path)
        elif path.is_dir() and _has_results(path) and not (path / WEIGHTS_FILE).is_file():
            found.folders.append(("", path))
        elif config.data is None:
            raise ConfigError(
                f"{given} is no run folder and no folder of results, so without images there is nothing to report",
                f"fdkit report {given} --data PATH",
            )
        else:
            found.models[name] = given
    return found


def _has_results(folder: Path) -> bool:
    return any(folder.glob("*.json")) or any(folder.glob("results/*.json"))


def _add_run(found: Subjects, config: ReportConfig, name: str, path: Path) -> None:
    """The run's student, or the newest of its checkpoints, among the models; its teacher before it."""
    teacher = found.runs[-1].facts.get("teacher")
    source = teacher.get("name") or teacher.get("source") if isinstance(teacher, dict) else None
    if config.data is not None and config.teacher and source and source not in found.models.values():
        shown = "teacher" if "teacher" not in found.models else f"teacher of {name}"
        found.models[shown] = str(source)
    checkpoints = list_steps(path / "checkpoints")
    if (path / WEIGHTS_FILE).is_file():
        found.models[name] = str(path)
    elif checkpoints:
        found.models[name] = str(checkpoints[0])


def _show(page: Path, numbers: dict[str, Any]) -> None:
    for words in numbers["left_out"]:
        print(f"left out: {words}")
    print(f"the page is {page}")
