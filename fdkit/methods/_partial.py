"""Training the end of a network alone."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from fdkit.errors import ConfigError
from fdkit.models.classifier import head_of
from fdkit.models.depth import list_blocks

HALF = 0.5
LAST_MLP = ("norm2", "mlp", "ls2", "gamma_2", "drop_path2")
"""Parts of a block that make its second half; a Swin V2 has its norm behind the MLP, under the same name."""


def freeze_all_but(network: nn.Module, trained_blocks: float) -> list[nn.Module]:
    """Freeze a classifier but for its last blocks, its last norm and its head; the modules that are to stay in eval.

    trained_blocks: 0, 0.5 (the MLP of the last block), or a whole number up to the number of blocks.
    Source: He et al. 2021 (MAE), section 4.4, partial fine-tuning.
    Raises ConfigError for more blocks than there are, for a fraction that is not a half, and for a network whose blocks
    are not known, unless the head alone trains.
    """
    kept = [*head_of(network), *_last_norms(network), *_last_blocks(network, trained_blocks)]
    trained = {id(parameter) for part in kept for parameter in _parameters(part)}
    for parameter in network.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    live = {id(module) for part in kept if isinstance(part, nn.Module) for module in part.modules()}
    return [module for module in network.modules() if id(module) not in live]


def _last_blocks(network: nn.Module, count: float) -> list[Any]:
    if count == 0:
        return []
    blocks = list_blocks(network)
    if count == HALF:
        parts = [getattr(blocks[-1], name, None) for name in LAST_MLP]
        return [part for part in parts if part is not None]
    if count != round(count) or count > len(blocks):
        raise ConfigError(
            f"supervised.trained_blocks {count:g}: {type(network).__name__} has {len(blocks)} blocks",
            f"use 0 for the head alone, 0.5 for the MLP of the last block, or 1 to {len(blocks)}",
        )
    return blocks[-round(count) :]


def _last_norms(network: nn.Module) -> list[nn.Module]:
    """The norms behind the last block, wherever timm keeps them."""
    owners = ((network, "norm"), (network, "fc_norm"), (getattr(network, "head", None), "norm"))
    found = [getattr(owner, name, None) for owner, name in owners]
    return [norm for norm in found if isinstance(norm, nn.Module)]


def _parameters(part: Any) -> Iterator[nn.Parameter]:
    """Of a module, or of the one parameter that the part is."""
    return iter([part]) if isinstance(part, nn.Parameter) else part.parameters()
