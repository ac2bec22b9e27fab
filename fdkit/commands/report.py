"""`fdkit report RUN|MODEL [...]`: everything known of them on one page, measured first where images are given."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import tyro
from pydantic import Field

from fdkit.analysis._analysis import Analysis
from fdkit.analysis.observe import Observed
from fdkit.commands._analyses import analyses, needs_head, own_config, perform, save
from fdkit.commands._command import (
    Command,
    ModelOptions,
    default_output,
    observe_on,
    plugin,
    plugins,
    refuse_existing,
    resolve,
    write_result,
)
from fdkit.commands._flags import command_line
from fdkit.commands._outcome import Outcome
from fdkit.commands.analyze import config_class as analyze_config_class
from fdkit.commands.evaluate import SHARED_FILES, measure
from fdkit.config import Config
from fdkit.data.loader import LoaderConfig
from fdkit.data.sources import ImageSource, open_source
from fdkit.errors import ConfigError, DataError, FdkitError, did_you_mean
from fdkit.evaluation._store import default_cache
from fdkit.evaluation._subject import Extraction, Subject
from fdkit.models.libraries import WEIGHTS_FILE
from fdkit.report.report import Report, write_report
from fdkit.report.results import collect
from fdkit.report.run_sections import RunFolder, read_run
from fdkit.teachers.teacher import Teacher, short_names
from fdkit.training.checkpoint import list_steps
from fdkit.training.distributed import local_device

log = logging.getLogger("fdkit")

PAGE = "index.html"
DEFAULT_ANALYSES = (
    *("attention-viewer", "attention-distance", "head-similarity", "attention-maps", "attention-entropy"),
    *("class-attention", "cka", "spectrum", "alignment", "fourier", "layer-knn", "patch-pca"),
    *("target-statistics", "distillation-residual", "occlusion-invariance"),
)
NEEDS_TWO = frozenset({"distillation-residual"})
OWN_COUNT = frozenset({"attention-viewer"})
"""Analyses that show single images and keep their own number of them."""


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
    refuse_existing([folder / PAGE], overwrite=config.overwrite)
    subjects = _subjects(config)
    left_out: list[str] = []
    if config.data is not None:
        left_out += _measure(config, subjects, results)
    found = collect([*subjects.folders, *([("", results)] if config.data is not None else [])])
    names = list(subjects.models) or [run.name for run in subjects.runs]
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
    if config.names and len(config.names) != len(config.model):
        raise ConfigError(
            f"{len(config.names)} names for {len(config.model)} models: {', '.join(config.names)}",
            "give one for each, or leave --names out",
        )
    evaluators = [name for name in plugins("evaluation") if name not in SHARED_FILES]
    for chosen, known, field in (
        (config.analyses, analyses(), "analyses"),
        (config.evaluators, evaluators, "evaluators"),
    ):
        for name in chosen:
            if name not in known:
                raise ConfigError(
                    f"{field}: {name} is none", did_you_mean(name, known) or f"there are {', '.join(known)}"
                )


def _subjects(config: ReportConfig) -> Subjects:
    found = Subjects({}, [], [])
    names = list(config.names) or short_names(config.model)
    for name, given in zip(names, config.model, strict=True):
        path = Path(given)
        is_run = path.is_dir() and any((path / file).is_file() for file in ("run.json", "config.yaml"))
        if is_run:
            found.runs.append(read_run(name, path))
            found.folders.append((name, path))
            _add_run(found, config, name, path)
        elif path.is_dir() and _has_results(path):
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


def _measure(config: ReportConfig, subjects: Subjects, results: Path) -> list[str]:
    """Evaluate and analyse the models, writing into the folder; what could not be made, in words."""
    assert config.data is not None
    device = local_device(config.device)
    left_out: list[str] = []
    models: dict[str, Teacher] = {}
    keep_head = needs_head(config.analyses)
    for name, given in subjects.models.items():
        try:
            models[name] = config.load(given, seed=config.seed, keep_head=keep_head).to(device)
        except FdkitError as error:
            if given in config.model:
                raise
            left_out.append(
                f"{name}: {error}"
            )  # a teacher that is not at hand must not keep the rest from the page
    if not models:
        return left_out
    results.mkdir(parents=True, exist_ok=True)
    left_out += _evaluate(config, subjects.models, models, results, device)
    source, split = _analysed(config)
    observed = [
        observe_on(name, model, source, config.loader, batch_size=config.batch_size, seed=config.seed)
        for name, model in models.items()
    ]
    left_out += _analyse(config, subjects.models, observed, results, split)
    return left_out


def _analysed(config: ReportConfig) -> tuple[ImageSource, str]:
    """The images that are analysed, and the name of their split."""
    assert config.data is not None
    if config.split != "auto":
        return open_source(config.data, config.split), config.split
    try:
        return open_source(config.data, "test"), "test"
    except DataError:
        return open_source(config.data, "all"), "all"


def _evaluate(
    config: ReportConfig,
    given: dict[str, str],
    models: dict[str, Teacher],
    results: Path,
    device: torch.device,
) -> list[str]:
    assert config.data is not None
    left_out: list[str] = []
    for name, model in models.items():
        extraction = Extraction(
            device=device, batch_size=config.batch_size, loader=config.loader, cache=default_cache()
        )
        subject = Subject(model, config.data, "test", extraction)
        for evaluator in config.evaluators:
            try:
                module = plugin("evaluation", evaluator)
                numbers = measure(module, subject, _evaluator_config(module))
            except FdkitError as error:
                left_out.append(f"{evaluator} of {name}: {error}")
                continue
            command = {"model": given[name], "data": config.data, "split": "test"}
            again = f"fdkit evaluate {evaluator} {given[name]} --data {config.data}"
            own = {"shown_name": name, "command": command, "command_line": again}
            write_result(results / f"{evaluator}-{_file_name(name)}.json", numbers | own)
    return left_out


def _evaluator_config(module: Any) -> Any:
    from fdkit.commands._command import config_of

    return config_of(getattr(module, "measure", None) or module.evaluate)()


def _file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in name)[:80]


def _analyse(
    config: ReportConfig, given: dict[str, str], observed: Sequence[Observed], results: Path, split: str
) -> list[str]:
    """Make each analysis of the models that it can be made of; what was left out, in words."""
    left_out: list[str] = []
    wanted = [name for name in config.analyses if not (name in NEEDS_TWO and len(observed) < 2)]

    def config_for(name: str) -> Any:
        fields = {"batch_size": config.batch_size, "seed": config.seed}
        return own_config(name, fields if name in OWN_COUNT else fields | {"num_images": config.num_images})

    for names in _sharing_passes(wanted):
        log.info("analysing: %s", ", ".join(names))
        for name, analysis in _as_far_as_possible(names, observed, config_for, left_out).items():
            shown = [str(model["name"]) for model in analysis.numbers["models"]]
            models = [one.name for one in observed if one.name in shown] or [one.name for one in observed]
            facts = {"command": config.model_dump(mode="json") | {"split": split}}
            line = _analyze_line(name, config_for(name), config, {one: given[one] for one in models}, split)
            save(results, name, analysis, facts | {"command_line": line})
    return left_out


def _analyze_line(name: str, own: Config, config: ReportConfig, models: dict[str, str], split: str) -> str:
    """The command that makes one analysis alone."""
    kind = analyze_config_class(name)
    shared = {key: getattr(config, key) for key in ModelOptions.model_fields}
    values = shared | own.model_dump() | {"loader": config.loader, "seed": config.seed, "split": split}
    values |= {"model": tuple(models.values()), "names": tuple(models), "data": config.data}
    return command_line(kind(**values), "analyze", name)


def _sharing_passes(names: Sequence[str]) -> list[list[str]]:
    """Statistics of attention together, everything else by itself."""
    shared = [name for name in names if hasattr(plugin("analysis", name), "statistic")]
    return [shared] * bool(shared) + [[name] for name in names if name not in shared]


def _as_far_as_possible(
    names: Sequence[str],
    observed: Sequence[Observed],
    config_for: Callable[[str], Any],
    left_out: list[str],
) -> dict[str, Analysis]:
    """The analyses, those that fail left out: first alone, then without the models that they fail on."""
    try:
        return perform(names, observed, config_for)
    except FdkitError as error:
        if len(names) > 1:
            found: dict[str, Analysis] = {}
            for name in names:
                found |= _as_far_as_possible([name], observed, config_for, left_out)
            return found
        if len(observed) == 1 or names[0] in NEEDS_TWO:
            left_out.append(f"{names[0]}: {error}")
            return {}
    return _without_failing_models(names[0], observed, config_for, left_out)


def _without_failing_models(
    name: str, observed: Sequence[Observed], config_for: Callable[[str], Any], left_out: list[str]
) -> dict[str, Analysis]:
    kept: list[Observed] = []
    for one in observed:
        try:
            perform([name], [one], config_for)
            kept.append(one)
        except FdkitError as error:
            left_out.append(f"{name} of {one.name}: {error}")
    if len(kept) == len(observed):  # each works alone, so they do not fit together: show the first
        try:
            return perform([name], kept, config_for)
        except FdkitError as error:
            left_out.append(f"{name} of {', '.join(one.name for one in kept[1:])}: {error}")
            kept = kept[:1]
    return perform([name], kept, config_for) if kept else {}


def _show(page: Path, numbers: dict[str, Any]) -> None:
    for words in numbers["left_out"]:
        print(f"left out: {words}")
    print(f"the page is {page}")
