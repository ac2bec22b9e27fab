"""How far `fdkit plan` is off: its forecasts against runs that were measured.

Of a GPU: the committed step times and peak memories of one NVIDIA H200. A step time is forecast with constants fitted
to the other step times alone, so that it is a forecast. The steps were timed on a resident batch, uncompiled; those of
MoCo v3 in batches of 1024 and 4096 were never fitted to.
Of this CPU: the seconds of a step from matrix products and additions timed here a moment before, and the growth of the
process's memory in a child of its own.

    python benchmarks/plan_error.py --output benchmarks/results/plan_error.json
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from distill_step import environment

from fdkit.commands import pretrain
from fdkit.commands._blueprint import blueprint
from fdkit.commands.distill import DistillConfig
from fdkit.config import validate
from fdkit.methods._method import Duration, Method
from fdkit.training import cost
from fdkit.training.cost import Measured
from fdkit.training.hardware import GPUS, measure_device
from fdkit.training.optimizer import OptimizerConfig, build_optimizer
from fdkit.training.trace import trace_step

RESULTS = Path(__file__).parent / "results"
NETWORKS = {"small": "vit_small_patch16_224", "base": "vit_base_patch16_224"}
TEACHERS = {"base": "clip_vitb", "large": "clip_vitl"}
CPU_CASES = (("distill", "base", 4), ("mocov3", "small", 8), ("mae", "base", 8))
DURATION = Duration(num_steps=1000, steps_per_epoch=100)


def described(method: str, model: str) -> Method:
    """The method of a committed result, without weights."""
    values: dict[str, Any] = {"data": "none"}
    if method == "distill":
        return blueprint(
            "distill", validate(DistillConfig, values | {"teacher": TEACHERS[model]}, ""), num_classes=1
        )
    values["network"] = {"architecture": NETWORKS[model]}
    if method == "dino":
        values["views"] = {"num_local": 8, "local_size": 96}
        values["network"]["drop_path"] = 0.1
    kind = pretrain.config_class(method)
    return blueprint("pretrain", validate(kind, values, ""), num_classes=1)


def traced(method: Method, batch_size: int, *, on_gpu: bool = True, parts: int = 1) -> Any:
    """Its step."""
    return trace_step(
        method,
        batch_size=batch_size,
        precision="bf16",
        on_gpu=on_gpu,
        duration=DURATION,
        cached_parts=parts,
    )


def measured_steps() -> list[Measured]:
    """The committed step times."""
    found = []
    for file in ("distill_step_gpu.json", "pretrain_step_gpu.json"):
        for row in json.loads((RESULTS / file).read_text())["results"]:
            name = row.get("method", "distill")
            method = described(name, row["model"])
            found.append(
                Measured(
                    f"{name} {row['model']}, batch {row['batch_size']}",
                    traced(method, row["batch_size"]),
                    cost.update_traffic(cost.count_weights(method), "adamw"),
                    GPUS["h200"],
                    row["median_seconds"]["fdkit"],
                )
            )
    return found


def forecast(run: Measured, share: float, seconds_per_operation: float) -> float:
    """Seconds of a run's step, with these constants."""
    rates = cost.Rates(
        cost.MATMUL_SHARE * run.gpu.bf16_flops, share * run.gpu.bandwidth, seconds_per_operation
    )
    return cost.step_seconds(run.trace, rates, update_bytes=run.update_bytes)


def row(name: str, predicted: float, measured: float, unit: str, **more: Any) -> dict[str, Any]:
    """A line of the result; the error is positive where too much was forecast."""
    error = 100 * (predicted / measured - 1)
    print(f"{name:40} {predicted:12.5g} {measured:12.5g} {unit:8} {error:+6.1f} %", flush=True)
    return {
        "name": name,
        "forecast": predicted,
        "measured": measured,
        "unit": unit,
        "error_percent": round(error, 1),
        **more,
    }


def gpu_steps(runs: list[Measured]) -> list[dict[str, Any]]:
    """Each step time, forecast from the others."""
    rows = []
    for position, run in enumerate(runs):
        others = runs[:position] + runs[position + 1 :]
        share, start = cost.calibrate(others)
        predicted = forecast(run, share, start)
        mfu = cost.utilisation(run.trace, run.seconds, run.gpu.bf16_flops)
        rows.append(
            row(
                run.name,
                predicted,
                run.seconds,
                "s",
                traffic_share=share,
                seconds_per_operation=start,
                measured_utilisation=round(mfu, 4),
            )
        )
    return rows


def gpu_memory() -> list[dict[str, Any]]:
    """The committed peaks of MoCo v3, whole and in parts, and their step times, which nothing was fitted to."""
    rows = []
    method = described("mocov3", "small")
    weights = cost.count_weights(method)
    rates = cost.gpu_rates(GPUS["h200"], "bf16")
    update = cost.update_traffic(weights, "adamw")
    for result in json.loads((RESULTS / "cached_batch_gpu.json").read_text())["results"]:
        batch, parts = result["batch_size"], result["parts"]
        peaks = result["peak_bytes"]
        for kind, num_parts in (("whole", 1), ("parts", parts)):
            peak = peaks.get(kind) if isinstance(peaks, dict) else peaks if kind == "parts" else None
            if peak is None:
                continue
            step = traced(method, batch, parts=num_parts)
            name = f"mocov3 small, batch {batch}" + (f" in {num_parts} parts" if num_parts > 1 else "")
            rows.append(row(name, cost.state_bytes(weights, "adamw") + step.peak_bytes, peak, "bytes"))
            times = result["seconds"][kind] if isinstance(result["seconds"], dict) else result["seconds"]
            predicted = cost.step_seconds(step, rates, update_bytes=update)
            rows.append(row(name, predicted, statistics.median(times), "s"))
    return rows


def cpu_step(name: str, model: str, batch_size: int, queue: Any) -> None:
    """In a process of its own: the rates of this machine, then steps, then how the memory grew."""
    torch.set_num_threads(1)
    method = real(name, model).train()
    method.begin(DURATION._replace(batch_size=batch_size, part_size=batch_size))
    optimizer = build_optimizer(method, OptimizerConfig())
    views = [torch.rand(batch_size, 3, 224, 224) for _ in range(method.views.num_views)]
    rates = measure_device(torch.device("cpu"), "bf16", clock=time.process_time)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(4):
        start = time.process_time()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16):
            loss = method(views, 0.1)["loss"]
        loss.backward()
        optimizer.step()
        method.after_step(0.1)
        seconds.append(time.process_time() - start)
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    queue.put((rates, statistics.median(seconds[1:]), grown))


def real(name: str, model: str) -> Method:
    """The method with random weights."""
    from fdkit.data.views import CropConfig, RandomCrop
    from fdkit.methods.feature_distillation import FeatureDistillation, FeatureDistillationConfig
    from fdkit.models.student import StudentConfig, build_student
    from fdkit.teachers.loading import load_teacher

    if name == "distill":
        teacher = load_teacher(TEACHERS[model], pretrained=False)
        student = build_student(StudentConfig(drop_path=0), teacher.backbone, image_size=224, seed=0)
        return FeatureDistillation(teacher, student, RandomCrop(CropConfig()), FeatureDistillationConfig())
    kind = pretrain.config_class(name)
    values = {"data": "none", "network": {"architecture": NETWORKS[model]}}
    return pretrain.build_method(validate(kind, values, ""))


def cpu_rows() -> list[dict[str, Any]]:
    """Steps on this machine's CPU, one thread."""
    rows = []
    context = multiprocessing.get_context("spawn")
    for name, model, batch_size in CPU_CASES:
        queue = context.Queue()
        child = context.Process(target=cpu_step, args=(name, model, batch_size, queue))
        child.start()
        rates, seconds, grown = queue.get()
        child.join()
        method = described(name, model)
        weights = cost.count_weights(method)
        step = traced(method, batch_size, on_gpu=False)
        predicted = cost.step_seconds(
            step,
            cost.Rates(rates.matmul_flops, rates.bandwidth, 0.0),
            update_bytes=cost.update_traffic(weights, "adamw"),
        )
        label = f"{name} {model} on this CPU, batch {batch_size}"
        reached = step.total_flops * batch_size / seconds / rates.matmul_flops
        rows.append(row(label, predicted, seconds, "s", utilisation=round(reached, 3)))
        growth = step.peak_bytes + cost.optimizer_bytes("adamw") * weights.trained
        rows.append(row(label, growth, grown, "bytes"))
    return rows


def main() -> None:
    """Compare, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--no-cpu", action="store_true", help="leave out what is timed here")
    options = parser.parse_args()
    runs = measured_steps()
    share, start = cost.calibrate(runs)
    print(f"all runs: TRAFFIC_SHARE {share}, SECONDS_PER_OPERATION {start}")
    steps, memory = gpu_steps(runs), gpu_memory()
    results = {
        "question": "How far forecasts of `fdkit plan` are from measured runs.",
        "environment": environment(torch.device("cpu")),
        "fitted": {"traffic_share": share, "seconds_per_operation": start},
        "gpu_steps_left_out_of_the_fit": steps,
        "gpu_never_fitted": memory,
        "cpu": [] if options.no_cpu else cpu_rows(),
    }
    held_out = [one["error_percent"] for one in [*steps, *memory] if one["unit"] == "s"]
    results["largest_step_error_percent"] = max(abs(error) for error in held_out)
    results["largest_memory_error_percent"] = max(
        abs(one["error_percent"]) for one in memory if one["unit"] == "bytes"
    )
    if options.output:
        options.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
