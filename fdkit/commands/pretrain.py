"""`fdkit pretrain mocov3 --data PATH`: make your own teacher from unlabelled images."""

from pathlib import Path
from typing import Any, ClassVar, Literal, get_type_hints

from pydantic import Field, create_model

from fdkit.commands._command import default_output, plugin, plugins, resolve
from fdkit.commands._outcome import Outcome
from fdkit.commands._training import TrainingCommand, run_training
from fdkit.config import Config, with_defaults
from fdkit.data.sources import ImageSource
from fdkit.methods._method import Method

WITH_TEACHER = {"feature-distillation"}


class PretrainConfig(TrainingCommand):
    """Pretrain a backbone without labels; its run folder is a MODEL and a --teacher at once.

    Example: fdkit pretrain mocov3 --data photos/ --output runs/teacher
    """

    ALIASES: ClassVar[dict[str, str]] = {"--init": "--network.init"}


def choices() -> list[str]:
    """The methods that need no teacher."""
    return [name for name in plugins("methods") if name not in WITH_TEACHER]


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
    folder = config.output or default_output("pretrain", config.method)

    def build(source: ImageSource) -> tuple[Method, dict[str, Any]]:
        return build_method(config), {"method": config.method}

    return run_training(config, folder, build, handle_signals=handle_signals)


def build_method(config: Any) -> Method:
    """The method a configuration describes, at its first step."""
    own = getattr(config, section(config.method))
    method: Method = plugin("methods", config.method).build(
        own, config.views, config.network, seed=config.seed
    )
    return method


def pretrain(method: str, data: str | Path, **fields: Any) -> Path:
    """The run folder of a finished pretraining; fields are those of its configuration.

    Example: fdkit.pretrain("mocov3", "photos/", output="runs/teacher")
    """
    config = resolve(config_class(method), {"data": str(data), **fields}, "pretrain", method)
    return Path(run(config, handle_signals=False).numbers["run"])
