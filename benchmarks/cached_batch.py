"""What `--train.cached-batch` costs and saves: a contrastive batch through the network in parts, against all at once.

MoCo v3's step (forward, backward, AdamW, momentum encoder) on random views, the same weights on both sides, which take
turns in one process. The gradient of the parts must be that of the whole before anything is timed. A last row is a
batch that is only taken in parts.

    python benchmarks/cached_batch.py --device cuda --batch-size 1024 --parts 8 --large-batch 4096 --large-parts 16 \
        --output benchmarks/results/cached_batch_gpu.json
"""

import argparse
import copy
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from distill_step import environment, timed
from pretrain_step import DURATION, Case, build_method, fdkit_step, make_views
from torch import Tensor, nn

from fdkit.methods._method import Method
from fdkit.training.activations import cache_batch

TOLERANCE = {"fp32": 1e-3, "bf16": 1e-1}
"""Batch norms in the heads amplify rounding; in float64 the tests hold 1e-9."""


def built(case: Case, num_parts: int, like: Method | None = None) -> Method:
    """The method at its first step, or a copy of `like`, whose network takes a batch in this many parts."""
    method = copy.deepcopy(like) if like is not None else build_method(case).to(case.device).train()
    method.begin(DURATION._replace(batch_size=case.batch_size, part_size=case.batch_size))
    if num_parts > 1:
        cache_batch(method, num_parts)
    return method


def gradient(method: Method, views: list[Tensor], case: Case) -> Tensor:
    """The whole gradient as one vector; the method is left without."""
    with torch.autocast(case.device.type, torch.bfloat16, enabled=case.precision == "bf16"):
        loss = method(views, 0.0)["loss"]
    loss.backward()
    parts = [p.grad.flatten() for p in method.parameters() if p.grad is not None]
    nn.Module.zero_grad(method, set_to_none=True)
    return torch.cat(parts)


def compare(case: Case, num_parts: int, repeats: int) -> dict[str, Any]:
    """Both ways: how far their gradients differ, seconds of a step, and memory."""
    whole = built(case, 1)
    methods = {"whole": whole, "parts": built(case, num_parts, whole)}
    views = make_views(case)
    first, second = (gradient(copy.deepcopy(method), views, case) for method in methods.values())
    difference = float((first - second).norm() / first.norm())
    assert difference < TOLERANCE[case.precision], f"gradients differ by {difference}"
    del first, second
    steps = {name: fdkit_step(method, case) for name, method in methods.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    peaks = {}
    for turn in range(1 + repeats):
        for name in sorted(steps, reverse=turn % 2 == 1):
            reset_peak(case.device)
            elapsed, _ = timed(lambda _, step=steps[name]: step(views), views[0])
            peaks[name] = peak(case.device)
            if turn:
                seconds[name].append(elapsed)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        **describe(case, num_parts),
        "gradient_difference": difference,
        "seconds": seconds,
        "cost": medians["parts"] / medians["whole"],
        "peak_bytes": peaks,
    }


def alone(case: Case, num_parts: int, repeats: int) -> dict[str, Any]:
    """A batch in parts alone: seconds of a step and memory."""
    step, views = fdkit_step(built(case, num_parts), case), make_views(case)
    step(views)
    reset_peak(case.device)
    seconds = [timed(lambda _: step(views), views[0])[0] for _ in range(repeats)]
    return {
        **describe(case, num_parts),
        "seconds": seconds,
        "images_per_second": case.batch_size / statistics.median(seconds),
        "peak_bytes": peak(case.device),
    }


def describe(case: Case, num_parts: int) -> dict[str, Any]:
    return {**case._asdict(), "device": case.device.type, "parts": num_parts}


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak(device: torch.device) -> int | None:
    """Most bytes allocated at a time since the last reset; None on a CPU."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=["small", "base"], default="small")
    parser.add_argument("--precision", choices=TOLERANCE, default="bf16")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--parts", type=int, default=4)
    parser.add_argument("--large-batch", type=int)
    parser.add_argument("--large-parts", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    case = Case("mocov3", args.model, args.precision, args.batch_size, args.device)
    results = [compare(case, args.parts, args.repeats)]
    if args.large_batch:
        large = case._replace(batch_size=args.large_batch)
        results.append(alone(large, args.large_parts, args.repeats))
    document = json.dumps({"environment": environment(args.device), "results": results}, indent=2)
    if args.output:
        args.output.write_text(document + "\n")
    print(document)


if __name__ == "__main__":
    main()
