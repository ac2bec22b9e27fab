"""Random textures of any size, drawn from a generator: plasma, and ice on a window."""

import math

import numpy as np
import torch
import torch.nn.functional as F

ICE = np.array([0.86, 0.94, 1.0], np.float32)
"""The colour of thick ice in daylight."""


def fractal(height: int, width: int, persistence: float, random: np.random.Generator) -> np.ndarray:
    """Plasma (height, width), float32, from 0 to 1: uniform noise on grids of halving spacing, summed.

    persistence: how much weaker each grid is than the one twice as coarse. What midpoint displacement makes.
    Source: Fournier, Fussell and Carpenter 1982, for the idea.
    """
    size = 2 ** math.ceil(math.log2(max(height, width, 2)))
    total = np.zeros((height, width), np.float32)
    cells, amplitude = 2, 1.0
    while cells <= size:
        nodes = random.uniform(-amplitude, amplitude, (cells + 1, cells + 1))
        total += resized(nodes, size / cells)[:height, :width]
        cells, amplitude = cells * 2, amplitude * persistence
    total -= total.min()
    return total / max(float(total.max()), 1e-12)


def resized(nodes: np.ndarray, spacing: float) -> np.ndarray:
    """Values on a grid (h, w), interpolated bilinearly between nodes that are `spacing` pixels apart; float32."""
    height, width = (round((count - 1) * spacing) + 1 for count in nodes.shape)
    values = torch.from_numpy(nodes.astype(np.float32))[None, None]
    return F.interpolate(values, size=(height, width), mode="bilinear", align_corners=True)[0, 0].numpy()


def frosted(height: int, width: int, random: np.random.Generator) -> np.ndarray:
    """Ice crystals on dark glass, (height, width, 3) float32 in [0, 1], thickest at the borders.

    Needles in many directions and veins, denser where a smooth random field is high.
    """
    unit = min(height, width) / 256
    thickness = 0.5 * fractal(height, width, 0.5, random) + 0.5 * _towards_border(height, width)
    veins = 1 - np.abs(2 * fractal(height, width, 0.7, random) - 1)
    ice = (
        0.55 * thickness
        + 0.35 * veins**4 * thickness
        + 0.9 * _needles(height, width, unit, random) * thickness
    )
    return np.clip(ice, 0, 1)[..., None] * ICE


def _needles(height: int, width: int, unit: float, random: np.random.Generator) -> np.ndarray:
    """Fine straight crystals in twelve directions, (height, width) in [0, 1]: noise smoothed along each alone."""
    waves = np.fft.rfft2(random.normal(size=(height, width)))
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)
    first, length = random.uniform(0, 180), max(9 * unit, 0.5)
    field = np.full((height, width), -np.inf)
    for angle in np.radians(first + 15 * np.arange(12)):
        along = rows * math.sin(angle) + columns * math.cos(angle)
        kept = np.exp(-2 * (math.pi * along * length) ** 2)
        streaks = np.fft.irfft2(waves * kept, s=(height, width))
        field = np.maximum(field, streaks / streaks.std())
    low, high = np.quantile(field, [0.4, 0.995])
    return ((field - low) / (high - low)).clip(0, 1).astype(np.float32)


def _towards_border(height: int, width: int) -> np.ndarray:
    """0 in the centre, 1 in the corners."""
    rows, columns = np.linspace(-1, 1, height)[:, None], np.linspace(-1, 1, width)
    return (np.hypot(rows, columns) / math.sqrt(2)).astype(np.float32)
