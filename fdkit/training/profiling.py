"""A few real steps of a training, timed part by part: where the time goes, with nothing written and nothing kept.

What is timed is what the loop runs, its own Trainer; a run that is not profiled has nothing of this in it. The parts
are stretches of one time line, so they add up to the whole.
"""

import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fdkit.data.loader import BadImages, LoaderConfig
from fdkit.data.sources import ImageSource
from fdkit.errors import ConfigError
from fdkit.methods._method import Method
from fdkit.training.distributed import current_world, process_group
from fdkit.training.failures import explained_failures
from fdkit.training.generators import undisturbed_generators
from fdkit.training.loop import TrainConfig, Trainer
from fdkit.training.optimizer import OptimizerConfig
from fdkit.training.parts import watched
from fdkit.training.plan import make_plan
from fdkit.training.run import Run

LABELS = (
    "data wait", "copy", "teacher", "momentum", "student", "heads", "loss", "backward", "optimizer", "after step",
    "other",
)  # fmt: skip
"""What the time of a step goes to, in its order. "loss" is what is left of the forward pass; "backward" has the
exchange of gradients in it, "optimizer" the clipping; "other" is the loop itself."""


class Stopwatch:
    """A time line of which each stretch has a label: by events of a GPU's stream, or the clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.label = "other"
        self._stamps: list[tuple[str, Any]] = []

    def switch(self, label: str) -> str:
        """From now on, time is this label's; the one before."""
        if label not in LABELS:
            raise ValueError(f"no label {label}")
        self._stamps.append((label, self._now()))
        before, self.label = self.label, label
        return before

    @contextmanager
    def during(self, label: str) -> Iterator[None]:
        """The time of a block is this label's."""
        before = self.switch(label)
        try:
            yield
        finally:
            self.switch(before)

    def around(self, label: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, its time this label's."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with self.during(label):
                return function(*args, **kwargs)

        return run

    def start(self) -> None:
        """Forget what was, and begin."""
        self._stamps = []
        self.switch(self.label)

    def seconds(self) -> dict[str, float]:
        """Seconds of each label since the start, until now; they add up to the time between."""
        self._stamps.append(("other", self._now()))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        spent: dict[str, float] = defaultdict(float)
        for (label, begin), (_, end) in zip(self._stamps, self._stamps[1:], strict=False):
            spent[label] += self._between(begin, end)
        return dict(spent)

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _between(self, begin: Any, end: Any) -> float:
        return end - begin if isinstance(end, float) else float(begin.elapsed_time(end)) / 1000


class Profile(NamedTuple):
    """What steps took."""

    steps: list[dict[str, float]]
    """Of each step: seconds of each label."""
    wall_seconds: float
    """Of all these steps together, by the clock."""
    batch_size: int
    """Images a step, of all processes."""
    peak_bytes: int
    """On a GPU, of tensors; on a CPU, of the whole process since it started."""
    losses: list[float]
    exchange_seconds: float | None
    """Of the trained weights' gradients alone, with nothing to hide behind; None for one process."""

    def mean(self) -> dict[str, float]:
        """Mean seconds a step of each label, those without any left out."""
        labels = [label for label in LABELS if any(step.get(label) for step in self.steps)]
        return {label: sum(step.get(label, 0.0) for step in self.steps) / len(self.steps) for label in labels}

    @property
    def step_seconds(self) -> float:
        """Mean, by the clock."""
        return self.wall_seconds / len(self.steps)

    @property
    def images_per_second(self) -> float:
        """Of all processes."""
        return self.batch_size / self.step_seconds


@contextmanager
def short_training(
    method: Method,
    source: ImageSource,
    *,
    train: TrainConfig,
    optim: OptimizerConfig,
    seed: int,
    device: torch.device,
) -> Iterator[Trainer]:
    """A training at its first step, as `train` would begin it, without a run folder."""
    plan = make_plan(source, train=train, optim=optim, world=current_world(), device=device)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="fdkit-")))
        world = stack.enter_context(process_group(device, train.timeout_seconds))
        stack.enter_context(explained_failures(train, plan, device))
        stack.enter_context(undisturbed_generators(device))
        run = Run(folder, "", resumed=False, writes=False)
        trainer = Trainer(
            method, source, run, plan=plan, train=train, optim=optim, seed=seed, world=world, device=device
        )
        trainer.restore()
        yield trainer


def profile_steps(
    trainer: Trainer, loader: LoaderConfig, *, num_warmup: int, num_steps: int, trace: Path | None = None
) -> Profile:
    """Do real steps, the first ones untimed. trace: a file for PyTorch's own profile of the timed ones, for Chrome.

    Raises ConfigError if the run has fewer steps; what a step raises.
    """
    if trainer.plan.num_steps < num_warmup + num_steps:
        raise ConfigError(
            f"{num_warmup} + {num_steps} steps are asked for and the run has {trainer.plan.num_steps}",
            "use fewer, or a longer run",
        )
    device, watch = trainer.device, Stopwatch(trainer.device)
    bad_images = BadImages(trainer.source, loader.max_bad_ratio)
    steps: list[dict[str, float]] = []
    losses: list[Tensor] = []
    with ExitStack() as stack:
        stack.enter_context(_timed(trainer, watch, losses))
        batches = trainer.batches(loader, bad_images)
        for _ in range(num_warmup):
            trainer.update(next(batches))
        _synchronise(device)
        losses.clear()
        if trace is not None:
            profiler = stack.enter_context(torch.profiler.profile())
        begin = time.perf_counter()
        for _ in range(num_steps):
            watch.start()
            with watch.during("data wait"), undisturbed_generators(device):
                batch = next(batches)
            trainer.update(batch)
            steps.append(watch.seconds())
        wall = time.perf_counter() - begin
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
    read = [float(loss) for loss in losses]
    return Profile(steps, wall, trainer.plan.batch_size, peak_bytes(device), read, _exchange(trainer))


@contextmanager
def _timed(trainer: Trainer, watch: Stopwatch, losses: list[Tensor]) -> Iterator[None]:
    """Have the parts of a trainer's steps switch the stopwatch."""
    before: list[str] = []
    places: list[tuple[Any, str, str]] = [
        (trainer, "views", "copy"),
        (trainer, "backward", "backward"),
        (trainer, "clip", "optimizer"),
        (trainer.method, "forward", "loss"),
        (trainer.method, "before_step", "after step"),
        (trainer.method, "after_step", "after step"),
        (trainer.optimizer, "step", "optimizer"),
    ]
    with ExitStack() as stack:
        stack.enter_context(
            watched(
                trainer.method,
                lambda part: before.append(watch.switch(part)),
                lambda part: _back(watch, before.pop()),
            )
        )
        for owner, name, label in places:
            stack.enter_context(_replaced(owner, name, watch.around(label, getattr(owner, name))))
        own = trainer.window.add
        stack.enter_context(_replaced(trainer.window, "add", _noting(own, losses)))
        yield


def _back(watch: Stopwatch, label: str) -> None:
    watch.switch(label)


def _noting(function: Callable[..., Any], losses: list[Tensor]) -> Callable[..., Any]:
    """The window's own `add`, with the loss of each step kept, which is read at the end."""

    def add(metrics: dict[str, Tensor], *args: Any) -> None:
        function(metrics, *args)
        losses.append(metrics["loss"].detach().clone())

    return add


@contextmanager
def _replaced(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """A method of one object alone, for a while."""
    before = owner.__dict__.get(name)
    owner.__dict__[name] = function
    try:
        yield
    finally:
        if before is None:
            del owner.__dict__[name]
        else:
            owner.__dict__[name] = before


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(device: torch.device) -> int:
    """Most memory so far: of tensors on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * unit


def _exchange(trainer: Trainer, repeats: int = 3) -> float | None:
    """Seconds to average the gradients over the processes, alone."""
    if trainer.world.size == 1:
        return None
    numbers = sum(parameter.numel() for parameter in trainer.parameters)
    gradient = torch.zeros(numbers, device=trainer.device)
    seconds = []
    for _ in range(repeats):
        _synchronise(trainer.device)
        start = time.perf_counter()
        dist.all_reduce(gradient)
        _synchronise(trainer.device)
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[repeats // 2]


class Advice(NamedTuple):
    """The one thing to change."""

    text: str
    gain: float
    """How many times faster at most; 1 if there is nothing."""


def advise(
    mean: dict[str, float],
    *,
    utilisation: float,
    launch_bound: bool,
    is_compiled: bool,
    is_cached: bool,
    teacher_is_bf16: bool,
    on_gpu: bool,
) -> Advice:
    """What to change first, and what it can gain at most, from the mean seconds of each label.

    utilisation: share of the device's rate of matrix products that the step reaches; launch_bound: whether starting
    operations takes longer than doing them.
    """
    total = sum(mean.values())
    waits, teacher = mean.get("data wait", 0.0) / total, mean.get("teacher", 0.0) / total
    if waits > WAIT_WORTH_CHANGING:
        return Advice(
            f"{100 * waits:.0f} % of the time is waiting for images: more --loader.workers, or `fdkit pack`",
            1 / (1 - waits),
        )
    if launch_bound and not is_compiled:
        rest = 1 - sum(mean.get(label, 0.0) for label in COMPILED) / total
        return Advice("the GPU waits for the host to start operations: --train.compile", 1 / max(rest, 0.1))
    if teacher > TEACHER_WORTH_CHANGING and not is_cached:
        if on_gpu and not teacher_is_bf16:
            return Advice(
                f"the teacher takes {100 * teacher:.0f} % of the time: --teacher-precision bf16 halves its bytes; "
                "--teacher-cache auto leaves it out where the same crops come again",
                1 / (1 - teacher),
            )
        return Advice(
            f"the teacher takes {100 * teacher:.0f} % of the time: --teacher-cache auto leaves it out where the same "
            "crops come again",
            1 / (1 - teacher),
        )
    if on_gpu and utilisation < LOW_UTILISATION and not is_compiled:
        return Advice(
            f"the GPU reaches {100 * utilisation:.0f} % of its peak, so memory holds it up: --train.compile, or a "
            "larger batch",
            min(2.0, LOW_UTILISATION / max(utilisation, 1e-3)),
        )
    return Advice("near the limit: no one change of these settings gains much", 1.0)


WAIT_WORTH_CHANGING, TEACHER_WORTH_CHANGING, LOW_UTILISATION = 0.05, 0.35, 0.35
COMPILED: Sequence[str] = ("teacher", "momentum", "student", "backward")
