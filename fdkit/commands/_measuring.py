"""What `fdkit report` measures before it writes the page: accuracies and analyses of each model, as far as they go."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fdkit.analysis._analysis import Analysis
from fdkit.analysis.observe import Observed, backbone_of
from fdkit.commands._analyses import needs_head, own_config, perform, save
from fdkit.commands._command import ModelOptions, config_of, observe_on, plugin, write_result
from fdkit.commands._flags import command_line
from fdkit.commands.analyze import config_class as analyze_config_class
from fdkit.commands.evaluate import config_class as evaluate_config_class
from fdkit.commands.evaluate import measure
from fdkit.config import Config
from fdkit.data.sources import ImageSource, open_source
from fdkit.errors import DataError, FdkitError
from fdkit.evaluation._store import default_cache
from fdkit.evaluation._subject import Extraction, Subject
from fdkit.teachers.teacher import Teacher
from fdkit.training.distributed import local_device

log = logging.getLogger("fdkit")

NEEDS_TWO = frozenset({"distillation-residual"})
OWN_COUNT = frozenset({"attention-viewer", "patch-pca"})
"""Analyses that show single images and keep their own number of them."""
LIGHTER: dict[str, dict[str, Any]] = {"spectrum": {"num_views": 0}}
"""What a report leaves to `fdkit analyze`: LiDAR takes ten passes an image, as long as everything else together."""


class Made(NamedTuple):
    """An analysis, and the models that it could be made of."""

    analysis: Analysis
    observed: Sequence[Observed]


def measure_models(config: Any, given: dict[str, str], results: Path) -> list[str]:
    """Evaluate and analyse the models, writing into the folder; what could not be made, in words."""
    device = local_device(config.device)
    left_out: list[str] = []
    models: dict[str, Teacher] = {}
    keep_head = needs_head(config.analyses)
    for name, model in given.items():
        try:
            models[name] = config.load(model, seed=config.seed, keep_head=keep_head).to(device)
        except FdkitError as error:
            if model in config.model:
                raise
            left_out.append(f"{name}: {error}")  # a teacher that is not at hand must not keep the rest away
    if not models:
        return left_out
    results.mkdir(parents=True, exist_ok=True)
    left_out += _evaluate(config, given, models, results, device)
    source, split = _analysed(config)
    observed = [
        observe_on(name, model, source, config.loader, batch_size=config.batch_size, seed=config.seed)
        for name, model in models.items()
    ]
    left_out += _analyse(config, given, observed, results, split)
    return left_out


def _analysed(config: Any) -> tuple[ImageSource, str]:
    """The images that are analysed, and the name of their split."""
    if config.split != "auto":
        return open_source(config.data, config.split), config.split
    try:
        return open_source(config.data, "test"), "test"
    except DataError:
        return open_source(config.data, "all"), "all"


def _evaluate(
    config: Any,
    given: dict[str, str],
    models: dict[str, Teacher],
    results: Path,
    device: torch.device,
) -> list[str]:
    left_out: list[str] = []
    for name, model in models.items():
        extraction = Extraction(
            device=device, batch_size=config.batch_size, loader=config.loader, cache=default_cache()
        )
        subject = Subject(model, config.data, "test", extraction)
        for evaluator in config.evaluators:
            try:
                module = plugin("evaluation", evaluator)
                own = _evaluator_config(module, config)
                numbers = measure(module, subject, own)
            except FdkitError as error:
                left_out.append(f"{evaluator} of {name}: {error}")
                continue
            command = {"model": given[name], "data": config.data, "split": "test"}
            facts = {
                "shown_name": name,
                "command": command,
                "command_line": _evaluate_line(evaluator, own, config, given[name]),
                "report_line": command_line(config, "report"),
            }
            write_result(results / f"{evaluator}-{_file_name(name)}.json", numbers | facts)
    return left_out


def _evaluator_config(module: Any, config: Any) -> Any:
    """An evaluator's own defaults, with the report's seed."""
    kind = config_of(getattr(module, "measure", None) or module.evaluate)
    return kind(**({"seed": config.seed} if "seed" in kind.model_fields else {}))


def _evaluate_line(name: str, own: Config, config: Any, model: str) -> str:
    """The command that measures one accuracy alone."""
    shared = {
        key: getattr(config, key) for key in (*ModelOptions.model_fields, "loader", "batch_size", "seed")
    }
    values = shared | own.model_dump() | {"model": model, "data": config.data}
    return command_line(evaluate_config_class(name)(**values), "evaluate", name)


def _file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in name)[:80]


def _analyse(
    config: Any, given: dict[str, str], observed: Sequence[Observed], results: Path, split: str
) -> list[str]:
    """Make each analysis of the models that it can be made of; what was left out, in words."""
    left_out: list[str] = []
    wanted = [name for name in config.analyses if not (name in NEEDS_TWO and len(observed) < 2)]

    sizes = {backbone_of(one.model).image_size for one in observed}
    # Pixels of different input sizes cannot stand in one figure.
    units = {"attention-distance": {"unit": "image"}} if len(sizes) > 1 else {}

    def config_for(name: str) -> Any:
        fields = {"batch_size": config.batch_size, "seed": config.seed}
        fields |= LIGHTER.get(name, {}) | units.get(name, {})
        return own_config(name, fields if name in OWN_COUNT else fields | {"num_images": config.num_images})

    for names in _sharing_passes(wanted):
        log.info("analysing: %s", ", ".join(names))
        for name, made in _as_far_as_possible(names, observed, config_for, left_out).items():
            models = {one.name: given[one.name] for one in made.observed}
            facts = {
                "command": config.model_dump(mode="json") | {"split": split},
                "command_line": _analyze_line(name, config_for(name), config, models, split),
                "report_line": command_line(config, "report"),
            }
            save(results, name, made.analysis, facts)
    return left_out


def _analyze_line(name: str, own: Config, config: Any, models: dict[str, str], split: str) -> str:
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
) -> dict[str, Made]:
    """The analyses, those that fail left out: first alone, then without the models that they fail on."""
    try:
        return _made(names, observed, config_for)
    except FdkitError as error:
        if len(names) > 1:
            found: dict[str, Made] = {}
            for name in names:
                found |= _as_far_as_possible([name], observed, config_for, left_out)
            return found
        if len(observed) == 1 or names[0] in NEEDS_TWO:
            left_out.append(f"{names[0]}: {error}")
            return {}
    return _without_failing_models(names[0], observed, config_for, left_out)


def _without_failing_models(
    name: str, observed: Sequence[Observed], config_for: Callable[[str], Any], left_out: list[str]
) -> dict[str, Made]:
    kept: list[Observed] = []
    for one in observed:
        try:
            perform([name], [one], config_for)
            kept.append(one)
        except FdkitError as error:
            left_out.append(f"{name} of {one.name}: {error}")
    if len(kept) == len(observed):  # each works alone, so they do not fit together: show the first
        try:
            return _made([name], kept, config_for)
        except FdkitError as error:
            left_out.append(f"{name} of {', '.join(one.name for one in kept[1:])}: {error}")
            kept = kept[:1]
    return _made([name], kept, config_for) if kept else {}


def _made(
    names: Sequence[str], observed: Sequence[Observed], config_for: Callable[[str], Any]
) -> dict[str, Made]:
    return {name: Made(analysis, observed) for name, analysis in perform(names, observed, config_for).items()}
