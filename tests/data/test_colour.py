import itertools

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF

from fdkit.data import colour
from fdkit.data.colour import ColourStrengths

BYOL = ColourStrengths(0.4, 0.4, 0.2, 0.1, 0.8, 0.2, 0.5, (0.1, 2.0), 0.2)


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
    ops = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue]
    shape = (4, len(orders), 1, 1, 1)
    found = colour.jitter(batch, factors.T.reshape(shape), torch.tensor(orders).T.reshape(shape))
    for image, order, factor, result in zip(batch, orders, factors, found, strict=True):
        for op in order:
            image = ops[op](image, float(factor[op]))
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
    from PIL import Image, ImageFilter

    pixels = (images(1, 64, 48)[0].permute(1, 2, 0) * 255).byte()
    blurred = np.asarray(Image.fromarray(pixels.numpy()).filter(ImageFilter.GaussianBlur(1.5)))
    found = (
        colour.blur(pixels.permute(2, 0, 1)[None] / 255, torch.tensor([1.5]), radius=6)[0].permute(1, 2, 0)
        * 255
    )
    inside = np.s_[8:-8, 8:-8]
    assert np.abs(found.numpy() - blurred)[inside].mean() < 1.5
    torch.testing.assert_close(colour.blur(images(), torch.zeros(4), 3), images())


def test_apply_equals_the_same_operations_one_image_at_a_time() -> None:
    random = np.random.default_rng(3)
    parameters = torch.stack([colour.draw(BYOL, random) for _ in range(40)])
    batch = images(40)
    found = colour.apply(batch, parameters, BYOL)
    ops = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue]
    for image, row, result in zip(batch, parameters.tolist(), found, strict=True):
        for op in row[4:8]:
            image = ops[int(op)](image, row[int(op)])
        if row[8]:
            image = TF.rgb_to_grayscale(image, num_output_channels=3)
        if row[9]:
            image = TF.gaussian_blur(image, [13, 13], [row[9], row[9]])
        if row[10]:
            image = TF.solarize(image, 128 / 255)
        # A value within rounding of the threshold may fall on its other side.
        assert ((result - image).abs() > 5e-5).float().mean() < 1e-3


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


def test_switched_off_is_the_identity() -> None:
    parameters = torch.stack([colour.draw(ColourStrengths(), np.random.default_rng(0))] * 4)
    assert colour.apply(images(), parameters, ColourStrengths()) is not None
    torch.testing.assert_close(
        colour.apply(images(), parameters, ColourStrengths()), images(), atol=0, rtol=0
    )
    # the same parameters, with nothing left out
    torch.testing.assert_close(colour.apply(images(), parameters, BYOL), images(), atol=1e-6, rtol=0)


def test_results_stay_in_range() -> None:
    strong = ColourStrengths(2.0, 2.0, 2.0, 0.5, 1.0, 0.2, 1.0, (0.1, 2.0), 0.5)
    parameters = torch.stack([colour.draw(strong, np.random.default_rng(i)) for i in range(4)])
    found = colour.apply(images(), parameters, strong)
    assert found.min() >= -1e-6
    assert found.max() <= 1 + 1e-6
