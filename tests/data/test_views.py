import pickle
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from pydantic import ValidationError
from scipy.stats import ks_2samp
from torchvision import transforms
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as VF

from fdkit.config import with_defaults
from fdkit.data.views import CenterCrop, CropConfig, RandomCrop, TwoViews, TwoViewsConfig, draw_box
from fdkit.errors import ConfigError

UNLIKELY = 1e-3


def photo(width: int, height: int) -> Image.Image:
    random = np.random.default_rng(width)
    coarse = random.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def sides(boxes: list[tuple[int, int, int, int]]) -> np.ndarray:
    """(6, N): left, top, width, height, area and aspect ratio of boxes (left, top, right, bottom)."""
    left, top, right, bottom = np.array(boxes, dtype=float).T
    width, height = right - left, bottom - top
    return np.stack([left, top, width, height, width * height, width / height])


def torchvisions_boxes(width: int, height: int, scale: tuple[float, float], count: int) -> np.ndarray:
    image = torch.empty(3, height, width)
    drawn = [RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(count)]
    return sides([(left, top, left + w, top + h) for top, left, h, w in drawn])


@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.05, 0.4), (0.3, 0.3)])
@pytest.mark.parametrize("size", [(500, 375), (90, 300), (40, 31)])
def test_boxes_have_torchvisions_distribution(size: tuple[int, int], scale: tuple[float, float]) -> None:
    generator, count = rng(), 4000
    low, high = scale
    found = sides([draw_box(*size, generator, min_scale=low, max_scale=high) for _ in range(count)])
    for values, others in zip(found, torchvisions_boxes(*size, scale, count), strict=True):
        assert ks_2samp(values, others).pvalue > UNLIKELY


def test_boxes_of_another_distribution_would_show() -> None:
    """A uniform side rather than area, a uniform ratio rather than its logarithm, a box kept to one corner."""
    expected = torchvisions_boxes(500, 375, (0.08, 1.0), 4000)
    generator = rng()
    found = sides([draw_box(500, 375, generator, min_scale=0.08) for _ in range(4000)])
    area = found[4] / (500 * 375)
    assert ks_2samp(expected[4] / (500 * 375), area**2).pvalue < UNLIKELY
    wide = sides([draw_box(500, 375, generator, min_scale=0.08, ratio=(0.7, 1.4)) for _ in range(4000)])
    assert ks_2samp(expected[5], wide[5]).pvalue < UNLIKELY
    assert ks_2samp(expected[0], 0.8 * found[0]).pvalue < UNLIKELY


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


def test_boxes_of_a_seed_stay() -> None:
    """Runs are repeated, and taken up again, by their seed."""
    generator = rng()
    boxes = [draw_box(500, 375, generator, min_scale=0.08) for _ in range(3)]
    assert boxes == [(302, 35, 431, 206), (113, 2, 493, 373), (7, 45, 260, 309)]


def test_crops_cover_shares_between_the_scales() -> None:
    """Each pixel of the image holds its place, so a crop shows which part it is."""
    x, y = np.meshgrid(np.arange(200), np.arange(150))
    image = Image.fromarray(np.stack([x, y, y], axis=2).astype(np.uint8))
    for low, high in ((0.25, 0.25), (0.05, 0.14)):
        views = RandomCrop(CropConfig(image_size=64, min_scale=low, max_scale=high))
        shares = []
        for seed in range(60):
            crop = views(image, rng(seed)).crops[0].float()
            extent = crop.amax(dim=(1, 2)) - crop.amin(dim=(1, 2))  # of a crop's outermost pixel centres
            shares.append(float(extent[0] * extent[1]) / (200 * 150))
        assert 0.85 * low < min(shares)
        assert max(shares) < 1.1 * high


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


def test_scales_in_the_wrong_order_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"views\.max_scale 0\.3 is smaller than views\.min_scale 0\.5"
    ) as error:
        CropConfig(min_scale=0.5, max_scale=0.3)
    assert "--views.max-scale 0.5" in error.value.hint
    assert CropConfig(min_scale=0.5, max_scale=0.5).max_scale == 0.5


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
    assert (config.max_scale, config.grayscale_first) == (1, False)


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


def pillow_blur(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


def pillow_view(
    crop: tuple[float, str], jitter: tuple[float, ...], jitter_p: float, blur_p: float, solarize_p: float
) -> Callable[[Image.Image], torch.Tensor]:
    """A published view of 32 pixels by torchvision; a jitter_p of 1 as MoCo v1 has it: after the grey."""
    colour: list[Callable] = [
        transforms.RandomApply([transforms.ColorJitter(*jitter)], p=jitter_p),
        transforms.RandomGrayscale(p=0.2),
    ]
    return transforms.Compose(
        [
            RandomResizedCrop(
                32, scale=(crop[0], 1), interpolation=transforms.InterpolationMode[crop[1].upper()]
            ),
            *(colour if jitter_p < 1 else reversed(colour)),
            transforms.RandomApply([pillow_blur], p=blur_p),
            transforms.RandomApply([ImageOps.solarize], p=solarize_p),
            transforms.RandomHorizontalFlip(),
            transforms.PILToTensor(),
        ]
    )


def looks(views: torch.Tensor) -> np.ndarray:
    """(7, N) of (N, 3, H, W) in [0, 1]: mean of each channel, contrast, sharpness, colourfulness, left to right."""
    grey = views.mean(dim=1)
    numbers = [
        *views.mean(dim=(2, 3)).T,
        grey.std(dim=(1, 2)),
        grey.diff(dim=2).abs().mean(dim=(1, 2)),
        (views.amax(dim=1) - views.amin(dim=1)).mean(dim=(1, 2)),
        grey[..., :16].mean(dim=(1, 2)) - grey[..., 16:].mean(dim=(1, 2)),
    ]
    return torch.stack(numbers).mul(500).round().numpy()  # 8-bit pixels and ours are equal to rounding


IN_32_PIXELS = {"image_size": 32, "blur_sigma": (0.7, 14.0)}  # of 0.1 to 2 pixels
PUBLISHED = {
    "MoCo v3": ((0.08, "bilinear"), (0.4, 0.4, 0.2, 0.1), 0.8, (1.0, 0.1), (0.0, 0.2)),
    "MoCo v1": ((0.2, "bilinear"), (0.4, 0.4, 0.4, 0.4), 1.0, (0.0, 0.0), (0.0, 0.0)),
    "MoCo v2": ((0.2, "bilinear"), (0.4, 0.4, 0.4, 0.1), 0.8, (0.5, 0.5), (0.0, 0.0)),
    "SwAV, 2 x 224": ((0.14, "bilinear"), (0.8, 0.8, 0.8, 0.2), 0.8, (0.5, 0.5), (0.0, 0.0)),
    "DINO, global": ((0.4, "bicubic"), (0.4, 0.4, 0.2, 0.1), 0.8, (1.0, 0.1), (0.0, 0.2)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_views_look_like_the_published_pipelines(name: str) -> None:
    """Sources: the main files of facebookresearch's moco, moco-v3, swav and dino, whose views are Pillow's."""
    random.seed(0)
    (low, interpolation), jitter, jitter_p, blur, solarize = PUBLISHED[name]
    views = TwoViews(
        TwoViewsConfig(
            **IN_32_PIXELS,
            **dict(zip(("brightness", "contrast", "saturation", "hue"), jitter, strict=True)),
            min_scale=low,
            interpolation=interpolation,
            jitter_probability=jitter_p,
            grayscale_first=jitter_p == 1,
            blur_probability=blur,
            solarize_probability=solarize,
        )
    )
    image, count = photo(80, 60), 500
    samples = [views(image, rng(seed)) for seed in range(count)]
    crops, colour = (
        [torch.stack(view) for view in zip(*part, strict=True)] for part in zip(*samples, strict=True)
    )
    found = [looks(view) for view in views.finish(crops, colour)]
    for view in range(2):
        pillow = pillow_view((low, interpolation), jitter, jitter_p, blur[view], solarize[view])
        expected = looks(torch.stack([pillow(image) for _ in range(count)]) / 255)
        for values, others in zip(found[view], expected, strict=True):
            assert ks_2samp(values, others).pvalue > UNLIKELY
        if blur[0] != blur[1]:  # the views in the other order would show, by their sharpness
            assert ks_2samp(found[1 - view][4], expected[4]).pvalue < UNLIKELY


def test_views_of_a_command_can_be_sent_to_workers() -> None:
    """A method's own defaults make a class of configuration that no module holds."""
    config = with_defaults(TwoViewsConfig, {"min_scale": 0.3})(image_size=16)
    for views in (RandomCrop(config), TwoViews(config), CenterCrop(16)):
        copy = pickle.loads(pickle.dumps(views))
        sent, kept = (each(photo(30, 20), rng()) for each in (copy, views))
        for found, expected in zip([*sent.crops, *sent.colour], [*kept.crops, *kept.colour], strict=True):
            assert torch.equal(found, expected)
    assert TwoViews(config).config == TwoViewsConfig(image_size=16, min_scale=0.3)


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
