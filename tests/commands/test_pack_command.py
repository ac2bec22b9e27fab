import errno
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fdkit.cli import main
from fdkit.commands import pack as command
from fdkit.commands.pack import pack
from fdkit.data import pack as writing
from fdkit.data.packed import MANIFEST, UNFINISHED, read_manifest
from fdkit.data.sources import FolderSource, TarSource, open_source
from fdkit.errors import DataError, OutputError, ResourceError

SHARDS_OF = {"train": 8, "val": 3}  # of three images: twenty-two and seven


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FDKIT_CACHE", str(tmp_path / "cache"))


def photo(value: int, width: int = 30, height: int = 20) -> Image.Image:
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack([rows * 3 + value, columns * 2 + value, rows + columns], axis=-1) % 256
    return Image.fromarray(pixels.astype(np.uint8))


def a_folder(root: Path) -> Path:
    for split, counts in {"train": {"ant.x": 12, "bee": 10}, "val": {"bee": 7}}.items():
        for name, count in counts.items():
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                width, height = (90, 60) if number % 2 else (30, 20)
                photo(number, width, height).save(root / split / name / f"im.{number:02d}.jpg")
    return root


def options(tmp_path: Path, **others: Any) -> dict[str, Any]:
    values = {"output": tmp_path / "out", "short_side": 40, "images_per_shard": 3, "workers": 0}
    return {"data": str(tmp_path / "in")} | values | others


def digests(folder: Path) -> dict[str, str]:
    return {shard["file"]: shard["sha256"] for shard in read_manifest(folder).shards}


def name_of(source: TarSource, index: int) -> str:
    """The file's name before it was packed: class/NUMBER-NAME.jpg."""
    folder, name = source.member_name(index).split("/")
    return f"{folder}/{name.partition('-')[2].replace('_', '.', 1)}"


def test_classes_labels_splits_and_pixels_survive(tmp_path: Path) -> None:
    folder = a_folder(tmp_path / "in")
    numbers = pack(**options(tmp_path))
    assert (numbers["images"], numbers["shards"], numbers["resized"]) == (29, 11, 14)
    for split in ("train", "val", "all"):
        packed, before = open_source(str(tmp_path / "out"), split), FolderSource(folder, split)
        assert isinstance(packed, TarSource)
        assert packed.classes == before.classes == ("ant.x", "bee")
        assert len(packed) == len(before)
        place = {os.path.relpath(before.describe(i), folder).split("/", 1)[1]: i for i in range(len(before))}
        if split == "all":
            continue
        for index in range(len(packed)):
            twin = place.pop(name_of(packed, index))
            assert packed.labels[index] == before.labels[twin]
            data = before.read_bytes(twin)
            if before.read(twin).size == (30, 20):
                assert packed.read_bytes(index) == data  # not a byte is touched
                continue
            small, large = packed.read(index), before.read(twin)
            assert small.size == (60, 40)
            expected = np.asarray(large.resize((60, 40), Image.Resampling.BICUBIC)).astype(int)
            assert np.abs(np.asarray(small) - expected).mean() < 2
        assert not place


def test_shards_are_mixed_of_all_classes(tmp_path: Path) -> None:
    a_folder(tmp_path / "in")
    pack(**options(tmp_path))
    labels = open_source(str(tmp_path / "out"), "train").labels
    assert (labels[1:] != labels[:-1]).sum() > 3  # sorted, there would be one place where they differ
    before = digests(tmp_path / "out")
    pack(**options(tmp_path, seed=1, overwrite=True))
    assert digests(tmp_path / "out") != before
    assert digests(tmp_path / "out.old-1") == before


def test_other_tools_read_the_shards(tmp_path: Path) -> None:
    """As WebDataset does: members in order, grouped by what comes before the first dot of the file's name."""
    a_folder(tmp_path / "in")
    pack(**options(tmp_path))
    samples: dict[str, dict[str, bytes]] = {}
    for path in sorted((tmp_path / "out" / "train").glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                folder, base = os.path.split(member.name)
                key, kind = base.split(".", 1)
                samples.setdefault(f"{folder}/{key}", {})[kind] = archive.extractfile(member).read()
    assert len(samples) == 22
    for key, sample in samples.items():
        assert sample.keys() == {"jpg", "cls"}
        assert int(sample["cls"]) == ["ant.x", "bee"].index(key.split("/")[0])
        Image.open(io.BytesIO(sample["jpg"])).load()


def test_portraits_rounding_and_long_thin_images(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    photo(1, 61, 131).save(tmp_path / "in" / "tall.png")
    photo(2, 41, 41).save(tmp_path / "in" / "square.png")
    photo(3, 130, 40).save(tmp_path / "in" / "thin.png")  # its short side is none too long
    pack(**options(tmp_path))
    source = open_source(str(tmp_path / "out"))
    assert source.labels is None
    packed = {Path(source.member_name(index)).name.partition("-")[2]: index for index in range(3)}
    sizes = {name: source.read(index).size for name, index in packed.items()}
    assert sizes == {"tall.jpg": (40, 86), "square.jpg": (40, 40), "thin.png": (130, 40)}
    assert source.read_bytes(packed["thin.png"]) == (tmp_path / "in" / "thin.png").read_bytes()


def test_images_that_are_no_files_are_kept_to_the_pixel(tmp_path: Path) -> None:
    pack("digits", output=tmp_path / "out", workers=0)
    for split in ("train", "test"):
        packed, before = open_source(str(tmp_path / "out"), split), open_source("digits", split)
        assert packed.classes == before.classes
        for index in range(0, len(packed), 97):
            twin = int(Path(packed.member_name(index)).stem)
            assert packed.labels[index] == before.labels[twin]
            assert np.array_equal(np.asarray(packed.read(index)), np.asarray(before.read(twin)))


def test_what_was_packed_can_be_packed_again(tmp_path: Path) -> None:
    a_folder(tmp_path / "in")
    pack(**options(tmp_path, short_side=60))
    pack(str(tmp_path / "out"), output=tmp_path / "small", short_side=16, workers=0)
    again = open_source(str(tmp_path / "small"), "val")
    assert (again.classes, again.labels.tolist()) == (("ant.x", "bee"), [1] * 7)
    assert {min(again.read(index).size) for index in range(7)} == {16}


def test_a_test_split_without_labels(tmp_path: Path) -> None:
    folder = a_folder(tmp_path / "in")
    (folder / "test").mkdir()
    photo(5).save(folder / "test" / "1.jpg")
    pack(**options(tmp_path))
    assert open_source(str(tmp_path / "out"), "test").labels is None
    assert open_source(str(tmp_path / "out"), "train").classes == ("ant.x", "bee")
    assert open_source(str(tmp_path / "out")).labels is None is FolderSource(folder).labels


def test_processes_write_the_same_bytes(tmp_path: Path) -> None:
    a_folder(tmp_path / "in")
    pack(**options(tmp_path))
    pack(**options(tmp_path, output=tmp_path / "two", workers=2))
    assert digests(tmp_path / "two") == digests(tmp_path / "out")


def test_unreadable_images_are_named_once_and_shift_no_label(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = a_folder(tmp_path / "in")
    broken = folder / "train" / "ant.x" / "im.00.jpg"
    broken.write_bytes(b"<html>")
    numbers = pack(**options(tmp_path))
    assert list(numbers["unreadable"]) == [str(broken)]
    assert sum("im.00.jpg" in message for message in caplog.messages) == 1
    packed = open_source(str(tmp_path / "out"), "train")
    assert np.bincount(packed.labels).tolist() == [11, 10]
    assert all(
        packed.classes[packed.labels[i]] == packed.member_name(i).split("/")[0] for i in range(len(packed))
    )
    for number in range(2, 6):
        (folder / "train" / "ant.x" / f"im.{number:02d}.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"of 22 images are unreadable .*more than the 1\.0% allowed"):
        pack(**options(tmp_path, output=tmp_path / "more"))
    assert not (tmp_path / "more" / MANIFEST).exists()
    assert pack(**options(tmp_path, output=tmp_path / "again", max_bad_ratio=0.5))["images"] == 24


def test_what_is_there_is_not_replaced_unasked(tmp_path: Path) -> None:
    a_folder(tmp_path / "in")
    pack(**options(tmp_path))
    with pytest.raises(OutputError, match=r"packed with other short_side\n.*--overwrite"):
        pack(**options(tmp_path, short_side=16))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="not empty, and not packed images"):
            pack(**options(tmp_path, output=tmp_path / "full", overwrite=overwrite))
    with pytest.raises(OutputError, match="and no folder"):
        pack(**options(tmp_path, output=tmp_path / "full" / "thesis.txt"))
    assert (tmp_path / "full" / "thesis.txt").read_text() == "mine"


def test_a_finished_pack_typed_again_makes_only_what_was_damaged_since(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = a_folder(tmp_path / "in")
    (folder / "train" / "ant.x" / "im.00.jpg").write_bytes(b"<html>")
    written: list[str] = []
    write = command.write_shard
    monkeypatch.setattr(
        command, "write_shard", lambda s, job, *rest: written.append(job.file) or write(s, job, *rest)
    )

    def packed() -> dict[str, Any]:
        numbers = pack(**options(tmp_path))
        return {name: numbers[name] for name in ("images", "resized", "unreadable", "shards", "bytes_before")}

    first, files = packed(), digests(tmp_path / "out")
    manifest = (tmp_path / "out" / MANIFEST).read_bytes()
    assert len(written) == 11
    assert packed() == first
    assert len(written) == 11
    path = tmp_path / "out" / "val" / "shard-00001.tar"
    path.write_bytes(path.read_bytes()[:-700])
    (tmp_path / "out" / "train" / "shard-00002.tar").unlink()
    assert packed() == first
    assert sorted(written[11:]) == ["train/shard-00002.tar", "val/shard-00001.tar"]
    assert digests(tmp_path / "out") == files
    assert (tmp_path / "out" / MANIFEST).read_bytes() == manifest
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [MANIFEST, "train", "val"]


@pytest.mark.parametrize("content", ["{", "[]", '{"plan": 3}', '{"shards": 1, "plan": {}}'])
def test_a_damaged_manifest_is_no_plan_to_go_on_with(tmp_path: Path, content: str) -> None:
    a_folder(tmp_path / "in")
    pack(**options(tmp_path))
    (tmp_path / "out" / MANIFEST).write_text(content)
    with pytest.raises(OutputError, match=r"packed with other .*\n.*--overwrite"):
        pack(**options(tmp_path))
    assert pack(**options(tmp_path, overwrite=True))["images"] == 29


def test_a_full_disk_keeps_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_folder(tmp_path / "in")
    pack(**options(tmp_path, output=tmp_path / "whole"))
    fsync, calls = os.fsync, iter(range(100))

    def full_after_a_while(descriptor: int) -> None:
        if next(calls) >= 12:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(writing.os, "fsync", full_after_a_while)
        with pytest.raises(ResourceError, match=r"the disk is full\n.*finished shards are kept"):
            pack(**options(tmp_path))
    assert not (tmp_path / "out" / MANIFEST).exists()
    with pytest.raises(DataError, match=r"packed only in part\n.*same `fdkit pack`"):
        open_source(str(tmp_path / "out"))
    there = {path.name for path in (tmp_path / "out" / "train").glob("*.tar")}
    assert 0 < len(there) < SHARDS_OF["train"]
    written: list[str] = []
    write = command.write_shard
    monkeypatch.setattr(
        command, "write_shard", lambda s, job, *rest: written.append(job.file) or write(s, job, *rest)
    )
    pack(**options(tmp_path))
    assert len(written) == 11 - len(there)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [MANIFEST, "train", "val"]


def test_a_shard_that_was_damaged_before_the_end_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_folder(tmp_path / "in")
    with monkeypatch.context() as patched:
        patched.setattr(command, "_write_manifest", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            pack(**options(tmp_path))
    path = tmp_path / "out" / "val" / "shard-00001.tar"
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    pack(**options(tmp_path))
    pack(**options(tmp_path, output=tmp_path / "whole"))
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    assert path.read_bytes() == (tmp_path / "whole" / "val" / "shard-00001.tar").read_bytes()


def test_an_unfinished_pack_of_something_else_is_not_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = a_folder(tmp_path / "in")
    with monkeypatch.context() as patched:
        patched.setattr(command, "_write_manifest", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            pack(**options(tmp_path))
    with pytest.raises(OutputError, match=r"with other quality, short_side\n.*--overwrite"):
        pack(**options(tmp_path, short_side=30, quality=80))
    (folder / "val" / "bee" / "new.jpg").write_bytes(b"x")
    with pytest.raises(OutputError, match="with other images"):
        pack(**options(tmp_path))


def test_a_manifest_that_does_not_fit_its_shards_is_refused(tmp_path: Path) -> None:
    a_folder(tmp_path / "in")
    pack(**options(tmp_path))
    shard = tmp_path / "out" / "val" / "shard-00000.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-512])
    with pytest.raises(DataError, match=rf"shard-00000\.tar: {len(whole) - 512} bytes, {len(whole)} when"):
        open_source(str(tmp_path / "out"), "train")
    shard.unlink()
    with pytest.raises(DataError, match=r"shard-00000\.tar: No such file"):
        open_source(str(tmp_path / "out"), "train")
    (tmp_path / "out" / MANIFEST).write_text("{}")
    with pytest.raises(DataError, match="is no manifest of packed images"):
        open_source(str(tmp_path / "out"))


def test_the_command_line_speaks_json_and_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a_folder(tmp_path / "in")
    flags = ["pack", str(tmp_path / "in"), "--short-side", "40", "--workers", "0"]
    with pytest.raises(SystemExit) as left:
        main([*flags, "--output", str(tmp_path / "out"), "--json"])
    numbers = json.loads(capsys.readouterr().out)
    assert left.value.code == 0
    sizes = [path.stat().st_size for path in (tmp_path / "in").rglob("*.jpg")]
    assert numbers["bytes_before"] == sum(sizes)
    assert numbers["bytes_after"] == sum(path.stat().st_size for path in (tmp_path / "out").rglob("*.tar"))
    rates = numbers["images_per_second_of_a_worker"]
    assert numbers["epoch_seconds"]["after"] == pytest.approx(29 / rates["after"])
    with pytest.raises(SystemExit):
        main([*flags, "--output", str(tmp_path / "words")])
    words = capsys.readouterr().out
    assert "29 images in 2 shards (14 made smaller)" in words
    assert "measured on 64 images" in words


def test_two_at_once_do_the_work_once_and_one_that_holds_on_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_folder(tmp_path / "in")
    written: list[str] = []
    write, begun = command.write_shard, threading.Event()

    def slowly(source: Any, job: Any, *rest: Any) -> dict[str, Any]:
        begun.set()
        time.sleep(0.1)
        written.append(job.file)
        return write(source, job, *rest)

    monkeypatch.setattr(command, "write_shard", slowly)
    found: list[dict[str, Any]] = []
    first = threading.Thread(target=lambda: found.append(pack(**options(tmp_path))))
    first.start()
    assert begun.wait(30)
    with monkeypatch.context() as patched:
        patched.setattr(command, "SECONDS_TO_END", 0.3)
        with pytest.raises(OutputError, match="another process is packing into it"):
            pack(**options(tmp_path))
    monkeypatch.setattr(command, "SECONDS_TO_END", 60)
    found.append(pack(**options(tmp_path)))  # waits, and finds all of it there
    first.join()
    assert len(written) == 11
    assert [numbers["images"] for numbers in found] == [29, 29]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [MANIFEST, "train", "val"]


@pytest.mark.parametrize("again", [1, 2])
def test_an_interrupt_that_comes_in_the_middle_of_a_fork_is_heard(tmp_path: Path, again: int) -> None:
    """What is raised inside a fork is printed by Python, and forgotten."""
    a_folder(tmp_path / "in")
    script = f"""
import os, signal, sys
from fdkit.commands import pack
from fdkit.cli import main
left = [{again}]
def interrupt():
    if left[0]:
        left[0] -= 1
        os.kill(os.getpid(), signal.SIGINT)
os.register_at_fork(before=interrupt)
main(sys.argv[1:])
"""
    flags = ["--output", str(tmp_path / "out"), "--images-per-shard", "1", "--workers", "2"]
    ended = subprocess.run(
        [sys.executable, "-c", script, "pack", str(tmp_path / "in"), *flags],
        capture_output=True, text=True, check=False, start_new_session=True,
    )  # fmt: skip
    assert ended.returncode == 130, ended.stderr
    if again == 1:
        assert ended.stderr.strip() == "interrupted"
    assert (tmp_path / "out" / UNFINISHED).is_dir()
    assert not (tmp_path / "out" / MANIFEST).exists()


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_at_any_moment_it_goes_on_to_the_same_bytes_and_leaves_no_process(
    tmp_path: Path, stop: signal.Signals
) -> None:
    (tmp_path / "in").mkdir()
    for number in range(60):
        photo(number, 900, 700).save(tmp_path / "in" / f"{number}.jpg")
    values = options(tmp_path, short_side=256)
    arguments = [
        str(tmp_path / "in"),
        "--output",
        str(tmp_path / "out"),
        "--images-per-shard",
        "3",
        "--workers",
        "2",
    ]
    process = subprocess.Popen(
        [sys.executable, "-c", "from fdkit.cli import main; main()", "pack", *arguments],
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    while not list((tmp_path / "out").glob("*.tar")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(stop)
    process.wait(20)
    deadline = time.monotonic() + 10
    while _group_lives(process.pid):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.1)
    assert (tmp_path / "out" / UNFINISHED).is_dir()
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    assert len(kept) < 20
    pack(**values)
    assert all((tmp_path / "out" / name).stat().st_mtime_ns == changed for name, changed in kept.items())
    pack(**values | {"output": tmp_path / "whole"})
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def _group_lives(group: int) -> bool:
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            return True
    return False
