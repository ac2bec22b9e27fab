"""What the commands that train share: their fields, and the way from a method to a finished run folder."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field

from fdkit.analysis._figure import save_figure
from fdkit.commands._command import Command
from fdkit.commands._monitor import MonitorConfig, build_monitor
from fdkit.commands._outcome import Outcome
from fdkit.commands._reconstructions import build_reconstructions
from fdkit.config import to_yaml
from fdkit.data.loader import LoaderConfig, steps_per_epoch
from fdkit.data.sources import ImageSource, open_source
from fdkit.methods._method import Method
from fdkit.report.training_curves import training_figure
from fdkit.teachers.origin import pinned, recorded_revisions
from fdkit.training.agreement import require_agreed_teachers, require_same_images
from fdkit.training.distributed import broadcast, local_device, process_group
from fdkit.training.loop import TrainConfig, train
from fdkit.training.monitor import Monitor
from fdkit.training.optimizer import OptimizerConfig
from fdkit.training.run import Run

log = logging.getLogger("fdkit")

NUM_PICTURES = 20
"""Pictures of reconstructions a run draws where the monitor's interval does not say."""


class TrainingCommand(Command):
    """Fields of every command that trains."""

    ALIASES: ClassVar[dict[str, str]] = {"--deterministic": "--train.deterministic"}

    data: str
    """Images: a folder (its train/ if it has one; labels are not needed), tar shards (a folder of them, one .tar, or
    wds:train-{000..123}.tar), digits, demo, or torchvision:CIFAR10."""
    recipe: str | None = Field(default=None, exclude=True)
    """A YAML file or the name of a shipped recipe; flags win over it."""
    output: Path | None = Field(default=None, exclude=True)
    """The run folder; by default a fresh one under runs/."""
    resume: bool = Field(default=False, exclude=True)
    """Continue the run in --output exactly where its newest sound checkpoint stands; start it if there is none."""
    overwrite: bool = Field(default=False, exclude=True)
    """Start anew in --output; what is there is moved to OUTPUT.old-N, never deleted."""
    dry_run: bool = Field(default=False, exclude=True)
    """Forecast the run on this machine, do two real steps of it, and stop: no run folder is made or touched."""
    loader: LoaderConfig = LoaderConfig()
    train: TrainConfig = TrainConfig()
    optim: OptimizerConfig = OptimizerConfig()
    monitor: MonitorConfig = MonitorConfig()


def run_training(
    config: Any,
    folder: Path,
    build: Callable[[ImageSource], tuple[Method, dict[str, Any]]],
    *,
    handle_signals: bool,
) -> Outcome:
    """Open the run folder, train, export the student, and say where it is.

    build: the method for these images, and what run.json is to say about it.
    """
    device = local_device(config.device)
    with (
        process_group(device, config.train.timeout_seconds) as world,
        Run.create(folder, to_yaml(config), resume=config.resume, overwrite=config.overwrite) as run,
    ):
        source = open_source(config.data, "train")
        require_same_images(source, world)
        with pinned(recorded_revisions(broadcast(run.facts, world))):
            method, facts = build(source)
        require_agreed_teachers(facts, world, recorded=run.facts, folder=folder)
        run.update(**facts)
        per_epoch = steps_per_epoch(source, config.train.batch_size)
        monitors: list[Monitor] = [
            *build_monitor(
                config.monitor, config.data, steps_per_epoch=per_epoch, loader=config.loader, source=source
            )
        ]
        picture_epochs = config.monitor.every_epochs or config.train.epochs / NUM_PICTURES
        every_steps = max(1, round(picture_epochs * per_epoch))
        monitors += build_reconstructions(
            method, source, folder, every_steps=every_steps, loader=config.loader
        )
        train_and_draw(method, source, run, config, device, monitors, handle_signals=handle_signals)
        rows = run.metrics() if run.writes else []
        last: dict[str, Any] = next((row for row in reversed(rows) if "loss" in row), {})
    numbers = {"run": str(folder), "last": last}
    return Outcome(numbers, lambda: _show(folder))


def train_and_draw(
    method: Method,
    source: ImageSource,
    run: Run,
    config: Any,
    device: torch.device,
    monitors: Sequence[Monitor],
    *,
    handle_signals: bool,
) -> None:
    """Train as a command's configuration says, and draw the curves however it ends."""
    try:
        train(
            method,
            source,
            run,
            train=config.train,
            optim=config.optim,
            loader=config.loader,
            seed=config.seed,
            device=device,
            monitors=monitors,
            handle_signals=handle_signals,
        )
    except BaseException:
        try:
            save_curves(run)
        except OSError as error:  # which must not hide what ended the run
            log.error("%s: the curves cannot be drawn: %s", run.folder, error)
        raise
    save_curves(run)


def save_curves(run: Run) -> None:
    """Draw how the training went so far, as figures/training.svg and .png in the run folder."""
    rows = run.metrics() if run.writes else []
    if any("loss" in row for row in rows):
        (run.folder / "figures").mkdir(exist_ok=True)
        save_figure(training_figure(rows), run.folder / "figures" / "training")


def _show(folder: Path) -> None:
    print(f"{folder}: done; the student is {folder}/student.safetensors")
    print(f"next: fdkit evaluate knn {folder} --data LABELLED_IMAGES")
    print(f"      fdkit analyze attention-distance {folder} --data IMAGES")
