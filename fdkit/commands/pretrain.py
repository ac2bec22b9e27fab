"""`fdkit pretrain mocov3 --data PATH`: make your own teacher from unlabelled images."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Literal, get_type_hints

from PIL import Image
from pydantic import Field, create_model

from fdkit.commands._command import default_output, plugin, plugins, resolve
from fdkit.commands._dry_run import dry_run, refuse_dry_run
from fdkit.commands._outcome import Outcome
from fdkit.commands._training import TrainingCommand, run_training
from fdkit.config import Config, with_defaults
from fdkit.data.sources import BadImage, ImageSource, open_source
from fdkit.errors import ConfigError
from fdkit.methods._method import Method

NUM_LOOKED_AT = 16
"""Images whose size is looked at before training."""
OTHERS = {"feature-distillation", "supervised", "segmentation"}
"""Methods that need a teacher, labels or masks, and have commands of their own."""


class PretrainConfig(TrainingCommand):
    """Pretrain a backbone without labels; its run folder is a MODEL and a --teacher at once.

    Example: fdkit pretrain mocov3 --data photos/ --output runs/teacher
    """

    ALIASES: ClassVar[dict[str, str]] = {"--init": "--network.init"}

    upscale: bool = False
    """Train on images that are smaller than the views, enlarged; else they are refused."""


def choices() -> list[str]:
    """The methods that need nothing but images."""
    return [name for name in plugins("methods") if name not in OTHERS]


def config_class(choice: str) -> type[Config]:
    """The configuration of one method: what all trainings share, and its own section, its views and its network."""
    method = plugin("methods", choice)
    kinds = get_type_hints(method.build)
    defaults = getattr(method, "DEFAULTS", {})
    kinds = {
        name: with_defaults(kinds[name], defaults.get(name, {})) for name in ("config", "views", "network")
    }
    own, views, network = kinds["config"], kinds["views"], kinds["network"]
    sections: dict[str, Any] = {
        "method": (Literal[choice], Field(default=choice)),
        section(choice): (own, Field(default=own())),
        "views": (views, Field(default=views())),
        "network": (network, Field(default=network())),
    }
    return create_model(
        f"Pretrain_{choice}", __base__=PretrainConfig, __doc__=PretrainConfig.__doc__, **sections
    )


def section(choice: str) -> str:
    """The name of a method's own section in a recipe."""
    return choice.replace("-", "_")


def run(config: Any, *, handle_signals: bool = True) -> Outcome:
    """Train the backbone and leave it in the run folder."""
    if config.dry_run:
        return dry_run("pretrain", config, lambda: prepared(config))
    folder = config.output or default_output("pretrain", config.method)
    return run_training(config, folder, lambda source: _build(config, source), handle_signals=handle_signals)


def prepared(config: Any) -> tuple[Method, ImageSource]:
    """The method at its first step, and its images."""
    source = open_source(config.data, "train")
    return _build(config, source)[0], source


def _build(config: Any, source: ImageSource) -> tuple[Method, dict[str, Any]]:
    """The method at its first step, and what run.json is to say about it."""
    method = build_method(config)
    if not config.upscale:
        refuse_small_images(source, method.views.image_size)
    return method, {"method": config.method}


def build_method(config: Any) -> Method:
    """The method a configuration describes, at its first step."""
    own = getattr(config, section(config.method))
    method: Method = plugin("methods", config.method).build(
        own, config.views, config.network, seed=config.seed
    )
    return method


def refuse_small_images(source: ImageSource, image_size: int) -> None:
    """Raises ConfigError if the views are larger than all of some images spread over the source."""
    sizes = [image.size for image in _some_images(source)]
    if not sizes or any(max(size) >= image_size for size in sizes):
        return
    width, height = max(sizes)
    raise ConfigError(
        f"views.image_size {image_size} is larger than the images of {source.name}, such as {width} x {height} "
        "pixels",
        f"use --views.image-size {max(width, height)} or less, or --upscale to enlarge them",
    )


def _some_images(source: ImageSource) -> Iterator[Image.Image]:
    """The readable ones of a few images, evenly spread."""
    for index in range(0, len(source), max(1, len(source) // NUM_LOOKED_AT)):
        with suppress(BadImage):
            yield source.read(index)


def pretrain(method: str, data: str | Path, **fields: Any) -> Path:
    """The run folder of a finished pretraining; fields are those of its configuration.

    Example: fdkit.pretrain("mocov3", "photos/", output="runs/teacher")
    """
    config = resolve(config_class(method), {"data": str(data), **fields}, "pretrain", method)
    refuse_dry_run(config)
    return Path(run(config, handle_signals=False).numbers["run"])
