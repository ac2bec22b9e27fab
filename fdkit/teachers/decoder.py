"""The decoder beside an encoder's weights: of a run of `fdkit pretrain mae`, or in an official MAE file."""

import logging
import re
from pathlib import Path
from typing import Any, NamedTuple

from fdkit.config import read_yaml
from fdkit.errors import ConfigError, WeightsError
from fdkit.models.libraries import HEADS_FILE, check_state
from fdkit.models.masking import Sampling
from fdkit.models.patches import patch_grid, require_maskable
from fdkit.models.pixel_decoder import PixelDecoder
from fdkit.teachers.files import read_file
from fdkit.teachers.official._layout import State, state_in
from fdkit.teachers.run_checkpoint import checkpoint_at
from fdkit.teachers.shards import read_group
from fdkit.teachers.teacher import Teacher
from fdkit.teachers.weights import check_finite

logger = logging.getLogger("fdkit")

"""What a run folder holds of its method beside the student, under the names of the method's state dict."""
OFFICIAL_HEAD_DIM = 32
"""Channels a head in the decoders of the official code, whose files do not show heads."""


class TrainedDecoder(NamedTuple):
    """A decoder and what its training says of how to use it; None where the file does not tell."""

    decoder: PixelDecoder
    norm_pixels: bool | None
    mask_ratio: float | None
    sampling: Sampling | None


class _Found(NamedTuple):
    """A decoder's tensors under its own names, its number of heads, and the rest as for `TrainedDecoder`."""

    state: State
    num_heads: int
    norm_pixels: bool | None = None
    mask_ratio: float | None = None
    sampling: Sampling | None = None


def load_decoder(teacher: Teacher) -> TrainedDecoder:
    """The decoder that was trained with an encoder, found where the encoder's weights are; in eval, without gradients.

    Raises ConfigError for a model that has none, WeightsError for one whose tensors are damaged or do not fit.
    """
    path = Path(teacher.source)
    found = None
    checkpoint = checkpoint_at(path)
    if checkpoint is not None:
        found = _in_run(read_group(checkpoint, "model"), checkpoint.parent.parent)
    elif (path / HEADS_FILE).is_file():
        found = _in_run(read_file(path / HEADS_FILE), path)
    elif path.is_file():
        found = _in_official_file(path)
    if found is None:
        raise ConfigError(
            f"{teacher.name} has no decoder of pixels, so there is nothing to reconstruct with",
            "give the run folder of `fdkit pretrain mae`, or an official MAE file with its decoder_* tensors",
        )
    require_maskable(teacher.backbone)
    decoder = _decoder(found, teacher)
    decoder.to(teacher.backbone.mean.device, teacher.backbone.dtype)
    return TrainedDecoder(decoder, *found[2:])


def _in_run(tensors: State, folder: Path) -> _Found | None:
    """The decoder among a method's own tensors, of the run in that folder."""
    state = {
        key.removeprefix("decoder."): value for key, value in tensors.items() if key.startswith("decoder.")
    }
    if "mask_token" not in state:
        return None
    stated = read_yaml(folder / "config.yaml").get("mae")
    if (
        not isinstance(stated, dict)
        or not {"decoder_heads", "norm_pixels", "mask_ratio", "sampling"} <= stated.keys()
    ):
        raise WeightsError(
            f"{folder}/config.yaml does not say how its decoder was trained: section mae is not whole",
            hint="put the run's own config.yaml back, or give the official file of weights with its decoder",
        )
    return _Found(
        state, stated["decoder_heads"], stated["norm_pixels"], stated["mask_ratio"], stated["sampling"]
    )


def _in_official_file(path: Path) -> _Found | None:
    """Files of training itself keep its options; those published for use do not."""
    content = read_file(path)
    state = state_in(content, source=str(path))
    if not {"mask_token", "decoder_embed.weight", "decoder_pos_embed"} <= state.keys():
        return None
    own = {key.removeprefix("decoder_"): value for key, value in state.items() if key.startswith("decoder_")}
    own["mask_token"] = state["mask_token"]
    options: Any = content.get("args")
    num_heads = max(1, own["mask_token"].shape[-1] // OFFICIAL_HEAD_DIM)
    logger.info(
        "%s: its decoder is taken to have %d heads of %d channels, as the official ones: shapes do not show heads",
        path,
        num_heads,
        OFFICIAL_HEAD_DIM,
    )
    return _Found(
        own,
        num_heads,
        norm_pixels=getattr(options, "norm_pix_loss", None),
        mask_ratio=getattr(options, "mask_ratio", None),
        sampling="random",
    )


def _decoder(found: _Found, teacher: Teacher) -> PixelDecoder:
    """The decoder of these tensors, for the encoder's grid."""
    backbone, network = teacher.backbone, teacher.backbone.network
    blocks = {match[1] for key in found.state if (match := re.match(r"blocks\.(\d+)\.", key))}
    grid, num_prefix_tokens = patch_grid(backbone), int(getattr(network, "num_prefix_tokens", 0))
    decoder = PixelDecoder(
        backbone.embed_dim,
        grid,
        patch_size=backbone.patch_size,
        num_prefix_tokens=num_prefix_tokens,
        width=found.state["mask_token"].shape[-1],
        depth=len(blocks),
        num_heads=found.num_heads,
    )
    num_rows = found.state["pos_embed"].shape[1] if "pos_embed" in found.state else 0
    if num_rows and num_rows != num_prefix_tokens + grid[0] * grid[1]:
        raise ConfigError(
            f"the decoder of {teacher.name} is made for {num_rows - num_prefix_tokens} patches, and an image of "
            f"{backbone.image_size} pixels has {grid[0] * grid[1]}",
            "leave --image-size out",
        )
    source = f"the decoder of {teacher.name}"
    check_state(decoder, found.state, source=source)
    check_finite(found.state, source=source)
    decoder.load_state_dict(found.state)
    return decoder.eval().requires_grad_(False)
