"""How long a step takes, what memory it needs and what a run comes to: arithmetic on a trace and a device's rates.

A step's time is that of its matrix products at the rate that large ones reach, plus that of moving the bytes of all
other operations, or, if that is longer, of starting them one by one. Its constants come from measured runs.
"""

import math
from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

from torch import nn

from fdkit.methods._method import Method
from fdkit.training.hardware import Gpu
from fdkit.training.parts import backbones_of, teachers_of
from fdkit.training.trace import Trace

MATMUL_SHARE = 0.65
"""Of a GPU's peak that large bfloat16 matrix products reach: 620 to 660 of the 989 TFLOP/s of an H100 or H200."""
TRAFFIC_SHARE = 0.36
"""Of a GPU's bandwidth that the counted bytes of all other operations move at."""
SECONDS_PER_OPERATION = 36e-6
"""Of the host, to start an operation from Python, with its share of autograd, hooks and the optimiser."""
CALIBRATED_ON = (
    "benchmarks/results/distill_step_gpu.json and pretrain_step_gpu.json, one NVIDIA H200, uncompiled"
)
MAX_ERROR_PERCENT = 21
"""Largest error of a forecast of such a step's time from the other runs: benchmarks/results/plan_error.json."""
MAX_MEMORY_ERROR_PERCENT = 14
"""Largest error of a forecast of memory, against peaks measured on the same GPU: the same file."""
CONTEXT_BYTES = 1.0e9
"""Of a GPU's memory for the driver's context and the libraries' workspaces, an allowance rather than a measurement."""
USABLE_SHARE = 0.95
"""Of the memory: the allocator leaves gaps."""
SLICED_ABOVE = 0.25
"""Share of a GPU's memory in training state above which the loop cuts networks into slices by itself."""
GRADIENT_AND_STATE_BYTES = 16
"""Of a trained number: weight, gradient and two moments in float32."""
ADAM_BYTES, MOMENTUM_BYTES = 8, 4
"""An optimiser's state a trained number: two moments, or one."""
ADAM_TRAFFIC, SGD_TRAFFIC, FOLLOW_TRAFFIC = 28, 20, 12
"""Bytes an update reads and writes a number: weight, gradient and state; and for a copy that follows."""


class Rates(NamedTuple):
    """What a device does in practice."""

    matmul_flops: float
    """Operations a second of large matrix products."""
    bandwidth: float
    """Bytes a second of other operations."""
    seconds_per_operation: float
    """To start one; 0 where this is part of the rest, as on a CPU."""


class Weights(NamedTuple):
    """Numbers that a method holds, and the bytes of what it only reads."""

    trained: int
    held: int
    """Of all that is in its state: trained, frozen and following ones."""
    teacher: int
    """Parameters of teachers."""
    teacher_bytes: int
    student: int
    """Parameters of the student, trained or not."""
    momentum: int
    """Parameters of backbones that follow it."""

    @property
    def following(self) -> int:
        """Parameters that are held and not trained, momentum encoders first of all."""
        return self.held - self.trained


class Footprint(NamedTuple):
    """Memory of a step, in bytes, as a function of the images a process takes at once."""

    state: float
    """Weights, optimiser, teachers."""
    fixed: float
    """Of the step, whatever the batch: weights cast to bfloat16, gradients."""
    per_image: float

    def at(self, batch_size: int) -> float:
        """Bytes that tensors take at the fullest moment of a step."""
        return self.state + self.fixed + self.per_image * batch_size

    def largest_batch(self, memory_bytes: float) -> int:
        """Images a process can take at once on a GPU of this memory; 0 where not one fits."""
        free = USABLE_SHARE * memory_bytes - CONTEXT_BYTES - self.state - self.fixed
        return max(0, math.floor(free / self.per_image)) if self.per_image > 0 else 0

    def fits(self, batch_size: int, memory_bytes: float) -> bool:
        """Whether a batch leaves the allowance for context and gaps."""
        return self.at(batch_size) + CONTEXT_BYTES <= USABLE_SHARE * memory_bytes


def count_weights(method: Method) -> Weights:
    """The numbers a method holds; it may be on any device, also on "meta"."""
    teachers = [teacher.backbone for teacher in teachers_of(method)]
    return Weights(
        trained=_count(method, trained_only=True),
        held=_count(method),
        teacher=sum(_count(backbone) for backbone in teachers),
        teacher_bytes=sum(
            weight.numel() * weight.element_size()
            for backbone in teachers
            for weight in backbone.parameters()
        ),
        student=_count(method.student),
        momentum=sum(_count(backbone) for part, backbone in backbones_of(method) if part == "momentum"),
    )


def _count(module: nn.Module, *, trained_only: bool = False) -> int:
    return sum(w.numel() for w in module.parameters() if w.requires_grad or not trained_only)


def optimizer_bytes(name: str) -> int:
    """Of the optimiser's state, a trained number."""
    return ADAM_BYTES if name in ("adamw", "lamb") else MOMENTUM_BYTES


def state_bytes(weights: Weights, optimizer: str) -> int:
    """Of what is there between two steps: weights, the optimiser's state, teachers."""
    return 4 * weights.held + optimizer_bytes(optimizer) * weights.trained + weights.teacher_bytes


def footprint(weights: Weights, optimizer: str, small: Trace, large: Trace) -> Footprint:
    """The memory of a step from its traces at two batch sizes."""
    per_image = (large.peak_bytes - small.peak_bytes) / (large.batch_size - small.batch_size)
    state = state_bytes(weights, optimizer)
    return Footprint(state, max(0.0, small.peak_bytes - per_image * small.batch_size), per_image)


def is_sliced(weights: Weights, memory_bytes: float, num_gpus: int, wanted: str) -> bool:
    """Whether each process holds slices of the networks, as `train.parallel` wants or, on "auto", the loop decides."""
    is_large = GRADIENT_AND_STATE_BYTES * weights.trained > SLICED_ABOVE * memory_bytes
    return num_gpus > 1 and (wanted == "fsdp" or (wanted == "auto" and is_large))


def sliced(whole: Footprint, weights: Weights, num_gpus: int) -> Footprint:
    """The footprint of a process that holds a slice of weights, gradients and optimiser; teachers stay whole.

    The block that is gathered while it computes is left out.
    """
    share = 1 - 1 / num_gpus
    state = whole.state - share * (whole.state - weights.teacher_bytes)
    return whole._replace(state=state, fixed=max(0.0, whole.fixed - share * 4 * weights.trained))


def update_traffic(weights: Weights, optimizer: str) -> float:
    """Bytes that the optimiser and what follows the student move in an update."""
    of_optimizer = ADAM_TRAFFIC if optimizer_bytes(optimizer) == ADAM_BYTES else SGD_TRAFFIC
    return of_optimizer * weights.trained + FOLLOW_TRAFFIC * weights.following


def gpu_rates(gpu: Gpu, precision: str) -> Rates:
    """What the calibration expects of a GPU; that it holds for another than an H200 is an assumption."""
    return Rates(MATMUL_SHARE * gpu.peak(precision), TRAFFIC_SHARE * gpu.bandwidth, SECONDS_PER_OPERATION)


def step_seconds(trace: Trace, rates: Rates, *, update_bytes: float = 0.0) -> float:
    """Seconds of one process's forward, backward and update of the traced batch, never waiting for images."""
    products = trace.total_flops * trace.batch_size / rates.matmul_flops
    moves = (trace.traffic * trace.batch_size + update_bytes) / rates.bandwidth
    return max(products + moves, trace.num_operations * rates.seconds_per_operation)


def is_launch_bound(trace: Trace, rates: Rates) -> bool:
    """Whether the host starts operations more slowly than the device does them."""
    device = step_seconds(trace, rates._replace(seconds_per_operation=0.0))
    return trace.num_operations * rates.seconds_per_operation > device


def floor_rate(trace: Trace, peak_flops: float) -> float:
    """Images a second that nothing can exceed: every operation at the device's peak."""
    return peak_flops / trace.total_flops


def utilisation(trace: Trace, seconds: float, peak_flops: float) -> float:
    """Model FLOPs utilisation: the share of the peak that a step of so many seconds reaches."""
    return trace.total_flops * trace.batch_size / seconds / peak_flops


class Measured(NamedTuple):
    """A run that was timed, for calibration."""

    name: str
    trace: Trace
    update_bytes: float
    gpu: Gpu
    seconds: float


def calibrate(runs: Sequence[Measured]) -> tuple[float, float]:
    """TRAFFIC_SHARE and SECONDS_PER_OPERATION that fit measured bfloat16 runs best, by squared error of the logarithm.

    Of a grid, so that the answer is the same everywhere: shares in hundredths, whole microseconds. Where no run is
    bound by starting operations, the most that a start can have taken.
    """
    grid = product(range(10, 101), range(80, 4, -1))
    percent, micros = min(grid, key=lambda point: _misfit(runs, point[0] / 100, point[1] / 1e6))
    return percent / 100, micros / 1e6


def _misfit(runs: Sequence[Measured], share: float, seconds_per_operation: float) -> float:
    total = 0.0
    for run in runs:
        rates = Rates(MATMUL_SHARE * run.gpu.bf16_flops, share * run.gpu.bandwidth, seconds_per_operation)
        predicted = step_seconds(run.trace, rates, update_bytes=run.update_bytes)
        total += math.log(predicted / run.seconds) ** 2
    return round(total, 9)


class Run(NamedTuple):
    """A whole run."""

    num_images: float
    """Seen in all, an image of every epoch counted again."""
    images_per_second: float
    """Of all devices together."""
    num_gpus: int

    @property
    def hours(self) -> float:
        """By the clock."""
        return self.num_images / self.images_per_second / 3600

    @property
    def gpu_hours(self) -> float:
        """Of all devices."""
        return self.hours * self.num_gpus


def checkpoint_bytes(weights: Weights, optimizer: str) -> int:
    """Of one checkpoint: everything held, and the optimiser's state."""
    return 4 * weights.held + optimizer_bytes(optimizer) * weights.trained


def disk_bytes(weights: Weights, optimizer: str, *, keep_checkpoints: int) -> int:
    """Of a finished run folder: the checkpoints kept, one while it is written, and the exported student."""
    return (keep_checkpoints + 1) * checkpoint_bytes(weights, optimizer) + 4 * weights.student
