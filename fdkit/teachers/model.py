"""From a MODEL on the command line to a Backbone with its weights."""

import logging
from contextlib import nullcontext
from pathlib import Path

from fdkit.errors import ConfigError, WeightsError, did_you_mean
from fdkit.models.backbone import Backbone
from fdkit.models.libraries import WEIGHTS_FILE, build_open_clip
from fdkit.teachers.building import (
    build_open_clip_teacher,
    build_teacher,
    refuse_wrong_activation,
    with_preprocessing,
)
from fdkit.teachers.catalog import CATALOG, Entry
from fdkit.teachers.checkpoint_file import load_file, load_reading
from fdkit.teachers.files import read_file, sha256_of
from fdkit.teachers.hub import fetch_official, fetch_open_clip, fetch_repo, fetch_timm
from fdkit.teachers.huggingface_folder import (
    FolderModel,
    describing_files,
    is_model_folder,
    read_folder,
    read_transformers,
)
from fdkit.teachers.licensing import UNSTATED, forbids_commerce
from fdkit.teachers.official import positions
from fdkit.teachers.official._layout import state_in
from fdkit.teachers.origin import BRANCH
from fdkit.teachers.request import Loaded, Request
from fdkit.teachers.run_checkpoint import checkpoint_at
from fdkit.teachers.run_folder import load_checkpoint, load_run
from fdkit.teachers.weights import WithoutInit, fit_library

logger = logging.getLogger("fdkit")

WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".tar", ".pyth")
DEMO_FOLDER = Path(__file__).parent / "demo"
POSITIONS = {
    "dino": positions.by_scale,
    "dinov2": positions.by_scale,
    "dinov2reg": positions.by_size_antialiased,
    "mae": positions.by_size,
    "deit": positions.by_size,
    "deit3": positions.by_size,
}
"""How the authors of a family that a library hosts make its positions for another size, where the library differs."""


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
    if not request.pretrained:
        raise ConfigError(f"{request.name} stands for its weights, so it cannot be built without them")
    if request.name == "demo":
        return _load_demo(request)
    if kind == "hf":
        repo, _, revision = rest.partition("@")
        fetched = fetch_repo(repo, revision or BRANCH)
        loaded = _load_folder(fetched.path, request)
        origin = fetched.origin(describing_files(fetched.path))
        return loaded._replace(source=request.name, origin=origin)
    checkpoint = checkpoint_at(path)
    if checkpoint is not None:
        return load_checkpoint(checkpoint, request)
    if path.is_dir():
        is_run = (path / WEIGHTS_FILE).is_file() or not is_model_folder(path)
        return load_run(path, request) if is_run else _load_folder(path.absolute(), request)
    if path.is_file() or path.suffix in WEIGHT_SUFFIXES:
        if path.name == WEIGHTS_FILE and path.with_suffix(".json").is_file():
            return load_run(path.parent, request)
        return load_file(path.absolute(), request)
    if "/" in request.name and not rest:
        raise WeightsError(f"there is no file or folder {request.name}", f"looked for it from {Path.cwd()}")
    raise ConfigError(
        f"unknown model {request.name}",
        hint=did_you_mean(request.name, CATALOG)
        or "a model is a short name (see `fdkit teachers`), timm:NAME, open_clip:ARCH/TAG, hf:ORG/REPO, a file of "
        "weights, a run folder, a checkpoint in one, or demo",
    )


def _load_named(request: Request) -> Loaded:
    """A model of the catalog, of timm, or of open_clip."""
    entry = CATALOG.get(request.name)
    if entry is not None and not entry.model:
        return _load_official(entry, request)
    library, _, name = (entry.model if entry else request.name).partition(":")
    name, at, revision = name.partition("@")
    if at and not revision:
        raise ConfigError(
            f"{request.name} names no revision", "write a branch, tag or commit behind @, or leave it out"
        )
    name = _tagged(name) if library == "timm" else name
    entry = entry or next((row for row in CATALOG.values() if row.model == f"{library}:{name}"), None)
    with WithoutInit() if request.pretrained else nullcontext():
        backbone = _build_named(library, name, request, entry)
    license = entry.license if entry else _timm_license(name) if library == "timm" else UNSTATED
    loaded = Loaded(backbone, f"{library}:{name}", license, is_noncommercial=forbids_commerce(license))
    if not request.pretrained:
        return _with_random_weights(loaded, request.name)
    if library == "timm":
        fetched = fetch_timm(name, revision or None)
    else:
        arch, _, tag = name.partition("/")
        fetched = fetch_open_clip(arch, tag, revision or None)
    path = fetched.path
    state = state_in(read_file(path), source=str(path), checkpoint_key=request.checkpoint_key)
    family = entry.family if entry else ""
    audit = fit_library(backbone, state, source=str(path), resample=POSITIONS.get(family))
    return loaded._replace(
        sha256=sha256_of(path), audit=audit, layout=f"{library}'s own file", origin=fetched.origin()
    )


def _build_named(library: str, name: str, request: Request, entry: Entry | None) -> Backbone:
    """The network of a timm or open_clip name, without weights of its own.

    A catalog name has the catalog's image size; a name in long form has the library's.
    """
    size = request.image_size or (entry.image_size if request.name in CATALOG and entry else None)
    if library == "timm":
        refuse_wrong_activation(name)
        has_no_norm = entry is not None and entry.official is not None and entry.official.layout == "fcmae"
        args = {"final_norm": False} if has_no_norm else {}
        return build_teacher(name, size, args, keep_head=request.keep_head)
    arch, _, tag = name.partition("/")
    if not tag:
        raise ConfigError(f"open_clip:{name} names no weights: an open_clip model is open_clip:ARCH/TAG")
    return build_open_clip_teacher(arch, tag, size)


def _load_official(entry: Entry, request: Request) -> Loaded:
    """A teacher that no library hosts, from its official file."""
    official = entry.official
    assert official is not None, f"{entry.name} has neither a library's name nor an official file"
    if not request.pretrained:
        backbone = build_teacher(
            official.architecture, request.image_size or entry.image_size, official.model_args
        )
        backbone = with_preprocessing(backbone, {"mean": entry.mean, "std": entry.std})
        loaded = Loaded(backbone, official.url, entry.license, is_noncommercial=entry.is_noncommercial)
        return _with_random_weights(loaded, entry.name)
    if not official.url:
        raise WeightsError(
            f"{entry.name}: its file has no address that can be fetched",
            hint=f"get it from {official.page}"
            + (f" ({entry.note})" if entry.note else "")
            + f", then give the file with --arch {entry.name}",
        )
    fetched = fetch_official(official.url, sha256=official.sha256, name=entry.name)
    key = request.checkpoint_key or official.checkpoint_key
    loaded = load_file(fetched.path, request._replace(checkpoint_key=key), entry)
    return loaded._replace(source=official.url, origin=fetched.origin())


def _with_random_weights(loaded: Loaded, name: str) -> Loaded:
    """Said loudly; no licence of the weights binds what has none of them."""
    logger.warning("RANDOM WEIGHTS: %s is built without its pretrained weights", name)
    return loaded._replace(is_noncommercial=False)


def _load_folder(folder: Path, request: Request) -> Loaded:
    """The model of a folder as the Hugging Face hub keeps them, with the preprocessing and licence it states."""
    if request.architecture:
        raise ConfigError(f"an architecture is for a file of weights, and {request.name} states its own")
    model = read_folder(folder)
    source = str(model.weights)
    if model.library == "transformers":
        loaded = load_reading(read_transformers(model), request, None, None, source=source)
    else:
        with WithoutInit():
            backbone = _build_folder(model, request)
        stated = {"mean": model.mean, "std": model.std, "interpolation": model.interpolation}
        backbone = with_preprocessing(backbone, {key: value for key, value in stated.items() if value})
        audit = fit_library(backbone, state_in(read_file(model.weights), source=source), source=source)
        loaded = Loaded(backbone, source, audit=audit, layout=f"{model.library}'s own file")
    return loaded._replace(
        license=model.license,
        is_noncommercial=forbids_commerce(model.license),
        sha256=sha256_of(model.weights),
    )


def _build_folder(model: FolderModel, request: Request) -> Backbone:
    """The network of a timm or open_clip folder, without weights of its own."""
    size = request.image_size
    if model.library == "timm":
        return build_teacher(model.architecture, size, model.model_args, keep_head=request.keep_head)
    args = model.model_args | ({"image_size": size} if size else {})
    return build_open_clip(model.architecture, args)


def _load_demo(request: Request) -> Loaded:
    """The small teacher that comes with the package."""
    if not (DEMO_FOLDER / WEIGHTS_FILE).is_file():
        raise WeightsError("the demo teacher is not in this installation", hint="run `make demo-teacher`")
    return load_run(DEMO_FOLDER, request)._replace(source="demo", license="Apache-2.0")


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
