"""Tars and zips that would write outside, follow links, open devices, or unpack to more than a disk holds."""

import itertools
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from faults.limits import try_all
from faults.mutations import damage_tar
from faults.sound_files import make_archives, picture
from faults.weight_files import ARCHITECTURE, in_zip, saved_pickle, strange_archives

SECRET = (12, 200, 34)
"""The colour of a picture outside the archives, which no reader may come to."""
PLACES = (
    "../escaped.png", "../../../../../../tmp/fdkit-owned/x.png", "/tmp/fdkit-owned/x.png", "a/../../b.png",
    "train/../../c.png", "//tmp//fdkit-owned//x.png", "./../d.png", "..\\..\\e.png", "C:\\f.png", "a/./b/../../g.png",
    "new\nline.png", "\x1b[31mred.png", "<script>.png", "long" * 60 + ".png", "dots...png", " .png", "-rf.png", "ü.png",
)  # fmt: skip
KINDS = {
    "symlink": tarfile.SYMTYPE,
    "hard link": tarfile.LNKTYPE,
    "character device": tarfile.CHRTYPE,
    "block device": tarfile.BLKTYPE,
    "pipe": tarfile.FIFOTYPE,
    "folder named like an image": tarfile.DIRTYPE,
    "contiguous file": tarfile.CONTTYPE,
    "sparse file": tarfile.GNUTYPE_SPARSE,
}


def hostile_tars(secret: Path) -> Iterator[tuple[str, bytes]]:
    """Each with two sound pictures around what is hostile in it."""
    forms = {"ustar": tarfile.USTAR_FORMAT, "GNU": tarfile.GNU_FORMAT, "PAX": tarfile.PAX_FORMAT}
    for (form, number), name in itertools.product(forms.items(), PLACES):
        try:
            yield f"{form}: {name[:40]!r}", _tar(number, _member(name))
        except ValueError:  # a name that this form cannot hold
            continue
    targets = (str(secret), "../secret.png", "/dev/zero", "/etc/passwd", ".", "0-first.png", "x.png")
    for (kind, code), target in itertools.product(KINDS.items(), targets):
        yield f"{kind} to {target}", _tar(tarfile.GNU_FORMAT, _member("x.png", kind=code, target=target))
    folder_by_link = [
        _member("train", kind=tarfile.SYMTYPE, target=str(secret.parent)),
        _member("train/secret.png"),
    ]
    yield "a file behind a linked folder", _tar(tarfile.GNU_FORMAT, *folder_by_link)
    for stated in (1 << 20, 10**10, 1 << 62, -1, -(1 << 40)):
        yield f"a member of {stated} bytes", _tar(tarfile.GNU_FORMAT, _member("x.png", size=stated))
        records = {"size": str(stated)}
        yield f"a PAX member of {stated} bytes", _tar(tarfile.PAX_FORMAT, _member("x.png", records=records))
    for records in (
        {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(10**10)},
        {"GNU.sparse.map": f"0,{10**10}", "GNU.sparse.size": str(10**10)},
        {"GNU.sparse.map": "x,y", "GNU.sparse.numblocks": "-1"},
        {"path": "../../escaped.png"},
        {"linkpath": str(secret), "path": "y.png"},
    ):
        yield f"PAX records {sorted(records)}", _tar(tarfile.PAX_FORMAT, _member("x.png", records=records))


Member = tuple[tarfile.TarInfo, bytes, int | None]


def _member(
    name: str,
    *,
    kind: bytes = tarfile.REGTYPE,
    target: str = "",
    size: int | None = None,
    records: dict[str, str] | None = None,
) -> Member:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.pax_headers = kind, target, dict(records or {})
    return info, picture(5) if kind == tarfile.REGTYPE else b"", size


def _tar(form: int, *members: Member) -> bytes:
    """An archive of these members between two sound ones; a stated size is a lie about what follows."""
    first, last = (_member(name) for name in ("0-first.png", "9-last.png"))
    data = b""
    for info, content, stated in (first, *members, last):
        info.size = len(content) if stated is None else stated
        data += info.tobuf(form) + content + bytes(-len(content) % 512)
    return data + bytes(1024)


def try_archives(folder: Path, *, amount: int, seed: int) -> dict[str, Any]:
    """Every hostile archive as shards and as weights, and `amount` tars damaged at random.

    Nothing may be written, no picture outside be shown, nothing but words be the answer.
    """
    from PIL import Image

    from fdkit.data.decode import BadImage
    from fdkit.data.sources import open_source
    from fdkit.errors import FdkitError
    from fdkit.teachers.loading import load_teacher

    inside, outside = folder / "inside", Path("/tmp/fdkit-owned")
    inside.mkdir()
    Image.new("RGB", (8, 8), SECRET).save(folder / "secret.png")
    path, weights = inside / "shard.tar", inside / "weights.tar"
    before = os.environ.get("FDKIT_CACHE")
    os.environ["FDKIT_CACHE"] = str(folder / "cache")

    def read(data: bytes) -> None:
        path.write_bytes(data)
        for name in (str(path), f"wds:{path}"):
            source = open_source(name, split="all")
            for index in range(len(source)):
                assert source.describe(index).isprintable()
                try:
                    pixels = source.read(index).getpixel((0, 0))
                except BadImage:
                    continue
                assert pixels != SECRET, "a link was followed"

    def load(data: bytes) -> None:
        weights.write_bytes(data)
        load_teacher(str(weights), architecture=ARCHITECTURE)

    hostile = list(hostile_tars(folder / "secret.png"))
    trials = {
        "shards": try_all(read, hostile, refusals=(FdkitError,), seconds=20, megabytes=500),
        "weights": try_all(load, hostile + hostile_zips(), refusals=(FdkitError,), seconds=20),
        "damaged": try_all(read, list(_damaged(folder, amount, seed)), refusals=(FdkitError,), megabytes=500),
    }
    del os.environ["FDKIT_CACHE"]
    if before is not None:
        os.environ["FDKIT_CACHE"] = before
    failures = [f"{name}: {words}" for name, trial in trials.items() for words in trial.failures]
    left = sorted(entry.name for entry in inside.iterdir())
    failures += [] if left == ["shard.tar", "weights.tar"] else [f"left behind: {', '.join(left)}"]
    failures += [f"{outside} was made"] if outside.exists() else []
    failures += ["an archive was read as weights"] if trials["weights"].read else []
    return {
        "tried": sum(trial.tried for trial in trials.values()),
        "hostile": trials["shards"].tried + trials["weights"].tried,
        "read": sum(trial.read for trial in trials.values()),
        "refused": sum(trial.refused for trial in trials.values()),
        "failures": failures,
    }


def hostile_zips() -> list[tuple[str, bytes]]:
    """Zips as files of weights: with names that lead outside, and those of `strange_archives`."""
    program = saved_pickle(a=1)
    named = [(f"zip: {name[:40]!r}", in_zip(program, extra={name: b"x"})) for name in PLACES]
    return named + list(strange_archives().items())


def _damaged(folder: Path, amount: int, seed: int) -> Iterator[tuple[str, bytes]]:
    random = np.random.default_rng(seed)
    make_archives(folder / "sound")
    sound = [(path.name, path.read_bytes()) for path in sorted((folder / "sound").glob("*.tar"))]
    for number in range(amount):
        name, data = sound[number % len(sound)]
        yield f"{name}, {number}", damage_tar(data, random)
