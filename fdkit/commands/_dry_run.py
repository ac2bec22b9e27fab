"""`--dry-run`: what a training will take on this machine, and two real steps of it; no run folder is touched."""

from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console

from fdkit.commands import _forecast
from fdkit.commands._outcome import Outcome
from fdkit.data.loader import readers_of
from fdkit.data.sources import ImageSource
from fdkit.errors import ConfigError
from fdkit.methods._method import Method
from fdkit.training import cost
from fdkit.training.distributed import current_world, local_device, process_group
from fdkit.training.hardware import measure_device, reported_gpu
from fdkit.training.plan import choose_precision
from fdkit.training.profiling import Profile, profile_steps, short_training
from fdkit.training.progress import duration

NUM_STEPS = 2


def refuse_run_folder_flags(config: Any, what: str) -> None:
    """Raises ConfigError for flags about a run folder that is there, which is not touched."""
    for name in ("resume", "overwrite"):
        if getattr(config, name):
            raise ConfigError(
                f"{name} has no effect with {what}, which touches no run folder", "leave it out"
            )


def refuse_dry_run(config: Any) -> None:
    """Raises ConfigError for a call that gives back a run folder, of which a dry run has none."""
    if config.dry_run:
        raise ConfigError("dry_run makes no run folder to give back", "use the command line: --dry-run")


def device_rates(device: torch.device, precision: str) -> tuple[float, str, cost.Rates]:
    """Peak operations a second of a device, where that number comes from, and what steps are expected to reach.

    Of a CPU, and of a GPU whose data sheet is not known, the peak is what large matrix products reach here and now.
    """
    if device.type == "cuda":
        gpu = reported_gpu(torch.cuda.get_device_name(device))
        if gpu is not None:
            return gpu.peak(precision), gpu.source, cost.gpu_rates(gpu, precision)
        measured = measure_device(device, precision, size=8192)
        rates = cost.Rates(
            measured.matmul_flops,
            cost.TRAFFIC_SHARE * measured.bandwidth,
            cost.SECONDS_PER_OPERATION,
        )
        return measured.matmul_flops, "matrix products measured here", rates
    measured = measure_device(device, precision, size=1024)
    return (
        measured.matmul_flops,
        "matrix products measured here",
        cost.Rates(measured.matmul_flops, measured.bandwidth, 0.0),
    )


def dry_run(command: str, config: Any, prepared: Callable[[], tuple[Method, ImageSource]]) -> Outcome:
    """Forecast the run on this device, then do two of its steps; what they change is thrown away.

    prepared: makes the method at its first step, and its images.
    """
    refuse_run_folder_flags(config, "dry_run")
    device = local_device(config.device)
    with process_group(device):
        method, source = prepared()
        precision = choose_precision(config.train.precision, device)
        numbers = _forecast_here(command, config, method, source, device, precision)
        with short_training(
            method, source, train=config.train, optim=config.optim, seed=config.seed, device=device
        ) as trainer:
            steps = min(NUM_STEPS, trainer.plan.num_steps)
            profile = profile_steps(trainer, config.loader, num_warmup=0, num_steps=steps)
    numbers["measured"] = _measured(profile)
    return Outcome(numbers, lambda: _show(numbers, config))


def _forecast_here(
    command: str, config: Any, method: Method, source: ImageSource, device: torch.device, precision: Any
) -> dict[str, Any]:
    """The same numbers as of `fdkit plan`, for the device at hand."""
    world = current_world()
    readers = readers_of(config.loader)
    reading = _forecast.Reading(_forecast.READ_SECONDS, "assumed; see the steps below")
    subject = _forecast.Subject(command, config, method, len(source), reading)
    traces = _forecast.trace(
        subject, num_processes=world.size, precision=precision, on_gpu=device.type == "cuda"
    )
    weights = cost.count_weights(method)
    memory = cost.footprint(weights, config.optim.name, traces.step, traces.large)
    peak, peak_source, rates = device_rates(device, precision)
    parts = 1 if config.train.cached_batch else config.train.accumulate
    update = cost.update_traffic(weights, config.optim.name) / parts
    seconds = cost.step_seconds(traces.step, rates, update_bytes=update)
    rate = world.size * traces.step.batch_size / seconds
    numbers = _forecast.general(subject, traces.step, weights, precision)
    seen = numbers["steps"] * numbers["batch_size"]
    return numbers | {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "workers": readers.workers,
        "memory": _forecast.memory_numbers(memory, traces),
        "peak_flops": peak,
        "peak_source": peak_source,
        "expected_images_per_second": rate,
        "expected_hours": cost.Run(seen, rate, world.size).hours,
    }


def _measured(profile: Profile) -> dict[str, Any]:
    """Of the last step, which the first one warmed up."""
    last = profile.steps[-1]
    seconds = sum(last.values())
    return {
        "steps": len(profile.steps),
        "images_per_second": profile.batch_size / seconds,
        "first_step_seconds": sum(profile.steps[0].values()),
        "data_wait_ratio": last.get("data wait", 0.0) / seconds,
        "peak_bytes": profile.peak_bytes,
        "losses": profile.losses,
    }


def _how_sure(device: str) -> str:
    """A small network on a CPU spends most of its time elsewhere than in what the forecast counts."""
    return "at best" if device == "cpu" else "expected"


def _show(numbers: dict[str, Any], config: Any) -> None:
    console = Console(markup=False, highlight=False)
    measured = numbers["measured"]
    console.print(_forecast.heading(numbers), soft_wrap=True)
    console.print(_forecast.parts_table(numbers))
    lines = [
        f"on {numbers['device']}: {numbers['expected_images_per_second']:,.1f} images/s and "
        f"{duration(3600 * numbers['expected_hours'])} {_how_sure(numbers['device'])}, without waiting for images "
        f"({numbers['peak_flops'] / 1e12:,.3g} TFLOP/s: {numbers['peak_source']})",
        *_forecast.sizes(numbers),
        f"did {measured['steps']} steps, the last at {measured['images_per_second']:,.1f} images/s, "
        f"{100 * measured['data_wait_ratio']:.0f} % of it waiting for images with {numbers['workers']} workers; "
        f"memory {_forecast.size_text(measured['peak_bytes'])} at most; "
        f"losses {', '.join(f'{loss:.4g}' for loss in measured['losses'])}",
        "nothing was written; without --dry-run this would train"
        + (f" in {config.output}" if config.output else ""),
    ]
    for line in lines:
        console.print(f"  {line}", soft_wrap=True)
