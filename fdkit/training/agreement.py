"""What all processes of a run must have alike before they train together: found at the start, not in the result.

Each process reads its own configuration, code, images and teacher. Where those differ, gradients are averaged all the
same and nothing fails: the run is of something that nobody asked for.
"""

import hashlib
import logging
import platform
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from fdkit.config import Values, parse_yaml
from fdkit.data.sources import ImageSource
from fdkit.errors import ConfigError, DataError, DistributedError, WeightsError
from fdkit.teachers.licensing import recorded_teachers
from fdkit.training.distributed import World, broadcast, gather

log = logging.getLogger("fdkit")

OF_A_HOST = (
    "data", "output", "device", "resume", "overwrite", "json", "recipe", "loader.workers", "loader.decoder",
    "loader.retry_seconds", "loader.timeout_seconds",
)  # fmt: skip
"""Fields that may differ between processes: each host has its own. What lies at `data` is compared by itself."""
DECISIVE = ("fdkit", "torch", "timm", "open-clip-torch")
"""Software that must be the same; of what is in COMPARED besides, a difference is said."""
COMPARED = ("python", *DECISIVE, "torchvision", "numpy", "pillow")


def require_same_setting(config_yaml: str, world: World) -> None:
    """Every process calls this with its whole configuration (YAML).

    Raises ConfigError naming the process and the fields that differ, DistributedError if it runs other code.
    """
    if world.size == 1 or not dist.is_initialized():
        return
    told = gather((socket.gethostname(), config_yaml, software()), world)
    first = dict(flat(parse_yaml(told[0][1], "the configuration of rank 0")))
    for rank, (host, text, versions) in enumerate(told):
        own = dict(flat(parse_yaml(text, f"the configuration of rank {rank}")))
        fields = [
            f"{name} is {own.get(name, '(not there)')!r}, on rank 0 {first.get(name, '(not there)')!r}"
            for name in sorted(own.keys() | first.keys())
            if own.get(name) != first.get(name) and not _is_below(name, OF_A_HOST)
        ]
        if fields:
            raise ConfigError(
                f"{_name(rank, host, world)} has another configuration: " + "; ".join(fields),
                "start every process with the same command",
            )
        _compare_software(versions, told[0][2], _name(rank, host, world), world)


def _compare_software(own: Mapping[str, str], first: Mapping[str, str], who: str, world: World) -> None:
    for part in (part for part in COMPARED if own.get(part) != first.get(part)):
        sentence = f"{who} runs {part} {own.get(part, '(none)')}, and rank 0 {first.get(part, '(none)')}"
        if part in DECISIVE:
            raise DistributedError(sentence, "install the same software on every host")
        if world.is_main:
            log.warning("%s: results may differ in their last digits from those of one software", sentence)


def require_same_images(source: ImageSource, world: World) -> None:
    """Every process calls this. Raises DataError, on all, naming a process that sees other images, and which."""
    if world.size == 1:
        return
    told = gather((socket.gethostname(), source.fingerprint, len(source)), world)
    if len({fingerprint for _, fingerprint, _ in told}) == 1:
        return
    places = gather(_first_difference(source, world), world)
    wanted = sorted({place for place in places if place is not None and place < told[0][2]})
    theirs = broadcast({place: source.describe(place) for place in wanted} if world.is_main else {}, world)
    owns = gather({place: source.describe(place) for place in wanted if place < len(source)}, world)
    for rank, (host, fingerprint, count) in enumerate(told):
        if fingerprint == told[0][1]:
            continue
        details = [f"{count} images there, {told[0][2]} on rank 0"] if count != told[0][2] else []
        place = places[rank]
        if place in theirs and place in owns[rank]:
            details.append(f"image {place} is {owns[rank][place]}, on rank 0 {theirs[place]}")
        if not details:
            details.append("the same names with other sizes or labels")
        raise DataError(
            f"{_name(rank, host, world)} sees other images in {source.name} than rank 0: {'; '.join(details)}",
            "give every host the same files; fdkit pack makes archives that are easy to compare",
        )


def _first_difference(source: ImageSource, world: World) -> int | None:
    """The first position whose name is not the one that rank 0 has there; None if all names are alike."""
    own = np.array([_mark(source, index) for index in range(len(source))], dtype=np.uint64)
    first = broadcast(own if world.is_main else np.empty(0, np.uint64), world)
    shared = min(len(own), len(first))
    different = np.flatnonzero(own[:shared] != first[:shared])
    if len(different):
        return int(different[0])
    return None if len(own) == len(first) else shared


def _mark(source: ImageSource, index: int) -> int:
    """A number for the name of an image below its folder, wherever a host has mounted that."""
    name = getattr(source, "member_name", source.describe)(index)
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def require_agreed_teachers(
    facts: Mapping[str, Any], world: World, *, recorded: Mapping[str, Any], folder: Path
) -> None:
    """Every process calls this with what run.json is to say; recorded: what it says of a resumed run's first start.

    Raises WeightsError for a teacher whose weights are not those the run began with, or not the same on every process.
    Where no checksum was recorded, as of random weights, nothing is compared.
    """
    before = {str(teacher.get("name")): teacher for teacher in recorded_teachers(dict(recorded))}
    for teacher in recorded_teachers(dict(facts)):
        old = before.get(str(teacher["name"]), {})
        files, old_files = ((one.get("origin") or {}).get("files", {}) for one in (teacher, old))
        changed = [name for name in files if old_files.get(name, files[name]) != files[name]]
        if changed or (old.get("sha256") and old["sha256"] != teacher["sha256"]):
            raise WeightsError(
                f"{folder}: the teacher {teacher['name']} is not the one the run began with: "
                f"{_identity(teacher, changed)}, was {_identity(old, changed)}",
                "bring the former file back, or choose another --output",
            )
    if world.size > 1:
        _require_same_weights(facts, world)


def _require_same_weights(facts: Mapping[str, Any], world: World) -> None:
    own = {str(teacher["name"]): teacher["sha256"] for teacher in recorded_teachers(dict(facts))}
    told = gather((socket.gethostname(), own), world)
    for rank, (host, digests) in enumerate(told):
        for name, sha256 in digests.items():
            if sha256 != told[0][1].get(name):
                raise WeightsError(
                    f"{_name(rank, host, world)}: the weights of {name} have SHA-256 {sha256}, on rank 0 "
                    f"{told[0][1].get(name)}",
                    "copy the same file to every host",
                )


def _identity(teacher: Mapping[str, Any], files: Sequence[str]) -> str:
    """Its checksums, and the revision they are of."""
    origin = teacher.get("origin") or {}
    known = origin.get("files", {})
    digests = [f"{name} {known[name]}" for name in files if name in known] or [str(teacher.get("sha256"))]
    of_revision = f" of revision {origin['revision']}" if origin.get("revision") else ""
    return f"SHA-256 {', '.join(digests)}{of_revision}"


@cache
def software() -> dict[str, str]:
    """Versions of what decides results; of fdkit, whose version says little in a checkout, a digest of its code too."""
    versions = {"python": platform.python_version()}
    for name in COMPARED[1:]:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    digest, root = hashlib.sha256(), Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    versions["fdkit"] = f"{versions.get('fdkit', '')} ({digest.hexdigest()[:12]})".strip()
    return versions


def flat(values: Values, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The fields of a nested configuration by their dotted names."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _is_below(name: str, fields: tuple[str, ...]) -> bool:
    return any(name == field or name.startswith(f"{field}.") for field in fields)


def _name(rank: int, host: str, world: World) -> str:
    return f"rank {rank} of {world.size} on {host}"
