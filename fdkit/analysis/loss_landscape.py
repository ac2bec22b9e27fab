"""How wide the valley is in which a model's weights lie: the loss along directions of weight space.

A model whose loss stays low when its weights are moved is said to lie in a flat minimum. Directions are drawn at random
and scaled filter by filter, so that models of other scale compare; or they are the two along which a training moved
most. Feature distillation is known to make the landscape of the fine-tuned model flatter.
Source: Li et al. 2018 (arXiv 1712.09913); Wei et al. 2022 (arXiv 2205.14141), section 4.
"""

import hashlib
import logging
import math
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path as FilePath
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fdkit.analysis._analysis import Analysis
from fdkit.analysis._directions import Path, axis, principal_path, random_direction, span, walk
from fdkit.analysis._features import need_models
from fdkit.analysis._landscape_figure import draw
from fdkit.analysis._objective import Objective, Readout, make_objective
from fdkit.analysis._sharpness import Sharpness, hessian_product, largest_eigenvalue
from fdkit.analysis.observe import Observed, evaluating
from fdkit.config import Config
from fdkit.errors import ConfigError, DataError, NumericsError
from fdkit.models.backbone import Pooling
from fdkit.teachers.run_checkpoint import (
    checkpoint_at,
    damage_of,
    list_checkpoints,
    network_state,
    step_of,
)

__all__ = ["NEEDS_HEAD", "READING", "LossLandscapeConfig", "analyze", "draw", "scalars", "summary"]

log = logging.getLogger("fdkit")

NEEDS_HEAD = True
"""Models are to be loaded with their classifier, where they have one."""
READING = (
    "The middle is the model as it is, and the distance from it how far all its filters are moved: a line or a hollow "
    "that stays low far out is a wide, flat valley, and one that rises at once a narrow one."
)
RESOLUTIONS = {1: 21, 2: 11}
"""Points an axis, for a line and for a plane."""


class LossLandscapeConfig(Config):
    """Which way the weights are moved, and on what images the loss is measured."""

    dimensions: Literal[1, 2] = 1
    """1: the loss along a line; 2: on a plane, which takes resolution times as long."""
    directions: Literal["random", "trajectory"] = "random"
    """random: Gaussian, each filter scaled to the length of the model's own (Li et al. 2018), the same draw for all
    models; trajectory: the two principal components of the weights along a run's checkpoints, for --dimensions 2."""
    extent: float = Field(default=1.0, gt=0)
    """How far random directions are followed to either side; at 1 every filter has been moved by its own length."""
    resolution: int | None = Field(default=None, ge=3)
    """Points on each axis; left out, 21 on a line and 11 on a plane. A model costs that many passes over the images
    (on a plane, its square): ViT-Tiny on 64 images about 3 seconds a pass on one CPU core."""
    tables: bool = False
    """Random directions also move tokens and position tables, row by row; else these stay, like norms and biases."""
    readout: Readout = "head"
    """Whose classes the loss is of: head, the model's own classifier, which must know the data's classes; probe, a
    logistic regression on its frozen features, fitted on other images of the data, that stays as it is."""
    pooling: Pooling = "patches"
    """What a probe reads: patches, the mean of the patch tokens, or cls, the class token."""
    num_images: int = Field(default=64, ge=1)
    """Labelled images the loss is measured on, equally many of each class; kept in memory, 0.6 MB each at 224 px."""
    num_fit_images: int = Field(default=128, ge=2)
    """Further images a probe is fitted on."""
    batch_size: int = Field(default=32, ge=1)
    """Images a forward pass."""
    sharpness: bool = False
    """Also find the largest eigenvalue of the loss's Hessian: some 10 to 30 products with it, each of which costs about
    12 forward passes of all images (ViT-Tiny on 64: 25 s on one core) and, with its batch of 32, 4 GB. Of the weights
    as they are: unlike the landscape it grows where weights are scaled down, so it follows one training better than it
    compares two (Dinh et al. 2017, arXiv 1703.04933)."""
    max_products: int = Field(default=30, ge=1)
    """Products with the Hessian, at most; the weights are held once more for each."""
    tolerance: float = Field(default=0.05, gt=0)
    """Relative residual at which the eigenvalue counts as found; its own error is smaller by far."""
    seed: int = 0
    """Of random directions and of the start of the search for the eigenvalue."""

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        is_path, other = self.directions == "trajectory", LossLandscapeConfig.model_fields
        if is_path and self.dimensions == 1:
            raise ConfigError("directions trajectory spans a plane", "use --dimensions 2")
        unused = {
            "directions trajectory": ("extent", "tables") if is_path else (),
            "readout head": ("pooling", "num_fit_images") if self.readout == "head" else (),
            "sharpness false": () if self.sharpness else ("max_products", "tolerance"),
        }
        for reason, names in unused.items():
            for name in names:
                if getattr(self, name) != other[name].default:
                    raise ConfigError(
                        f"{name} {getattr(self, name)} has no effect with {reason}", "leave it out"
                    )
        return self

    @property
    def points(self) -> int:
        """Points on each axis."""
        return self.resolution or RESOLUTIONS[self.dimensions]


def analyze(observed: Sequence[Observed], config: LossLandscapeConfig) -> Analysis:
    """Loss and accuracy of every model with its weights moved along one direction, or two, on the same images.

    The numbers hold, for each model, "loss" (mean cross-entropy in nats) and "accuracy" (a fraction), as a list along
    "x" or, on a plane, as a list for each of "y" of a list along "x"; null where a loss is not finite. "x" and "y" are
    multiples of the random directions, or distances of weights along the path's components. "centre" is at the weights
    themselves. Beside them stand what the loss is of ("readout", "num_images", "num_classes", for a probe "pooling" and
    "num_fit_images"), "num_parameters" that the loss depends on and "num_moved" of them; with sharpness "sharpness";
    for a trajectory "path" (a list each of "steps", "x", "y", "distance", also outside the plane, "loss" and "accuracy"
    of the weights at that step, with the running statistics of the model itself; "explained", shares of variance;
    "left_out", damaged checkpoints). "same_directions" says whether all models were moved alike.
    The weights are put back to the bit. Held in memory: the images, and the weights once more and once a direction; for
    a trajectory once a checkpoint, for sharpness once a product.
    Raises ConfigError for a model without the classifier asked for, DataError for too few labelled images or
    checkpoints, NumericsError if the loss of the model as it is is not finite.
    """
    need_models(observed, "loss-landscape")
    models = [_measure(one, config) for one in observed]
    drawn = {model.pop("draw") for model in models}
    numbers = {
        "analysis": "loss-landscape",
        "dimensions": config.dimensions,
        "directions": config.directions,
        "seed": config.seed,
        "tables": config.tables,
        "same_directions": config.directions == "random" and len(drawn) == 1,
        "models": models,
    }
    return Analysis(numbers, partial(draw, numbers))


def _measure(observed: Observed, config: LossLandscapeConfig) -> dict[str, Any]:
    """The table of one model; "draw" is a digest of what its random directions hang on."""
    objective = make_objective(
        observed,
        readout=config.readout,
        pooling=config.pooling,
        num_images=config.num_images,
        num_fit_images=config.num_fit_images,
        batch_size=config.batch_size,
    )
    with evaluating(objective.backbone):
        loss, accuracy = objective.measure()
        if not math.isfinite(loss):
            raise NumericsError(
                f"the loss of {observed.name} is {loss} before any weight is moved",
                "its weights may be damaged",
            )
        parameters = objective.parameters()
        surface = _on_path if config.directions == "trajectory" else _at_random
        found = surface(observed, objective, parameters, config)
        sharpness = _sharpness(objective, parameters, config) if config.sharpness else None
    shapes = sorted((name, tuple(weights.shape)) for name, weights in parameters.items() if weights.ndim > 1)
    return {
        "name": observed.name,
        **objective.about,
        "num_parameters": sum(weights.numel() for weights in parameters.values()),
        "centre": {"loss": loss, "accuracy": accuracy},
        **found,
        **({} if sharpness is None else {"sharpness": sharpness._asdict()}),
        "draw": hashlib.sha256(str(shapes).encode()).hexdigest(),
    }


def _at_random(
    observed: Observed, objective: Objective, parameters: dict[str, Tensor], config: LossLandscapeConfig
) -> dict[str, Any]:
    directions = [
        random_direction(parameters, seed=config.seed, number=number, tables=config.tables)
        for number in range(config.dimensions)
    ]
    steps = axis(config.extent, config.points)
    num_moved = sum(parameters[name].numel() for name in directions[0])
    if config.dimensions == 1:
        found = walk(parameters, directions, [(step,) for step in steps], objective.measure)
        return {"num_moved": num_moved, "x": steps} | _columns(found)
    return {"num_moved": num_moved} | _on_plane(objective, parameters, directions, steps, steps)


def _on_plane(
    objective: Objective,
    parameters: dict[str, Tensor],
    directions: Sequence[dict[str, Tensor]],
    across: list[float],
    up: list[float],
) -> dict[str, Any]:
    found = walk(parameters, directions, [(x, y) for y, x in product(up, across)], objective.measure)
    columns = _columns(found)
    width = len(across)
    rows = {
        key: [values[start : start + width] for start in range(0, len(values), width)]
        for key, values in columns.items()
    }
    return {"x": across, "y": up, **rows}


def _columns(found: Sequence[tuple[float, float]]) -> dict[str, list[Any]]:
    """Losses, null where not finite, and accuracies."""
    return {
        "loss": [loss if math.isfinite(loss) else None for loss, _ in found],
        "accuracy": [accuracy for _, accuracy in found],
    }


def _on_path(
    observed: Observed, objective: Objective, parameters: dict[str, Tensor], config: LossLandscapeConfig
) -> dict[str, Any]:
    kept, left_out = _checkpoints(observed)
    stops = [_stop(path, parameters) for path in kept]
    path = principal_path(stops, parameters)
    found = [walk(parameters, [_way(stop, parameters)], [(1.0,)], objective.measure)[0] for stop in stops]
    (across, up) = (span(path.places[:, axis].tolist(), config.points) for axis in (0, 1))
    return {
        "num_moved": sum(weights.numel() for weights in parameters.values()),
        **_on_plane(objective, parameters, path.directions, across, up),
        "path": {**_described(path, kept), **_columns(found), "left_out": left_out},
    }


def _way(stop: dict[str, Tensor], parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """From the end to a stop, in one step."""
    return {name: stop[name].to(weights) - weights.detach() for name, weights in parameters.items()}


def _described(path: Path, kept: Sequence[FilePath]) -> dict[str, Any]:
    return {
        "steps": [step_of(one) for one in kept],
        "x": path.places[:, 0].tolist(),
        "y": path.places[:, 1].tolist(),
        "distance": path.distances.tolist(),
        "explained": list(path.explained),
    }


def _checkpoints(observed: Observed) -> tuple[list[FilePath], list[str]]:
    """The sound checkpoints of the run a model is of, first step first, and the names of damaged ones."""
    source = FilePath(getattr(observed.model, "source", ""))
    at = checkpoint_at(source)
    run = source if at is None else at.parent.parent
    paths = list_checkpoints(run) if source.name else []
    if not paths:
        raise DataError(
            f"{observed.name} is no run folder with checkpoints, so there is no trajectory",
            "give the folder of a run trained with --train.keep-checkpoints and --train.save-every-steps",
        )
    damaged = {path.name: damage for path in paths if (damage := damage_of(path)) is not None}
    for name, damage in damaged.items():
        log.warning("%s: checkpoint %s is left out: %s", observed.name, name, damage)
    return [path for path in paths if path.name not in damaged], sorted(damaged)


def _stop(path: FilePath, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint's values of the parameters."""
    state = network_state(path)
    for name, weights in parameters.items():
        if name not in state or state[name].shape != weights.shape:
            raise ConfigError(
                f"{path} has no {name} of {tuple(weights.shape)}, as the model observed has",
                "leave out --image-size and --checkpoint-key",
            )
    return {name: state[name] for name in parameters}


def _sharpness(objective: Objective, parameters: dict[str, Tensor], config: LossLandscapeConfig) -> Sharpness:
    free = {name: weights.detach().requires_grad_() for name, weights in parameters.items()}
    multiply = hessian_product(lambda: objective.losses(free), free)
    generator = torch.Generator().manual_seed(config.seed)
    some = next(iter(free.values()))
    start = torch.randn(sum(weights.numel() for weights in free.values()), generator=generator)
    found = largest_eigenvalue(
        multiply,
        start.to(some.device, some.dtype),
        tolerance=config.tolerance,
        max_products=config.max_products,
    )
    if not found.converged:
        log.warning(
            "the largest eigenvalue of the Hessian is at least %.4g; after %d products the residual is %.1g of it",
            *(found.value, found.products, found.residual),
        )
    return found


def _rise(model: dict[str, Any]) -> float | None:
    """The loss above that of the model as it is, on average over the grid; None where one is not finite."""
    rows = model["loss"] if isinstance(model["loss"][0], list) else [model["loss"]]
    losses = [loss for row in rows for loss in row]
    if None in losses:
        return None
    return float(sum(losses) / len(losses) - model["centre"]["loss"])


def scalars(model: dict[str, Any]) -> dict[str, float]:
    """Loss and accuracy as it is, the mean rise of the loss over random directions, and the largest eigenvalue."""
    found = {"loss (nats)": model["centre"]["loss"], "accuracy (%)": 100 * model["centre"]["accuracy"]}
    rise = None if "path" in model else _rise(model)
    if rise is not None:
        found["mean rise of loss (nats)"] = rise
    if "sharpness" in model:
        found["largest Hessian eigenvalue"] = model["sharpness"]["value"]
    return found


def summary(numbers: dict[str, Any]) -> tuple[str, list[list[str]]]:
    """A table for people: its title, and its rows, the header first; a row a model."""
    is_path = numbers["directions"] == "trajectory"
    measured = any("sharpness" in model for model in numbers["models"])
    header = ["model", "loss of", "images", "loss", "accuracy"]
    header += ["variance in plane"] if is_path else ["mean rise", "at the rim"]
    header += ["largest eigenvalue"] if measured else []
    rows = [_row(model, is_path=is_path, measured=measured) for model in numbers["models"]]
    return f"{numbers['analysis']}, {_moved_along(numbers)}, loss in nats", [header, *rows]


def _moved_along(numbers: dict[str, Any]) -> str:
    if numbers["directions"] == "trajectory":
        return "plane of each training's path"
    if len(numbers["models"]) == 1 or numbers["same_directions"]:
        return "same random directions for all" if len(numbers["models"]) > 1 else "random directions"
    return "different networks: directions of one seed, not the same ones"


def _row(model: dict[str, Any], *, is_path: bool, measured: bool) -> list[str]:
    centre, readout = model["centre"], model["readout"]
    row = [model["name"], "own head" if readout == "head" else "probe", str(model["num_images"])]
    row += [f"{centre['loss']:.3f}", f"{100 * centre['accuracy']:.1f} %"]
    if is_path:
        row.append(f"{100 * sum(model['path']['explained']):.0f} %")
    else:
        rise = _rise(model)
        row += ["not finite" if rise is None else f"{rise:.3f}", _at_the_rim(model)]
    if measured:
        found = model.get("sharpness")
        row.append(
            "" if found is None else ("" if found["converged"] else "at least ") + f"{found['value']:.3g}"
        )
    return row


def _at_the_rim(model: dict[str, Any]) -> str:
    """The smallest and the largest loss at the rim of what was measured."""
    loss = model["loss"]
    if isinstance(loss[0], list):
        rim = [*loss[0], *loss[-1], *(row[0] for row in loss), *(row[-1] for row in loss)]
    else:
        rim = [loss[0], loss[-1]]
    finite = [one for one in rim if one is not None]
    return f"{min(finite):.2f} to {max(finite):.2f}" if finite else "not finite"
