import pickle
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fdkit.data.loader import LoaderConfig, evaluation_batches, training_batches
from fdkit.data.segmentation import IGNORED, open_segmentation
from fdkit.data.segmentation_views import (
    SegmentationCrop,
    SegmentationCropConfig,
    WholeImage,
    cut_windows,
    sliding_scores,
    window_corners,
    window_starts,
)
from fdkit.errors import ConfigError
from tests.segmentation_folders import write_scenes

ONE_SCALE = {"min_scale": 1.0, "max_scale": 1.0, "max_class_ratio": 1.0, "flip": False}


def numbered(height: int, width: int) -> Tensor:
    """Pixels whose mask says what their red says, so that a shift of one against the other is seen; blue is the row."""
    value = torch.arange(height * width).view(height, width) % 200
    rows = torch.arange(height)[:, None].expand(height, width)
    return torch.stack([value, value, rows, value], dim=2).to(torch.uint8)


def crop(pixels: Tensor, size: int, seed: int = 0, **fields: object) -> tuple[Tensor, Tensor]:
    views = SegmentationCrop(SegmentationCropConfig(**fields), size)  # type: ignore[arg-type]
    (image, mask), colour = views(pixels, np.random.default_rng(seed))
    assert colour == []
    assert (image.shape, mask.shape) == ((3, size, size), (1, size, size))
    assert image.dtype == mask.dtype == torch.uint8
    return image, mask


def test_without_a_change_of_scale_image_and_mask_are_the_same_square_of_the_source() -> None:
    pixels = numbered(9, 13)
    places = set()
    for seed in range(40):
        image, mask = crop(pixels, 5, seed, short_side=9, **ONE_SCALE)
        assert torch.equal(image[0], mask[0])
        found = [
            (top, left)
            for top in range(5)
            for left in range(9)
            if torch.equal(pixels[top : top + 5, left : left + 5, 0], image[0])
        ]
        assert found, "no square of the source"
        places |= set(found)
    assert {top for top, _ in places} == set(range(5))
    assert {left for _, left in places} == set(range(9)), "every place comes up"


def test_half_of_the_squares_are_mirrored_and_the_mask_with_them() -> None:
    pixels = numbered(6, 6)
    flipped = 0
    for seed in range(40):
        image, mask = crop(pixels, 6, seed, **{**ONE_SCALE, "flip": True})
        assert torch.equal(image[0], mask[0])
        flipped += torch.equal(image[0], pixels[..., 0].flip(1))
    assert 10 < flipped < 30


def test_the_scale_is_of_the_shorter_side() -> None:
    pixels = torch.zeros(20, 30, 4, dtype=torch.uint8)
    pixels[:, :, 2] = torch.arange(20, dtype=torch.uint8)[:, None] * 10
    for scale, step in ((0.5, 20), (2.0, 5)):  # at half the size, a row is two rows of the source further
        image, _ = crop(
            pixels, 10, min_scale=scale, max_scale=scale, short_side=20, max_class_ratio=1, flip=False
        )
        inner = image[2, 2:8, 5].float().diff()
        torch.testing.assert_close(inner.mean(), torch.tensor(float(step)), rtol=0.1, atol=0.5)


def test_what_lies_beyond_a_small_image_is_black_and_ignored() -> None:
    pixels = torch.full((8, 12, 4), 7, dtype=torch.uint8)
    image, mask = crop(pixels, 16, short_side=8, **ONE_SCALE)
    assert (image[:, :8, :12] == 7).all()
    assert (mask[:, :8, :12] == 7).all()
    assert (image[:, 8:] == 0).all()
    assert (image[:, :, 12:] == 0).all()
    assert (mask[:, 8:] == IGNORED).all()
    assert (mask[:, :, 12:] == IGNORED).all()


def test_masks_are_never_mixed_by_resizing() -> None:
    pixels = torch.zeros(31, 45, 4, dtype=torch.uint8)
    pixels[:, 20:, 3] = 9
    for seed in range(10):
        _, mask = crop(pixels, 16, seed)
        assert set(mask.unique().tolist()) <= {0, 9, IGNORED}
    sample = WholeImage(16)(pixels, np.random.default_rng(0))
    assert sample.crops[1].shape == (1, 31, 45), "the mask of a test keeps its own size"


def test_a_square_filled_by_one_class_is_drawn_again() -> None:
    pixels = torch.zeros(64, 64, 4, dtype=torch.uint8)
    pixels[:8, :8, 3] = 1
    pixels[8:16, :8, 3] = IGNORED
    fields = {**ONE_SCALE, "short_side": 64}

    def shares(ratio: float) -> list[float]:
        masks = [crop(pixels, 16, seed, **{**fields, "max_class_ratio": ratio})[1] for seed in range(200)]
        return [float((mask == 1).sum() / (mask != IGNORED).sum()) for mask in masks]

    both = [sum(0 < share < 1 for share in shares(ratio)) for ratio in (1.0, 0.95)]
    assert both[1] > 2 * both[0] > 0


def test_finish_gives_floats_and_classes_and_workers_take_the_views(tmp_path: Path) -> None:
    (source,) = open_segmentation(write_scenes(tmp_path), ("train",))
    views = pickle.loads(pickle.dumps(SegmentationCrop(SegmentationCropConfig(), 16)))
    found = [
        [views.finish(batch.crops, batch.colour) for batch in training_batches(
            source, views, LoaderConfig(workers=workers), batch_size=4, seed=3, start_step=0, num_steps=3)]
        for workers in (0, 1)
    ]  # fmt: skip
    for (images, masks), again in zip(*found, strict=True):
        assert (images.shape, images.dtype) == ((4, 3, 16, 16), torch.float32)
        assert (masks.shape, masks.dtype) == ((4, 16, 16), torch.int64)
        assert 0 <= images.min() < images.max() <= 1
        assert torch.equal(images, again[0]), "the number of workers changes nothing"
        assert torch.equal(masks, again[1])
    assert not torch.equal(found[0][0][0], found[0][2][0]), "another epoch, other squares"


def test_the_whole_image_keeps_its_shape(tmp_path: Path) -> None:
    (source,) = open_segmentation(write_scenes(tmp_path), ("test",))
    views = WholeImage(12)
    for batch in evaluation_batches(source, views, LoaderConfig(), batch_size=1):
        images, masks = views.finish(batch.crops, batch.colour)
        width = 40 + int(batch.indices[0]) % 2
        assert masks.shape == (1, 24, width)
        assert images.shape == (1, 3, 12, round(width / 2))
        assert np.array_equal(masks[0].numpy(), source.read_pixels(int(batch.indices[0]))[..., 3].numpy())


def test_colours_change_on_the_device_and_masks_do_not(tmp_path: Path) -> None:
    (source,) = open_segmentation(write_scenes(tmp_path), ("train",))
    plain = SegmentationCrop(SegmentationCropConfig(), 16)
    coloured = SegmentationCrop(SegmentationCropConfig(brightness=0.5, hue=0.1), 16)
    found = []
    for views in (plain, coloured):
        batches = training_batches(
            source, views, LoaderConfig(), batch_size=4, seed=3, start_step=0, num_steps=1
        )
        (batch,) = batches
        assert len(batch.colour) == (views is coloured)
        found.append((views.finish(batch.crops, batch.colour), batch.crops[0]))
    (before, crops), (after, same_crops) = found
    assert torch.equal(crops, same_crops), "the same squares, whatever becomes of their colours"
    assert torch.equal(before[1], after[1])
    assert not torch.allclose(before[0], after[0], atol=0.05)
    assert after[0].min() >= 0
    assert after[0].max() <= 1


def test_scales_that_end_before_they_begin_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"views\.max_scale 0\.5 is smaller than views\.min_scale 1\.0"):
        SegmentationCrop(SegmentationCropConfig(min_scale=1.0, max_scale=0.5), 16)


@pytest.mark.parametrize(
    ("length", "size", "stride"), [(320, 240, 80), (321, 240, 80), (7, 7, 3), (5, 7, 7), (50, 7, 7)]
)
def test_windows_cover_an_axis_and_stay_in_it(length: int, size: int, stride: int) -> None:
    starts = window_starts(length, size, stride)
    covered = set().union(*(range(start, start + size) for start in starts))
    assert covered >= set(range(length))
    assert starts == sorted(set(starts))
    assert starts[0] == 0
    assert starts[-1] == max(0, length - size)
    assert all(second - first <= stride for first, second in pairwise(starts))


def test_windows_of_hand() -> None:
    assert window_starts(320, 240, 80) == [0, 80]
    assert window_starts(11, 4, 3) == [0, 3, 6, 7]
    assert window_corners(4, 5, 4, 2) == [(0, 0), (0, 1)]
    image = torch.arange(20.0).view(1, 4, 5)
    assert torch.equal(cut_windows(image, 4, 2), torch.stack([image[:, :, :4], image[:, :, 1:]]))
    padded = cut_windows(image, 6, 6, fill=9)
    assert padded.shape == (1, 1, 6, 6)
    assert (padded[0, 0, 4:] == 9).all()


@pytest.mark.parametrize("stride", [0, 8])
def test_a_stride_that_leaves_gaps_is_refused(stride: int) -> None:
    with pytest.raises(ConfigError, match=f"stride {stride}"):
        window_starts(20, 7, stride)


@pytest.mark.parametrize("shape", [(9, 14), (4, 14), (5, 5)])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_overlapping_scores_are_averaged(shape: tuple[int, int], batch_size: int) -> None:
    """Each window scores its pixels by what it sees, so the average differs from any one window's."""
    image = torch.rand(3, *shape)

    def score(windows: Tensor) -> Tensor:
        assert len(windows) <= batch_size
        return torch.stack(
            [windows[:, 0], windows.mean(dim=(1, 2, 3))[:, None, None].expand_as(windows[:, 0])], dim=1
        )

    found = sliding_scores(image, score, size=5, stride=3, batch_size=batch_size)
    padded = torch.zeros(3, max(5, shape[0]), max(5, shape[1]))
    padded[:, : shape[0], : shape[1]] = image
    total, count = torch.zeros(2, *padded.shape[1:]), torch.zeros(padded.shape[1:])
    for top, left in window_corners(*shape, 5, 3):
        window = padded[:, top : top + 5, left : left + 5]
        total[0, top : top + 5, left : left + 5] += window[0]
        total[1, top : top + 5, left : left + 5] += window.mean()
        count[top : top + 5, left : left + 5] += 1
    expected = (total / count)[:, : shape[0], : shape[1]]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found[0], image[0])
