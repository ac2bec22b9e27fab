from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from fdkit.errors import ConfigError
from fdkit.models.libraries import build_timm
from fdkit.models.stems import ConvStem
from fdkit.models.vit import patch_projection

ARGS = {"embed_dim": 64, "depth": 1, "num_heads": 2, "img_size": 48, "patch_size": 16, "num_classes": 0}


def stem(**args: object) -> ConvStem:
    made = ConvStem(**{"img_size": (48, 32), "embed_dim": 32, **args}).eval()
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return made


def test_tokens_are_four_halvings_and_a_matrix_written_out() -> None:
    made = stem()
    images = torch.rand(2, 3, 48, 32)
    state, x = made.state_dict(), images
    for index in (0, 3, 6, 9):
        x = F.conv2d(x, state[f"proj.{index}.weight"], stride=2, padding=1)
        mean, var, weight, bias = (
            state[f"proj.{index + 1}.{leaf}"][:, None, None]
            for leaf in ("running_mean", "running_var", "weight", "bias")
        )
        x = F.relu((x - mean) / (var + 1e-5).sqrt() * weight + bias)
    tokens = torch.einsum("bchw,dc->bhwd", x, state["proj.12.weight"][:, :, 0, 0]) + state["proj.12.bias"]
    torch.testing.assert_close(made(images), tokens.flatten(1, 2), rtol=0, atol=1e-5)
    assert tokens.shape == (2, 3, 2, 32)
    assert stem(flatten=False)(images).shape == (2, 32, 3, 2)


def test_tensors_have_the_names_and_widths_of_mocov3s_files() -> None:
    widths = {
        key: value.shape[:2] for key, value in stem(embed_dim=384).state_dict().items() if value.ndim == 4
    }
    assert widths == {
        "proj.0.weight": (48, 3),
        "proj.3.weight": (96, 48),
        "proj.6.weight": (192, 96),
        "proj.9.weight": (384, 192),
        "proj.12.weight": (384, 384),
    }
    assert "proj.12.bias" in stem().state_dict()
    assert "proj.12.bias" not in stem(bias=False).state_dict()
    assert not any(key.startswith("norm") for key in stem().state_dict())
    assert stem(norm_layer=partial(nn.LayerNorm, eps=1e-6)).norm.eps == 1e-6


def test_one_pixel_reaches_neighbouring_tokens_where_a_patch_projection_reaches_one() -> None:
    made = stem()
    images = torch.rand(1, 3, 48, 32)
    changed = images.clone()
    changed[0, :, 17, 17] += 1
    reached = (made(changed) - made(images)).abs().amax(dim=(0, 2)) > 1e-7
    assert reached[3]
    assert reached.sum() > 1


def test_it_is_the_patch_embedding_of_a_timm_vit() -> None:
    with torch.device("meta"):
        plain, conv = (
            timm.create_model("vit_base_patch16_224", depth=depth, num_classes=0, **args)
            for depth, args in ((12, {}), (11, {"embed_layer": ConvStem}))
        )
    counts = [sum(parameter.numel() for parameter in network.parameters()) for network in (plain, conv)]
    assert (
        counts[0] - counts[1] == 7_087_872 + 590_592 - 4_079_712
    )  # a block and the projection, for the stem
    backbone = build_timm("vit_tiny_patch16_224", {**ARGS, "stem": "conv"}).eval()
    assert isinstance(backbone.network.patch_embed, ConvStem)
    tokens = backbone(torch.rand(2, 3, 48, 48))
    assert (tokens.patches.shape, tokens.prefix.shape, tokens.grid) == ((2, 9, 64), (2, 1, 64), (3, 3))
    assert patch_projection(backbone.network) is None


def test_another_input_size_changes_the_grid_alone() -> None:
    network = build_timm("vit_tiny_patch16_224", {**ARGS, "stem": "conv"}).network.eval()
    before = {key: value.clone() for key, value in network.patch_embed.state_dict().items()}
    network.set_input_size((64, 32))
    assert network.patch_embed.grid_size == (4, 2)
    assert network.patch_embed.num_patches == 8
    assert network.pos_embed.shape == (1, 9, 64)
    assert network.forward_features(torch.rand(1, 3, 64, 32)).shape == (1, 9, 64)
    assert all(torch.equal(value, before[key]) for key, value in network.patch_embed.state_dict().items())


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"patch_size": 14}, "patch size 14: a convolutional stem has 16"),
        ({"embed_dim": 36}, "width 36 of a convolutional stem is not a multiple of 8"),
        ({"dynamic_img_pad": True}, "does not pad images"),
    ],
)
def test_sizes_it_does_not_take_are_refused(args: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        stem(**args)


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(ConfigError, match="images of 32x48 pixels: this network takes 48x32"):
        stem()(torch.rand(1, 3, 32, 48))
