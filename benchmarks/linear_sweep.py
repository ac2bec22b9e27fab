"""The linear probe's sweep of 13 learning rates against thirteen ordinary runs, one a rate.

An ordinary run is what the official scripts do: `nn.Linear`, autograd, `torch.optim.SGD` with momentum and a cosine,
its own pass over the data, one rate. Both see the same images in the same batches, take turns in one process on one
thread, and their thirteen classifiers are compared on test. Two kinds of rows:
- cached: all runs read the same features, made beforehand, in 13 passes or in one;
- forward: the thirteen runs crop the images anew and run a frozen network on them at every step, as the official
  scripts do; fdkit crops and forwards once a step for all thirteen (`--augment crop`), or once in all (cached).
Nothing is extrapolated: what is timed ran.

    python benchmarks/linear_sweep.py --output benchmarks/results/linear_sweep_cpu.json
    python benchmarks/linear_sweep.py --device cuda --output benchmarks/results/linear_sweep_h200.json
"""

import argparse
import io
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from data_path import environment, take_turns
from PIL import Image
from torch import Tensor, nn

from fdkit.data.loader import LoaderConfig, training_batches
from fdkit.data.views import CropConfig, RandomCrop
from fdkit.evaluation._probe import Candidate, ProbeConfig
from fdkit.evaluation._probe_data import CachedImages, StreamedImages
from fdkit.evaluation._subject import Extraction, Subject
from fdkit.evaluation.features import Features, extract_features
from fdkit.evaluation.linear import LinearConfig
from fdkit.models.backbone import Backbone
from fdkit.teachers.loading import load_teacher

RATES = LinearConfig().lr
CANDIDATES = [Candidate(lr) for lr in RATES]
GOAL = 10.0
GOAL_POINTS = 0.1
IN_PROCESS = LoaderConfig(workers=0)
Batches = Callable[[], Iterator[tuple[Tensor, Tensor]]]


class Shape(NamedTuple):
    """A problem with made features."""

    num_train: int
    num_test: int
    width: int
    num_classes: int
    batch_size: int
    epochs: int


SMALL = Shape(5000, 2000, 192, 10, 256, 20)
MIDDLE = Shape(5000, 2000, 768, 100, 256, 3)
LARGE = Shape(4096, 2000, 768, 1000, 256, 1)
IMAGENET = Shape(1_281_167, 50_000, 768, 1000, 1024, 1)


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)
    report: dict = {"question": __doc__.splitlines()[0], "rates": list(RATES), "goal": GOAL, "rows": {}}
    if arguments.device == "cuda":
        report["rows"] = on_gpu(arguments)
    else:
        report["rows"] = on_cpu(arguments)
    report |= {"device": arguments.device, "threads": 1, "environment": environment()}
    if arguments.device == "cuda":
        report["gpu"] = torch.cuda.get_device_name()
    text = json.dumps(report, indent=2)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--shared", type=Path, default=Path(__file__).parents[2] / "shared")
    parser.add_argument("--image-size", type=int, default=224, help="of CIFAR-10's images for ViT-Tiny")
    parser.add_argument("--epochs", type=int, default=100, help="of the long sweep on a GPU")
    parser.add_argument("--precisions", nargs="+", default=["high", "highest"], help="of products on a GPU")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def on_cpu(arguments: argparse.Namespace) -> dict:
    shapes = {"10 classes": SMALL, "100 classes": MIDDLE, "1000 classes": LARGE}
    rows = {
        f"cached, made features, {name}": {
            "shape": shape._asdict(),
            **cached(made(shape, "cpu"), shape.batch_size, shape.epochs, arguments.repeats),
        }
        for name, shape in shapes.items()
    }
    rows["forward, made images, timm's test_vit at 32 px"] = forward(arguments.repeats)
    if arguments.shared.is_dir():
        start = time.perf_counter()
        features = cifar_features(arguments.shared, arguments.image_size)
        seconds = time.perf_counter() - start
        rows[f"cached, CIFAR-10 5000/2000, ViT-Tiny at {arguments.image_size} px"] = {
            "extraction_seconds": round(seconds, 1),
            **cached(features, 256, 20, arguments.repeats),
        }
    return rows


def on_gpu(arguments: argparse.Namespace) -> dict:
    """ImageNet's size: one epoch against thirteen runs of one, then the whole sweep, in full and in TF32."""
    train, test = made(IMAGENET, "cuda")
    rows = {}
    for precision in arguments.precisions:
        torch.set_float32_matmul_precision(precision)
        name = f"cached, made features of ImageNet's size, matmul precision {precision}"
        rows[name] = {
            "shape": IMAGENET._asdict(),
            **cached((train, test), IMAGENET.batch_size, IMAGENET.epochs, repeats=1),
            "long_sweep": {"epochs": arguments.epochs, **long_sweep(train, test, arguments.epochs)},
        }
    return rows


def long_sweep(train: Features, test: Features, epochs: int) -> dict:
    config = ProbeConfig(train_batch_size=IMAGENET.batch_size, epochs=epochs)
    torch.cuda.synchronize()
    start = time.perf_counter()
    scores = sweep(train, test, config)()
    torch.cuda.synchronize()
    return {
        "seconds": round(time.perf_counter() - start, 2),
        "peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "top1": accuracies(scores, test.labels),
    }


def made(shape: Shape, device: str) -> tuple[Features, Features]:
    """Overlapping classes, so that accuracies are neither chance nor 1; channels of unequal mean and scale."""
    random = torch.Generator(device).manual_seed(0)
    centres = torch.randn(shape.num_classes, shape.width, generator=random, device=device)

    def draw(count: int) -> Features:
        labels = torch.randint(shape.num_classes, (count,), generator=random, device=device)
        values = torch.randn(count, shape.width, generator=random, device=device)
        values = values.add_(centres[labels], alpha=4 / shape.width**0.5)
        values = values.mul_(torch.linspace(0.5, 2, shape.width, device=device)).add_(0.3)
        return Features(values, labels, tuple(map(str, range(shape.num_classes))), {})

    return draw(shape.num_train), draw(shape.num_test)


def cached(features: tuple[Features, Features], batch_size: int, epochs: int, repeats: int) -> dict:
    train, test = features
    config = ProbeConfig(train_batch_size=batch_size, epochs=epochs)
    results: dict[str, list[Tensor]] = {}
    runs = {
        "thirteen runs": lambda: results.update(runs=ordinary_cached(train, test, config)),
        "fdkit's sweep": lambda: results.update(sweep=sweep(train, test, config)()),
    }
    return compared(runs, results, test.labels, repeats) | {"epochs": epochs, "batch_size": batch_size}


def sweep(train: Features, test: Features, config: ProbeConfig) -> Callable[[], list[Tensor]]:
    """Scores of test by every candidate."""

    def run() -> list[Tensor]:
        every = torch.arange(len(train.labels), device=train.labels.device)
        (probe,) = CachedImages(train, ("all",), config).fit(CANDIDATES, every)
        return [probe.only(one).scores(test.values)[:, 0] for one in CANDIDATES]

    return run


def ordinary_cached(train: Features, test: Features, config: ProbeConfig) -> list[Tensor]:
    """Thirteen runs, each standardising the features and shuffling them for itself."""
    scores = []
    for lr in RATES:
        variance, mean = torch.var_mean(train.values, dim=0, correction=0)
        scale = (variance + 1e-6).rsqrt()
        inputs, labels = (train.values - mean) * scale, train.labels

        def batches(inputs: Tensor = inputs, labels: Tensor = labels) -> Iterator[tuple[Tensor, Tensor]]:
            random = torch.Generator().manual_seed(config.seed)
            for _ in range(config.epochs):
                order = torch.randperm(len(labels), generator=random).to(labels.device)
                for rows in order.split(config.train_batch_size):
                    yield inputs[rows], labels[rows]

        steps = config.epochs * -(-len(labels) // config.train_batch_size)
        head = ordinary_run(batches, lr, inputs.shape[1], len(train.classes), steps, labels.device)
        with torch.no_grad():
            scores.append(head((test.values - mean) * scale))
    return scores


def ordinary_run(
    batches: Batches, lr: float, width: int, num_classes: int, steps: int, device: torch.device | str
) -> nn.Linear:
    """One linear layer trained as the official scripts train theirs; it starts from zero, as fdkit's."""
    head = nn.Linear(width, num_classes, device=device)
    nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
    optimizer = torch.optim.SGD(head.parameters(), lr=lr, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for inputs, labels in batches():
        optimizer.zero_grad()
        F.cross_entropy(head(inputs), labels).backward()
        optimizer.step()
        scheduler.step()
    return head


def forward(repeats: int) -> dict:
    """Images a network is run on at every step: 13 times, once for all rates, or once in all."""
    config = ProbeConfig(train_batch_size=64, epochs=3, normalization="none")
    teacher = load_teacher("timm:test_vit", pretrained=False, seed=0, image_size=32)
    extraction = Extraction(torch.device("cpu"), "cls", 1, 64, "fp32", IN_PROCESS)
    subject = Subject(teacher, "made", "test", extraction)
    train, test_images = MadeImages(512, seed=0), MadeImages(256, seed=1)
    subject._sources = {"train": train, "test": test_images}
    views = RandomCrop(CropConfig(image_size=32, interpolation="bicubic"))
    test = extract_features(teacher, test_images, pooling="cls", loader=IN_PROCESS)
    steps = config.epochs * (len(train) // config.train_batch_size)
    results: dict[str, list[Tensor]] = {}

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        found = training_batches(
            train, views, IN_PROCESS, batch_size=64, seed=config.seed, start_step=0, num_steps=steps
        )
        for batch in found:
            yield subject.encode(views.finish(batch.crops, batch.colour)[0]), batch.labels

    def thirteen() -> None:
        heads = [ordinary_run(batches, lr, test.values.shape[1], 10, steps, "cpu") for lr in RATES]
        results["runs"] = [head(test.values).detach() for head in heads]

    def crops() -> None:
        data = StreamedImages(subject, views, ("all",), config)
        (probe,) = data.fit(CANDIDATES, torch.arange(len(train)))
        results["sweep"] = [probe.only(one).scores(test.values)[:, 0] for one in CANDIDATES]

    def once() -> None:
        features = extract_features(teacher, train, pooling="cls", loader=IN_PROCESS)
        sweep(features, test, ProbeConfig(train_batch_size=64, epochs=3))()

    runs = {"thirteen runs": thirteen, "fdkit's sweep": crops, "fdkit's sweep without crops": once}
    about = {"images": len(train), "test_images": len(test_images), "epochs": config.epochs, "batch_size": 64}
    return compared(runs, results, test.labels, repeats) | about


class MadeImages:
    """Noise of 32 x 32 pixels whose mean colour is its class."""

    name = "made"

    def __init__(self, count: int, *, seed: int) -> None:
        random = np.random.default_rng(seed)
        self.labels = random.integers(10, size=count)
        self.classes = tuple(map(str, range(10)))
        tints = np.random.default_rng(99).integers(0, 60, size=(10, 3))
        noise = random.integers(0, 196, size=(count, 32, 32, 3))
        self.images = (noise + tints[self.labels][:, None, None]).astype(np.uint8)
        self.fingerprint = f"made-{count}-{seed}"

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> Image.Image:
        """The image."""
        return Image.fromarray(self.images[index])

    def describe(self, index: int) -> str:
        """What messages call the image."""
        return f"made/{index}"


class PackedImages(MadeImages):
    """The first images of a packed split of CIFAR-10."""

    name = "cifar10"

    def __init__(self, path: Path, count: int) -> None:
        packed = np.load(path)
        self.data, self.offsets = packed["jpeg"], packed["offsets"]
        self.labels = packed["labels"][:count].astype(np.int64)
        self.classes = tuple(str(name) for name in packed["classes"])
        self.fingerprint = f"{path.parent.name}/{path.name}, first {count}"

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> Image.Image:
        """The image."""
        data = self.data[self.offsets[index] : self.offsets[index + 1]].tobytes()
        return Image.open(io.BytesIO(data)).convert("RGB")


def cifar_features(shared: Path, image_size: int) -> tuple[Features, Features]:
    weights = shared / "weights" / "vit_tiny_patch16_224" / "vit_tiny_patch16_224.safetensors"
    teacher = load_teacher(str(weights), architecture="vit_tiny_patch16_224", image_size=image_size)
    assert isinstance(teacher.backbone, Backbone)
    splits = (("train", 5000), ("test", 2000))
    sources = [PackedImages(shared / "data" / "cifar10" / f"{name}.npz", count) for name, count in splits]
    train, test = (extract_features(teacher, one, pooling="cls", loader=IN_PROCESS) for one in sources)
    return train, test


def compared(
    runs: dict[str, Callable[[], None]], results: dict[str, list[Tensor]], labels: Tensor, repeats: int
) -> dict:
    """CPU seconds (wall on a GPU) of every candidate, and how far the thirteen classifiers are apart on test."""
    on_gpu = labels.device.type == "cuda"

    def finished(run: Callable[[], None]) -> Callable[[], None]:
        return (lambda: (run(), torch.cuda.synchronize())) if on_gpu else run

    cpu, wall = take_turns({name: finished(run) for name, run in runs.items()}, repeats)
    seconds = wall if on_gpu else cpu
    ratios = {
        name: [base / own for base, own in zip(seconds["thirteen runs"], times, strict=True)]
        for name, times in seconds.items()
        if name != "thirteen runs"
    }
    ours, theirs = (accuracies(results[name], labels) for name in ("sweep", "runs"))
    gap = max(abs(one - other) for one, other in zip(ours, theirs, strict=True))
    return {
        "speedup": {
            name: {
                "median": round(statistics.median(found), 2),
                "lowest_highest": [round(min(found), 2), round(max(found), 2)],
                "goal_reached": statistics.median(found) >= GOAL,
            }
            for name, found in ratios.items()
        },
        "seconds": {name: [round(value, 4) for value in times] for name, times in seconds.items()},
        "clock": "wall" if on_gpu else "cpu",
        "top1": {"fdkit's sweep": ours, "thirteen runs": theirs},
        "largest_gap_in_points": round(100 * gap, 3),
        "accuracies_agree": 100 * gap <= GOAL_POINTS,
    }


def accuracies(scores: list[Tensor], labels: Tensor) -> list[float]:
    return [round(float((one.argmax(dim=1) == labels).double().mean()), 5) for one in scores]


if __name__ == "__main__":
    main()
