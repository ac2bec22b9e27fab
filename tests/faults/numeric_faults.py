"""Numbers that are not finite, put into real runs of every method, and memory that runs out.

Whatever is put in, no checkpoint and no exported network may hold NaN or infinity, a step that was left out is counted
and its batch kept, and what the run was before goes on to the bits of a run that met nothing.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import safetensors.torch
import torch
from faults.children import End, facts_of, run
from faults.jobs import distill, finetune, pretrain, segment
from faults.kills import left_by_training
from torch import Tensor

Place = Literal[
    "loss", "gradient", "image", "optimiser", "second moment", "momentum copy", "queue", "weights"
]
STEP = 4
"""The step that meets the fault, of 8; checkpoints are written after steps 3 and 6, and at the end."""
QUICK = [
    *("--monitor.every-epochs", "0", "--monitor.collapse-every-epochs", "0", "--train.max-bad-steps", "1"),
    *("--train.epochs", "0.4"),
]  # fmt: skip
COPIES = ("momentum_", "target_", "teacher", "averaged")
"""How the names begin of networks that follow the student."""


class Trainee(NamedTuple):
    """A command that trains, whose runs are compared."""

    name: str
    arguments: Callable[[Path], list[str]]
    """Given the run folder."""


class Fault(NamedTuple):
    """What is put where."""

    place: Place
    value: float
    steps: tuple[int, ...] = (STEP,)

    @property
    def passes(self) -> bool:
        """Whether a run bears it: one step's loss or gradient, or what all of them come from."""
        return self.place in ("loss", "gradient", "image") and len(self.steps) == 1

    def __str__(self) -> str:
        return f"{self.value} in the {self.place} of step {' and '.join(map(str, self.steps))}"


FAULTS = (
    *(Fault(place, np.nan) for place in ("loss", "gradient", "image", "optimiser", "weights")),
    *(Fault(place, np.inf) for place in ("gradient", "image", "second moment", "momentum copy", "queue")),
    Fault("loss", np.inf, (STEP, STEP + 1)),
    Fault("gradient", np.nan, (STEP, STEP + 1)),
)


class Outcome(NamedTuple):
    """What a run did with a fault."""

    ended: Literal["went on", "stopped", "kept nothing"]
    """The last: the method has nothing in that place."""
    failures: list[str]


def inject_numbers(folder: Path, *, amount: int, seed: int) -> dict[str, Any]:
    """`amount` faults, drawn from all of them in all ways of training."""
    random = np.random.default_rng(seed)
    ways = trainees()
    cases = [(way, fault) for way in ways for fault in FAULTS]
    drawn = [cases[index] for index in random.permutation(len(cases))[:amount]]
    counts: dict[str, int] = {}
    failures = []
    for way, fault in sorted(drawn, key=lambda case: case[0].name):
        outcome = try_fault(way, fault, folder)
        counts[outcome.ended] = counts.get(outcome.ended, 0) + 1
        failures += [f"{way.name}, {fault}: {failure}" for failure in outcome.failures]
    return {"tried": len(drawn), "failures": failures, "ended": counts}


def trainees() -> list[Trainee]:
    """Every way of training, a few steps each."""
    from fdkit.commands.pretrain import choices

    def plain(name: str, arguments: list[str]) -> Trainee:
        return Trainee(name, lambda folder: [*arguments, "--output", str(folder)])

    averaged = [*finetune(), "--supervised.ema-decay", "0.9", "--validate-every-epochs", "0"]
    return [
        plain("distill", distill(*QUICK)),
        *(plain(method, [*pretrain(method), *QUICK]) for method in choices()),
        plain("finetune", [*averaged, *QUICK]),
        Trainee("segment", lambda folder: [*segment().commands(folder)[0], "--train.max-bad-steps", "1"]),
    ]


# -- what is put in, in the process of the run


def plant(fault: Fault) -> Callable[[], None]:
    """A preparation of a run's process that puts the fault into its trainer."""

    def prepare() -> None:
        from fdkit.training.loop import Trainer

        update, views = Trainer.update, Trainer.views

        def with_fault(self: Any, batch: Any) -> Any:
            if self.step not in fault.steps:
                return update(self, batch)
            if fault.place == "loss":
                with _loss_times(self.method, fault.value):
                    return update(self, batch)
            if fault.place == "gradient":
                # the first and the last ones are frozen in some methods
                among = self.parameters[len(self.parameters) // 2]
                handle = among.register_hook(lambda gradient: gradient * fault.value)
                verdicts = update(self, batch)
                handle.remove()
                return verdicts
            if fault.place == "image":
                self.views = lambda batch: [_one_pixel(view, fault.value) for view in views(self, batch)]
                verdicts = update(self, batch)
                del self.views
                return verdicts
            _spoil(self, fault)
            return update(self, batch)

        Trainer.update = with_fault  # type: ignore[method-assign]

    return prepare


class _loss_times:  # noqa: N801  # used as a function
    def __init__(self, method: Any, factor: float) -> None:
        self.method, self.factor, self.forward = method, factor, method.forward

    def __enter__(self) -> None:
        def forward(*arguments: Any) -> dict[str, Tensor]:
            scalars = dict(self.forward(*arguments))
            scalars["loss"] = scalars["loss"] * self.factor
            return scalars

        self.method.forward = forward

    def __exit__(self, *unused: object) -> None:
        del self.method.forward


def _one_pixel(view: Tensor, value: float) -> Tensor:
    changed = view.clone()
    if changed.is_floating_point():  # masks are whole numbers
        changed[0, 0, 0, 0] = value
    return changed


NOTHING_THERE = "nothing in this place"


def _spoil(trainer: Any, fault: Fault) -> None:
    """Write one number into what the trainer keeps."""
    if not spoiled_by(trainer, fault.place):
        print(NOTHING_THERE, flush=True)
    with torch.no_grad():
        for tensor in spoiled_by(trainer, fault.place)[:1]:
            tensor.view(-1)[0] = fault.value


def spoiled_by(trainer: Any, place: Place) -> list[Tensor]:
    """The tensors of a trainer that a fault in this place may go to; none where it keeps no such thing."""
    method = trainer.method
    if place == "weights":
        return trainer.parameters[-1:]
    if place in ("optimiser", "second moment"):
        keys = {"optimiser": ("exp_avg", "momentum_buffer"), "second moment": ("exp_avg_sq",)}[place]
        states = trainer.optimizer.state.values()
        return [state[key] for state in states for key in keys if isinstance(state.get(key), Tensor)]
    if place == "queue":
        buffers = [value for name, value in method.named_buffers() if "queue" in name]
        return [value for value in buffers if value.is_floating_point() and value.numel()]
    student = {id(parameter) for parameter in trainer.parameters}
    return [
        method.state_dict(keep_vars=True)[name]
        for name in method.state_dict()
        if name.startswith(COPIES)
        and name.endswith("weight")
        and id(method.get_parameter(name)) not in student
    ]


# -- what has to be true of the run afterwards


def undisturbed(way: Trainee, folder: Path) -> dict[str, str]:
    """What a run leaves that meets nothing; run once, of which the names and digests stay."""
    kept = folder / f"{way.name}.json"
    if not kept.exists():
        straight = folder / f"{way.name}-undisturbed"
        end = run(way.arguments(straight), folder / "log")
        assert end.code == 0, f"{way.name}, undisturbed: exit code {end.code}: {end.words}"
        kept.write_text(json.dumps(left_by_training(straight)))
        shutil.rmtree(straight)
    found: dict[str, str] = json.loads(kept.read_text())
    return found


def try_fault(way: Trainee, fault: Fault, folder: Path) -> Outcome:
    """Run a command into a fault, and if that stops it once more, without it."""
    wanted = undisturbed(way, folder)
    spoiled = folder / f"{way.name}-spoiled"
    shutil.rmtree(spoiled, ignore_errors=True)
    end = run(way.arguments(spoiled), folder / "log", prepare=plant(fault))
    if NOTHING_THERE in end.text:
        return Outcome("kept nothing", [])
    failures = [f"{name} is not finite" for name in not_finite_in(spoiled)]
    if end.code == 0:
        return Outcome("went on", failures + list(_wrong_in_one_that_went_on(spoiled, fault)))
    failures += _wrong_in_one_that_stopped(spoiled, fault, end)
    again = run([*way.arguments(spoiled), "--resume"], folder / "log")
    if again.code != 0:
        return Outcome("stopped", [*failures, f"resumed: exit code {again.code}: {again.words}"])
    found = left_by_training(spoiled)
    differing = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if differing:
        failures.append(f"resumed, it ends in other bits than a run that met nothing: {differing}")
    return Outcome("stopped", failures)


def not_finite_in(run_folder: Path) -> list[str]:
    """Every tensor of a run folder's checkpoints and exported networks that holds NaN or infinity."""
    return [
        f"{path.relative_to(run_folder)}: {name}"
        for path in sorted(run_folder.rglob("*.safetensors"))
        for name, value in safetensors.torch.load_file(path).items()
        if value.is_floating_point() and not value.isfinite().all()
    ]


def _wrong_in_one_that_went_on(run_folder: Path, fault: Fault) -> Iterator[str]:
    """One step was left out, was counted, and its images are listed by name."""
    facts = facts_of(run_folder)
    if not fault.passes and fault.place != "image":
        yield "the run went on as if nothing were"
    if facts.get("bad_steps") != 1 or facts["state"] != "done":
        yield f"run.json says {facts['state']}, with {facts.get('bad_steps')} bad steps"
    yield from _wrong_in_reports(run_folder, {STEP})


def _wrong_in_one_that_stopped(run_folder: Path, fault: Fault, end: End) -> Iterator[str]:
    """It ended with its exit code, in words, with the last good state on the disk."""
    facts = facts_of(run_folder)
    if end.code != 7 or "error:" not in end.text or "finite" not in end.text or "Traceback" in end.text:
        yield f"exit code {end.code}: {end.words}"
    if fault.passes:
        yield f"one bad step stopped the run: {end.words}"
    if facts.get("exit_code") != 7:
        yield f"run.json says exit code {facts.get('exit_code')}"
    if (run_folder / "student.safetensors").exists():
        yield "a student was exported"
    if fault.place in ("loss", "gradient", "image"):
        yield from _wrong_in_reports(run_folder, set(fault.steps))


def _wrong_in_reports(run_folder: Path, steps: set[int]) -> Iterator[str]:
    """Each bad step has a file with the names of its images."""
    reports = [json.loads(path.read_text()) for path in (run_folder / "errors").glob("*not-finite.json")]
    if {report["step"] for report in reports} != steps:
        yield f"files about steps {sorted(report['step'] for report in reports)} instead of {sorted(steps)}"
    for report in reports:
        names = [name for rank in report["batch"].values() for name in rank]
        if not names or len(names) != sum(map(len, report["indices"])) or not all(map(str, names)):
            yield f"the file about step {report['step']} names {len(names)} images"


# -- memory


def out_of_memory_at(step: int, error: Callable[[], BaseException]) -> Callable[[], None]:
    """A preparation of a run's process in which the backward pass of a step finds no memory."""

    def prepare() -> None:
        from fdkit.training.loop import Trainer

        backward = Trainer.backward

        def without_memory(self: Any, *arguments: Any) -> Any:
            if self.step == step:
                raise error()
            return backward(self, *arguments)

        Trainer.backward = without_memory  # type: ignore[method-assign]

    return prepare


def try_memory(way: Trainee, folder: Path, *, step: int, error: Callable[[], BaseException]) -> list[str]:
    """Run a command out of memory at a step, and once more with memory; what went wrong."""
    wanted = undisturbed(way, folder)
    short = folder / f"{way.name}-short"
    shutil.rmtree(short, ignore_errors=True)
    end = run(way.arguments(short), folder / "log", prepare=out_of_memory_at(step, error))
    failures = []
    if end.code != 6 or "Traceback" in end.text:
        failures.append(f"exit code {end.code}: {end.words}")
    missing = [
        word for word in ("out of memory", "images at a time", "--train.accumulate 2") if word not in end.text
    ]
    if missing:
        failures.append(f"{missing} not said: {end.words}")
    before = (short / "config.yaml").read_text()
    again = run([*way.arguments(short), "--resume"], folder / "log")
    if again.code != 0 or (short / "config.yaml").read_text() != before:
        failures.append(f"with memory again: exit code {again.code}: {again.words}")
    elif left_by_training(short) != wanted:
        failures.append("with memory again, it ends in other bits than a run that always had it")
    return failures
