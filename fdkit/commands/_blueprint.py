"""The method that a training command describes, as it would be built, but without weights: nothing is downloaded."""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

from torch.overrides import TorchFunctionMode

from fdkit.commands import distill, finetune, pretrain, segment
from fdkit.data.views import RandomCrop
from fdkit.errors import WeightsError
from fdkit.methods._method import Method
from fdkit.methods.feature_distillation import FeatureDistillation
from fdkit.models.free_memory import MAKERS
from fdkit.models.student import build_student
from fdkit.teachers.catalog import CATALOG
from fdkit.teachers.loading import load_teacher
from fdkit.teachers.teacher import Teacher

log = logging.getLogger("fdkit")

COMMANDS = ("distill", "pretrain", "finetune", "segment")
"""Commands that train."""
Mode = Callable[[], AbstractContextManager[Any]]
"""Makes the context in which networks are built."""
SMALL = 1 << 16
"""Numbers in a tensor below which it has its values: networks look into some, and join them with others."""


def blueprint(command: str, config: Any, *, num_classes: int) -> Method:
    """The method of a command's configuration, most of its tensors without values.

    num_classes: of the data, for commands that need them. Raises what building the method raises, and WeightsError for
    a model whose network is known only from a file that is not on this machine.
    """
    with _quiet(), _downloading_nothing():
        try:
            return _build(command, config, num_classes, _WithoutValues)
        except (RuntimeError, NotImplementedError) as error:
            reason = str(error).partition("\n")[0]
    log.info("built with random weights, which takes longer: %s", reason)
    with _quiet(), _downloading_nothing():
        return _build(command, config, num_classes, nullcontext)


def _build(command: str, config: Any, num_classes: int, mode: Mode) -> Method:
    if command == "distill":
        return _distillation(config, mode)
    if command == "pretrain":
        network = config.network.model_copy(update={"init": None})
        with mode():
            return pretrain.build_method(config.model_copy(update={"network": network}))
    model = unloaded(config, config.model, mode)
    with mode():
        if command == "finetune":
            classes = tuple(str(number) for number in range(num_classes))
            return finetune.build_method(config.model_copy(update={"pretrained": False}), model, classes)
        return segment.build_method(config, model, num_classes=num_classes)


def _distillation(config: distill.DistillConfig, mode: Mode) -> Method:
    is_whole = config.teacher_precision == "fp32"  # fp8 weights are made of bf16 ones
    teachers = [
        unloaded(
            config,
            name,
            mode,
            keep_head=config.distillation.target == "logits",
            precision="fp32" if is_whole else "bf16",
        )
        for name in config.teachers
    ]
    with mode():
        student = build_student(
            config.student, teachers[0].backbone, image_size=config.views.image_size, seed=config.seed
        )
        return FeatureDistillation(
            teachers, student, RandomCrop(config.views), config.distillation, seed=config.seed
        )


def unloaded(config: Any, name: str, mode: Mode, **options: Any) -> Teacher:
    """A MODEL's network: of a name, without weights; of a file or folder on this machine, with them."""
    is_named = name in CATALOG or name.partition(":")[0] in ("timm", "open_clip")
    if not is_named:
        try:
            return load_teacher(name, **config.loading(), seed=config.seed, **options)
        except WeightsError as error:
            raise WeightsError(
                f"{name}: its network is not known without its files, and planning downloads nothing: {error.message}",
                "run `fdkit doctor` on it once, or name a model of the same architecture, such as timm:NAME",
            ) from error
    loading = config.loading() | {"pretrained": False}
    with mode():
        return load_teacher(name, **loading, seed=config.seed, **options)


class _WithoutValues(TorchFunctionMode):
    """Weights get shapes alone."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in MAKERS and kwargs.get("device") is None:
            shape = func(*args, **kwargs | {"device": "meta"})
            if shape.numel() >= SMALL:
                return shape
        return func(*args, **kwargs)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the words about random weights, which these are not meant to be."""
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


@contextmanager
def _downloading_nothing() -> Iterator[None]:
    from huggingface_hub import constants

    with patch.object(constants, "HF_HUB_OFFLINE", True):
        yield
