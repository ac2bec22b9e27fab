import hashlib
import os
import tracemalloc
from pathlib import Path

import pytest

from fdkit.data import listing
from fdkit.data.listing import PackedNames, stamps

NAMES = ["b/é.jpg", "a.png", "b/\udcff.gif", "", "c/gone.jpg"]


def files(root: Path) -> PackedNames:
    (root / "b").mkdir()
    for size, name in enumerate(NAMES):
        if name and "gone" not in name:
            (root / name).write_bytes(bytes(size))
            os.utime(root / name, ns=(0, 10**9 + size))
    return PackedNames(name for name in NAMES if name)


def naive(root: Path) -> tuple[str, str]:
    sizes, times = hashlib.sha256(), hashlib.sha256()
    for name in NAMES:
        if name:
            there = (root / name).exists()
            size, changed = (
                ((root / name).stat().st_size, (root / name).stat().st_mtime_ns) if there else (-1, -1)
            )
            sizes.update(os.fsencode(name) + f"\0{size}\n".encode())
            times.update(f"{changed}\n".encode())
    times.update(sizes.digest())
    return sizes.hexdigest(), times.hexdigest()


@pytest.mark.parametrize("slow_seconds", [0.0, 1.0])  # in threads, and one after another
@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_stamps_are_of_every_name_size_and_time(
    tmp_path: Path, slow_seconds: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "SLOW_SECONDS", slow_seconds)
    monkeypatch.setattr(listing, "STAT_CHUNK", chunk)
    names = files(tmp_path)
    first = stamps(tmp_path, names)
    assert first == naive(tmp_path)
    os.utime(tmp_path / "a.png", ns=(0, 5))
    later = stamps(tmp_path, names)
    assert (later[0], later[1] != first[1]) == (first[0], True)
    (tmp_path / "a.png").write_bytes(b"longer")  # in place: the folder's own time stays
    assert stamps(tmp_path, names)[0] != first[0]


def test_packed_names_come_back_one_by_one_and_all(tmp_path: Path) -> None:
    packed = PackedNames(NAMES)
    assert [packed[index] for index in range(len(packed))] == NAMES
    assert list(packed.encoded()) == [os.fsencode(name) for name in NAMES]
    again = PackedNames.of_arrays(packed.bytes, packed.ends)
    assert [again[index] for index in range(len(again))] == NAMES
    for data, ends in ((packed.bytes[:-1], packed.ends), (packed.bytes, packed.ends[::-1])):
        with pytest.raises(KeyError):
            PackedNames.of_arrays(data, ends)


def test_packing_holds_no_list_of_strings() -> None:
    tracemalloc.start()
    PackedNames(f"class-{number % 100:08d}/image-{number:08d}.jpg" for number in range(50_000))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak / 50_000 < 120  # bytes a name of 32; a Python string alone takes more than 80
