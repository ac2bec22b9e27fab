"""Corruptions against formulas, scipy, Pillow and matplotlib, on images of odd shapes."""

import io
import itertools

import matplotlib.colors
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from fdkit.data import corruptions
from fdkit.data.corruptions import COMMON, CORRUPTIONS, EXTRA, corrupt
from fdkit.data.textures import fractal, frosted, resized
from fdkit.errors import ConfigError

STOCHASTIC = {
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "glass_blur",
    "motion_blur",
    "snow",
    "frost",
    "fog",
    "elastic_transform",
    "speckle_noise",
    "spatter",
}
"""Those that draw random numbers."""
# Published strengths change their kind at some steps: flakes, grain, darker frost and fog, water to mud, pale to vivid.
RISING = {
    "snow": ((1, 2), (3, 4, 5)),
    "elastic_transform": ((1, 2), (4, 5)),
    "spatter": ((1, 2, 3), (4, 5)),
    "saturate": ((1, 2), (3, 4, 5)),
    "glass_blur": ((1, 2, 3, 4), (3, 5)),
    "frost": ((1, 5),),
    "fog": ((1, 2, 3), (4, 5)),
}
ONE_RUN = ((1, 2, 3, 4, 5),)


def photo(height: int, width: int) -> np.ndarray:
    """Coloured shapes with edges and gradients, (height, width, 3) uint8, of middle brightness."""
    rows, columns = np.linspace(0, 1, height)[:, None], np.linspace(0, 1, width)
    red = 0.25 + 0.5 * rows * np.ones(width)
    green = 0.5 + 0.3 * np.sin(24 * columns) * np.cos(18 * rows)
    blue = np.where((rows - 0.5) ** 2 + (columns - 0.4) ** 2 < 0.06, 0.8, 0.2)
    return np.rint(np.stack([red, green, blue], axis=2) * 255).astype(np.uint8)


def as_float(image: np.ndarray) -> np.ndarray:
    return image.astype(np.float32) / 255


def distance(name: str, severity: int, image: np.ndarray) -> float:
    """Root mean square change, over four draws."""
    changes = [
        corrupt(image, name, severity, np.random.default_rng([7, draw])).astype(float) - image
        for draw in range(4)
    ]
    return float(np.sqrt(np.mean(np.square(changes))))


def test_fifteen_are_common_and_four_extra():
    assert (len(COMMON), len(EXTRA), len(CORRUPTIONS)) == (15, 4, 19)
    assert all(len(one.strengths) == 5 for one in CORRUPTIONS.values())


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("size", [(32, 32), (33, 57), (120, 41)])
def test_any_size_gives_bytes_of_that_size(name, size):
    image = photo(*size)
    before = image.copy()
    for severity in (1, 5):
        found = corrupt(image, name, severity, np.random.default_rng(0))
        assert (found.shape, found.dtype) == (image.shape, np.uint8)
        assert not np.array_equal(found, image) or (name == "gaussian_blur" and min(size) < 64)
    assert np.array_equal(image, before)


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("size", [(96, 128), (48, 40)])
def test_a_higher_severity_is_farther_from_the_image(name, size):
    image = photo(*size)
    for run in RISING.get(name, ONE_RUN):
        far = [distance(name, severity, image) for severity in run]
        rises = [later >= earlier for earlier, later in itertools.pairwise(far)]
        assert all(rises), far
        assert far[-1] > far[0]


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_severity_zero_changes_nothing_and_the_generator_decides_the_rest(name):
    image = photo(40, 53)
    assert np.array_equal(corrupt(image, name, 0, np.random.default_rng(0)), image)
    first, again, other = (corrupt(image, name, 3, np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert np.array_equal(first, again)
    assert np.array_equal(first, other) != (name in STOCHASTIC)


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("level", [0, 255])
def test_black_and_white_images_are_no_trouble(name, level):
    image = np.full((35, 44, 3), level, np.uint8)
    assert corrupt(image, name, 5, np.random.default_rng(0)).shape == image.shape


@pytest.mark.parametrize(
    "name", sorted(set(CORRUPTIONS) - {"gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise"})
)
def test_grey_images_stay_grey_but_for_tinted_ones(name):
    image = np.repeat(photo(64, 72)[..., :1], 3, axis=2)
    found = corrupt(image, name, 4, np.random.default_rng(0)).astype(int)
    is_tinted = name in {"frost", "spatter"}
    assert (np.ptp(found, axis=2).max() > 1) == is_tinted


@pytest.mark.parametrize(
    ("name", "strength"),
    [
        ("gaussian_noise", (0,)),
        ("impulse_noise", (0,)),
        ("speckle_noise", (0,)),
        ("defocus_blur", (0,)),
        ("gaussian_blur", (0,)),
        ("glass_blur", (0, 0, 2)),
        ("motion_blur", (0, 1)),
        ("zoom_blur", (1.0, 0.01)),
        ("frost", (1, 0)),
        ("fog", (0, 2)),
        ("brightness", (0,)),
        ("contrast", (1,)),
        ("saturate", (1, 0)),
        ("elastic_transform", (0, 4, 0)),
        ("pixelate", (1,)),
    ],
)
def test_strength_zero_is_the_identity(name, strength):
    image = as_float(photo(50, 61))
    found = CORRUPTIONS[name].change(image, np.random.default_rng(0), *strength)
    np.testing.assert_allclose(found, image, atol=2e-5)


def flat(level: float) -> np.ndarray:
    return np.full((200, 300, 3), level, np.float32)


def test_noise_has_the_moments_of_its_law():
    random = np.random.default_rng(0)
    for level in (0.2, 0.7):
        image = flat(level)
        gaussian = corruptions.gaussian_noise(image, random, 0.1) - level
        shot = corruptions.shot_noise(image, random, 12)
        speckle = corruptions.speckle_noise(image, random, 0.3) - level
        for noise, std in ((gaussian, 0.1), (shot - level, np.sqrt(level / 12)), (speckle, 0.3 * level)):
            assert abs(noise.mean()) < 4 * std / np.sqrt(noise.size)
            assert noise.std() == pytest.approx(std, rel=0.01)
        np.testing.assert_allclose(shot * 12, np.rint(shot * 12), atol=1e-4)
        assert np.corrcoef(gaussian[..., 0].ravel(), gaussian[..., 1].ravel())[0, 1] == pytest.approx(
            0, abs=0.02
        )


def test_impulses_are_half_salt_half_pepper_and_leave_the_rest():
    image = flat(0.5)
    found = corruptions.impulse_noise(image, np.random.default_rng(0), 0.2)
    for value, share in ((0, 0.1), (1, 0.1), (0.5, 0.8)):
        assert (found == value).mean() == pytest.approx(share, abs=0.005)


@pytest.mark.parametrize("kernel_name", ["disc", "motion"])
def test_blurs_are_scipys_convolution_with_kernels_of_sum_one(kernel_name):
    kernel = corruptions.disc(2.6) if kernel_name == "disc" else corruptions.motion_kernel(4, 2.5, 30)
    assert kernel.sum() == pytest.approx(1)
    image = as_float(photo(43, 38))
    expected = np.stack(
        [ndimage.convolve(image[..., c].astype(np.float64), kernel, mode="mirror") for c in range(3)], axis=2
    )
    np.testing.assert_allclose(corruptions.convolved(image, kernel), expected, atol=1e-5)


def test_a_disc_is_round_even_and_as_wide_as_its_radius():
    kernel = corruptions.disc(5)
    places = np.arange(len(kernel)) - len(kernel) // 2
    spread = (kernel * (places[:, None] ** 2 + places**2)).sum()
    assert spread == pytest.approx(25 / 2 + 2 / 6, rel=0.02)  # of a disc, and of sharing among four pixels
    np.testing.assert_allclose(kernel, kernel.T, atol=1e-3)
    inside = places[:, None] ** 2 + places**2 <= 16
    np.testing.assert_allclose(kernel[inside], 1 / (np.pi * 25), rtol=0.15)
    assert kernel[places[:, None] ** 2 + places**2 > 49].sum() == 0


def test_motion_starts_at_the_centre_and_goes_one_way():
    kernel = corruptions.motion_kernel(6, 4.0, 0)
    middle = len(kernel) // 2
    row = kernel[middle]
    assert kernel.sum() == pytest.approx(row.sum())
    assert row[: middle - 1].sum() == 0
    assert np.argmax(row) - middle in (0, 1)
    assert np.all(np.diff(row[middle + 1 : middle + 12]) < 0)
    down = corruptions.motion_kernel(6, 4.0, 90)
    np.testing.assert_allclose(down, kernel.T, atol=1e-9)


def test_lengths_scale_with_the_image():
    """A blur of a reference image, then shrunk, is the blur of the shrunk image."""
    large = np.asarray(Image.fromarray(photo(256, 320)).resize((320, 256)))
    small = np.asarray(Image.fromarray(large).resize((160, 128), Image.Resampling.BOX))
    for name in ("defocus_blur", "gaussian_blur"):
        blurred = corrupt(large, name, 5, np.random.default_rng(0))
        expected = np.asarray(Image.fromarray(blurred).resize((160, 128), Image.Resampling.BOX))
        found = corrupt(small, name, 5, np.random.default_rng(0))
        error = np.abs(found.astype(int) - expected.astype(int)).mean()
        assert error < 0.15 * np.abs(found.astype(int) - small.astype(int)).mean()


def test_sampling_between_pixels_is_scipys():
    image = as_float(photo(30, 44))
    random = np.random.default_rng(0)
    down, right = random.uniform(-6, 6, (2, 30, 44))
    found = corruptions.displaced(image, down, right)
    rows, columns = np.arange(30)[:, None] + down, np.arange(44) + right
    for c in range(3):
        expected = ndimage.map_coordinates(image[..., c], [rows, columns], order=1, mode="mirror")
        np.testing.assert_allclose(found[..., c], expected, atol=1e-5)
    whole = corruptions.displaced(image, np.full((30, 44), 2.0), np.full((30, 44), -3.0))
    np.testing.assert_allclose(whole[:-2, 3:], image[2:, :-3], atol=1e-6)


def test_zoom_enlarges_the_centre():
    image = as_float(photo(61, 83))
    rows, columns = (np.arange(n) for n in (61, 83))
    for factor in (1.0, 1.25):
        at = [(places + 0.5 - n / 2) / factor + n / 2 - 0.5 for places, n in ((rows, 61), (columns, 83))]
        grid = np.meshgrid(*at, indexing="ij")
        expected = np.stack(
            [ndimage.map_coordinates(image[..., c], grid, order=1, mode="nearest") for c in range(3)], axis=2
        )
        np.testing.assert_allclose(corruptions.zoomed(image, factor), expected, atol=1e-4)
    zooms = [corruptions.zoomed(image, factor) for factor in (1.0, 1.1, 1.2)]
    np.testing.assert_allclose(
        corruptions.zoom_blur(image, np.random.default_rng(0), 1.2, 0.1),
        (image + sum(zooms)) / 4,
        atol=1e-5,
    )


def test_zooms_are_as_many_as_published():
    ends = [
        np.arange(1, stop, step)
        for stop, step in ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))
    ]
    for (largest, step), published in zip(COMMON["zoom_blur"].strengths, ends, strict=True):
        np.testing.assert_allclose(np.arange(1, largest + step / 2, step), published)


def test_brightness_and_saturation_are_those_of_hsv():
    image = as_float(photo(40, 52))
    hsv = matplotlib.colors.rgb_to_hsv(image)
    random = np.random.default_rng(0)
    brighter = hsv.copy()
    brighter[..., 2] = (brighter[..., 2] + 0.3).clip(0, 1)
    np.testing.assert_allclose(
        corruptions.brightness(image, random, 0.3), matplotlib.colors.hsv_to_rgb(brighter), atol=1e-5
    )
    for factor, added in EXTRA["saturate"].strengths:
        other = hsv.copy()
        other[..., 1] = (other[..., 1] * factor + added).clip(0, 1)
        np.testing.assert_allclose(
            corruptions.saturate(image, random, factor, added),
            matplotlib.colors.hsv_to_rgb(other),
            atol=1e-5,
        )


def test_contrast_draws_each_channel_towards_its_own_mean():
    image = as_float(photo(40, 52))
    found = corruptions.contrast(image, np.random.default_rng(0), 0.3)
    for c in range(3):
        mean = image[..., c].astype(np.float64).mean()
        np.testing.assert_allclose(found[..., c], 0.3 * image[..., c] + 0.7 * mean, atol=1e-5)


def test_pixels_and_jpeg_are_pillows():
    image = photo(45, 62)
    stored = io.BytesIO()
    Image.fromarray(image).save(stored, "JPEG", quality=10)
    expected = np.asarray(Image.open(stored))
    assert np.array_equal(corrupt(image, "jpeg_compression", 4, np.random.default_rng(0)), expected)
    small = Image.fromarray(image).resize((15, 11), Image.Resampling.BOX)
    expected = np.asarray(small.resize((62, 45), Image.Resampling.BOX))
    assert np.array_equal(corrupt(image, "pixelate", 5, np.random.default_rng(0)), expected)


def test_fog_keeps_the_brightest_value_and_covers_unevenly():
    image = as_float(photo(64, 80))
    found = corruptions.fog(image, np.random.default_rng(0), 2.0, 2.0)
    assert found.max() <= image.max() + 1e-5
    haze = found * (image.max() + 2) / image.max() - image
    assert haze.min() == pytest.approx(0, abs=1e-4)
    assert haze.max() == pytest.approx(2, abs=1e-4)
    np.testing.assert_allclose(haze[..., 0], haze[..., 2], atol=1e-4)


def test_plasma_fills_the_unit_range_and_roughens_with_persistence():
    for size in ((64, 64), (37, 90), (1, 1), (3, 40)):
        found = fractal(*size, 0.3, np.random.default_rng(1))
        assert found.shape == size
        assert np.isfinite(found).all()
    smooth, rough = (fractal(96, 96, p, np.random.default_rng(1)) for p in (0.2, 0.7))
    assert (smooth.min(), smooth.max()) == (0, pytest.approx(1))
    assert np.abs(np.diff(rough, axis=0)).mean() > 2 * np.abs(np.diff(smooth, axis=0)).mean()


def test_nodes_are_kept_and_what_lies_between_is_linear():
    nodes = np.array([[0.0, 4.0], [8.0, 12.0]])
    found = resized(nodes, 4)
    np.testing.assert_allclose(found, np.add.outer(2 * np.arange(5), np.arange(5)), atol=1e-5)


def test_frost_is_thickest_at_the_border_and_bluish():
    ice = np.mean([frosted(96, 128, np.random.default_rng(seed)) for seed in range(4)], axis=0)
    assert 0 <= ice.min() <= ice.max() <= 1
    assert ice[:12].mean() > 1.3 * ice[42:54, 50:78].mean()
    assert np.all(ice[..., 2] >= ice[..., 0])


def test_snow_whitens_and_adds_two_opposite_layers():
    image = as_float(photo(64, 64))
    without = (0.1, 0.0, 3, 0.5, 10, 4, 1.0)  # no flake reaches the threshold
    np.testing.assert_allclose(corruptions.snow(image, np.random.default_rng(0), *without), image, atol=1e-6)
    flakes = corruptions.snow(np.zeros_like(image), np.random.default_rng(0), 0.55, 0.3, 4, 0.9, 12, 8, 1.0)
    np.testing.assert_allclose(flakes, flakes[::-1, ::-1], atol=1e-5)
    assert flakes.max() > 0.2


def test_water_brightens_and_mud_covers():
    image = as_float(photo(128, 128))
    water = corruptions.spatter(image, np.random.default_rng(0), *EXTRA["spatter"].strengths[1])
    assert (water >= image - 1e-5).all()
    assert 0.02 < (water > image + 0.05).any(axis=2).mean() < 0.6
    mud = corruptions.spatter(image, np.random.default_rng(0), *EXTRA["spatter"].strengths[4])
    changed = np.abs(mud - image).max(axis=2) > 1e-6
    assert 0.02 < changed.mean() < 0.6
    assert (
        np.abs(mud[changed] - corruptions.MUD).mean() < 0.4 * np.abs(image[changed] - corruptions.MUD).mean()
    )


def test_an_affine_map_moves_its_corners_no_farther_than_asked():
    random = np.random.default_rng(0)
    for _ in range(20):
        matrix = corruptions._random_affine((60, 90), 5.0, random)
        corners = np.array([30, 45]) + 20 * np.array([[1, 1], [-1, 1], [-1, -1]])
        linear, shift = matrix[:, :2], matrix[:, 2]
        moved = np.linalg.solve(linear, (corners - shift).T).T
        assert np.abs(moved - corners).max() <= 5 + 1e-6
        assert np.abs(moved - corners).max() > 0.1


def test_what_is_not_there_is_refused():
    image = photo(32, 32)
    with pytest.raises(ConfigError, match=r"(?s)no corruption is called gausian_noise.*gaussian_noise"):
        corrupt(image, "gausian_noise", 1, np.random.default_rng(0))
    with pytest.raises(ConfigError, match="severity 6 is not one of 1 to 5"):
        corrupt(image, "fog", 6, np.random.default_rng(0))
    for wrong in (image[..., 0], image.astype(np.float32), image[..., :2]):
        with pytest.raises(ValueError, match=r"\(H, W, 3\) uint8"):
            corrupt(wrong, "fog", 1, np.random.default_rng(0))
