import pickle
import random as python_random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor

from fdkit.data.loader import LoaderConfig, training_batches
from fdkit.data.sources import ArraySource
from fdkit.data.supervised_views import SupervisedViews, SupervisedViewsConfig, seeded_globals
from fdkit.data.views import CropConfig, RandomCrop
from fdkit.errors import ConfigError

MEAN = (0.5, 0.4, 0.3)


def photo(seed: int = 0, size: tuple[int, int] = (37, 29)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def views(**fields: Any) -> SupervisedViews:
    return SupervisedViews(SupervisedViewsConfig(**fields), image_size=24, mean=MEAN)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_randaugment_is_timms_on_the_crop() -> None:
    made = views(randaugment="rand-m9-mstd0.5-inc1")
    settings = {"translate_const": 10, "img_mean": (128, 102, 76), "interpolation": Image.Resampling.BICUBIC}
    transform = rand_augment_transform("rand-m9-mstd0.5-inc1", settings)
    changed = 0
    for seed in range(30):
        crop_only = RandomCrop(CropConfig(image_size=24, interpolation="bicubic"))
        stream = rng(seed)
        crop = crop_only(photo(seed), stream).crops[0]
        first, second = stream.integers(0, 2**32, 2).tolist()
        python_random.seed(first)
        np.random.seed(second)
        try:
            expected = transform(Image.fromarray(crop.permute(1, 2, 0).numpy()))
        except ValueError:  # Pillow's word on no bits at all, which is tested below
            continue
        found = made(photo(seed), rng(seed)).crops[0]
        assert torch.equal(found.permute(1, 2, 0), torch.from_numpy(np.array(expected))), seed
        changed += not torch.equal(found, crop)
    assert changed > 10


def test_no_bits_at_all_are_black() -> None:
    made = views(randaugment="rand-m10-inc1")
    posterize = next(op for op in made._randaugment.ops if op.name == "PosterizeIncreasing")
    assert np.array(posterize.aug_fn(photo(), 0)).max() == 0
    bits = np.array(posterize.aug_fn(photo(), 3))
    assert np.array_equal(bits, np.array(photo()) & 0b11100000)


def test_python_and_numpy_draw_on_as_if_nothing_had_happened() -> None:
    def draws() -> tuple[float, float]:
        return python_random.random(), float(np.random.rand())

    python_random.seed(1)
    np.random.seed(1)
    expected = [draws(), draws()]
    python_random.seed(1)
    np.random.seed(1)
    state = torch.get_rng_state()
    found = [draws()]
    views()(photo(), rng())
    with pytest.raises(RuntimeError), seeded_globals(rng()):
        raise RuntimeError
    assert [*found, draws()] == expected
    assert torch.equal(torch.get_rng_state(), state)


def pictures() -> ArraySource:
    images = np.random.default_rng(0).integers(0, 256, (8, 20, 26, 3), dtype=np.uint8)
    return ArraySource("pictures", images, np.arange(8) % 3, ("a", "b", "c"))


def loaded(workers: int, start: int = 0, seed: int = 4, **fields: Any) -> list[Tensor]:
    made, config = views(**fields), LoaderConfig(workers=workers)
    batches = training_batches(
        pictures(), made, config, batch_size=4, seed=seed, start_step=start, num_steps=6
    )
    return [torch.cat(made.finish(batch.crops, batch.colour)) for batch in batches]


@pytest.mark.parametrize("fields", [{}, {"randaugment": None, "colour_jitter": 0.4, "repeats": 2}])
def test_crops_are_the_same_from_the_middle_and_another_seed_has_others(fields: dict[str, Any]) -> None:
    whole = loaded(0, **fields)
    np.random.seed(99)
    assert all(torch.equal(a, b) for a, b in zip(whole[3:], loaded(0, start=3, **fields), strict=True))
    assert not torch.equal(whole[0], loaded(0, seed=5, **fields)[0])
    assert not torch.equal(whole[0], whole[2])


@pytest.mark.distributed
def test_crops_are_the_same_for_any_number_of_workers() -> None:
    assert all(torch.equal(a, b) for a, b in zip(loaded(0), loaded(2), strict=True))


def test_repeats_are_different_crops_of_one_image() -> None:
    sample = views(repeats=3)(photo(), rng())
    assert len(sample.crops) == 3 == views(repeats=3).num_views
    assert not torch.equal(sample.crops[0], sample.crops[1])


def test_jitter_changes_brightness_contrast_and_saturation_and_no_hue() -> None:
    """A grey picture stays grey, and with one level everywhere only its brightness can change."""
    grey = Image.new("RGB", (30, 30), (100, 100, 100))
    made = views(randaugment=None, colour_jitter=0.4)
    samples = [made(grey, rng(seed)) for seed in range(200)]
    found = made.finish(
        [torch.stack([sample.crops[0] for sample in samples])],
        [torch.stack([sample.colour[0] for sample in samples])],
    )[0]
    assert float((found.amax(dim=1) - found.amin(dim=1)).max()) < 1e-5
    ratio = found[:, 0, 0, 0] / (100 / 255)
    assert 0.59 <= float(ratio.min()) < 0.7
    assert 1.3 < float(ratio.max()) <= 1.41


def test_views_without_changes_are_plain_crops() -> None:
    plain = views(randaugment=None, min_scale=0.5, max_scale=0.9, flip=False, interpolation="bilinear")
    crop = RandomCrop(CropConfig(image_size=24, min_scale=0.5, max_scale=0.9, flip=False))
    sample = plain(photo(), rng(3))
    assert torch.equal(sample.crops[0], crop(photo(), rng(3)).crops[0])
    assert sample.colour == []


def test_views_go_to_worker_processes() -> None:
    made = views()
    made(photo(), rng())
    again = pickle.loads(pickle.dumps(made))
    assert torch.equal(again(photo(), rng(1)).crops[0], made(photo(), rng(1)).crops[0])


@pytest.mark.parametrize(
    "words", ["augmix-m3", "rand-m", "rand-foo", "rand-m9.5", "rand-tnone", "rand-m9-", "rand-p2", ""]
)
def test_words_that_are_none_of_timms_are_refused(words: str) -> None:
    with pytest.raises(ConfigError, match=r"views\.randaugment '.*' is not RandAugment in timm's words"):
        SupervisedViewsConfig(randaugment=words)


@pytest.mark.parametrize(
    "words", ["rand", "rand-m9", "rand-m7-n3-mstd101-inc0-p0.7-mmax12", "rand-m9-t3a", "rand-m9-tweights"]
)
def test_other_words_of_timms_are_taken(words: str) -> None:
    views(randaugment=words)(photo(), rng())


def test_jitter_beside_randaugment_and_a_range_without_a_size_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"colour_jitter 0\.4 has no effect beside views\.randaugment rand-m9"
    ):
        SupervisedViewsConfig(colour_jitter=0.4)
    with pytest.raises(ConfigError, match="max_scale"):
        views(min_scale=0.5, max_scale=0.2)
