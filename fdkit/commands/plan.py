"""`fdkit plan distill --teacher clip_vitl --data PATH`: what a training takes, before anything is trained."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import numpy as np
from pydantic import Field, create_model

from fdkit.commands._blueprint import COMMANDS, blueprint
from fdkit.commands._forecast import READ_SECONDS, Reading, Subject, forecast, show
from fdkit.commands._outcome import Outcome
from fdkit.config import Config
from fdkit.data.decode import decoding_with
from fdkit.data.segmentation import open_segmentation
from fdkit.data.sources import BadImage, ImageSource, open_source
from fdkit.errors import ConfigError, DataError
from fdkit.methods._method import Method
from fdkit.training.hardware import find_gpu

__all__ = ["COMMANDS", "PlanOptions", "config_class", "run"]

IMAGENET_IMAGES, IMAGENET_CLASSES = 1_281_167, 1000
NUM_TIMED = 32
"""Images of the user's that are read and cropped to see what that costs."""


class PlanOptions(Config):
    """What a training takes on each kind of GPU: nothing is trained, downloaded or written.

    Takes every option of the command that it is about. Example:
    fdkit plan distill --teacher clip_vitl --data photos/ --gpu h200 a100 --gpus 8
    """

    data: str = ""
    """Images that are meant to be trained on: how many they are and what reading one costs is found out; left out,
    as many as ImageNet-1K has."""
    gpu: Annotated[tuple[str, ...], Field(min_length=1)] = ("h200", "h100", "a100", "rtx4090")
    """Kinds of GPU to plan for: b200, h200, h100, h100-pcie, a100, a100-40gb, l40s, l4, a10, rtx4090, rtx3090."""
    gpus: int = Field(1, ge=1)
    """How many of them, a process each."""
    price_per_hour: float | None = Field(None, gt=0)
    """Price of one GPU for an hour, in any currency; null: no price is printed."""
    cores: int | None = Field(None, ge=1)
    """Processor cores for reading images, of all GPUs together; null: the number needed is printed, and no limit."""
    images: int | None = Field(None, ge=1)
    """Number of images, where --data is left out; null: that of ImageNet-1K."""


def config_class(of: type[Config]) -> type[Config]:
    """The configuration of another command, with these options."""
    return create_model(f"Plan{of.__name__}", __base__=(PlanOptions, of), __doc__=PlanOptions.__doc__)


def run(command: str, config: Any) -> Outcome:
    """What the command would take."""
    if config.data and config.images is not None:
        raise ConfigError(
            f"images {config.images} has no effect beside --data {config.data}", "leave out one of them"
        )
    gpus = [find_gpu(name) for name in config.gpu]
    source = _source(command, config)
    num_images = len(source) if source else config.images or IMAGENET_IMAGES
    if config.train.batch_size > num_images:
        raise ConfigError(
            f"batch size {config.train.batch_size} is more than the {num_images} images",
            f"use --train.batch-size {1 << (num_images.bit_length() - 1)}",
        )
    num_classes = len(source.classes) if source and source.classes else IMAGENET_CLASSES
    method = blueprint(command, config, num_classes=num_classes)
    reading = _reading(config, source, method)
    subject = Subject(command, config, method, num_images, reading)
    numbers = forecast(subject, gpus, num_gpus=config.gpus, cores=config.cores, price=config.price_per_hour)
    notes = [] if source else [f"no --data: {num_images:,} images are taken as given"]
    return Outcome(numbers, lambda: show(numbers, notes))


def _source(command: str, config: Any) -> ImageSource | None:
    if not config.data:
        return None
    if command == "segment":
        found: Any = open_segmentation(config.data, ("train",), config)[0]
        return found
    return open_source(config.data, "train")


def _reading(config: Any, source: ImageSource | None, method: Method) -> Reading:
    """What reading an image and making its views costs a core, timed on the user's own where they are at hand."""
    if source is None:
        return Reading(READ_SECONDS, "one crop of a photo of 500 x 375 pixels, as measured on one machine")
    read = getattr(source, "read_pixels", source.read)
    generator = np.random.Generator(np.random.Philox(config.seed))
    seconds = []
    with decoding_with(config.loader.decoder), _one_thread():
        for index in np.linspace(0, len(source) - 1, min(NUM_TIMED + 1, len(source))).astype(int):
            start = time.thread_time()
            try:
                method.views(read(int(index)), generator)
            except BadImage:
                continue
            seconds.append(time.thread_time() - start)
    if not seconds:
        raise DataError(
            f"{source.name}: none of the images looked at can be read",
            "training or `fdkit pack` would name every one and why; see whether the folder is the right one",
        )
    own = seconds[1:] or seconds  # the first one loads what reads them
    return Reading(sum(own) / len(own), f"timed on {len(own)} of these images on this machine")


@contextmanager
def _one_thread() -> Iterator[None]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
