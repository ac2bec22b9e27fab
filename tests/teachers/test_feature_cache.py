import errno
import itertools
import multiprocessing
import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from fdkit.errors import OutputError, ResourceError
from fdkit.teachers import feature_cache
from fdkit.teachers.feature_cache import Crop, FeatureCache, Layout

LAYOUT = Layout(num_images=5, num_tokens=3, width=7, dtype="int8")
CROPS = [Crop(1, 4, 11), Crop(0, 2, 12), Crop(2, 0, 13), Crop(0, 0, 14)]
"""In no order, of several views."""


def _content(number: int) -> bytes:
    return bytes((number * 31 + place) % 256 for place in range(LAYOUT.record_bytes - 16))


CONTENTS = [_content(number) for number in range(len(CROPS))]


def _states(cache: FeatureCache) -> list[str]:
    return [cache.read(crop)[1] for crop in CROPS]


@pytest.mark.parametrize("shard_bytes", [1, 3 * LAYOUT.record_bytes, 1 << 34])
def test_what_is_stored_is_read_back_whatever_the_number_of_files(
    shard_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_cache, "SHARD_BYTES", shard_bytes)
    cache = FeatureCache(tmp_path, LAYOUT)
    assert _states(cache) == ["missing"] * 4
    assert cache.fill(CROPS, CONTENTS) == CONTENTS
    for other in (FeatureCache(tmp_path, LAYOUT), pickle.loads(pickle.dumps(cache))):
        assert [other.read(crop) for crop in CROPS] == [(content, "sound") for content in CONTENTS]
        assert other.read(Crop(1, 2, 11)) == (b"", "missing")
    expected = {1: 4, 3 * LAYOUT.record_bytes: 3, 1 << 34: 1}[shard_bytes]
    assert len(list(tmp_path.glob("records-*"))) >= expected
    assert not list(tmp_path.glob("*journal*"))


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, LAYOUT)
    cache.fill(CROPS[:1], CONTENTS[:1])
    path = tmp_path / "records-00000.bin"
    whole = path.read_bytes()
    start = 9 * LAYOUT.record_bytes
    for place in range(LAYOUT.record_bytes):
        if 12 <= place < 16:  # of the header, unused
            continue
        changed = bytearray(whole)
        changed[start + place] ^= 1 << place % 8
        path.write_bytes(changed)
        content, state = cache.read(CROPS[0])
        assert (content, state) == (b"", "damaged"), place


def test_records_that_moved_or_are_cut_or_of_other_pixels_are_not_given(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, LAYOUT)
    cache.fill(CROPS[3:], CONTENTS[3:])
    path, size = tmp_path / "records-00000.bin", LAYOUT.record_bytes
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:size])
    assert cache.read(Crop(0, 0, 14)) == (CONTENTS[3], "sound")
    assert cache.read(Crop(0, 1, 14)) == (b"", "damaged")
    assert cache.read(Crop(0, 0, 15)) == (b"", "other pixels")
    path.write_bytes(whole[: size - 1])
    assert cache.read(Crop(0, 0, 14)) == (b"", "damaged")
    path.write_bytes(whole[:9])
    assert cache.read(Crop(0, 0, 14)) == (b"", "missing")


def test_a_sound_record_stays_and_a_bad_one_is_replaced(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, LAYOUT)
    cache.fill(CROPS[:2], CONTENTS[:2])
    assert cache.fill(CROPS[:1], [_content(9)]) == CONTENTS[:1]
    assert cache.read(CROPS[0]) == (CONTENTS[0], "sound")
    other = CROPS[1]._replace(checksum=99)
    assert cache.fill([CROPS[0], other], [_content(8), _content(9)]) == [CONTENTS[0], _content(9)]
    assert cache.read(other) == (_content(9), "sound")


class _Killed(BaseException):
    """What stands for the end of the process."""


@pytest.mark.parametrize("old", [False, True], ids=["empty", "over damaged records"])
def test_a_batch_is_there_whole_or_not_at_all_wherever_its_writing_ends(
    old: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call that changes the disk is once the last, and that one writes half."""
    real = {name: getattr(os, name) for name in ("pwrite", "replace", "unlink")}
    outcomes = set()
    for last in itertools.count():
        folder = tmp_path / str(last)
        folder.mkdir()
        cache, calls = FeatureCache(folder, LAYOUT), itertools.count()
        if old:
            cache.fill([crop._replace(checksum=1) for crop in CROPS], [_content(5)] * 4)

        def limited(name: str, calls: Any = calls, last: int = last) -> Any:
            def call(*arguments: Any, **options: Any) -> Any:
                if next(calls) < last:
                    return real[name](*arguments, **options)
                if name == "pwrite":
                    real[name](arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2], arguments[2])
                raise _Killed

            return call

        for name in real:
            monkeypatch.setattr(os, name, limited(name))
        try:
            cache.fill(CROPS, CONTENTS)
            finished = True
        except _Killed:
            finished = False
        monkeypatch.undo()
        again = FeatureCache(folder, LAYOUT)
        again.recover()
        states = set(_states(again))
        assert states == {"sound"} or "sound" not in states, (last, states)
        outcomes |= states
        assert again.fill(CROPS, CONTENTS) == CONTENTS
        assert [again.read(crop)[0] for crop in CROPS] == CONTENTS
        if finished:
            break
    assert last == (14 if old else 10)
    assert {"sound", "missing"} <= outcomes


def test_a_full_disk_is_a_resource_error_and_keeps_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = FeatureCache(tmp_path, LAYOUT)
    cache.fill(CROPS[:1], CONTENTS[:1])

    def full(*arguments: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(ResourceError, match=r"No space left on device after .* GB of teacher features"):
        cache.fill(CROPS[1:], CONTENTS[1:])
    monkeypatch.undo()
    assert _states(cache) == ["sound", "missing", "missing", "missing"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"gone/records-00000\.bin: cannot be opened: No such file"):
        FeatureCache(tmp_path / "gone", LAYOUT).read(CROPS[0])


def _fill_all(folder: str, mark: int, start: Any, answers: Any) -> None:
    cache = FeatureCache(Path(folder), Layout(40, 3, 7, "int8"))
    start.wait()
    found = []
    for image in range(0, 40, 4):
        crops = [Crop(0, image + offset, 7) for offset in ((3, 1, 0, 2) if mark else (0, 2, 3, 1))]
        found += zip(crops, cache.fill(crops, [_content(mark)] * 4), strict=True)
    answers.put((mark, sorted(found)))


def test_two_processes_that_fill_the_same_records_are_given_the_same(tmp_path: Path) -> None:
    """Each comes with content of its own; whichever is first, both go on with that."""
    context = multiprocessing.get_context("fork")
    start, answers = context.Barrier(2), context.Queue()
    processes = [
        context.Process(target=_fill_all, args=(str(tmp_path), mark, start, answers)) for mark in (0, 1)
    ]
    for process in processes:
        process.start()
    found = dict(answers.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(timeout=60)
    assert found[0] == found[1]
    cache = FeatureCache(tmp_path, Layout(40, 3, 7, "int8"))
    assert [(content, "sound") for _, content in found[0]] == [cache.read(crop) for crop, _ in found[0]]
