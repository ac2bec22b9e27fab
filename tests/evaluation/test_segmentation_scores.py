import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score, jaccard_score
from torch import Tensor

from fdkit.data.segmentation import IGNORED, open_segmentation
from fdkit.errors import DataError, NumericsError
from fdkit.evaluation._segmentation import (
    combined,
    confusion_matrix,
    measure,
    predict,
    predict_image,
    scores_of,
)
from tests.segmentation_folders import COLOURS, scene, write_scenes

NAMES = tuple("abcde")


def drawn(seed: int = 0, num_classes: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(0, num_classes, (7, 9), generator=generator)
    predicted = torch.where(
        torch.rand(7, 9, generator=generator) < 0.5,
        truth,
        torch.randint(0, num_classes, (7, 9), generator=generator),
    )
    truth[torch.rand(7, 9, generator=generator) < 0.2] = IGNORED
    return predicted, truth


def test_the_confusion_is_counted_pixel_by_pixel() -> None:
    predicted, truth = drawn()
    expected = [[0] * 5 for _ in range(5)]
    for p, t in zip(predicted.flatten().tolist(), truth.flatten().tolist(), strict=True):
        if t != IGNORED:
            expected[t][p] += 1
    assert confusion_matrix(predicted, truth, 5).tolist() == expected


@pytest.mark.parametrize("seed", range(4))
def test_scores_are_scikit_learns(seed: int) -> None:
    predicted, truth = drawn(seed)
    counts = truth != IGNORED
    p, t = predicted[counts].numpy(), truth[counts].numpy()
    found = scores_of(confusion_matrix(predicted, truth, 5), NAMES)
    assert [one["iou"] for one in found["per_class"]] == pytest.approx(
        jaccard_score(t, p, average=None).tolist()
    )
    assert found["miou"] == pytest.approx(jaccard_score(t, p, average="macro"))
    assert found["pixel_accuracy"] == pytest.approx(accuracy_score(t, p))
    assert found["mean_accuracy"] == pytest.approx(balanced_accuracy_score(t, p))
    assert [one["pixels"] for one in found["per_class"]] == np.bincount(t, minlength=5).tolist()
    assert found["absent"] == []
    assert json.loads(json.dumps(found)) == found


def test_scores_of_hand() -> None:
    """Class c is nowhere and counts nowhere; class d is only predicted, and its IoU of 0 counts."""
    confusion = torch.tensor([[3, 1, 0, 0], [1, 4, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]])
    found = scores_of(confusion, "abcd")
    assert [one["iou"] for one in found["per_class"]] == [3 / 5, 4 / 7, None, 0]
    assert [one["accuracy"] for one in found["per_class"]] == [3 / 4, 4 / 6, None, None]
    assert found["miou"] == pytest.approx((3 / 5 + 4 / 7) / 3)
    assert found["mean_accuracy"] == pytest.approx((3 / 4 + 4 / 6) / 2)
    assert found["pixel_accuracy"] == pytest.approx(7 / 10)
    assert found["absent"] == ["c"]


def test_one_confusion_of_all_images_is_not_the_mean_over_images() -> None:
    first = torch.tensor([[8, 0], [0, 0]])
    second = torch.tensor([[0, 1], [0, 1]])
    assert scores_of(first + second, "ab")["miou"] == pytest.approx((8 / 9 + 1 / 2) / 2)


def test_nothing_that_counts_gives_no_number() -> None:
    found = scores_of(torch.zeros(2, 2, dtype=torch.int64), "ab")
    assert (found["miou"], found["pixel_accuracy"], found["absent"]) == (None, None, ["a", "b"])


def by_colour(image: Tensor) -> Tensor:
    """Scores (3, h, w): how near each pixel's colour is to that of a class."""
    colours = torch.from_numpy(COLOURS).float() / 255
    return -(image[None] - colours[:, :, None, None]).square().sum(dim=1)


def test_a_scorer_that_knows_the_colours_is_right_everywhere(tmp_path: Path) -> None:
    (source,) = open_segmentation(write_scenes(tmp_path), ("test",))
    found = measure(by_colour, source, short_side=24)
    scores = scores_of(found.confusion, source.classes)
    assert (found.num_images, found.skipped) == (3, [])
    assert scores["miou"] == 1
    counted = sum(int((scene(100 + i, 24, 40 + i % 2)[1] != 255).sum()) for i in range(3))
    assert int(found.confusion.sum()) == counted


def test_measured_at_the_resolution_of_the_mask(tmp_path: Path) -> None:
    """Images at half their size give scores that are resized before the class is taken, as a naive loop does."""
    (source,) = open_segmentation(write_scenes(tmp_path), ("test",))
    found = measure(by_colour, source, short_side=12)
    expected = torch.zeros(3, 3, dtype=torch.int64)
    for index in range(len(source)):
        pixels = source.read_pixels(index)
        image = pixels[..., :3].permute(2, 0, 1)[None]
        size = (12, round(12 * image.shape[3] / 24))
        small = torch.nn.functional.interpolate(image, size, mode="bilinear", antialias=True)[0] / 255
        scores = torch.nn.functional.interpolate(by_colour(small)[None], image.shape[-2:], mode="bilinear")[0]
        for row in range(image.shape[2]):
            for column in range(image.shape[3]):
                true = int(pixels[row, column, 3])
                if true != IGNORED:
                    expected[true, int(scores[:, row, column].argmax())] += 1
    assert torch.equal(found.confusion, expected)
    assert 0.5 < scores_of(found.confusion, "abc")["miou"] < 1


def test_a_picture_and_the_measurement_agree(tmp_path: Path) -> None:
    (source,) = open_segmentation(write_scenes(tmp_path), ("test",))
    confusion = torch.zeros(3, 3, dtype=torch.int64)
    for index in range(len(source)):
        pixels, truth, predicted = predict_image(by_colour, source, index, short_side=12)
        assert pixels.shape == (*truth.shape, 3)
        confusion += confusion_matrix(predicted, truth, 3)
    assert torch.equal(confusion, measure(by_colour, source, short_side=12).confusion)


def test_of_equal_scores_the_lower_class_wins() -> None:
    assert predict(lambda image: torch.zeros(4, 3, 3), torch.zeros(3, 3, 3), (6, 6)).unique().tolist() == [0]


def test_scores_that_are_not_finite_are_an_error(tmp_path: Path) -> None:
    (source,) = open_segmentation(write_scenes(tmp_path), ("test",))
    with pytest.raises(NumericsError, match=r"000\.png are not finite"):
        measure(lambda image: torch.full((3, 4, 4), torch.nan), source, short_side=24)


def test_an_unreadable_image_is_left_out_and_named(tmp_path: Path) -> None:
    write_scenes(tmp_path, counts={"test": 3})
    (tmp_path / "images" / "test" / "001.png").write_bytes(b"nothing")
    (source,) = open_segmentation(tmp_path, ("test",))
    found = measure(by_colour, source, short_side=24)
    assert found.num_images == 2
    assert [Path(name).name for name in found.skipped] == ["001.png"]
    for index in (0, 2):
        (tmp_path / "images" / "test" / f"00{index}.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match="2 of 3 images are unreadable"):
        measure(by_colour, source, short_side=24)


@pytest.mark.parametrize("count", [2, 5])
def test_shares_of_a_split_together_are_the_split(tmp_path: Path, count: int) -> None:
    (source,) = open_segmentation(write_scenes(tmp_path), ("test",))
    parts = [source.part(number, count) for number in range(count)]
    assert sum(len(part) for part in parts) == len(source) == 3
    whole = measure(by_colour, source, short_side=12)
    found = combined([measure(by_colour, part, short_side=12) for part in parts])
    assert torch.equal(found.confusion, whole.confusion)
    assert (found.num_images, found.skipped) == (3, [])
    assert parts[1].classes == source.classes
    assert parts[1].describe(0) == source.describe(1)
