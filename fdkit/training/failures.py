"""What ends a run before its last step, said with a remedy."""

import errno
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fdkit.data.sources import ImageSource
from fdkit.errors import ConfigError, NumericsError, ResourceError
from fdkit.training.checkpoint import list_steps
from fdkit.training.plan import Plan, TrainConfig
from fdkit.training.run import Run

_NO_HOST_MEMORY = "DefaultCPUAllocator"
"""What PyTorch's error says where the machine's own memory is not enough."""
_NO_SUCH_KERNEL = "does not have a deterministic implementation"


@contextmanager
def explained_failures(train: TrainConfig, plan: Plan, device: torch.device) -> Iterator[None]:
    """Turn running out of memory or disk, and what compiler and kernels cannot do, into errors with a remedy."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _out_of_memory(train, plan, device) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ResourceError(
            f"no room left on the disk: {error}", "free some space, then run the same command with --resume"
        ) from error
    except Exception as error:
        text = str(error).strip()
        if isinstance(error, RuntimeError) and _NO_HOST_MEMORY in text:
            raise _out_of_memory(train, plan, device) from error
        if train.deterministic and _NO_SUCH_KERNEL in text:
            raise ConfigError(
                f"train.deterministic: {text.partition('.')[0]}", "train without it: --train.no-deterministic"
            ) from error
        if not train.compile or not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        raise ConfigError(
            f"train.compile: torch.compile failed: {text.splitlines()[0]}",
            "train without it: --train.no-compile",
        ) from error


def _out_of_memory(train: TrainConfig, plan: Plan, device: torch.device) -> ResourceError:
    peak = f"; peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if device.type == "cuda" else ""
    halves = plan.micro_batch_size % 2 == 0
    options = [f"--train.accumulate {2 * train.accumulate}"] if halves else []
    options += ["--train.activation-checkpointing"] * (not train.activation_checkpointing)
    options += [f"or --train.batch-size {train.batch_size // 2} (another recipe)"] if halves else []
    return ResourceError(
        f"{device}: out of memory with {plan.micro_batch_size} images at a time{peak}",
        f"the batch stays {train.batch_size} with " + ", ".join(options),
    )


def not_finite(
    step: int,
    indices: list[list[int]],
    facts: dict[str, Any],
    *,
    plan: Plan,
    source: ImageSource,
    run: Run | None,
) -> NumericsError:
    """The error of a step that was not finite, after errors/not-finite.json was written with its batch and `facts`.

    indices: of the images of the step, by rank. run: None writes nothing.
    """
    batch = {f"rank {rank}": [source.describe(index) for index in rows] for rank, rows in enumerate(indices)}
    facts = {"step": step, "lr": plan.schedule(step), **facts, "batch": batch, "indices": indices}
    path = (
        run.save_error(f"step-{step:08d}-not-finite.json", json.dumps(facts, indent=2) + "\n")
        if run
        else "errors/"
    )
    return NumericsError(
        f"loss or gradient is not finite at step {step} of {plan.num_steps} "
        f"(lr {plan.schedule(step):.2g}, {plan.precision}); the update was not made",
        f"the batch is listed in {path}; a lower --optim.lr, a longer --optim.warmup-epochs or "
        "--train.precision fp32 may help; --resume continues from the last checkpoint",
    )


def not_saved(damaged: str, step: int, *, plan: Plan, run: Run) -> NumericsError:
    """The error of a checkpoint that would hold NaN or infinity, in what is called `damaged`; it is not written."""
    last = next(iter(list_steps(run.checkpoints)), None)
    known = f"--resume continues from {last}; " if last else "there is no earlier checkpoint; "
    return NumericsError(
        f"{damaged} is no longer finite at step {step} of {plan.num_steps} (lr {plan.schedule(step - 1):.2g}, "
        f"{plan.precision}); no checkpoint of it was written",
        f"{known}a lower --optim.lr, a longer --optim.warmup-epochs or --train.precision fp32 may help",
    )
