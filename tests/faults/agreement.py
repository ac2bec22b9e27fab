"""Whether runs that should be alike are: in bf16 and fp32 within bounds, and with the same seed to the bit.

Small networks of every method train for thirty steps on the same batches. Compared are the curve of the loss, that of
the gradient's norm, and the direction in which all weights moved.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from faults.children import rows_of, run
from faults.jobs import distill, finetune, pretrain, segment
from torch import Tensor

from fdkit.config import find_recipe, read_yaml

STEPS = 30
QUIET = ["--monitor.every-epochs", "0", "--train.log-every-steps", "1", "--train.save-every-steps", "1000"]
RATES = {"lars": 1.0, "larc": 1.0, "sgd": 0.03, "adamw": 1e-3}
"""Learning rates at which thirty steps move the weights well away from their start."""


class Curves(NamedTuple):
    """A run, by its numbers."""

    loss: np.ndarray
    """(steps,)"""
    norm: np.ndarray
    """(steps,) of the gradient, before clipping."""
    moved: torch.Tensor
    """(P,) what all steps together changed in the trained weights."""
    followers: torch.Tensor
    """(Q,) the same of all other weights, such as networks that follow the student; empty where there are none."""


class Difference(NamedTuple):
    """How far two runs are apart."""

    loss: float
    """Mean over steps of the difference, as a share of the mean size."""
    norm: float
    """Median over steps of the difference, as a share of the first run's."""
    angle: float
    """1 - cosine of what the weights moved by."""
    followers: float
    """The same of networks that follow the student; 0 where there is none."""


class Way(NamedTuple):
    """A way of training."""

    name: str
    arguments: Callable[[Path], list[str]]
    """A short command, given its run folder."""


def ways() -> list[Way]:
    """A short command of every way of training."""
    from fdkit.commands.pretrain import choices

    epochs = ["--train.batch-size", "32", "--train.epochs", f"{STEPS / 42:.4f}"]

    def plain(name: str, arguments: list[str], optimiser: str = "adamw") -> Way:
        rate = ["--optim.lr-reference-batch", "None", "--optim.lr", str(RATES[optimiser])]
        rate += ["--optim.warmup-epochs", "0.1", "--optim.warmup-lr", "0", "--optim.min-lr", "0"]
        looks = ["--monitor.collapse-every-epochs", "0"]
        whole = [*arguments, *QUIET, *epochs, *rate, *looks]
        return Way(name, lambda folder: [*whole, "--output", str(folder)])

    def own(method: str) -> str:
        recipe: Any = read_yaml(find_recipe(method, "pretrain"))
        return str(recipe["optim"]["name"])

    return [
        plain("distill", distill()),
        *(plain(method, pretrain(method), own(method)) for method in choices()),
        plain("finetune", [*finetune(), "--validate-every-epochs", "0"]),
        Way("segment", lambda folder: [*segment().commands(folder)[0], *QUIET, "--train.epochs", "10"]),
    ]


def curves(
    way: Way, folder: Path, *, seed: int, precision: str, prepare: Callable[[], object] = lambda: None
) -> Curves:
    """Train a way and read its curves. prepare: called in the run's process first."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    moves = folder / "moves.pt"

    def watched() -> None:
        prepare()
        _keep_moves(moves)

    arguments = [*way.arguments(folder / "run"), "--seed", str(seed), "--train.precision", precision]
    end = run(arguments, folder / "log", prepare=watched)
    assert end.code == 0, f"{way.name} in {precision}: exit code {end.code}: {end.words}"
    rows = rows_of(folder / "run")
    loss, norm = (np.array([row[name] for row in rows]) for name in ("loss", "grad_norm"))
    assert len(rows) == STEPS, f"{way.name}: {len(rows)} steps"
    kept = torch.load(moves)
    shutil.rmtree(folder / "run")
    return Curves(loss, norm, kept["moved"], kept["followers"])


def _keep_moves(path: Path) -> None:
    """Save what a run's steps changed in all, beside its folder."""
    from fdkit.training.loop import Trainer

    run_steps = Trainer.run_steps

    def flat(tensors: list[Tensor]) -> Tensor:
        return torch.cat([one.detach().flatten().clone() for one in tensors]) if tensors else torch.zeros(0)

    def watched(self: Any, *arguments: Any) -> None:
        trained = {id(one) for one in self.parameters}
        others = [one for one in self.method.parameters() if id(one) not in trained]
        before = flat(self.parameters), flat(others)
        run_steps(self, *arguments)
        moves = flat(self.parameters) - before[0], flat(others) - before[1]
        torch.save({"moved": moves[0], "followers": moves[1]}, path)

    Trainer.run_steps = watched  # type: ignore[method-assign]


def difference(one: Curves, other: Curves) -> Difference:
    """How far the other run is from the first."""

    def angle(a: Tensor, b: Tensor) -> float:
        if a.shape != b.shape:  # of numbers that moved in one of them alone
            return 1.0
        if not a.any() and not b.any():
            return 0.0
        return 1 - float(torch.cosine_similarity(a.double(), b.double(), dim=0))

    return Difference(
        loss=float(np.abs(one.loss - other.loss).mean() / np.abs(one.loss).mean()),
        norm=float(np.median(np.abs(one.norm - other.norm) / one.norm)),
        angle=angle(one.moved, other.moved),
        followers=angle(one.followers, other.followers),
    )


# -- versions that are wrong on purpose


def losses_in_bf16() -> None:
    """What losses, softmaxes and norms are made of is computed in bf16."""
    functions = (
        "smooth_l1_loss",
        "cross_entropy",
        "log_softmax",
        "layer_norm",
        "normalize",
        "cosine_similarity",
    )
    for owner, names in ((F, functions), (Tensor, ("softmax", "log_softmax", "square"))):
        for name in names:
            setattr(owner, name, _coarse(getattr(owner, name)))


def _coarse(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def computed(*arguments: Any, **options: Any) -> Tensor:
        def coarse(value: Any) -> Any:
            return value.bfloat16() if isinstance(value, Tensor) and value.is_floating_point() else value

        with torch.autocast("cpu", enabled=False):
            options = {name: coarse(value) for name, value in options.items()}
            return function(*map(coarse, arguments), **options).to(arguments[0].dtype)

    return computed


def weights_in_bf16() -> None:
    """Weights keep no more digits than bf16 has, so that small updates are lost."""
    from fdkit.training.loop import Trainer

    update = Trainer.update

    def rounded(self: Any, batch: Any) -> Any:
        verdicts = update(self, batch)
        with torch.no_grad():
            for one in self.parameters:
                one.copy_(one.bfloat16())
        return verdicts

    Trainer.update = rounded  # type: ignore[method-assign]


def copies_in_bf16() -> None:
    """Networks that follow the student keep no more digits than bf16 has."""
    from fdkit.training.loop import Trainer

    update = Trainer.update

    def rounded(self: Any, batch: Any) -> Any:
        verdicts = update(self, batch)
        trained = {id(one) for one in self.parameters}
        with torch.no_grad():
            for one in self.method.parameters():
                if id(one) not in trained:
                    one.copy_(one.bfloat16())
        return verdicts

    Trainer.update = rounded  # type: ignore[method-assign]


WRONG: dict[str, Callable[[], None]] = {
    "losses in bf16": losses_in_bf16,
    "weights in bf16": weights_in_bf16,
    "copies in bf16": copies_in_bf16,
}
