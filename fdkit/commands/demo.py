"""`fdkit demo`: distils the embedded teacher, measures what came out, and shows it on one page."""

import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import Field
from rich.console import Console
from rich.table import Table as TextTable

from fdkit.analysis import attention_distance
from fdkit.commands import distill as distill_command
from fdkit.commands import pretrain as pretrain_command
from fdkit.commands._command import Command, observe_on, resolve, write_result
from fdkit.commands._outcome import Outcome
from fdkit.commands._story import Measured, Story, write_story
from fdkit.config import Config
from fdkit.data.loader import LoaderConfig
from fdkit.data.sources import ImageSource, open_source
from fdkit.data.subset import Subset
from fdkit.errors import ConfigError, DataError, OutputError
from fdkit.evaluation import knn, linear
from fdkit.evaluation._draws import validation_split
from fdkit.evaluation.features import Features, extract_features, raw_pixels
from fdkit.models.student import build_student
from fdkit.teachers.loading import load_teacher
from fdkit.teachers.teacher import Teacher
from fdkit.training.distributed import local_device
from fdkit.training.progress import duration
from fdkit.training.run_files import set_aside

HELD_OUT_RATIO = 0.2
NUM_ANALYZED = 128


class DemoConfig(Command):
    """The whole story in minutes: teacher, distillation, student, evaluation, analysis, and a page that shows it.

    Example: fdkit demo --data photos/ --output runs/my-photos
    """

    data: str = "demo"
    """Images: the built-in ones, or your own folder; class folders add accuracies, train/ and test/ fix the split."""
    teacher: str = "demo"
    """The embedded teacher, or any other MODEL."""
    from_scratch: bool = False
    """Pretrain the teacher with MoCo v3 first, by the embedded teacher's recipe, instead of taking the embedded one."""
    output: Path = Field(default=Path("runs/demo"), exclude=True)
    """Folder for the runs, the page and its numbers."""
    overwrite: bool = Field(default=False, exclude=True)
    """Move what is in --output to OUTPUT.old-N and start anew."""
    steps: int = Field(default=0, ge=0)
    """Distillation steps; 0 means as the recipe distill/demo says for the built-in images."""


class Splits(NamedTuple):
    """Labelled images to learn probes from and to measure on; both None if the images have no labels."""

    train: ImageSource | None
    test: ImageSource | None
    note: str


def config_class() -> type[Config]:
    """The configuration of the command."""
    return DemoConfig


def run(config: DemoConfig) -> Outcome:
    """Distil, measure, analyse, and write the page."""
    started = time.perf_counter()
    console = Console(stderr=True, markup=False, highlight=False)
    device = local_device(config.device)
    _claim(config)
    splits = open_splits(config.data)
    teacher_name = _teacher(config, console)
    console.print(f"distilling {teacher_name} on {config.data}")
    student_run = _distill(config, teacher_name)
    models = _models(teacher_name, student_run, config)
    console.print("measuring frozen features")
    measured = [_measure(name, model, splits, device) for name, model in models.items()]
    if splits.train is not None and splits.test is not None:
        seen = models["teacher"].backbone.preprocessing.crop_ratio  # pixels of what the networks are shown
        pixels = (raw_pixels(part, crop_ratio=seen) for part in (splits.train, splits.test))
        measured.append(_accuracies("raw pixels", *pixels))
    console.print("measuring attention distance")
    images = splits.test or open_source(config.data, "all")
    observed = [
        observe_on(name, model, images, LoaderConfig(), batch_size=32) for name, model in models.items()
    ]
    settings = attention_distance.AttentionDistanceConfig(num_images=NUM_ANALYZED)
    distances = attention_distance.analyze(observed, settings)
    story = Story(
        data=config.data,
        teacher=teacher_name,
        images=images,
        run=student_run,
        measured=measured,
        distances=distances,
        split_note=splits.note,
        seconds=time.perf_counter() - started,
    )
    page = write_story(config.output / "index.html", story)
    numbers = {
        "accuracies": {one.name: one.numbers for one in measured},
        "attention_distance": distances.numbers,
        "seconds": story.seconds,
        "page": str(page),
    }
    write_result(config.output / "demo.json", numbers)
    return Outcome(numbers, lambda: _show(measured, story, page))


def demo(**fields: Any) -> dict[str, Any]:
    """The numbers of `fdkit demo`, and "page", the path of the page; fields are those of its configuration."""
    config = resolve(DemoConfig, fields, "demo", "demo")
    return run(config).numbers


def open_splits(data: str) -> Splits:
    """The images' own train and test splits; of labelled images without them, a fifth of every class is held out."""
    train = open_source(data, "train")
    if train.labels is None:
        return Splits(None, None, "The images have no labels, so there are no accuracies.")
    try:
        return Splits(train, open_source(data, "test"), "")
    except DataError:
        kept, out = validation_split(torch.from_numpy(train.labels), HELD_OUT_RATIO, seed=0)
        if len(out) == 0:
            return Splits(None, None, "No class has two images, so there are no accuracies.")
        note = f"There is no test split, so {len(out)} of {len(train)} images were held out from kNN and the probe."
        return Splits(Subset(train, kept.numpy()), Subset(train, out.numpy()), note)


def _claim(config: DemoConfig) -> None:
    """Make sure that nothing in the output folder is overwritten unasked."""
    folder = config.output
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not config.overwrite:
        raise OutputError(f"{folder}: holds something already", "use --overwrite, or another --output")
    set_aside(folder, "old")


def _teacher(config: DemoConfig, console: Console) -> str:
    if not config.from_scratch:
        return config.teacher
    if config.teacher != "demo":
        raise ConfigError(
            "--from-scratch makes its own teacher, so --teacher cannot be chosen", "leave out one of the two"
        )
    console.print("pretraining the teacher with MoCo v3: the embedded one took 44 minutes on one CPU core")
    started = time.perf_counter()
    values = {
        "data": config.data,
        "output": config.output / "teacher",
        "recipe": "demo",
        "seed": config.seed,
        "device": config.device,
    }
    if config.data != "demo":
        values["monitor"] = {
            "every_epochs": 0
        }  # it needs labels and a test split, which own images may not have
    outcome = pretrain_command.run(
        resolve(pretrain_command.config_class("mocov3"), values, "pretrain", "demo"), handle_signals=False
    )
    console.print(f"pretrained in {duration(time.perf_counter() - started)}")
    return str(outcome.numbers["run"])


def _distill(config: DemoConfig, teacher: str) -> Path:
    values: dict[str, Any] = {
        "teacher": teacher,
        "data": config.data,
        "output": config.output / "student",
        "recipe": "demo",
        "seed": config.seed,
        "device": config.device,
    }
    base = resolve(distill_command.DistillConfig, dict(values), "distill", "demo")
    num_images, built_in = len(open_source(config.data, "train")), len(open_source("demo", "train"))
    batch_size = min(base.train.batch_size, num_images)
    steps = config.steps or round(base.train.epochs * (built_in // base.train.batch_size))
    epochs = steps / max(1, num_images // batch_size)
    values["train"] = {"batch_size": batch_size, "epochs": epochs}
    values["optim"] = {"warmup_epochs": min(base.optim.warmup_epochs, epochs / 10)}
    values["views"] = {"image_size": load_teacher(teacher).image_size}
    settings = resolve(distill_command.DistillConfig, values, "distill", "demo")
    return Path(distill_command.run(settings, handle_signals=False).numbers["run"])


def _models(teacher_name: str, run: Path, config: DemoConfig) -> dict[str, Teacher]:
    """The models compared: the teacher, the student, and the student as it was before the first step."""
    teacher, student = load_teacher(teacher_name), load_teacher(str(run))
    settings = resolve(
        distill_command.DistillConfig, {"teacher": teacher_name, "data": config.data}, "distill", "demo"
    )
    start = build_student(settings.student, teacher.backbone, image_size=student.image_size, seed=config.seed)
    return {
        "teacher": teacher,
        "student": student,
        "untrained": Teacher(start, name="untrained", source="the student before its first step"),
    }


def _measure(name: str, model: Teacher, splits: Splits, device: torch.device) -> Measured:
    if splits.train is None or splits.test is None:
        return Measured(name, {})
    train, test = (
        extract_features(model, part, batch_size=128, device=device) for part in (splits.train, splits.test)
    )
    return _accuracies(name, train, test)


def _accuracies(name: str, train: Features, test: Features) -> Measured:
    neighbours = knn.KNNConfig(k=(min(20, len(train.labels)),))
    return Measured(
        name,
        {
            "knn_top1": knn.evaluate(train, test, neighbours)["top1"],
            "linear_top1": linear.evaluate(train, test, linear.LinearConfig())["top1"],
            "num_test_images": len(test.labels),
            "num_classes": len(test.classes),
        },
    )


def _show(measured: list[Measured], story: Story, page: Path) -> None:
    table = TextTable(title=f"frozen features on {story.data}", title_justify="left")
    table.add_column("features")
    table.add_column("kNN (k=20)", justify="right")
    table.add_column("linear probe", justify="right")
    for one in measured:
        cells = [
            f"{100 * one.numbers[key]:.1f} %" if key in one.numbers else "–"
            for key in ("knn_top1", "linear_top1")
        ]
        table.add_row(one.name, *cells)
    console = Console(markup=False, highlight=False)
    console.print(table)
    console.print(
        f"{duration(story.seconds)}; the student is {story.run}, the page is {page}", soft_wrap=True
    )
