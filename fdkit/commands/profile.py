"""`fdkit profile distill --teacher clip_vitl --data PATH`: where the time of a training step goes."""

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, create_model
from rich.console import Console
from rich.table import Table

from fdkit.commands._blueprint import COMMANDS, blueprint
from fdkit.commands._command import refuse_existing, write_result
from fdkit.commands._dry_run import device_rates, refuse_run_folder_flags
from fdkit.commands._forecast import size_text
from fdkit.commands._outcome import Outcome
from fdkit.config import Config
from fdkit.training import cost
from fdkit.training.distributed import current_world, local_device, process_group
from fdkit.training.plan import choose_precision
from fdkit.training.profiling import Profile, advise, profile_steps, short_training
from fdkit.training.trace import Trace, trace_step

__all__ = ["COMMANDS", "ProfileOptions", "config_class", "run"]

BAR_WIDTH = 30


class ProfileOptions(Config):
    """Times a few real steps of a training, part by part; no run folder is made or touched.

    Takes every option of the command that it is about. Example:
    fdkit profile distill --teacher clip_vitl --data photos/ --steps 20
    """

    warmup_steps: int = Field(3, ge=0)
    """Steps before the timed ones: what is compiled or chosen at the first steps is no part of the others."""
    steps: int = Field(10, ge=1)
    """Steps that are timed."""
    trace: Path | None = None
    """File for PyTorch's own profile of the timed steps, which Chrome's chrome://tracing and Perfetto show; it makes
    the steps slower."""
    result: Path | None = None
    """File for the numbers, as JSON."""


def config_class(of: type[Config]) -> type[Config]:
    """The configuration of another command, with these options."""
    return create_model(
        f"Profile{of.__name__}", __base__=(ProfileOptions, of), __doc__=ProfileOptions.__doc__
    )


def run(command: str, config: Any) -> Outcome:
    """Time the steps, and say what to change first."""
    refuse_run_folder_flags(config, "profile")
    files = [path for path in (config.trace, config.result) if path is not None]
    refuse_existing(files, overwrite=False)
    for path in files:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
    device = local_device(config.device)
    with process_group(device):
        method, source = import_module(f"fdkit.commands.{command}").prepared(config)
        trace = _trace(command, config, device, num_classes=len(source.classes))
        with short_training(
            method,
            source,
            train=config.train,
            optim=config.optim,
            seed=config.seed,
            device=device,
        ) as trainer:
            precision = trainer.plan.precision
            profile = profile_steps(
                trainer,
                config.loader,
                num_warmup=config.warmup_steps,
                num_steps=config.steps,
                trace=config.trace,
            )
        numbers = _numbers(profile, trace, config, device, precision)
    if config.result is not None and current_world().is_main:
        write_result(config.result, numbers)
    return Outcome(numbers, lambda: show(numbers))


def _trace(command: str, config: Any, device: torch.device, *, num_classes: int) -> Trace:
    """Of one forward pass of this process."""
    share = config.train.batch_size // current_world().size
    size = share if config.train.cached_batch else share // config.train.accumulate
    return trace_step(
        blueprint(command, config, num_classes=num_classes),
        batch_size=max(1, size),
        precision=choose_precision(config.train.precision, device),
        on_gpu=device.type == "cuda",
    )


def _numbers(
    profile: Profile, trace: Trace, config: Any, device: torch.device, precision: Any
) -> dict[str, Any]:
    mean = profile.mean()
    peak, peak_source, rates = device_rates(device, precision)
    per_process = profile.batch_size / current_world().size
    cache = getattr(config, "teacher_cache", None)
    is_cached = cache is not None and cache.folder is not None
    flops = trace.total_flops - (trace.flops["teacher"] if is_cached else 0.0)
    reached = flops * per_process / profile.step_seconds / peak
    advice = advise(
        mean,
        utilisation=reached,
        launch_bound=device.type == "cuda" and cost.is_launch_bound(trace, rates),
        is_compiled=config.train.compile,
        is_cached=is_cached,
        teacher_is_bf16=getattr(config, "teacher_precision", "bf16") == "bf16",
        on_gpu=device.type == "cuda",
    )
    numbers = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "precision": precision,
        "processes": current_world().size,
        "batch_size": profile.batch_size,
        "steps": len(profile.steps),
        "step_seconds": profile.step_seconds,
        "images_per_second": profile.images_per_second,
        "parts_seconds": mean,
        "utilisation": reached,
        "peak_flops": peak,
        "peak_source": peak_source,
        "flops_per_image": flops,
        "peak_bytes": profile.peak_bytes,
        "advice": advice.text,
        "gain_at_most": advice.gain,
    }
    if profile.exchange_seconds is not None:
        numbers["exchange_alone_seconds"] = profile.exchange_seconds
    if config.trace is not None:
        numbers["trace"] = str(config.trace)
    return numbers


def show(numbers: dict[str, Any]) -> None:
    """The parts of a step as bars, and what follows, on standard output."""
    console = Console(markup=False, highlight=False)
    parts: dict[str, float] = numbers["parts_seconds"]
    total, largest = sum(parts.values()), max(parts.values())
    title = (
        f"a step of {numbers['batch_size']} images: {1000 * numbers['step_seconds']:,.1f} ms, "
        f"{numbers['images_per_second']:,.1f} images/s on {numbers['device']} ({numbers['precision']})"
    )
    console.print(title, soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    table.add_column("part")
    table.add_column("ms", justify="right")
    table.add_column("share", justify="right")
    table.add_column("")
    for name, seconds in parts.items():
        bar = "█" * round(BAR_WIDTH * seconds / largest) or "▏"
        table.add_row(name, f"{1000 * seconds:,.1f}", f"{100 * seconds / total:.1f} %", bar)
    console.print(table)
    console.print(
        f"{100 * numbers['utilisation']:.0f} % of {numbers['peak_flops'] / 1e12:,.3g} TFLOP/s "
        f"({numbers['peak_source']}); memory {size_text(numbers['peak_bytes'])} at most",
        soft_wrap=True,
    )
    if "exchange_alone_seconds" in numbers:
        console.print(
            f"backward holds the exchange of gradients, which alone takes "
            f"{1000 * numbers['exchange_alone_seconds']:,.1f} ms",
            soft_wrap=True,
        )
    gain = numbers["gain_at_most"]
    console.print(
        f"to change: {numbers['advice']}" + (f" (at most {gain:.2f} times as fast)" if gain > 1 else ""),
        soft_wrap=True,
    )
    if "trace" in numbers:
        console.print(f"saved {numbers['trace']}", soft_wrap=True)
