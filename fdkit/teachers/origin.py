"""Where published weights came from, exactly: the commit of a repository or an address, and the files' checksums."""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from fdkit.errors import WeightsError
from fdkit.teachers.files import sha256_of, verify
from fdkit.teachers.licensing import recorded_teachers

BRANCH = "main"
"""What is meant of a repository where nothing is said."""
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_pinned: ContextVar[Mapping[str, str]] = ContextVar("pinned", default=MappingProxyType({}))


class Origin(NamedTuple):
    """Where published files came from, as run.json and results say it."""

    address: str
    """hf:ORG/REPO@BRANCH as it was asked for, or the plain address of the file."""
    revision: str | None
    """The commit of the repository that was read; None for a file at a plain address."""
    files: dict[str, str]
    """SHA-256, in hex, of every file that was read, by name."""


class Fetched(NamedTuple):
    """A published file, or a folder of them, on this machine."""

    path: Path
    address: str
    revision: str | None = None

    def origin(self, files: Sequence[Path] = ()) -> Origin:
        """What is recorded of it; files: those read of a folder."""
        return Origin(
            self.address, self.revision, {path.name: sha256_of(path) for path in files or [self.path]}
        )


def hub_address(repo: str, revision: str) -> str:
    """How a repository at a branch, tag or commit is called."""
    return f"hf:{repo}@{revision}"


def commit_of(path: Path) -> str | None:
    """The commit a file in the hub's cache is of; None for a file anywhere else."""
    parts = path.parts
    place = parts.index("snapshots") + 1 if "snapshots" in parts else len(parts)
    return parts[place] if place < len(parts) and _COMMIT.fullmatch(parts[place]) else None


def require_undamaged(path: Path) -> None:
    """Refuses a file in the hub's cache that is not the one the hub described when it came.

    The cache keeps a file under the checksum that the hub states: SHA-256 for large ones, git's for small ones. Where
    it keeps no links, as on Windows, nothing is known and nothing is checked. Raises WeightsError naming the file.
    """
    blob = path.parent / path.readlink() if path.is_symlink() else path
    if blob.parent.name != "blobs":
        return
    blob = blob.parent.resolve() / blob.name  # what it may be a link to itself has a name of another kind
    if _SHA256.fullmatch(blob.name):
        verify(blob, blob.name)
    elif _COMMIT.fullmatch(blob.name):
        content = blob.read_bytes()
        found = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
        if found != blob.name:
            raise WeightsError(
                f"wrong checksum: {blob} ({path.name}) has the git hash {found}, the published one is {blob.name}",
                hint="the file is damaged or changed: delete it and get it again from its source",
            )


@contextmanager
def pinned(revisions: Mapping[str, str]) -> Iterator[None]:
    """Take these commits in place of the branches they are of while the block runs.

    revisions: commits by `hub_address`. So a resumed run has the teacher it began with, though its branch has moved.
    """
    token = _pinned.set({**_pinned.get(), **revisions})
    try:
        yield
    finally:
        _pinned.reset(token)


def pinned_revision(repo: str, revision: str) -> str:
    """The commit to take of a repository at a branch: the one that is pinned, else what was asked for."""
    return _pinned.get().get(hub_address(repo, revision), revision)


def recorded_revisions(facts: Mapping[str, Any]) -> dict[str, str]:
    """The commits of a run's teachers by `hub_address`, as its run.json has them; for `pinned`."""
    origins = [teacher.get("origin") or {} for teacher in recorded_teachers(dict(facts))]
    return {str(one["address"]): str(one["revision"]) for one in origins if one.get("revision")}
