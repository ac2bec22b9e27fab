"""Compiling what repeats: the blocks of networks, one graph for all that are alike, and saying what became of it.

A block compiles in seconds where a whole network takes minutes, and serves every block like it. What surrounds the
blocks, such as losses and what processes exchange, stays as it is. Limits that the compiler keeps to itself are said.
"""

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fdkit.methods._method import Method
from fdkit.models.backbone import Backbone
from fdkit.models.stochastic_depth import buffer_drop_rates

log = logging.getLogger("fdkit")

RECOMPILE_LIMIT = 64
"""Graphs of one function before the compiler gives up on it, 8 by its own default: a Swin has one for every stage,
shifted or not, dropping or not, and training and evaluation each have theirs."""


def compile_regions(method: Method) -> int:
    """Have the repeated blocks of a method's networks compile when they first run; how many blocks that are.

    Networks that repeat none are compiled whole. Before data-parallel wrapping. Drop paths keep their distribution and
    draw other random numbers.
    """
    import torch._dynamo.config as dynamo

    blocks = list(repeated_blocks(method))
    blocks += [part.network for part in method.modules() if isinstance(part, Backbone) and _has_none(part)]
    dynamo.recompile_limit = max(dynamo.recompile_limit, RECOMPILE_LIMIT)
    dynamo.optimize_ddp = False  # which would cut graphs that are smaller than a bucket already
    for block in blocks:
        buffer_drop_rates(block)
        block.compile()
    return len(blocks)


def _has_none(backbone: Backbone) -> bool:
    return next(repeated_blocks(backbone), None) is None


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


def forget_compilations() -> None:
    """Count from here on: what was compiled before, of other models, is no concern of this run."""
    from torch._dynamo.utils import counters

    counters.clear()


def compilation_facts() -> dict[str, Any]:
    """What the compiler did since `forget_compilations`: graphs made, graph breaks, and whether a limit was hit."""
    from torch._dynamo.utils import counters

    breaks: dict[str, int] = {}
    limit_hit = bool(counters.get("recompile_limit"))
    for kind in ("graph_break", "unimplemented"):
        for reason, count in counters.get(kind, {}).items():
            first = str(reason).strip().splitlines()[0]
            if "recompile limit" in first or "recompile_limit" in first:
                limit_hit = True
            else:
                breaks[first] = breaks.get(first, 0) + int(count)
    graphs = int(counters["stats"].get("unique_graphs", 0)) if "stats" in counters else 0
    return {"graphs": graphs, "graph_breaks": breaks, "limit_hit": limit_hit}


def warn_of_compilation(facts: dict[str, Any]) -> None:
    """Say what kept the compiler from compiling, since it does not."""
    if facts["limit_hit"]:
        log.warning(
            "train.compile: the compiler's limit of %d graphs for one function was hit, so some blocks run uncompiled; "
            "fewer image sizes and drop rates make fewer graphs, --train.no-compile none",
            torch._dynamo.config.recompile_limit,
        )
    if facts["graph_breaks"]:
        reasons = "; ".join(f"{reason} ({count} times)" for reason, count in facts["graph_breaks"].items())
        log.warning("train.compile: parts of the blocks run uncompiled: %s", reasons)
