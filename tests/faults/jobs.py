"""Every kind of command that writes, small enough to run in seconds on a CPU."""

import json
from pathlib import Path
from typing import Any

from faults.kills import Job, digest, left_by_training

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


def evaluate(folder: Path) -> list[str]:
    """Features of all digits into a cache, and kNN on them."""
    kept = ["--cache", str(folder / "cache"), "--output", str(folder / "knn.json")]
    return ["evaluate", "knn", "demo", "--data", "digits", *kept, "--batch-size", "32", "--device", "cpu"]


def left_by_evaluation(folder: Path) -> dict[str, str]:
    """The accuracy and every cached feature."""
    numbers = json.loads((folder / "knn.json").read_text())
    arrays = {path.name: digest(path.read_bytes()) for path in (folder / "cache").rglob("*.bin")}
    return arrays | {"top1": str(numbers["top1"]), "hits": digest(json.dumps(numbers.get("hits")).encode())}


def training(name: str, arguments: list[str], result: Any = left_by_training) -> Job:
    """A command that trains into its folder."""
    return Job(name, lambda folder: [*arguments, "--output", str(folder)], ("--resume",), result)


def all_jobs() -> list[Job]:
    """One job for every way of training, and for what extracts and caches."""
    from fdkit.commands.pretrain import choices

    return [
        training("distill", distill()),
        training("distill with two workers", distill("--loader.workers", "2")),
        *(training(f"pretrain {method}", pretrain(method)) for method in choices()),
        training("finetune", finetune(), left_by_finetuning),
        Job("evaluate knn (feature extraction)", evaluate, (), left_by_evaluation),
    ]
