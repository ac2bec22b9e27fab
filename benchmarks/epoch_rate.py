"""The rate of training with images read, decoded and cropped on the way, against the rate on a batch that lies ready.

Feature distillation trains on both, taking turns in one process: a block of steps on one batch resident on the device,
then a block on batches from the loader's workers, begun with as many steps as it takes until what the workers made
ahead is used up. First the loader's batch is checked to be, to the bit, what a single process makes, and its loss to
be the resident batch's. Reported are the ratio of the rates within a round, and the share of the time waited. The
images are read as a folder, and as shards packed to a short side of 256 pixels.

    python benchmarks/epoch_rate.py --device cuda --model base --batch-size 256 --steps 50 --output gpu.json
    python benchmarks/epoch_rate.py --output cpu.json
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from data_path import environment, link_photos, make_photos
from torch import Tensor

from fdkit.commands.pack import pack
from fdkit.data.loader import Batch, LoaderConfig, readers_of, training_batches
from fdkit.data.reading import ReadingCosts
from fdkit.data.sources import ImageSource, open_source
from fdkit.data.views import CropConfig, RandomCrop
from fdkit.methods.feature_distillation import FeatureDistillation, FeatureDistillationConfig
from fdkit.models.backbone import Preprocessing
from fdkit.models.libraries import build_timm
from fdkit.models.student import StudentConfig, build_student
from fdkit.teachers.teacher import Teacher
from fdkit.training.optimizer import OptimizerConfig, build_optimizer

MODELS = {
    "tiny": "vit_tiny_patch16_224",
    "base": "vit_base_patch16_224",
    "large": "vit_large_patch14_224",
}
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
GOAL_RATIO = 0.95
GOAL_WAIT = 0.03
FAR = 1_000_000_000
SEED = 0

Step = Callable[[Batch], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--workers", type=int, default=-1)
    parser.add_argument("--decoder", default="auto", choices=["auto", "pillow", "torchcodec"])
    parser.add_argument("--steps", type=int, default=10, help="timed steps of a block")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", type=Path, help="folder of photos; by default 500 x 375 ones are made")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if args.data:
            link_photos(args.data, root / "images", args.images)
        else:
            make_photos(root / "images", args.images)
        packed = pack(str(root / "images"), output=root / "packed", short_side=256)
        results = {
            "folder": measure(open_source(str(root / "images")), args),
            "packed, short side 256": measure(open_source(str(root / "packed")), args),
        }
    report = {
        "question": __doc__.splitlines()[0],
        "goals": {"ratio": GOAL_RATIO, "waited": GOAL_WAIT},
        "results": results,
        "pack": {name: packed[name] for name in ("images", "resized", "bytes_before", "bytes_after")},
        "model": args.model,
        "batch_size": args.batch_size,
        "steps": args.steps,
        "rounds": args.rounds,
        "data": args.data.name if args.data else "made: 500 x 375",
        "device": torch.cuda.get_device_name() if args.device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "environment": environment(),
    }
    text = json.dumps(report, indent=2)
    print(text)
    if args.output:
        args.output.write_text(text + "\n")


def measure(source: ImageSource, args: argparse.Namespace) -> dict[str, Any]:
    """Both sides in turns: images a second of each block, and the share of the loader's blocks that was waited."""
    loader = LoaderConfig(workers=args.workers, decoder=args.decoder)
    readers = readers_of(loader)
    costs = ReadingCosts()
    batches = batches_of(source, loader, args.batch_size, costs)
    resident = next(batches)
    check(source, resident, args)
    resident = on_device(resident, args.device)
    step = make_step(args.model, args.device)
    used_up = 2 * readers.workers + 2
    rates: dict[str, list[float]] = {"resident": [], "loader": []}
    waited: list[float] = []
    for turn in range(args.rounds + 1):
        alone, _ = run_block(step, repeat(resident), args.steps, args.device)
        run_block(step, batches, used_up, args.device)
        together, waiting = run_block(step, batches, args.steps, args.device)
        if turn:  # the first warms everything up
            rates["resident"].append(args.steps * args.batch_size / alone)
            rates["loader"].append(args.steps * args.batch_size / together)
            waited.append(waiting / together)
    ratios = [
        with_reading / alone for with_reading, alone in zip(rates["loader"], rates["resident"], strict=True)
    ]
    cost = costs.total
    return {
        "readers": readers._asdict(),
        "ratio": round(statistics.median(ratios), 4),
        "lowest_highest": [round(min(ratios), 4), round(max(ratios), 4)],
        "waited": round(statistics.median(waited), 4),
        "goals_reached": [statistics.median(ratios) >= GOAL_RATIO, statistics.median(waited) < GOAL_WAIT],
        "images_per_second": {name: round(statistics.median(values), 1) for name, values in rates.items()},
        "all_images_per_second": {name: [round(v, 1) for v in values] for name, values in rates.items()},
        "worker_milliseconds_of_an_image": round(
            1000 * (cost.read_seconds + cost.crop_seconds) / cost.num_images, 3
        ),
    }


def batches_of(
    source: ImageSource, loader: LoaderConfig, batch_size: int, costs: ReadingCosts | None = None
) -> Iterator[Batch]:
    return training_batches(
        source,
        RandomCrop(CropConfig()),
        loader,
        batch_size=batch_size,
        seed=SEED,
        start_step=0,
        num_steps=FAR,
        costs=costs,
    )


def check(source: ImageSource, first: Batch, args: argparse.Namespace) -> None:
    """The workers' batch is a single Pillow process's, and a step on it has the same loss."""
    plain = next(batches_of(source, LoaderConfig(workers=0, decoder="pillow"), args.batch_size))
    assert torch.equal(first.crops[0], plain.crops[0]), "the crops differ from those of one process"
    losses = [
        make_step(args.model, args.device)(on_device(batch, args.device)).item() for batch in (first, plain)
    ]
    tolerance = 0 if args.device.type == "cpu" else 1e-2
    assert abs(losses[0] - losses[1]) <= tolerance * abs(losses[1]), f"losses differ: {losses}"


def make_step(model: str, device: torch.device) -> Step:
    """A step of feature distillation, bf16; gives the loss, on the device."""
    torch.manual_seed(SEED)
    teacher = build_timm(MODELS[model], {}, preprocessing=Preprocessing(CLIP_MEAN, CLIP_STD, 224)).eval()
    student = build_student(StudentConfig(), teacher, image_size=224, seed=1)
    views = RandomCrop(CropConfig())
    method = FeatureDistillation(Teacher(teacher, name=model), student, views, FeatureDistillationConfig())
    method = method.to(device).train()
    optimizer = build_optimizer(method, OptimizerConfig(lr=1e-4))

    def step(batch: Batch) -> Tensor:
        batch = on_device(batch, device)
        images = views.finish(batch.crops, batch.colour)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16):
            loss = method(images, 0.0)["loss"]
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def on_device(batch: Batch, device: torch.device) -> Batch:
    return batch._replace(crops=[crop.to(device, non_blocking=True) for crop in batch.crops])


def repeat(batch: Batch) -> Iterator[Batch]:
    while True:
        yield batch


def run_block(
    step: Step, batches: Iterator[Batch], num_steps: int, device: torch.device
) -> tuple[float, float]:
    """Seconds of all steps, and how many of them were spent waiting for a batch, as the trainer counts them."""
    finish_work(device)
    start, waited = time.perf_counter(), 0.0
    for _ in range(num_steps):
        begin = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - begin
        step(batch)
    finish_work(device)
    return time.perf_counter() - start, waited


def finish_work(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
