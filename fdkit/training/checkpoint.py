"""Checkpoints that are whole or not there: safetensors and JSON, a manifest of SHA-256, never pickle.

A checkpoint is the folder `step-00000N`. It is written beside its place, synced to disk, and renamed, the manifest
last; so a process killed at any moment leaves the older ones as they were. Reading takes the newest whose hashes
are right and sets damaged ones aside by name; nothing is ever deleted but the oldest sound ones.
"""

import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
from torch import Tensor

from fdkit.errors import OutputError, ResourceError, WeightsError
from fdkit.teachers.run_checkpoint import MANIFEST_FILE, damage_of, sha256_now, step_of

log = logging.getLogger("fdkit")

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
    partial = folder / f"{_PARTIAL}{target.name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if target.exists() and _damage(target) is None:
            return target
        if target.exists():
            _set_aside(target, "it was damaged")
        _remove_partial(folder)
        _require_space(folder, content)
        partial.mkdir()
        _write_files(partial, content)
        partial.rename(target)
        _sync(folder)
    except (OSError, safetensors.SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise _explain_write_failure(target, error) from error
    for old in list_steps(folder)[max(1, keep) :]:
        if str(old) != keep_also:
            shutil.rmtree(old)
    return target


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


def load_checkpoint(path: Path) -> Checkpoint:
    """The content of a sound checkpoint. Raises WeightsError naming a tensor of the model that holds NaN."""
    tensors = {file.stem: safetensors.torch.load_file(file) for file in sorted(path.glob("*.safetensors"))}
    for name, value in tensors.get("model", {}).items():
        if value.is_floating_point() and value.isnan().any():
            raise WeightsError(
                f"{path}: {name} holds NaN", "remove this checkpoint to continue from an older one"
            )
    return Checkpoint(tensors, json.loads((path / STATE_FILE).read_text()))


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that readers see the old or the new text, never a part."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _write_files(partial: Path, content: Checkpoint) -> None:
    for name, tensors in content.tensors.items():
        file = partial / f"{name}.safetensors"
        file.touch()
        mode = file.stat().st_mode  # save_file's own file would be readable by its owner only
        safetensors.torch.save_file(_separate(tensors), file)
        file.chmod(mode)
    (partial / STATE_FILE).write_text(json.dumps(content.state, indent=2) + "\n")
    files = sorted(partial.iterdir())
    with ThreadPoolExecutor(len(files)) as pool:
        hashes = list(pool.map(sha256_now, files))
    for file in files:
        _sync(file)
    manifest = {
        "step": step_of(Path(partial.name.removeprefix(_PARTIAL))),
        "files": {
            file.name: {"sha256": sha256, "size": file.stat().st_size}
            for file, sha256 in zip(files, hashes, strict=True)
        },
    }
    write_whole(partial / MANIFEST_FILE, json.dumps(manifest, indent=2) + "\n")
    _sync(partial)


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
    number = 1
    while (aside := path.with_name(f"{path.name}.corrupt-{number}")).exists():
        number += 1
    path.rename(aside)
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
