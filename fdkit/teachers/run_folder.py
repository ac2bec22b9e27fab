"""The student of a run folder, as a teacher."""

from pathlib import Path
from typing import Any

from fdkit.errors import ConfigError, WeightsError
from fdkit.models.libraries import RECIPE_FILE, WEIGHTS_FILE, load_backbone, read_recipe
from fdkit.teachers.checkpoint_file import load_reading
from fdkit.teachers.files import read_file, sha256_of
from fdkit.teachers.licensing import terms_of_run
from fdkit.teachers.official import Change, Network, Reading
from fdkit.teachers.official import positions as resample
from fdkit.teachers.official._plain_vit import fixed_positions
from fdkit.teachers.official.bias_tables import geometric_bias
from fdkit.teachers.request import Loaded, Request
from fdkit.teachers.weights import State, check_finite


def load_run(folder: Path, request: Request) -> Loaded:
    """The network of student.json with the weights beside it, under the terms its own teachers hand on.

    At another image size, bias tables are resampled as the Feature-Distillation code does, absolute positions as timm
    does, and fixed ones are made anew; a Swin takes its own size alone.
    Raises WeightsError for a folder that is none, ConfigError for an architecture or a size it does not take.
    """
    weights = folder / WEIGHTS_FILE
    if not weights.is_file():
        raise WeightsError(
            f"{folder} holds no {WEIGHTS_FILE}: it is not the folder of a finished run",
            hint="give the run folder itself, not one of its checkpoints, or a file of weights",
        )
    if request.architecture:
        raise ConfigError(f"an architecture is for a file of weights, and the run {folder} states its own")
    recipe = read_recipe(folder / RECIPE_FILE)
    terms = terms_of_run(folder)
    if recipe["library"] == "timm":
        reading = _reading(recipe, read_file(weights), folder)
        own_size = recipe["preprocessing"]["image_size"]
        request = request._replace(image_size=request.image_size or own_size)
        backbone = load_reading(reading, request, None, None, source=str(weights)).backbone
    else:
        backbone = load_backbone(folder)
        check_finite(backbone.network.state_dict(), source=str(weights))
        if request.image_size not in (None, backbone.image_size):
            raise ConfigError(
                f"image size {request.image_size}: the model of {folder} takes {backbone.image_size} pixels"
            )
    return Loaded(backbone, str(folder.absolute()), terms.license, sha256_of(weights), terms.is_noncommercial)


def _reading(recipe: dict[str, Any], state: State, folder: Path) -> Reading:
    """A run's own weights, read as what its recipe says."""
    stated = recipe["preprocessing"]

    def at_size(size: int) -> dict[str, Any]:
        if recipe["architecture"].startswith("swin") and size != stated["image_size"]:
            raise ConfigError(f"image size {size}: the Swin of {folder} takes {stated['image_size']} pixels")
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
