"""`fdkit segment MODEL --data PATH`: what a model's features say about every pixel, by mIoU."""

import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import numpy as np
import torch
import tyro
from pydantic import Field, create_model, model_validator
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fdkit.analysis._figure import figure_bytes
from fdkit.commands._command import ModelOptions, default_output, resolve, write_result
from fdkit.commands._dry_run import dry_run
from fdkit.commands._outcome import Outcome
from fdkit.commands._training import TrainingCommand, train_and_draw
from fdkit.config import Config, to_yaml, with_defaults
from fdkit.data.loader import steps_per_epoch
from fdkit.data.segmentation import MaskConfig, SegmentationSource, open_segmentation
from fdkit.data.segmentation_views import (
    SegmentationCrop,
    SegmentationCropConfig,
    sliding_scores,
    window_starts,
)
from fdkit.data.sources import BadImage, ImageSource
from fdkit.errors import ConfigError, DataError
from fdkit.evaluation._segmentation import (
    Measured,
    combined,
    confusion_matrix,
    measure,
    predict_image,
    scores_of,
)
from fdkit.methods._method import Method
from fdkit.methods.segmentation import Segmentation, SegmentationConfig
from fdkit.report.segmentation_figure import SegmentedImage, segmentation_figure
from fdkit.teachers.origin import pinned, recorded_revisions
from fdkit.teachers.teacher import Teacher, short_names
from fdkit.training.agreement import require_agreed_teachers
from fdkit.training.distributed import (
    World,
    broadcast,
    current_world,
    gather,
    local_device,
    process_group,
    wait_for_all,
)
from fdkit.training.loop import TrainConfig
from fdkit.training.monitor import Monitor
from fdkit.training.optimizer import OptimizerConfig
from fdkit.training.plan import choose_precision
from fdkit.training.run import Run

log = logging.getLogger("fdkit")

NUM_SHOWN = 4
"""Images in the figure."""
MAX_ROWS = 30
"""Classes in the table on the screen; the JSON has all."""
STRIDE_RATIO = 2 / 3
# Of DINOv2's linear evaluation, but for the length, which there is counted in steps.
DEFAULTS: dict[str, dict[str, Any]] = {
    "train": {"epochs": 40.0, "batch_size": 16},
    "optim": {
        "lr": 1e-3,
        "lr_reference_batch": None,
        "weight_decay": 1e-4,
        "warmup_epochs": 1.5,
        "warmup_lr": 1e-6,
        "min_lr": 0.0,
    },
}


class SegmentMonitorConfig(Config):
    """What is measured during training."""

    every_epochs: float = Field(default=0, ge=0)
    """Epochs between two measurements of mIoU on the tested split, logged as monitor/miou; 0 turns it off."""
    max_images: int = Field(default=50, ge=1)
    """At most this many images, evenly spread over the split."""


class SegmentConfig(ModelOptions, MaskConfig, TrainingCommand):
    """Train a head on a model, or the model with it, that says the class of every pixel, and measure its mIoU.

    The network sees squares of --crop-size pixels, random ones in training; in testing, squares that overlap cover
    each image, whatever its shape. Example: fdkit segment dinov2_vits14 --data ADEChallengeData2016
    """

    ALIASES: ClassVar[dict[str, str]] = {**ModelOptions.ALIASES, "--crop-size": "--image-size"}

    model: tyro.conf.Positional[str]
    """A catalog name, timm:NAME, open_clip:ARCH/TAG, hf:ORG/REPO, a checkpoint file, a run folder, or demo."""
    data: str
    """A folder with images/ and masks/, each with train/ and test/ (or val/), or the other way round; or ADE20K's."""
    image_size: int | None = Field(default=None, ge=1)
    """Height and width of the squares the network sees, in pixels, --crop-size for short; none means its own size.
    Positions are resampled to it as the official code of the model does."""
    stride: int | None = Field(default=None, ge=1)
    """Pixels between two squares in testing; none means two thirds of a square."""
    split: str = "test"
    """The split to measure on: test (the first of test/, val/, validation/ that is there) or a folder's name."""
    segmentation: SegmentationConfig = SegmentationConfig()
    views: SegmentationCropConfig = SegmentationCropConfig()
    test_batch_size: int = Field(default=8, ge=1)
    """Squares of one image in a forward pass, in testing."""
    monitor: SegmentMonitorConfig = SegmentMonitorConfig()  # type: ignore[assignment]  # in place of kNN's

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        frozen = {
            "optim.layer_decay": self.optim.layer_decay is not None,
            "train.activation_checkpointing": self.train.activation_checkpointing,
        }
        for name in [name for name, is_set in frozen.items() if is_set and self.segmentation.freeze]:
            raise ConfigError(
                f"{name} has no effect on a frozen backbone",
                "leave it out, or train the backbone too: --segmentation.freeze false",
            )
        if self.train.cached_batch:
            raise ConfigError(
                "train.cached_batch has no effect on segmentation, whose loss compares no images with each other",
                "use train.accumulate alone",
            )
        return self


def config_class() -> type[Config]:
    """The configuration of the command: the lengths and rates of all trainings replaced by those of a linear head."""
    kinds = {name: with_defaults(kind, DEFAULTS[name]) for name, kind in _SECTIONS.items()}
    sections: dict[str, Any] = {name: (kind, Field(default=kind())) for name, kind in kinds.items()}
    return create_model("Segment", __base__=SegmentConfig, __doc__=SegmentConfig.__doc__, **sections)


_SECTIONS: dict[str, type[Config]] = {"train": TrainConfig, "optim": OptimizerConfig}


def run(config: SegmentConfig, *, handle_signals: bool = True) -> Outcome:
    """Train, then measure once; the run folder has the backbone, the head and the numbers."""
    if config.dry_run:
        return dry_run("segment", config, lambda: prepared(config))
    folder = config.output or default_output("segment", config.model)
    device = local_device(config.device)
    with (
        process_group(device, config.train.timeout_seconds) as world,
        Run.create(folder, to_yaml(config), resume=config.resume, overwrite=config.overwrite) as run,
    ):
        training, tested = open_segmentation(config.data, ("train", config.split), config)
        with pinned(recorded_revisions(broadcast(run.facts, world))):
            teacher = config.load(config.model, seed=config.seed)
        method = build_method(config, teacher, num_classes=len(training.classes))
        facts = {"teacher": teacher.identity(), "classes": list(training.classes)}
        require_agreed_teachers(facts, world, recorded=run.facts, folder=folder)
        run.update(**facts)
        tester = Tester(config, method, tested, device)
        watching = monitors(config, tester, training)
        train_and_draw(method, training, run, config, device, watching, handle_signals=handle_signals)
        numbers: dict[str, Any] = {"run": str(folder)}
        found = tester.measure(world)
        if world.is_main:
            numbers |= tester.result(found, teacher, training)
            write_result(folder / "results" / f"segmentation-{config.split}.json", numbers)
            draw(tester, folder / "figures" / "segmentation.png", miou=numbers["miou"])
        wait_for_all(world)
    return Outcome(numbers, lambda: _show(config, numbers))


def prepared(config: SegmentConfig) -> tuple[Method, ImageSource]:
    """The method at its first step, and its training images."""
    (training,) = open_segmentation(config.data, ("train",), config)
    teacher = config.load(config.model, seed=config.seed)
    return build_method(config, teacher, num_classes=len(training.classes)), training


def build_method(config: SegmentConfig, teacher: Teacher, *, num_classes: int) -> Segmentation:
    """The method, on the model's own backbone, which training changes unless it is frozen."""
    backbone = teacher.backbone
    if (
        not config.segmentation.freeze
        and config.pretrained
        and current_world().is_main
        and teacher.is_noncommercial
    ):
        log.warning("non-commercial: the trained network comes from %s (%s)", teacher.name, teacher.license)
    size = backbone.image_size
    window_starts(size, size, stride_of(config, size))  # refuses a stride that leaves gaps, before training
    views = SegmentationCrop(config.views, size)
    return Segmentation(backbone, views, config.segmentation, num_classes=num_classes, seed=config.seed)


def stride_of(config: SegmentConfig, image_size: int) -> int:
    """Pixels between two windows in testing."""
    return config.stride or max(1, round(image_size * STRIDE_RATIO))


class Tester:
    """Measures a method on the tested split, during training and after it."""

    def __init__(
        self, config: SegmentConfig, method: Segmentation, source: SegmentationSource, device: torch.device
    ) -> None:
        self.config = config
        self.method = method
        self.source = source
        self.device = device
        self.size = method.student.image_size
        self.stride = stride_of(config, self.size)
        self.short_side = method.views.short_side
        self.precision = choose_precision(config.train.precision, device)

    def score(self, image: Tensor) -> Tensor:
        """Scores (K, h, w) of an image (3, h, w) in [0, 1], on the device, as the method is now."""
        return sliding_scores(
            image,
            self._window_scores,
            size=self.size,
            stride=self.stride,
            batch_size=self.config.test_batch_size,
        )

    def _window_scores(self, windows: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self.method.scores(windows)

    def measure(self, world: World) -> Measured:
        """The confusion of the whole split, of which each process does a share; all of them call this."""
        self.method.eval()
        share = self.source.part(world.rank, world.size)
        own = measure(
            self.score, share, short_side=self.short_side, loader=self.config.loader, device=self.device
        )
        found = combined(gather(own, world))
        if found.num_images == 0:
            raise DataError(
                f"no image of the split {self.config.split} of {self.source.name} could be read",
                "each is named above with its reason",
            )
        return found

    def result(self, found: Measured, teacher: Teacher, training: SegmentationSource) -> dict[str, Any]:
        """The numbers, and where they come from, as plain JSON."""
        data = {
            "split": self.config.split,
            "fingerprint": self.source.fingerprint,
            "num_images": found.num_images,
            "skipped": found.skipped,
            "training_fingerprint": training.fingerprint,
            "num_training_images": len(training),
        }
        settings = {
            "crop_size": self.size,
            "stride": self.stride,
            "short_side": self.short_side,
            "precision": self.precision,
            "layers": self.method.layers,
        }
        return {
            "evaluator": "segmentation",
            **scores_of(found.confusion, self.source.classes),
            "settings": settings,
            "model": teacher.identity(),
            "data": {"name": self.config.data, **data},
            "command": self.config.model_dump(mode="json"),
        }

    def pictures(self, indices: Sequence[int]) -> list[SegmentedImage]:
        """These images of the split with their masks and predictions; unreadable ones are left out."""
        self.method.eval()
        found = []
        for index in indices:
            with suppress(BadImage):
                parts = predict_image(
                    self.score, self.source, index, short_side=self.short_side, device=self.device
                )
                found.append(SegmentedImage(*(part.numpy() for part in parts)))
        return found


class OnlineMIoU:
    """A monitor for the training loop: mIoU on a few images of the tested split."""

    name = "miou"

    def __init__(self, tester: Tester, *, every_steps: int, max_images: int) -> None:
        self.every_steps = every_steps
        self._tester = tester
        self._indices = _spread(len(tester.source), max_images)

    def __call__(self, method: Method, step: int) -> dict[str, float]:
        """Measure once; `miou` and `pixel_accuracy` are fractions in [0, 1]."""
        num_classes = len(self._tester.source.classes)
        confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        for image in self._pictures(method):
            truth, predicted = torch.from_numpy(image.truth), torch.from_numpy(image.predicted)
            confusion += confusion_matrix(predicted, truth, num_classes)
        scores = scores_of(confusion, self._tester.source.classes)
        return {name: scores[name] for name in ("miou", "pixel_accuracy") if scores[name] is not None}

    def _pictures(self, method: Method) -> list[SegmentedImage]:
        """By the method that the loop shows, which is a copy where the one in training lies in slices."""
        assert isinstance(method, Segmentation)
        trained, self._tester.method = self._tester.method, method
        try:
            return self._tester.pictures(self._indices)
        finally:
            self._tester.method = trained


def monitors(config: SegmentConfig, tester: Tester, training: SegmentationSource) -> list[Monitor]:
    """Online mIoU, if it is asked for."""
    monitor = config.monitor
    if not monitor.every_epochs:
        return []
    every_steps = max(1, round(monitor.every_epochs * steps_per_epoch(training, config.train.batch_size)))
    return [OnlineMIoU(tester, every_steps=every_steps, max_images=monitor.max_images)]


def draw(tester: Tester, path: Path, *, miou: float) -> None:
    """Write the figure of a few images, their truth and their prediction."""
    images = tester.pictures(_spread(len(tester.source), NUM_SHOWN))
    if not images:
        return
    title = f"{_described(tester.config)}: mIoU {100 * miou:.1f} %"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(figure_bytes(segmentation_figure(images, tester.source.classes, title), "png"))


def segment(model: str | Path, data: str | Path, **fields: Any) -> dict[str, Any]:
    """The numbers of `fdkit segment`, and its run folder; fields are those of its configuration.

    Example: fdkit.segment("dinov2_vits14", "ADEChallengeData2016", output="runs/a", train={"epochs": 10})["miou"]
    """
    values = {"model": str(model), "data": str(data), **fields}
    config = cast(SegmentConfig, resolve(config_class(), values, "segment", str(model)))
    return run(config, handle_signals=False).numbers


def _spread(length: int, count: int) -> list[int]:
    """At most `count` positions, evenly spread."""
    return [int(index) for index in np.unique(np.linspace(0, length - 1, min(count, length)).round())]


def _show(config: SegmentConfig, numbers: dict[str, Any]) -> None:
    """The mIoU and the classes as a small table on standard output."""
    if "miou" not in numbers:
        return
    table = Table(title=_described(config), title_justify="left")
    table.add_column("class")
    for name in ("IoU", "accuracy", "pixels"):
        table.add_column(name, justify="right")
    total = sum(one["pixels"] for one in numbers["per_class"])
    for one in numbers["per_class"][:MAX_ROWS]:
        table.add_row(
            one["name"], _percent(one["iou"]), _percent(one["accuracy"]), _percent(one["pixels"] / total)
        )
    table.add_section()
    table.add_row("mean", _percent(numbers["miou"]), _percent(numbers["mean_accuracy"]), "")
    console = Console(markup=False, highlight=False)
    console.print(table)
    if len(numbers["per_class"]) > MAX_ROWS:
        console.print(f"and {len(numbers['per_class']) - MAX_ROWS} more classes in the file below")
    console.print(f"mIoU {_percent(numbers['miou'])}, pixel accuracy {_percent(numbers['pixel_accuracy'])}")
    if numbers["absent"]:
        console.print(f"in neither truth nor prediction, so in no mean: {', '.join(numbers['absent'])}")
    folder = numbers["run"]
    for path in (f"results/segmentation-{config.split}.json", "figures/segmentation.png"):
        console.print(f"saved {folder}/{path}", soft_wrap=True)


def _described(config: SegmentConfig) -> str:
    """What was measured on what, in short."""
    backbone = f"{'frozen' if config.segmentation.freeze else 'trained'} {short_names([config.model])[0]}"
    return f"{config.segmentation.head} head on {backbone}, {config.split} of {Path(config.data).name}"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.2f} %"
