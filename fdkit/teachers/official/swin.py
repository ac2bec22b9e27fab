"""Swin networks: EsViT, Swin V1 and V2, and the official Feature-Distillation students of EsViT.

The official names differ from timm's in one place: a downsampling stands at the end of a stage, where timm counts it
to the next. EsViT has LayerNorms of epsilon 1e-6, the others PyTorch's 1e-5 (so has the copy of EsViT's network in the
Feature-Distillation code, whose teacher is therefore not EsViT's to the last digit).
Verified against microsoft/esvit (models/swin_transformer.py), microsoft/Swin-Transformer (models/, utils.py) and
SwinTransformer/Feature-Distillation (models/swin_transformer_v2.py).
"""

import math
import re
from functools import partial
from typing import Any, NamedTuple

import torch

from fdkit.errors import ConfigError, WeightsError
from fdkit.teachers.official._layout import Conversion, Layout, Network, State
from fdkit.teachers.official.bias_tables import bicubic_bias, window_of

ESVIT_EPS = 1e-6
SWIN_EPS = 1e-5
FULL_SIZE = 384
"""Pixels from which the official evaluations no longer cut a margin off the image."""
V1, V2 = "swin_base_patch4_window7_224", "swinv2_base_window8_256"


class Stages(NamedTuple):
    """What the tensors show of a Swin's stages, first to last."""

    depths: list[int]
    num_heads: list[int]
    windows: list[int]
    """Side of the window of each stage; a stage's map is never smaller."""


def _convert_esvit(conversion: Conversion) -> Network:
    """At another size it is the network EsViT's code builds for that size, its tables resampled by `init_weights`.

    EsViT can also feed another size to the network built for 224 pixels, which then shifts other windows.
    """
    conversion.drop(r"head\.(mlp|last_layer)\..*", "projection head on the pooled features")
    conversion.drop(r"head_dense\..*", "projection head on the regions")
    return _network_v1(conversion, eps=ESVIT_EPS)._replace(assumption="")


def _convert_swin(conversion: Conversion) -> Network:
    conversion.drop(r"head\.(weight|bias)", "classifier")
    return _network_v1(conversion, eps=SWIN_EPS)


def _convert_swinv2(conversion: Conversion) -> Network:
    conversion.drop(r"head\.(weight|bias)", "classifier")
    return _network_v2(conversion)


def _convert_fd_swin(conversion: Conversion) -> Network:
    """Its code scales coordinates by the window in use, and does so anew at another size."""
    conversion.drop(r"head\.(weight|bias)", "classifier")
    conversion.rename(r"\.attn\.rpe_mlp\.", ".attn.cpb_mlp.", "timm's name for the position bias network")
    return _network_v2(conversion, keeps_scale=False)


def _network_v1(conversion: Conversion, *, eps: float) -> Network:
    """The Swin of timm that the tensors left show."""
    state = conversion.state
    table = "attn.relative_position_bias_table"
    windows = [window_of(state[key]) for key in _first_blocks(state, table)]
    stages = Stages(_depths(state), [state[key].shape[1] for key in _first_blocks(state, table)], windows)
    args = {**_args(state, stages), "qkv_bias": "layers.0.blocks.0.attn.qkv.bias" in state}
    return _finish(conversion, V1, {**args, "layer_norm_eps": eps}, stages)._replace(
        resample_bias=bicubic_bias, at_size=partial(_args_at_size, args, stages)
    )


def _network_v2(conversion: Conversion, *, keeps_scale: bool = True) -> Network:
    """The Swin V2 of timm that the tensors left show.

    keeps_scale: whether coordinates stay scaled by the window of pretraining where the window changes.
    """
    state = conversion.state
    heads = [state[key].shape[0] for key in _first_blocks(state, "attn.logit_scale")]
    stages = Stages(_depths(state), heads, _windows_v2(state))
    args = {
        **_args(state, stages),
        "qkv_bias": "layers.0.blocks.0.attn.q_bias" in state,
        "pretrained_window_sizes": _pretrained_windows(state, stages.windows),
        "layer_norm_eps": SWIN_EPS,
    }
    at_size = partial(_args_at_size, args, stages, keeps_scale=keeps_scale)
    return _finish(conversion, V2, args, stages)._replace(at_size=at_size)


def _finish(conversion: Conversion, architecture: str, args: dict[str, Any], stages: Stages) -> Network:
    """Leaves out the buffers, moves each downsampling to the stage it leads to, and names the network."""
    has_mask = any(key.endswith(".attn_mask") for key in conversion.state)
    conversion.drop(r".*\.relative_position_index", "index buffer, follows from the window")
    conversion.drop(r".*\.relative_coords_table", "coordinate buffer, follows from the window")
    conversion.drop(r".*\.attn_mask", "mask buffer, follows from the image size")
    for stage in reversed(range(len(stages.depths))):
        old, new = rf"^layers\.{stage}\.downsample\.", f"layers.{stage + 1}.downsample."
        conversion.rename(old, new, "timm counts a downsampling to the next stage")
    size = args["img_size"]
    said = f"images of {size} pixels, at which the last stage is one window: the file shows windows alone"
    return Network(
        architecture,
        args,
        assumption="" if has_mask else said,
        crop_ratio=0.875 if size < FULL_SIZE else 1.0,
        interpolation="bicubic",
    )


def _args(state: State, stages: Stages) -> dict[str, Any]:
    """The arguments both versions share."""
    width, patch = state["patch_embed.proj.weight"].shape[0], state["patch_embed.proj.weight"].shape[-1]
    return {
        "img_size": patch * _first_map(state, stages),
        "patch_size": patch,
        "embed_dim": width,
        "depths": stages.depths,
        "num_heads": stages.num_heads,
        "window_size": stages.windows[0],
        "mlp_ratio": state["layers.0.blocks.0.mlp.fc1.weight"].shape[0] / width,
    }


def _first_map(state: State, stages: Stages) -> int:
    """Patches along one side of the image.

    The mask of a shifted block has one entry a window. Without masks, as in EsViT's files: the last stage is one
    window, as in every released network.
    """
    mask = re.compile(r"layers\.(\d+)\.blocks\.\d+\.attn_mask")
    for key in state:
        if match := mask.fullmatch(key):
            stage = int(match[1])
            return math.isqrt(state[key].shape[0]) * stages.windows[stage] * 2**stage
    return int(stages.windows[-1] * 2 ** (len(stages.windows) - 1))


def _depths(state: State) -> list[int]:
    blocks = {
        (int(m[1]), int(m[2])) for key in state if (m := re.match(r"layers\.(\d+)\.blocks\.(\d+)\.", key))
    }
    num_stages = 1 + max(stage for stage, _ in blocks)
    return [sum(1 for stage, _ in blocks if stage == number) for number in range(num_stages)]


def _first_blocks(state: State, name: str) -> list[str]:
    """The key of a tensor in the first block of each stage."""
    return [f"layers.{stage}.blocks.0.{name}" for stage in range(len(_depths(state)))]


def _windows_v2(state: State) -> list[int]:
    """Windows of Swin V2, which has no table of their size, from its buffers; WeightsError without them."""
    keys = _first_blocks(state, "attn.relative_position_index")
    if missing := [key for key in keys if key not in state]:
        raise WeightsError(
            f"the file does not show its windows: it lacks {missing[0]}",
            hint="give the official file with its buffers, or name the timm model with --arch",
        )
    return [math.isqrt(state[key].shape[0]) for key in keys]


def _pretrained_windows(state: State, windows: list[int]) -> list[int]:
    """The window each stage's position coordinates are scaled by, 0 for its own, from the coordinates' buffer.

    Raises WeightsError for coordinates that timm's Swin V2 does not make, such as linear ones.
    """
    found = []
    for stage, key in enumerate(_first_blocks(state, "attn.relative_coords_table")):
        window = windows[stage]
        if key not in state or window == 1:
            found.append(0)
            continue
        coordinates = state[key].float()
        farthest = 8 ** float(coordinates[0, -1, -1, 0]) - 1
        pretrained = 1 + round(8 * (window - 1) / farthest) if farthest > 0 else 0
        steps = torch.arange(1 - window, window) * (8 / max(pretrained - 1, 1))
        expected = steps.sign() * (steps.abs() + 1).log2() / 3
        if not torch.allclose(coordinates[0, :, 0, 0], expected, atol=1e-4):
            raise WeightsError(f"{key} holds other coordinates than Swin V2's log-spaced ones")
        found.append(0 if pretrained == window else pretrained)
    return found


def _args_at_size(
    args: dict[str, Any], stages: Stages, size: int, *, keeps_scale: bool = False
) -> dict[str, Any]:
    """The window for images of another size, as the official code would be configured for it.

    The window grows with the image, as in every released pair (224 -> 384: 7 -> 12; 192 -> 256: 12 -> 16; 192 -> 384:
    12 -> 24), and stays where it cannot. Swin V2 keeps scaling its coordinates by the window it was trained with.
    Raises ConfigError where neither makes whole windows: Swin's code stops there, EsViT's pads other than timm's.
    """
    native = args["img_size"]
    if size == native:
        return {}
    num_stages = len(stages.depths)
    chosen = _window_at(args, num_stages, size)
    if chosen is None:
        step = args["patch_size"] * 2 ** (num_stages - 1)
        whole = [s for s in range(step, 4 * native, step) if _window_at(args, num_stages, s)]
        near = sorted(sorted(whole, key=lambda other: abs(other - size))[:4])
        raise ConfigError(
            f"image size {size}: its feature maps do not divide into windows",
            hint="sizes that do: " + ", ".join(str(s) for s in near),
        )
    changed: dict[str, Any] = {"window_size": chosen}
    if keeps_scale:
        trained = zip(args["pretrained_window_sizes"], stages.windows, strict=True)
        changed["pretrained_window_sizes"] = [stated or own for stated, own in trained]
    return changed


def _window_at(args: dict[str, Any], num_stages: int, size: int) -> int | None:
    """Side of the windows at an image size: scaled with it, else as it is; None if neither divides its maps."""
    native, window = args["img_size"], args["window_size"]
    scaled, remainder = divmod(window * size, native)
    candidates = [scaled, window] if remainder == 0 else [window]
    return next((w for w in candidates if _divides(size, args["patch_size"], w, num_stages)), None)


def _divides(size: int, patch: int, window: int, num_stages: int) -> bool:
    """Whether every stage's map is whole, and one window or divided into windows."""
    if size % (patch * 2 ** (num_stages - 1)):
        return False
    maps = [size // patch // 2**stage for stage in range(num_stages)]
    return all(side <= window or side % window == 0 for side in maps)


def _is_esvit(state: State) -> bool:
    """Whether a Swin V1 file is EsViT's: by its head, or by index buffers without the masks Swin keeps beside them."""
    if any(key.startswith("head.mlp.") for key in state):
        return True
    has_index = any(key.endswith(".relative_position_index") for key in state)
    return has_index and "head.weight" not in state and not any(key.endswith(".attn_mask") for key in state)


def _is_swin(state: State) -> bool:
    return not _is_esvit(state)


_SWIN = (r"patch_embed\.norm\.weight", r"layers\.0\.downsample\.reduction\.weight", r"norm\.weight")
_TABLE = r"layers\.0\.blocks\.0\.attn\.relative_position_bias_table"

LAYOUTS = (
    Layout(
        name="esvit",
        title="EsViT (Swin)",
        requires=(*_SWIN, _TABLE),
        shows=_is_esvit,
        convert=_convert_esvit,
    ),
    Layout(
        name="swin",
        title="Swin Transformer",
        requires=(*_SWIN, _TABLE),
        shows=_is_swin,
        convert=_convert_swin,
    ),
    Layout(
        name="swinv2",
        title="Swin Transformer V2",
        requires=(*_SWIN, r"layers\.0\.blocks\.0\.attn\.cpb_mlp\.0\.weight"),
        convert=_convert_swinv2,
    ),
    Layout(
        name="fd_swin",
        title="Feature-Distillation student (Swin V2)",
        requires=(*_SWIN, r"layers\.0\.blocks\.0\.attn\.rpe_mlp\.0\.weight"),
        convert=_convert_fd_swin,
        prefixes=("encoder.", ""),
        outside=(
            (r"decoder\..*", "projector onto the teacher's width, used in distillation alone"),
            (r"feature_model\..*", "the teacher the student was distilled from"),
        ),
    ),
)
