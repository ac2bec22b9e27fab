"""How a run trains: the configuration of the loop, and what follows from it, the images and the processes."""

import logging
from typing import Any, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator

from fdkit.config import Config
from fdkit.data.loader import steps_per_epoch
from fdkit.data.sources import ImageSource
from fdkit.errors import ConfigError
from fdkit.methods._method import Duration
from fdkit.training.distributed import World
from fdkit.training.optimizer import OptimizerConfig
from fdkit.training.schedule import Schedule, build_schedule

log = logging.getLogger("fdkit")

Precision = Literal["fp32", "bf16"]


class TrainConfig(Config):
    """How long and how the loop trains; nothing here depends on the method."""

    epochs: float = Field(300, gt=0)
    """Passes over the images; parts of a pass are allowed."""
    batch_size: int = Field(2048, gt=0)
    """Images an update, over all processes."""
    accumulate: int = Field(1, gt=0)
    """Parts a process takes its share of a batch in, to save memory; contrastive losses see one part at a time,
    unless cached_batch is on."""
    cached_batch: bool = False
    """With accumulate: the network alone takes the batch in parts, twice; heads, gather and loss see all of it."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the networks; auto: bf16 where the hardware computes in it, else fp32. Weights stay fp32."""
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"
    """How several processes hold the networks they train: each all of them (ddp), or each a slice of every block
    (fsdp); auto: slices where training state would take more than a quarter of a GPU's memory."""
    activation_checkpointing: bool = False
    """Compute the student's activations again instead of keeping them: less memory, about a third more time."""
    checkpoint_every: int = Field(1, gt=0)
    """With activation_checkpointing: every how many-th block of the student computes its activations again; more than 1
    saves less memory and costs less time."""
    compile: bool = False
    """Compile the networks' blocks with torch.compile, one graph for those alike: a slow start, then faster steps."""
    deterministic: bool = False
    """Only kernels that give the same bits every time, on a GPU too: slower, and refused where there is none."""
    max_bad_steps: int = Field(3, ge=0)
    """Steps in a row whose loss or gradient is not finite that are left out before the run stops; 0 stops at once."""
    log_every_steps: int = Field(50, gt=0)
    """Steps between lines of metrics.jsonl; a line holds means over these steps."""
    save_every_minutes: float = Field(30, gt=0)
    """Minutes between checkpoints."""
    save_every_steps: int | None = Field(None, gt=0)
    """Steps between further checkpoints; null: by the clock alone."""
    keep_checkpoints: int = Field(2, gt=0)
    """Checkpoints kept; older ones are deleted."""
    timeout_seconds: float = Field(600, gt=0, le=1_000_000)
    """How long processes wait for one that does not get on before all end, naming it; more than rank 0 ever needs to
    save or measure."""

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        if self.checkpoint_every > 1 and not self.activation_checkpointing:
            raise ConfigError(
                f"train.checkpoint_every {self.checkpoint_every} has no effect without train.activation_checkpointing",
                "use --train.activation-checkpointing, or leave it out",
            )
        return self


class Plan(NamedTuple):
    """What follows from configuration, data and processes; written to run.json, never into the configuration."""

    num_steps: int
    steps_per_epoch: int
    batch_size: int
    micro_batch_size: int
    """Images in one forward pass of one process."""
    world_size: int
    precision: Precision
    schedule: Schedule


def make_plan(
    source: ImageSource, *, train: TrainConfig, optim: OptimizerConfig, world: World, device: torch.device
) -> Plan:
    """The plan of a run. Raises ConfigError if the batch divides badly or exceeds the images."""
    parts = world.size * train.accumulate
    if train.batch_size % parts:
        below, above = train.batch_size // parts * parts, (train.batch_size // parts + 1) * parts
        raise ConfigError(
            f"train.batch_size {train.batch_size} does not divide by {world.size} processes "
            f"x train.accumulate {train.accumulate}",
            f"use --train.batch-size {f'{below} or {above}' if below else above}",
        )
    per_epoch = steps_per_epoch(source, train.batch_size)
    num_steps = max(1, round(train.epochs * per_epoch))
    schedule = build_schedule(
        optim, batch_size=train.batch_size, steps_per_epoch=per_epoch, num_steps=num_steps
    )
    if schedule.warmup_steps >= num_steps:
        log.warning(
            "optim.warmup_epochs %g is not below train.epochs %g: the learning rate stays under its peak %.2g",
            optim.warmup_epochs,
            train.epochs,
            schedule.peak_lr,
        )
    return Plan(
        num_steps=num_steps,
        steps_per_epoch=per_epoch,
        batch_size=train.batch_size,
        micro_batch_size=train.batch_size // parts,
        world_size=world.size,
        precision=choose_precision(train.precision, device),
        schedule=schedule,
    )


def choose_precision(wanted: Literal["auto", "fp32", "bf16"], device: torch.device) -> Precision:
    """The arithmetic to use: "auto" is bf16 where the device computes in it natively."""
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    native = device.type == "cpu" and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )
    return "bf16" if native else "fp32"


def duration_of(plan: Plan, num_parts: int) -> Duration:
    """What a method is told of the run; num_parts: that a process's share of a batch is taken in, one by one."""
    return Duration(
        num_steps=plan.num_steps,
        steps_per_epoch=plan.steps_per_epoch,
        batch_size=plan.batch_size,
        part_size=plan.batch_size // (plan.world_size * num_parts),
        world_size=plan.world_size,
    )


def describe_plan(plan: Plan) -> dict[str, Any]:
    """The plan as plain JSON."""
    return plan._asdict() | {"schedule": plan.schedule._asdict()}
