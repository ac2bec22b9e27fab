"""An analysis along the checkpoints of runs."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from fdkit.analysis._analysis import Analysis
from fdkit.analysis._trajectory import draw
from fdkit.analysis.observe import Observed
from fdkit.config import Config
from fdkit.data.json_file import read_object
from fdkit.errors import ConfigError, DataError, NumericsError, WeightsError
from fdkit.models.libraries import WEIGHTS_FILE
from fdkit.teachers.files import read_file
from fdkit.teachers.licensing import RUN_FILE
from fdkit.teachers.run_checkpoint import damage_of, list_checkpoints, network_state, step_of
from fdkit.teachers.teacher import short_names

log = logging.getLogger("fdkit")

KEEPING = "a run keeps more of them with --train.keep-checkpoints 20 --train.save-every-steps N"


def along_checkpoints(
    analysis: ModuleType,
    runs: Sequence[Path],
    observe: Callable[[str, str], Observed],
    config: Config,
    *,
    names: Sequence[str] = (),
) -> Analysis:
    """What an analysis says of each kept checkpoint of each run, from the first to the last, and of what it handed on.

    analysis: a module as `fdkit.analysis._analysis` describes; observe: loads a MODEL (the first text) under a name
    (the second) and gives it with the images, one at a time; config: the analysis's own. names: of the runs in
    figures; left out, the last parts of their paths. The numbers are those of `fdkit.analysis._trajectory`.
    What the run handed on counts as its last step if no checkpoint of that step is kept; if it is another model than
    that checkpoint, such as the best of a fine-tuning, its scalars stand beside.
    Checkpoints that are damaged, or whose weights or numbers are not finite, are left out and said to be.
    Raises DataError for a run with fewer than two left, ConfigError for an analysis without scalars.
    """
    if not runs:
        raise ConfigError(
            "no run given to follow", "fdkit analyze trajectory RUN [RUN ...] --data PATH --of NAME"
        )
    names = list(names) or short_names([str(run) for run in runs])
    tables, followed = [], ""
    for run, name in zip(runs, names, strict=True):
        follower = _Follower(analysis, observe, config, name)
        tables.append(_follow(run, name, follower))
        followed = follower.followed
    numbers = {"analysis": "trajectory", "of": followed, "models": tables}
    return Analysis(numbers, partial(draw, numbers))


class _Follower:
    """Asks an analysis for the scalars of one model after the other."""

    def __init__(
        self,
        analysis: ModuleType,
        observe: Callable[[str, str], Observed],
        config: Config,
        name: str,
    ) -> None:
        self.analysis = analysis
        self.observe = observe
        self.config = config
        self.name = name
        self.followed = ""
        """The analysis, as its numbers call it."""

    def scalars(self, model: Path) -> dict[str, float]:
        """The scalars of the model there."""
        numbers = self.analysis.analyze([self.observe(str(model), self.name)], self.config).numbers
        self.followed = numbers["analysis"]
        found: dict[str, float] = self.analysis.scalars(numbers["models"][0])
        if not found:
            raise ConfigError(
                f"{self.followed} sums no model up in numbers, so there is nothing to follow along a run",
                "look at single checkpoints of it: RUN/checkpoints/step-00000200 is a model, too",
            )
        return found


def _follow(run: Path, name: str, follower: _Follower) -> dict[str, Any]:
    """The table of one run."""
    if not run.is_dir():
        raise DataError(f"there is no run folder {run}")
    paths = list_checkpoints(run)
    left_out = {path.name: damage for path in paths if (damage := damage_of(path)) is not None}
    sound = [path for path in paths if path.name not in left_out]
    _require_two(run, sound, left_out)
    tried = {step_of(path): _attempt(follower, path, path.name, left_out) for path in sound}
    exported = None if _is_same(run, sound[-1]) else _attempt(follower, run, WEIGHTS_FILE, left_out)
    found = {step: scalars for step, scalars in tried.items() if scalars is not None}
    last_step = _last_step(run)
    if exported is not None and last_step > max(tried):
        found[last_step], exported = exported, None
    for skipped, reason in left_out.items():
        log.warning("%s: %s is left out: %s", name, skipped, reason)
    _require_two(run, list(found), left_out)
    labels = dict.fromkeys(label for scalars in found.values() for label in scalars)
    return {
        "name": name,
        "steps": list(found),
        "scalars": {label: [scalars.get(label) for scalars in found.values()] for label in labels},
        "exported": exported,
        "left_out": left_out,
    }


def _attempt(
    follower: _Follower, model: Path, called: str, left_out: dict[str, str]
) -> dict[str, float] | None:
    """The scalars of a model, or None and why it is left out."""
    try:
        return follower.scalars(model)
    except (WeightsError, NumericsError) as error:
        left_out[called] = error.message
        return None


def _require_two(run: Path, points: Sequence[object], left_out: dict[str, str]) -> None:
    if len(points) < 2:
        reasons = "".join(f"; {name} is left out: {reason}" for name, reason in left_out.items())
        count = f"{len(points)} checkpoint{'' if len(points) == 1 else 's'}"
        raise DataError(f"{run} has {count} to follow, and two are needed{reasons}", KEEPING)


def _is_same(run: Path, last: Path) -> bool:
    """Whether there is nothing that a run handed on but its last checkpoint."""
    weights = run / WEIGHTS_FILE
    if not weights.is_file():
        return True
    own, there = read_file(weights), network_state(last)
    return own.keys() == there.keys() and all(torch.equal(own[name], there[name]) for name in own)


def _last_step(run: Path) -> int:
    """The step at which a run's state stands, by its own account; 0 if it gives none."""
    try:
        step = read_object(run / RUN_FILE).get("step")
    except (OSError, ValueError):
        return 0
    return step if type(step) is int else 0
