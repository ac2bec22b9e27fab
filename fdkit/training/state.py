"""All that a run needs to go on: the method, its optimiser and the random generators, into a checkpoint and back."""

import logging
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from fdkit.errors import ConfigError, WeightsError
from fdkit.methods._method import Method
from fdkit.teachers.shards import Rows
from fdkit.training.bad_steps import first_damage
from fdkit.training.checkpoint import Checkpoint, load_checkpoint, newest_sound, save_checkpoint, save_parts
from fdkit.training.distributed import World, broadcast, gather
from fdkit.training.generators import get_generators, set_generators
from fdkit.training.optimizer import load_optimizer_tensors, optimizer_tensors, trained_parameters
from fdkit.training.run import Run
from fdkit.training.sharding import BY_ELEMENT, Shards, rows_of

log = logging.getLogger("fdkit")


_OF_ANOTHER = "resume with the configuration it was written with, or choose another --output"


class TrainingState:
    """What changes while a method trains, but for what the loop itself counts.

    shards: what lies in slices on the processes; None if every process holds all.
    """

    def __init__(
        self, method: Method, optimizer: Optimizer, shards: Shards | None, world: World, device: torch.device
    ) -> None:
        self.method = method
        self.optimizer = optimizer
        self.shards = shards
        self.world = world
        self.device = device

    def save(self, run: Run, step: int, state: dict[str, Any], *, keep: int, keep_also: str) -> None:
        """Write the checkpoint of a step; every process calls this, and what rank 0 calls `state` is kept."""
        generators = gather(get_generators(self.device), self.world)
        tensors = self._tensors()
        if self.world.is_main:
            run.sync_metrics()
            tensors["generators"] = {
                f"rank{rank}.{name}": value
                for rank, states in enumerate(generators)
                for name, value in states.items()
            }
        content = Checkpoint(tensors, state)
        if self.shards is not None:
            tensors.setdefault("generators", {})
            save_parts(
                run.checkpoints, step, content, self.rows(), self.world, keep=keep, keep_also=keep_also
            )
        elif self.world.is_main:
            save_checkpoint(run.checkpoints, step, content, keep=keep, keep_also=keep_also)

    def damage(self) -> str:
        """What of the method or its optimiser is not finite, by name; "" if all is. Every process calls this.

        Losses show only what they are made of: a running mean, a second moment or an average of the weights may hold
        infinity while all losses are finite.
        """
        groups = self._tensors()
        names = {id(one): name for name, one in self.method.named_parameters()}
        trained = [names.get(id(one), "") for one in trained_parameters(self.optimizer)]
        tensors = dict(groups["model"])
        for key, value in groups["optimizer"].items():
            kind, index, what = key.split(".", 2)
            of = trained[int(index)] if kind == "state" else "a group"
            tensors[f"the optimiser's {what} of {of or f'parameter {index}'}"] = value
        return first_damage(tensors, self.world, self.device)

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        """What is saved but for the generators; shares memory with what trains."""
        return {"model": _here(self.method.state_dict()), "optimizer": optimizer_tensors(self.optimizer)}

    def restore(self, run: Run, *, seed: int, data: str) -> tuple[dict[str, Any], str] | None:
        """Put back the run's newest sound checkpoint; its state and name, None if there is none.

        Raises ConfigError for one of another seed or other images, WeightsError for one of another method and for one
        that holds NaN or infinity.
        """
        newest = newest_sound(run.checkpoints) if self.world.is_main and run.resumed else None
        path = broadcast(newest, self.world)
        if path is None:
            return None
        tensors, state = load_checkpoint(path, self.rows())
        if (state["seed"], state["data"]) != (seed, data):
            raise ConfigError(
                f"{path}: written with another seed or other images than this run's",
                "resume with those it was written with, or choose another --output",
            )
        self._load_model(tensors["model"], origin=str(path))
        load_optimizer_tensors(self.optimizer, tensors["optimizer"])
        num_processes = len(state["windows"])
        if num_processes == self.world.size:
            prefix = f"rank{self.world.rank}."
            saved = tensors["generators"].items()
            own = {name.removeprefix(prefix): value for name, value in saved if name.startswith(prefix)}
            set_generators(own, self.device)
        else:
            counts = (num_processes, self.world.size)
            log.info("saved by %d processes, resumed by %d: the same images, not the same bits", *counts)
        return state, path.name

    def rows(self) -> dict[str, dict[str, Rows]]:
        """Of all that lies in slices, which rows are here; by group and name as in a checkpoint."""
        if self.shards is None:
            return {}
        cut = {
            name: rows_of(one, self.world)
            for name, one in self.method.state_dict().items()
            if isinstance(one, DTensor)
        }
        own = self.shards.rows_of_slices()
        moved = {
            index: own[id(one)]
            for index, one in enumerate(trained_parameters(self.optimizer))
            if id(one) in own
        }
        return {
            "model": cut,
            "optimizer": {
                f"state.{index}.{key}": rows
                for index, rows in moved.items()
                for key in BY_ELEMENT[type(self.optimizer)]
            },
        }

    def _load_model(self, tensors: dict[str, Tensor], *, origin: str) -> None:
        if self.shards is None:
            try:
                self.method.load_state_dict(tensors)
            except RuntimeError as error:
                raise WeightsError(f"{origin}: does not fit this method: {error}", _OF_ANOTHER) from error
            return
        own = _here(self.method.state_dict())
        odd = sorted(own.keys() ^ tensors.keys()) or [
            name for name, value in own.items() if value.shape != tensors[name].shape
        ]
        if odd:
            raise WeightsError(f"{origin}: does not fit this method: {', '.join(odd[:5])}", _OF_ANOTHER)
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(tensors[name])


def _here(state: dict[str, Any]) -> dict[str, Tensor]:
    """What lies on this process of a state dict; shares memory with it."""
    return {name: one.to_local() if isinstance(one, DTensor) else one for name, one in state.items()}
