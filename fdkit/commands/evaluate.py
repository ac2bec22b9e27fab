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
    resolve,
    write_result,
)
from fdkit.commands._outcome import Outcome
from fdkit.config import Config
from fdkit.data.loader import LoaderConfig
from fdkit.evaluation._store import default_cache
from fdkit.evaluation._subject import Extraction, Subject
from fdkit.training.distributed import current_world, local_device, process_group

SHARED_FILES = {"features"}


class EvaluateConfig(ModelOptions, Command):
    """Measure a frozen model.

    Example: fdkit evaluate knn demo --data demo --k 10,20
    """

    model: tyro.conf.Positional[str]
    """A catalog name, timm:NAME, open_clip:ARCH/TAG, hf:ORG/REPO, a checkpoint file, a run folder, or demo."""
    data: str
    """Labelled images: a folder with train/ and test/ (or val/, validation/) of class folders, digits, or demo."""
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


def choices() -> list[str]:
    """The evaluators."""
    return [name for name in plugins("evaluation") if name not in SHARED_FILES]


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
    extraction = config.extraction()
    with process_group(extraction.device) as world:
        teacher = config.load(config.model, seed=config.seed)
        subject = Subject(teacher, config.data, config.split, extraction)
        numbers = measure(plugin("evaluation", config.evaluator), subject, config)
        numbers["command"] = config.model_dump(mode="json")
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
    values = {"model": str(model), "data": str(data), **fields}
    return run(resolve(config_class(evaluator), values, "evaluate", evaluator)).numbers


def _result_files(config: Any) -> list[Path]:
    files = [config.output] if config.output else []
    folder = Path(config.model)
    if (folder / "student.json").is_file():
        files.append(folder / "results" / f"{config.evaluator}-{config.split}.json")
    return files


def _show(config: Any, numbers: dict[str, Any]) -> None:
    """The accuracies as a small table on standard output, of one process alone."""
    if not current_world().is_main:
        return
    results = numbers.get("results", [numbers])
    settings = [key for key in ("k", "temperature", "lr", "weight_decay") if key in results[0]]
    metrics = [key for key in ("top1", "top5", "validation_top1") if key in results[0]]
    title = f"{config.evaluator} of {config.model} on {config.split} of {config.data}"
    table = Table(title=title, title_justify="left")
    for name in (*settings, *metrics):
        table.add_column(name, justify="right")
    for result in results:
        cells = [f"{result[key]:g}" for key in settings] + [f"{100 * result[key]:.2f} %" for key in metrics]
        table.add_row(*cells)
    console = Console(markup=False, highlight=False)
    console.print(table)
    for path in _result_files(config):
        console.print(f"saved {path}")
