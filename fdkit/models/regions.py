"""What repeats in a network: blocks, which a compiler makes one graph of, and which can be cut or recomputed alone."""

from collections.abc import Iterator

from torch import nn

from fdkit.errors import ConfigError
from fdkit.models.stochastic_depth import buffer_drop_rates

RECOMPILE_LIMIT = 64
"""Graphs of one function before the compiler gives up on it, 8 by its own default: a Swin has one for every stage,
shifted or not, dropping or not, and training and evaluation each have theirs."""


def compile_blocks(module: nn.Module) -> int:
    """Have the repeated blocks inside a module compile when they first run, however it is called; how many they are.

    Drop paths keep their distribution and draw other random numbers. Each shape has a graph of its own: one for shapes
    that are left open is slower, and for a Swin's stages takes ten times as long to make.
    """
    import torch._dynamo.config as dynamo

    dynamo.recompile_limit = max(dynamo.recompile_limit, RECOMPILE_LIMIT)
    blocks = list(repeated_blocks(module))
    for block in blocks:
        buffer_drop_rates(block)
        block.compile(dynamic=False)
    return len(blocks)


def compile_teacher(network: nn.Module, name: str) -> None:
    """Have a teacher's blocks compile when they first run. Raises ConfigError for a network that repeats none."""
    if compile_blocks(network) == 0:
        raise ConfigError(
            f"teacher_compile: {name} repeats no blocks that could be compiled",
            "leave --teacher-compile out",
        )


def repeated_blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Blocks of a transformer's, a Swin's stages' or a ResNet's kind: alike, with parts of their own, two or more."""
    for child in module.children():
        if _is_repetition(child):
            yield from child.children()
        else:
            yield from repeated_blocks(child)


def _is_repetition(module: nn.Module) -> bool:
    if not isinstance(module, (nn.ModuleList, nn.Sequential)):
        return False
    parts = list(module.children())
    kinds = {type(part) for part in parts}
    return len(parts) > 1 and len(kinds) == 1 and not _holds_blocks(parts[0]) and _has_parts(parts[0])


def _has_parts(block: nn.Module) -> bool:
    """Whether a module is more than one layer: a list of linear maps is no list of blocks."""
    return any(True for _ in block.children()) and any(True for _ in block.parameters())


def _holds_blocks(module: nn.Module) -> bool:
    """Whether the blocks are further inside, as in the stages of a Swin."""
    return any(_is_repetition(part) for part in module.modules() if part is not module)
