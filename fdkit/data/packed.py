"""What a packed folder says of itself: its shards, their checksums, and the names of its classes."""

from pathlib import Path
from typing import Any, NamedTuple

from fdkit.data.json_file import read_object
from fdkit.data.text import printable
from fdkit.errors import DataError

MANIFEST = "fdkit-pack.json"
UNFINISHED = ".packing"
"""The folder of what is known of finished shards while others are still made."""


class Manifest(NamedTuple):
    """The manifest of a packed folder; it is written last, so one that is there stands for a whole set."""

    classes: tuple[str, ...]
    """Class names, label order; () when unlabelled."""
    shards: tuple[dict[str, Any], ...]
    """Of each: file, relative to the folder; bytes; images; sha256. The file says more, for packing again."""
    plan: dict[str, Any]
    """What was asked for."""


def is_unfinished(folder: Path) -> bool:
    """Whether packing into a folder began and did not end."""
    return (folder / UNFINISHED).is_dir() and not (folder / MANIFEST).exists()


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a packed folder, its shards' sizes compared; None if there is none.

    Raises DataError if it is damaged, or a shard is missing or of another size.
    """
    path = folder / MANIFEST
    try:
        read = read_object(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(
            f"{printable(str(path))}: cannot be read: {error}", "pack the images again"
        ) from error
    try:
        classes = tuple(str(name) for name in read["classes"])
        shards = tuple(
            {key: shard[key] for key in ("file", "bytes", "images", "sha256")} for shard in read["shards"]
        )
        plan = dict(read["plan"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{printable(str(path))}: is no manifest of packed images", "pack them again"
        ) from error
    for shard in shards:
        _require_whole(folder, shard)
    return Manifest(classes, shards, plan)


def _require_whole(folder: Path, shard: dict[str, Any]) -> None:
    path = folder / str(shard["file"])
    try:
        size = path.stat().st_size
    except (OSError, ValueError) as error:  # a name with a zero byte is no OSError
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise DataError(f"{printable(str(path))}: {reason}", "copy the whole packed folder again") from error
    if size != shard["bytes"]:
        raise DataError(
            f"{printable(str(path))}: {size} bytes, {shard['bytes']} when it was packed",
            "copy the whole packed folder again",
        )
