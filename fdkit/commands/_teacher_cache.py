"""`--teacher-cache`: opens or begins the caches of a distillation's teachers, and refuses what does not belong there.

A cache is described by a manifest: which teacher and arithmetic, which images, which crops, what of the teacher is
stored and how. How many crops an image has is no part of that: crop v is the same however many there are, so runs with
fewer or more of them share what they have in common.
"""

import hashlib
import json
import logging
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fdkit.config import Config
from fdkit.data.cache import cache_folder
from fdkit.data.json_file import read_object
from fdkit.data.loader import LoaderConfig, steps_per_epoch, training_batches
from fdkit.data.repeated_views import RepeatedViews
from fdkit.data.sources import ImageSource
from fdkit.data.views import CropConfig, Views
from fdkit.errors import ConfigError, DataError, OutputError, ResourceError, write_failure
from fdkit.methods._teacher_cache import (
    CachedTarget,
    CachedTargets,
    CachedViews,
    Form,
    rows_of,
    stored_whitening,
)
from fdkit.methods.feature_distillation import FeatureDistillationConfig, compared, teacher_says
from fdkit.models.libraries import save_tensors
from fdkit.teachers.cache_cost import CacheDtype, cache_bytes, views_filled
from fdkit.teachers.feature_cache import FeatureCache, Layout
from fdkit.teachers.quantised import Reduction, fit_reduction, restore, storage_error
from fdkit.teachers.teacher import Teacher, short_names
from fdkit.training.checkpoint import write_whole
from fdkit.training.distributed import World, wait_for_all

log = logging.getLogger("fdkit")

FORMAT = 1
MANIFEST, COMPONENTS = "manifest.json", "pca.safetensors"
PROBE_IMAGES = 32
"""Images on which the error of storing is measured when a cache begins."""
VECTORS_PER_NUMBER = 20
"""Vectors that principal components are fitted to, for each number of a vector, as far as the images give them."""


class TeacherCacheConfig(Config):
    """Teacher features kept on disk, so that the teacher runs once for each crop and not in every epoch."""

    folder: str | None = None
    """Where they are kept: a folder of this teacher, images and crops, or auto for one in the user's cache folder;
    null: the teacher runs in every step. Runs of other students on the same crops share it."""
    views: int = Field(10, gt=0)
    """Crops an image: the epochs after which they come again, in another order. Fewer mean less variety for the
    student and a smaller cache, which gives back nothing in its first epochs, one a view."""
    dtype: CacheDtype = "int8"
    """How numbers are stored: int8 with a scale for each vector, or fp16 at twice the size."""
    pca: int | None = Field(None, gt=0)
    """Principal components that stand for a vector; loss and explained_variance are then of what they keep, which
    run.json states. Null: all its numbers."""
    max_gigabytes: float | None = Field(None, gt=0)
    """Largest size that the cache of one teacher may reach in this run, in 1e9 bytes; null: what the disk has."""

    @model_validator(mode="after")
    def _has_a_folder(self) -> Self:
        changed = sorted(self.model_fields_set - {"folder"})
        if self.folder is None and any(
            getattr(self, n) != type(self).model_fields[n].default for n in changed
        ):
            raise ConfigError(
                f"teacher_cache.{changed[0]} has no effect without a cache", "name one: --teacher-cache auto"
            )
        return self


class CacheRequest(NamedTuple):
    """What a run wants kept."""

    config: TeacherCacheConfig
    distillation: FeatureDistillationConfig
    crops: CropConfig
    views: Views
    source: ImageSource
    loader: LoaderConfig
    seed: int
    epochs: float
    autocast: bool
    """Whether the teacher runs under bf16 autocast."""
    device: torch.device
    world: World


def open_caches(
    request: CacheRequest, teachers: Sequence[Teacher]
) -> tuple[CachedViews, CachedTargets, list[dict[str, Any]]]:
    """The views and targets of a cached run, and what run.json says of each teacher's cache.

    Raises ConfigError, or DataError where only the images differ, for a folder that was made otherwise; ResourceError
    if the disk cannot hold it.
    """
    if request.distillation.teacher_drop_path > 0:
        raise ConfigError(
            f"distillation.teacher_drop_path {request.distillation.teacher_drop_path:g} makes another target each "
            "time, which a teacher cache would freeze",
            "leave out one of the two",
        )
    names = short_names([teacher.name for teacher in teachers])
    targets, facts = [], []
    for teacher, name in zip(teachers, names, strict=True):
        target, fact = _open(request, teacher, name if len(teachers) > 1 else "")
        targets.append(target)
        facts.append(fact)
    if request.config.views >= request.epochs:
        log.info(
            "teacher cache: %d crops an image and %g epochs: no crop comes twice in this run; it fills the cache "
            "for others",
            request.config.views,
            request.epochs,
        )
    views = CachedViews(request.views, request.config.views, [target.cache for target in targets])
    return views, CachedTargets(targets), facts


def _open(request: CacheRequest, teacher: Teacher, part: str) -> tuple[CachedTarget, dict[str, Any]]:
    key, names = (
        _key(request, teacher),
        {"teacher.weights": teacher.name, "images.content": request.source.name},
    )
    folder = _folder(request.config.folder or "", part, key)
    _make_folder(folder)
    with FeatureCache(folder, Layout(1, 1, 1, "int8")).creation():
        is_new = not (folder / MANIFEST).exists()
        if is_new and request.world.is_main:
            _begin(request, teacher, folder, key, names)
    wait_for_all(request.world)
    manifest = _read_manifest(folder)
    _refuse_others(folder, manifest, key, names)
    form = form_of(folder, manifest)
    target = _target(request, folder, form, _read_components(folder, manifest))
    total = _check_size(request, target.cache, form)
    if request.world.is_main:
        target.cache.recover()
    shown = views_filled(request.epochs, request.config.views)
    facts = {
        "folder": str(folder),
        "views": request.config.views,
        "variety": f"{shown} crops an image over {request.epochs:g} epochs",
        "dtype": request.config.dtype,
        "pca": request.config.pca,
        "gigabytes": total / 1e9,
        "gigabytes_at_start": target.cache.bytes_on_disk() / 1e9,
        "stored": manifest["stored"],
    }
    return target, facts


def _key(request: CacheRequest, teacher: Teacher) -> dict[str, Any]:
    """What the content of a record hangs on, as flat JSON."""
    distillation, crops = request.distillation, request.crops
    values: dict[str, Any] = {
        "format": FORMAT,
        "teacher.weights": weights_fingerprint(teacher),
        "teacher.architecture": json.dumps(teacher.backbone.recipe, sort_keys=True, default=str),
        "teacher.precision": str(teacher.backbone.dtype).removeprefix("torch."),
        "teacher.autocast": "bf16" if request.autocast else "none",
        "teacher.image_size": teacher.image_size,
        "images.content": request.source.fingerprint,
        "images.number": len(request.source),
        "crops.seed": request.seed,
    }
    values |= {f"crops.{name}": getattr(crops, name) for name in CropConfig.model_fields}
    values |= {f"distillation.{name}": getattr(distillation, name) for name in ("target", "layer", "norm")}
    values["distillation.whitening"] = stored_whitening(distillation.whitening)
    return values | {"dtype": request.config.dtype, "pca": request.config.pca}


def weights_fingerprint(teacher: Teacher) -> str:
    """SHA-256 of the weights that were loaded, whatever file they came from, as the first 32 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(teacher.backbone.network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def _folder(folder: str, part: str, key: dict[str, Any]) -> Path:
    if folder == "auto":
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
        return cache_folder("teacher-features") / name
    return Path(folder).expanduser() / part


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        others = [path.name for path in folder.iterdir() if not path.name.startswith("lock")]
    except OSError as error:
        raise write_failure(error) or OutputError(
            f"--teacher-cache {folder}: cannot be used: {error.strerror}", "name another folder"
        ) from error
    if others and not any(name.lstrip(".").startswith((MANIFEST, COMPONENTS)) for name in others):
        raise OutputError(
            f"--teacher-cache {folder}: holds {sorted(others)[0]}, and no manifest of a cache",
            "name a new folder",
        )


def _begin(
    request: CacheRequest, teacher: Teacher, folder: Path, key: dict[str, Any], names: dict[str, str]
) -> None:
    """Look at the teacher on a few images, fit components if asked, and write the manifest."""
    first = next(_vectors(request, teacher, PROBE_IMAGES))
    rows, form = first
    reduction, stored = None, {}
    if request.config.pca is not None:
        log.info("teacher cache: fitting %d principal components", request.config.pca)
        reduction, kept = fit_reduction(_enough(request, teacher, form), request.config.pca)
        save_tensors(folder / COMPONENTS, {"mean": reduction.mean, "components": reduction.components})
        stored["explained_variance"] = kept
    target = _target(request, folder, form, reduction)
    again = target.expand(restore(target.stored_form(rows)))
    stored |= storage_error(rows, again)._asdict() | {"measured_on_images": len(rows)}
    sha = hashlib.sha256((folder / COMPONENTS).read_bytes()).hexdigest() if reduction else None
    manifest = {
        "key": key,
        "names": names,
        "form": form._asdict(),
        "stored": stored,
        "components_sha256": sha,
    }
    write_whole(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    log.info(
        "teacher cache %s begun: stored vectors have cosine %.5f with the teacher's, relative error %.2g",
        folder,
        stored["cosine"],
        stored["relative"],
    )


def _vectors(request: CacheRequest, teacher: Teacher, batch_size: int) -> Iterator[tuple[Tensor, Form]]:
    """What the teacher says of one crop of each image, in the order of training, (B, N, C) at a time."""
    batch_size = min(batch_size, len(request.source))
    batches = training_batches(
        request.source,
        RepeatedViews(request.views, request.config.views),
        request.loader.model_copy(update={"workers": 0}),
        batch_size=batch_size,
        seed=request.seed,
        start_step=0,
        num_steps=steps_per_epoch(request.source, batch_size),
    )
    device = request.device
    teacher.to(device)
    for batch in batches:
        crops = [crop.to(device) for crop in batch.crops]
        images = request.views.finish(crops, [colour.to(device) for colour in batch.colour])[0]
        with torch.no_grad():
            with torch.autocast(device.type, torch.bfloat16, enabled=request.autocast):
                said = compared(teacher_says(teacher, images, request.distillation), request.distillation)
            yield rows_of(said, request.distillation.whitening)


def _enough(request: CacheRequest, teacher: Teacher, form: Form) -> Iterator[Tensor]:
    """Vectors to fit components to."""
    num_batches = math.ceil(VECTORS_PER_NUMBER * form.width / (form.num_tokens * PROBE_IMAGES))
    for _, (rows, _) in zip(range(num_batches), _vectors(request, teacher, PROBE_IMAGES), strict=False):
        yield rows


def _target(request: CacheRequest, folder: Path, form: Form, reduction: Reduction | None) -> CachedTarget:
    width = request.config.pca or form.width
    layout = Layout(len(request.source), form.num_tokens, width, request.config.dtype)
    return CachedTarget(FeatureCache(folder, layout), form, request.distillation.whitening, reduction)


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = read_object(path)
        if not all(isinstance(manifest[name], dict) for name in ("key", "names", "form", "stored")):
            raise ValueError("its parts are no mappings")
        return manifest
    except FileNotFoundError as error:
        raise DataError(
            f"{path}: written by rank 0 and not seen here",
            "name a folder on a file system that all machines share",
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: is no manifest of a teacher cache ({error})", "name another folder, or remove this one"
        ) from error


def form_of(folder: Path, manifest: dict[str, Any]) -> Form:
    """The form of the stored vectors, by the manifest. Raises DataError if it states none."""
    stated = manifest["form"]
    sizes, grid = [stated.get("num_tokens"), stated.get("width")], stated.get("grid")
    sizes += grid if isinstance(grid, list) and len(grid) == 2 else [] if grid is None else [None]
    is_form = set(stated) == set(Form._fields) and isinstance(stated["has_class_token"], bool)
    if not is_form or not all(type(size) is int and 0 < size < 1 << 31 for size in sizes):
        raise DataError(
            f"{folder / MANIFEST}: states no form of stored vectors: {stated!r:.200}",
            "name another folder, or remove this one",
        )
    return Form(**stated | {"grid": grid and tuple(grid)})


def _refuse_others(
    folder: Path, manifest: dict[str, Any], key: dict[str, Any], names: dict[str, str]
) -> None:
    """Raises ConfigError, or DataError, naming each difference with both values."""
    there, asked = manifest["key"], json.loads(json.dumps(key))
    different = [name for name in {**there, **asked} if there.get(name) != asked.get(name)]
    if not different:
        return

    def shown(values: dict[str, Any], called: dict[str, str], name: str) -> str:
        return f"{called[name]} ({str(values.get(name))[:12]})" if name in called else str(values.get(name))

    lines = [
        f"  {name}: {shown(there, manifest['names'], name)} in the cache, {shown(asked, names, name)} in this run"
        for name in different
    ]
    kind = DataError if all(name.startswith("images.") for name in different) else ConfigError
    raise kind(
        "\n".join([f"{folder}: a cache of other teacher features than this run's", *lines]),
        "name another folder, or --teacher-cache auto, which finds the one that fits or begins it",
    )


def _read_components(folder: Path, manifest: dict[str, Any]) -> Reduction | None:
    from safetensors import SafetensorError
    from safetensors.torch import load

    if manifest["key"].get("pca") is None:
        return None
    path = folder / COMPONENTS
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read: {error.strerror}", "remove the folder, or name another"
        ) from error
    if hashlib.sha256(content).hexdigest() != manifest.get("components_sha256"):
        raise DataError(f"{path}: is damaged: not what was written", "remove the folder, or name another")
    try:
        tensors = load(content)
        return Reduction(tensors["mean"], tensors["components"])
    except (KeyError, SafetensorError) as error:
        raise DataError(
            f"{path}: holds no components: {error}", "remove the folder, or name another"
        ) from error


def _check_size(request: CacheRequest, cache: FeatureCache, form: Form) -> int:
    """The bytes that this run's crops take. Raises ConfigError above the limit, ResourceError above what is free."""
    config = request.config
    views = views_filled(request.epochs, config.views)
    total = cache_bytes(len(request.source), views, form.num_tokens, form.width, config.dtype, config.pca)
    fewer = "fewer --teacher-cache.views, --teacher-cache.dtype int8 or a --teacher-cache.pca make it smaller"
    what = f"{cache.folder}: {len(request.source):,} images x {views} crops are {total / 1e9:.3g} GB"
    if config.max_gigabytes is not None and total > 1e9 * config.max_gigabytes:
        raise ConfigError(f"{what}, more than teacher_cache.max_gigabytes {config.max_gigabytes:g}", fewer)
    missing, free = max(0, total - cache.bytes_on_disk()), shutil.disk_usage(cache.folder).free
    if missing > free:
        raise ResourceError(
            f"{what}; {missing / 1e9:.3g} GB are still to be written and {free / 1e9:.3g} GB are free", fewer
        )
    return total
