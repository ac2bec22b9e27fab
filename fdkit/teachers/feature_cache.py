"""Teacher features on disk: one record for each crop, in flat files that many processes read and write at once.

A record is a header (a mark, a checksum of everything, a checksum of the crop's pixels) and its content. Content is
written first and headers last, through a journal, so that a batch is there whole or not at all however a process ends;
what a failing disk changes is found by the checksum, and what is not there or not sound is simply not given back.
A record that is sound is never written again: whoever finds it, in any run, gets the same bits. Locks stand on single
records, so that processes, and runs that share a folder, wait for each other only where they fill the same one.
"""

import contextlib
import errno
import fcntl
import os
import socket
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fdkit.errors import OutputError, ResourceError, write_failure
from fdkit.teachers.cache_cost import HEADER_BYTES, CacheDtype, record_bytes

MARK = b"fdk1"
SHARD_BYTES = 1 << 34
"""Largest size of one file; files are as large as what is written in them, not as what fits."""
_HEADER = struct.Struct("<4sIII")
_EMPTY = bytes(HEADER_BYTES)
_ENTRY = struct.Struct(f"<Q{HEADER_BYTES}s")
_CREATION = 1 << 62
"""Byte of the lock file that stands for the folder as a whole; those below are records."""
assert _HEADER.size == HEADER_BYTES

State = Literal["sound", "missing", "damaged", "other pixels"]


class Layout(NamedTuple):
    """What a record holds."""

    num_images: int
    num_tokens: int
    """Vectors an image."""
    width: int
    """Numbers a vector, as stored."""
    dtype: CacheDtype

    @property
    def record_bytes(self) -> int:
        """Header and content of one record."""
        return record_bytes(self.num_tokens, self.width, self.dtype)


class Crop(NamedTuple):
    """Which crop of which image, and what it looks like."""

    view: int
    image: int
    checksum: int
    """CRC-32 of its pixels."""


class FeatureCache:
    """The records of one folder. Safe to hand to workers, forked or not; each process opens its own files."""

    def __init__(self, folder: Path, layout: Layout) -> None:
        self.folder = folder
        self.layout = layout
        self.per_shard = max(1, SHARD_BYTES // layout.record_bytes)
        self._files: dict[tuple[int, int], int] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": {}}

    def __del__(self) -> None:
        for (process, _), file in self._files.items():
            if process == os.getpid():
                os.close(file)

    def read(self, crop: Crop) -> tuple[bytes, State]:
        """The content stored for a crop, and whether it is sound; empty where it is not."""
        record = os.pread(*self._place(crop))
        header, content = record[:HEADER_BYTES], record[HEADER_BYTES:]
        if len(header) < HEADER_BYTES or header == _EMPTY:
            return b"", "missing"
        mark, checksum, pixels, _ = _HEADER.unpack(header)
        if mark != MARK or checksum != _checksum(crop._replace(checksum=pixels), content):
            return b"", "damaged"
        return (content, "sound") if pixels == crop.checksum else (b"", "other pixels")

    def fill(self, crops: Sequence[Crop], contents: Sequence[bytes]) -> list[bytes]:
        """Store what was computed for these crops, all or none of it; what the cache holds for them from now on.

        That is not what was given where another process was quicker. Raises ResourceError when the disk is full.
        """
        order = sorted(range(len(crops)), key=lambda number: crops[number][:2])  # one order, so no deadlock
        with self._disk_errors(), self._locked(self._number(crops[number]) for number in order):
            standing = [self.read(crop) for crop in crops]
            new = [number for number in order if standing[number][1] != "sound"]
            self._write([(crops[number], contents[number], standing[number][1]) for number in new])
        return [
            there if state == "sound" else content
            for content, (there, state) in zip(contents, standing, strict=True)
        ]

    def recover(self) -> None:
        """Finish what processes that were killed had begun to put in place. Harmless beside others at work."""
        for path in self.folder.glob("journal-*"):
            with contextlib.suppress(FileNotFoundError):
                entries = _read_journal(path.read_bytes())
                for view, index, header in entries:
                    crop = Crop(view, index, 0)
                    if self.read(crop)[1] in ("missing", "damaged"):
                        file, _, offset = self._place(crop)
                        _write_all(file, header, offset)
                path.unlink()

    def bytes_on_disk(self) -> int:
        """What the records take by now."""
        return sum(512 * path.stat().st_blocks for path in self.folder.glob("records-*"))

    @contextlib.contextmanager
    def creation(self) -> Iterator[None]:
        """Hold the folder while its description is made; others wait."""
        with contextlib.ExitStack() as stack:
            with self._disk_errors():
                stack.enter_context(self._locked([_CREATION]))
            yield

    def _number(self, crop: Crop) -> int:
        return crop.view * self.layout.num_images + crop.image

    def _place(self, crop: Crop) -> tuple[int, int, int]:
        """(file, bytes, offset) of a record."""
        shard, place = divmod(self._number(crop), self.per_shard)
        size = self.layout.record_bytes
        return self._file(shard), size, place * size

    def _file(self, shard: int) -> int:
        """The open file of a shard, -1 for the lock file, in this process."""
        key = (os.getpid(), shard)
        if key not in self._files:
            name = "lock" if shard < 0 else f"records-{shard:05d}.bin"
            try:
                self._files[key] = os.open(self.folder / name, os.O_RDWR | os.O_CREAT, 0o666)
            except OSError as error:
                raise write_failure(error) or OutputError(
                    f"{self.folder / name}: cannot be opened: {error.strerror}",
                    "choose another --teacher-cache folder",
                ) from error
        return self._files[key]

    def _write(self, records: list[tuple[Crop, bytes, State]]) -> None:
        headers = []
        for crop, content, state in records:
            assert len(content) == self.layout.record_bytes - HEADER_BYTES, (len(content), self.layout)
            file, _, offset = self._place(crop)
            if state != "missing":
                _write_all(file, _EMPTY, offset)
            _write_all(file, content, offset + HEADER_BYTES)
            headers.append((crop, _HEADER.pack(MARK, _checksum(crop, content), crop.checksum, 0)))
        if not headers:
            return
        journal = self.folder / f"journal-{socket.gethostname()}-{os.getpid()}"
        entries = b"".join(_ENTRY.pack(crop.view << 40 | crop.image, header) for crop, header in headers)
        temporary = journal.with_name(f".{journal.name}")
        temporary.write_bytes(struct.pack("<I", zlib.crc32(entries)) + entries)
        temporary.replace(journal)
        for crop, header in headers:
            file, _, offset = self._place(crop)
            _write_all(file, header, offset)
        journal.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _locked(self, numbers: Iterable[int]) -> Iterator[None]:
        file, held = self._file(-1), []
        try:
            for number in numbers:
                fcntl.lockf(file, fcntl.LOCK_EX, 1, number)
                held.append(number)
            yield
        finally:
            for number in held:
                fcntl.lockf(file, fcntl.LOCK_UN, 1, number)

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise OutputError(f"{self.folder}: cannot be written: {error.strerror}") from error
            size = self.bytes_on_disk() / 1e9
            raise ResourceError(
                f"{self.folder}: {error.strerror} after {size:.3g} GB of teacher features; what is there stays good",
                "free space and run again with --resume, or move the folder and name it with --teacher-cache",
            ) from error


def _checksum(crop: Crop, content: bytes) -> int:
    """Of a record's content, its place and its crop, so that a record moved elsewhere is not sound."""
    return zlib.crc32(content, zlib.crc32(struct.pack("<QQI", *crop)))


def _read_journal(data: bytes) -> list[tuple[int, int, bytes]]:
    """(view, index, header) of every entry; none of a journal that is not whole."""
    entries = data[4:]
    if len(data) < 4 or len(entries) % _ENTRY.size or data[:4] != struct.pack("<I", zlib.crc32(entries)):
        return []
    return [(place >> 40, place & (1 << 40) - 1, header) for place, header in _ENTRY.iter_unpack(entries)]


def _write_all(file: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written
