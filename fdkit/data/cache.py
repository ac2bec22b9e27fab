"""Arrays kept between runs: quick to make again, quicker to read; what cannot be trusted is made again."""

import contextlib
import hashlib
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np

log = logging.getLogger("fdkit")

Arrays = dict[str, np.ndarray]

_KEY = "key"


def cache_folder(kind: str) -> Path:
    """Where things of a kind are kept: $FDKIT_CACHE/KIND, or fdkit/KIND in the user's cache folder."""
    own = os.environ.get("FDKIT_CACHE")
    base = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fdkit"
    return base / kind


def read_arrays(kind: str, name: str, key: str) -> Arrays | None:
    """The arrays kept under a name; None if there are none, if they are of another key, or damaged.

    A checksum of every array is compared as it is read. Nothing in the file is ever run.
    """
    path = _path(kind, name)
    try:
        with np.load(path, allow_pickle=False) as file:
            if file[_KEY].tobytes() != key.encode():
                return None
            return {field: file[field] for field in file.files if field != _KEY}
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as error:  # a damaged archive can make its reader fail in any way
        log.warning("%s: cannot be read (%s): making it again", path, error)
        return None


def write_arrays(kind: str, name: str, key: str, arrays: Arrays) -> None:
    """Keep arrays under a name, whole or not at all. A cache that cannot be written is said once and done without."""
    path = _path(kind, name)
    everything: Any = {_KEY: np.frombuffer(key.encode(), np.uint8)} | arrays
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            np.savez(file, **everything)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if kind not in _unwritable:
            log.info("%s: nothing can be kept here (%s): it is made anew in every run", path.parent, error)
        _unwritable.add(kind)


_unwritable: set[str] = set()


def _path(kind: str, name: str) -> Path:
    return cache_folder(kind) / f"{hashlib.sha256(os.fsencode(name)).hexdigest()[:32]}.npz"
