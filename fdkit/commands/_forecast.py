"""What a training will take, as far as arithmetic can tell: operations, images a second, memory, hours and disk."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from fdkit.errors import ConfigError, FdkitError
from fdkit.methods._method import Duration, Method
from fdkit.teachers.cache_cost import break_even_read_rate, cache_bytes, speed_up_bound, views_filled
from fdkit.training import cost
from fdkit.training.hardware import Gpu
from fdkit.training.parts import PARTS
from fdkit.training.plan import TrainConfig
from fdkit.training.progress import duration
from fdkit.training.trace import Trace, trace_step

GB = 1e9
LARGE_BATCH = 256
"""Images at which activations, rather than gradients, decide what memory a step needs."""
READ_SECONDS = 1 / 302
"""A core's, for an image of about 500 x 375 pixels and one crop: benchmarks/results/data_path.json, with Pillow."""
MIN_CACHE_GAIN = 1.15


class Reading(NamedTuple):
    """What one image costs one worker."""

    seconds: float
    source: str


class Subject(NamedTuple):
    """What is forecast."""

    command: str
    config: Any
    method: Method
    num_images: int
    reading: Reading


class Traces(NamedTuple):
    """Of one process's batch, of a larger one, and of its own with activation checkpointing where that is offered."""

    step: Trace
    large: Trace
    checkpointed: Trace | None


def micro_batch(train: TrainConfig, num_processes: int) -> int:
    """Images in one forward pass. Raises ConfigError if the batch does not divide."""
    parts = num_processes * train.accumulate
    if train.batch_size % parts:
        raise ConfigError(
            f"train.batch_size {train.batch_size} does not divide by {num_processes} processes "
            f"x train.accumulate {train.accumulate}",
            f"use --train.batch-size {max(1, round(train.batch_size / parts)) * parts}, or another --gpus",
        )
    return train.batch_size // (num_processes if train.cached_batch else parts)


def larger_batch(size: int) -> int:
    """A multiple of a batch, at least four times as large, whose memory grows with its images alone."""
    return size * max(4, math.ceil(LARGE_BATCH / size))


def trace(subject: Subject, *, num_processes: int, precision: Any, on_gpu: bool) -> Traces:
    """The step of one process."""
    train: TrainConfig = subject.config.train
    size = micro_batch(train, num_processes)
    per_epoch = max(1, subject.num_images // train.batch_size)
    steps = max(1, round(train.epochs * per_epoch))
    duration = Duration(num_steps=steps, steps_per_epoch=per_epoch, world_size=num_processes)
    parts = train.accumulate if train.cached_batch else 1

    def traced(size: int, *, checkpoint_every: int) -> Trace:
        return trace_step(
            subject.method,
            batch_size=size,
            precision=precision,
            on_gpu=on_gpu,
            duration=duration,
            checkpoint_every=checkpoint_every,
            cached_parts=parts,
        )

    own = train.checkpoint_every if train.activation_checkpointing else 0
    checkpointed = None
    if not own and on_gpu:
        try:
            checkpointed = traced(size, checkpoint_every=1)
        except FdkitError:
            checkpointed = None  # the network does not offer it
    return Traces(traced(size, checkpoint_every=own), _trace_larger(traced, size, own), checkpointed)


def _trace_larger(traced: Callable[..., Trace], size: int, checkpoint_every: int) -> Trace:
    """The step with a batch several times as large, of a size that the method takes; queues take few."""
    wanted = larger_batch(size) // size
    for times in range(wanted, 2 * wanted):
        try:
            return traced(times * size, checkpoint_every=checkpoint_every)
        except ConfigError:
            continue
    return traced(larger_batch(size), checkpoint_every=checkpoint_every)


def forecast(
    subject: Subject, gpus: Sequence[Gpu], *, num_gpus: int, cores: int | None, price: float | None
) -> dict[str, Any]:
    """Plain numbers about the run on each kind of GPU; price: of a GPU and hour."""
    config = subject.config
    if config.train.parallel == "fsdp" and num_gpus == 1:
        raise ConfigError("train.parallel fsdp has no effect with one process", "plan for several: --gpus 8")
    precision = "fp32" if config.train.precision == "fp32" else "bf16"
    traces = trace(subject, num_processes=num_gpus, precision=precision, on_gpu=True)
    weights = cost.count_weights(subject.method)
    memory = cost.footprint(weights, config.optim.name, traces.step, traces.large)
    numbers = general(subject, traces.step, weights, precision)
    devices = [
        _on_gpu(subject, traces, weights, memory, gpu, precision, num_gpus, cores, price) for gpu in gpus
    ]
    numbers |= {"gpus": num_gpus, "devices": devices, "memory": memory_numbers(memory, traces)}
    numbers["advice"] = list(_advice(subject, traces, numbers, gpus, num_gpus, cores))
    return numbers


def general(subject: Subject, step: Trace, weights: cost.Weights, precision: str) -> dict[str, Any]:
    """What does not depend on the device."""
    train = subject.config.train
    steps_per_epoch = max(1, subject.num_images // train.batch_size)
    num_steps = max(1, round(train.epochs * steps_per_epoch))
    optimizer = subject.config.optim.name
    disk = cost.disk_bytes(weights, optimizer, keep_checkpoints=train.keep_checkpoints)
    cache = _cache(subject)
    return {
        "command": subject.command,
        "precision": precision,
        "images": subject.num_images,
        "epochs": train.epochs,
        "steps": num_steps,
        "batch_size": train.batch_size,
        "images_a_step_a_process": step.batch_size,
        "parameters": {
            "trained": weights.trained,
            "student": weights.student,
            "momentum": weights.momentum,
            "heads": weights.held - weights.student - weights.momentum,
            "teacher": weights.teacher,
        },
        "flops_per_image": {name: value for name, value in step.flops.items() if value}
        | {"total": step.total_flops},
        "disk_bytes": {"run_folder": disk} | ({} if cache is None else {"teacher_cache": cache}),
        "read_seconds_per_image": subject.reading.seconds,
        "read_source": subject.reading.source,
    }


def memory_numbers(memory: cost.Footprint, traces: Traces) -> dict[str, Any]:
    """Bytes of a process."""
    numbers = {"weights_and_optimizer": memory.state, "fixed": memory.fixed, "per_image": memory.per_image}
    numbers["at_batch"] = memory.at(traces.step.batch_size)
    if traces.checkpointed is not None:
        numbers["per_image_checkpointed"] = _checkpointed(memory, traces).per_image
    return numbers


def _checkpointed(memory: cost.Footprint, traces: Traces) -> cost.Footprint:
    """The footprint with activation checkpointing; what does not hang on the batch stays."""
    assert traces.checkpointed is not None
    own = traces.checkpointed
    return memory._replace(per_image=max(0.0, own.peak_bytes - memory.fixed) / own.batch_size)


def _on_gpu(
    subject: Subject,
    traces: Traces,
    weights: cost.Weights,
    memory: cost.Footprint,
    gpu: Gpu,
    precision: str,
    num_gpus: int,
    cores: int | None,
    price: float | None,
) -> dict[str, Any]:
    config, step = subject.config, traces.step
    is_sliced = cost.is_sliced(weights, gpu.memory_bytes, num_gpus, config.train.parallel)
    if is_sliced:
        memory = cost.sliced(memory, weights, num_gpus)
    parts = 1 if config.train.cached_batch else config.train.accumulate
    update = cost.update_traffic(weights, config.optim.name) / parts
    seconds = cost.step_seconds(step, cost.gpu_rates(gpu, precision), update_bytes=update)
    computed = num_gpus * step.batch_size / seconds
    readable = math.inf if cores is None else cores / subject.reading.seconds
    rate = min(computed, readable)
    images = (
        config.train.epochs * max(1, subject.num_images // config.train.batch_size) * config.train.batch_size
    )
    run = cost.Run(images, rate, num_gpus)
    numbers = {
        "gpu": gpu.name,
        "peak_source": gpu.source,
        "floor_images_per_second": num_gpus * cost.floor_rate(step, gpu.peak(precision)),
        "images_per_second": rate,
        "utilisation": cost.utilisation(step, step.batch_size * num_gpus / rate, gpu.peak(precision)),
        "is_bound_by": "reading" if readable < computed else _bound(step, gpu, precision),
        "workers": math.ceil(computed / num_gpus * subject.reading.seconds),
        "hours": run.hours,
        "gpu_hours": run.gpu_hours,
        "is_sliced": is_sliced,
        "bytes_at_batch": memory.at(step.batch_size),
        "fits": memory.fits(step.batch_size, gpu.memory_bytes),
        "largest_batch": memory.largest_batch(gpu.memory_bytes),
    }
    if traces.checkpointed is not None:
        numbers["largest_batch_checkpointed"] = _checkpointed(memory, traces).largest_batch(gpu.memory_bytes)
    return numbers if price is None else numbers | {"price": price * run.gpu_hours}


def _bound(step: Trace, gpu: Gpu, precision: str) -> str:
    return (
        "starting operations" if cost.is_launch_bound(step, cost.gpu_rates(gpu, precision)) else "computing"
    )


def _cache(subject: Subject) -> int | None:
    """Bytes of the teacher caches that the configuration asks for."""
    options = getattr(subject.config, "teacher_cache", None)
    if options is None or options.folder is None:
        return None
    return _cache_of(subject, options.views, options.dtype, options.pca)


def _cache_of(subject: Subject, views: int, dtype: Any, pca: int | None) -> int:
    """Bytes of a cache of every teacher's whole token map; pooled targets and logits take less."""
    method: Any = subject.method
    filled = views_filled(subject.config.train.epochs, views)
    total = 0
    for teacher in method.teachers:
        is_map = subject.config.distillation.target == "feature_map"
        grid = teacher.image_size // teacher.patch_size
        tokens = grid**2 + teacher.num_prefix_tokens if is_map else 1
        total += cache_bytes(subject.num_images, filled, tokens, teacher.embed_dim, dtype, pca)
    return total


def _advice(
    subject: Subject,
    traces: Traces,
    numbers: dict[str, Any],
    gpus: Sequence[Gpu],
    num_gpus: int,
    cores: int | None,
) -> Iterator[str]:
    """A line for each thing worth changing, with its flag."""
    train, size = subject.config.train, traces.step.batch_size
    for gpu, device in zip(gpus, numbers["devices"], strict=True):
        if not device["fits"]:
            yield f"{gpu.name}: {size} images at once do not fit: {_remedy(subject, traces, device, num_gpus)}"
        if device["is_sliced"] and train.parallel == "auto":
            yield (
                f"{gpu.name}: training state would take more than a quarter of its memory, so --train.parallel auto "
                "holds slices of it on each (fsdp)"
            )
        needed = device["workers"] * num_gpus
        if cores is not None and device["is_bound_by"] == "reading":
            yield (
                f"{gpu.name}: reading needs {needed} cores and there are {cores}: `fdkit pack` makes images cheaper "
                "to read"
            )
        if device["is_bound_by"] == "starting operations" and not train.compile:
            yield f"{gpu.name}: the GPU waits for the host to start operations: --train.compile, or a larger batch"
    if subject.command == "distill" and subject.config.teacher_cache.folder is None:
        yield from _cache_advice(subject, traces, numbers)
    if train.compile:
        yield "train.compile makes steps faster than forecast, by what is not forecast: `fdkit profile` measures it"


def _remedy(subject: Subject, traces: Traces, device: dict[str, Any], num_gpus: int) -> str:
    """How to make a batch fit."""
    train = subject.config.train
    with_checkpointing = device.get("largest_batch_checkpointed", 0)
    size = traces.step.batch_size
    if with_checkpointing >= size:
        return "--train.activation-checkpointing (a third more time)"
    own = device["largest_batch"]
    best = own if own and subject.method.compares_images else max(own, with_checkpointing)
    parts = _parts(train.batch_size, num_gpus, best)
    if parts is None:
        more = (
            ""
            if device["is_sliced"]
            else ", each of which then holds a slice of both (--train.parallel fsdp)"
        )
        return f"not one image fits beside weights and optimiser: take more GPUs{more}"
    flags = f"--train.accumulate {parts}"
    if best > own:
        flags += " --train.activation-checkpointing"
    if subject.method.compares_images:
        return (
            f"{flags} --train.cached-batch (the loss still sees the whole batch; networks run forward twice)"
        )
    return f"{flags} (the same update, in parts)"


def _parts(batch_size: int, num_gpus: int, largest: int) -> int | None:
    """The fewest equal parts of a batch that are no larger than what fits."""
    share = batch_size // num_gpus
    return next(
        (parts for parts in range(1, share + 1) if share % parts == 0 and share // parts <= largest), None
    )


def _cache_advice(subject: Subject, traces: Traces, numbers: dict[str, Any]) -> Iterator[str]:
    """Whether keeping the teacher's features is worth its disk."""
    config, step = subject.config, traces.step
    views, dtype, pca = config.teacher_cache.views, config.teacher_cache.dtype, config.teacher_cache.pca
    share = step.flops["teacher"] / step.total_flops
    gain = speed_up_bound(config.train.epochs, views, share)
    if gain < MIN_CACHE_GAIN:
        return
    size = _cache_of(subject, views, dtype, pca)
    crops = subject.num_images * views_filled(config.train.epochs, views)
    slowest = max(numbers["devices"], key=lambda device: device["images_per_second"])
    teacher_seconds = share * numbers["gpus"] / slowest["images_per_second"]
    rate = break_even_read_rate(round(size / crops), teacher_seconds)
    yield (
        f"--teacher-cache auto: the teacher is {100 * share:.0f} % of the operations, so at most {gain:.2f} times as "
        f"fast; {size_text(size)} for {views} crops an image, read at {rate / GB:.1f} GB/s a GPU or more; the crops "
        "come again, which is another recipe"
    )


def show(numbers: dict[str, Any], notes: Sequence[str] = ()) -> None:
    """The forecast for people, on standard output."""
    console = Console(markup=False, highlight=False)
    console.print(heading(numbers), soft_wrap=True)
    console.print(parts_table(numbers))
    console.print(devices_table(numbers))
    for line in [*sizes(numbers), *details(numbers), *notes, *numbers["advice"]]:
        console.print(f"  {line}", soft_wrap=True)


def heading(numbers: dict[str, Any]) -> str:
    """What is forecast, in a line."""
    return (
        f"{numbers['command']}: {numbers['images']:,} images x {numbers['epochs']:g} epochs = {numbers['steps']:,} "
        f"steps of {numbers['batch_size']}, {numbers['precision']}"
    )


def parts_table(numbers: dict[str, Any]) -> Table:
    """A line for every part of a step."""
    parameters, flops = numbers["parameters"], numbers["flops_per_image"]
    table = Table("a step", "parameters", "GFLOP an image")
    for column in table.columns[1:]:
        column.justify = "right"
    for name in (*PARTS, "backward", "total"):
        held = parameters.get(name)
        if name in flops or held:
            table.add_row(name, _millions(held), _gigaflops(flops.get(name, 0.0)))
    return table


def devices_table(numbers: dict[str, Any]) -> Table:
    """A column for every kind of GPU."""
    devices, size = numbers["devices"], numbers["images_a_step_a_process"]
    count = f"{numbers['gpus']} GPUs" if numbers["gpus"] > 1 else "one GPU"
    table = Table(title=f"a run on {count}", title_justify="left")
    table.add_column("")
    for device in devices:
        table.add_column(device["gpu"], justify="right")

    def row(name: str, texts: Iterable[str]) -> None:
        table.add_row(name, *texts)

    row("images/s, at most", (f"{device['floor_images_per_second']:,.0f}" for device in devices))
    row("images/s, expected", (f"{device['images_per_second']:,.0f}" for device in devices))
    row("share of the peak (MFU)", (f"{100 * device['utilisation']:.0f} %" for device in devices))
    row("limited by", (device["is_bound_by"] for device in devices))
    row("time", (duration(3600 * device["hours"]) for device in devices))
    row("GPU-hours", (f"{device['gpu_hours']:,.1f}" for device in devices))
    if "price" in devices[0]:
        row("price", (f"{device['price']:,.2f}" for device in devices))
    table.add_section()
    row(f"{size} images at once", ("fit" if device["fits"] else "do not fit" for device in devices))
    row("images that fit", (f"{device['largest_batch']:,}" for device in devices))
    if all("largest_batch_checkpointed" in device for device in devices):
        row("with checkpointing", (f"{device['largest_batch_checkpointed']:,}" for device in devices))
    row("workers a GPU", (f"{device['workers']:,}" for device in devices))
    return table


def sizes(numbers: dict[str, Any]) -> Iterator[str]:
    """Memory and disk, a line each."""
    memory, disk = numbers["memory"], numbers["disk_bytes"]
    yield (
        f"memory of a process: {size_text(memory['at_batch'])} = {size_text(memory['weights_and_optimizer'])} weights "
        f"and optimiser + {size_text(memory['fixed'])} gradients and casts + {size_text(memory['per_image'])} an image"
    )
    cache = f", teacher cache {size_text(disk['teacher_cache'])}" if "teacher_cache" in disk else ""
    yield f"disk: run folder {size_text(disk['run_folder'])}{cache}"


def details(numbers: dict[str, Any]) -> Iterator[str]:
    """What the tables leave unsaid, a line each."""
    yield (
        f"reading: {1000 * numbers['read_seconds_per_image']:.1f} ms an image on a core ({numbers['read_source']}); "
        "a worker is a core"
    )
    yield (
        f"expected: step times within {cost.MAX_ERROR_PERCENT} % and memory within {cost.MAX_MEMORY_ERROR_PERCENT} % "
        f"in the runs it was tried on ({cost.CALIBRATED_ON}); other devices by their data sheets; what GPUs exchange "
        "is not counted"
    )


def size_text(size: float) -> str:
    """Bytes in three digits: "4.86 GB"."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size:.0f} B"


def _millions(number: int | None) -> str:
    return f"{number / 1e6:,.1f} M" if number else ""


def _gigaflops(number: float) -> str:
    return f"{number / 1e9:,.1f}" if number >= 1e9 else f"{number / 1e9:.2g}"
