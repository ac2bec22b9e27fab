"""The student of a run folder, finished or as it was at one of its checkpoints, as a teacher."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fdkit.errors import ConfigError, WeightsError
from fdkit.models.backbone import Backbone
from fdkit.models.libraries import RECIPE_FILE, WEIGHTS_FILE, build_backbone, check_state, read_recipe
from fdkit.teachers.checkpoint_file import load_reading
from fdkit.teachers.files import read_file, sha256_of
from fdkit.teachers.licensing import RUN_FILE, terms_of_run
from fdkit.teachers.official import Change, Network, Reading
from fdkit.teachers.official import positions as resample
from fdkit.teachers.official._plain_vit import fixed_positions
from fdkit.teachers.official.bias_tables import geometric_bias
from fdkit.teachers.request import Loaded, Request
from fdkit.teachers.run_checkpoint import (
    CHECKPOINTS,
    list_checkpoints,
    names_of,
    network_state,
    require_sound,
    weights_file,
)
from fdkit.teachers.weights import State, check_finite

EXPORTED = "exported"
"""What run.json calls the SHA-256 of the files that a run hands on, by name."""


def load_run(folder: Path, request: Request) -> Loaded:
    """The network of student.json with the weights beside it, under the terms its own teachers hand on.

    At another image size, bias tables are resampled as the Feature-Distillation code does, absolute positions as timm
    does, and fixed ones are made anew; a Swin takes its own size alone.
    Raises WeightsError for a folder that is none, ConfigError for an architecture or a size it does not take.
    """
    weights = folder / WEIGHTS_FILE
    if not weights.is_file():
        raise WeightsError(
            f"{folder} holds no {WEIGHTS_FILE}: it is not the folder of a finished run", _other_models(folder)
        )
    require_as_exported(folder, (WEIGHTS_FILE, RECIPE_FILE))
    backbone = _build(folder, read_file(weights), request, source=str(weights))
    return _under_terms(backbone, folder, folder, weights)


def load_checkpoint(path: Path, request: Request) -> Loaded:
    """The network of a run as it was at a checkpoint; sizes and terms as for `load_run`.

    That is the network the finished run hands on: the teacher of DINO and EsViT, the moving average of a fine-tuned
    model that has one, else the student; `checkpoint_key` names another one. A run of `fdkit finetune --keep-best`
    hands on the weights of its best validation, which may be another checkpoint than the last.
    Raises WeightsError for a checkpoint that is not there, damaged, or of a run without student.json.
    """
    require_sound(path)
    run = path.absolute().parent.parent
    if not (run / RECIPE_FILE).is_file():
        raise WeightsError(
            f"{run} has no {RECIPE_FILE} yet, which says what network its checkpoints are of",
            f"it is written when the run is done: continue it with --resume --output {run}",
        )
    state = network_state(path, request.checkpoint_key)
    backbone = _build(run, state, request, source=str(path))
    return _under_terms(backbone, path, run, weights_file(path))


def require_as_exported(folder: Path, names: Sequence[str]) -> None:
    """Raises WeightsError for a file that is not what the run wrote, by the SHA-256 in its run.json, if it has one."""
    try:
        stated = json.loads((folder / RUN_FILE).read_bytes()).get(EXPORTED) or {}
        wanted = {name: str(stated[name]) for name in names if name in stated}
    except FileNotFoundError:
        return
    except (OSError, ValueError, RecursionError, AttributeError, TypeError) as error:
        raise WeightsError(
            f"{folder / RUN_FILE}: cannot be read: {error}",
            "put the run's own run.json back, or remove the file: then the weights are taken as they are",
        ) from error
    for name, sha256 in wanted.items():
        if (folder / name).exists() and sha256_of(folder / name) != sha256:
            raise WeightsError(
                f"{folder / name}: damaged, or not what the run wrote: its SHA-256 is not the one in {RUN_FILE}",
                f"write it again: the run's own command with --resume; if it was changed on purpose, "
                f"remove {EXPORTED} from {RUN_FILE}",
            )


def _other_models(folder: Path) -> str:
    """What could have been meant by a folder that holds no finished run, or what is to be done."""
    run = folder.absolute().parent if folder.name == CHECKPOINTS else folder
    if not list_checkpoints(run):
        return "give a run folder, one of its checkpoints, or a file of weights"
    if not (run / RECIPE_FILE).is_file():
        return f"it has checkpoints ({names_of(run)}): continue it with --resume --output {run}"
    return f"name one of its checkpoints, such as {list_checkpoints(run)[-1]}; there are {names_of(run)}"


def _under_terms(backbone: Backbone, source: Path, run: Path, weights: Path) -> Loaded:
    terms = terms_of_run(run)
    return Loaded(backbone, str(source.absolute()), terms.license, sha256_of(weights), terms.is_noncommercial)


def _build(run: Path, state: State, request: Request, *, source: str) -> Backbone:
    """The network that a run's recipe describes, with these weights, at the size asked for."""
    if request.architecture:
        raise ConfigError(
            f"an architecture is for a file of weights, and the run {run} states its own", "leave --arch out"
        )
    recipe = read_recipe(run / RECIPE_FILE)
    if recipe["library"] == "timm":
        reading = _reading(recipe, state, run)
        own_size = recipe["preprocessing"]["image_size"]
        request = request._replace(image_size=request.image_size or own_size)
        backbone = load_reading(reading, request, None, None, source=source).backbone
    else:
        backbone = build_backbone(recipe).eval()
        check_state(backbone.network, state, source=source)
        check_finite(state, source=source)
        backbone.network.load_state_dict(state)
        if request.image_size not in (None, backbone.image_size):
            raise ConfigError(
                f"image size {request.image_size}: the model of {run} takes {backbone.image_size} pixels",
                "leave --image-size out",
            )
    if "classes" in recipe:
        backbone.recipe["classes"] = recipe["classes"]
    return backbone


def _reading(recipe: dict[str, Any], state: State, folder: Path) -> Reading:
    """A run's own weights, read as what its recipe says."""
    stated = recipe["preprocessing"]

    def at_size(size: int) -> dict[str, Any]:
        if recipe["architecture"].startswith("swin") and size != stated["image_size"]:
            raise ConfigError(
                f"image size {size}: the Swin of {folder} takes {stated['image_size']} pixels",
                "leave --image-size out",
            )
        return {}

    is_fixed = "pos_embed" in state and fixed_positions(state) == "row"
    network = Network(
        recipe["architecture"],
        recipe["model_args"],
        mean=tuple(stated["mean"]),
        std=tuple(stated["std"]),
        resample_positions=resample.row_first if is_fixed else resample.by_size_antialiased,
        resample_bias=geometric_bias,
        at_size=at_size,
        crop_ratio=stated["crop_ratio"],
        interpolation=stated["interpolation"],
    )
    audit = tuple(Change(key, key, "") for key in state)
    return Reading("run", f"the run {folder.name}", network, state, audit)
