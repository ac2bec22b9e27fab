"""The one training loop: it runs any method and knows nothing about it.

A step: batch to the device, forward and backward over its parts, clip, agree with the other processes, update. State
is the method, the optimiser, the step and the random generators; batches are a function of the step. So a run that is
killed and resumed ends in the same bits, given deterministic kernels (as on a CPU), one kind of hardware, and the same
number of threads.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any, NoReturn

import torch
from torch import Tensor

from fdkit.data.loader import BadImages, Batch, LoaderConfig, readers_of, training_batches
from fdkit.data.reading import ReadingCosts, waiting_advice
from fdkit.data.sources import ImageSource
from fdkit.errors import NumericsError, PreemptedError
from fdkit.methods._method import Method
from fdkit.models.libraries import save_recipe
from fdkit.models.vit import patch_projection
from fdkit.teachers.run_checkpoint import step_of
from fdkit.training.activations import spare_memory
from fdkit.training.agreement import require_same_images
from fdkit.training.bad_steps import MOST_REPORTS, BadSteps, BufferGuard
from fdkit.training.checkpoint import list_steps
from fdkit.training.compiling import Compilations
from fdkit.training.distributed import (
    World,
    broadcast,
    current_world,
    gather,
    mark,
    process_group,
    wait_for_all,
)
from fdkit.training.export import export_student
from fdkit.training.failures import explained_failures, not_finite, not_saved
from fdkit.training.generators import deterministic_kernels, seed_generators, undisturbed_generators
from fdkit.training.gradients import clip_gradients, first_matrix
from fdkit.training.health import Health
from fdkit.training.monitor import Monitor
from fdkit.training.optimizer import OptimizerConfig, build_optimizer, trained_parameters
from fdkit.training.parallel import parallel
from fdkit.training.plan import Plan, TrainConfig, describe_plan, duration_of, make_plan
from fdkit.training.progress import Clock, Progress
from fdkit.training.run import Run
from fdkit.training.schedule import half_cosine
from fdkit.training.state import TrainingState
from fdkit.training.stop import StopRequest
from fdkit.training.votes import Verdict, Votes, Window

__all__ = ["TrainConfig", "train"]

log = logging.getLogger("fdkit")


def train(
    method: Method,
    source: ImageSource,
    run: Run,
    *,
    train: TrainConfig,
    optim: OptimizerConfig,
    loader: LoaderConfig,
    seed: int,
    device: torch.device,
    monitors: Sequence[Monitor] = (),
    handle_signals: bool = False,
) -> None:
    """Train the method to its last step, from the run's newest checkpoint if it has one, and export the student.

    handle_signals: save and raise PreemptedError at SIGINT, SIGTERM and SIGUSR1; only in a process's main thread.
    The global random state is left as it was.
    Raises NumericsError before an update that is not finite would be made, and PreemptedError after a saved stop.
    """
    plan = make_plan(source, train=train, optim=optim, world=current_world(), device=device)
    run.check_data(source.fingerprint, name=source.name)
    stop = StopRequest()
    with ExitStack() as stack:
        if handle_signals:
            stack.enter_context(stop.catch())
        world = stack.enter_context(process_group(device, train.timeout_seconds))
        require_same_images(source, world)
        stack.enter_context(explained_failures(train, plan, device))
        stack.enter_context(undisturbed_generators(device))
        stack.enter_context(deterministic_kernels(train.deterministic))
        derived = describe_plan(plan) | {"loader": readers_of(loader)._asdict()}
        run.update(state="running", seed=seed, device=str(device), derived=derived)
        trainer = Trainer(
            method, source, run, plan=plan, train=train, optim=optim, seed=seed, world=world, device=device
        )
        trainer.restore()
        if run.writes:
            save_recipe(method.exported, run.folder)  # so that checkpoints can be looked at before the end
        trainer.run_steps(loader, monitors, stop)
        if trainer.shards is not None:
            trainer.shards.put_together()
        export_student(method, run)


class Trainer:
    """A method in training: the state that steps change, and how."""

    def __init__(
        self,
        method: Method,
        source: ImageSource,
        run: Run,
        *,
        plan: Plan,
        train: TrainConfig,
        optim: OptimizerConfig,
        seed: int,
        world: World,
        device: torch.device,
    ) -> None:
        self.method = method.to(device).train()
        self.source = source
        self.run = run
        self.plan = plan
        self.config = train
        self.optim = optim
        self.seed = seed
        self.world = world
        self.device = device
        self.step = 0
        self.costs = ReadingCosts()
        self.window = Window()
        self.stop = StopRequest()
        self.clock = Clock(plan.batch_size)
        self.num_parts = spare_memory(method, train, plan)
        method.begin(duration_of(plan, self.num_parts))
        projection = patch_projection(method.student.network)
        self.health = Health(
            plan.steps_per_epoch, can_freeze=projection is not None and projection.weight.requires_grad
        )
        self.compilations = Compilations(run, is_wanted=train.compile)
        self.parallel = parallel(
            method,
            world,
            device,
            compile=train.compile,
            wanted=train.parallel,
            is_bf16=plan.precision == "bf16",
        )
        self.optimizer = build_optimizer(method, optim)
        self.shards = self.parallel.shards
        self.first_layer = first_matrix(method.student.network)
        if self.shards is not None:
            self.shards.take_over(self.optimizer)
            self.first_layer = self.shards.slice_of(self.first_layer)
        self.parameters = trained_parameters(self.optimizer)
        refuses_bad = device.type == "cuda" and isinstance(
            self.optimizer, (torch.optim.AdamW, torch.optim.SGD)
        )
        self.votes = Votes(world, device, lag=1 if refuses_bad else 0)
        self.bad_steps = BadSteps(train.max_bad_steps)
        self.guard = BufferGuard(method)
        self.state = TrainingState(method, self.optimizer, self.shards, world, device)
        run.update(parallel=self.parallel.kind)
        self._last_save = time.monotonic()

    def update(self, batch: Batch) -> list[Verdict]:
        """One optimiser update; what is known by now about this step and those before."""
        mark(self.step, "computing")
        progress = self.step / self.plan.num_steps
        self.set_rates(progress)
        self.guard.keep()
        self.optimizer.zero_grad(set_to_none=True)
        labels = batch.labels.to(self.device, non_blocking=True) if self.method.needs_labels else None
        metrics = self.backward(self.views(batch), progress, labels)
        self.method.before_step(progress)
        if self.shards is not None:
            self.shards.take_gradients()
        metrics |= self.clip()
        bad = ~(metrics["loss"] + metrics["grad_norm"]).isfinite()
        bad = self.votes.cast(
            self.step, batch.indices, bad, stop=self.stop.requested, save=self.save_is_due()
        )
        verdicts = self.votes.read()
        told = {verdict.step: verdict.is_bad for verdict in verdicts}
        is_bad, is_unknown = told.get(self.step, False), self.step not in told
        if any(told.values()):  # what a bad step left is looked for, and this one may be bad as well
            self.guard.put_back(bad)
        self.hear(verdicts, metrics)
        if is_bad:
            self.method.skip_step()
        else:
            self.optimizer.found_inf = bad  # type: ignore[attr-defined]  # fused AdamW and SGD make no update where this is 1
            self.optimizer.step()
            self.method.after_step(progress)
        if is_unknown:
            self.guard.put_back(bad)
        self.window.add(metrics, bad)
        self.step += 1
        return verdicts

    def set_rates(self, progress: float) -> None:
        """Learning rate and weight decay of every group, for the step to come."""
        schedule, optim = self.plan.schedule, self.optim
        for group in self.optimizer.param_groups:
            rate = schedule.peak_lr if group["constant_lr"] else schedule(self.step)
            group["lr"] = rate * group["lr_scale"]
            if optim.weight_decay_end is not None and group["is_decayed"]:
                group["weight_decay"] = half_cosine(optim.weight_decay, optim.weight_decay_end, progress)

    def views(self, batch: Batch) -> list[Tensor]:
        """The batch's views on the device, (b, 3, H, W) in [0, 1] each."""
        crops = [crop.to(self.device, non_blocking=True) for crop in batch.crops]
        colour = [  # whole numbers say which crops these are: the host reads them, and would wait for the device
            drawn if drawn.dtype == torch.int64 else drawn.to(self.device, non_blocking=True)
            for drawn in batch.colour
        ]
        return self.method.views.finish(crops, colour)

    def backward(self, views: list[Tensor], progress: float, labels: Tensor | None) -> dict[str, Tensor]:
        """Add the gradient of the mean loss over the parts of the batch; means of the method's scalars."""
        num_parts = self.num_parts
        means: dict[str, Tensor] = {}
        labelled = [()] * num_parts if labels is None else [(part,) for part in labels.chunk(num_parts)]
        for part, micro in enumerate(zip(*(view.chunk(num_parts) for view in views), strict=True)):
            with self.parallel.adding_up(part + 1 == num_parts):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.plan.precision == "bf16"):
                    scalars = self.parallel.module(list(micro), progress, *labelled[part])
                (scalars["loss"] / num_parts).backward()
            for name, value in scalars.items():
                value = value.detach().float() / num_parts
                means[name] = means[name] + value if name in means else value
        return means

    def clip(self) -> dict[str, Tensor]:
        """Scale gradients down to the largest norm allowed; norms before."""
        return clip_gradients(self.parameters, self.optim, first_layer=self.first_layer, shards=self.shards)

    def run_steps(self, loader: LoaderConfig, monitors: Sequence[Monitor], stop: StopRequest) -> None:
        """All steps that are left, with what is logged, measured and saved between them."""
        self.stop = stop
        size, world_size = self.method.views.image_size, self.world.size
        advise = waiting_advice(self.costs, readers_of(loader), image_size=size, world_size=world_size)
        self.clock = Clock(self.plan.batch_size, advise)  # again, so that building is not counted
        progress = Progress(self.plan.num_steps, self.step, visible=self.world.is_main)
        bad_images = BadImages(self.source, loader.max_bad_ratio)
        try:
            if self.step == 0:
                for monitor in monitors:
                    self.measure(monitor, progress)
            for batch in self.timed(self.batches(loader, bad_images)):
                verdicts = self.update(batch)
                self.clock.finished_step()
                self.between_steps(verdicts, monitors, progress)
        finally:
            progress.close()
            if bad_images.reasons:
                self.run.update(unreadable_images=bad_images.reasons)
        assert self.step == self.plan.num_steps, f"{self.step} of {self.plan.num_steps} steps done"

    def between_steps(self, verdicts: list[Verdict], monitors: Sequence[Monitor], progress: Progress) -> None:
        """Log, measure, save and stop, as due after the step just done."""
        is_last = self.step == self.plan.num_steps
        for monitor in monitors:
            if is_last or self.step % monitor.every_steps == 0:
                self.measure(monitor, progress)
        if is_last or self.step % self.config.log_every_steps == 0:
            self.log(progress)
        stops = any(verdict.stop for verdict in verdicts)
        every = self.config.save_every_steps
        if (
            is_last
            or stops
            or any(verdict.save for verdict in verdicts)
            or (every and self.step % every == 0)
        ):
            self.save()
        if stops and not is_last:
            self.preempt()

    def batches(self, loader: LoaderConfig, bad_images: BadImages) -> Iterator[Batch]:
        """The share of this process in every batch that is left."""
        return training_batches(
            self.source,
            self.method.views,
            loader,
            batch_size=self.plan.batch_size,
            seed=self.seed,
            start_step=self.step,
            num_steps=self.plan.num_steps,
            rank=self.world.rank,
            world_size=self.world.size,
            bad_images=bad_images,
            costs=self.costs,
        )

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches, with the time spent waiting for them counted; training's generators are not drawn from."""
        while self.step < self.plan.num_steps:
            mark(self.step, "reading images")
            self.run.at_step = self.step
            start = time.perf_counter()
            with undisturbed_generators(self.device):
                batch = next(batches)
            self.clock.waited(time.perf_counter() - start)
            yield batch

    def preempt(self) -> NoReturn:
        """Say that training stops here, saved."""
        names = sorted({name for name in gather(self.stop.signal_name, self.world) if name})
        raise PreemptedError(
            f"stopped by {' and '.join(names)} at step {self.step} of {self.plan.num_steps}; state saved",
            "run the same command with --resume to continue",
        )

    def log(self, progress: Progress) -> None:
        """Write the means since the last line to metrics.jsonl and show them; the one place that reads the device."""
        values: dict[str, Any] = {"step": self.step, "epoch": self.step / self.plan.steps_per_epoch}
        values |= self.window.read(self.world)
        values["lr"] = self.plan.schedule(self.step - 1)
        values |= self.clock.read()
        self.run.log_metrics(values)
        self.run.heartbeat(self.step)
        if self.world.is_main and "loss" in values:
            eta = self.clock.eta_seconds(self.plan.num_steps - self.step)
            progress.show(self.step, values, eta_seconds=eta)
        if "loss" in values:
            warn(self.health.logged(self.step, values, kept=self.last_good_checkpoint()))
        self.compilations.tell()

    def measure(self, monitor: Monitor, progress: Progress) -> None:
        """Log what a monitor finds; training goes on as if it had not been called, unless it has collapsed."""
        mark(self.step, "measuring" if self.world.is_main else "waiting for rank 0")
        start = time.perf_counter()
        found: dict[str, float] = {}
        with self.parallel.whole(self.method) as whole:
            if self.world.is_main:
                with undisturbed_generators(self.device):
                    found = monitor(whole, self.step)
        self.method.train()
        found = broadcast(found, self.world)  # so that all processes stop at the same step
        if found and self.world.is_main:
            named = {f"monitor/{name}": value for name, value in found.items()}
            self.run.log_metrics({"step": self.step, "epoch": self.step / self.plan.steps_per_epoch} | named)
            log.info("step %d  %s", self.step, "  ".join(f"{name} {found[name]:.4g}" for name in found))
            progress.remember(found)
        warn(self.health.found(self.step, found, kept=self.last_good_checkpoint()))
        self.clock.exclude(time.perf_counter() - start)

    def last_good_checkpoint(self) -> str:
        """The newest checkpoint from a time when nothing looked like a collapse; empty if there is none."""
        good = self.health.last_good_step
        paths = [
            path for path in list_steps(self.run.checkpoints) if good is not None and step_of(path) <= good
        ]
        return str(paths[0]) if paths else ""

    def save_is_due(self) -> bool:
        """Whether this process's clock asks for a checkpoint; rank 0's counts."""
        elapsed = time.monotonic() - self._last_save
        return self.world.is_main and elapsed >= 60 * self.config.save_every_minutes

    def save(self) -> None:
        """Write a checkpoint, once every vote is read and found good; all processes go on together.

        Raises NumericsError instead where something in it would not be finite.
        """
        self.hear(self.votes.read(lag=0), {})
        if damaged := self.state.damage():
            raise not_saved(damaged, self.step, plan=self.plan, run=self.run)
        mark(self.step, "saving" if self.world.is_main else "waiting for rank 0")
        start = time.perf_counter()
        windows = gather(self.window.numbers(), self.world)
        state = {
            "step": self.step,
            "seed": self.seed,
            "data": self.source.fingerprint,
            "windows": windows,
            "health": self.health.state(),
            "bad_steps": self.bad_steps.state(),
        }
        self.state.save(
            self.run,
            self.step,
            state,
            keep=self.config.keep_checkpoints,
            keep_also=self.last_good_checkpoint(),
        )
        self.run.update(step=self.step)
        wait_for_all(self.world)
        self.clock.exclude(time.perf_counter() - start)
        self._last_save = time.monotonic()

    def restore(self) -> None:
        """Continue from the run's newest sound checkpoint, or seed a new start."""
        seed_generators(self.seed, self.world.rank)
        found = self.state.restore(self.run, seed=self.seed, data=self.source.fingerprint)
        if found is not None:
            state, name = found
            self.step = state["step"]
            self.health.load(state["health"])
            self.bad_steps.load(state["bad_steps"])
            if len(state["windows"]) == self.world.size:
                self.window.load(state["windows"][self.world.rank], self.device)
            if self.world.is_main:
                log.info("resuming at step %d of %d from %s", self.step, self.plan.num_steps, name)
        # Anew begins also a run that was killed before it saved anything, and had logged step 0.
        begins_anew = found is None
        self.run.forget_metrics_after(-1 if begins_anew else self.step)

    def hear(self, verdicts: list[Verdict], metrics: dict[str, Tensor]) -> None:
        """Count the steps that were not finite, whose update was not made; all processes call this.

        Raises NumericsError for one too many in a row, or for one that left something in the state not finite.
        """
        for verdict in verdicts:
            if not verdict.is_bad:
                continue
            self.bad_steps.add(verdict.step)
            error = self.not_finite(verdict, metrics)
            damaged = self.state.damage()
            if damaged:
                raise NumericsError(f"{error.message}, but {damaged} is no longer finite", error.hint)
            if self.bad_steps.are_too_many:
                raise error
            self.run.update(bad_steps=self.bad_steps.total)
            in_a_row, most = self.bad_steps.in_a_row, self.bad_steps.most_in_a_row
            warn([f"{error.message}: {in_a_row} in a row, of the {most} that train.max_bad_steps bears"])

    def not_finite(self, verdict: Verdict, metrics: dict[str, Tensor]) -> NumericsError:
        """The error of a bad step, after writing what is needed to look into it; all processes call this."""
        indices = gather(verdict.indices.tolist(), self.world)
        last = {name: value.item() for name, value in metrics.items()}
        facts = {"seed": self.seed, "last_metrics_of_rank_0": last}
        keeps = self.bad_steps.total <= MOST_REPORTS or self.bad_steps.are_too_many
        return not_finite(
            verdict.step, indices, facts, plan=self.plan, source=self.source, run=self.run if keeps else None
        )


def warn(sentences: list[str]) -> None:
    """Say each once, on one process alone."""
    for sentence in sentences:
        if current_world().is_main:
            log.warning("%s", sentence)
