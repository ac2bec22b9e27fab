"""What a student of features is compared with: which tokens, on which grid, on which scale.

Source: Wei et al. 2022 (arXiv 2205.14141), section 3; details the paper leaves open follow the released code.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fdkit.models.backbone import Tokens
from fdkit.models.collectives import mean_over_ranks

Whitening = Literal["layernorm", "batch", "l2", "none"]
EPS = 1e-5
"""Added to variances before they divide."""


def paired_tokens(student: Tokens, teacher: Tokens) -> tuple[Tensor, Tensor]:
    """The tokens of both that stand for the same place, (B, N, C_s) and (B, N, C_t).

    The class tokens come first if both have one; then the teacher's grid, to which the student's is resampled
    (bilinear, antialiased). Resampling the target instead would teach a blurred map.
    """
    patches = resample(student, teacher.grid)
    if student.prefix.shape[1] == 0 or teacher.prefix.shape[1] == 0:
        return patches, teacher.patches
    pairs = ((student.prefix, patches), (teacher.prefix, teacher.patches))
    first, second = (torch.cat([prefix[:, :1], rest.to(prefix.dtype)], dim=1) for prefix, rest in pairs)
    return first, second


def resample(tokens: Tokens, grid: tuple[int, int]) -> Tensor:
    """Patch tokens on another grid, (B, h*w, C), bilinear and antialiased; unchanged if it is the same grid."""
    if tokens.grid == grid:
        return tokens.patches
    maps = tokens.patches.transpose(1, 2).unflatten(2, tokens.grid).float()
    resized = F.interpolate(maps, size=grid, mode="bilinear", antialias=True)
    return resized.flatten(2).transpose(1, 2).to(tokens.patches.dtype)


def whiten(target: Tensor, whitening: Whitening) -> Tensor:
    """The target (..., C) float32 on the scale the loss works in; nothing here is learned.

    layernorm: mean 0 and biased variance 1 (eps 1e-5) over the channels of each vector. batch: the same over all
    vectors for each channel, across ranks. l2: length 1 for each vector.
    """
    if whitening == "layernorm":
        return F.layer_norm(target, target.shape[-1:], eps=EPS)
    if whitening == "l2":
        return F.normalize(target, dim=-1)
    if whitening == "batch":
        rows = target.flatten(0, -2)
        mean = mean_over_ranks(rows.mean(dim=0))
        variance = mean_over_ranks((rows - mean).square().mean(dim=0))
        return (target - mean) * (variance + EPS).rsqrt()
    return target
