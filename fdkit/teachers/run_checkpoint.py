"""The checkpoints of a run folder, read only: which there are, whether one is whole, and the networks it holds.

A checkpoint is the folder `RUN/checkpoints/step-00000N`, as `fdkit.training.checkpoint` writes it: the tensors of the
method in model.safetensors, or in parts that several processes wrote (see `fdkit.teachers.shards`), and a manifest with
the SHA-256 of every file.
"""

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdkit.data.json_file import read_object
from fdkit.errors import ConfigError, WeightsError
from fdkit.teachers.shards import group_files, read_group

if TYPE_CHECKING:
    from fdkit.teachers.weights import State

CHECKPOINTS = "checkpoints"
MODEL_FILE = "model.safetensors"
MANIFEST_FILE = "manifest.json"
EXPORTED_FIRST = ("averaged", "teacher", "student")
"""What a finished run hands on is the first of these that the method has: the moving average of a fine-tuned model,
the teacher of DINO and EsViT, else what took the gradient steps."""
_NAMED = re.compile(r"step-\d+(\.corrupt-\d+)?")
_STEP = re.compile(r"step-(\d{8,})")
_MODEL_FILES = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
_NETWORK = re.compile(r"(\w+)\.network\.(.+)")


def checkpoint_at(path: Path) -> Path | None:
    """The folder of the checkpoint that a path names, whether it is there or not; None for any other path."""
    folder = path.parent if _MODEL_FILES.fullmatch(path.name) else path
    return folder if _NAMED.fullmatch(folder.name) and folder.absolute().parent.name == CHECKPOINTS else None


def list_checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, first step first, whole or not; those set aside as damaged are left out."""
    folder = run / CHECKPOINTS
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _STEP.fullmatch(path.name)), key=step_of)


def step_of(path: Path) -> int:
    """Optimiser steps done when this checkpoint was written."""
    return int(path.name.removeprefix("step-"))


def names_of(run: Path) -> str:
    """The checkpoints of a run in words, for messages."""
    names = [path.name for path in list_checkpoints(run)]
    return ", ".join(names) if names else "none"


def weights_file(path: Path) -> Path:
    """The file whose SHA-256 tells a checkpoint's weights: of a model in parts, the manifest with that of each part."""
    return path / MODEL_FILE if (path / MODEL_FILE).exists() else path / MANIFEST_FILE


def damage_of(path: Path, *, required: str | None = None, whole: bool = False) -> str | None:
    """What is wrong with a checkpoint, in words; None if its file has the SHA-256 that the manifest states.

    required: the file; None is what a model is read from, which may be several. whole: every other file of it, too,
    such as the optimiser's state.
    """
    try:
        manifest = read_object(path / MANIFEST_FILE)
        files: dict[str, dict[str, Any]] = manifest["files"]
        needed = (required,) if required else group_files(files, "model")
        if manifest["step"] != step_of(path) or not needed or not set(needed) <= files.keys():
            return f"{MANIFEST_FILE} is of another checkpoint"
        for name in files if whole else needed:
            size, wanted = (path / name).stat().st_size, files[name]
            if size != wanted["size"]:
                return f"{name} has {size:,} bytes, not {wanted['size']:,}"
            if sha256_now(path / name) != wanted["sha256"]:
                return f"the SHA-256 of {name} is wrong"
    except OSError as error:
        return f"{Path(error.filename or path).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST_FILE} cannot be read"
    return None


def sha256_now(path: Path) -> str:
    """SHA-256 of a file as it is on the disk, whatever was read of it before."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_sound(path: Path) -> None:
    """Raises WeightsError for a checkpoint that is not there, was set aside, or is damaged, naming those there are."""
    run = path.parent.parent
    known = f"checkpoints of {run}: {names_of(run)}"
    if not path.is_dir():
        raise WeightsError(f"there is no checkpoint {path.name} in {path.parent}", known)
    if not _STEP.fullmatch(path.name):
        raise WeightsError(f"{path} was set aside because it is damaged", known)
    damage = damage_of(path)
    if damage is not None:
        raise WeightsError(f"the checkpoint {path} is damaged: {damage}", known)


def network_state(path: Path, key: str | None = None) -> "State":
    """The tensors of one network of a sound checkpoint, under the network's own names.

    key: which of them, such as "student", "teacher" or "momentum_student"; None is what the finished run exports.
    Raises ConfigError for one that is not there, WeightsError if there is none at all.
    """
    networks: dict[str, State] = {}
    for name, value in read_group(path, "model").items():
        found = _NETWORK.fullmatch(name)
        if found is not None:
            networks.setdefault(found[1], {})[found[2]] = value
    chosen = key or next((name for name in EXPORTED_FIRST if name in networks), "")
    if chosen in networks:
        return networks[chosen]
    if key is not None:
        raise ConfigError(f"the checkpoint {path} holds no network {key}", f"it holds {', '.join(networks)}")
    raise WeightsError(
        f"the checkpoint {path} holds no student",
        f"name one of its networks: {', '.join(networks) or 'it has none'}",
    )
