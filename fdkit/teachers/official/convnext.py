"""ConvNeXt V1 and V2, FCMAE's encoder and DINOv3's ConvNeXt, in the names of their common official code.

Verified against facebookresearch/ConvNeXt (models/convnext.py), ConvNeXt-V2 (models/, utils.py: the released FCMAE
files are already dense, without prefix and final norm; a file of one's own pretraining is sparse) and dinov3
(models/convnext.py). Every LayerNorm has epsilon 1e-6; the final one stands behind the pooling.
"""

import math
import re
from typing import Any

from torch import Tensor

from fdkit.teachers.official._layout import Conversion, Layout, Network, State

NORM_EPS = 1e-6
SIZES: dict[tuple[tuple[int, ...], int], str] = {
    ((2, 2, 6, 2), 40): "atto",
    ((2, 2, 6, 2), 48): "femto",
    ((2, 2, 6, 2), 64): "pico",
    ((2, 2, 8, 2), 80): "nano",
    ((3, 3, 9, 3), 96): "tiny",
    ((3, 3, 27, 3), 96): "small",
    ((3, 3, 27, 3), 128): "base",
    ((3, 3, 27, 3), 192): "large",
    ((3, 3, 27, 3), 256): "xlarge",
    ((3, 3, 27, 3), 352): "huge",
}
"""Names of the released sizes by blocks a stage and width of the first."""


def _convert_convnext(conversion: Conversion) -> Network:
    conversion.drop(r"head\.(weight|bias)", "classifier")
    return _network(conversion)


def _convert_dinov3(conversion: Conversion) -> Network:
    """DINOv3 registers its final norm twice."""
    conversion.drop(r"norms\.3\.(weight|bias)", "a second name for the final norm")
    return _network(conversion)


def _convert_fcmae(conversion: Conversion) -> Network:
    """FCMAE's encoder, which has no final norm; from sparse tensors to dense ones where it is sparse."""
    for pattern, reason in _DECODER:
        conversion.drop(pattern, reason)
    conversion.convert(r".*\.kernel", _dense_kernel, "sparse kernel, made a dense one")
    conversion.rename(r"\.kernel$", ".weight", "sparse kernel, made a dense one")
    conversion.rename(r"\.(ln|linear)\.(weight|bias)$", r".\2", "sparse layer's own level taken off")
    for key in [key for key in conversion.state if key.endswith(".bias") and conversion.state[key].ndim > 1]:
        conversion.convert(re.escape(key), Tensor.flatten, "row made a vector")
    network = _network(conversion)
    return network._replace(model_args={**network.model_args, "final_norm": False})


def _dense_kernel(kernel: Tensor) -> Tensor:
    """MinkowskiEngine's kernel (k*k, C) or (k*k, in, out) as PyTorch's (C, 1, k, k) or (out, in, k, k).

    Its first coordinate runs fastest, so that rows and columns change places.
    """
    side = math.isqrt(kernel.shape[0])
    square = kernel.unflatten(0, (side, side)).transpose(0, 1)
    return square.permute(2, 0, 1).unsqueeze(1) if kernel.ndim == 2 else square.permute(3, 2, 0, 1)


def _network(conversion: Conversion) -> Network:
    """The ConvNeXt of timm that the tensors left show, under its names."""
    has_grn = "stages.0.0.grn.gamma" in conversion.state
    conversion.convert(r".*\.grn\.(gamma|beta)", Tensor.flatten, "row made a vector")
    for pattern, replacement in _RENAMES:
        conversion.rename(pattern, replacement, "timm's name")
    state = conversion.state
    depths, dims = _shape(state)
    args: dict[str, Any] = {"depths": depths, "dims": dims, "use_grn": has_grn, "conv_mlp": False}
    args["norm_eps"] = NORM_EPS
    if has_scale := "stages.0.blocks.0.gamma" in state:
        args["ls_init_value"] = 1e-6
    size = SIZES.get((tuple(depths), dims[0]), "base")
    return Network(_architecture(size, has_scale), args, crop_ratio=0.875, interpolation="bicubic")


def _architecture(size: str, has_scale: bool) -> str:
    """The name of a size with LayerScale (V1) or without (V2); the base size's where timm has none.

    The file decides every argument but LayerScale's absence, which timm does not let an argument say.
    """
    import timm

    family = "convnext" if has_scale else "convnextv2"
    return next(name for name in (f"{family}_{size}", f"{family}_base") if timm.is_model(name))


def _shape(state: State) -> tuple[list[int], list[int]]:
    """Blocks and channels of each stage."""
    blocks = [
        m for key in state if (m := re.fullmatch(r"stages\.(\d+)\.blocks\.(\d+)\.conv_dw\.weight", key))
    ]
    depths = [sum(int(m[1]) == stage for m in blocks) for stage in range(4)]
    return depths, [state[f"stages.{stage}.blocks.0.conv_dw.weight"].shape[0] for stage in range(4)]


_RENAMES = (
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"^downsample_layers\.0\.", "stem."),
    (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
    (r"\.dwconv\.", ".conv_dw."),
    (r"\.pwconv([12])\.", r".mlp.fc\1."),
    (r"\.grn\.gamma$", ".mlp.grn.weight"),
    (r"\.grn\.beta$", ".mlp.grn.bias"),
    (r"^norm\.", "head.norm."),
)
_STEM = r"downsample_layers\.0\.0\.weight"
_DECODER = (
    (r"decoder\.\d+\..*", "decoder, used in pretraining alone"),
    (r"(proj|pred)\.(weight|bias)", "decoder's first and last layer, used in pretraining alone"),
    (r"mask_token", "stands for hidden patches in pretraining alone"),
)

LAYOUTS = (
    Layout(
        name="convnext",
        title="ConvNeXt",
        requires=(_STEM, r"stages\.0\.0\.dwconv\.weight", r"norm\.weight"),
        forbids=(r"stages\.0\.0\.grn\.gamma", r"norms\.\d+\.weight"),
        convert=_convert_convnext,
    ),
    Layout(
        name="convnextv2",
        title="ConvNeXt V2",
        requires=(_STEM, r"stages\.0\.0\.dwconv\.weight", r"stages\.0\.0\.grn\.gamma", r"norm\.weight"),
        convert=_convert_convnext,
    ),
    Layout(
        name="fcmae",
        title="FCMAE (ConvNeXt V2 as pretrained)",
        requires=(_STEM, r"stages\.0\.0\.dwconv\.(weight|kernel)", r"stages\.0\.0\.grn\.gamma"),
        forbids=(r"norm\.weight", r"head\..*"),
        convert=_convert_fcmae,
        prefixes=("encoder.", ""),
        outside=_DECODER,
    ),
    Layout(
        name="dinov3_convnext",
        title="DINOv3 (ConvNeXt)",
        requires=(_STEM, r"stages\.0\.0\.dwconv\.weight", r"norm\.weight", r"norms\.3\.weight"),
        convert=_convert_dinov3,
    ),
)
