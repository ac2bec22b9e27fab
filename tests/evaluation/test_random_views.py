import math

import numpy as np
import pytest
import torch
from PIL import Image

from fdkit.data.views import CropConfig, RandomCrop, draw_box
from fdkit.evaluation._random_views import ClippedCrop, clipped_box, random_views


def boxes(draw, count: int = 4000, **scales: float) -> np.ndarray:
    random = np.random.default_rng(3)
    return np.array([draw(50, 37, random, **scales) for _ in range(count)])


def test_clipped_boxes_are_one_draw_cut_to_the_image():
    random, again = np.random.default_rng(5), np.random.default_rng(5)
    for _ in range(200):
        left, top, right, bottom = clipped_box(50, 37, random, min_scale=0.08, max_scale=1.0)
        area, aspect = (
            50 * 37 * again.uniform(0.08, 1.0),
            math.exp(again.uniform(math.log(3 / 4), math.log(4 / 3))),
        )
        width, height = min(50, round(math.sqrt(area * aspect))), min(37, round(math.sqrt(area / aspect)))
        y, x = again.integers(0, 37 - height + 1), again.integers(0, 50 - width + 1)
        assert (left, top, right, bottom) == (x, y, x + width, y + height)


def test_clipping_keeps_large_boxes_that_redrawing_leaves_out():
    scales = {"min_scale": 0.08, "max_scale": 1.0}
    shares, spans = [], []
    for draw in (clipped_box, draw_box):
        found = boxes(draw, **scales)
        assert (found[:, :2] >= 0).all()
        assert (found[:, 2] <= 50).all()
        assert (found[:, 3] <= 37).all()
        sides = found[:, 2:] - found[:, :2]
        shares.append((sides.prod(axis=1) / (50 * 37)).mean())
        spans.append((sides == (50, 37)).any(axis=1).mean())
    assert shares[0] > shares[1] + 0.05
    assert spans[0] > spans[1] + 0.15


def test_both_draws_agree_where_every_box_fits():
    small = {"min_scale": 0.1, "max_scale": 0.3}
    sides = [
        (found[:, 2:] - found[:, :2]).mean(axis=0)
        for found in (boxes(f, **small) for f in (clipped_box, draw_box))
    ]
    np.testing.assert_allclose(sides[0], sides[1], rtol=0.02)


@pytest.mark.parametrize("kind", ["pillow", "tensor"])
def test_a_view_is_the_resized_box_of_the_image(kind):
    pixels = np.random.default_rng(0).integers(256, size=(21, 30, 3), dtype=np.uint8)
    image = Image.fromarray(pixels) if kind == "pillow" else torch.from_numpy(pixels)
    config = CropConfig(image_size=9, min_scale=0.2, interpolation="bicubic")
    views, flips = ClippedCrop(config), 0
    for seed in range(20):
        (crop,), colour = views(image, np.random.default_rng(seed))
        random = np.random.default_rng(seed)
        box = clipped_box(30, 21, random, min_scale=0.2, max_scale=1.0)
        expected = Image.fromarray(pixels).crop(box).resize((9, 9), Image.Resampling.BICUBIC)
        if random.random() < 0.5:
            expected, flips = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT), flips + 1
        assert (crop.dtype, tuple(crop.shape), colour) == (torch.uint8, (3, 9, 9), [])
        gap = crop.permute(1, 2, 0).int() - torch.from_numpy(np.array(expected)).int()
        assert gap.abs().max() <= 2  # torch's resizing of bytes rounds once more than Pillow's
    assert 0 < flips < 20


def test_the_configuration_chooses_the_draw():
    assert type(random_views("redrawn", CropConfig())) is RandomCrop
    assert type(random_views("clipped", CropConfig())) is ClippedCrop
