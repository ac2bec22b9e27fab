from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fdkit.data.imagenet_variants import imagenet_wnids, matched, open_variants
from fdkit.data.sources import ArraySource
from fdkit.errors import DataError


def folders(root: Path, *names: str, count: int = 1) -> Path:
    """Class folders, each with `count` images whose grey level is the position of its name among `names`."""
    for position, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (9, 7), (position, 0, 0)).save(root / name / f"{index}.png")
    return root


def test_classes_are_matched_by_name_whatever_their_order(tmp_path):
    folders(tmp_path, "dog", "ant", count=2)
    ((source, corruption, severity),) = open_variants(tmp_path, ("ant", "bee", "cat", "dog"))
    assert (corruption, severity) == (None, None)
    assert source.classes == ("ant", "bee", "cat", "dog")
    assert source.labels.tolist() == [0, 0, 3, 3]
    assert source.own_classes == (0, 3)
    assert [source.read(i).getpixel((0, 0))[0] for i in range(4)] == [1, 1, 0, 0]
    assert source.describe(2).endswith("dog/0.png")


def test_numbers_stand_for_imagenets_classes_in_the_order_of_numbers_not_of_texts(tmp_path):
    """ImageNet-V2 names its folders 0 to 999, and 10 comes before 2 among texts."""
    wnids = imagenet_wnids()
    names = ("0", "2", "10", "999")
    folders(tmp_path, *names)
    source = open_variants(tmp_path, wnids)[0].source
    assert source.labels.tolist() == [0, 10, 2, 999]  # the files' own order is that of texts
    assert [source.classes[label] for label in source.labels] == [wnids[0], wnids[10], wnids[2], wnids[999]]
    reversed_classes = tuple(reversed(wnids))
    assert open_variants(tmp_path, reversed_classes)[0].source.labels.tolist() == [999, 989, 997, 0]


def test_numbers_are_names_where_training_has_them(tmp_path):
    folders(tmp_path, "3", "10")
    source = open_variants(tmp_path, ("10", "3", "5"))[0].source
    assert source.labels.tolist() == [0, 1]


def test_imagenet_c_is_found_with_and_without_its_groups(tmp_path):
    for corruption in ("fog", "snow"):
        for severity in ("1", "5"):
            folders(tmp_path / "weather" / corruption / severity, "ant", "bee")
    classes = ("ant", "bee", "cat")
    for root in (tmp_path, tmp_path / "weather"):
        found = open_variants(root, classes)
        places = [(one.corruption, one.severity) for one in found]
        assert places == [("fog", 1), ("fog", 5), ("snow", 1), ("snow", 5)]
        assert all(one.source.labels.tolist() == [0, 1] for one in found)


def test_class_folders_called_1_to_5_are_no_severities(tmp_path):
    folders(tmp_path, "1", "2", "3")
    (variant,) = open_variants(tmp_path, ("1", "2", "3", "4"))
    assert variant.corruption is None
    assert variant.source.labels.tolist() == [0, 1, 2]


def test_the_images_keep_their_stamps(tmp_path):
    folders(tmp_path, "ant", "bee")
    one, other = (
        open_variants(tmp_path, classes)[0].source for classes in (("ant", "bee"), ("x", "bee", "ant"))
    )
    assert (one.fingerprint, one.content_stamp) == (other.fingerprint, other.content_stamp)
    assert np.array_equal(np.asarray(one.read_pixels(1)), np.asarray(one.read(1)))


def test_there_are_a_thousand_sorted_ids():
    wnids = imagenet_wnids()
    assert len(wnids) == len(set(wnids)) == 1000
    assert list(wnids) == sorted(wnids)
    assert (wnids[0], wnids[-1]) == ("n01440764", "n15075141")


def test_what_cannot_be_matched_is_refused_in_one_sentence(tmp_path):
    folders(tmp_path / "x", "ant", "emu", "fox")
    with pytest.raises(DataError, match="has 2 of 3 classes that are not known: emu, fox"):
        open_variants(tmp_path / "x", ("ant", "bee"))
    with pytest.raises(
        DataError, match=r"no class in common with the 2 classes that are known: ant, emu, fox against"
    ):
        open_variants(tmp_path / "x", ("cow", "bee"))
    with pytest.raises(DataError, match="nowhere: no such folder"):
        open_variants(tmp_path / "nowhere", ("ant",))
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (5, 5)).save(tmp_path / "flat" / "1.png")
    with pytest.raises(DataError, match="has no labels: it is not made of class folders"):
        open_variants(tmp_path / "flat", ("ant",))


def test_a_source_without_names_has_its_numbers():
    images = np.zeros((3, 4, 4, 3), np.uint8)
    source = matched(ArraySource("bare", images, np.array([0, 2, 1])), ("2", "1", "0"))
    assert source.labels.tolist() == [2, 0, 1]
