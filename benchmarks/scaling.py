"""What several processes that train together reach of what the machine gives them: images a second, side by side.

Three arms take turns in one run, each process at one thread (or one GPU) with the same images a process: one process
alone, all at once but each for itself, and all together with gradients that are averaged. The second says what the
machine allows: cores that share caches, memory and clock do not compute twice as much in two processes. What training
together costs is the ratio of the second to the third within a turn; of the first to the third it is the scaling that a
user sees. Before anything is timed, the mean loss of the processes must equal that of one process with all images,
twice, the second time after an update.

    python benchmarks/scaling.py --output benchmarks/results/scaling_cpu.json
    python benchmarks/scaling.py --device cuda --processes 8 --model base large --precision bf16 --batch-size 128 \
        --steps 20 --parallel ddp fsdp --output benchmarks/results/scaling_gpu.json
"""

import argparse
import json
import os
import socket
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from distill_step import CLIP_MEAN, CLIP_STD, MAX_NORM, MODELS, OPTIM, PRECISIONS, environment
from torch import Tensor, nn

from fdkit.data.views import CropConfig, RandomCrop
from fdkit.methods._method import Method
from fdkit.methods.feature_distillation import FeatureDistillation, FeatureDistillationConfig
from fdkit.models.backbone import Preprocessing
from fdkit.models.libraries import build_timm
from fdkit.models.student import StudentConfig, build_student
from fdkit.teachers.teacher import Teacher
from fdkit.training.distributed import World, local_device, process_group
from fdkit.training.optimizer import build_optimizer, trained_parameters
from fdkit.training.parallel import parallel

TOLERANCES = {"fp32": 1e-4, "bf16": 1e-2}
ALONE = World(0, 1, 0)
SETTLING = 2
"""Turns that are not counted."""

Step = Callable[[Tensor], Tensor]


class Case(NamedTuple):
    """One comparison."""

    model: str
    precision: str
    batch_size: int
    """Images a process."""
    parallel: str
    steps: int
    repeats: int


def build_method(case: Case) -> Method:
    """Feature distillation with random weights, the same in every process; no paths are dropped."""
    torch.manual_seed(0)
    clip = Preprocessing(CLIP_MEAN, CLIP_STD, 224)
    teacher = build_timm(MODELS[case.model], {}, preprocessing=clip).eval()
    student = build_student(StudentConfig(drop_path=0.0), teacher, image_size=224, seed=1)
    crops = RandomCrop(CropConfig())
    return FeatureDistillation(Teacher(teacher, name=case.model), student, crops, FeatureDistillationConfig())


def build_step(case: Case, world: World, device: torch.device) -> Step:
    """A step as the training loop makes it, alone or with the other processes; gives this process's loss."""
    is_bf16 = case.precision == "bf16"
    method = build_method(case).to(device).train()
    together = parallel(
        method, world, device, wanted=case.parallel if world.size > 1 else "auto", is_bf16=is_bf16
    )  # type: ignore[arg-type]
    optimizer = build_optimizer(method, OPTIM)
    if together.shards is not None:
        together.shards.take_over(optimizer)
    parameters = trained_parameters(optimizer)

    def step(images: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with together.adding_up(True):
            with torch.autocast(device.type, torch.bfloat16, enabled=is_bf16):
                loss = together.module([images], 0.0)["loss"]
            loss.backward()
        if together.shards is None:
            norm = nn.utils.get_total_norm([one.grad for one in parameters if one.grad is not None])
        else:
            together.shards.take_gradients()
            norm = together.shards.gradient_norms(parameters).norm()
        nn.utils.clip_grads_with_norm_(parameters, MAX_NORM, norm)
        optimizer.step()
        return loss.detach()

    return step


def images_of(case: Case, count: int) -> Tensor:
    """Images in [0, 1], those of process 0 first."""
    return torch.rand(count * case.batch_size, 3, 224, 224, generator=torch.Generator().manual_seed(2))


def seconds_of(step: Step | None, images: Tensor, steps: int) -> float:
    """Seconds until all processes have done their steps; None: this one waits."""
    dist.barrier()
    begin = time.perf_counter()
    for _ in range(steps if step is not None else 0):
        assert step is not None
        step(images)
    if images.is_cuda:
        torch.cuda.synchronize()
    dist.barrier()
    return time.perf_counter() - begin


def assert_parity(case: Case, world: World, device: torch.device, together: Step) -> None:
    """The processes compute what one would compute with all their images, also after an update."""
    whole = images_of(case, world.size).to(device)
    alone = build_step(case, ALONE, device)
    for _ in range(2):
        expected = alone(whole)
        found = together(whole.chunk(world.size)[world.rank])
        dist.all_reduce(found)
        difference = float(abs(found / world.size - expected) / abs(expected))
        assert difference <= TOLERANCES[case.precision], f"losses differ by {difference:.2g}: {case}"


def compare(case: Case, world: World, device: torch.device) -> dict[str, Any]:
    """Images a second of the three arms, and the ratios within turns."""
    together = build_step(case, world, device)
    assert_parity(case, world, device, together)
    by_itself = build_step(case, ALONE, device)
    images = images_of(case, world.size).chunk(world.size)[world.rank].to(device)
    arms: dict[str, Step | None] = {
        "one alone": by_itself if world.is_main else None, "each for itself": by_itself, "together": together,
    }  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(SETTLING + case.repeats):
        for name in list(arms) if turn % 2 else reversed(arms):
            taken = seconds_of(arms[name], images, case.steps)
            if turn >= SETTLING:
                seconds[name].append(taken)
    return case._asdict() | summary(seconds, case.steps * case.batch_size, world.size)


def summary(seconds: dict[str, list[float]], images: int, num_processes: int) -> dict[str, Any]:
    """Medians; images: of one process in one turn."""

    def ratio(above: str, below: str) -> dict[str, float]:
        found = [a / b for a, b in zip(seconds[above], seconds[below], strict=True)]
        low, median, high = statistics.quantiles(found, n=4, method="inclusive")
        return {"median": median, "low": low, "high": high}

    counts = {"one alone": 1, "each for itself": num_processes, "together": num_processes}
    return {
        "processes": num_processes,
        "images_per_second": {
            name: counts[name] * images / statistics.median(taken) for name, taken in seconds.items()
        },
        "efficiency": ratio("one alone", "together"),
        "limit_of_the_machine": ratio("one alone", "each for itself"),
        "share_of_the_limit": ratio("each for itself", "together"),
    }


def work(rank: int, cases: list[Case], device_name: str, size: int, port: int, output: Path | None) -> None:
    """One of the processes."""
    torch.set_num_threads(1)
    place = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in place.items()})
    device = local_device(device_name)
    with process_group(device) as world:
        results = [compare(case, world, device) for case in cases]
        if world.is_main:
            document = json.dumps({"environment": environment(device), "results": results}, indent=2)
            if output:
                output.write_text(document + "\n")
            print(document)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["tiny"])
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=["fp32"])
    parser.add_argument("--parallel", nargs="+", choices=["ddp", "fsdp"], default=["ddp", "fsdp"])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=8, help="images a process")
    parser.add_argument("--steps", type=int, default=2, help="steps of each arm in a turn")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    cases = [
        Case(model, precision, args.batch_size, kind, args.steps, args.repeats)
        for model in args.model
        for precision in args.precision
        for kind in args.parallel
    ]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(work, args=(cases, args.device, args.processes, port, args.output), nprocs=args.processes)


if __name__ == "__main__":
    main()
