import io
import os
import pickle
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fdkit.data import tars
from fdkit.data.cache import cache_folder
from fdkit.data.loader import BadImages, LoaderConfig, training_batches
from fdkit.data.sources import BadImage, FolderSource, TarSource, open_source
from fdkit.data.tar_source import expand_braces
from fdkit.data.views import CropConfig, RandomCrop
from fdkit.errors import DataError


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FDKIT_CACHE", str(tmp_path_factory.mktemp("cache")))


def png(value: int, size: tuple[int, int] = (7, 5)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, 2 * value, 3)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def shard(path: Path, values: Iterable[int], label: int | None = None) -> Path:
    """A WebDataset shard of images whose red is their value; labels are value % 3 unless one is given."""
    members = []
    for value in values:
        number = value % 3 if label is None else label
        members += [(f"{value:04d}.png", png(value)), (f"{value:04d}.cls", str(number).encode())]
    return write_tar(path, members)


def reds(source: TarSource | FolderSource) -> list[int]:
    return [source.read(index).getpixel((0, 0))[0] for index in range(len(source))]


def a_folder(root: Path) -> Path:
    for split, classes in {"train": "abc", "val": "ac"}.items():
        for number, name in enumerate(classes):
            for image in range(2):
                place = root / split / name / f"{image}.deep"
                place.mkdir(parents=True)
                (place / f"x{image}.png").write_bytes(png(40 * (split == "val") + 10 * number + image))
    (root / "notes").mkdir()
    (root / "notes" / "x.png").write_bytes(png(99))
    return root


@pytest.mark.parametrize("wrapped", ["", "set/", "./"])
@pytest.mark.parametrize("split", ["all", "train", "test", "val"])
def test_an_archive_of_a_folder_is_read_as_the_folder_is(tmp_path: Path, split: str, wrapped: str) -> None:
    folder = a_folder(tmp_path / "set")
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        archive.add(folder, arcname=wrapped or "/")
    source, expected = open_source(str(tmp_path / "set.tar"), split), FolderSource(folder, split)
    assert source.classes == expected.classes == ("a", "b", "c")
    listed = {(red, int(label)) for red, label in zip(reds(source), source.labels, strict=True)}
    assert listed == {(red, int(label)) for red, label in zip(reds(expected), expected.labels, strict=True)}
    assert len(source) == len(expected) == {"all": 10, "train": 6, "test": 4, "val": 4}[split]


def test_shards_of_webdataset_with_labels_and_splits_in_their_names(tmp_path: Path) -> None:
    for number in range(3):
        shard(tmp_path / f"set-train-{number:03d}.tar", range(5 * number, 5 * number + 4 + number))
    shard(tmp_path / "set-validation-0.tar", [41, 42])
    train = open_source(f"wds:{tmp_path}/set-train-{{000..002}}.tar")
    expected = [0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]
    assert reds(train) == expected
    assert train.labels.tolist() == [value % 3 for value in expected]
    assert train.classes == ("0", "1", "2")
    assert train.describe(4) == f"{tmp_path}/set-train-001.tar:0005.png"
    both = open_source(f"wds:{tmp_path}/set-train-*.tar::{tmp_path}/set-validation-0.tar", "test")
    assert reds(both) == [41, 42]
    assert reds(open_source(str(tmp_path), "test")) == [41, 42]
    assert reds(open_source(str(tmp_path), "train")) == expected
    assert len(open_source(str(tmp_path))) == len(expected) + 2
    with pytest.raises(DataError, match=r"no split 'val'\n.*there is train, validation"):
        open_source(str(tmp_path), "val")


def test_json_labels_and_other_members_of_a_sample(tmp_path: Path) -> None:
    members = [
        ("a/1.mask.png", png(90)),
        ("a/1.png", png(1)),
        ("a/1.json", b'{"label": 4}'),
        ("a/1.txt", b"cat"),
    ]
    source = open_source(str(write_tar(tmp_path / "x.tar", members)))
    assert (reds(source), source.labels.tolist(), source.classes) == ([1], [4], tuple("01234"))
    captions = [("1.png", png(1)), ("1.json", b'{"caption": "a cat"}')]
    assert open_source(str(write_tar(tmp_path / "y.tar", captions))).labels is None


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("1.png", png(1)), ("1.cls", b"cat")], r"1\.cls: label 'cat' is no class number"),
        ([("1.png", png(1)), ("1.cls", b"-1")], r"1\.cls: label '-1' is no class number"),
        ([("1.png", png(1)), ("1.cls", b"true")], r"1\.cls: label 'True' is no class number"),
        ([("1.png", png(1)), ("1.json", b"{")], r"1\.json: not JSON"),
        ([("1.png", png(1)), ("1.cls", b"0"), ("2.png", png(2))], r"2\.png: has no label"),
        (
            [("1.png", png(1)), ("1.cls", b"0"), ("1.jpg", png(2))],
            r"one sample with two images: 1\.png and 1\.jpg",
        ),
        ([("1.txt", b"no image")], r"no images in .*x\.tar\n.*\.jpg"),
    ],
)
def test_labels_that_cannot_be_told_are_refused(
    tmp_path: Path, members: list[tuple[str, bytes]], message: str
) -> None:
    path = write_tar(tmp_path / "x.tar", members)
    with pytest.raises(DataError, match=message):
        open_source(str(path))


def test_a_set_is_labelled_whole_or_not_at_all(tmp_path: Path) -> None:
    shard(tmp_path / "0.tar", [1, 2])
    write_tar(tmp_path / "1.tar", [("3.png", png(3))])
    with pytest.raises(DataError, match=r"1\.tar has no labels, others have"):
        open_source(str(tmp_path))


def test_braces() -> None:
    assert list(expand_braces("a")) == ["a"]
    assert list(expand_braces("a-{08..11}.tar")) == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert list(expand_braces("{9..10}")) == ["9", "10"]
    assert list(expand_braces("{x,yz}/{0..1}")) == ["x/0", "x/1", "yz/0", "yz/1"]
    with pytest.raises(DataError, match="not a range of shards"):
        list(expand_braces("{5..2}"))


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    shard(tmp_path / "0.tar", [1])
    with pytest.raises(DataError, match=r"no such file: .*/1\.tar\n.*every shard of a pattern"):
        open_source(f"wds:{tmp_path}/{{0..1}}.tar")
    with pytest.raises(DataError, match=r"https://x/0\.tar is not on this machine's disks"):
        open_source("wds:https://x/0.tar")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no \.tar files there"):
        open_source(f"wds:{tmp_path}/empty")
    (tmp_path / "z.tar").write_bytes(b"\x1f\x8b\x08" + bytes(600))
    with pytest.raises(DataError, match=r"z\.tar: is compressed\n.*gunzip"):
        open_source(str(tmp_path / "z.tar"))


def test_images_beside_an_archive_win(tmp_path: Path) -> None:
    shard(tmp_path / "old.tar", [1, 2])
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.png").write_bytes(png(7))
    assert isinstance(open_source(str(tmp_path)), FolderSource)


def header_of(path: Path, member: str) -> int:
    with tarfile.open(path) as archive:
        return archive.getmember(member).offset


def test_a_damaged_header_is_named_where_tarfile_would_end_in_silence(tmp_path: Path) -> None:
    path = shard(tmp_path / "0.tar", range(6))
    offset = header_of(path, "0003.png")
    data = bytearray(path.read_bytes())
    data[offset : offset + 40] = b"\x07" * 40
    path.write_bytes(data)
    with tarfile.open(path) as archive:
        assert len(archive.getnames()) == 6  # of twelve, and not a word
    with pytest.raises(
        DataError, match=rf"0\.tar: damaged at byte {offset}: not the header.*\n.*move it away"
    ):
        open_source(str(path))


@pytest.mark.parametrize("into", ["data", "header"])
def test_an_archive_cut_short_is_named(tmp_path: Path, into: str) -> None:
    path = shard(tmp_path / "0.tar", range(6))
    offset = header_of(path, "0003.png")
    os.truncate(path, offset + (520 if into == "data" else 100))
    with pytest.raises(DataError, match=r"0\.tar: damaged (or cut short )?at byte \d+"):
        open_source(str(path))


def test_an_archive_without_its_end_is_read_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = shard(tmp_path / "0.tar", range(3))
    os.truncate(path, header_of(path, "0002.png"))
    assert reds(open_source(str(path))) == [0, 1]
    assert "has no end mark" in caplog.text


def test_joined_archives_are_refused(tmp_path: Path) -> None:
    one, two = shard(tmp_path / "0.tar", [1]), shard(tmp_path / "1.tar", [2])
    (tmp_path / "2.tar").write_bytes(one.read_bytes() + two.read_bytes())
    with pytest.raises(DataError, match="more bytes follow the end"):
        open_source(str(tmp_path / "2.tar"))


@pytest.mark.parametrize("data", [b"", b"not a tar" * 100, bytes(100)])
def test_what_is_no_archive_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.tar").write_bytes(data)
    with pytest.raises(DataError, match=r"x\.tar: damaged"):
        open_source(str(tmp_path / "x.tar"))


def test_links_devices_and_paths_that_lead_elsewhere_are_never_followed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(200))
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, kind in [
            ("l.png", tarfile.SYMTYPE),
            ("h.png", tarfile.LNKTYPE),
            ("d.png", tarfile.CHRTYPE),
        ]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(secret)
            archive.addfile(info)
        for name, value in [
            ("../../etc/a.png", 1),
            ("/root/b.png", 2),
            ("._c.png", 3),
            ("ok/\x1b[2J.png", 4),
        ]:
            info = tarfile.TarInfo(name)
            info.size = len(png(value))
            archive.addfile(info, io.BytesIO(png(value)))
    source = open_source(str(tmp_path / "x.tar"))
    assert reds(source) == [1, 2, 4]
    assert source.describe(2).endswith(":ok/\\x1b[2J.png")
    assert "3 links or special files are left out" in caplog.text
    assert sorted(os.listdir(tmp_path)) == ["secret.png", "x.tar"]


def test_a_damaged_image_is_named_by_archive_and_member_and_counted(tmp_path: Path) -> None:
    members = [("0.png", png(1)), ("1.png", b"<html>"), ("2.png", png(3)), ("3.png", b""), ("4.png", png(5))]
    path = write_tar(tmp_path / "x.tar", members)
    source = open_source(str(path))
    with pytest.raises(BadImage, match=r"x\.tar:1\.png \(not a readable image"):
        source.read_pixels(1)
    bad = BadImages(source, 0.4)
    batches = training_batches(
        source,
        RandomCrop(CropConfig(image_size=8)),
        LoaderConfig(workers=0),
        batch_size=5,
        seed=0,
        start_step=0,
        num_steps=2,
        bad_images=bad,
    )
    assert all(set(batch.indices.tolist()) <= {0, 2, 4} for batch in batches)
    assert sorted(bad.reasons) == [f"{path}:1.png", f"{path}:3.png"]


def test_batches_are_those_of_the_folder_for_any_number_of_workers(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    (tmp_path / "folder").mkdir()
    for number in range(11):
        pixels = random.integers(0, 256, (20 + number, 31, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "folder" / f"{number:02d}.jpg")
    files = sorted((tmp_path / "folder").iterdir())
    for number, part in enumerate([files[:4], files[4:5], files[5:]]):
        write_tar(tmp_path / "shards" / f"{number}.tar", [(path.name, path.read_bytes()) for path in part])

    def batches(data: str, workers: int) -> list[torch.Tensor]:
        source, views = open_source(data), RandomCrop(CropConfig(image_size=9))
        options = {"batch_size": 4, "seed": 3, "start_step": 1, "num_steps": 6}
        config = LoaderConfig(workers=workers)
        return [batch.crops[0] for batch in training_batches(source, views, config, **options)]

    expected = batches(str(tmp_path / "folder"), 0)
    for workers in (0, 2):
        for crops, twin in zip(batches(str(tmp_path / "shards"), workers), expected, strict=True):
            assert torch.equal(crops, twin)


def test_an_archive_is_searched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = shard(tmp_path / "0.tar", [1, 2])
    first = open_source(str(path))
    with monkeypatch.context() as patched:
        patched.setattr(tars, "_scan", lambda path: pytest.fail("searched again"))
        again = open_source(str(path))
    assert (reds(again), again.labels.tolist()) == (reds(first), first.labels.tolist())
    assert again.fingerprint == first.fingerprint
    shard(path, [3, 4, 5])
    assert reds(open_source(str(path))) == [3, 4, 5]


CENTRAL = b"PK\x01\x02"
"""Begins what the end of a zip says of a part: at 6 the version it needs, 8 its flags, 10 its compression."""


@pytest.mark.parametrize("damage", ["flip", "cut", "foreign", "version", "encrypted", "compression"])
def test_a_damaged_index_is_made_again(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    path = shard(tmp_path / "0.tar", [1, 2, 3])
    open_source(str(path))
    (kept,) = cache_folder("tars").iterdir()
    data = bytearray(kept.read_bytes())
    if damage == "flip":
        data[data.index(b"0002.png")] ^= 1
    if damage in ("version", "encrypted", "compression"):
        at, value = {"version": (6, 109), "encrypted": (8, 1), "compression": (10, 77)}[damage]
        data[data.index(CENTRAL) + at] = value
    kept.write_bytes({"cut": data[:300], "foreign": b"\x80\x04N."}.get(damage, data))
    assert reds(open_source(str(path))) == [1, 2, 3]
    assert "making it again" in caplog.text


def test_an_index_that_leads_outside_the_file_is_not_believed(tmp_path: Path) -> None:
    path = shard(tmp_path / "0.tar", [1, 2])
    index, stamp = tars.tar_index(path)
    kept = tars._packed(index)
    assert tars._unpacked(kept, stamp.size) is not None
    assert tars._unpacked(kept | {"offsets": index.offsets + stamp.size}, stamp.size) is None
    assert tars._unpacked(kept | {"sizes": -index.sizes}, stamp.size) is None
    assert tars._unpacked(kept | {"labels": index.labels[:1]}, stamp.size) is None
    assert tars._unpacked(kept | {"names_ends": index.names.ends + 1}, stamp.size) is None
    assert tars._unpacked({}, stamp.size) is None


def test_a_cache_that_cannot_be_written_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FDKIT_CACHE", str(tmp_path / "file"))
    assert reds(open_source(str(shard(tmp_path / "0.tar", [5])))) == [5]


def test_images_of_an_archive_that_changes_while_it_is_read_are_not_taken_for_others(tmp_path: Path) -> None:
    path = shard(tmp_path / "0.tar", [1, 2])
    source = open_source(str(path))
    shard(path, [3, 4])  # of the same sizes at the same places
    with pytest.raises(BadImage, match=r"0\.tar:0001\.png \(its archive has changed since it was listed"):
        source.read(0)
    path.unlink()
    with pytest.raises(BadImage, match="No such file"):
        source.read(1)


def test_an_archive_cut_short_while_it_is_read(tmp_path: Path) -> None:
    members = [("0.png", png(1)), ("1.ppm", b"P6 90 60 255\n" + bytes(90 * 60 * 3))]
    path = write_tar(tmp_path / "x.tar", members)
    source = open_source(str(path))
    assert source.read(1).size == (90, 60)
    os.truncate(path, header_of(path, "1.ppm") + 512 + 1000)
    with pytest.raises(BadImage, match=r"x\.tar:1\.ppm \(1000 of 16213 bytes are there"):
        source.read_pixels(1)


def test_a_source_sent_to_another_process_opens_its_own_files(tmp_path: Path) -> None:
    for number in range(4):
        shard(tmp_path / f"{number}.tar", [number])
    source = open_source(str(tmp_path))
    assert reds(source) == [0, 1, 2, 3]
    assert reds(pickle.loads(pickle.dumps(source))) == [0, 1, 2, 3]


def test_few_archives_are_open_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fdkit.data.tar_source.MAX_OPEN_SHARDS", 2)
    for number in range(6):
        shard(tmp_path / f"{number}.tar", [number])
    before = len(os.listdir("/proc/self/fd"))
    source = open_source(str(tmp_path))
    assert reds(source) + reds(source) == [*range(6), *range(6)]
    assert len(os.listdir("/proc/self/fd")) - before <= 2


def test_the_fingerprint_follows_names_sizes_and_labels_not_places(tmp_path: Path) -> None:
    first = open_source(str(shard(tmp_path / "a" / "0.tar", [1, 2])))
    same = open_source(str(shard(tmp_path / "b" / "1.tar", [1, 2])))
    labels = open_source(str(shard(tmp_path / "c" / "0.tar", [1, 2], label=0)))
    names = open_source(str(shard(tmp_path / "d" / "0.tar", [1, 3])))
    assert first.fingerprint == same.fingerprint
    assert len({first.fingerprint, labels.fingerprint, names.fingerprint}) == 3
    os.utime(tmp_path / "a" / "0.tar", (1, 1))
    later = open_source(str(tmp_path / "a" / "0.tar"))
    assert later.fingerprint == first.fingerprint
    assert later.content_stamp != first.content_stamp


def test_a_long_search_is_announced_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "fdkit")
    for number in range(4):
        shard(tmp_path / f"{number}.tar", [number])
    open_source(str(tmp_path))
    assert not caplog.messages
    monkeypatch.setattr("fdkit.data.tar_source.SECONDS_WITHOUT_A_WORD", -1)
    open_source(str(tmp_path))
    assert [message.startswith("listing what is in 4 .tar files") for message in caplog.messages] == [True]


@pytest.mark.parametrize("name", ["a.cls", "a.json", "a.png"])
@pytest.mark.parametrize("size", [-1, -600, -(1 << 70), 1 << 70])
def test_members_of_impossible_sizes_are_refused(name: str, size: int, tmp_path: Path) -> None:
    member = tarfile.TarInfo(name)
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "one.tar").write_bytes(bytes(header) + bytes(1024))
    with pytest.raises(DataError, match="damaged or cut short"):
        open_source(str(tmp_path / "one.tar"), "all")


def test_a_label_beyond_all_classes_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "one.tar", "w") as archive:
        for name, content in (("a.png", b"no image"), ("a.cls", b"1000000")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    with pytest.raises(DataError, match="label '1000000' is no class number"):
        open_source(f"wds:{tmp_path / 'one.tar'}", "all")
