"""Compiling what repeats: the blocks of networks, one graph for all that are alike, and saying what became of it.

A block compiles in seconds where a whole network takes minutes, and serves every block like it. What surrounds the
blocks, such as losses and what processes exchange, stays as it is. Limits that the compiler keeps to itself are said.
"""

import logging
from typing import Any

import torch

from fdkit.methods._method import Method
from fdkit.models.backbone import Backbone
from fdkit.models.regions import compile_blocks
from fdkit.models.regions import repeated_blocks as repeated_blocks
from fdkit.models.stochastic_depth import buffer_drop_rates
from fdkit.training.run import Run

log = logging.getLogger("fdkit")


def compile_regions(method: Method) -> int:
    """Have the repeated blocks of a method's networks compile when they first run; how many blocks that are.

    Networks that repeat none are compiled whole. Before data-parallel wrapping. Drop paths keep their distribution and
    draw other random numbers.
    """
    import torch._dynamo.config as dynamo

    without = [part.network for part in method.modules() if isinstance(part, Backbone) and _has_none(part)]
    dynamo.optimize_ddp = False  # which would cut graphs that are smaller than a bucket already
    for network in without:
        buffer_drop_rates(network)
        network.compile()
    return compile_blocks(method) + len(without)


def _has_none(backbone: Backbone) -> bool:
    return next(repeated_blocks(backbone), None) is None


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


class Compilations:
    """What the compiler makes of a run's blocks from here on, and what it does not: said once."""

    def __init__(self, run: Run, *, is_wanted: bool) -> None:
        self._run = run
        self._is_wanted = is_wanted
        self._told = False
        forget_compilations()

    def tell(self) -> None:
        """Write it into run.json, and warn of what was not compiled, at the first call."""
        if self._told:
            return
        self._told = True
        facts = compilation_facts()
        if facts["graphs"] or facts["limit_hit"] or self._is_wanted:  # or of a teacher alone
            self._run.update(compile=facts)
        if self._run.writes:
            warn_of_compilation(facts)


def warn_of_compilation(facts: dict[str, Any]) -> None:
    """Say what kept the compiler from compiling, since it does not."""
    if facts["limit_hit"]:
        log.warning(
            "torch.compile: the limit of %d graphs for one function was hit, so some blocks run uncompiled; fewer "
            "image sizes and drop rates make fewer graphs",
            torch._dynamo.config.recompile_limit,
        )
    if facts["graph_breaks"]:
        reasons = "; ".join(f"{reason} ({count} times)" for reason, count in facts["graph_breaks"].items())
        log.warning("torch.compile: parts of the blocks run uncompiled: %s", reasons)
