"""What every command shares: its common fields, its plug-ins, the device, and how a result is given back."""

import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, get_type_hints

import numpy as np
import tyro
from pydantic import Field

from fdkit.analysis.observe import Images, Observed
from fdkit.config import C, Config, Values, find_recipe, read_yaml, recipe_names, validate
from fdkit.data.loader import LoaderConfig, evaluation_batches
from fdkit.data.sources import ImageSource
from fdkit.data.subset import Subset
from fdkit.errors import ConfigError, OutputError, write_failure

if TYPE_CHECKING:
    from fdkit.teachers.teacher import Teacher


class Command(Config):
    """Fields of every command."""

    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:1. A device that is not there is an error."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of everything random, 0 or more."""
    json_output: Annotated[bool, tyro.conf.arg(name="json")] = Field(default=False, exclude=True)
    """Print one JSON document on standard output and nothing else there."""


class ModelOptions(Config):
    """How a MODEL is loaded; fields of every command that takes one."""

    ALIASES: ClassVar[dict[str, str]] = {"--arch": "--architecture"}

    architecture: str | None = None
    """timm model, open_clip:ARCH or catalog name of the network in a checkpoint file, where the file does not tell;
    --arch for short."""
    checkpoint_key: str | None = None
    """Which network of a training checkpoint, such as student or momentum_encoder; none means the one the official
    code evaluates."""
    image_size: int | None = Field(default=None, ge=1)
    """Height and width of the network's input in pixels; none means its own."""
    mean: tuple[float, float, float] | None = None
    """Mean of RGB in [0, 1] the network expects, where a checkpoint file does not tell."""
    std: tuple[float, float, float] | None = None
    """Standard deviation of RGB the network expects, likewise."""
    pretrained: bool = True
    """Whether weights are loaded; `--pretrained false` gives random ones, as a control."""

    def loading(self) -> dict[str, Any]:
        """These options as arguments of `load_teacher`."""
        return {name: getattr(self, name) for name in ModelOptions.model_fields}

    def load(self, name: str, **options: Any) -> "Teacher":
        """The model `name` with these options and further ones of `load_teacher`, such as seed and keep_head."""
        from fdkit.teachers.loading import load_teacher  # which imports the model libraries: seconds

        return load_teacher(name, **self.loading(), **options)


SHARED_FILES = {"analysis": {"observe"}, "evaluation": {"features"}}
"""Files that stand beside a package's plug-ins and are none."""


def plugins(package: str) -> list[str]:
    """Command-line names of the plug-ins in a package, its files, such as "knn"; none of them is imported."""
    folder = Path(import_module(f"fdkit.{package}").__path__[0])
    stems = {path.stem for path in folder.glob("*.py") if not path.stem.startswith("_")}
    return sorted(stem.replace("_", "-") for stem in stems - SHARED_FILES.get(package, set()))


def plugin(package: str, name: str) -> ModuleType:
    """The module of a plug-in, by its command-line name."""
    return import_module(f"fdkit.{package}.{name.replace('-', '_')}")


def config_of(function: Callable[..., Any]) -> type[Config]:
    """The configuration a plug-in's function takes, read from the type of its parameter `config`."""
    return get_type_hints(function)["config"]


def resolve(kind: type[C], values: Values, command: str, choice: str) -> C:
    """The configuration of a call from Python: the recipe named or implied, then the given values over it."""
    asked = values.pop("recipe", None)
    named = f"{command}/{choice}"
    recipe = asked or (named if named in recipe_names() else None)
    base = read_yaml(find_recipe(recipe, command)) if recipe else {}
    return validate(kind, _over(base, values), f"fdkit.{command}")


def _over(base: Values, values: Values) -> Values:
    merged = dict(base)
    for key, value in values.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _over(merged[key], value) if both else value
    return merged


def default_output(*parts: str) -> Path:
    """A fresh folder under runs/ named after the parts and the time, such as runs/distill-demo-20261121-213600.

    Raises ConfigError where torchrun may start the command again, which would then not find its folder.
    """
    if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        raise ConfigError(
            "torchrun --max-restarts needs a run folder of a fixed name, to find the run again",
            "name it: --output runs/NAME",
        )
    words = [re.sub(r"[^\w.]+", "-", part).strip("-")[:60] for part in parts]
    return Path("runs") / "-".join([*words, time.strftime("%Y%m%d-%H%M%S")])


class EvaluationImages:
    """The model's own evaluation crops of the images in order, batch by batch, anew in each iteration."""

    def __init__(
        self, model: "Teacher", source: ImageSource, loader: LoaderConfig, *, batch_size: int
    ) -> None:
        from fdkit.evaluation.features import evaluation_crop

        self.views = evaluation_crop(model.backbone.preprocessing)
        self.source = source
        self.loader = loader
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[Images]:
        for batch in evaluation_batches(self.source, self.views, self.loader, batch_size=self.batch_size):
            pixels = self.views.finish(batch.crops, batch.colour)[0]
            yield Images(pixels, batch.labels, batch.indices)


def observe_on(
    name: str, model: "Teacher", source: ImageSource, loader: LoaderConfig, *, batch_size: int, seed: int = 0
) -> Observed:
    """A model to observe on the images of a source; name: what figures call it.

    The images come in an order drawn with the seed, so that any number of them is a sample of all: the first ones of
    class folders are of one class. The same source and seed give every model the same images.
    """
    shuffled = Subset(source, np.random.default_rng(seed).permutation(len(source)))
    images = EvaluationImages(model, shuffled, loader, batch_size=batch_size)
    return Observed(name, model, images, tuple(source.classes), shuffled.describe)


def refuse_existing(paths: Iterable[Path], *, overwrite: bool) -> None:
    """Raises OutputError if a file is there already, unless it may be overwritten."""
    for path in paths:
        if path.exists() and not overwrite:
            raise OutputError(f"{path}: is there already", "use --overwrite, or another --output")


def refuse_folder(path: Path | None, flag: str) -> None:
    """Raises OutputError where a file is to be written and a folder stands: before hours are spent on what it holds."""
    if path is not None and path.is_dir():
        raise OutputError(f"{flag} {path}: is a folder", f"name a file: {flag} {path / 'result.json'}")


def write_result(path: Path, numbers: dict[str, Any]) -> None:
    """Write numbers as JSON, whole or not at all. Raises OutputError if it cannot be written, ResourceError
    if the disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(numbers, indent=2) + "\n")
        temporary.replace(path)
    except OSError as error:
        raise write_failure(error) or OutputError(f"{path}: cannot be written: {error.strerror}") from error
