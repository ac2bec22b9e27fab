"""Backbones made from timm and open_clip models, and the folder format that keeps them.

Every network keeps its library's own module and parameter names, so saved weights load into timm or open_clip
without fdkit. What differs between libraries is only how tokens are read, and that stands in `tokens` and `layers`.
"""

import json
import os
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import safetensors.torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from torch import Tensor, nn

from fdkit.data.json_file import read_object
from fdkit.errors import ConfigError, FdkitError, ResourceError, WeightsError, did_you_mean, memory_failure
from fdkit.models.backbone import Backbone, Preprocessing
from fdkit.models.free_memory import WithinFreeMemory
from fdkit.models.tokens import (
    num_prefix_tokens,
    open_clip_resnet_tokens,
    open_clip_trunk_tokens,
    open_clip_vit_tokens,
    stride,
    timm_tokens,
)

WEIGHTS_FILE = "student.safetensors"
RECIPE_FILE = "student.json"
HEADS_FILE = "heads.safetensors"


MAX_DEPTH = 1000
EXTRA_ARGS = ("layer_norm_eps", "stem", "final_norm", "rope_periods")


def build_timm(
    name: str,
    model_args: dict[str, Any],
    *,
    preprocessing: Preprocessing | None = None,
    keep_head: bool = False,
) -> Backbone:
    """A timm model with random weights as a Backbone.

    name: a timm model, with or without a weights tag (the tag decides the default preprocessing).
    model_args: arguments of the model, such as `img_size`, `patch_size`, `drop_path_rate`, `num_classes`.
        `img_size` for a network that takes any size sets the preprocessing alone. EXTRA_ARGS are plain data for
        what timm takes as objects or not at all: `layer_norm_eps` of every LayerNorm, `stem` ("conv", MoCo v3's
        convolutions in place of the patch projection), `final_norm` (False: the network ends without a norm),
        `rope_periods` (of rotary positions, as a file states them).
    preprocessing: None means what timm states for these weights.
    keep_head: keep the classifier timm states for these weights; without it, and without `num_classes`,
        the network has none.
    Raises ConfigError for an unknown name or arguments the model refuses.
    """
    import timm

    from fdkit.models.fast_beit import accelerate
    from fdkit.models.rope import state_periods

    args = {**({} if keep_head else {"num_classes": 0}), **model_args}
    cfg = _timm_config(name)
    image_size = _image_size(name, args, cfg)
    if not cfg.get("fixed_input_size"):
        args.pop("img_size", None)
    _refuse_endless(name, args)
    try:
        with WithinFreeMemory():
            network = timm.create_model(name, pretrained=False, **_as_objects(args))
        if args.get("final_norm") is False:
            _remove_final_norm(network)
        if "rope_periods" in args:
            state_periods(network, args["rope_periods"])
    except _REFUSALS as error:
        raise _refused(f"timm model {name}", args, error) from error
    accelerate(network)
    args["num_classes"] = network.num_classes
    return Backbone(
        network,
        timm_tokens,
        embed_dim=network.num_features,
        patch_size=stride(network),
        num_prefix_tokens=num_prefix_tokens(network),
        preprocessing=preprocessing or _timm_preprocessing(cfg, image_size),
        recipe={"library": "timm", "architecture": name, "model_args": args},
        logits_of=_call if network.num_classes > 0 else None,
    )


_REFUSALS = (
    TypeError, ValueError, AssertionError, ArithmeticError, LookupError, AttributeError, RuntimeError, MemoryError,
)  # fmt: skip
"""What the libraries' constructors raise for arguments that cannot be; which depends on the model and the argument."""


def _refused(model: str, args: dict[str, Any], error: Exception) -> FdkitError:
    if no_memory := memory_failure(error):
        return ResourceError(
            f"{model} with {_shown(args)}: {no_memory.message}",
            "use a machine with more memory, or a smaller model",
        )
    return ConfigError(
        f"{model} refuses {_shown(args)}: {error or type(error).__name__}",
        "change the model arguments, or leave them out",
    )


def _refuse_endless(name: str, args: dict[str, Any]) -> None:
    """Raises ConfigError for more blocks than any network has, which would be built one by one for hours."""
    for key in ("depth", "depths", "layers"):
        given = args.get(key, ())
        counts = given if isinstance(given, list | tuple) else [given]
        if any(isinstance(count, int | float) and count > MAX_DEPTH for count in counts):
            raise ConfigError(
                f"timm model {name}: {key} {_shown(given)} is too deep",
                f"at most {MAX_DEPTH} blocks are built",
            )


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 400 else f"{text[:400]}..."


def _as_objects(args: dict[str, Any]) -> dict[str, Any]:
    """The arguments timm takes for those that are plain data here."""
    from fdkit.models.stems import ConvStem

    made = {key: value for key, value in args.items() if key not in EXTRA_ARGS}
    if "layer_norm_eps" in args:
        if not isinstance(args["layer_norm_eps"], int | float) or not 0 < args["layer_norm_eps"] < 1:
            raise ValueError("layer_norm_eps is a number between 0 and 1")
        made["norm_layer"] = partial(nn.LayerNorm, eps=args["layer_norm_eps"])
    if args.get("stem") == "conv":
        made["embed_layer"] = ConvStem
    return made


def _remove_final_norm(network: nn.Module) -> None:
    """Takes away the norm behind the last block, wherever the network keeps it."""
    for owner, name in ((network, "norm"), (network, "fc_norm"), (getattr(network, "head", None), "norm")):
        if isinstance(getattr(owner, name, None), nn.Module):
            setattr(owner, name, nn.Identity())


def build_open_clip(
    arch: str,
    model_args: dict[str, Any] | None = None,
    *,
    tag: str | None = None,
    preprocessing: Preprocessing | None = None,
) -> Backbone:
    """The visual tower of an open_clip architecture, with random weights, as a Backbone.

    model_args: `quick_gelu` (bool) and `image_size` (int) replace the architecture's own values.
    tag: the name of the weights that will be loaded; it decides the activation and the preprocessing where
        open_clip states them, since weights trained with QuickGELU are wrong under GELU.
    Raises ConfigError for an unknown architecture, and for CoCa's attentional pooling.
    """
    import open_clip
    from open_clip.model import _build_vision_tower  # the public constructors also build the text tower

    from fdkit.models.fast_clip import accelerate

    config = open_clip.get_model_config(arch)
    if config is None:
        raise ConfigError(
            f"unknown open_clip architecture {arch}", hint=did_you_mean(arch, open_clip.list_models())
        )
    stated = _open_clip_tag(arch, tag)
    args = {
        "quick_gelu": bool(stated.get("quick_gelu", config.get("quick_gelu", False))),
        **(model_args or {}),
    }
    vision = {**config["vision_cfg"], "timm_model_pretrained": False}
    args.setdefault("image_size", vision.get("image_size", 224))
    if unknown := set(args) - {"quick_gelu", "image_size"}:
        raise ConfigError(f"open_clip model {arch} does not take {', '.join(sorted(unknown))}")
    if vision.get("attentional_pool"):
        raise ConfigError(
            f"open_clip model {arch} pools by attention before its final norm, so it has no token map"
        )
    vision["image_size"] = args["image_size"]
    try:
        with WithinFreeMemory():
            network = _build_vision_tower(config["embed_dim"], vision, args["quick_gelu"])
    except _REFUSALS as error:
        raise _refused(f"open_clip model {arch}", args, error) from error
    accelerate(network)
    return _open_clip_backbone(
        network,
        recipe={"library": "open_clip", "architecture": arch, "model_args": args},
        preprocessing=preprocessing or _open_clip_preprocessing(stated, args["image_size"]),
    )


def build_backbone(recipe: dict[str, Any]) -> Backbone:
    """The backbone a recipe describes, with random weights; `recipe` is what `Backbone.recipe` holds, checked.

    recipe: {"library": "timm" | "open_clip", "architecture": str, "model_args": {...}, "preprocessing": {...}}.
    """
    preprocessing = _preprocessing_from_json(recipe["preprocessing"])
    if recipe["library"] == "timm":
        return build_timm(recipe["architecture"], recipe["model_args"], preprocessing=preprocessing)
    if recipe["library"] == "open_clip":
        return build_open_clip(recipe["architecture"], recipe["model_args"], preprocessing=preprocessing)
    raise ConfigError(f"library {recipe['library']}: a backbone comes from timm or open_clip")


def save_backbone(backbone: Backbone, folder: Path) -> None:
    """Writes `student.safetensors` (the library's own names) and `student.json` (the recipe) into a folder.

    Each file appears whole or not at all. A timm network loads without fdkit:
    `timm.create_model(recipe["architecture"], **recipe["model_args"], checkpoint_path=".../student.safetensors")`.
    """
    save_recipe(backbone, folder)
    state = {key: value.detach().cpu().contiguous() for key, value in backbone.network.state_dict().items()}
    save_tensors(folder / WEIGHTS_FILE, state)


def save_recipe(backbone: Backbone, folder: Path) -> None:
    """Writes `student.json`, the recipe alone, whole or not at all; with it the run's checkpoints can be read."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = json.dumps(backbone.recipe, indent=2) + "\n"
    _write_whole(folder / RECIPE_FILE, recipe.encode())


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes named tensors as safetensors; the file appears whole or not at all."""
    _write_whole(path, safetensors.torch.save(tensors, metadata={"format": "pt"}))


def load_backbone(folder: Path) -> Backbone:
    """The backbone `save_backbone` wrote, with its weights, in eval mode.

    Raises WeightsError if a file is missing or damaged, or if names or shapes differ from the recipe's network.
    """
    backbone = build_backbone(read_recipe(folder / RECIPE_FILE))
    path = folder / WEIGHTS_FILE
    try:
        state = safetensors.torch.load_file(path)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"cannot read the weights {path}: {error}") from error
    check_state(backbone.network, state, source=str(path))
    backbone.network.load_state_dict(state)
    return backbone.eval()


def check_state(network: nn.Module, state: dict[str, Tensor], *, source: str) -> None:
    """Raises WeightsError unless `state` has exactly the names and shapes of the network; `source` names it."""
    own = network.state_dict()
    problems = [
        _listed("missing", sorted(own.keys() - state.keys())),
        _listed("unexpected", sorted(state.keys() - own.keys())),
        _listed(
            "wrong shape",
            [
                f"{key} {tuple(state[key].shape)}, the model has {tuple(own[key].shape)}"
                for key in sorted(own.keys() & state.keys())
                if own[key].shape != state[key].shape
            ],
        ),
    ]
    if any(problems):
        raise WeightsError(f"{source} does not fit the model: {'; '.join(filter(None, problems))}")


def _open_clip_backbone(network: Any, *, recipe: dict[str, Any], preprocessing: Preprocessing) -> Backbone:
    """Wraps an open_clip visual tower of any of its three kinds."""
    make = partial(Backbone, network, recipe=recipe, preprocessing=preprocessing, logits_of=_call)
    if hasattr(network, "trunk"):
        trunk = network.trunk
        return make(
            open_clip_trunk_tokens,
            embed_dim=trunk.num_features,
            patch_size=stride(trunk),
            num_prefix_tokens=num_prefix_tokens(trunk),
        )
    if hasattr(network, "attnpool"):
        width = network.layer4[-1].conv3.out_channels
        return make(open_clip_resnet_tokens, embed_dim=width, patch_size=32, num_prefix_tokens=0)
    width = network.class_embedding.shape[0]
    return make(open_clip_vit_tokens, embed_dim=width, patch_size=network.patch_size[0], num_prefix_tokens=1)


def _call(network: nn.Module, images: Tensor) -> Tensor:
    return network(images)


def _timm_config(name: str) -> dict[str, Any]:
    """What timm states about a model's weights and input; ConfigError for an unknown model."""
    import timm

    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise ConfigError(f"unknown timm model {name}", hint=did_you_mean(architecture, timm.list_models()))
    try:
        cfg = timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        known = [model.partition(".")[2] for model in timm.list_pretrained(f"{architecture}.*")]
        raise ConfigError(
            f"timm model {architecture} has no weights {tag}", hint=did_you_mean(tag, known)
        ) from error
    return dict(cfg.to_dict())


def _image_size(name: str, args: dict[str, Any], cfg: dict[str, Any]) -> int:
    """Side of the square images a timm model is built for; ConfigError if it is built for other shapes."""
    height, width = cfg["input_size"][1:]
    size = args.get("img_size", height if height == width else (height, width))
    if not isinstance(size, int):
        raise ConfigError(
            f"timm model {name}: image size {size} is not one number", hint="set img_size to one number"
        )
    return size


def _timm_preprocessing(cfg: dict[str, Any], image_size: int) -> Preprocessing:
    mean, std = tuple(cfg["mean"]), tuple(cfg["std"])
    return Preprocessing(mean, std, image_size, float(cfg["crop_pct"]), cfg["interpolation"])


def _open_clip_tag(arch: str, tag: str | None) -> dict[str, Any]:
    """What open_clip states about the weights `tag` of an architecture; ConfigError for an unknown tag."""
    import open_clip

    if tag is None:
        return {}
    stated = open_clip.get_pretrained_cfg(arch, tag)
    if not stated:
        known = open_clip.list_pretrained_tags_by_model(arch)
        raise ConfigError(f"open_clip model {arch} has no weights {tag}", hint=f"known: {', '.join(known)}")
    return dict(stated)


def _open_clip_preprocessing(stated: dict[str, Any], image_size: int) -> Preprocessing:
    from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    return Preprocessing(
        mean=tuple(stated.get("mean") or OPENAI_DATASET_MEAN),
        std=tuple(stated.get("std") or OPENAI_DATASET_STD),
        image_size=image_size,
        crop_ratio=1.0,
        interpolation=stated.get("interpolation") or "bicubic",
    )


def _preprocessing_from_json(values: dict[str, Any]) -> Preprocessing:
    return Preprocessing(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})


def read_recipe(path: Path) -> dict[str, Any]:
    """The recipe in a file; WeightsError if it is missing, is not JSON, lacks a part, or has one that cannot be."""
    try:
        recipe = read_object(path)
        needed = (name for name, field in _Recipe.model_fields.items() if field.is_required())
        if missing := [name for name in needed if name not in recipe]:
            raise WeightsError(f"{path} lacks {', '.join(missing)}", "copy the run folder again")
        _Recipe.model_validate(recipe)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        given = _shown(repr(first["input"]))
        what = "is missing" if first["type"] == "missing" else f"{given}: {first['msg'].lower()}"
        raise WeightsError(
            f"{path} is no recipe of a model: {place} {what}", "copy the run folder again"
        ) from None
    except (OSError, ValueError) as error:
        raise WeightsError(f"cannot read the model recipe {path}: {error}") from error
    return recipe


class _Stated(BaseModel):
    """The preprocessing in a recipe."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    mean: list[float] = Field(min_length=3, max_length=3)
    std: list[Annotated[float, Field(gt=0)]] = Field(min_length=3, max_length=3)
    image_size: int = Field(ge=1, le=65536)
    crop_ratio: float = Field(gt=0, le=10)
    interpolation: Literal["bilinear", "bicubic"]


class _Recipe(BaseModel):
    """What a recipe must hold; what else it holds is of no matter here."""

    model_config = ConfigDict(strict=True)
    library: Literal["timm", "open_clip"]
    architecture: str
    model_args: dict[str, Any]
    preprocessing: _Stated
    classes: list[str] | None = None


def _write_whole(path: Path, content: bytes) -> None:
    """Writes a file that is never seen half-written; permissions follow the umask, unlike safetensors' own 0600."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _listed(what: str, names: list[str]) -> str:
    """`missing 7: a, b, c, d, e, ...`; empty without names."""
    if not names:
        return ""
    return f"{what} {len(names)}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
