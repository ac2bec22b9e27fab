"""A method, images and views small enough to train in milliseconds, and ways to start them in other processes."""

import json
import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from fdkit.data.loader import LoaderConfig
from fdkit.data.views import CropConfig, RandomCrop
from fdkit.methods._method import Method
from fdkit.models.backbone import Backbone, Preprocessing, Tokens
from fdkit.training.loop import TrainConfig, train
from fdkit.training.optimizer import OptimizerConfig
from fdkit.training.run import Run

TIMINGS = {"images_per_second", "data_wait_ratio", "seconds"}
CONFIG_YAML = "data: toy\ntrain:\n  epochs: 4\n"


class Pictures:
    """Twenty-six images of 7 x 9 random pixels."""

    name = "pictures"
    labels = None
    classes: tuple[str, ...] = ()
    fingerprint = "f" * 64

    def __init__(self, count: int = 26) -> None:
        self.pixels = np.random.default_rng(3).integers(0, 256, (count, 7, 9, 3), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index])

    def describe(self, index: int) -> str:
        return f"pictures[{index}]"


class ToyNetwork(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 6, 2, stride=2)
        self.norm = nn.LayerNorm(6)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(6, 6)

    def forward(self, images: Tensor) -> Tokens:
        maps = self.patches(images).flatten(2).mT
        return Tokens(maps[:, :0], self.out(self.dropout(self.norm(maps))), (2, 2))


class ToyMethod(Method):
    """Regress what a fixed random projection says of each patch."""

    def __init__(self, *, dropout: float = 0.0, pause_seconds: float = 0.0, breaks_at: float = 2.0) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.student = Backbone(
            ToyNetwork(dropout),
            lambda network, images: network(images),
            embed_dim=6,
            patch_size=2,
            num_prefix_tokens=0,
            preprocessing=Preprocessing((0.5,) * 3, (0.25,) * 3, 4),
            recipe={"library": "timm", "architecture": "toy", "model_args": {}},
        )
        self.views = RandomCrop(CropConfig(image_size=4, min_scale=0.3))
        self.register_buffer("target", torch.randn(6, 12))
        self.register_buffer("slow", torch.zeros(6, 6))
        self.pause_seconds = pause_seconds
        self.breaks_at = breaks_at

    def forward(self, views: list[Tensor], progress: float) -> dict[str, Tensor]:
        time.sleep(self.pause_seconds)
        targets = F.unfold(views[0], 2, stride=2).mT @ self.target.T
        error = (self.student(views[0]).patches - targets).square().mean()
        if progress >= self.breaks_at:
            error = error / 0
        return {"loss": error, "explained_variance": 1 - error.detach() / targets.var()}

    def after_step(self, progress: float) -> None:
        with torch.no_grad():
            self.slow.lerp_(self.student.network.out.weight, 0.1)


def settings(**changes: Any) -> dict[str, Any]:
    """Keyword arguments of `train` for the toy; train_* and optim_* change fields of their configurations."""
    train_fields = {
        "epochs": 8,
        "batch_size": 8,
        "log_every_steps": 5,
        "save_every_steps": 4,
        "precision": "fp32",
    }
    optim_fields = {"lr": 1e-2, "lr_reference_batch": None, "warmup_epochs": 1, "min_lr": 1e-4}
    others: dict[str, Any] = {"seed": 5, "device": torch.device("cpu")}
    workers = changes.pop("workers", 0)
    for name, value in changes.items():
        if name.startswith("train_"):
            train_fields[name.removeprefix("train_")] = value
        elif name.startswith("optim_"):
            optim_fields[name.removeprefix("optim_")] = value
        else:
            others[name] = value
    return others | {
        "train": TrainConfig(**train_fields),
        "optim": OptimizerConfig(**optim_fields),
        "loader": LoaderConfig(workers=workers),
    }


def train_toy(folder: Path, *, method: dict[str, Any] | None = None, count: int = 26, **changes: Any) -> Run:
    """Train the toy in a run folder; resumes if the folder holds a run."""
    resume = changes.pop("resume", True)
    with Run.create(folder, CONFIG_YAML, resume=resume, command=["toy"]) as run:
        train(ToyMethod(**(method or {})), Pictures(count), run, **settings(**changes))
    return run


def final_weights(folder: Path) -> dict[str, Tensor]:
    """Tensors of the newest checkpoint, all files together."""
    import safetensors.torch

    newest = max(path for path in (folder / "checkpoints").iterdir() if "corrupt" not in path.name)
    return {
        f"{file.stem}.{name}": value
        for file in newest.glob("*.safetensors")
        for name, value in safetensors.torch.load_file(file).items()
    }


def untimed_metrics(folder: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl without what depends on the machine's speed."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMINGS} for line in lines]


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _enter(work: Callable[..., Any], environment: dict[str, str], arguments: tuple[Any, ...]) -> None:
    os.setsid()
    os.environ.update(environment)
    torch.set_num_threads(1)
    from fdkit.errors import FdkitError

    try:
        work(*arguments)
    except FdkitError as error:
        os._exit(error.exit_code)


def start(work: Callable[..., Any], *arguments: Any, **environment: str) -> Any:
    """A process, leader of its own group, that runs work(*arguments); it ends with an error's exit code."""
    context: Any = multiprocessing.get_context("fork")
    process = context.Process(target=_enter, args=(work, environment, arguments))
    process.start()
    return process


def start_ranks(count: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """The processes that torchrun would start."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [start(work, *arguments, RANK=str(rank), LOCAL_RANK=str(rank), **common) for rank in range(count)]


def exit_codes(processes: list[Any], timeout: float = 60) -> list[int | None]:
    """How the processes ended; None for one that had to be killed."""
    for process in processes:
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
    return [process.exitcode for process in processes]


class Stumbling(ToyMethod):
    """The toy whose loss is not finite at some steps; those may spoil its running average, or its weights, too."""

    def __init__(self, bad_steps: tuple[int, ...], *, num_steps: int = 24, spoils: str = "") -> None:
        super().__init__()
        self.bad_steps = bad_steps
        self.num_steps = num_steps
        self.spoils = spoils

    def forward(self, views: list[Tensor], progress: float) -> dict[str, Tensor]:
        scalars = super().forward(views, progress)
        if round(progress * self.num_steps) in self.bad_steps:
            scalars["loss"] = scalars["loss"] * float("nan")
            if self.spoils == "average":
                self.slow[0, 0] = float("inf")
            elif self.spoils == "weights":
                self.student.network.norm.weight.data[2] = float("inf")
        return scalars


def train_stumbling(folder: Path, bad_steps: tuple[int, ...], *, spoils: str = "", **changes: Any) -> Run:
    """Train the stumbling toy in a run folder; resumes if the folder holds a run."""
    with Run.create(folder, CONFIG_YAML, resume=True, command=["toy"]) as run:
        train(Stumbling(bad_steps, spoils=spoils), Pictures(), run, **settings(**changes))
    return run
