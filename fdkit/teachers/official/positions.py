"""Absolute position tables for another grid of patches, as each official code makes them.

A table is (1, h*w, D) without rows for prefix tokens, row-major; grids are (rows, columns). At its own grid a table
stays as it is, to the bit.
"""

import torch.nn.functional as F
from torch import Tensor

from fdkit.models.any_size import resample_by_scale
from fdkit.models.vit import sincos_position
from fdkit.teachers.official._layout import Grid


def by_size(table: Tensor, old: Grid, new: Grid) -> Tensor:
    """Bicubic, without antialiasing, to the new size.

    Source: facebookresearch/mae, util/pos_embed.py; the same in facebookresearch/deit, main.py, microsoft/ExtreMA,
    finetune/run_class_finetuning.py, and ZhichengHuang/CMAE, models/utils/embed.py.
    """
    return _as_tokens(
        F.interpolate(_as_map(table, old), size=new, mode="bicubic", align_corners=False), table
    )


def by_scale(table: Tensor, old: Grid, new: Grid) -> Tensor:
    """Bicubic, without antialiasing, by the factor (new + 0.1) / old, so a little off the new size's own points.

    Source: facebookresearch/dino, vision_transformer.py, interpolate_pos_encoding; the same in bytedance/ibot and, for
    models without registers, in facebookresearch/dinov2.
    """
    return resample_by_scale(table, old, new)


def by_size_antialiased(table: Tensor, old: Grid, new: Grid) -> Tensor:
    """Bicubic with antialiasing, which also has other weights than the plain one when enlarging.

    Source: facebookresearch/dinov2, hub/backbones.py, for models with registers; timm, layers/pos_embed.py.
    """
    resized = F.interpolate(
        _as_map(table, old), size=new, mode="bicubic", antialias=True, align_corners=False
    )
    return _as_tokens(resized, table)


def row_first(table: Tensor, old: Grid, new: Grid) -> Tensor:
    """MoCo v3's fixed sines and cosines, made anew for the grid; the old table gives its width alone.

    Source: facebookresearch/moco-v3, vits.py, build_2d_sincos_position_embedding.
    """
    fresh = sincos_position(new, table.shape[-1], first="row").unsqueeze(0)
    return table if old == new else fresh.to(table)


def _as_map(table: Tensor, grid: Grid) -> Tensor:
    """(1, D, h, w) float32."""
    return table.float().reshape(1, *grid, -1).permute(0, 3, 1, 2)


def _as_tokens(resized: Tensor, table: Tensor) -> Tensor:
    return resized.flatten(2).transpose(1, 2).to(table.dtype)
