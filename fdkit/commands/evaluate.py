"""`fdkit evaluate knn|linear|... MODEL --data PATH`: how good frozen features are."""

from pathlib import Path
from typing import Any, Literal

import tyro
from pydantic import Field, create_model
from rich.console import Console
from rich.table import Table

from fdkit.commands._command import (
    Command,
    ModelOptions,
    config_of,
    plugin,
    plugins,
    refuse_folder,
    resolve,
    write_result,
)
from fdkit.commands._flags import command_line
from fdkit.commands._outcome import Outcome
from fdkit.commands._published import against_published, show_protocol
from fdkit.config import Config
from fdkit.data.loader import LoaderConfig
from fdkit.errors import ConfigError
from fdkit.evaluation._protocols import Protocol, find_protocol, refuse_changes
from fdkit.evaluation._store import default_cache
from fdkit.evaluation._subject import Extraction, Subject
from fdkit.training.distributed import current_world, local_device, process_group

SETTINGS = (
    *("classifier", "metric", "subset", "gallery", "templates"),
    *("k", "temperature", "lr", "weight_decay", "inputs", "c", "num_images"),
)
"""What a row of a result was measured with, as far as it is shown."""
MEASURES = (
    *("top1", "interval", "top5", "map", "map@r", "miou", "pixel_accuracy", "mean_accuracy"),
    *("mean_corruption_error", "relative_robustness", "validation_top1", "ece"),
)
"""What is shown of a row: shares in [0, 1], and the calibration error."""


class EvaluateConfig(ModelOptions, Command):
    """Measure a frozen model.

    Example: fdkit evaluate knn demo --data demo --k 10,20
    """

    model: tyro.conf.Positional[str]
    """A catalog name, timm:NAME, open_clip:ARCH/TAG, hf:ORG/REPO, a checkpoint file, a run folder, or demo."""
    data: str
    """Labelled images: a folder with train/ and test/ (or val/, validation/) of class folders, digits, or demo; for
    patch-knn, a folder with images/ and masks/."""
    split: str = "test"
    """The split to measure on: test (the first of test/, val/, validation/ that is there) or a folder's name."""
    pooling: str = "auto"
    """The feature of an image: cls (class token), patches (their mean), registers (their mean), several as in
    cls+patches, or auto: cls where there is one."""
    layers: int = Field(default=1, ge=1)
    """How many of the last layers are read; their features stand side by side."""
    batch_size: int = Field(default=64, ge=1)
    """Images a forward pass."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the forward pass."""
    cache: str = "auto"
    """Folder where features are kept for the next evaluation of this model on these images; auto: the user's cache
    folder ($FDKIT_CACHE); none: they are not kept."""
    protocol: str | None = None
    """Measure as a published number was, by name, such as dino-knn or mocov3-linear: every setting is pinned."""
    output: Path | None = Field(default=None, exclude=True)
    """File for the result as JSON; the result of a run folder is kept in its results/ too."""
    loader: LoaderConfig = LoaderConfig()

    def extraction(self) -> Extraction:
        """How images become features."""
        folders = {"auto": default_cache(), "none": None}
        return Extraction(
            device=local_device(self.device),
            pooling=self.pooling,
            layers=self.layers,
            batch_size=self.batch_size,
            precision=self.precision,
            loader=self.loader,
            cache=folders[self.cache] if self.cache in folders else Path(self.cache).expanduser(),
        )


def implied_choice(protocol: str) -> str:
    """The evaluator of a protocol. Raises ConfigError for one that is not there, or that another command runs."""
    found = find_protocol(protocol)
    if found.command != "evaluate":
        raise ConfigError(
            f"protocol {protocol} trains the whole network",
            f"fdkit {found.command} MODEL --protocol {protocol}",
        )
    return found.choice


def choices() -> list[str]:
    """The evaluators."""
    return plugins("evaluation")


def config_class(choice: str) -> type[Config]:
    """The configuration of one evaluator: the command's fields and its own."""
    evaluator = plugin("evaluation", choice)
    own = config_of(getattr(evaluator, "measure", None) or evaluator.evaluate)
    fields: dict[str, Any] = {"evaluator": (Literal[choice], Field(default=choice, exclude=True))}
    return create_model(
        f"Evaluate_{choice}", __base__=(EvaluateConfig, own), __doc__=EvaluateConfig.__doc__, **fields
    )


def run(config: Any) -> Outcome:
    """Evaluate the model; under torchrun the processes share the work and all of them know the result."""
    protocol = config.protocol and find_protocol(config.protocol)
    if protocol:
        _refuse_another(protocol, config)
    refuse_folder(config.output, "--output")
    extraction = config.extraction()
    with process_group(extraction.device) as world:
        needs_head = getattr(config, "classifier", None) == "head"
        teacher = config.load(config.model, seed=config.seed, keep_head=needs_head)
        subject = Subject(teacher, config.data, config.split, extraction)
        numbers = measure(plugin("evaluation", config.evaluator), subject, config)
        if protocol:
            numbers["named_protocol"] = against_published(protocol, config.model, numbers)
        numbers["command"] = config.model_dump(mode="json")
        numbers["command_line"] = command_line(config, "evaluate", config.evaluator)
        for path in _result_files(config) if world.is_main else []:
            write_result(path, numbers)
    return Outcome(numbers, lambda: _show(config, numbers))


def measure(evaluator: Any, subject: Subject, config: Any) -> dict[str, Any]:
    """The numbers of an evaluator: of features of both splits, or of the subject where it needs more than these."""
    if hasattr(evaluator, "measure"):
        numbers: dict[str, Any] = evaluator.measure(subject, config)
        return numbers
    return dict(evaluator.evaluate(*subject.splits(), config))


def evaluate(evaluator: str, model: str | Path, data: str | Path, **fields: Any) -> dict[str, Any]:
    """The numbers of `fdkit evaluate`; fields are those of its configuration.

    Example: fdkit.evaluate("knn", "runs/a", data="photos/", k=(10, 20))["top1"]
    """
    protocol = fields.get("protocol")
    pinned = dict(find_protocol(protocol).fields) if protocol else {}
    values = {"model": str(model), "data": str(data), **pinned, **fields}
    return run(resolve(config_class(evaluator), values, "evaluate", evaluator)).numbers


def _refuse_another(protocol: Protocol, config: Any) -> None:
    """Raises ConfigError if the command measures otherwise than the protocol says."""
    if implied_choice(protocol.name) != config.evaluator:
        raise ConfigError(
            f"protocol {protocol.name} is of the evaluator {protocol.choice}, not {config.evaluator}",
            f"fdkit evaluate {protocol.choice} {config.model} --protocol {protocol.name}",
        )
    refuse_changes(protocol, config.model_dump(mode="json"))


def _result_files(config: Any) -> list[Path]:
    files = [config.output] if config.output else []
    folder = Path(config.model)
    if (folder / "student.json").is_file():
        files.append(folder / "results" / f"{config.evaluator}-{config.split}.json")
    return files


def _show(config: Any, numbers: dict[str, Any]) -> None:
    """The result as a small table on standard output, of one process alone."""
    if not current_world().is_main:
        return
    results = numbers.get("results") or [numbers]
    shown = [key for key in results[0] if key in SETTINGS or _is_measure(key)]
    # Settings stand in front of what was measured with them.
    columns = [
        key for key in sorted(shown, key=_is_measure) if any(row.get(key) is not None for row in results)
    ]
    title = f"{config.evaluator} of {config.model} on {config.split} of {config.data}"
    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name.replace("_", " "), justify="right")
    for result in results:
        table.add_row(*(_cell(name, result.get(name)) for name in columns))
    console = Console(markup=False, highlight=False)
    console.print(table)
    if "named_protocol" in numbers:
        show_protocol(numbers["named_protocol"])
    for path in _result_files(config):
        console.print(f"saved {path}")


def _is_measure(key: str) -> bool:
    return key in MEASURES or key.startswith("recall@")


def _cell(name: str, value: Any) -> str:
    """A setting as it was given, a share in percent, an interval as its two ends."""
    if value is None:
        return ""
    if name == "interval":
        return " - ".join(f"{100 * end:.1f}" for end in value) + " %"
    if _is_measure(name):
        return f"{value:.3f}" if name == "ece" else f"{100 * value:.2f} %"
    return f"{value:g}" if isinstance(value, float) else str(value)  # texts and counts as they are
