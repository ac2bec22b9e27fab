"""Which tokens and layers a feature is made of."""

import pytest
import torch

from fdkit.errors import ConfigError
from fdkit.evaluation._reading import Part, Reading, parts_of, reader, resolve_reading
from fdkit.models.backbone import Backbone, Preprocessing
from fdkit.models.libraries import build_timm

PREPROCESSING = Preprocessing((0.5,) * 3, (0.5,) * 3, image_size=16)
VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 12, "depth": 3, "num_heads": 2}
SWIN = {
    "img_size": 16,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": [1, 1],
    "num_heads": [2, 2],
    "window_size": 2,
}


def vit(**args: object) -> Backbone:
    torch.manual_seed(0)
    return build_timm("vit_tiny_patch16_224", {**VIT, **args}, preprocessing=PREPROCESSING).eval()


def swin() -> Backbone:
    torch.manual_seed(0)
    return build_timm("swin_tiny_patch4_window7_224", SWIN, preprocessing=PREPROCESSING).eval()


IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_auto_is_the_class_token_where_there_is_one() -> None:
    assert resolve_reading(vit(), "auto") == Reading(("cls",))
    assert resolve_reading(swin(), "auto") == Reading(("patches",))
    assert resolve_reading(vit(), "patches+cls") == Reading(("cls", "patches"))
    assert resolve_reading(vit(), "patches+cls").pooling == "cls+patches"


@pytest.mark.parametrize(
    ("pooling", "layers", "message"),
    [
        ("clss", 1, "'clss' is no kind of token"),
        ("cls+cls", 1, "names a token twice"),
        ("registers", 1, "no register tokens"),
        ("cls", 4, "the last 4 layers are asked for, but the model has 3"),
    ],
)
def test_what_the_model_does_not_have_is_refused(pooling: str, layers: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_reading(vit(), pooling, layers)


def test_a_model_without_a_class_token_has_none_to_read() -> None:
    with pytest.raises(ConfigError, match=r"(?s)no class token.*--pooling patches"):
        resolve_reading(swin(), "cls+patches")


def test_registers_are_neither_class_token_nor_patches() -> None:
    backbone = vit(reg_tokens=2)
    with torch.no_grad():
        tokens = backbone.network.forward_features(
            (IMAGES - 0.5) / 0.5
        )  # class token, 2 registers, 16 patches
        found = reader(backbone, resolve_reading(backbone, "cls+registers+patches"))(IMAGES)
    torch.testing.assert_close(found[0], tokens[:, 0])
    torch.testing.assert_close(found[1], tokens[:, 1:3].mean(dim=1))
    torch.testing.assert_close(found[2], tokens[:, 3:].mean(dim=1))


@torch.no_grad()
def test_the_last_layers_go_through_the_final_norm_as_in_dino() -> None:
    backbone = vit()
    network = backbone.network
    tokens = network.norm_pre(network._pos_embed(network.patch_embed((IMAGES - 0.5) / 0.5)))
    expected = []
    for block in network.blocks:
        tokens = block(tokens)
        normed = network.norm(tokens)
        expected.append((normed[:, 0], normed[:, 1:].mean(dim=1)))
    found = reader(backbone, resolve_reading(backbone, "cls+patches", 2))(IMAGES)
    for got, want in zip(found, [*expected[1], *expected[2]], strict=True):
        torch.testing.assert_close(got, want)


@torch.no_grad()
def test_the_stages_of_a_swin_are_read_as_they_are_but_the_last() -> None:
    backbone = swin()
    first, last = reader(backbone, resolve_reading(backbone, "patches", 2))(IMAGES)
    maps = backbone.network.forward_intermediates((IMAGES - 0.5) / 0.5, intermediates_only=True)
    torch.testing.assert_close(first, maps[0].mean(dim=(2, 3)))
    torch.testing.assert_close(last, backbone.network.forward_features((IMAGES - 0.5) / 0.5).mean(dim=(1, 2)))
    device = torch.device("cpu")
    assert parts_of(backbone, Reading(("patches",), 2), device) == (
        Part(-2, "patches", 0, 8),
        Part(-1, "patches", 8, 24),
    )


def test_the_parts_say_where_each_token_stands() -> None:
    parts = parts_of(vit(), Reading(("cls", "patches"), 2), torch.device("cpu"))
    assert [(part.name, part.start, part.stop) for part in parts] == [
        ("cls of layer -2", 0, 12),
        ("patches of layer -2", 12, 24),
        ("cls of layer -1", 24, 36),
        ("patches of layer -1", 36, 48),
    ]


def test_a_single_class_token_equals_that_of_all_tokens() -> None:
    backbone = vit()
    with torch.no_grad():
        (short,) = reader(backbone, Reading(("cls",)))(IMAGES)
        both = reader(backbone, Reading(("cls", "patches")))(IMAGES)
    torch.testing.assert_close(short, both[0])
