"""Heads that give every place of an image scores of classes, on the maps of a backbone's layers.

Batch norms are synchronised across ranks. Scores come at the resolution of the finest map a head reads.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from fdkit.errors import ConfigError
from fdkit.models.backbone import Tokens
from fdkit.models.batch_norm import BatchNorm
from fdkit.models.layers import list_layers

POOLED_GRIDS = (1, 2, 3, 6)
NUM_LEVELS = 4
AUXILIARY_LEVEL = 2
"""Which of the four levels the auxiliary head reads."""
CLASSIFIER_STD = 0.01


def token_map(tokens: Tokens) -> Tensor:
    """The patch tokens as a map (B, C, h, w)."""
    return tokens.patches.transpose(1, 2).unflatten(2, tokens.grid)


class LinearHead(nn.Module):
    """A batch norm and a linear classifier at every place; nothing around a place is seen.

    Several maps are concatenated, resized bilinearly to the first one's grid.
    Source: Oquab et al. 2023 (DINOv2, arXiv 2304.07193), section 7.4, and its released head for segmentation.
    """

    def __init__(self, widths: Sequence[int], num_classes: int) -> None:
        """widths: channels of each map."""
        super().__init__()
        self.norm = BatchNorm(sum(widths))
        self.classifier = _classifier(sum(widths), num_classes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Scores (B, K, h, w) of maps (B, C, ...), at the grid of the first."""
        stacked = torch.cat([resize(one, maps[0].shape[-2:]) for one in maps], dim=1)
        scores: Tensor = self.classifier(self.norm(stacked))
        return scores


class FCNHead(nn.Module):
    """A 3x3 convolution and a classifier on one map: the auxiliary head of UPerNet."""

    def __init__(self, width: int, num_classes: int, *, channels: int, dropout: float) -> None:
        super().__init__()
        self.conv = conv_block(width, channels, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = _classifier(channels, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        """Scores (B, K, h, w) of a map (B, C, h, w)."""
        scores: Tensor = self.classifier(self.dropout(self.conv(features)))
        return scores


class UPerNet(nn.Module):
    """A pyramid over four levels: pooled context on the deepest, handed down level by level, all fused on the finest.

    Source: Xiao et al. 2018 (arXiv 1807.10221), section 3, the semantic segmentation part; pooling of
    Zhao et al. 2017 (PSPNet).
    """

    def __init__(self, widths: Sequence[int], num_classes: int, *, channels: int, dropout: float) -> None:
        """widths: channels of each level, the finest first; channels: of the pyramid."""
        super().__init__()
        *finer, deepest = widths
        self.pooled = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(grid), conv_block(deepest, channels, 1))
            for grid in POOLED_GRIDS
        )
        self.context = conv_block(deepest + len(POOLED_GRIDS) * channels, channels, 3)
        self.lateral = nn.ModuleList(conv_block(width, channels, 1) for width in finer)
        self.smooth = nn.ModuleList(conv_block(channels, channels, 3) for _ in finer)
        self.fuse = conv_block(len(widths) * channels, channels, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = _classifier(channels, num_classes)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Scores (B, K, h, w) of levels (B, C, ...), the finest first, at the finest one's grid."""
        *finer, deepest = levels
        above = self._with_context(deepest)
        levels = [above]
        for features, lateral, smooth in zip(
            reversed(finer), reversed(self.lateral), reversed(self.smooth), strict=True
        ):
            above = lateral(features) + resize(above, features.shape[-2:])
            levels.insert(0, smooth(above))
        fused = self.fuse(torch.cat([resize(level, levels[0].shape[-2:]) for level in levels], dim=1))
        scores: Tensor = self.classifier(self.dropout(fused))
        return scores

    def _with_context(self, deepest: Tensor) -> Tensor:
        pooled = [resize(pool(deepest), deepest.shape[-2:]) for pool in self.pooled]
        context: Tensor = self.context(torch.cat([deepest, *pooled], dim=1))
        return context


class BlockPyramid(nn.Module):
    """Four levels out of four blocks of a transformer, whose grid is one: x4, x2, x1 and x1/2.

    Source: the segmentation code of BEiT (Bao et al. 2021), which MAE's appendix A.4 refers to.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.rescale = nn.ModuleList(
            [
                nn.Sequential(_doubled(width), BatchNorm(width), nn.GELU(), _doubled(width)),
                _doubled(width),
                nn.Identity(),
                nn.MaxPool2d(2),
            ]
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps (B, C, 4h, 4w), (B, C, 2h, 2w), (B, C, h, w), (B, C, h // 2, w // 2) of four (B, C, h, w)."""
        return [rescale(one) for rescale, one in zip(self.rescale, maps, strict=True)]


class StagePyramid(nn.Module):
    """The four stages of a network whose grid shrinks, each through a layer norm of its own over the channels.

    Source: the segmentation code of Swin (Liu et al. 2021), and of ConvNeXt (Liu et al. 2022).
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.norms = nn.ModuleList(LayerNorm2d(width) for width in widths)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The maps, normalised."""
        return [norm(one) for norm, one in zip(self.norms, maps, strict=True)]


def has_stages(network: nn.Module) -> bool:
    """Whether the grid of a network shrinks from layer to layer. Raises ConfigError if its layers are not known."""
    return len({layer.patch_size for layer in list_layers(network)}) > 1


def pyramid_layers(network: nn.Module) -> list[int]:
    """The layers that become the four levels: evenly spaced blocks, the last among them, or the last four stages.

    Raises ConfigError for a network with fewer layers.
    """
    count = len(list_layers(network))
    if count < NUM_LEVELS:
        what = "stages" if has_stages(network) else "blocks"
        raise ConfigError(
            f"upernet reads {NUM_LEVELS} levels, and {type(network).__name__} has {count} {what}",
            "use --segmentation.head linear",
        )
    if has_stages(network):
        return list(range(count - NUM_LEVELS, count))
    return [(number + 1) * count // NUM_LEVELS - 1 for number in range(NUM_LEVELS)]


def build_pyramid(network: nn.Module, widths: Sequence[int]) -> nn.Module:
    """What makes four levels, the finest first, of four layers' maps of these widths."""
    return StagePyramid(widths) if has_stages(network) else BlockPyramid(widths[0])


def conv_block(in_channels: int, out_channels: int, size: int) -> nn.Sequential:
    """A convolution that keeps the grid, a batch norm and a ReLU."""
    conv = nn.Conv2d(in_channels, out_channels, size, padding=size // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, BatchNorm(out_channels), nn.ReLU(inplace=True))


def resize(features: Tensor, size: Sequence[int]) -> Tensor:
    """A map (B, C, h, w) on another grid, bilinear; unchanged if it is the same grid."""
    if tuple(features.shape[-2:]) == tuple(size):
        return features
    return F.interpolate(features, size=tuple(size), mode="bilinear", align_corners=False)


def _doubled(width: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(width, width, kernel_size=2, stride=2)


def _classifier(in_channels: int, num_classes: int) -> nn.Conv2d:
    conv = nn.Conv2d(in_channels, num_classes, 1)
    nn.init.normal_(conv.weight, std=CLASSIFIER_STD)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv
