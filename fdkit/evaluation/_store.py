"""Features kept on disk: made once, read by every evaluation of the same model on the same images.

A folder holds `values.f32`, (N, D) float32 that is mapped into memory and never read whole; `done.u8`, one byte an
image; and `features.json`, written last, with a checksum. What stops half-way goes on where it stood, with any number
of processes, each of which makes its own share of the rows.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fdkit.data.json_file import read_object
from fdkit.errors import ResourceError
from fdkit.evaluation.features import Rows
from fdkit.models.collectives import rank, world_size

log = logging.getLogger("fdkit")

SECONDS_BETWEEN_FLUSHES = 10
BLOCK_BYTES = 1 << 24
_MADE, _UNREADABLE = 1, 2


def default_cache() -> Path:
    """Where features are kept: $FDKIT_CACHE/features, or fdkit/features in the user's cache folder."""
    own = os.environ.get("FDKIT_CACHE")
    base = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fdkit"
    return base / "features"


def weights_digest(network: torch.nn.Module) -> str:
    """SHA-256, in hexadecimal, of every parameter and buffer of a network with its name, type and shape."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {plain.dtype} {tuple(plain.shape)}\n".encode())
        digest.update(plain.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class FeatureStore:
    """The features of one model, read in one way, of one set of images.

    root: the cache's folder, shared by all processes; key: everything the values hang on, as plain JSON. Two keys have
    two folders, so what is found is never of another model, other images or another crop.
    """

    def __init__(self, root: Path, key: dict[str, Any], *, num_images: int, width: int) -> None:
        text = json.dumps(key, sort_keys=True)
        self.key = key
        self.num_images = num_images
        self.width = width
        self.folder = root / hashlib.sha256(text.encode()).hexdigest()[:32]

    def read(self) -> tuple[Tensor, Tensor] | None:
        """The values (M, D), mapped, and which images (M,) they are of; None if they are not all there, or damaged."""
        try:
            record = read_object(self.folder / "features.json")
            num_rows, checksums = record["num_rows"], (record["crc32"], record.get("done_crc32"))
            if type(num_rows) is not int or num_rows < 0:
                raise ValueError(f"{num_rows!r} is no number of rows")
            values = self._values(num_rows, "c")
            done = np.fromfile(self.folder / "done.u8", np.uint8)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError) as error:
            log.warning("%s: cached features cannot be read (%s): making them again", self.folder, error)
            return None
        indices = np.flatnonzero(done == _MADE)
        if len(indices) != num_rows or (_checksum(values), zlib.crc32(done.tobytes())) != checksums:
            log.warning("%s: cached features are damaged: making them again", self.folder)
            return None
        return torch.from_numpy(values), torch.from_numpy(indices)

    def fill(self, make: Callable[[np.ndarray], Iterator[Rows]]) -> tuple[Tensor, Tensor]:
        """What `read` gives, made first where it is missing; every process calls this.

        make: features of the images at the given positions; those it leaves out count as unreadable.
        Raises ResourceError if the folder cannot be written, or the processes do not share it.
        """
        try:
            with self._held():
                found = self.read() if rank() == 0 else None
                if not _agreed(found is not None):
                    self._prepare()
                    self._make_share(make)
                    self._finish()
        except OSError as error:
            raise ResourceError(
                f"{self.folder}: features cannot be kept here: {error.strerror or error}",
                "free some space, or name another folder with --cache",
            ) from error
        found = found or self.read()
        if found is None:
            raise ResourceError(
                f"{self.folder}: rank {rank()} does not see the features the others made",
                "name a folder that all processes share with --cache",
            )
        return found

    @contextmanager
    def _held(self) -> Iterator[None]:
        """Rank 0 holds the folder, so that another run that wants the same features waits for them."""
        if rank() > 0:
            yield
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.info("another run is making the same features: waiting for it (%s)", self.folder)
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _prepare(self) -> None:
        """Rank 0 makes the files, or keeps those of an extraction that stopped."""
        if rank() == 0:
            size = self.num_images * self.width * 4
            paths = {self.folder / "values.f32": size, self.folder / "done.u8": self.num_images}
            record = self.folder / "features.json"
            goes_on = all(path.exists() and path.stat().st_size == wanted for path, wanted in paths.items())
            goes_on = goes_on and not record.exists()  # what was finished and cannot be read is damaged
            if not goes_on:
                # First: killed or out of room from here on, nothing may look like an extraction that can go on.
                (self.folder / "done.u8").unlink(missing_ok=True)
            record.unlink(missing_ok=True)
            if not goes_on:
                if shutil.disk_usage(self.folder).free < size:
                    raise ResourceError(
                        f"{self.folder}: {size / 1e9:.1f} GB of features do not fit on its disk",
                        "free some space, or name another folder with --cache",
                    )
                for path, wanted in paths.items():
                    _make_file(path, wanted)
            (self.folder / "key.json").write_text(json.dumps(self.key, indent=1) + "\n")
        _wait()

    def _make_share(self, make: Callable[[np.ndarray], Iterator[Rows]]) -> None:
        values, done = self._values(self.num_images, "r+"), self._done()
        missing = np.flatnonzero(done == 0)
        if rank() == 0 and 0 < len(missing) < self.num_images:
            log.info("%d of %d features are there already", self.num_images - len(missing), self.num_images)
        _wait()  # every process cuts the same list
        share = np.array_split(missing, world_size())[rank()]
        written: list[np.ndarray] = []
        last = time.monotonic()
        for rows in make(share):
            indices = rows.indices.numpy()
            values[indices] = rows.values.numpy()
            written.append(indices)
            if time.monotonic() - last > SECONDS_BETWEEN_FLUSHES:
                _mark(values, done, written)
                last = time.monotonic()
        _mark(values, done, written)
        done[share[done[share] == 0]] = _UNREADABLE
        done.flush()
        _wait()

    def _finish(self) -> None:
        """Rank 0 moves the rows together where images could not be read, and writes the record."""
        if rank() == 0:
            values, done = self._values(self.num_images, "r+"), self._done()
            rows = np.flatnonzero(done == _MADE)
            if len(rows) < self.num_images:
                self._compact(values, rows)
                values = self._values(len(rows), "r+")
            record = {
                "num_rows": len(rows),
                "width": self.width,
                "crc32": _checksum(values),
                "done_crc32": zlib.crc32(done.tobytes()),
            }
            temporary = self.folder / "features.json.new"
            temporary.write_text(json.dumps(record) + "\n")
            temporary.replace(self.folder / "features.json")
        _wait()

    def _compact(self, values: np.ndarray, rows: np.ndarray) -> None:
        done = np.array(self._done())
        # While rows move, nothing may look like an extraction that can go on.
        (self.folder / "done.u8").unlink()
        per_block = max(1, BLOCK_BYTES // (4 * self.width))
        for start in range(0, len(rows), per_block):
            block = rows[start : start + per_block]
            values[start : start + len(block)] = values[block]
        os.truncate(self.folder / "values.f32", len(rows) * self.width * 4)
        done.tofile(self.folder / "done.u8")

    def _values(self, num_rows: int, mode: str) -> np.ndarray:
        path = self.folder / "values.f32"
        if num_rows == 0:
            return np.empty((0, self.width), np.float32)
        if path.stat().st_size != num_rows * self.width * 4:
            raise ValueError(f"{path.name} has {path.stat().st_size} bytes")
        return np.memmap(path, np.float32, mode, shape=(num_rows, self.width))  # type: ignore[call-overload]

    def _done(self) -> Any:
        return np.memmap(self.folder / "done.u8", np.uint8, "r+", shape=(self.num_images,))


def _make_file(path: Path, size: int) -> None:
    """A file of zeros with all its room: a mapped one that finds none later ends the process without a word."""
    reserve = getattr(os, "posix_fallocate", None)  # macOS has none
    with path.open("wb") as file:
        file.truncate(size)
        if size and reserve is not None:
            reserve(file.fileno(), 0, size)


def _mark(values: Any, done: Any, written: list[np.ndarray]) -> None:
    """Rows count as made only once their values are on disk."""
    if written:
        values.flush()
        done[np.concatenate(written)] = _MADE
        done.flush()
        written.clear()


def _checksum(values: np.ndarray) -> int:
    total, per_block = 0, max(1, BLOCK_BYTES // max(1, 4 * values.shape[1]))
    for start in range(0, len(values), per_block):
        total = zlib.crc32(np.ascontiguousarray(values[start : start + per_block]).data, total)
    return total


def _agreed(value: bool) -> bool:
    """What rank 0 says, on every process."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def _wait() -> None:
    if world_size() > 1:
        dist.barrier()
