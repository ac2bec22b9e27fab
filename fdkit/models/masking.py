"""Which patches of an image are hidden: at random, in large blocks, or all but a regular grid.

Every way of sampling gives each patch a number, and the patches with the smallest numbers stay visible. So all images
of a batch hide equally many, and a mask is drawn before anything is computed.
Source: He et al. 2021 (MAE, arXiv 2111.06377), section 3, figure 6 and table 1f.
"""

import math
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fdkit.errors import ConfigError

Sampling = Literal["random", "block", "grid"]
GRID_RATIO = 0.75
"""What a grid that keeps one of every 2 x 2 patches hides."""
SMALLEST_BLOCK = 16 / 196
"""Share of all patches that a block covers at least: BEiT's 16 of a 14 x 14 grid."""
ASPECT_RATIOS = (0.3, 1 / 0.3)
ATTEMPTS = 10


class Split(NamedTuple):
    """The patches of B images, sorted into seen and hidden; numbers count row by row, from 0."""

    visible: Tensor
    """(B, V)."""
    hidden: Tensor
    """(B, H)."""

    def restoring(self) -> Tensor:
        """(B, V + H): where each patch stands when the hidden ones follow the visible ones."""
        return torch.cat(self, dim=1).argsort(dim=1)

    def is_hidden(self) -> Tensor:
        """(B, V + H) bool: whether each patch is hidden."""
        return self.restoring() >= self.visible.shape[1]


def num_visible(num_patches: int, mask_ratio: float) -> int:
    """How many patches stay visible: the share left over, rounded down as the official code does."""
    return int(num_patches * (1 - mask_ratio))


def check_mask(grid: tuple[int, int], sampling: Sampling, mask_ratio: float) -> None:
    """Raises ConfigError for a share of hidden patches that hides none or all, or that a grid cannot hide."""
    rows, columns = grid
    visible = num_visible(rows * columns, mask_ratio)
    if not 0 < visible < rows * columns:
        what = "leaves none visible" if visible <= 0 else "hides none"
        raise ConfigError(
            f"a mask ratio of {mask_ratio} {what} of {rows}x{columns} patches",
            f"choose one between {1 / (rows * columns):.3g} and {1 - 1 / (rows * columns):.3g}",
        )
    if sampling != "grid":
        return
    if mask_ratio != GRID_RATIO:
        raise ConfigError(
            f"sampling grid keeps one of every 2x2 patches, a mask ratio of {GRID_RATIO}, not {mask_ratio}",
            "set the mask ratio to 0.75, or the sampling to random or block, which hide any share",
        )
    if rows % 2 or columns % 2:
        raise ConfigError(
            f"sampling grid keeps one of every 2x2 patches, which {rows}x{columns} patches do not divide into",
            "choose an image size with an even number of patches a side, or the sampling random or block",
        )


def draw_noise(
    batch_size: int,
    grid: tuple[int, int],
    *,
    sampling: Sampling,
    mask_ratio: float,
    device: torch.device | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """(B, L) numbers for `split_patches`, from the generator, or torch's own of the device (of the CPU for blocks).

    random: uniform in [0, 1). block and grid: the same, and 1 more for hidden patches.
    A block is BEiT's: see `draw_blocks`. A grid keeps the first of every 2 x 2 patches, the same in every image.
    """
    place = device if generator is None else generator.device
    noise = torch.rand(batch_size, math.prod(grid), generator=generator, device=place).to(device)
    if sampling == "block":
        num_hidden = math.prod(grid) - num_visible(math.prod(grid), mask_ratio)
        return noise + draw_blocks(batch_size, grid, num_hidden, generator=generator).flatten(1).to(device)
    if sampling == "grid":
        is_kept = torch.zeros(grid, device=device)
        is_kept[::2, ::2] = 1
        return noise + 1 - is_kept.flatten()
    return noise


def split_patches(noise: Tensor, visible: int) -> Split:
    """The `visible` patches of smallest noise (B, L), and the others, each in order of their noise."""
    order = noise.argsort(dim=1)
    return Split(order[:, :visible], order[:, visible:])


@torch.compiler.disable  # type: ignore[untyped-decorator]
def draw_blocks(
    batch_size: int, grid: tuple[int, int], num_hidden: int, *, generator: torch.Generator | None = None
) -> Tensor:
    """(B, h, w) float32 masks, 1 where hidden, of rectangles that overlap freely and cover num_hidden patches exactly.

    A rectangle's area is uniform between SMALLEST_BLOCK of the grid and what is still to be hidden, the logarithm of
    its height over its width uniform within ASPECT_RATIOS. Where ten rectangles in turn hide too much or nothing new,
    the rest is single random patches, where BEiT would hide fewer. Drawn on the CPU.
    Source: Bao et al. 2021 (BEiT, arXiv 2106.08254), algorithm 1; microsoft/unilm, beit/masking_generator.py.
    """
    device = torch.device("cpu") if generator is None else generator.device
    seed = torch.randint(2**63 - 1, (), generator=generator, device=device)
    random = np.random.default_rng(int(seed))
    masks = np.stack([_blocks(grid, num_hidden, random) for _ in range(batch_size)])
    return torch.from_numpy(masks.astype(np.float32))


def _blocks(grid: tuple[int, int], num_hidden: int, random: np.random.Generator) -> np.ndarray:
    mask = np.zeros(grid, dtype=bool)
    while (missing := num_hidden - int(mask.sum())) > 0:
        block = _next_block(mask, missing, random)
        if block is None:
            mask.flat[random.choice(np.flatnonzero(~mask), size=missing, replace=False)] = True
        else:
            mask[block] = True
    return mask


def _next_block(mask: np.ndarray, missing: int, random: np.random.Generator) -> tuple[slice, slice] | None:
    """A rectangle that hides something new and at most `missing` patches; None if none of ten does."""
    smallest = SMALLEST_BLOCK * mask.size
    for _ in range(ATTEMPTS):
        area = random.uniform(min(smallest, missing), max(smallest, missing))
        aspect = math.exp(random.uniform(*np.log(ASPECT_RATIOS)))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if not (0 < height < mask.shape[0] and 0 < width < mask.shape[1]):
            continue
        top = int(random.integers(mask.shape[0] - height + 1))
        left = int(random.integers(mask.shape[1] - width + 1))
        block = (slice(top, top + height), slice(left, left + width))
        if 0 < height * width - int(mask[block].sum()) <= missing:
            return block
    return None
