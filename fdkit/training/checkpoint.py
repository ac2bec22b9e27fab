"""Checkpoints that are whole or not there: safetensors and JSON, a manifest of SHA-256, never pickle.

A checkpoint is the folder `step-00000N`. It is written beside its place, synced to disk, and renamed, the manifest
last; so a process killed at any moment leaves the older ones as they were. Reading takes the newest whose hashes
are right and sets damaged ones aside by name; nothing is ever deleted but the oldest sound ones.

Where tensors lie in slices on several processes, each writes and hashes its own part (`save_parts`), all into the same
folder, and reading takes the rows that are wanted from whatever parts there are. So any number of processes reads what
any number wrote. torch's distributed checkpoints (DCP) do as much, and unpickle their metadata.
"""

import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import safetensors
import safetensors.torch
from torch import Tensor

from fdkit.data.json_file import read_object
from fdkit.errors import FdkitError, OutputError, ResourceError, WeightsError
from fdkit.teachers.run_checkpoint import MANIFEST_FILE, damage_of, sha256_now, step_of
from fdkit.teachers.shards import SHARDS_FILE, Rows, part_name, read_group
from fdkit.training.distributed import World, gather
from fdkit.training.run_files import set_aside

log = logging.getLogger("fdkit")

T = TypeVar("T")

STATE_FILE = "state.json"
_STEP = re.compile(r"step-(\d{8,})")
_PARTIAL = ".writing-"


class Checkpoint(NamedTuple):
    """What a checkpoint holds."""

    tensors: dict[str, dict[str, Tensor]]
    """One group of named tensors a file: "model", "optimizer", ..."""
    state: dict[str, Any]
    """Everything else, as JSON."""


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step stands inside the folder of checkpoints."""
    return folder / f"step-{step:08d}"


def list_steps(folder: Path) -> list[Path]:
    """Checkpoints, newest first, sound or not; those set aside as corrupt are left out."""
    if not folder.is_dir():
        return []
    return sorted(
        (path for path in folder.iterdir() if _STEP.fullmatch(path.name)), key=step_of, reverse=True
    )


def save_checkpoint(folder: Path, step: int, content: Checkpoint, *, keep: int, keep_also: str = "") -> Path:
    """Write the checkpoint of a step into `folder` and drop all but the newest `keep`; its path.

    keep_also: path of an older one that stays too.
    A sound checkpoint of the same step is left as it is.
    Raises ResourceError if the disk is full and OutputError if it cannot be written; older ones then stay.
    """
    target = step_folder(folder, step)
    try:
        partial = _begin(folder, target)
        if partial is None:
            return target
        _require_space(folder, content)
        files = _write_groups(partial, {name: f"{name}.safetensors" for name in content.tensors}, content)
        _finish(partial, target, files, content.state)
    except (OSError, safetensors.SafetensorError) as error:
        shutil.rmtree(_partial(folder, target), ignore_errors=True)
        raise _explain_write_failure(target, error) from error
    _prune(folder, keep, keep_also)
    return target


def save_parts(
    folder: Path,
    step: int,
    content: Checkpoint,
    rows: Mapping[str, Mapping[str, Rows]],
    world: World,
    *,
    keep: int,
    keep_also: str = "",
) -> Path:
    """As `save_checkpoint`, of tensors that lie in slices on all processes, each of which calls this; the path.

    content: what this process holds; rows: by group and name, which rows that is. What is in no slice is written by
    rank 0. Raises on every process what failed on any, and OutputError if the processes do not share the folder.
    """
    target = step_folder(folder, step)
    rows = {
        group: {name: one for name, one in rows.get(group, {}).items() if name in tensors}
        for group, tensors in content.tensors.items()
    }
    partial = _together(world, target, lambda: _begin(folder, target) if world.is_main else None)[0]
    if partial is None:
        return target

    def write() -> dict[str, Any]:
        own = {
            group: {name: one for name, one in tensors.items() if world.is_main or name in rows[group]}
            for group, tensors in content.tensors.items()
        }
        _require_space(partial, content._replace(tensors=own))
        names = {group: part_name(group, world.rank, world.size) for group, tensors in own.items() if tensors}
        return _write_groups(partial, names, Checkpoint(own, {}))

    parts = _together(world, target, write)
    edges = gather(
        {group: {name: one.stop for name, one in cut.items()} for group, cut in rows.items()}, world
    )

    def finish() -> None:
        if world.is_main:
            files = {name: facts for part in parts for name, facts in part.items()}
            _require_all(partial, files)
            index = {
                group: {name: [0, *(edge[group][name] for edge in edges)] for name in cut}
                for group, cut in rows.items()
            }
            (partial / SHARDS_FILE).write_text(json.dumps(index) + "\n")
            files |= _facts([partial / SHARDS_FILE])
            _finish(partial, target, files, content.state)
            _prune(folder, keep, keep_also)

    _together(world, target, finish)
    return target


def _together(world: World, target: Path, work: Callable[[], T]) -> list[T]:
    """What some work gives on every process, by rank. Raises on all what failed on one, after cleaning up."""
    done: list[T] = []
    failed: tuple[type[FdkitError], str, str] | None = None
    try:
        done.append(work())
    except FdkitError as error:
        failed = (type(error), error.message, error.hint)
    except (OSError, safetensors.SafetensorError) as error:
        explained = _explain_write_failure(target, error)
        failed = (type(explained), explained.message, explained.hint)
    answers = gather((done, failed), world)
    for number, (_, failure) in enumerate(answers):
        if failure is not None:
            if world.is_main:
                shutil.rmtree(_partial(target.parent, target), ignore_errors=True)
            kind, message, hint = failure
            raise kind(f"rank {number}: {message}", hint)
    return [answer for answers_of_rank, _ in answers for answer in answers_of_rank]


def _require_all(partial: Path, files: Mapping[str, dict[str, Any]]) -> None:
    """Raises OutputError unless this process sees what all others wrote."""
    for name, facts in files.items():
        path = partial / name
        if not path.exists() or path.stat().st_size != facts["size"]:
            raise OutputError(
                f"{name} was written by another process and is not in {partial}",
                "put --output on a file system that all hosts share",
            )


def _partial(folder: Path, target: Path) -> Path:
    return folder / f"{_PARTIAL}{target.name}"


def _begin(folder: Path, target: Path) -> Path | None:
    """An empty folder to write into; None if the checkpoint is there and sound."""
    folder.mkdir(parents=True, exist_ok=True)
    if target.exists():
        damage = _damage(target)
        if damage is None:
            return None
        _set_aside(target, "it was damaged")
    _remove_partial(folder)
    partial = _partial(folder, target)
    partial.mkdir()
    return partial


def _prune(folder: Path, keep: int, keep_also: str) -> None:
    for old in list_steps(folder)[max(1, keep) :]:
        if str(old) != keep_also:
            shutil.rmtree(old)


def newest_sound(folder: Path) -> Path | None:
    """The newest checkpoint whose hashes are right; None if none was ever written.

    Newer ones that are damaged are renamed `step-N.corrupt-K` and logged; half-written ones are removed.
    Raises WeightsError if there are checkpoints but none is sound.
    """
    _remove_partial(folder)
    for path in list_steps(folder):
        damage = _damage(path)
        if damage is None:
            return path
        _set_aside(path, damage)
    corrupt = sorted(path.name for path in folder.glob("step-*.corrupt-*"))
    if corrupt:
        raise WeightsError(
            f"{folder}: no checkpoint is sound; damaged: {', '.join(corrupt)}",
            "nothing was deleted; put a sound copy back, or start anew with --overwrite (the old run is kept)",
        )
    return None


def load_checkpoint(path: Path, rows: Mapping[str, Mapping[str, Rows]] | None = None) -> Checkpoint:
    """The content of a sound checkpoint. Raises WeightsError naming a tensor of the model or optimiser that
    holds NaN or infinity.

    rows: by group and name, the rows that are wanted of tensors, instead of all.
    """
    groups = {file.name.partition(".")[0].partition("-0")[0] for file in path.glob("*.safetensors")}
    tensors = {group: read_group(path, group, (rows or {}).get(group)) for group in sorted(groups)}
    for group in ("model", "optimizer"):
        for name, value in tensors.get(group, {}).items():
            if value.is_floating_point() and not value.isfinite().all():
                raise WeightsError(
                    f"{path}: {name} of {group}.safetensors holds NaN or infinity",
                    "remove this checkpoint to continue from an older one",
                )
    try:
        return Checkpoint(tensors, read_object(path / STATE_FILE))
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"{path / STATE_FILE}: cannot be read: {error}",
            "remove this checkpoint to continue from an older one",
        ) from error


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that readers see the old or the new text, never a part."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _write_groups(partial: Path, names: Mapping[str, str], content: Checkpoint) -> dict[str, dict[str, Any]]:
    """Write groups of tensors to files of these names; what the manifest says of them."""
    for group, name in names.items():
        file = partial / name
        file.touch()
        mode = file.stat().st_mode  # save_file's own file would be readable by its owner only
        safetensors.torch.save_file(_separate(content.tensors[group]), file)
        file.chmod(mode)
    return _facts([partial / name for name in names.values()])


def _facts(files: list[Path]) -> dict[str, dict[str, Any]]:
    """Hash and size of files, which are on the disk by now."""
    with ThreadPoolExecutor(max(1, len(files))) as pool:
        hashes = list(pool.map(sha256_now, files))
    for file in files:
        _sync(file)
    return {
        file.name: {"sha256": sha256, "size": file.stat().st_size}
        for file, sha256 in zip(files, hashes, strict=True)
    }


def _finish(partial: Path, target: Path, files: dict[str, dict[str, Any]], state: dict[str, Any]) -> None:
    """Write what is left, the manifest last, and give the folder its name."""
    (partial / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n")
    files = files | _facts([partial / STATE_FILE])
    manifest = {"step": step_of(target), "files": dict(sorted(files.items()))}
    write_whole(partial / MANIFEST_FILE, json.dumps(manifest, indent=2) + "\n")
    _sync(partial)
    partial.rename(target)
    _sync(target.parent)


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors on the CPU of which no two share memory, as safetensors wants them."""
    seen: set[int] = set()
    separate = {}
    for name, value in tensors.items():
        value = value.detach().cpu().contiguous()
        if value.untyped_storage().data_ptr() in seen:
            value = value.clone()
        seen.add(value.untyped_storage().data_ptr())
        separate[name] = value
    return separate


def _damage(path: Path) -> str | None:
    return damage_of(path, required=STATE_FILE, whole=True)


def _set_aside(path: Path, damage: str) -> None:
    aside = set_aside(path)
    log.warning("checkpoint %s is damaged (%s); set aside as %s", path.name, damage, aside.name)


def _remove_partial(folder: Path) -> None:
    for partial in folder.glob(f"{_PARTIAL}*"):
        shutil.rmtree(partial)


def _require_space(folder: Path, content: Checkpoint) -> None:
    needed = sum(value.nbytes for tensors in content.tensors.values() for value in tensors.values())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free", str(folder))


def _explain_write_failure(target: Path, error: Exception) -> OutputError | ResourceError:
    full = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
    if getattr(error, "errno", None) in full or re.search(r"os error (28|122|27)\b", str(error)):
        return ResourceError(
            f"no room for the checkpoint {target}: {error}",
            "free some space (older checkpoints are intact), then run the same command with --resume",
        )
    return OutputError(f"cannot write the checkpoint {target}: {error}", "older checkpoints are intact")


def _sync(path: Path) -> None:
    """Have the file's content, or the folder's entries, on the disk itself before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
