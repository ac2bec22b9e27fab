"""Common corruptions of photographs at five severities: the fifteen of ImageNet-C and its four extra ones.

Each is a function of an image (H, W, 3), float32 in [0, 1], a generator and its strengths; strength 0 changes nothing
where it has a meaning. Lengths are pixels of an image whose short side is 256, as ImageNet-C's are, and scale with the
image, so that a small picture is as blurred as a large one; noise, blocks of pixels and JPEG work on the pixels as
they are.
Written anew from the description. Not to the pixel what the published files hold: random numbers are others, nothing
is stored as JPEG of quality 85, and these differ on purpose: frost is grown rather than taken from photographs, glass
displaces pixels instead of swapping them one after another, fog sums noise of halving scales instead of running
diamond-square, water drops are lit from one side without an edge detector, and colourless pixels stay so when
saturated.
Source: Hendrycks and Dietterich 2019, section 3.2 and appendix B; strengths from hendrycks/robustness at e0377d4,
ImageNet-C/create_c/make_imagenet_c.py.
"""

import io
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage, signal  # type: ignore[import-untyped]

from fdkit.data.textures import fractal, frosted, resized
from fdkit.errors import ConfigError, did_you_mean

Pixels = np.ndarray
"""(H, W, 3) float32 in [0, 1]; what a corruption returns may leave the range and is clipped by `corrupt`."""
Random = np.random.Generator

REFERENCE_SIDE = 256
SEVERITIES = (1, 2, 3, 4, 5)
DISC_POINTS = 4096
LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)
WATER = np.array([175, 238, 238], np.float32) / 255
MUD = np.array([63, 42, 20], np.float32) / 255


def corrupt(image: np.ndarray, name: str, severity: int, random: Random) -> np.ndarray:
    """The image (H, W, 3) uint8, corrupted; a new array.

    name: of `CORRUPTIONS`; severity: 1 to 5, or 0, which changes nothing. The same generator state gives the same
    pixels. Raises ConfigError for a corruption or severity there is not, ValueError for another kind of array.
    """
    check_name(name)
    if severity != 0:
        check_severity(severity)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"an image is (H, W, 3) uint8, not {image.shape} {image.dtype}")
    if severity == 0:
        return image.copy()
    change, strengths = CORRUPTIONS[name]
    return _as_bytes(change(image.astype(np.float32) / 255, random, *strengths[severity - 1]))


def check_name(name: str) -> None:
    """Raises ConfigError unless there is such a corruption."""
    if name not in CORRUPTIONS:
        known = did_you_mean(name, CORRUPTIONS) or f"there are all, extra, {', '.join(CORRUPTIONS)}"
        raise ConfigError(f"no corruption is called {name}", known)


def check_severity(severity: int) -> None:
    """Raises ConfigError unless it is 1 to 5."""
    if severity not in SEVERITIES:
        raise ConfigError(f"severity {severity} is not one of 1 to 5", "such as --severities 1,3,5")


def gaussian_noise(image: Pixels, random: Random, std: float) -> Pixels:
    """Noise of one standard deviation everywhere, as in poor light."""
    return image + random.normal(0, std, image.shape).astype(np.float32)


def shot_noise(image: Pixels, random: Random, photons: float) -> Pixels:
    """Photons counted one by one, `photons` of them at white: variance image / photons."""
    return (random.poisson(image * photons) / photons).astype(np.float32)


def impulse_noise(image: Pixels, random: Random, ratio: float) -> Pixels:
    """A share `ratio` of all values becomes 0 or 1, half of it each."""
    drawn = random.random(image.shape, dtype=np.float32)
    return np.where(drawn < ratio / 2, 0, np.where(drawn < ratio, 1, image)).astype(np.float32)


def speckle_noise(image: Pixels, random: Random, std: float) -> Pixels:
    """Noise in proportion to the brightness."""
    return image + image * random.normal(0, std, image.shape).astype(np.float32)


def defocus_blur(image: Pixels, random: Random, radius: float) -> Pixels:
    """Every point becomes a disc."""
    return convolved(image, disc(radius * _unit(image)))


def gaussian_blur(image: Pixels, random: Random, sigma: float) -> Pixels:
    """A Gaussian of that sigma."""
    return _smoothed(image, sigma * _unit(image))


def glass_blur(image: Pixels, random: Random, sigma: float, reach: float, rounds: int) -> Pixels:
    """As through frosted glass: points are thrown about, at most `reach` in each direction and round."""
    unit = _unit(image)
    thrown = random.uniform(-reach, reach, (rounds, 2, *image.shape[:2])).sum(axis=0) * unit
    return _smoothed(displaced(_smoothed(image, sigma * unit), *thrown), sigma * unit)


def motion_blur(image: Pixels, random: Random, radius: float, sigma: float) -> Pixels:
    """As from a moving camera, within 45 degrees of the horizontal."""
    unit, angle = _unit(image), random.uniform(-45, 45)
    return convolved(image, motion_kernel(radius * unit, sigma * unit, angle))


def zoom_blur(image: Pixels, random: Random, largest: float, step: float) -> Pixels:
    """As from a camera that moves towards the scene: the mean of the image and its zooms from 1 to `largest`."""
    zooms = np.arange(1, largest + step / 2, step)
    return (image + sum(zoomed(image, zoom) for zoom in zooms)) / (len(zooms) + 1)


def snow(
    image: Pixels,
    random: Random,
    mean: float,
    std: float,
    size: float,
    threshold: float,
    radius: float,
    sigma: float,
    kept: float,
) -> Pixels:
    """Falling flakes of two layers, in a scene that has turned white; `kept` is how much of its colours stays."""
    unit = _unit(image)
    height, width = image.shape[:2]
    size = max(1.0, size * unit)
    coarse = random.normal(mean, std, (math.ceil(height / size) + 1, math.ceil(width / size) + 1))
    flakes = resized(coarse, size)[:height, :width]
    flakes = np.where(flakes < threshold, 0, flakes).clip(0, 1)[..., None]
    kernel = motion_kernel(radius * unit, sigma * unit, random.uniform(-135, -45))
    flakes = convolved(flakes, kernel)
    grey = (image @ LUMINANCE)[..., None]
    whitened = kept * image + (1 - kept) * np.maximum(image, grey * 1.5 + 0.5)
    return whitened + flakes + flakes[::-1, ::-1]


def frost(image: Pixels, random: Random, kept: float, added: float) -> Pixels:
    """Ice crystals on a window, grown anew for every image."""
    return kept * image + added * frosted(image.shape[0], image.shape[1], random)


def fog(image: Pixels, random: Random, amount: float, decay: float) -> Pixels:
    """Uneven fog; with a small `decay` it is finer. The brightest value stays as bright as it was."""
    brightest = image.max()
    # The published diamond-square multiplies its amplitude by itself, so `decay` counts twice a halving.
    haze = fractal(image.shape[0], image.shape[1], decay**-2, random)[..., None]
    return (image + amount * haze) * brightest / (brightest + amount)


def brightness(image: Pixels, random: Random, added: float) -> Pixels:
    """The value of HSV, the largest of a pixel's three numbers, raised; hue and saturation stay."""
    value = image.max(axis=2, keepdims=True)
    raised = np.minimum(value + added, 1)
    return np.where(value > 0, image * raised / np.maximum(value, 1e-12), raised)


def contrast(image: Pixels, random: Random, factor: float) -> Pixels:
    """Every channel drawn towards its mean; factor 1 changes nothing."""
    mean = image.mean(axis=(0, 1), keepdims=True, dtype=np.float64).astype(np.float32)
    return (image - mean) * factor + mean


def saturate(image: Pixels, random: Random, factor: float, added: float) -> Pixels:
    """The saturation of HSV times `factor` plus `added`; hue and value stay, and grey stays grey."""
    value = image.max(axis=2, keepdims=True)
    spread = value - image
    chroma = spread.max(axis=2, keepdims=True)
    saturation = chroma / np.maximum(value, 1e-12)
    wanted = (saturation * factor + added).clip(0, 1)
    return np.where(chroma > 0, value - spread * (wanted * value) / np.maximum(chroma, 1e-12), image)


def elastic_transform(image: Pixels, random: Random, alpha: float, sigma: float, affine: float) -> Pixels:
    """Stretched like rubber: a random affine map, then a smooth random displacement.

    Noise in [-1, 1] smoothed by a Gaussian of `sigma` and times `alpha` moves the pixels; the three points that fix
    the affine map move by at most `affine`.
    """
    unit = _unit(image)
    rows, columns = np.meshgrid(*(np.arange(n, dtype=np.float64) for n in image.shape[:2]), indexing="ij")
    matrix = _random_affine(image.shape[:2], affine * unit, random)
    # Smoothed noise falls as 1 / sigma, so its factor grows with the square of the unit.
    moves = [_smooth_noise(image.shape[:2], sigma * unit, random) * alpha * unit**2 for _ in range(2)]
    rows, columns = rows + moves[0], columns + moves[1]
    target = np.stack([rows, columns, np.ones_like(rows)])  # (3, H, W)
    where = np.tensordot(matrix, target, axes=1)
    return sampled(image, where[0], where[1])


def pixelate(image: Pixels, random: Random, ratio: float) -> Pixels:
    """Shrunk to `ratio` of its height and width, and enlarged again, by the mean over boxes."""
    height, width = image.shape[:2]
    small = (max(1, int(width * ratio)), max(1, int(height * ratio)))
    box = Image.Resampling.BOX
    return _from_pil(_to_pil(image).resize(small, box).resize((width, height), box))


def jpeg_compression(image: Pixels, random: Random, quality: int) -> Pixels:
    """Stored as JPEG of that quality and read again."""
    buffer = io.BytesIO()
    _to_pil(image).save(buffer, "JPEG", quality=quality)
    with Image.open(buffer, formats=("JPEG",)) as stored:
        return _from_pil(stored)


def spatter(
    image: Pixels,
    random: Random,
    mean: float,
    std: float,
    sigma: float,
    threshold: float,
    strength: float,
    is_mud: bool,
) -> Pixels:
    """Drops on the lens: clear water that catches the light, or mud that covers.

    strength: of water, the most it brightens; of mud, the sigma that softens its rim.
    """
    unit = _unit(image)
    liquid = _smoothed(random.normal(mean, std, image.shape[:2])[..., None], sigma * unit)
    # Smoothing leaves std / (2 sqrt(pi) sigma) of the spread; at that of the reference size, drops cover as much.
    spread = std / (2 * math.sqrt(math.pi) * sigma)
    liquid = mean + (liquid - liquid.mean()) * spread / liquid.std()
    if is_mud:
        cover = _smoothed((liquid > threshold).astype(np.float32), strength * unit)
        cover = np.where(cover < 0.8, 0, cover)
        return image * (1 - cover) + MUD * cover
    depth = np.maximum(liquid - threshold, 0)
    slope = np.gradient(_smoothed(depth, unit)[..., 0])
    light = (depth > 0) * (0.35 + np.maximum(-(slope[0] + slope[1]) / 2, 0)[..., None] / _top(slope))
    return image + strength * _smoothed(light, 0.7 * unit).clip(0, 1) * WATER


class Corruption(NamedTuple):
    """A change, and its arguments at severities 1 to 5."""

    change: Callable[..., Pixels]
    strengths: tuple[tuple[float, ...], ...]


COMMON: dict[str, Corruption] = {
    "gaussian_noise": Corruption(gaussian_noise, ((0.08,), (0.12,), (0.18,), (0.26,), (0.38,))),
    "shot_noise": Corruption(shot_noise, ((60,), (25,), (12,), (5,), (3,))),
    "impulse_noise": Corruption(impulse_noise, ((0.03,), (0.06,), (0.09,), (0.17,), (0.27,))),
    "defocus_blur": Corruption(defocus_blur, ((3,), (4,), (6,), (8,), (10,))),
    "glass_blur": Corruption(glass_blur, ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))),
    "motion_blur": Corruption(motion_blur, ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))),
    "zoom_blur": Corruption(zoom_blur, ((1.11, 0.01), (1.15, 0.01), (1.2, 0.02), (1.24, 0.02), (1.3, 0.03))),
    "snow": Corruption(
        snow,
        (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
    ),
    "frost": Corruption(frost, ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))),
    "fog": Corruption(fog, ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))),
    "brightness": Corruption(brightness, ((0.1,), (0.2,), (0.3,), (0.4,), (0.5,))),
    "contrast": Corruption(contrast, ((0.4,), (0.3,), (0.2,), (0.1,), (0.05,))),
    "elastic_transform": Corruption(
        elastic_transform,
        # Published as multiples of 244 pixels.
        (
            (488, 170.8, 24.4),
            (488, 19.52, 48.8),
            (12.2, 2.44, 4.88),
            (17.08, 2.44, 4.88),
            (29.28, 2.44, 4.88),
        ),
    ),
    "pixelate": Corruption(pixelate, ((0.6,), (0.5,), (0.4,), (0.3,), (0.25,))),
    "jpeg_compression": Corruption(jpeg_compression, ((25,), (18,), (15,), (10,), (7,))),
}
"""The fifteen of the benchmark, in its order."""

EXTRA: dict[str, Corruption] = {
    "speckle_noise": Corruption(speckle_noise, ((0.15,), (0.2,), (0.35,), (0.45,), (0.6,))),
    "gaussian_blur": Corruption(gaussian_blur, ((1,), (2,), (3,), (4,), (6,))),
    "spatter": Corruption(
        spatter,
        (
            (0.65, 0.3, 4, 0.69, 0.6, False),
            (0.65, 0.3, 3, 0.68, 0.6, False),
            (0.65, 0.3, 2, 0.68, 0.5, False),
            (0.65, 0.3, 1, 0.65, 1.5, True),
            (0.67, 0.4, 1, 0.65, 1.5, True),
        ),
    ),
    "saturate": Corruption(saturate, ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2))),
}
"""The four meant for validation; no part of the mean corruption error."""

CORRUPTIONS = COMMON | EXTRA


def convolved(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Each channel of (H, W, C) convolved with a kernel of odd sides; borders mirror without repeating the edge."""
    above, beside = kernel.shape[0] // 2, kernel.shape[1] // 2
    padded = np.pad(image, ((above, above), (beside, beside), (0, 0)), mode="reflect")
    found = signal.fftconvolve(padded, kernel[..., None].astype(np.float32), mode="valid", axes=(0, 1))
    return found.astype(np.float32)


def disc(radius: float) -> np.ndarray:
    """A filled circle that sums to 1, also of a fraction of a pixel; radius 0 is a single point."""
    turns = np.arange(DISC_POINTS)
    distance = radius * np.sqrt((turns + 0.5) / DISC_POINTS)  # equal areas, so that points are equally dense
    angle = turns * math.pi * (3 - math.sqrt(5))
    return _spread_points(distance * np.sin(angle), distance * np.cos(angle), np.ones(DISC_POINTS))


def motion_kernel(radius: float, sigma: float, angle: float) -> np.ndarray:
    """Half a Gaussian along a line of length 2 * radius that starts at the centre; sums to 1.

    angle: in degrees, 0 to the right, 90 down. Radius 0 is a single point.
    """
    along = np.linspace(0, 2 * radius, 1 + math.ceil(8 * radius))
    weights = np.exp(-(along**2) / (2 * max(sigma, 1e-12) ** 2))
    turn = math.radians(angle)
    return _spread_points(along * math.sin(turn), along * math.cos(turn), weights)


def _spread_points(rows: np.ndarray, columns: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """A kernel of odd sides that sums to 1: each point shared among the four pixels around it."""
    reach = math.ceil(max(np.abs(rows).max(), np.abs(columns).max()))
    kernel = np.zeros((2 * reach + 2, 2 * reach + 2))  # a last row and column that stay empty
    top, left = np.floor(rows).astype(int), np.floor(columns).astype(int)
    down, right = rows - top, columns - left
    for row, row_share in ((top, 1 - down), (top + 1, down)):
        for column, column_share in ((left, 1 - right), (left + 1, right)):
            np.add.at(kernel, (row + reach, column + reach), weights * row_share * column_share)
    return kernel[:-1, :-1] / kernel.sum()


def zoomed(image: Pixels, factor: float) -> Pixels:
    """The central 1 / factor of the image enlarged to its size, bilinear; factor >= 1."""
    height, width = image.shape[:2]
    step = 1 / factor
    corner = (step, 0, width * (1 - step) / 2, 0, step, height * (1 - step) / 2)
    channels = [Image.fromarray(np.ascontiguousarray(image[..., channel])) for channel in range(3)]
    taken = [
        channel.transform((width, height), Image.Transform.AFFINE, corner, Image.Resampling.BILINEAR)
        for channel in channels
    ]
    return np.stack([np.asarray(channel) for channel in taken], axis=2)


def displaced(image: Pixels, down: np.ndarray, right: np.ndarray) -> Pixels:
    """Each pixel taken from `down` rows below and `right` columns beside it, both (H, W)."""
    height, width = image.shape[:2]
    return sampled(image, np.arange(height)[:, None] + down, np.arange(width) + right)


def sampled(image: Pixels, rows: np.ndarray, columns: np.ndarray) -> Pixels:
    """The image at places (H, W) between its pixels, bilinear; outside, it is mirrored at its outermost pixels."""
    places = np.stack([rows, columns])
    channels = [
        ndimage.map_coordinates(image[..., channel], places, order=1, mode="mirror") for channel in range(3)
    ]
    return np.stack(channels, axis=2)


def _random_affine(size: tuple[int, ...], reach: float, random: Random) -> np.ndarray:
    """(2, 3): from places (row, column, 1) in the result to places in the image.

    Three corners of a square about the centre, of a third of the short side to each side, move by at most `reach` in
    each direction.
    """
    centre, half = np.array(size) / 2, min(size) // 3
    corners = centre + half * np.array([[1, 1], [-1, 1], [-1, -1]])
    moved = corners + random.uniform(-reach, reach, (3, 2))
    return np.linalg.solve(np.column_stack([moved, np.ones(3)]), corners).T


def _smooth_noise(size: tuple[int, ...], sigma: float, random: Random) -> np.ndarray:
    """Noise uniform in [-1, 1], smoothed by a Gaussian as on a torus."""
    noise = random.uniform(-1, 1, size)
    return np.fft.ifft2(ndimage.fourier_gaussian(np.fft.fft2(noise), sigma)).real


def _smoothed(image: np.ndarray, sigma: float) -> np.ndarray:
    return ndimage.gaussian_filter(image.astype(np.float32), (sigma, sigma, 0), mode="nearest")


def _top(slope: list[np.ndarray]) -> float:
    """The 99th percentile of the light on lit slopes, by which it is scaled; never 0."""
    lit = np.maximum(-(slope[0] + slope[1]) / 2, 0)
    return max(float(np.quantile(lit, 0.99)), 1e-6)


def _unit(image: np.ndarray) -> float:
    """Pixels of this image to a pixel of the reference size."""
    return min(image.shape[:2]) / REFERENCE_SIDE


def _as_bytes(image: np.ndarray) -> np.ndarray:
    return np.rint(image.clip(0, 1) * 255).astype(np.uint8)


def _to_pil(image: Pixels) -> Image.Image:
    return Image.fromarray(_as_bytes(image))


def _from_pil(image: Image.Image) -> Pixels:
    return np.asarray(image, np.float32) / 255
