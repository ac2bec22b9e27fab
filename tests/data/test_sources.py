import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fdkit.data.sources import ArraySource, BadImage, FolderSource, open_source
from fdkit.errors import DataError


def write(path: Path, value: int = 0, size: tuple[int, int] = (7, 5)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    for split, classes in {"train": "abc", "test": "ac", "validation": "b"}.items():
        for number, name in enumerate(classes):
            write(tmp_path / split / name / "2.png", number)
            write(tmp_path / split / name / "deep" / "1.PNG", number)
    (tmp_path / "train" / "notes").mkdir()
    (tmp_path / "train" / "a" / "list.txt").write_text("no image")
    return tmp_path


def paths(source: FolderSource) -> list[str]:
    return [os.path.relpath(source.describe(i), source.root) for i in range(len(source))]


def test_class_folders_make_labels_in_sorted_order(dataset: Path) -> None:
    source = open_source(str(dataset), "train")
    assert source.classes == ("a", "b", "c")
    assert source.labels.dtype == np.int64
    assert source.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert paths(source)[:2] == ["train/a/2.png", "train/a/deep/1.PNG"]


def test_labels_agree_with_torchvision_image_folder(dataset: Path) -> None:
    from torchvision.datasets import ImageFolder

    (dataset / "train" / "notes").rmdir()
    expected = ImageFolder(dataset / "train")
    source = FolderSource(dataset, "train")
    assert list(source.classes) == expected.classes
    assert {(source.describe(i), int(source.labels[i])) for i in range(len(source))} == set(expected.samples)


def test_a_class_missing_from_a_split_shifts_no_label(dataset: Path) -> None:
    source = open_source(str(dataset), "test")
    assert source.classes == ("a", "b", "c")
    assert source.labels.tolist() == [0, 0, 2, 2]


def test_splits(dataset: Path) -> None:
    assert len(open_source(str(dataset), "validation")) == 2
    assert len(open_source(str(dataset))) == 12
    assert open_source(str(dataset)).labels.tolist() == [0, 0, 1, 1, 2, 2, 0, 0, 2, 2, 1, 1]
    (dataset / "test").rename(dataset / "val")
    assert paths(open_source(str(dataset), "test"))[0] == "val/a/2.png"
    with pytest.raises(
        DataError, match=r"no split 'eval'\n.*looked for eval/; there is train/, val/, validation/"
    ):
        open_source(str(dataset), "eval")


def test_train_is_everything_without_a_train_folder(tmp_path: Path) -> None:
    write(tmp_path / "cat" / "1.jpg")
    write(tmp_path / "ant" / "1.jpg")
    source = open_source(str(tmp_path), "train")
    assert source.classes == ("ant", "cat")
    assert source.labels.tolist() == [0, 1]
    with pytest.raises(
        DataError, match=r"no split 'test'\n.*test/ or val/ or validation/; there is ant/, cat/"
    ):
        open_source(str(tmp_path), "test")


def test_loose_images_have_no_labels(tmp_path: Path) -> None:
    write(tmp_path / "b.webp")
    write(tmp_path / "more" / "a.bmp")
    source = open_source(str(tmp_path))
    assert source.labels is None
    assert source.classes == ()
    assert paths(source) == ["b.webp", "more/a.bmp"]


def test_extensions_hidden_files_and_folders_named_like_images(tmp_path: Path) -> None:
    for name in ["a.jpg", "b.JPEG", "c.png", "d.webp", "e.bmp", "f.gif", "g.tif", "h.TIFF", "i.ppm"]:
        write(tmp_path / name)
    write(tmp_path / ".hidden.jpg")
    write(tmp_path / ".cache" / "x.jpg")
    write(tmp_path / "folder.jpg" / "x.jpg")
    (tmp_path / "j.svg").write_text("<svg/>")
    (tmp_path / "k.eps").write_text("%!PS")
    assert "".join(path[0] for path in paths(FolderSource(tmp_path))) == "abcdeffghi"
    (tmp_path / "one").mkdir()
    write(tmp_path / "one" / "class" / "1.png")
    (tmp_path / "one" / "folder.jpg").mkdir()  # no loose image, which would leave all unlabelled
    source = FolderSource(tmp_path / "one")
    assert source.classes == ("class",)
    assert paths(source) == ["class/1.png"]


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    write(tmp_path / "data" / "a" / "1.png")
    (tmp_path / "data" / "a" / "loop").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "b").symlink_to(tmp_path / "elsewhere")
    write(tmp_path / "elsewhere" / "2.png")
    (tmp_path / "data" / "b" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    source = FolderSource(tmp_path / "data")
    assert source.classes == ("a", "b")
    assert "b/2.png" in paths(source)
    assert len(source) < 8
    with pytest.raises(BadImage, match="No such file"):
        source.read(paths(source).index("b/gone.png"))


def test_names_that_are_not_unicode_can_be_read(tmp_path: Path) -> None:
    write(tmp_path / "a.png", 9)
    os.rename(tmp_path / "a.png", os.path.join(os.fsencode(tmp_path), b"\xff\x1b.png"))
    source = FolderSource(tmp_path)
    assert source.read(0).getpixel((0, 0)) == (9, 9, 9)
    assert source.describe(0).endswith("\\udcff\\x1b.png")


def test_fingerprint_follows_names_and_sizes(tmp_path: Path) -> None:
    for root in ("one", "two"):
        write(tmp_path / root / "a.bmp", 1)
        write(tmp_path / root / "b.bmp", 2)
    first = FolderSource(tmp_path / "one").fingerprint
    assert len(first) == 64
    assert FolderSource(tmp_path / "two").fingerprint == first
    write(tmp_path / "two" / "b.bmp", 2, size=(9, 9))
    assert FolderSource(tmp_path / "two").fingerprint != first
    (tmp_path / "one" / "b.bmp").rename(tmp_path / "one" / "c.bmp")
    assert FolderSource(tmp_path / "one").fingerprint != first


def test_errors_name_the_folder_and_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"/missing: no such folder\n.*torchvision:NAME"):
        open_source(str(tmp_path / "missing"))
    with pytest.raises(DataError, match=r"digit: no such folder\n.*did you mean digits"):
        open_source("digit")
    with pytest.raises(DataError, match=r"no images under .*\n.*\.jpg \.jpeg \.png"):
        open_source(str(tmp_path))
    write(tmp_path / "x.jpg")
    with pytest.raises(DataError, match="a file, not a folder"):
        open_source(str(tmp_path / "x.jpg"))
    with pytest.raises(
        DataError, match=r"ftp://x: unknown kind of data\n.*a folder of images .* digits, demo"
    ):
        open_source("ftp://x")


def test_a_thousand_names_survive_packing(tmp_path: Path) -> None:
    names = sorted(f"{'é' * (i % 5)}{i}.png" for i in range(1000))
    for name in names:
        (tmp_path / name).touch()
    assert sorted(paths(FolderSource(tmp_path))) == names


def test_digits_are_stratified_and_disjoint() -> None:
    from sklearn.datasets import load_digits

    train, test, everything = (open_source("digits", split) for split in ("train", "test", "all"))
    assert (len(train), len(test), len(everything)) == (1347, 450, 1797)
    share = np.bincount(test.labels) / np.bincount(everything.labels)
    assert np.abs(share - 0.25).max() < 0.005
    assert sorted([*train.labels, *test.labels]) == sorted(everything.labels)
    together = np.concatenate([train.images, test.images]).reshape(1797, -1)
    assert sorted(map(bytes, together)) == sorted(map(bytes, everything.images.reshape(1797, -1)))
    assert everything.labels.tolist() == load_digits().target.tolist()
    image = everything.read(17)
    assert (image.mode, image.size) == ("RGB", (32, 32))
    brightness = [np.asarray(everything.read(i)).mean() / 255 for i in range(50)]
    np.testing.assert_allclose(brightness, load_digits().images[:50].mean((1, 2)) / 16, atol=0.02)
    assert everything.describe(17) == "digits[17]"
    assert train.fingerprint != test.fingerprint
    with pytest.raises(DataError, match="no split 'val'"):
        open_source("digits", "val")


def test_array_source_fingerprint_depends_on_labels() -> None:
    images = np.zeros((2, 3, 5, 3), np.uint8)
    prints = {
        ArraySource("x", images, labels).fingerprint for labels in (None, np.array([0, 1]), np.array([1, 0]))
    }
    assert len(prints) == 3


class FakeSet:
    """A torchvision-like set: five grey images whose value tells split and index."""

    classes = ("no", "yes")

    def __init__(self, root: str, train: bool = True, download: bool = False) -> None:
        assert download
        self.base = 0 if train else 100
        self.targets = [0, 1, 0, 1, 1] if train else [1, 0]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.new("L", (5, 3), self.base + index), self.targets[index]


def test_torchvision_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchvision.datasets.CIFAR10", FakeSet)
    data = f"torchvision:CIFAR10@{tmp_path}"
    source = open_source(data)
    assert source.labels.tolist() == [0, 1, 0, 1, 1, 1, 0]
    assert [source.read(i).getpixel((0, 0))[0] for i in range(7)] == [0, 1, 2, 3, 4, 100, 101]
    assert source.classes == ("no", "yes")
    assert open_source(data, "test").labels.tolist() == [1, 0]
    assert source.describe(3) == f"{data}[3]"
    with pytest.raises(DataError, match=r"no folder .*/none\n.*mkdir -p .*/none"):
        open_source(f"{data}/none")
    with pytest.raises(DataError, match=r"not a torchvision set with splits.*\n.*CIFAR10"):
        open_source("torchvision:CIFAR01")
    with pytest.raises(DataError, match="no split 'val'"):
        open_source(data, "val")


def test_a_torchvision_set_that_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.utils.urllib.request.urlopen", offline)
    with pytest.raises(DataError, match=r"cannot be opened or downloaded .*\n.*put the set into"):
        open_source(f"torchvision:CIFAR10@{tmp_path}", "train")


def test_real_photos(shared: Path) -> None:
    source = open_source(str(shared / "data" / "clothing_small"), "test")
    assert len(source) == 372
    assert len(source.classes) == 10
    assert source.classes[::9] == ("dress", "t-shirt")
    assert source.read(0).mode == "RGB"
