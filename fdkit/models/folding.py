"""The statistics of a network's input: applied to images, or folded into the convolution that reads the pixels.

With weights w and bias b, a convolution of (x - mean) / std is one of x with weights w / std and bias
b - sum(w / std * mean). That holds where every input of the convolution is a pixel: padding is 0 after normalisation,
and would be -mean / std in its place, so a convolution that pads is left alone.
"""

from typing import Any, Self

import torch
from torch import Tensor, nn


class Statistics(nn.Module):
    """Mean and standard deviation of RGB in [0, 1], at least float32 whatever the dtype of the model around them.

    Rounded to bfloat16, CLIP's mean alone would shift every pixel by up to half a grey level.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, float, float], std: tuple[float, float, float]) -> None:
        super().__init__()
        self.stated = (tuple(mean), tuple(std))
        for name, values in zip(("mean", "std"), self.stated, strict=True):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1], minus mean over std, in the statistics' dtype."""
        return (images.to(self.mean.dtype) - self.mean) / self.std

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        dtype = torch.promote_types(self.mean.dtype, torch.float32)
        for name, values in zip(("mean", "std"), self.stated, strict=True):
            setattr(self, name, torch.tensor(values, dtype=dtype, device=self.mean.device).view(3, 1, 1))
        return self


class PixelConv2d(nn.Conv2d):
    """A convolution without padding that reads images in [0, 1] and applies their statistics itself.

    Weight and bias stay those of normalised images, under their own names, so the state dict is unchanged and new
    weights, copies and gradients need no care: they are folded at every call, at the cost of normalising two images.
    In half precision the images are normalised instead, in float32, before they are cast: [0, 1] images in
    bfloat16 tell fewer grey levels apart near the mean.
    """

    statistics: Statistics

    def forward(self, input: Tensor) -> Tensor:
        """What the convolution gives for the normalised images; input (B, 3, H, W), RGB in [0, 1]."""
        kind = input.device.type
        is_autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        if self.weight.dtype.itemsize < 4 or is_autocast:
            return super().forward(self.statistics(input).to(self.weight.dtype))
        weight = self.weight / self.statistics.std
        shift = (weight.sum(dim=(2, 3)) * self.statistics.mean.flatten()).sum(dim=1)
        return self._conv_forward(input, weight, -shift if self.bias is None else self.bias - shift)


def fold(network: Any, statistics: Statistics) -> bool:
    """Lets the network read images in [0, 1], in place, where that is exact; False, and nothing changed, elsewhere.

    network: of timm or open_clip; it must not be folded already.
    """
    conv = _pixel_convolution(network)
    if type(conv) is not nn.Conv2d or conv.in_channels != 3 or conv.padding not in ((0, 0), "valid"):
        return False
    # A changed class keeps the module itself, and with it parameters, hooks and device.
    conv.__class__ = PixelConv2d
    conv.statistics = statistics
    network.folded_statistics = statistics.stated
    return True


def folded_statistics(network: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """(mean, std) folded into a network, which then reads images in [0, 1]; None if it reads normalised ones."""
    folded: tuple[tuple[float, ...], tuple[float, ...]] | None = getattr(network, "folded_statistics", None)
    return folded


def _pixel_convolution(network: Any) -> Any:
    """The module that is handed the network's input as it is; None where that is not known to be a convolution."""
    from open_clip.transformer import VisionTransformer as OpenClipVisionTransformer
    from timm.layers import PatchEmbed
    from timm.models.convnext import ConvNeXt

    network = getattr(network, "trunk", network)  # open_clip wraps timm models
    if isinstance(network, OpenClipVisionTransformer):
        return network.conv1
    if isinstance(network, ConvNeXt):
        return network.stem[0]
    for name in ("patch_embed", "stem"):
        embed: Any = getattr(network, name, None)
        if type(embed) is PatchEmbed and not embed.dynamic_img_pad:
            return embed.proj
    return None
