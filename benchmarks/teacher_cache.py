"""What a filled teacher cache saves of a distillation step, reading and checking its records included.

Both sides are fdkit's own step, from the same weights, on the same crops in the same order, cropped anew by the loader
in this process; one runs the teacher, the other reads what it said. The losses of every step must agree up to what
storing loses before times are compared: the sides take turns, CPU-seconds at one thread or wall time on CUDA, medians.
Records come from the page cache of the operating system, so that the disk is not measured: `break_even_read_rate`, in
bytes a second, is what a disk must give so that reading costs no more than the teacher.

    python benchmarks/teacher_cache.py --output benchmarks/results/teacher_cache_cpu.json
"""

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from distill_step import MODELS, OPTIM, environment
from PIL import Image
from torch import nn

from fdkit.commands._teacher_cache import CacheRequest, TeacherCacheConfig, open_caches
from fdkit.data.loader import LoaderConfig, training_batches
from fdkit.data.repeated_views import RepeatedViews
from fdkit.data.views import CropConfig, RandomCrop, Views
from fdkit.methods.feature_distillation import FeatureDistillation, FeatureDistillationConfig, teacher_says
from fdkit.models.libraries import build_timm
from fdkit.models.student import StudentConfig, build_student
from fdkit.teachers.cache_cost import break_even_read_rate, speed_up_bound
from fdkit.teachers.teacher import Teacher
from fdkit.training.distributed import current_world
from fdkit.training.optimizer import build_optimizer

MODELS = MODELS | {"small": "vit_small_patch16_224"}
SEED = 4
STORAGE = {"int8": {}, "fp16": {"dtype": "fp16"}, "pca": {"pca": 64}}


class Case(NamedTuple):
    """One comparison."""

    teacher: str
    student: str
    storage: str
    precision: str
    batch_size: int
    device: torch.device


class Blots:
    """Pictures of soft random colours, 500 x 375, made once."""

    name, labels, classes, fingerprint = "blots", None, (), "b" * 64

    def __init__(self, count: int) -> None:
        random = np.random.default_rng(0)
        small = [random.integers(0, 256, (9, 12, 3), dtype=np.uint8) for _ in range(count)]
        self.images = [Image.fromarray(pixels).resize((500, 375)) for pixels in small]

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> Image.Image:
        """RGB."""
        return self.images[index]

    def describe(self, index: int) -> str:
        """For messages."""
        return f"blot {index}"


def build(case: Case, source: Blots, folder: Path) -> tuple[dict[str, FeatureDistillation], dict[str, Any]]:
    """Both sides, from the same random weights, and what the cache says of itself."""
    torch.manual_seed(0)
    teacher = Teacher(build_timm(MODELS[case.teacher], {}), name=case.teacher)
    shape = build_timm(MODELS[case.student], {})
    student = build_student(StudentConfig(drop_path=0), shape, image_size=224, seed=1)
    crops, config = CropConfig(), FeatureDistillationConfig()
    views: Views = RandomCrop(crops)
    request = CacheRequest(
        config=TeacherCacheConfig(folder=str(folder), views=1, **STORAGE[case.storage]),
        distillation=config, crops=crops, views=views, source=source, loader=LoaderConfig(workers=0), seed=SEED,
        epochs=100.0, autocast=case.precision == "bf16", device=case.device, world=current_world(),
    )  # fmt: skip
    cached_views, cached, facts = open_caches(request, [teacher])
    sides = {
        "teacher": FeatureDistillation(teacher, copy.deepcopy(student), RepeatedViews(views, 1), config),
        "cache": FeatureDistillation(teacher, student, cached_views, config, cached=cached),
    }
    return {name: method.to(case.device).train() for name, method in sides.items()}, facts[0]


def steps_of(method: FeatureDistillation, source: Blots, case: Case, num_steps: int) -> Callable[[], float]:
    """A step with its reading; gives the loss."""
    batches = training_batches(
        source, method.views, LoaderConfig(workers=0),
        batch_size=case.batch_size, seed=SEED, start_step=0, num_steps=num_steps,
    )  # fmt: skip
    optimizer = build_optimizer(method, OPTIM)

    def step() -> float:
        batch = next(batches)
        crops = [crop.to(case.device) for crop in batch.crops]
        colour = [drawn if drawn.dtype == torch.int64 else drawn.to(case.device) for drawn in batch.colour]
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(case.device.type, torch.bfloat16, enabled=case.precision == "bf16"):
            loss = method(method.views.finish(crops, colour), 0.0)["loss"]
        loss.backward()
        nn.utils.clip_grad_norm_(list(method.parameters()), 3.0)
        optimizer.step()
        return loss.item()

    return step


def timed(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """CPU-seconds, or wall time on CUDA, and what the work gives."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    begin = clock()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - begin, result


def compare(case: Case, *, repeats: int) -> dict[str, Any]:
    """Median seconds of both sides, taking turns on a filled cache; losses agree in every step."""
    source = Blots(2 * case.batch_size)
    with tempfile.TemporaryDirectory() as place:
        sides, facts = build(case, source, Path(place) / "cache")
        fill(sides["cache"], source, case)
        steps = {name: steps_of(method, source, case, 2 + repeats) for name, method in sides.items()}
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        losses: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(2 + repeats):
            for name in sorted(sides, reverse=turn % 2 == 1):
                elapsed, loss = timed(steps[name], case.device)
                losses[name].append(loss)
                if turn >= 2:
                    seconds[name].append(elapsed)
            agree(losses, facts["stored"]["relative"])
        alone = teacher_seconds(sides["teacher"], case, repeats)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    size = round(1e9 * facts["gigabytes"]) // len(source)
    return {
        **case._asdict() | {"device": str(case.device)},
        "bytes_per_image": size,
        "stored": facts["stored"],
        "losses": losses,
        "seconds": seconds,
        "median_seconds": medians,
        "speedup": medians["teacher"] / medians["cache"],
        "teacher_share": alone / medians["teacher"],
        "speedup_bound": speed_up_bound(100, 1, min(0.99, alone / medians["teacher"]), is_complete=True),
        "break_even_read_rate": break_even_read_rate(size, alone / case.batch_size),
    }


def fill(method: FeatureDistillation, source: Blots, case: Case) -> None:
    """Put every crop into the cache without training."""
    step = training_batches(
        source, method.views, LoaderConfig(workers=0),
        batch_size=case.batch_size, seed=SEED, start_step=0, num_steps=len(source) // case.batch_size,
    )  # fmt: skip
    for batch in step:
        crops = [crop.to(case.device) for crop in batch.crops]
        with (
            torch.no_grad(),
            torch.autocast(case.device.type, torch.bfloat16, enabled=case.precision == "bf16"),
        ):
            method(
                method.views.finish(crops, batch.colour[:1] + [d.to(case.device) for d in batch.colour[1:]]),
                0.0,
            )


def agree(losses: dict[str, list[float]], relative_error: float) -> None:
    """Losses differ by no more than what storing loses of the targets, and rounding."""
    tolerance = 2 * relative_error + 1e-3
    for ours, plain in zip(losses["cache"], losses["teacher"], strict=True):
        assert abs(ours - plain) <= tolerance * abs(plain), f"losses differ: {losses}"


def teacher_seconds(method: FeatureDistillation, case: Case, repeats: int) -> float:
    """Median seconds of the teacher alone on one batch."""
    images = torch.rand(case.batch_size, 3, 224, 224, device=case.device)

    def run() -> None:
        with torch.autocast(case.device.type, torch.bfloat16, enabled=case.precision == "bf16"):
            teacher_says(method.teacher, images, method.config)

    run()
    return statistics.median(timed(run, case.device)[0] for _ in range(repeats))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", nargs="+", choices=MODELS, default=["tiny", "small"])
    parser.add_argument("--student", choices=MODELS, default="tiny")
    parser.add_argument("--storage", nargs="+", choices=STORAGE, default=list(STORAGE))
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32"])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    cases = [
        Case(teacher, args.student, storage, precision, args.batch_size, args.device)
        for teacher in args.teacher
        for storage in args.storage
        for precision in args.precision
    ]
    results = [compare(case, repeats=args.repeats) for case in cases]
    document = json.dumps({"environment": environment(args.device), "results": results}, indent=2)
    if args.output:
        args.output.write_text(document + "\n")
    print(document)


if __name__ == "__main__":
    main()
