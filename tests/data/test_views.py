from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as VF

from fdkit.data.views import CenterCrop, CropConfig, RandomCrop, TwoViews, TwoViewsConfig, draw_box


def photo(width: int, height: int) -> Image.Image:
    random = np.random.default_rng(width)
    coarse = random.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("size", [(500, 375), (90, 300), (40, 31)])
def test_boxes_have_torchvisions_distribution(size: tuple[int, int]) -> None:
    width, height = size
    count = 6000
    random = rng()
    found = np.array([draw_box(width, height, random, min_scale=0.08) for _ in range(count)], dtype=float)
    found = np.stack([found[:, 0], found[:, 1], found[:, 2] - found[:, 0], found[:, 3] - found[:, 1]], axis=1)
    image = torch.empty(3, height, width)
    tops = [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(count)]
    expected = np.array(tops, dtype=float)[:, [1, 0, 3, 2]]
    for values, others in zip(
        [*found.T, found[:, 2] * found[:, 3], found[:, 2] / found[:, 3]],
        [*expected.T, expected[:, 2] * expected[:, 3], expected[:, 2] / expected[:, 3]],
        strict=True,
    ):
        grid = np.unique(np.concatenate([values, others]))
        ranks = [np.searchsorted(np.sort(sample), grid, side="right") / count for sample in (values, others)]
        assert np.abs(ranks[0] - ranks[1]).max() < 1.95 * np.sqrt(2 / count)  # Kolmogorov-Smirnov, 0.1 %


@pytest.mark.parametrize("size", [(1, 1), (1, 1000), (1000, 3), (2, 3)])
def test_boxes_of_odd_images_lie_inside(size: tuple[int, int]) -> None:
    random = rng()
    for _ in range(100):
        left, top, right, bottom = draw_box(*size, random, min_scale=0.08)
        assert 0 <= left < right <= size[0]
        assert 0 <= top < bottom <= size[1]


def test_central_fallback_equals_torchvision() -> None:
    for width, height in [(1000, 10), (10, 1000)]:
        top, left, h, w = RandomResizedCrop.get_params(
            torch.empty(3, height, width), [1.0, 1.0], [3 / 4, 4 / 3]
        )
        assert draw_box(width, height, rng(), min_scale=1.0) == (left, top, left + w, top + h)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(500, 375), (60, 45)])
def test_random_crop_is_pillows_crop_to_a_level(interpolation: str, size: tuple[int, int]) -> None:
    image = photo(*size)
    views = RandomCrop(CropConfig(image_size=96, flip=False, interpolation=interpolation))
    for seed in range(8):
        found = views(image, rng(seed)).crops[0]
        left, top, right, bottom = draw_box(*size, rng(seed), min_scale=0.08)
        resampling = Image.Resampling[interpolation.upper()]
        expected = np.asarray(
            VF.resized_crop(image, top, left, bottom - top, right - left, [96, 96], resampling)
        )
        difference = np.abs(found.permute(1, 2, 0).numpy().astype(int) - expected)
        assert difference.mean() < 0.2
        assert difference.max() <= 2


def test_random_crop_flips_half() -> None:
    image = photo(20, 20)
    config = CropConfig(image_size=8, min_scale=0.5)
    plain = RandomCrop(CropConfig(image_size=8, min_scale=0.5, flip=False))
    flipped = 0
    for seed in range(400):
        crop, other = RandomCrop(config)(image, rng(seed)).crops[0], plain(image, rng(seed)).crops[0]
        assert torch.equal(crop, other) or torch.equal(crop, other.flip(-1))
        flipped += not torch.equal(crop, other)
    assert 160 < flipped < 240


def test_random_crop_sample_and_finish() -> None:
    views = RandomCrop(CropConfig(image_size=16))
    sample = views(photo(30, 20), rng())
    assert sample.colour == []
    assert sample.crops[0].dtype == torch.uint8
    batch = torch.stack(sample.crops * 2).contiguous(memory_format=torch.channels_last)
    finished = views.finish([batch], [])[0]
    assert finished.shape == (2, 3, 16, 16)
    assert finished.is_contiguous()
    assert torch.equal(finished, batch.float() / 255)


def test_views_need_rgb() -> None:
    with pytest.raises(ValueError, match="RGB images, not mode L"):
        RandomCrop(CropConfig(image_size=4))(Image.new("L", (9, 9)), rng())


def test_config_refuses_impossible_values() -> None:
    with pytest.raises(ValidationError, match="min_scale"):
        CropConfig(min_scale=0)
    with pytest.raises(ValidationError, match="blur_probability"):
        TwoViewsConfig(blur_probability=(1.0, 1.1))


def test_two_views_defaults_are_byols() -> None:
    config = TwoViewsConfig()
    assert (config.image_size, config.min_scale, config.flip, config.interpolation) == (
        224,
        0.08,
        True,
        "bilinear",
    )
    assert (config.brightness, config.contrast, config.saturation, config.hue) == (0.4, 0.4, 0.2, 0.1)
    assert (config.jitter_probability, config.grayscale_probability) == (0.8, 0.2)
    assert (config.blur_probability, config.blur_sigma) == ((1.0, 0.1), (0.1, 2.0))
    assert config.solarize_probability == (0.0, 0.2)


def test_two_views_are_asymmetric() -> None:
    views = TwoViews(TwoViewsConfig(image_size=16))
    samples = [views(photo(30, 20), rng(seed)) for seed in range(300)]
    first, second = (torch.stack([sample.colour[view] for sample in samples]) for view in range(2))
    assert (first[:, 9] > 0).all()
    assert 0.04 < (second[:, 9] > 0).float().mean() < 0.17
    assert first[:, 9].max() <= 2 * 16 / 224
    assert (first[:, 10] == 0).all()
    assert 0.12 < second[:, 10].mean() < 0.28
    assert not torch.equal(samples[0].crops[0], samples[0].crops[1])
    crops = [torch.stack([sample.crops[view] for sample in samples[:5]]) for view in range(2)]
    finished = views.finish(crops, [first[:5], second[:5]])
    assert [view.shape for view in finished] == [(5, 3, 16, 16)] * 2
    assert all(
        view.dtype == torch.float32 and view.min() >= -1e-6 and view.max() <= 1 + 1e-6 for view in finished
    )
    assert not torch.equal(finished[0], crops[0] / 255)


def test_two_views_ignore_autocast() -> None:
    views = TwoViews(TwoViewsConfig(image_size=32))
    sample = views(photo(60, 50), rng())
    crops, colour = [crop[None] for crop in sample.crops], [row[None] for row in sample.colour]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = views.finish(crops, colour)
    for view, plain in zip(mixed, views.finish(crops, colour), strict=True):
        assert torch.equal(view, plain)


def test_two_views_without_colour_are_two_crops() -> None:
    config = TwoViewsConfig(
        image_size=16,
        jitter_probability=0,
        grayscale_probability=0,
        blur_probability=(0, 0),
        solarize_probability=(0, 0),
    )
    views = TwoViews(config)
    sample = views(photo(30, 20), rng())
    finished = views.finish([crop[None] for crop in sample.crops], [row[None] for row in sample.colour])
    for view, crop in zip(finished, sample.crops, strict=True):
        assert torch.equal(view[0], crop / 255)


@pytest.mark.parametrize(
    "size", [(500, 375), (375, 500), (100, 317), (256, 256), (224, 224), (320, 256), (257, 300)]
)
@pytest.mark.parametrize(("image_size", "crop_ratio"), [(224, 0.875), (224, 0.9), (32, 1.0), (96, 0.95)])
def test_center_crop_is_timms_to_the_pixel(size: tuple[int, int], image_size: int, crop_ratio: float) -> None:
    from timm.data import create_transform

    for interpolation in ("bicubic", "bilinear"):
        transform = create_transform(
            (3, image_size, image_size),
            interpolation=interpolation,
            crop_pct=crop_ratio,
            mean=(0, 0, 0),
            std=(1, 1, 1),
        )
        views = CenterCrop(image_size, crop_ratio=crop_ratio, interpolation=interpolation)
        crops = [crop[None] for crop in views(photo(*size), rng()).crops]
        assert torch.equal(views.finish(crops, [])[0][0], transform(photo(*size)))


def test_center_crop_of_a_digit_is_the_digit() -> None:
    image = photo(32, 32)
    crop = CenterCrop(32, crop_ratio=1.0)(image, rng()).crops[0]
    np.testing.assert_array_equal(crop.permute(1, 2, 0).numpy(), np.asarray(image))


def test_center_crop_refuses_a_ratio_above_one() -> None:
    with pytest.raises(ValueError, match=r"crop_ratio 1\.5 is not in"):
        CenterCrop(32, crop_ratio=1.5)


def test_real_photos_crop_like_timm(shared: Path) -> None:
    from timm.data import create_transform

    transform = create_transform(
        (3, 224, 224), interpolation="bicubic", crop_pct=0.9, mean=(0, 0, 0), std=(1, 1, 1)
    )
    views = CenterCrop(224, crop_ratio=0.9)
    for path in sorted((shared / "data" / "imagenet_sample_1k" / "val").glob("*/*.jpg"))[::100]:
        image = Image.open(path).convert("RGB")
        assert torch.equal(views.finish([views(image, rng()).crops[0][None]], [])[0][0], transform(image))


def test_views_of_an_array_are_those_of_the_image() -> None:
    image = photo(50, 41)
    pixels = torch.from_numpy(np.array(image))
    for views in (
        RandomCrop(CropConfig(image_size=16)),
        TwoViews(TwoViewsConfig(image_size=16)),
        CenterCrop(16),
    ):
        for seed in range(5):
            for found, expected in zip(
                views(pixels, rng(seed)).crops, views(image, rng(seed)).crops, strict=True
            ):
                assert torch.equal(found, expected)
