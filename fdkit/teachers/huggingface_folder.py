"""Folders as the Hugging Face hub keeps them: a file of weights beside the JSON files that say what it is.

Three kinds are told apart by these: timm's (config.json with `architecture`), open_clip's (open_clip_config.json), and
transformers' (config.json with `model_type`); a repository may be two at once, and is the first of them.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from fdkit.data.json_file import read_object
from fdkit.errors import WeightsError, did_you_mean
from fdkit.teachers.files import read_file
from fdkit.teachers.official import Reading
from fdkit.teachers.official.huggingface import read_configured

Library = Literal["timm", "open_clip", "transformers"]

CONFIG = "config.json"
OPEN_CLIP_CONFIG = "open_clip_config.json"
PREPROCESSOR = "preprocessor_config.json"
CARD = "README.md"
WEIGHTS: dict[Library, tuple[str, ...]] = {
    "timm": ("model.safetensors", "pytorch_model.bin"),
    "open_clip": ("open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
    "transformers": ("model.safetensors", "pytorch_model.bin"),
}
"""Names of the file of weights, the preferred one first."""

_FILTERS: dict[int, Literal["bilinear", "bicubic"]] = {2: "bilinear", 3: "bicubic"}
"""Pillow's numbers of the filters that resize."""
_FREE_KEYS = ("image_size", "timm_model_pretrained", "patch_dropout", "output_tokens")
"""What two descriptions of one open_clip tower may differ in: given apart, or of training alone."""

Statistics = tuple[float, float, float]


class FolderModel(NamedTuple):
    """What a folder holds, by its own word."""

    library: Library
    architecture: str
    """timm's or open_clip's name of the model, transformers' model_type."""
    model_args: dict[str, Any]
    """Arguments of timm's or open_clip's model beside its name; empty for transformers, where `config` has them."""
    weights: Path
    mean: Statistics | None = None
    """Of RGB in [0, 1]; None where the folder does not say."""
    std: Statistics | None = None
    interpolation: Literal["bilinear", "bicubic"] | None = None
    license: str = "unstated"
    """By the card: an SPDX name where there is one."""
    config: Mapping[str, Any] = MappingProxyType({})
    """The whole config.json of a transformers model."""


def is_model_folder(folder: Path) -> bool:
    """Whether a folder says what model it holds."""
    return any((folder / name).is_file() for name in (CONFIG, OPEN_CLIP_CONFIG))


def library_of(folder: Path) -> Library:
    """Whose model a folder holds; WeightsError if its files do not say."""
    config = _read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    if "architecture" in config:
        return "timm"
    if (folder / OPEN_CLIP_CONFIG).is_file():
        return "open_clip"
    if "model_type" in config:
        return "transformers"
    raise WeightsError(
        f"{folder} does not say what model it holds: its {CONFIG} has neither `architecture` (timm) nor `model_type` "
        f"(transformers), and there is no {OPEN_CLIP_CONFIG}",
        hint="give the file of weights itself, and name its architecture with --arch",
    )


def describing_files(folder: Path) -> list[Path]:
    """The file of weights and those that say its model and preprocessing; WeightsError if there are no weights."""
    described = [folder / name for name in (CONFIG, OPEN_CLIP_CONFIG, PREPROCESSOR)]
    weights = _weights_in(folder, WEIGHTS[library_of(folder)])
    return [weights, *(path for path in described if path.is_file())]


def read_folder(folder: Path) -> FolderModel:
    """What a folder says of its model; the weights are not opened.

    Raises WeightsError if it does not say enough, says what cannot be, or has no file of weights.
    """
    library = library_of(folder)
    weights = _weights_in(folder, WEIGHTS[library])
    read = {"timm": _read_timm, "open_clip": _read_open_clip, "transformers": _read_transformers}[library]
    model = read(folder, weights)
    license = _license(folder / CARD)
    return model._replace(license=license) if license else model


def read_transformers(model: FolderModel) -> Reading:
    """The tensors of a transformers model in timm's names, with the preprocessing its folder states.

    Raises WeightsError as `read_file` does, and for tensors that are not those of the config.
    """
    content = read_file(model.weights)
    try:
        reading = read_configured(content, model.config, source=str(model.weights))
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RuntimeError) as error:
        raise WeightsError(
            f"{model.weights.parent / CONFIG}: does not describe the tensors of {model.weights.name}: "
            f"{type(error).__name__}: {error}",
            "get the folder again",
        ) from error
    network = reading.network
    return reading._replace(
        network=network._replace(
            mean=model.mean or network.mean,
            std=model.std or network.std,
            interpolation=model.interpolation or network.interpolation,
        )
    )


def _read_timm(folder: Path, weights: Path) -> FolderModel:
    """Source: timm, models/_hub.py and _builder.py; older files keep the preprocessing beside the architecture."""
    import timm

    path = folder / CONFIG
    config = _read_json(path)
    architecture = str(config["architecture"])
    stated = _fields(config, "pretrained_cfg", path) or config
    if not timm.is_model(architecture):
        hint = did_you_mean(architecture, timm.list_models())
        raise WeightsError(f"{folder / CONFIG}: timm has no model {architecture}", hint=hint)
    args = dict(_fields(config, "model_args", path))
    if stated.get("fixed_input_size"):
        args.setdefault("img_size", _side(stated.get("input_size"), path))
    return FolderModel(
        "timm",
        architecture,
        args,
        weights,
        _three(stated.get("mean"), path),
        _three(stated.get("std"), path, above=0),
        _filter(stated.get("interpolation")),
        str(stated.get("license") or "unstated"),
    )


def _read_open_clip(folder: Path, weights: Path) -> FolderModel:
    """Source: mlfoundations/open_clip, factory.py and push_to_hf_hub.py."""
    path = folder / OPEN_CLIP_CONFIG
    config = _read_json(path)
    model, stated = _fields(config, "model_cfg", path), _fields(config, "preprocess_cfg", path)
    vision = _fields(model, "vision_cfg", path)
    args = {"quick_gelu": bool(model.get("quick_gelu", False))}
    size = vision.get("image_size", 224)
    if not isinstance(size, int):
        raise WeightsError(f"{path}: image size {size} is not one number")
    return FolderModel(
        "open_clip",
        _open_clip_name(model, path),
        {**args, "image_size": size},
        weights,
        _three(stated.get("mean"), path),
        _three(stated.get("std"), path, above=0),
        _filter(stated.get("interpolation")),
    )


def _open_clip_name(model: dict[str, Any], path: Path) -> str:
    """open_clip's name of the architecture whose image tower is the one described."""
    import open_clip

    def tower(config: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        vision = config.get("vision_cfg", {})
        return config.get("embed_dim"), {key: vision[key] for key in vision if key not in _FREE_KEYS}

    wanted = tower(model)
    names = [
        name for name in open_clip.list_models() if tower(open_clip.get_model_config(name) or {}) == wanted
    ]
    if not names:
        raise WeightsError(
            f"{path} describes an image tower that no architecture of open_clip {open_clip.__version__} has",
            hint="give its file of weights, and name the nearest architecture with --arch open_clip:ARCH",
        )
    return min(names, key=lambda name: (len(name), name))


def _read_transformers(folder: Path, weights: Path) -> FolderModel:
    """Source: huggingface/transformers, image_processing_*.py."""
    config = _read_json(folder / CONFIG)
    path = folder / PREPROCESSOR
    stated = _read_json(path) if path.is_file() else {}
    if not stated.get("do_normalize", True) or stated.get("do_rescale") is False:
        raise WeightsError(f"{path} does not normalise images as (x / 255 - mean) / std")
    return FolderModel(
        "transformers",
        str(config["model_type"]),
        {},
        weights,
        _three(stated.get("image_mean"), path),
        _three(stated.get("image_std"), path, above=0),
        _FILTERS.get(stated.get("resample", 0)) if isinstance(stated.get("resample"), int) else None,
        config=config,
    )


def _weights_in(folder: Path, names: tuple[str, ...]) -> Path:
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is not None:
        return found
    if parts := sorted(folder.glob("*.index.json")):
        raise WeightsError(
            f"{folder} holds weights in several files ({parts[0].name}), which is not supported",
            hint="give timm's copy of the same weights, which is one file",
        )
    raise WeightsError(f"{folder} has no file of weights: neither {' nor '.join(names)}")


def _license(card: Path) -> str:
    """The licence in the front matter of a model card; empty if it states none."""
    text = card.read_text(encoding="utf-8", errors="replace")[:20_000] if card.is_file() else ""
    front = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    fields = (
        dict(re.findall(r"^(license(?:_name)?):[ \t]*[\"']?([\w.+-]+)", front[1], re.MULTILINE))
        if front
        else {}
    )
    license: str = fields.get("license", "")
    return fields.get("license_name", license) if license == "other" else license


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except (OSError, ValueError) as error:
        raise WeightsError(f"cannot read {path}: {error}", "get the folder again") from error


def _fields(config: Mapping[str, Any], name: str, path: Path) -> dict[str, Any]:
    """The fields under a name of a config, none if it has none. Raises WeightsError for anything else there."""
    fields = config.get(name, {})
    if not isinstance(fields, dict):
        raise WeightsError(f"{path}: {name} is {fields!r:.80}, not fields of a model", "get the folder again")
    return fields


def _side(stated: Any, path: Path) -> int:
    """The last of (channels, height, width), as a config states them."""
    if not isinstance(stated, list) or not stated or type(stated[-1]) is not int:
        raise WeightsError(
            f"{path}: input_size is {stated!r:.80}, not [3, height, width]", "get the folder again"
        )
    return stated[-1]


def _three(values: Any, path: Path, *, above: float = -math.inf) -> Statistics | None:
    """Three finite numbers for red, green and blue, all above a bound; None where there are none."""
    if values is None:
        return None
    is_list = isinstance(values, list) and len(values) == 3
    if not is_list or not all(isinstance(one, int | float) and above < one < 1e9 for one in values):
        raise WeightsError(
            f"{path}: mean and std are three numbers each, std above 0, not {values!r:.80}",
            "get the folder again",
        )
    return float(values[0]), float(values[1]), float(values[2])


def _filter(name: Any) -> Literal["bilinear", "bicubic"] | None:
    return name if name in ("bilinear", "bicubic") else None
