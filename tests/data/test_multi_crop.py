import pickle
import random
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from scipy.stats import ks_2samp
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import RandomResizedCrop

from fdkit.config import with_defaults
from fdkit.data import colour as colour_ops
from fdkit.data.views import MultiCrop, MultiCropConfig, Sample, TwoViews, TwoViewsConfig
from fdkit.errors import ConfigError

UNLIKELY = 1e-3
SMALL = MultiCropConfig(image_size=32, local_size=12, num_local=3)


def photo(width: int, height: int) -> Image.Image:
    random = np.random.default_rng(width)
    coarse = random.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def batch(samples: Iterable[Sample]) -> tuple[list[Tensor], list[Tensor]]:
    """The crops and the colour parameters of all samples, a tensor a view each."""
    crops, colour = zip(*samples, strict=True)
    return [torch.stack(view) for view in zip(*crops, strict=True)], [
        torch.stack(view) for view in zip(*colour, strict=True)
    ]


def test_defaults_are_dinos_but_for_crop_scale_and_interpolation() -> None:
    config = MultiCropConfig()
    views = MultiCrop(config)
    assert (config.num_local, config.local_size, config.local_scale) == (8, 96, (0.05, 0.4))
    assert config.local_blur_probability == 0.5
    assert (views.num_views, views.image_size, views.local_size) == (10, 224, 96)
    assert views.sizes == [224, 224] + [96] * 8


def test_views_have_their_sizes_in_order() -> None:
    views = MultiCrop(SMALL)
    crops, colour = batch(views(photo(60, 50), rng(seed)) for seed in range(5))
    assert all(crop.dtype == torch.uint8 for crop in crops)
    finished = views.finish(crops, colour)
    assert [tuple(view.shape) for view in finished] == [(5, 3, 32, 32)] * 2 + [(5, 3, 12, 12)] * 3
    assert all(view.dtype == torch.float32 and view.is_contiguous() for view in finished)
    assert all(view.min() >= -1e-6 and view.max() <= 1 + 1e-6 for view in finished)
    for first in range(2, 5):
        for second in range(first + 1, 5):
            assert not torch.equal(crops[first], crops[second])
            assert not torch.equal(colour[first], colour[second])


@pytest.mark.parametrize("num_local", [0, 1, 4])
def test_global_views_are_those_of_two_views(num_local: int) -> None:
    """So a run with no local views is a run with two views, and their number changes no global crop."""
    config = SMALL.model_copy(update={"num_local": num_local})
    shared = {name: getattr(config, name) for name in TwoViewsConfig.model_fields}
    two, several = TwoViews(TwoViewsConfig(**shared)), MultiCrop(config)
    assert several.num_views == 2 + num_local
    ours, theirs = (batch(views(photo(60, 50), rng(seed)) for seed in range(6)) for views in (several, two))
    finished = several.finish(*ours)
    assert len(finished) == 2 + num_local
    for found, expected in zip(finished[:2], two.finish(*theirs), strict=True):
        assert torch.equal(found, expected)


def test_local_views_are_finished_as_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    views = MultiCrop(SMALL)
    crops, colour = batch(views(photo(60, 50), rng(seed)) for seed in range(4))
    local = TwoViewsConfig(
        image_size=12, blur_sigma=tuple(sigma * 32 / 12 for sigma in SMALL.blur_sigma)
    )  # each view on its own
    expected = TwoViews(
        local.model_copy(update={"blur_probability": (0.5, 0.5), "solarize_probability": (0, 0)})
    )
    sizes = []
    apply = colour_ops.apply

    def counted(images: Tensor, *arguments: object) -> Tensor:
        sizes.append(tuple(images.shape))
        return apply(images, *arguments)

    monkeypatch.setattr(colour_ops, "apply", counted)
    finished = views.finish(crops, colour)
    assert sizes == [(4, 3, 32, 32)] * 2 + [(12, 3, 12, 12)]
    for view in range(2, 5):
        alone = expected.finish([crops[view]] * 2, [colour[view]] * 2)[0]
        torch.testing.assert_close(finished[view], alone, atol=1e-6, rtol=0)


def test_local_colours_are_drawn_as_stated() -> None:
    views = MultiCrop(MultiCropConfig(image_size=224, local_size=8, num_local=4, local_blur_probability=0.5))
    _, colour = batch(views(photo(20, 16), rng(seed)) for seed in range(150))
    first, second, local = colour[0], colour[1], torch.cat(colour[2:])
    assert (first[:, 9] > 0).all()
    assert 0.03 < (second[:, 9] > 0).float().mean() < 0.2
    assert (second[:, 10] > 0).any()
    assert 0.42 < (local[:, 9] > 0).float().mean() < 0.58
    assert (local[:, 10] == 0).all()
    sigma = local[:, 9][
        local[:, 9] > 0
    ]  # in pixels of the local view, which is not blurred less for being small
    assert ks_2samp(sigma.numpy(), rng().uniform(0.1, 2.0, 3000)).pvalue > UNLIKELY


def test_blur_shrinks_with_the_global_views() -> None:
    views = MultiCrop(SMALL)
    colour = [row for seed in range(60) for row in views(photo(20, 16), rng(seed)).colour]
    assert 1.8 * 32 / 224 < max(float(row[9]) for row in colour) <= 2.0 * 32 / 224


def extents(crops: Tensor) -> np.ndarray:
    """(3, N): width, height and area of the part of the image, by pixels that hold their place in it."""
    pixels = crops.float()
    width, height = ((pixels.amax(dim=(2, 3)) - pixels.amin(dim=(2, 3)))[:, :2]).T.numpy()
    return np.stack([width, height, width * height])


def test_boxes_of_both_kinds_have_torchvisions_distribution() -> None:
    x, y = np.meshgrid(np.arange(200), np.arange(150))
    image = Image.fromarray(np.stack([x, y, y], axis=2).astype(np.uint8))
    config = MultiCropConfig(
        image_size=64,
        local_size=32,
        num_local=2,
        min_scale=0.4,
        local_scale=(0.05, 0.4),
        interpolation="bicubic",
    )
    crops, _ = batch(MultiCrop(config)(image, rng(seed)) for seed in range(400))
    found = {(0.4, 1.0): crops[:2], (0.05, 0.4): crops[2:]}
    for (scale, views), size in zip(found.items(), (64, 32), strict=True):
        crop = RandomResizedCrop(size, scale=scale, interpolation=transforms.InterpolationMode.BICUBIC)
        peers = torch.stack([transforms.functional.pil_to_tensor(crop(image)) for _ in range(800)])
        for values, others in zip(extents(torch.cat(views)), extents(peers), strict=True):
            assert ks_2samp(values, others).pvalue > UNLIKELY
    assert ks_2samp(extents(crops[0])[2], extents(crops[2])[2]).pvalue < UNLIKELY


def looks(views: Tensor) -> np.ndarray:
    """(6, N) of (N, 3, H, W) in [0, 1]: mean of each channel, contrast, sharpness and colourfulness."""
    grey = views.mean(dim=1)
    numbers = [
        *views.mean(dim=(2, 3)).T,
        grey.std(dim=(1, 2)),
        grey.diff(dim=2).abs().mean(dim=(1, 2)),
        (views.amax(dim=1) - views.amin(dim=1)).mean(dim=(1, 2)),
    ]
    return torch.stack(numbers).mul(500).round().numpy()  # 8-bit pixels and ours are equal to rounding


def test_local_views_look_like_dinos() -> None:
    """Source: facebookresearch/dino@7c446df main_dino.py, the transform of the local crops, at 24 pixels."""
    random.seed(0)
    pillow = transforms.Compose(
        [
            RandomResizedCrop(24, scale=(0.05, 0.4), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            transforms.RandomApply(
                [lambda image: image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))], p=0.5
            ),
            transforms.PILToTensor(),
        ]
    )
    config = MultiCropConfig(
        image_size=28,
        blur_sigma=(0.8, 16.0),
        local_size=24,
        num_local=2,
        min_scale=0.4,
        interpolation="bicubic",
    )  # a sigma of 0.1 to 2 pixels
    views, image = MultiCrop(config), photo(80, 60)
    finished = views.finish(*batch(views(image, rng(seed)) for seed in range(300)))
    found = looks(torch.cat(finished[2:]))
    expected = looks(torch.stack([pillow(image) for _ in range(600)]) / 255)
    for values, others in zip(found, expected, strict=True):
        assert ks_2samp(values, others).pvalue > UNLIKELY
    sharp = MultiCrop(config.model_copy(update={"local_blur_probability": 0.0}))
    finished = sharp.finish(*batch(sharp(image, rng(seed)) for seed in range(300)))
    assert ks_2samp(looks(torch.cat(finished[2:]))[4], expected[4]).pvalue < UNLIKELY


def test_autocast_changes_nothing() -> None:
    views = MultiCrop(SMALL)
    crops, colour = batch([views(photo(60, 50), rng())])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = views.finish(crops, colour)
    for view, plain in zip(mixed, views.finish(crops, colour), strict=True):
        assert torch.equal(view, plain)


def test_views_of_a_command_can_be_sent_to_workers() -> None:
    views = MultiCrop(with_defaults(MultiCropConfig, {"num_local": 2})(image_size=32, local_size=12))
    copy = pickle.loads(pickle.dumps(views))
    assert copy.sizes == [32, 32, 12, 12]
    for found, expected in zip(copy(photo(30, 20), rng()), views(photo(30, 20), rng()), strict=True):
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_impossible_crops_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"views\.local_size 300 is larger than views\.image_size 224"
    ) as error:
        MultiCropConfig(local_size=300)
    assert "--views.local-size 96" in error.value.hint
    with pytest.raises(ConfigError, match=r"views\.local_scale \(0\.4, 0\.05\) ends below its beginning"):
        MultiCropConfig(local_scale=(0.4, 0.05))
    assert MultiCropConfig(image_size=32, num_local=0).num_local == 0  # the size of no view is nobody's fault
    assert MultiCropConfig(image_size=96).local_size == 96
