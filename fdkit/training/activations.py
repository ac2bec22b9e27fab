"""Training with less memory for activations: computing them twice, or for a part of the batch at a time."""

import logging
from functools import partial
from typing import Any

from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from fdkit.errors import ConfigError
from fdkit.methods._method import Method
from fdkit.models.backbone import Backbone
from fdkit.training.compiling import repeated_blocks
from fdkit.training.plan import Plan, TrainConfig

log = logging.getLogger("fdkit")


def spare_memory(method: Method, train: TrainConfig, plan: Plan) -> int:
    """Change a method as the configuration says, to need less memory; the parts its batch is taken in, one by one.

    Raises ConfigError where that cannot be done or has no effect.
    """
    if train.activation_checkpointing:
        checkpoint_activations(method, every=train.checkpoint_every)
    if train.cached_batch:
        cache_batch(method, train.accumulate)
        return 1
    if train.accumulate > 1 and any(isinstance(part, _BatchNorm) for part in method.modules()):
        log.warning(
            "train.accumulate %d: batch statistics are those of parts of %d images",
            train.accumulate,
            plan.micro_batch_size * plan.world_size,
        )
    return train.accumulate


def checkpoint_activations(method: Method, *, every: int = 1) -> None:
    """Have the student compute its activations twice, or those of every how many-th block.

    Before the method is cut or compiled. Raises ConfigError if its network cannot, or has too few blocks for that.
    """
    if every > 1:
        _checkpoint_some(method, every)
        return
    network = method.student.network
    refusal = ConfigError(
        f"train.activation_checkpointing: {type(network).__name__} does not offer it",
        "leave it off and raise --train.accumulate instead",
    )
    enable: Any = getattr(network, "set_grad_checkpointing", None)
    if enable is None:
        raise refusal
    try:
        enable(True)
    except AssertionError as error:
        raise refusal from error


def _checkpoint_some(method: Method, every: int) -> None:
    blocks = list(repeated_blocks(method.student))
    if len(blocks) <= every:
        raise ConfigError(
            f"train.checkpoint_every {every} leaves one block or none of {len(blocks)} in "
            f"{type(method.student.network).__name__} to compute twice",
            "use --train.checkpoint-every 1, or less than the number of blocks",
        )
    for block in blocks[::every]:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def cache_batch(method: Method, num_parts: int) -> None:
    """Have images go through the networks in parts, while heads and loss see the whole batch.

    The networks run twice, without and with gradient, and keep the activations of one part (Gao et al. 2021,
    GradCache). Raises ConfigError where that would have no effect, or change what a network's batch norms see.
    """
    if num_parts == 1:
        raise ConfigError(
            "train.cached_batch has no effect with train.accumulate 1",
            "name the parts a batch is taken in: --train.accumulate 8",
        )
    if not method.compares_images:
        raise ConfigError(
            "train.cached_batch has no effect: this method compares no images with each other",
            "use train.accumulate alone, which gives the same gradient at less cost",
        )
    backbones = [part for part in method.modules() if isinstance(part, Backbone)]
    norms = {
        type(part).__name__ for one in backbones for part in one.modules() if isinstance(part, _BatchNorm)
    }
    if norms:
        raise ConfigError(
            f"train.cached_batch: the network has batch norms ({', '.join(sorted(norms))}), which must see the whole "
            "batch at once",
            "use a network without them, such as a ViT with stem patch, or more devices",
        )
    for backbone in backbones:
        backbone.num_parts = num_parts
