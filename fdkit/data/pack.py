"""Images written into tar shards that read fast: each shard whole or not there, each image large enough and no larger.

A folder holds SPLIT/shard-00000.tar and so on, and a manifest, written last. Members are CLASS/NUMBER-NAME.jpg with the
label in CLASS/NUMBER-NAME.cls, so WebDataset's readers know them too; images lie in an order drawn with the seed, as
readers that go through a shard from its beginning need it.
"""

import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from fdkit.data.decode import EXTENSIONS, BadImage, decode
from fdkit.data.json_file import read_object
from fdkit.data.packed import UNFINISHED
from fdkit.data.sources import ImageSource

VERSION = 2


class Settings(NamedTuple):
    """How images are packed."""

    short_side: int
    """Images with a longer short side, in pixels, are made this small; the others are copied byte for byte."""
    quality: int
    """JPEG quality, 1 to 100, of those made smaller."""
    images_per_shard: int
    seed: int


class Job(NamedTuple):
    """One shard to write."""

    file: str
    """Its path below the output folder."""
    split: str
    indices: np.ndarray
    """Which images of the split."""


class Packed(NamedTuple):
    """One image as it will be kept."""

    data: bytes
    extension: str
    is_resized: bool
    source_bytes: int | None
    """Bytes of its file before; None if it came from no file."""


def jobs(split: str, num_images: int, settings: Settings) -> Iterator[Job]:
    """The shards of a split; every image is in exactly one."""
    order = np.random.default_rng(settings.seed).permutation(num_images)
    for number, start in enumerate(range(0, num_images, settings.images_per_shard)):
        name = f"shard-{number:05d}.tar"
        file = name if split == "all" else f"{split}/{name}"
        yield Job(file, split, order[start : start + settings.images_per_shard])


def record_path(folder: Path, job: Job) -> Path:
    """Where a finished shard's record is kept until the manifest is written."""
    return folder / UNFINISHED / f"{job.file.replace('/', '-')}.json"


def finished(folder: Path, job: Job, listed: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """The record of a shard that is there and has its checksum; None otherwise.

    listed: what a manifest that is there says of it.
    """
    try:
        with (folder / job.file).open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None
    for record in (_read(record_path(folder, job)), listed):
        if record is not None and record.get("sha256") == sha256 and _is_record(record, job):
            return record
    return None


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return read_object(path)
    except (OSError, ValueError):
        return None


def _is_record(record: dict[str, Any], job: Job) -> bool:
    """Whether a record holds what `write_shard` writes."""
    counts = [record.get(name) for name in ("images", "resized", "bytes")]
    before, bad = record.get("source_bytes", ""), record.get("bad")
    return (
        record.get("file") == job.file
        and all(type(count) is int and count >= 0 for count in counts)
        and (before is None or (type(before) is int and before >= 0))
        and isinstance(bad, list)
        and all(isinstance(one, list) and [type(part) for part in one] == [str, str] for one in bad)
    )


def write_shard(source: ImageSource, job: Job, settings: Settings, folder: Path) -> dict[str, Any]:
    """Write one shard and its record, and give the record, which the manifest will hold: its counts, and what was bad.

    Raises OSError if it cannot be written; what was there before under its name stays then.
    """
    path = folder / job.file
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    record: dict[str, Any] = {"file": job.file, "images": 0, "resized": 0, "source_bytes": 0, "bad": []}
    with temporary.open("wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
            for index in job.indices.tolist():
                try:
                    image = packed_image(source, index, settings)
                except BadImage as error:
                    record["bad"].append([error.path, error.reason])
                    continue
                _add(archive, source, index, image)
                record["images"] += 1
                record["resized"] += image.is_resized
                record["source_bytes"] = _sum(record["source_bytes"], image.source_bytes)
        file.flush()
        os.fsync(file.fileno())
    with temporary.open("rb") as file:
        record["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    record["bytes"] = temporary.stat().st_size
    write_json(record_path(folder, job), record)  # first: without its shard it counts for nothing
    temporary.replace(path)
    return record


def packed_image(source: ImageSource, index: int, settings: Settings) -> Packed:
    """One image, made smaller if its short side is too long; its own bytes if not. Raises BadImage."""
    read_bytes = getattr(source, "read_bytes", None)
    data: bytes | None = read_bytes(index) if read_bytes else None
    image = source.read(index) if data is None else decode(data, source.describe(index))
    size = None if data is None else len(data)
    if min(image.size) > settings.short_side:
        return Packed(_resized(image, settings), ".jpg", True, size)
    if data is None:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return Packed(buffer.getvalue(), ".png", False, None)
    name: str = source.member_name(index)  # type: ignore[attr-defined]
    return Packed(data, os.path.splitext(name)[1].lower(), False, size)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file, whole or not at all, and to the disk."""
    temporary = path.with_name(f".{path.name}.part")
    with temporary.open("w") as file:
        json.dump(content, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _resized(image: Image.Image, settings: Settings) -> bytes:
    """As JPEG, the short side of the length asked for, antialiased."""
    scale = settings.short_side / min(image.size)
    width, height = (max(settings.short_side, round(side * scale)) for side in image.size)
    buffer = io.BytesIO()
    image.resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=settings.quality)
    return buffer.getvalue()


def _add(archive: tarfile.TarFile, source: ImageSource, index: int, image: Packed) -> None:
    key = _key(source, index)
    members = [(f"{key}{image.extension}", image.data)]
    if source.labels is not None:
        members.append((f"{key}.cls", b"%d" % source.labels[index]))
    for name, data in members:
        info = tarfile.TarInfo(name)  # no time and no owner: the same images make the same bytes
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))


def _key(source: ImageSource, index: int) -> str:
    """CLASS/NUMBER-NAME: without a dot, which would end it; NUMBER keeps images of one name apart."""
    name = getattr(source, "member_name", lambda index: "")(index)
    stem = os.path.basename(name)
    if stem.lower().endswith(EXTENSIONS):
        stem = os.path.splitext(stem)[0]
    key = f"{index:08d}" + (f"-{re.sub(r'[^A-Za-z0-9_-]+', '_', stem)[:80]}" if stem else "")
    if source.labels is None:
        return key
    folder = source.classes[source.labels[index]].replace("/", "_")
    return f"{folder if folder.strip('.') else '_'}/{key}"


def _sum(total: int | None, more: int | None) -> int | None:
    return None if total is None or more is None else total + more
