import itertools

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageFilter, ImageOps
from scipy.stats import chisquare, ks_2samp
from torchvision.transforms import ColorJitter

from fdkit.data import colour
from fdkit.data.colour import ColourStrengths

BYOL = ColourStrengths(0.4, 0.4, 0.2, 0.1, 0.8, 0.2, 0.5, (0.1, 2.0), 0.2)
BLENDS_AND_HUE = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue]
UNLIKELY = 1e-3


def images(batch: int = 4, height: int = 17, width: int = 23) -> torch.Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1)


def test_jitter_equals_torchvision_in_every_order() -> None:
    orders = list(itertools.permutations(range(4)))
    batch = images(len(orders), 5, 7)
    random = np.random.default_rng(0)
    factors = torch.tensor(
        random.uniform([0.5] * 3 + [-0.5], [1.5] * 3 + [0.5], (len(orders), 4)), dtype=torch.float32
    )
    shape = (4, len(orders), 1, 1, 1)
    found = colour.jitter(batch, factors.T.reshape(shape), torch.tensor(orders).T.reshape(shape))
    for image, order, factor, result in zip(batch, orders, factors, found, strict=True):
        for op in order:
            image = BLENDS_AND_HUE[op](image, float(factor[op]))
        torch.testing.assert_close(result, image, atol=2e-5, rtol=0)


@pytest.mark.parametrize("turns", [-0.5, -0.1, 0.03, 0.5])
def test_hue_equals_torchvision(turns: float) -> None:
    batch = images()
    batch[0, :, :3] = batch[0, :1, :3]  # some grey pixels, whose hue is undefined
    batch[1, 0] = batch[1, 1]  # ties for the largest channel
    found = colour.shift_hue(batch, column(turns))
    torch.testing.assert_close(found, TF.adjust_hue(batch, turns), atol=1e-5, rtol=0)
    torch.testing.assert_close(found[0, :, :3], batch[0, :, :3])


def test_grayscale_and_solarize_equal_torchvision() -> None:
    torch.testing.assert_close(colour.grayscale(images()), TF.rgb_to_grayscale(images()), atol=1e-6, rtol=0)
    batch = torch.arange(256).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    expected = TF.solarize(batch.to(torch.uint8), 128)
    assert torch.equal((colour.solarize(batch / 255) * 255).round().to(torch.uint8), expected)


def test_blur_equals_torchvision_image_by_image() -> None:
    sigmas = [0.1, 0.7, 1.3, 2.0]
    found = colour.blur(images(), torch.tensor(sigmas), radius=6)
    for image, sigma, result in zip(images(), sigmas, found, strict=True):
        torch.testing.assert_close(
            result, TF.gaussian_blur(image, [13, 13], [sigma, sigma]), atol=1e-5, rtol=0
        )


def test_blur_is_near_pillow_and_zero_is_the_identity() -> None:
    pixels = (images(1, 64, 48)[0].permute(1, 2, 0) * 255).byte()
    blurred = np.asarray(Image.fromarray(pixels.numpy()).filter(ImageFilter.GaussianBlur(1.5)))
    found = (
        colour.blur(pixels.permute(2, 0, 1)[None] / 255, torch.tensor([1.5]), radius=6)[0].permute(1, 2, 0)
        * 255
    )
    inside = np.s_[8:-8, 8:-8]
    assert np.abs(found.numpy() - blurred)[inside].mean() < 1.5
    torch.testing.assert_close(colour.blur(images(), torch.zeros(4), 3), images())


def one_at_a_time(image: torch.Tensor, row: list[float], *, grayscale_first: bool = False) -> torch.Tensor:
    """torchvision's operations on one image, in the order of its parameters."""
    if row[8] and grayscale_first:
        image = TF.rgb_to_grayscale(image, num_output_channels=3)
    for op in row[4:8]:
        image = BLENDS_AND_HUE[int(op)](image, row[int(op)])
    if row[8] and not grayscale_first:
        image = TF.rgb_to_grayscale(image, num_output_channels=3)
    if row[9]:
        image = TF.gaussian_blur(image, [13, 13], [row[9], row[9]])
    return TF.solarize(image, 128 / 255) if row[10] else image


@pytest.mark.parametrize("grayscale_first", [False, True])
def test_apply_equals_the_same_operations_one_image_at_a_time(grayscale_first: bool) -> None:
    strengths = BYOL._replace(grayscale_first=grayscale_first)
    random = np.random.default_rng(3)
    parameters = torch.stack([colour.draw(strengths, random) for _ in range(40)])
    batch = images(40)
    found = colour.apply(batch, parameters, strengths)
    expected = [
        one_at_a_time(image, row, grayscale_first=grayscale_first)
        for image, row in zip(batch, parameters.tolist(), strict=True)
    ]
    # A value within rounding of the threshold may fall on its other side.
    assert ((found - torch.stack(expected)).abs() > 5e-5).float().mean() < 1e-3


def test_grey_after_jitter_is_not_grey_before_it() -> None:
    parameters = torch.tensor(
        [[1.0, 1, 0.5, 0.2, 3, 2, 1, 0, 1, 0, 0]] * 4
    )  # hue and saturation change the luma
    before, after = (
        colour.apply(images(), parameters, BYOL._replace(grayscale_first=first)) for first in (True, False)
    )
    torch.testing.assert_close(before, TF.rgb_to_grayscale(images(), 3), atol=1e-4, rtol=0)
    assert (before - after).abs().max() > 0.05
    torch.testing.assert_close(after, after[:, :1].expand_as(after))  # grey all the same


@pytest.mark.parametrize("factor", [0.0, 0.4, 1.7])
@pytest.mark.parametrize("operation", [colour.BRIGHTNESS, colour.CONTRAST, colour.SATURATION])
def test_one_blend_equals_torchvision_and_clips(operation: int, factor: float) -> None:
    factors = torch.tensor([1.0, 1.0, 1.0, 0.0])
    factors[operation] = factor
    order = torch.tensor([2, 3, 0, 1])
    found = colour.jitter(
        images(), *(row.view(4, 1, 1, 1, 1).expand(4, 4, 1, 1, 1) for row in (factors, order))
    )
    for image, result in zip(images(), found, strict=True):  # each by its own mean, as for the contrast
        torch.testing.assert_close(result, BLENDS_AND_HUE[operation](image, factor), atol=1e-5, rtol=0)


def test_one_sigma_for_a_batch_and_one_order_for_all_would_show() -> None:
    random = np.random.default_rng(5)
    strengths = BYOL._replace(solarize_probability=0.0)
    parameters = torch.stack([colour.draw(strengths, random) for _ in range(40)])
    found = colour.apply(images(40), parameters, strengths)
    for columns in (slice(4, 8), slice(9, 10)):
        wrong = parameters.clone()
        wrong[:, columns] = parameters[parameters[:, 9].argmax(), columns]
        assert (
            (found - colour.apply(images(40), wrong, strengths)).abs().amax(dim=(1, 2, 3)) > 0.01
        ).sum() >= 15


def test_kernel_is_as_good_as_a_wider_one() -> None:
    """SimCLR and BYOL blur with 23 taps at 224 pixels; 13 reach three standard deviations of the largest."""
    for sigma in (0.1, 1.0, 2.0):
        found = colour.blur(images(4, 40, 30), torch.full((4,), sigma), radius=6)
        wide = TF.gaussian_blur(images(4, 40, 30), [23, 23], [sigma, sigma])
        assert (found - wide).abs().max() < 0.3 / 255


def test_colours_are_those_of_pillow_images_to_two_levels() -> None:
    """Pillow keeps the hue in 256 steps, rounds to 8 bits between the operations and blurs by three boxes."""
    random = np.random.default_rng(0)
    coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((96, 72), Image.Resampling.BICUBIC))
    parameters = torch.stack([colour.draw(BYOL, random) for _ in range(60)])
    batch = torch.from_numpy(pixels.copy()).permute(2, 0, 1).expand(60, 3, 72, 96) / 255
    found = colour.apply(batch, parameters, BYOL).permute(0, 2, 3, 1).numpy() * 255
    differences = []
    for row, result in zip(parameters.tolist(), found, strict=True):
        image = Image.fromarray(pixels)
        for op in row[4:8]:
            image = BLENDS_AND_HUE[int(op)](image, row[int(op)])
        image = image.convert("L").convert("RGB") if row[8] else image
        image = image.filter(ImageFilter.GaussianBlur(row[9])) if row[9] else image
        image = ImageOps.solarize(image) if row[10] else image
        differences.append(np.abs(result - np.asarray(image)).mean())
    assert np.median(differences) < 1.6
    assert max(differences) < 2.5
    assert max(d for d, unjittered in zip(differences, parameters[:, 3] == 0, strict=True) if unjittered) < 1


def test_draws_have_the_stated_distribution() -> None:
    random = np.random.default_rng(0)
    rows = torch.stack([colour.draw(BYOL, random) for _ in range(20000)]).numpy()
    jittered = rows[:, 3] != 0
    assert jittered.mean() == pytest.approx(0.8, abs=0.01)
    assert (rows[~jittered, :4] == [1, 1, 1, 0]).all()
    for part, strength in enumerate([0.4, 0.4, 0.2]):
        values = rows[jittered, part]
        assert values.min() == pytest.approx(1 - strength, abs=0.001)
        assert values.max() == pytest.approx(1 + strength, abs=0.001)
        assert values.mean() == pytest.approx(1, abs=0.01)
    assert np.abs(rows[:, 3]).max() == pytest.approx(0.1, abs=0.001)
    orders, counts = np.unique(rows[:, 4:8], axis=0, return_counts=True)
    assert len(orders) == 24
    assert counts.min() > 700
    assert rows[:, 8].mean() == pytest.approx(0.2, abs=0.01)
    sigma = rows[:, 9][rows[:, 9] > 0]
    assert len(sigma) / 20000 == pytest.approx(0.5, abs=0.01)
    assert (sigma.min(), sigma.max()) == pytest.approx((0.1, 2.0), abs=0.01)
    assert rows[:, 10].mean() == pytest.approx(0.2, abs=0.01)
    assert np.abs(np.corrcoef(rows.T) - np.eye(11))[np.ix_([8, 9, 10], [0, 1, 2, 3, 8, 9, 10])].max() < 0.03


@pytest.mark.parametrize("strengths", [(0.4, 0.4, 0.2, 0.1), (0.8, 0.8, 0.8, 0.2), (1.5, 1.0, 0.0, 0.5)])
def test_factors_have_torchvisions_distribution(strengths: tuple[float, float, float, float]) -> None:
    random, count = np.random.default_rng(7), 4000
    always = ColourStrengths(*strengths, jitter_probability=1.0)
    rows = torch.stack([colour.draw(always, random) for _ in range(count)]).numpy()
    peer = ColorJitter(*strengths)
    ranges = peer.brightness, peer.contrast, peer.saturation, peer.hue
    draws = [ColorJitter.get_params(*ranges) for _ in range(count)]
    for part in range(4):
        neutral = 0.0 if part == colour.HUE else 1.0
        others = np.array([neutral if draw[1 + part] is None else draw[1 + part] for draw in draws])
        assert ks_2samp(rows[:, part], others.astype(np.float32)).pvalue > UNLIKELY
    if strengths[0] > 1:  # a lower end below 0 is cut off, not mirrored or kept
        assert ks_2samp(rows[:, 0], random.uniform(-0.5, 2.5, count)).pvalue < UNLIKELY
        assert ks_2samp(rows[:, 0], np.abs(random.uniform(-0.5, 2.5, count))).pvalue < UNLIKELY


def test_orders_are_all_equally_likely_and_independent() -> None:
    random = np.random.default_rng(11)
    rows = torch.stack([colour.draw(BYOL, random) for _ in range(6000)]).numpy()
    _, counts = np.unique(rows[:, 4:8], axis=0, return_counts=True)
    assert len(counts) == 24
    assert chisquare(counts).pvalue > UNLIKELY
    jittered = rows[rows[:, 3] != 0]
    position = (jittered[:, 4:8] == colour.HUE).argmax(axis=1)
    for part in range(4):  # where the hue comes says nothing of how strong anything is
        assert ks_2samp(jittered[position == 0, part], jittered[position == 3, part]).pvalue > UNLIKELY
    assert np.abs(np.corrcoef(jittered[:, :4].T) - np.eye(4)).max() < 0.06


def test_blur_draws_a_sigma_for_every_image() -> None:
    random = np.random.default_rng(13)
    sigma = np.array([float(colour.draw(BYOL, random)[9]) for _ in range(4000)])
    drawn = sigma[sigma > 0]
    assert len(np.unique(drawn)) > 0.99 * len(drawn)
    assert ks_2samp(drawn, random.uniform(0.1, 2.0, 4000)).pvalue > UNLIKELY


def test_switched_off_is_the_identity() -> None:
    parameters = torch.stack([colour.draw(ColourStrengths(), np.random.default_rng(0))] * 4)
    assert colour.apply(images(), parameters, ColourStrengths()) is not None
    torch.testing.assert_close(
        colour.apply(images(), parameters, ColourStrengths()), images(), atol=0, rtol=0
    )
    # the same parameters, with nothing left out
    torch.testing.assert_close(colour.apply(images(), parameters, BYOL), images(), atol=1e-6, rtol=0)


def test_few_images_at_a_time_equal_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device, where a batch is changed as a whole and nothing is left out by what was drawn."""
    random = np.random.default_rng(17)
    parameters = torch.stack([colour.draw(BYOL, random) for _ in range(33)])
    batch = images(33)
    expected = batch.clone()
    alone = torch.cat([colour.apply(batch[i : i + 1], parameters[i : i + 1], BYOL) for i in range(33)])
    monkeypatch.setattr(colour, "CACHED_PIXELS", 5 * 17 * 23)
    some = colour.apply(batch, parameters, BYOL)
    monkeypatch.setattr(colour, "CACHED_PIXELS", 10**9)
    monkeypatch.setattr(colour, "_is_none", lambda chosen: False)
    together = colour.apply(batch, parameters, BYOL)
    torch.testing.assert_close(alone, together, atol=2e-6, rtol=0)
    torch.testing.assert_close(some, together, atol=2e-6, rtol=0)
    assert torch.equal(batch, expected)  # the images given are left as they were


def test_a_batch_all_grey_is_as_dense_as_any() -> None:
    always = ColourStrengths(grayscale_probability=1.0)
    parameters = torch.stack([colour.draw(always, np.random.default_rng(0))] * 4)
    found = colour.apply(images(), parameters, always)
    assert found.is_contiguous()
    torch.testing.assert_close(found, TF.rgb_to_grayscale(images(), 3), atol=1e-6, rtol=0)


def test_draws_of_a_seed_stay() -> None:
    """Runs are repeated, and taken up again, by their seed."""
    factors = [0.78944838, 1.24101961, 1.03286481, -0.08117427]
    row = colour.draw(BYOL, np.random.default_rng(3))
    assert row.tolist() == pytest.approx([*factors, 2, 1, 0, 3, 0, 0.40350392, 0])


def test_results_stay_in_range() -> None:
    strong = ColourStrengths(2.0, 2.0, 2.0, 0.5, 1.0, 0.2, 1.0, (0.1, 2.0), 0.5)
    parameters = torch.stack([colour.draw(strong, np.random.default_rng(i)) for i in range(4)])
    found = colour.apply(images(), parameters, strong)
    assert found.min() >= -1e-6
    assert found.max() <= 1 + 1e-6
