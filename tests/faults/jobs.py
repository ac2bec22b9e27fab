"""Every kind of command that writes, small enough to run in seconds on a CPU."""

import atexit
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from faults.kills import Job, digest, finish, last_words, left_by_training
from PIL import Image
from segmentation_folders import scene, write_pair

from fdkit.data.packed import UNFINISHED

SHORT = [
    *("--train.batch-size", "64", "--train.epochs", "1", "--train.precision", "fp32"),
    *("--train.save-every-steps", "3", "--train.log-every-steps", "2", "--monitor.every-epochs", "0.5"),
    *("--loader.workers", "0", "--device", "cpu"),
]  # fmt: skip
STUDENT = [
    "--student.depth",
    "1",
    "--student.width",
    "24",
    "--student.num-heads",
    "2",
    "--views.image-size",
    "16",
]
NETWORK = {
    "architecture": "vit_tiny_patch16_224",
    "model_args": {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2},
}
SWIN = {
    "architecture": "swin_tiny_patch4_window7_224",
    "model_args": {"patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2},
    "pooling": "patches",
}
VIEWS = {"image_size": 16, "local_size": 8, "num_local": 2}


def distill(*further: str) -> list[str]:
    """Distillation from the embedded teacher into a student of one block."""
    return ["distill", "--teacher", "demo", "--data", "digits", *STUDENT, *SHORT, *further]


def pretrain(method: str) -> list[str]:
    """A pretraining method with networks and heads of a few numbers; the recipe is made from its own fields."""
    from fdkit.commands import pretrain as command

    kind: Any = command.config_class(method)
    sections = {
        name: kind.model_fields[name].annotation.model_fields for name in ("views", command.section(method))
    }
    own = sections[command.section(method)]
    arguments = ["pretrain", method, "--data", "digits", *SHORT]
    network = SWIN if method == "esvit" else NETWORK
    for name, value in network.items():
        text = json.dumps(value) if isinstance(value, dict) else str(value)
        arguments += [f"--network.{name.replace('_', '-')}", text]
    for name, value in VIEWS.items():
        if name in sections["views"]:
            arguments += [f"--views.{name.replace('_', '-')}", str(value)]
    for name, field in own.items():
        default = field.get_default(call_default_factory=True)
        if isinstance(default, int) and not isinstance(default, bool) and default > 64:
            arguments += [f"--{command.section(method)}.{name.replace('_', '-')}", "64"]
    if "num_splits" in own:
        arguments += [f"--{command.section(method)}.num-splits", "2"]
    return arguments


def finetune() -> list[str]:
    """All of a small ViT, from random weights, validated on the way and tested at the end."""
    model = ["timm:vit_tiny_patch16_224", "--no-pretrained", "--image-size", "32", "--data", "digits"]
    return ["finetune", *model, *SHORT, "--supervised.drop-path", "0.1", "--validate-every-epochs", "0.5"]


def left_by_finetuning(folder: Path) -> dict[str, str]:
    """What training leaves, and the test's result."""
    numbers = json.loads((folder / "results" / "finetune-test.json").read_text())
    return left_by_training(folder) | {"top1": str(numbers["top1"]), "nll": str(numbers.get("nll"))}


def evaluate(kind: str, folder: Path) -> list[str]:
    """Features of all digits into a cache, and a measurement of them."""
    kept = ["--cache", str(folder / "cache"), "--output", str(folder / "result.json")]
    return ["evaluate", kind, "demo", "--data", "digits", *kept, "--batch-size", "32", "--device", "cpu"]


def left_by_evaluation(folder: Path) -> dict[str, str]:
    """The accuracy and every cached feature."""
    numbers = json.loads((folder / "result.json").read_text())
    arrays = {path.name: digest(path.read_bytes()) for path in (folder / "cache").rglob("*.f32")}
    assert arrays
    return arrays | {"top1": str(numbers["top1"])}


@cache
def inputs() -> Path:
    """A folder for the images that jobs read, away from what they write; it goes with this process."""
    folder = Path(tempfile.mkdtemp(prefix="fdkit-images-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def pictures(count: int) -> Path:
    """A folder of class folders with little pictures of random pixels."""
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        path = inputs() / "pictures" / "train" / "ab"[number % 2] / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return inputs() / "pictures"


@cache
def scenes() -> Path:
    """Coloured rectangles and masks of them."""
    folder = inputs() / "scenes"
    for split, count in {"train": 12, "test": 3}.items():
        for number in range(count):
            image, mask = scene(number, 24, 40)
            stem = f"{split}/{number:03d}"
            write_pair(folder / "images", folder / "masks", stem, image, Image.fromarray(mask))
    return folder


def pack(*further: str) -> Job:
    """Sixty pictures, made smaller, into shards of five."""

    def commands(folder: Path) -> list[list[str]]:
        images = pictures(60)
        sizes = ("--short-side", "32", "--images-per-shard", "5", *further)
        return [["pack", str(images), "--output", str(folder / "out"), *sizes]]

    def result(folder: Path) -> dict[str, str]:
        paths = [
            path for path in (folder / "out").rglob("*") if path.is_file() and UNFINISHED not in path.parts
        ]
        return {str(path.relative_to(folder)): digest(path.read_bytes()) for path in paths}

    return Job(f"pack {' '.join(further)}".strip(), commands, (), result, is_quick=True)


def cached_distillations() -> Job:
    """A distillation that fills a teacher cache, and another student's that reads it."""

    def commands(folder: Path) -> list[list[str]]:
        kept = ["--teacher-cache.folder", str(folder / "cache"), "--teacher-cache.views", "1"]
        first = [*distill(*kept), "--output", str(folder / "first")]
        second = [*distill(*kept, "--student.width", "32"), "--output", str(folder / "second")]
        return [first, second]

    def result(folder: Path) -> dict[str, str]:
        runs = {
            f"{run} {name}": value
            for run in ("first", "second")
            for name, value in left_by_training(folder / run).items()
        }
        return runs | {path.name: digest(path.read_bytes()) for path in (folder / "cache").rglob("records-*")}

    return Job("two distillations with a teacher cache", commands, ("--resume",), result)


def segment() -> Job:
    """A linear head on the embedded teacher, for the classes of coloured rectangles."""

    def commands(folder: Path) -> list[list[str]]:
        sizes = ("--train.epochs", "3", "--train.batch-size", "4", "--train.precision", "fp32")
        every = ("--train.save-every-steps", "3", "--train.log-every-steps", "2")
        where = ("--loader.workers", "0", "--device", "cpu", "--output", str(folder))
        return [["segment", "demo", "--data", str(scenes()), *sizes, *every, *where]]

    def result(folder: Path) -> dict[str, str]:
        numbers = json.loads((folder / "results" / "segmentation-test.json").read_text())
        return left_by_training(folder) | {"miou": str(numbers["miou"])}

    return Job("segment", commands, ("--resume",), result)


def training(name: str, arguments: list[str], result: Any = left_by_training) -> Job:
    """A command that trains into its folder."""
    return Job(name, lambda folder: [[*arguments, "--output", str(folder)]], ("--resume",), result)


def shortest() -> Job:
    """A distillation of five steps with three checkpoints."""
    little = ("--train.batch-size", "256", "--train.save-every-steps", "2", "--monitor.every-epochs", "0")
    return training("distill", distill(*little, "--monitor.collapse-every-epochs", "0"))


@cache
def finished() -> Path:
    """The folder of the shortest distillation, undisturbed; made once. Raises RuntimeError if it fails."""
    folder, log = inputs() / "finished", inputs() / "finished.log"
    if code := finish(shortest().commands(folder), log):
        raise RuntimeError(f"undisturbed: exit code {code}: {last_words(log)}")
    return folder


def extraction(kind: str) -> Job:
    """A measurement of cached features."""
    name = f"evaluate {kind} (feature extraction)"
    return Job(name, lambda folder: [evaluate(kind, folder)], (), left_by_evaluation)


def all_jobs() -> list[Job]:
    """One job for every way of training, and for what extracts, packs and caches."""
    from fdkit.commands.pretrain import choices

    return [
        training("distill", distill()),
        training("distill with two workers", distill("--loader.workers", "2")),
        cached_distillations(),
        *(training(f"pretrain {method}", pretrain(method)) for method in choices()),
        training("finetune", finetune(), left_by_finetuning),
        segment(),
        extraction("knn"),
        extraction("linear"),
        pack("--workers", "0"),
        pack("--workers", "2"),
    ]
