import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fdkit.data.segmentation import IGNORED, MaskConfig, open_segmentation
from fdkit.errors import DataError
from tests.segmentation_folders import scene, write_pair, write_scenes


def save(path: Path, values: np.ndarray | Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    (values if isinstance(values, Image.Image) else Image.fromarray(values)).save(path)


def one(root: Path, mask: np.ndarray | Image.Image, *, size: tuple[int, int] = (4, 6)) -> Path:
    """A folder with one image of height and width `size`, and this mask."""
    save(root / "images" / "train" / "a.png", np.zeros((*size, 3), dtype=np.uint8))
    save(root / "masks" / "train" / "a.png", mask)
    return root


MASK = np.arange(24, dtype=np.uint8).reshape(4, 6) % 3


def test_pixels_are_those_of_image_and_mask(tmp_path: Path) -> None:
    write_scenes(tmp_path)
    train, test = open_segmentation(tmp_path, ("train", "test"))
    assert (len(train), len(test), train.classes, train.labels) == (8, 3, ("0", "1", "2"), None)
    for source, first in ((train, 0), (test, 100)):
        for index in range(len(source)):
            image, mask = scene(first + index, 24, 40 + index % 2)
            pixels = source.read_pixels(index)
            assert pixels.dtype == torch.uint8
            assert np.array_equal(pixels[..., :3].numpy(), image)
            assert np.array_equal(pixels[..., 3].numpy(), mask)
            assert np.array_equal(np.asarray(source.read(index)), image)
    counts = sum(np.bincount(scene(i, 24, 40 + i % 2)[1].ravel(), minlength=256) for i in range(8))
    assert train.pixels.tolist() == counts[:3].tolist()
    assert pickle.loads(pickle.dumps(train)).describe(1).endswith("001.png"), "workers are sent the source"


@pytest.mark.parametrize("layout", ["images first", "split first", "flat", "validation", "nested"])
def test_every_layout_gives_the_same_pixels(tmp_path: Path, layout: str) -> None:
    places = {
        "images first": ("images/train", "masks/train", "images/val", "masks/val", "a"),
        "split first": ("train/images", "train/masks", "test/images", "test/masks", "a"),
        "flat": ("images", "masks", "", "", "a"),
        "validation": ("images/train", "masks/train", "images/validation", "masks/validation", "a"),
        "nested": ("images/train", "masks/train", "images/test", "masks/test", "town/a"),
    }[layout]
    image, mask = scene(0, 5, 7)
    for number in (0, 2):
        if places[number]:
            folders = tmp_path / places[number], tmp_path / places[number + 1]
            write_pair(*folders, places[4], image, Image.fromarray(mask))
    splits = ("train",) if layout == "flat" else ("train", "test")
    for source in open_segmentation(tmp_path, splits):
        assert np.array_equal(source.read_pixels(0).numpy(), np.dstack([image, mask]))


def test_ade20ks_folders_are_recognised_and_their_zero_is_ignored(tmp_path: Path) -> None:
    values = np.array([[0, 1, 2], [150, 3, 0]], dtype=np.uint8)
    for split in ("training", "validation"):
        folders = tmp_path / "images" / split, tmp_path / "annotations" / split
        write_pair(*folders, "ADE_1", np.zeros((2, 3, 3), dtype=np.uint8), Image.fromarray(values))
    names = [f"class {number}" for number in range(150)]
    rows = [
        "Idx\tRatio\tTrain\tVal\tStuff\tName",
        *(f"{i + 1}\t0\t1\t1\t1\t{name}" for i, name in enumerate(names)),
    ]
    (tmp_path / "objectInfo150.txt").write_text("\n".join(rows))
    train, test = open_segmentation(tmp_path, ("train", "test"))
    assert train.read_pixels(0)[..., 3].tolist() == [[255, 0, 1], [149, 2, 255]]
    assert test.classes == tuple(names)
    (tmp_path / "objectInfo150.txt").unlink()
    assert len(open_segmentation(tmp_path, ("train",))[0].classes) == 150


def test_zero_is_ignored_elsewhere_where_it_is_asked_for(tmp_path: Path) -> None:
    (source,) = open_segmentation(one(tmp_path, MASK), ("train",), MaskConfig(reduce_zero_label=True))
    assert np.array_equal(
        source.read_pixels(0)[..., 3].numpy(), np.where(MASK == 0, 255, MASK.astype(int) - 1)
    )
    assert source.classes == ("0", "1")


def test_ignored_values_are_those_in_the_file_whatever_zero_means(tmp_path: Path) -> None:
    config = MaskConfig(reduce_zero_label=True, ignore_label=(2,))
    root = one(tmp_path, np.array([[0, 1, 2, 3]], dtype=np.uint8), size=(1, 4))
    (source,) = open_segmentation(root, ("train",), config)
    assert source.read_pixels(0)[0, :, 3].tolist() == [255, 0, 255, 2]


def test_several_values_may_be_ignored_and_the_others_keep_their_numbers(tmp_path: Path) -> None:
    values = np.array([[0, 1, 2, 3, 11, 200]], dtype=np.uint8)
    root = one(tmp_path, values, size=(1, 6))
    (source,) = open_segmentation(root, ("train",), MaskConfig(ignore_label=(1, 11, 200)))
    assert source.read_pixels(0)[0, :, 3].tolist() == [0, 255, 2, 3, 255, 255]
    assert source.classes == ("0", "1", "2", "3")
    assert source.pixels.tolist() == [1, 0, 1, 1]


def test_255_never_is_a_class(tmp_path: Path) -> None:
    values = np.array([[0, 1, 255, 11]], dtype=np.uint8)
    (source,) = open_segmentation(
        one(tmp_path, values, size=(1, 4)), ("train",), MaskConfig(ignore_label=(11,))
    )
    assert source.read_pixels(0)[0, :, 3].tolist() == [0, 1, 255, 255]
    save(tmp_path / "masks" / "train" / "a.png", np.array([[0, 255, 255, 0]], dtype=np.uint8))
    with pytest.raises(DataError, match="every pixel that counts is of class 0") as caught:
        open_segmentation(tmp_path, ("train",))
    assert "255 is never one" in caught.value.hint


def test_a_palette_is_read_as_indices_and_not_as_colours(tmp_path: Path) -> None:
    palette = Image.frombytes("P", (6, 4), MASK.tobytes())
    palette.putpalette([9, 9, 9, 255, 0, 0, 0, 255, 0])
    (source,) = open_segmentation(one(tmp_path, palette), ("train",))
    assert np.array_equal(source.read_pixels(0)[..., 3].numpy(), MASK)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("classes.txt", "sky\nroad\n\ntree\n"),
        ("classes.json", json.dumps(["sky", "road", "tree"])),
        ("classes.json", json.dumps({"0": "sky", "2": "tree", "1": "road"})),
    ],
)
def test_names_of_classes_come_from_a_file_beside(tmp_path: Path, file: str, text: str) -> None:
    (one(tmp_path, MASK) / file).write_text(text)
    assert open_segmentation(tmp_path, ("train",))[0].classes == ("sky", "road", "tree")


def test_a_name_for_ignored_pixels_is_no_class(tmp_path: Path) -> None:
    (one(tmp_path, MASK) / "classes.txt").write_text("sky\nroad\nunlabelled\n")
    (source,) = open_segmentation(tmp_path, ("train",), MaskConfig(ignore_label=(2,)))
    assert source.classes == ("sky", "road")


def test_classes_are_those_of_all_splits_together(tmp_path: Path) -> None:
    one(tmp_path, MASK)
    save(tmp_path / "images" / "test" / "b.png", np.zeros((1, 2, 3), dtype=np.uint8))
    save(tmp_path / "masks" / "test" / "b.png", np.array([[0, 4]], dtype=np.uint8))
    train, test = open_segmentation(tmp_path, ("train", "test"))
    assert train.classes == test.classes == ("0", "1", "2", "3", "4")


def test_the_fingerprint_tells_files_and_meanings_apart(tmp_path: Path) -> None:
    write_scenes(tmp_path / "a")
    write_scenes(tmp_path / "b")
    a, again = (open_segmentation(tmp_path / name, ("train",))[0].fingerprint for name in "ab")
    assert a == again, "where the folder lies does not matter"
    other = open_segmentation(tmp_path / "a", ("train",), MaskConfig(ignore_label=(255, 1)))[0].fingerprint
    save(
        tmp_path / "b" / "masks" / "train" / "000.png", np.pad(np.zeros((23, 40), np.uint8), ((0, 1), (0, 0)))
    )
    changed = open_segmentation(tmp_path / "b", ("train",))[0].fingerprint
    assert len({a, other, changed}) == 3


def test_an_unreadable_file_is_left_to_the_loader(tmp_path: Path) -> None:
    from fdkit.data.decode import BadImage

    write_scenes(tmp_path)
    (tmp_path / "masks" / "train" / "001.png").write_bytes(b"\x89PNG nothing")
    (tmp_path / "images" / "train" / "002.png").write_bytes(b"nothing")
    (source,) = open_segmentation(tmp_path, ("train",))
    for index in (1, 2):
        with pytest.raises(BadImage):
            source.read_pixels(index)


def test_hidden_files_are_left_out_and_links_are_followed_once(tmp_path: Path) -> None:
    write_scenes(tmp_path / "there", counts={"train": 2})
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    for kind in ("images", "masks"):
        (tmp_path / kind / "train").symlink_to(tmp_path / "there" / kind / "train")
        (tmp_path / "there" / kind / "train" / "loop").symlink_to(tmp_path / kind / "train")
    save(tmp_path / "images" / "train" / "._000.png", np.zeros((2, 2, 3), dtype=np.uint8))
    (source,) = open_segmentation(tmp_path, ("train",))
    assert len(source) == 2
    assert len(source.fingerprint) == 64


RGB = np.zeros((4, 6, 3), dtype=np.uint8)


def damage(root: Path, how: str) -> None:
    masks = root / "masks" / "train"
    if how == "no folder of masks":
        (root / "masks" / "train" / "a.png").unlink()
        masks.rmdir()
    elif how == "no masks":
        (masks / "a.png").unlink()
    elif how == "jpeg masks":
        (masks / "a.png").unlink()
        save(masks / "a.jpg", MASK)
    elif how == "one missing":
        save(root / "images" / "train" / "b.png", RGB)
    elif how == "no images":
        (root / "images" / "train" / "a.png").unlink()
    elif how == "two of a name":
        save(root / "images" / "train" / "a.jpg", RGB)
    elif how == "names":
        (root / "classes.txt").write_text("sky\nroad\n")
    elif how == "one name":
        (root / "classes.txt").write_text("sky\n")
    elif how == "broken names":
        (root / "classes.json").write_text("{")
    else:
        save(masks / "a.png", {
            "rgb": RGB, "rgba": np.zeros((4, 6, 4), np.uint8), "16 bit": MASK.astype(np.uint16), "size": MASK[:, :5],
            "all ignored": np.full((4, 6), 255, np.uint8), "one class": np.where(MASK == 1, 1, 255).astype(np.uint8),
        }[how])  # fmt: skip


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no folder of masks", "the images of the split train have no masks"),
        ("no masks", "no masks under"),
        ("jpeg masks", "JPEG would blur"),
        ("one missing", "b.png: no mask, and so for 1 of 2 images"),
        ("no images", "no images under"),
        ("two of a name", "has the same name but for its ending"),
        ("names", "a.png: value 2 is above the 2 classes named"),
        ("one name", "names 1 classes that count"),
        ("broken names", "classes.json: cannot be read as names"),
        ("rgb", r"a.png: a colour picture \(RGB\), where a mask holds the number of a class"),
        ("rgba", r"a colour picture \(RGBA\)"),
        ("16 bit", "16 or 32 bits a pixel"),
        ("size", "a.png is 6 x 4 pixels, and its mask 5 x 4"),
        ("all ignored", "all pixels of the split train are ignored"),
        ("one class", "every pixel that counts is of class 1"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(tmp_path: Path, how: str, message: str) -> None:
    damage(one(tmp_path, MASK), how)
    with pytest.raises(DataError, match=message) as caught:
        open_segmentation(tmp_path, ("train",))
    assert "\n" not in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("make", "split", "message"),
    [
        ("", "train", "no folder images/ in it"),
        ("images", "train", "images/ has no masks beside it"),
        ("images/train masks/train", "test", "no split test"),
        ("images masks", "test", "no split test"),
        ("images/train masks/train", "town", "no split town"),
    ],
)
def test_a_split_that_is_not_there_is_named_beside_those_that_are(
    tmp_path: Path, make: str, split: str, message: str
) -> None:
    for folder in make.split():
        (tmp_path / folder).mkdir(parents=True)
    with pytest.raises(DataError, match=message):
        open_segmentation(tmp_path, (split,))


def test_no_folder_and_a_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(DataError, match="no such folder"):
        open_segmentation(tmp_path / "nowhere", ("train",))
    with pytest.raises(DataError, match="a file, not a folder"):
        open_segmentation(tmp_path / "a.txt", ("train",))


def test_real_street_images(shared: Path) -> None:
    config = MaskConfig(ignore_label=(11,))
    train, test = open_segmentation(shared / "data" / "camvid_320x240", ("train", "test"), config)
    assert (len(train), len(test), len(train.classes)) == (367, 233, 11)
    pixels = train.read_pixels(5)
    assert pixels.shape == (240, 320, 4)
    assert set(pixels[..., 3].unique().tolist()) <= {*range(11), IGNORED}
    assert 0.9 < train.pixels.sum() / (367 * 240 * 320) < 1
