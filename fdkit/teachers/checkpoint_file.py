"""A file of weights as a backbone: recognised by its tensors, and checked against what it is said to be."""

import logging
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from fdkit.errors import ConfigError, WeightsError
from fdkit.models.backbone import Backbone
from fdkit.teachers.building import (
    build_open_clip_teacher,
    build_teacher,
    refuse_wrong_activation,
    with_preprocessing,
)
from fdkit.teachers.catalog import CATALOG, Entry, Official
from fdkit.teachers.files import read_file, sha256_of, verify
from fdkit.teachers.hub import file_name
from fdkit.teachers.official import LAYOUTS, Change, Network, Reading
from fdkit.teachers.official._layout import Grid, State, match, nearest, refuse_linear_probe, state_in
from fdkit.teachers.official.bias_tables import window_of
from fdkit.teachers.request import Loaded, Request
from fdkit.teachers.weights import WithoutInit, check_dense, fit_library, load_whole, resampled_positions

logger = logging.getLogger("fdkit")

SIZES = {"embed_dim", "depth", "depths", "dims", "layers", "patch_size", "mlp_ratio", "width", "base_width"}
"""Arguments a named architecture fixes: a file of other sizes is another network."""
UNSIGNED = {"vit", "dino", "deit"}
"""Layouts of files that show nothing but a plain ViT with learned positions, with or without a classifier."""
SIGNED_BY_NAME = {*UNSIGNED, "mae", "supmae"}
"""Layouts whose files may be as plain, once decoders and heads are gone."""
TWINS = {"resnet": "dino_resnet", "dino_resnet": "resnet"}
"""Layouts of one network alone and in its training checkpoint."""


def load_file(path: Path, request: Request, row: Entry | None = None) -> Loaded:
    """Weights in a file, in the network its tensors show or the architecture it is said to be.

    row: the teacher of the catalog whose official file it is.
    Raises WeightsError if it is none of the known layouts, does not fit, or is not the file its name says.
    """
    row = row or CATALOG.get(request.architecture or "")
    content = read_file(path)
    digest = sha256_of(path)
    for entry in CATALOG.values():
        if entry.official is not None and _is_file_of(entry.official, path) and row in (None, entry):
            _verify(path, entry.official)
    state = state_in(content, source=str(path), checkpoint_key=request.checkpoint_key)
    check_dense(state, source=str(path))
    refuse_linear_probe(content, state, source=str(path))
    architecture = _architecture(request, row, path)
    reading = None
    if architecture is None or not architecture.startswith("open_clip:"):
        reading = match(state, LAYOUTS, checkpoint_key=request.checkpoint_key, architecture=architecture)
    if reading is not None and not (request.keep_head and architecture):
        loaded = load_reading(reading, request, row, architecture, source=str(path))
        is_assumed = row is None and architecture is None and reading.layout in UNSIGNED
        _say_statistics(loaded.backbone, loaded.layout, source=str(path), is_assumed=is_assumed)
    elif architecture is not None:
        loaded = _load_by_library(state, request, row, architecture, reading, source=str(path))
    else:
        raise _unknown(path, state)
    if row is not None:
        loaded = loaded._replace(license=row.license, is_noncommercial=row.is_noncommercial)
    _say_left_out(loaded.audit, source=str(path))
    return loaded._replace(sha256=digest)


def load_reading(
    reading: Reading, request: Request, row: Entry | None, architecture: str | None, *, source: str
) -> Loaded:
    """A recognised file in its network; what it is said to be must agree with what it is."""
    _refuse_other_teacher(reading, row, source=source)
    network = reading.network
    size = request.image_size or (row.image_size if row else None)
    backbone = _network_of(reading, row, architecture, size)
    state, resampled = _at_its_size(reading, backbone)
    hint = f"the file is {describe(reading)}" + (f"; read as {architecture}" if architecture else "")
    load_whole(backbone.network, state, source=source, hint=hint)
    assumption = "" if architecture else network.assumption
    if assumption:
        logger.info("%s: %s; --arch sets another", source, assumption)
    audit = tuple(resampled.get(change.key, change) for change in reading.audit)
    return Loaded(backbone, source, layout=describe(reading), audit=audit, assumption=assumption)


def _network_of(reading: Reading, row: Entry | None, architecture: str | None, size: int | None) -> Backbone:
    """The network a reading is of, without its weights: what it shows, or what is named with what that leaves open."""
    network = reading.network
    at_size = network.at_size(size) if network.at_size is not None and size is not None else {}
    changes: dict[str, Any] = {}
    if architecture is None or row is not None:  # else the architecture named has an evaluation of its own
        stated = {"crop_ratio": network.crop_ratio, "interpolation": network.interpolation}
        changes = {key: value for key, value in stated.items() if value is not None}
    with WithoutInit():
        if architecture is None:
            args = {**network.assumed_args, **network.model_args, **at_size}
            backbone = build_teacher(network.architecture, size, args)
            changes |= {"mean": network.mean, "std": network.std}
        else:
            args = {**_named_args(reading, row, architecture), **at_size}
            backbone = build_teacher(architecture, size, args)
    if row is not None:
        changes |= {"mean": row.mean, "std": row.std}
    return with_preprocessing(backbone, changes)


def _load_by_library(
    state: State,
    request: Request,
    row: Entry | None,
    architecture: str,
    reading: Reading | None,
    *,
    source: str,
) -> Loaded:
    """A file that only the named architecture explains, or whose classifier stays, through timm's or open_clip's own
    conversion; what the file shows besides holds here too.
    """
    if reading is not None:
        _refuse_other_teacher(reading, row, source=source)
    with WithoutInit():
        if architecture.startswith("open_clip:"):
            name = architecture.removeprefix("open_clip:")
            backbone = build_open_clip_teacher(*name.partition("/")[::2], request.image_size)
        else:
            refuse_wrong_activation(architecture)
            args = _named_args(reading, row, architecture)
            backbone = build_teacher(architecture, request.image_size, args, keep_head=request.keep_head)
    hint = f"read as {architecture}; --arch NAME sets another"
    audit = fit_library(backbone, state, source=source, hint=hint)
    _say_statistics(backbone, architecture, source=source, is_assumed=False)
    return Loaded(backbone, source, layout=f"{architecture} (named)", audit=audit)


def describe(reading: Reading) -> str:
    """What a file is, in words: its layout and the sizes its tensors show."""
    args = reading.network.model_args
    words = [f"{args[key]} {word}" for key, word in (("embed_dim", "wide"), ("depth", "deep")) if key in args]
    words += [f"patch {args['patch_size']}"] if "patch_size" in args else []
    words += [f"{args['img_size']} px"] if "img_size" in args else []
    return f"{reading.title}, {reading.network.architecture.partition('_')[0]} " + ", ".join(words)


def _architecture(request: Request, row: Entry | None, path: Path) -> str | None:
    """The timm name (or `open_clip:ARCH/TAG`) a file is said to be of, by flag, catalog row or its own name."""
    if row is not None and row.model:
        return row.model.removeprefix("timm:")
    if row is not None and row.official is not None:
        return row.official.architecture
    if request.architecture:
        return request.architecture.removeprefix("timm:")
    return _named_after(path)


def _named_after(path: Path) -> str | None:
    """The timm model a file is named after, such as vit_tiny_patch16_224.safetensors; None if it is none."""
    import timm

    if not timm.is_model(path.stem.partition(".")[0]):
        return None
    is_known = path.stem in timm.list_pretrained() or "." not in path.stem
    return path.stem if is_known else path.stem.partition(".")[0]


def _is_file_of(official: Official, path: Path) -> bool:
    """Whether a file has the name of an official one; names such as checkpoint_best.pth are anybody's."""
    return bool(official.url) and file_name(official.url) == path.name


def _verify(path: Path, official: Official) -> None:
    """Refuses a file that has the name of an official one and not its checksum, where one is published."""
    if official.sha256:
        verify(path, official.sha256)
    if official.md5:
        verify(path, official.md5, algorithm="md5")


def _refuse_other_teacher(reading: Reading, row: Entry | None, *, source: str) -> None:
    """Refuses a file that is not of the teacher it is said to be."""
    _refuse_other_layout(reading, row, source=source)
    _refuse_other_args(reading, row, source=source)


def _refuse_other_layout(reading: Reading, row: Entry | None, *, source: str) -> None:
    if row is None or row.official is None or reading.layout == row.official.layout:
        return
    if reading.layout.startswith("hf_"):
        return  # transformers' own names say nothing of the family, and its sizes are checked
    if reading.layout in UNSIGNED and row.official.layout in SIGNED_BY_NAME:
        return
    if TWINS.get(reading.layout) == row.official.layout:
        return
    raise WeightsError(
        f"{source} is not {row.name}: its tensors are those of {describe(reading)}",
        hint="leave out --arch to read it as what it is, or give the file of " + row.name,
    )


def _refuse_other_args(reading: Reading, row: Entry | None, *, source: str) -> None:
    """Refuses a file that shows another window or number of heads than its teacher has, though its tensors may fit."""
    if row is None or row.official is None:
        return
    stated, shown = row.official.model_args, reading.network.model_args
    for name in stated.keys() & shown.keys():
        if shown[name] != stated[name]:
            raise WeightsError(
                f"{source} is not {row.name}: it shows {name} {shown[name]}, not {stated[name]}",
                hint="leave out --arch to read it as what it is",
            )


def _named_args(reading: Reading | None, row: Entry | None, architecture: str) -> dict[str, Any]:
    """Arguments beside a named architecture: the catalog's, and what the file shows that the name leaves open."""
    own = dict(row.official.model_args) if row is not None and row.official is not None else {}
    return own | (_shared_args(reading.network, architecture) if reading is not None else {})


def _shared_args(network: Network, architecture: str) -> dict[str, Any]:
    """What a file shows that its named architecture leaves open: not its sizes, and nothing for another family."""
    import timm

    def module(name: str) -> str:
        entrypoint = timm.models.model_entrypoint(name.partition(".")[0])
        return sys.modules[entrypoint.__module__].__name__.replace(".deit", ".vision_transformer")

    if not timm.is_model(architecture.partition(".")[0]) or module(architecture) != module(
        network.architecture
    ):
        return {}
    return {key: value for key, value in network.model_args.items() if key not in SIZES}


def _at_its_size(reading: Reading, backbone: Backbone) -> tuple[State, dict[str, Change]]:
    """The file's tensors with position tables for the network's grid, and the audit of those that changed."""
    network: Any = backbone.network
    own, state, changed = network.state_dict(), dict(reading.state), {}
    names = {change.became: change.key for change in reading.audit if change.became}
    for key in [key for key in state if key in own and state[key].shape != own[key].shape]:
        is_bias = key.endswith("relative_position_bias_table")
        resample = reading.network.resample_bias if is_bias else reading.network.resample_positions
        if not is_bias and key != "pos_embed":
            continue
        if resample is None:
            raise ConfigError(
                f"image size {backbone.image_size}: {reading.title} takes no size but its own, "
                f"{reading.network.model_args.get('img_size', 'which the file does not show')}",
                hint="leave --image-size out",
            )
        if is_bias:
            attention = network.get_submodule(key.rpartition(".")[0])
            old, new = _windows(state[key], own[key], attention)
            state[key] = resample(state[key], old, new)
        else:
            new = network.patch_embed.grid_size
            state[key], old = resampled_positions(state[key], new, resample)
        reason = f"resampled from {_times(old)} to {_times(new)} as the official code does"
        changed[names[key]] = Change(names[key], key, reason)
    if changed:
        logger.info("position tables (%d) %s", len(changed), next(iter(changed.values())).reason)
    return state, changed


def _windows(table: Tensor, own: Tensor, attention: Any) -> tuple[Grid, Grid]:
    """Windows of a bias table in the file and in the network; rows beyond the offsets are the class token's."""
    height, width = attention.window_size
    num_class_rows = own.shape[0] - (2 * height - 1) * (2 * width - 1)
    side = window_of(table, num_class_rows)
    return (side, side), (height, width)


def _times(grid: Grid) -> str:
    return f"{grid[0]}x{grid[1]}"


def _say_left_out(audit: Iterable[Change], *, source: str) -> None:
    """What of the file is no part of the network, by reason."""
    left_out: dict[str, list[str]] = {}
    for change in audit:
        if change.became is None:
            left_out.setdefault(change.reason, []).append(change.key)
    for reason, keys in left_out.items():
        count = f"{len(keys)} tensor" + ("s" if len(keys) > 1 else "")
        logger.info("%s: left out %s (%s), such as %s", source, count, reason, keys[0])


def _say_statistics(backbone: Backbone, what: str, *, source: str, is_assumed: bool) -> None:
    stated = backbone.preprocessing
    logger.info(
        "%s: read as %s; %s mean %s and std %s",
        source,
        what,
        "the file does not show its statistics (--mean, --std): assuming" if is_assumed else "with",
        tuple(round(value, 4) for value in stated.mean),
        tuple(round(value, 4) for value in stated.std),
    )


def _unknown(path: Path, state: State) -> WeightsError:
    shown = ", ".join(f"{key} {tuple(value.shape)}" for key, value in list(state.items())[:3])
    return WeightsError(
        f"cannot tell what {path} is: none of {len(LAYOUTS)} known layouts has its tensors; first: {shown}",
        hint=f"nearest known layout: {nearest(state, LAYOUTS)}; --arch names a timm model, open_clip:ARCH or a "
        "teacher of `fdkit teachers`",
    )
