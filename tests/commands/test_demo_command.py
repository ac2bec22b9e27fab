from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fdkit.commands.demo import DemoConfig, demo, open_splits, run
from fdkit.data.subset import Subset
from fdkit.errors import OutputError


def make_photos(folder: Path, classes: int, count: int) -> Path:
    random = np.random.default_rng(0)
    for label in range(classes):
        (folder / f"class{label}").mkdir(parents=True)
        for number in range(count):
            pixels = random.integers(0, 256, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"class{label}" / f"{number}.png")
    return folder


def test_the_page_tells_the_story_on_the_users_own_images(tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos", classes=2, count=15)
    numbers = demo(data=str(photos), output=tmp_path / "out", steps=3)
    page = Path(numbers["page"]).read_text()
    assert set(numbers["accuracies"]) == {"teacher", "student", "untrained", "raw pixels"}
    assert all(0 <= row["knn_top1"] <= 1 for row in numbers["accuracies"].values())
    assert numbers["accuracies"]["student"]["num_test_images"] == 6
    assert "There is no test split, so 6 of 30 images were held out" in page
    assert page.count("<svg") + page.count("data:image/svg+xml") >= 3
    assert (tmp_path / "out" / "student" / "student.safetensors").is_file()
    with pytest.raises(OutputError, match="--overwrite"):
        run(DemoConfig(data=str(photos), output=tmp_path / "out"))


def test_images_without_labels_give_a_page_without_accuracies(tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos", classes=1, count=12) / "class0"
    numbers = demo(data=str(photos), output=tmp_path / "out", steps=2)
    assert all(row == {} for row in numbers["accuracies"].values())
    assert "no labels" in Path(numbers["page"]).read_text()


def test_splits_of_the_data_are_kept(tmp_path: Path) -> None:
    make_photos(tmp_path / "photos" / "train", classes=2, count=3)
    make_photos(tmp_path / "photos" / "val", classes=2, count=2)
    splits = open_splits(str(tmp_path / "photos"))
    assert splits.train is not None
    assert splits.test is not None
    assert (len(splits.train), len(splits.test), splits.note) == (6, 4, "")


def test_classes_of_one_image_leave_nothing_to_measure_on(tmp_path: Path) -> None:
    splits = open_splits(str(make_photos(tmp_path / "photos", classes=3, count=1)))
    assert splits == (None, None, "No class has two images, so there are no accuracies.")


def test_a_subset_keeps_labels_and_names_with_their_images(tmp_path: Path) -> None:
    from fdkit.data.sources import open_source

    whole = open_source("digits", "train")
    part = Subset(whole, [5, 2])
    assert part.labels is not None
    assert whole.labels is not None
    assert part.labels.tolist() == [whole.labels[5], whole.labels[2]]
    assert part.describe(1) == whole.describe(2)
    assert np.array_equal(np.asarray(part.read(0)), np.asarray(whole.read(5)))
    assert part.fingerprint != Subset(whole, [2, 5]).fingerprint
