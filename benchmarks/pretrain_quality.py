"""What each pretraining method makes of CIFAR-10 for the same budget, and what budget it needs to be worth anything.

Every method trains from random weights, without labels, for the same seconds of one CPU thread, or of a GPU: one small
ViT for all, with fixed positions, a frozen patch projection (but for MAE, which trains its own) and a class token, as
the MoCo v3 paper compares methods; for EsViT a small Swin. Frozen features are then measured by kNN and a linear probe
on labelled images (5,000 training images, all test images), beside the same network before its first step, and beside
raw pixels. An online kNN on 2,000 training and 1,000 test images tells when features first beat both.

    python benchmarks/pretrain_quality.py --data CIFAR10 --seconds 200 --batch-size 256 --workers 1 --device cuda \
        --output benchmarks/results/pretrain_quality_gpu.json

Results are added to the file, so methods may be run one by one, or side by side on one GPU, where each has its share of
it: --method simclr byol.
"""

import argparse
import fcntl
import io
import json
import math
import platform
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from PIL import Image

from fdkit.commands import pretrain
from fdkit.config import validate
from fdkit.data.loader import LoaderConfig
from fdkit.data.sources import ArraySource, ImageSource
from fdkit.data.subset import Subset
from fdkit.evaluation import knn, linear
from fdkit.evaluation.features import extract_features, raw_pixels
from fdkit.methods._method import Method
from fdkit.models.backbone import Backbone
from fdkit.training.loop import TrainConfig, train
from fdkit.training.run import Run

VIT = {
    "architecture": "vit_tiny_patch16_224",
    "model_args": {"patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 3},
    "position": "sincos",
    "initialisation": "xavier",
    "freeze_patch_projection": True,
    "pooling": "cls",
    "crop_ratio": 1,
}
SWIN = {
    "architecture": "swin_tiny_patch4_window7_224",
    "model_args": {
        "patch_size": 4,
        "embed_dim": 64,
        "depths": [2, 2],
        "num_heads": [2, 4],
        "window_size": 4,
    },
    "pooling": "patches",
    "crop_ratio": 1,
}
OPTIM = {
    "name": "adamw",
    "lr": 1e-3,
    "lr_reference_batch": None,
    "warmup_lr": 0,
    "min_lr": 0,
    "weight_decay": 0.05,
    "decay_exempt": "1d",
    "clip_grad": 3.0,
}
NO_BLUR = {"blur_probability": [0.0, 0.0]}
PAIR = {"image_size": 32, "min_scale": 0.2, **NO_BLUR}
CROPS = {
    "image_size": 32,
    "min_scale": 0.4,
    "local_size": 16,
    "local_scale": [0.1, 0.4],
    "num_local": 2,
    "local_blur_probability": 0.0,
    **NO_BLUR,
}
IN_PROCESS = LoaderConfig(workers=0)
NUM_LABELLED = 5000
"""Training images whose labels kNN and the linear probe see."""
HEADS = {"hidden_dim": 512, "output_dim": 128}
PROTOTYPES = {"hidden_dim": 512, "bottleneck_dim": 128, "output_dim": 1024}


class Case(NamedTuple):
    """How one method is run here: only what the small images and the small budget ask for."""

    own: dict[str, Any]
    """Its own section."""
    views: dict[str, Any] = PAIR
    network: dict[str, Any] = VIT


CASES = {
    "byol": Case(HEADS),
    "dino": Case({**PROTOTYPES, "momentum": 0.99}, CROPS),
    "esvit": Case({**PROTOTYPES, "momentum": 0.99}, CROPS, SWIN),
    "fast-moco": Case({"hidden_dim": 512, "output_dim": 256, "predictor_dim": 128}),
    "mae": Case(
        {"decoder_width": 64, "decoder_depth": 2, "decoder_heads": 2},
        {"image_size": 32, "min_scale": 0.2},
        {**VIT, "freeze_patch_projection": False},
    ),
    "mocov1": Case({"queue_size": 4096, "momentum": 0.99}),
    "mocov2": Case({"queue_size": 4096, "momentum": 0.99}),
    "mocov3": Case(HEADS),
    "simclr": Case({"temperature": 0.5}),
    "simsiam": Case({"output_dim": 512, "predictor_hidden_dim": 128}),
    "swav": Case({"num_prototypes": 100, "freeze_prototypes_steps": 100}, CROPS),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with train.npz and test.npz of JPEG files"
    )
    parser.add_argument("--method", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--seconds", type=float, default=180, help="of training for each method")
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=0, help="processes that read and crop images")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    splits = (packed(args.data / "train.npz"), packed(args.data / "test.npz"))
    labelled = (Subset(splits[0], list(range(NUM_LABELLED))), splits[1])
    if "raw pixels" not in read(args.output):
        add(args.output, "raw pixels", measure_pixels(labelled))
    for seed in args.seed:
        for method in args.method:
            budget = Budget(args.seconds, args.batch_size, args.workers, args.device)
            result = run(method, splits, budget, seed=seed)
            add(args.output, f"{method}, seed {seed}", result)
            print(
                json.dumps({method: {key: result[key] for key in ("start", "end", "first_above")}}),
                flush=True,
            )


class Budget(NamedTuple):
    """What every method gets."""

    seconds: float
    batch_size: int
    workers: int
    device: torch.device


def run(name: str, splits: tuple[ImageSource, ImageSource], budget: Budget, *, seed: int) -> dict[str, Any]:
    """Train one method for its budget, and measure it before and after."""
    case, device = CASES[name], budget.device
    values = {
        "data": "cifar10",
        "seed": seed,
        "views": case.views,
        "network": case.network,
        pretrain.section(name): case.own,
        "optim": OPTIM,
    }
    config: Any = validate(pretrain.config_class(name), values, "benchmark")
    per_step = seconds_a_step(config, budget, splits[0])
    num_steps = max(1, round(budget.seconds / per_step))
    method = pretrain.build_method(config)
    labelled = (Subset(splits[0], list(range(NUM_LABELLED))), splits[1])
    start = measure(method.exported, labelled, device)
    online = Online(splits, every_steps=max(1, num_steps // 10), seconds_per_step=per_step, device=device)
    begin = clock(device)
    train_for(method, config, budget, splits[0], num_steps=num_steps, monitors=[online])
    elapsed = clock(device) - begin
    pixels = online.pixels()
    bar = max(pixels, online.curve[0]["knn_top1"])
    above = [point for point in online.curve if point["knn_top1"] > bar]
    return {
        "seconds": budget.seconds,
        "elapsed_seconds_with_monitor": elapsed,
        "steps": num_steps,
        "batch_size": budget.batch_size,
        "images": num_steps * budget.batch_size,
        "num_parameters": sum(p.numel() for p in method.student.parameters()),
        "start": start,
        "end": measure(method.exported, labelled, device),
        "curve": online.curve,
        "bar": bar,
        "first_above": above[0] if above else None,
        "config": {key: values[key] for key in ("views", "network", pretrain.section(name), "optim")},
        "environment": environment(device),
    }


def train_for(
    method: Method,
    config: Any,
    budget: Budget,
    source: ImageSource,
    *,
    num_steps: int,
    monitors: Any,
) -> None:
    """Train through fdkit's own loop, in a folder that is thrown away."""
    per_epoch = len(source) // budget.batch_size
    epochs = num_steps / per_epoch
    settings = TrainConfig(
        epochs=epochs,
        batch_size=budget.batch_size,
        precision="fp32",
        log_every_steps=20,
        save_every_minutes=1e6,
    )
    optim = config.optim.model_copy(update={"warmup_epochs": epochs / 10})
    with (
        tempfile.TemporaryDirectory() as folder,
        Run.create(Path(folder) / "run", "", command=[]) as folder_run,
    ):
        train(
            method,
            source,
            folder_run,
            train=settings,
            optim=optim,
            loader=LoaderConfig(workers=budget.workers),
            seed=config.seed,
            device=budget.device,
            monitors=monitors,
        )


class Online:
    """The kNN of a subset of the images now and then, with the seconds of training it took to get there."""

    def __init__(
        self,
        splits: tuple[ImageSource, ImageSource],
        *,
        every_steps: int,
        seconds_per_step: float,
        device: torch.device,
    ) -> None:
        self.every_steps = every_steps
        self.seconds_per_step = seconds_per_step
        self.device = device
        self.parts = (Subset(splits[0], list(range(2000))), Subset(splits[1], list(range(1000))))
        self.curve: list[dict[str, float]] = []

    def __call__(self, method: Method, step: int) -> dict[str, float]:
        """Measure once."""
        features = [
            extract_features(method.exported, part, batch_size=250, device=self.device, loader=IN_PROCESS)
            for part in self.parts
        ]
        top1 = knn.evaluate(features[0], features[1], knn.KNNConfig(k=(20,)))["top1"]
        self.curve.append({"step": step, "seconds": step * self.seconds_per_step, "knn_top1": top1})
        return {"knn_top1": top1}

    def pixels(self) -> float:
        """The kNN of the pixels of the same images."""
        train_part, test_part = (raw_pixels(part, crop_ratio=1) for part in self.parts)
        return float(knn.evaluate(train_part, test_part, knn.KNNConfig(k=(20,)))["top1"])


def seconds_a_step(config: Any, budget: Budget, source: ImageSource) -> float:
    """CPU seconds (or seconds on a GPU) of one step, loading included, from two short runs that are thrown away."""
    lengths = (20, 120) if budget.device.type == "cuda" else (3, 13)
    elapsed = []
    for num_steps in lengths:
        begin = clock(budget.device)
        train_for(pretrain.build_method(config), config, budget, source, num_steps=num_steps, monitors=[])
        elapsed.append(clock(budget.device) - begin)
    return (elapsed[1] - elapsed[0]) / (lengths[1] - lengths[0])


def clock(device: torch.device) -> float:
    """CPU seconds of this process, or seconds once the GPU is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def measure(
    backbone: Backbone, splits: tuple[ImageSource, ImageSource], device: torch.device
) -> dict[str, float]:
    """What `probes` says of frozen features."""
    features = [
        extract_features(backbone, part, batch_size=250, device=device, loader=IN_PROCESS) for part in splits
    ]
    return probes(features)


def measure_pixels(splits: tuple[ImageSource, ImageSource]) -> dict[str, float]:
    """The same of the pixels themselves."""
    return probes([raw_pixels(part, crop_ratio=1) for part in splits])


def probes(features: list[Any]) -> dict[str, float]:
    """Accuracy of kNN (k=20) and of a linear probe, shares in [0, 1], and half the 95 % interval of the first."""
    top1 = float(knn.evaluate(features[0], features[1], knn.KNNConfig(k=(20,)))["top1"])
    count = len(features[1].labels)
    return {
        "knn": top1,
        "linear": float(linear.evaluate(features[0], features[1], linear.LinearConfig())["top1"]),
        "knn_interval": 1.96 * math.sqrt(top1 * (1 - top1) / count),
    }


def packed(path: Path) -> ArraySource:
    """Images from one file of JPEG bytes end to end, their offsets, labels and class names."""
    with np.load(path) as arrays:
        content, offsets = arrays["jpeg"].tobytes(), arrays["offsets"]
        labels, classes = arrays["labels"], [str(name) for name in arrays["classes"]]
    images = [
        np.asarray(Image.open(io.BytesIO(content[start:end])).convert("RGB"))
        for start, end in pairwise(offsets.tolist())
    ]
    return ArraySource(f"cifar10 {path.stem}", np.stack(images), labels, classes)


def read(path: Path) -> dict[str, Any]:
    """What the file of results holds by now."""
    return json.loads(path.read_text()) if path.exists() and path.stat().st_size else {}


def add(path: Path, name: str, result: dict[str, Any]) -> None:
    """Add one result, also while another process adds its own."""
    with locked(path):
        path.write_text(json.dumps({**read(path), name: result}, indent=1) + "\n")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def environment(device: torch.device) -> dict[str, Any]:
    """Hardware, versions and commit."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    names = [line.partition(":")[2].strip() for line in cpu_lines() if line.startswith("model name")]
    return {
        "device": torch.cuda.get_device_name()
        if device.type == "cuda"
        else (names or [platform.processor()])[0],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "commit": git.stdout.strip() or None,
    }


def cpu_lines() -> list[str]:
    info = Path("/proc/cpuinfo")
    return info.read_text().splitlines() if info.exists() else []


if __name__ == "__main__":
    main()
