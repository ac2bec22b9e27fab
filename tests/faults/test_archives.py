"""Archives that would write outside, follow links or unpack without end: nothing of that happens."""

import resource
import tarfile
from pathlib import Path

import pytest
from faults.archives import SECRET, hostile_tars, try_archives
from PIL import Image

from fdkit.data.tar_source import open_tars
from fdkit.errors import DataError

pytestmark = pytest.mark.filterwarnings("ignore")  # PyTorch's own words about damaged pickles


def test_hostile_archives_are_read_without_leaving_them_or_refused(tmp_path: Path) -> None:
    result = try_archives(tmp_path, amount=100, seed=0)
    assert result["failures"] == []
    assert result["hostile"] > 200
    assert result["tried"] >= result["hostile"] + 100
    assert result["read"] > 100
    assert result["refused"] > 100


def test_the_links_do_lead_outside(tmp_path: Path) -> None:
    """Unpacked without a guard, they show the picture outside: the test above can fail."""
    inside = tmp_path / "inside"
    inside.mkdir()
    secret = tmp_path / "secret.png"
    Image.new("RGB", (8, 8), SECRET).save(secret)
    tars = dict(hostile_tars(secret))
    path = tmp_path / "x.tar"
    for name in (f"symlink to {secret}", "symlink to ../secret.png"):
        path.write_bytes(tars[name])
        with tarfile.open(path) as archive:
            archive.extraction_filter = lambda member, path: member  # none, as before Python 3.11.4
            archive.extractall(inside)
        assert Image.open(inside / "x.png").getpixel((0, 0)) == SECRET
        (inside / "x.png").unlink()


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE])
def test_a_name_of_gigabytes_takes_no_memory(
    kind: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A header of a long name that says it is 7 GB long had them all allocated."""
    monkeypatch.setenv("FDKIT_CACHE", str(tmp_path / "cache"))
    info = tarfile.TarInfo("x.png")
    info.type, info.size = kind, 7 << 30
    (tmp_path / "x.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(10_240))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), before[1]))
    try:
        with pytest.raises(DataError, match=r"x\.tar: damaged .*a header of 7,516,"):
            open_tars(str(tmp_path / "x.tar"))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
