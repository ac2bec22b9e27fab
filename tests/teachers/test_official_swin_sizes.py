"""Swins at other image sizes, against the official network built for the size with tables resampled for it."""

import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from official_swins import (
    DEPTHS,
    HEADS,
    PATCH,
    SIDE,
    TABLE,
    WIDTH,
    Sizes,
    esvit_content,
    official_tokens,
    swin_shapes,
    swin_state,
    v2_state,
)
from torch import Tensor

from fdkit.errors import ConfigError
from fdkit.teachers.checkpoint_file import load_file
from fdkit.teachers.request import Request
from tests.official_files import filled, read_one, tokens, with_prefix


def test_the_window_grows_with_the_image_and_stays_where_it_cannot() -> None:
    at_size = read_one({"model": swin_state()}).network.at_size
    assert at_size is not None
    assert at_size(SIDE) == {}
    assert at_size(64) == {"window_size": 8}
    assert at_size(48) == {"window_size": 6}
    assert at_size(16) == {"window_size": 2}
    for size in (36, 34):
        with pytest.raises(ConfigError, match=f"image size {size}"):
            at_size(size)
    large: Sizes = (PATCH, 64, WIDTH, DEPTHS, HEADS)
    wide = read_one(filled({**swin_shapes(2, large), "head.weight": (10, WIDTH * 4)})).network.at_size
    assert wide is not None
    assert wide(80) == {"window_size": 2}  # 2.5 is no window
    with pytest.raises(ConfigError) as raised:
        at_size(36)
    assert raised.value.hint == "sizes that do: 24, 32, 40, 48"


def encoded(content: dict[str, Any], images: Tensor) -> Tensor:
    """Final tokens of normalised images from the file of a content, loaded for their size."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pth"
        torch.save(content, path)
        backbone = load_file(path, Request(str(path), image_size=images.shape[-1])).backbone
    return tokens(backbone.eval(), images)


def resampled(state: dict[str, Tensor], windows: tuple[int, ...]) -> dict[str, Tensor]:
    """Tables for the window of each stage, made as in the official `load_pretrained` and `init_weights`."""
    made = {}
    for key in [key for key in state if key.endswith(TABLE)]:
        table, side = state[key], 2 * windows[int(key.split(".")[1])] - 1
        old = math.isqrt(len(table))
        image = table.permute(1, 0).view(1, -1, old, old)
        grown = F.interpolate(image, size=(side, side), mode="bicubic")
        made[key] = grown.view(-1, side**2).permute(1, 0)
    return {**state, **made}


@pytest.mark.parametrize(("size", "windows"), [(48, (6, 6, 6)), (64, (8, 8, 8)), (16, (2, 2, 2))])
def test_swin_and_esvit_at_another_size_equal_the_official_network_for_it(
    size: int, windows: tuple[int, ...]
) -> None:
    images = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(2))
    content, teacher, _ = esvit_content(4)
    state = swin_state()
    for made, official, eps in ((content, teacher, 1e-6), ({"model": state}, state, 1e-5)):
        expected = official_tokens(resampled(official, windows), images, windows[0], eps=eps)
        torch.testing.assert_close(encoded(made, images), expected, rtol=0, atol=5e-5)


def test_swin_v2_keeps_its_coordinates_when_its_window_grows() -> None:
    network = read_one({"model": v2_state(8)}).network
    assert network.at_size is not None
    assert network.at_size(48) == {"window_size": 12, "pretrained_window_sizes": [8, 8, 4]}
    # the released pair of 192 and 384 pixels: 12 would still divide every map, and the window grew to 24
    assert network.at_size(64) == {"window_size": 16, "pretrained_window_sizes": [8, 8, 4]}


@pytest.mark.parametrize(("size", "window"), [(48, 12), (64, 16)])
def test_swin_v2_scales_by_its_old_window_and_a_student_by_its_new_one(size: int, window: int) -> None:
    images = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(2))
    state = v2_state(8)
    kept = official_tokens(state, images, window, pretrained=(8, 8, 4))
    anew = official_tokens(state, images, window)
    assert (kept - anew).abs().max() > 1e-2
    torch.testing.assert_close(encoded({"model": state}, images), kept, rtol=0, atol=5e-5)
    student = with_prefix("encoder.", {key.replace("cpb_mlp", "rpe_mlp"): v for key, v in state.items()})
    torch.testing.assert_close(encoded({"model": student}, images), anew, rtol=0, atol=5e-5)
