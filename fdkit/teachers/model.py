"""From a MODEL on the command line to a Backbone with its weights."""

import logging
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from fdkit.errors import ConfigError, WeightsError, did_you_mean
from fdkit.models.backbone import IMAGENET_MEAN, IMAGENET_STD, Backbone
from fdkit.models.libraries import build_open_clip, build_timm, load_backbone
from fdkit.teachers.catalog import CATALOG
from fdkit.teachers.hub import fetch_open_clip, fetch_timm
from fdkit.teachers.layouts import STANDARD_HEADS, Layout, recognise
from fdkit.teachers.weights import (
    RULES,
    State,
    Unwrapped,
    WithoutRandomInit,
    check_finite,
    image_tower,
    load_whole,
    read_weights,
    sha256_of,
)

logger = logging.getLogger("fdkit")

WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".tar")
DEMO_FOLDER = Path(__file__).parent / "demo"
RUN_WEIGHTS = "student.safetensors"


class Loaded(NamedTuple):
    """A backbone and where it came from."""

    backbone: Backbone
    source: str
    """The model in long form, or the absolute path of its file."""
    license: str
    sha256: str | None
    """Of the weight file; None for random weights."""


class Request(NamedTuple):
    """What was asked for; see `load_teacher`."""

    name: str
    image_size: int | None
    is_pretrained: bool
    architecture: str | None
    keeps_head: bool = False
    """Whether the model's own classifier stays on it, for its logits."""


def load_model(request: Request) -> Loaded:
    """The backbone that a MODEL names, its weights whole.

    Raises ConfigError for a name that is none, WeightsError for weights that are missing, unsafe or do not fit.
    """
    kind, _, rest = request.name.partition(":")
    path = Path(request.name).expanduser()
    if request.name in CATALOG or kind in ("timm", "open_clip"):
        if request.architecture:
            raise ConfigError(f"an architecture is for a file of weights, and {request.name} states its own")
        return _load_named(request)
    if not request.is_pretrained:
        raise ConfigError(f"{request.name} stands for its weights, so it cannot be built without them")
    if request.name == "demo":
        return _load_demo(request)
    if path.is_dir():
        return _load_run(path, request)
    if path.is_file() or path.suffix in WEIGHT_SUFFIXES:
        return _load_file(path.absolute(), request)
    if "/" in request.name and not rest:
        raise WeightsError(f"there is no file or folder {request.name}")
    raise ConfigError(
        f"unknown model {request.name}",
        hint=did_you_mean(request.name, CATALOG)
        or "a model is a short name (see `fdkit teachers`), timm:NAME, open_clip:ARCH/TAG, a file of weights, "
        "a run folder, or demo",
    )


def _load_named(request: Request) -> Loaded:
    """A model of the catalog, of timm, or of open_clip."""
    entry = CATALOG.get(request.name)
    model = entry.model if entry else request.name
    image_size = request.image_size or (entry.image_size if entry else None)
    library, _, name = model.partition(":")
    if library == "timm":
        name = _tagged(name)
        _refuse_wrong_activation(name)
        with WithoutRandomInit() if request.is_pretrained else nullcontext():
            backbone = _build(name, image_size, keep_head=request.keeps_head)
        license = _timm_license(name)
        fetch = partial(fetch_timm, name)
    else:
        arch, _, tag = name.partition("/")
        if not tag:
            raise ConfigError(f"{model} names no weights: an open_clip model is open_clip:ARCH/TAG")
        with WithoutRandomInit() if request.is_pretrained else nullcontext():
            backbone = _build_open_clip(arch, tag, image_size)
        license = "unstated"
        fetch = partial(fetch_open_clip, arch, tag)
    license = entry.license if entry else license
    if not request.is_pretrained:
        logger.warning("RANDOM WEIGHTS: %s is built without its pretrained weights", request.name)
        return Loaded(backbone, f"{library}:{name}", license, None)
    path = fetch()
    _fit(backbone, read_weights(path).state, source=str(path))
    return Loaded(backbone, f"{library}:{name}", license, sha256_of(path))


def _load_file(path: Path, request: Request) -> Loaded:
    """Weights in a file, in the architecture given, the one the file is named after, or the one its tensors show."""
    weights = read_weights(path)
    state = weights.state
    layout = recognise(state)
    asked = (request.architecture or _named_architecture(path) or "").removeprefix("timm:")
    with WithoutRandomInit():
        if asked.startswith("open_clip:"):
            backbone = _build_open_clip(asked.removeprefix("open_clip:"), "", request.image_size)
        elif asked:
            _refuse_wrong_activation(asked)
            args = _official_args(weights, layout)
            backbone = _build(asked, request.image_size, args, keep_head=request.keeps_head)
        else:
            backbone = _build_recognised(path, weights, layout, request.image_size)
    _fit(backbone, state, source=str(path), hint=_misfit_hint(layout, asked))
    stated = backbone.preprocessing
    logger.info(
        "%s: read as %s; the file holds no statistics: assuming mean %s and std %s (%s); mean= and std= change them",
        path,
        asked or layout,
        tuple(round(value, 4) for value in stated.mean),
        tuple(round(value, 4) for value in stated.std),
        f"those of {asked}" if asked else "ImageNet's",
    )
    return Loaded(backbone, str(path), "unstated", sha256_of(path))


def _load_run(folder: Path, request: Request) -> Loaded:
    """The student of a run folder, as a teacher."""
    weights = folder / RUN_WEIGHTS
    if not weights.is_file():
        raise WeightsError(
            f"{folder} holds no {RUN_WEIGHTS}: it is not the folder of a finished run",
            hint="give the run folder itself, not one of its checkpoints, or a file of weights",
        )
    if request.architecture:
        raise ConfigError(f"an architecture is for a file of weights, and the run {folder} states its own")
    backbone = load_backbone(folder)
    check_finite(backbone.network.state_dict(), source=str(weights))
    if request.image_size not in (None, backbone.image_size):
        raise ConfigError(
            f"image size {request.image_size}: the model of {folder} takes {backbone.image_size} pixels"
        )
    return Loaded(backbone, str(folder.absolute()), "unstated", sha256_of(weights))


def _load_demo(request: Request) -> Loaded:
    """The small teacher that comes with the package."""
    if not (DEMO_FOLDER / RUN_WEIGHTS).is_file():
        raise WeightsError("the demo teacher is not in this installation", hint="run `make demo-teacher`")
    return _load_run(DEMO_FOLDER, request)._replace(source="demo", license="Apache-2.0")


def _build(
    name: str, image_size: int | None, args: dict[str, Any] | None = None, *, keep_head: bool = False
) -> Backbone:
    """A timm model with random weights, fed images of `image_size`; None is its native size."""
    size = {} if image_size is None else {"img_size": image_size}
    backbone = build_timm(name, {**(args or {}), **size}, keep_head=keep_head)
    remainder = backbone.image_size % backbone.patch_size
    if remainder and hasattr(backbone.network, "pos_embed"):
        low = backbone.image_size - remainder
        raise ConfigError(
            f"image size {backbone.image_size} does not divide into patches of {backbone.patch_size} ({name})",
            hint=f"use {low} or {low + backbone.patch_size}",
        )
    return backbone


def _build_open_clip(arch: str, tag: str, image_size: int | None) -> Backbone:
    """The visual tower of `ARCH/TAG`, refused if tag and architecture disagree on the activation."""
    import open_clip

    if tag:
        has_quick_gelu = bool((open_clip.get_model_config(arch) or {}).get("quick_gelu"))
        stated = open_clip.get_pretrained_cfg(arch, tag)
        if stated and bool(stated.get("quick_gelu")) != has_quick_gelu:
            other = arch.removesuffix("-quickgelu") if has_quick_gelu else f"{arch}-quickgelu"
            raise _wrong_activation(f"open_clip:{arch}/{tag}", f"open_clip:{other}/{tag}")
    backbone = build_open_clip(arch, tag=tag or None)
    if image_size not in (None, backbone.image_size):
        raise ConfigError(
            f"image size {image_size}: open_clip model {arch} takes {backbone.image_size} pixels",
            hint="the timm model of the same weights takes other sizes",
        )
    return backbone


def _build_recognised(
    path: Path, weights: Unwrapped, layout: Layout | None, image_size: int | None
) -> Backbone:
    """A plain ViT as its tensors show it, with ImageNet statistics."""
    if layout is None or layout.timm_name is None:
        seen = f"it looks like {layout}" if layout else "its tensors are not those of a plain ViT"
        if any(key.startswith("visual.") for key in weights.state):
            seen = "it looks like CLIP, whose activation (GELU or QuickGELU) the tensors do not show"
        raise WeightsError(
            f"cannot tell the architecture of {path}: {seen}",
            hint="name it with --architecture, a timm model or open_clip:ARCH; first tensors: "
            + ", ".join(f"{key} {tuple(value.shape)}" for key, value in list(weights.state.items())[:3]),
        )
    args = layout.model_args(num_heads=STANDARD_HEADS[layout.width])
    args.update(_official_args(weights, layout))
    logger.info(
        "%s: the file does not say how many heads its attention has: taking %d, the standard for width %d; "
        "--architecture sets another",
        path,
        args["num_heads"],
        layout.width,
    )
    if image_size is not None:
        args["img_size"] = image_size
    backbone = build_timm(layout.timm_name, args)
    preprocessing = backbone.preprocessing._replace(mean=IMAGENET_MEAN, std=IMAGENET_STD)
    return with_preprocessing(backbone, preprocessing._asdict())


def with_preprocessing(backbone: Backbone, changes: dict[str, Any]) -> Backbone:
    """The same network behind changed preprocessing."""
    return Backbone(
        backbone.network,
        backbone.tokens_of,
        embed_dim=backbone.embed_dim,
        patch_size=backbone.patch_size,
        num_prefix_tokens=backbone.num_prefix_tokens,
        preprocessing=backbone.preprocessing._replace(**changes),
        recipe=backbone.recipe,
        logits_of=backbone.logits_of,
    )


def _official_args(weights: Unwrapped, layout: Layout | None) -> dict[str, Any]:
    """What a method's own file layout implies: MoCo v3's ViT-S has 12 heads, where every other has 6."""
    is_mocov3 = "base_encoder." in weights.prefix
    return {"num_heads": 12} if is_mocov3 and layout is not None and layout.width == 384 else {}


def _fit(backbone: Backbone, state: State, *, source: str, hint: str = "") -> None:
    """Weights into a network: through timm's own conversion, or as the image tower of an open_clip file."""
    recipe = backbone.recipe
    is_timm = recipe["library"] == "timm"
    adapt = partial(_timm_adapt, backbone, recipe["architecture"]) if is_timm else _open_clip_adapt
    state = image_tower(state, source=source)
    load_whole(backbone.network, state, adapt=adapt, rules=RULES, source=source, hint=hint)


def _open_clip_adapt(state: State) -> State:
    """A whole CLIP file's image tower, or a file of that tower alone, in the tower's own names."""
    return {key.removeprefix("visual."): value for key, value in state.items()}


def _timm_adapt(backbone: Backbone, name: str, state: State) -> State:
    """What timm itself does to a published file before loading it: names, and positions for the network's grid."""
    import timm

    architecture = name.partition(".")[0]
    module = sys.modules[timm.models.model_entrypoint(architecture).__module__]
    names = ("checkpoint_filter_fn", "_filter_fn", "_filter_torchvision_pretrained")
    convert = next((getattr(module, name) for name in names if hasattr(module, name)), None)
    if convert is None:
        return state
    options: dict[str, Any] = {}
    if module.__name__.endswith(".deit"):
        options = {"adapt_layer_scale": True}
    if "flexi" in architecture or "radio" in architecture:
        options = {"interpolation": "bilinear", "antialias": False}
    converted: dict[str, Tensor] = convert(state, backbone.network, **options)
    return dict(converted)


def _tagged(name: str) -> str:
    """A timm name with the tag of its weights, timm's default where none is given; unknown names stay as they are."""
    import timm

    if "." in name or not timm.is_model(name):
        return name
    cfg = timm.get_pretrained_cfg(name)
    return f"{name}.{cfg.tag}" if cfg is not None and cfg.tag else name


def _timm_license(name: str) -> str:
    import timm

    cfg = timm.get_pretrained_cfg(name)
    return (cfg.license if cfg is not None else None) or "unstated"


def _refuse_wrong_activation(name: str) -> None:
    """Refuses CLIP weights trained with QuickGELU under timm's plain-GELU name of the same tag.

    timm keeps both names for the same files; under the plain one the features are others than the model's own.
    """
    import timm

    architecture, _, tag = name.partition(".")
    quick = f"{architecture.replace('_clip_', '_clip_quickgelu_')}.{tag}"
    if tag and quick != name and quick in timm.list_pretrained("*quickgelu*"):
        raise _wrong_activation(f"timm:{name}", f"timm:{quick}")


def _wrong_activation(given: str, right: str) -> WeightsError:
    short = next((entry.name for entry in CATALOG.values() if entry.model == right), None)
    return WeightsError(
        f"{given} would run with another activation than its weights were trained with",
        hint=f"use {right}" + (f" (short name {short})" if short else ""),
    )


def _named_architecture(path: Path) -> str | None:
    """The timm model a file is named after, such as vit_tiny_patch16_224.safetensors; None if it is none."""
    import timm

    if not timm.is_model(path.stem.partition(".")[0]):
        return None
    is_known = path.stem in timm.list_pretrained() or "." not in path.stem
    return path.stem if is_known else path.stem.partition(".")[0]


def _misfit_hint(layout: Layout | None, asked: str) -> str:
    """What to try when a file does not fit the architecture asked for."""
    seen = f"the file looks like {layout}" if layout else "the file is not a plain ViT"
    if layout and layout.timm_name:
        seen += f", such as {layout.timm_name}"
    return f"{seen}; read as {asked or 'that'}; --architecture NAME sets another"
