"""Convolutional stems: a few small strided convolutions in place of a vision transformer's patch projection."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fdkit.errors import ConfigError

_NUM_HALVINGS = 4


class ConvStem(nn.Module):
    """Four 3x3 convolutions of stride 2 with BatchNorm and ReLU, D/8 to D channels wide, and a 1x1 convolution.

    Takes the place of timm's `PatchEmbed` (`embed_layer`), and gives one token for 16 x 16 pixels, each of which has
    seen its neighbours' pixels too. Its tensors are `proj.<index>.*` of one sequence, as in MoCo v3's files.
    img_size: height and width of the images in pixels, one number if they are equal. norm_layer: of the tokens, none
    in MoCo v3. flatten: tokens (B, h*w, D) rather than a map (B, D, h, w). bias: of the 1x1 convolution.
    Raises ConfigError for a patch size other than 16, a width that is not a multiple of 8, and padding of images.
    Source: facebookresearch/moco-v3, vits.py; Xiao et al. 2021, arXiv 2106.14881.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        *,
        norm_layer: Callable[..., nn.Module] | None = None,
        flatten: bool = True,
        bias: bool = True,
        dynamic_img_pad: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if dynamic_img_pad:
            raise ConfigError("a convolutional stem does not pad images to whole patches")
        if embed_dim % 2 ** (_NUM_HALVINGS - 1):
            raise ConfigError(f"the width {embed_dim} of a convolutional stem is not a multiple of 8")
        self.patch_size = (2**_NUM_HALVINGS, 2**_NUM_HALVINGS)
        self.flatten = flatten
        self.set_input_size(img_size, patch_size)
        placed = {"device": device, "dtype": dtype}
        layers: list[nn.Module] = []
        for halving in reversed(range(_NUM_HALVINGS)):
            width = embed_dim // 2**halving
            layers += [
                nn.Conv2d(in_chans, width, kernel_size=3, stride=2, padding=1, bias=False, **placed),
                nn.BatchNorm2d(width, **placed),
                nn.ReLU(inplace=True),
            ]
            in_chans = width
        self.proj = nn.Sequential(*layers, nn.Conv2d(in_chans, embed_dim, kernel_size=1, bias=bias, **placed))
        self.norm = norm_layer(embed_dim, **placed) if norm_layer else nn.Identity()

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
    ) -> None:
        """Take images of another size from now on; None keeps a size. ConfigError for any patch size but 16."""
        if patch_size is not None and _pair(patch_size) != self.patch_size:
            raise ConfigError(f"patch size {patch_size}: a convolutional stem has {self.patch_size[0]}")
        if img_size is not None:
            self.img_size = _pair(img_size)
        self.grid_size = self.dynamic_feat_size(self.img_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of tokens for images of a size in pixels."""
        return img_size[0] // self.patch_size[0], img_size[1] // self.patch_size[1]

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, h*w, D), or the map (B, D, h, w), of images (B, C, H, W) of the size the stem was made for.

        Raises ConfigError for images of any other size.
        """
        if tuple(x.shape[-2:]) != self.img_size:
            raise ConfigError(
                f"images of {x.shape[-2]}x{x.shape[-1]} pixels: this network takes "
                f"{self.img_size[0]}x{self.img_size[1]}"
            )
        features: Tensor = self.proj(x)
        return self.norm(features.flatten(2).transpose(1, 2) if self.flatten else features)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
