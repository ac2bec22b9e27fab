"""Tokens of any layer, held against forward hooks on the libraries' own blocks and stages."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import timm
import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer as OpenClipVisionTransformer
from torch import Tensor, nn

from fdkit.errors import ConfigError
from fdkit.models.backbone import Tokens
from fdkit.models.layers import Layer, layer_positions, layer_tokens, list_layers
from fdkit.models.libraries import build_timm
from fdkit.models.tokens import (
    open_clip_resnet_tokens,
    open_clip_trunk_tokens,
    open_clip_vit_tokens,
    timm_tokens,
)

TINY: dict[str, Any] = {"embed_dim": 24, "depth": 3, "num_heads": 3, "img_size": 48}


class Case(NamedTuple):
    """A network, and what an independent reader must know of it."""

    build: Callable[[], nn.Module]
    layers: str
    """Names of the modules that are the layers, with * for the number."""
    norm: str
    """Name of the final norm; empty if there is none."""
    num_prefix: int = 0
    """Tokens before the patches in what a block gives."""
    kept_prefix: int = 0
    """Of these, how many are handed on."""
    size: tuple[int, int] = (48, 48)
    read: Callable[[Any, Tensor], Tokens] = timm_tokens
    is_channels_last: bool = False


def _timm(name: str, **args: Any) -> Callable[[], nn.Module]:
    return lambda: build_timm(name, args).network


def _plain(name: str, **args: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, **args)


SWIN = {"embed_dim": 12, "depths": (1, 2, 1), "num_heads": (1, 2, 3), "img_size": 64}
BEIT = "beit_base_patch16_224"
SHARED_BIAS = {
    "use_shared_rel_pos_bias": True,
    "use_rel_pos_bias": False,
    "use_abs_pos_emb": False,
    "global_pool": "token",
}
CASES = {
    "vit": Case(_timm("vit_tiny_patch16_224", **TINY), "blocks.*", "norm", 1, 1),
    "vit_fc_norm": Case(
        _timm("vit_tiny_patch16_224", **TINY, global_pool="avg"), "blocks.*", "fc_norm", 1, 1
    ),
    "distilled": Case(_timm("deit_tiny_distilled_patch16_224", **TINY), "blocks.*", "norm", 2, 2),
    "clip": Case(_timm("vit_base_patch16_clip_quickgelu_224", **TINY), "blocks.*", "norm", 1, 1),
    "siglip": Case(_timm("vit_base_patch16_siglip_224", **TINY), "blocks.*", "norm"),
    "registers": Case(_timm("vit_small_patch14_reg4_dinov2", **TINY | {"patch_size": 16}), "blocks.*", "norm", 5, 5),
    "registers_alone": Case(_timm("vit_medium_patch16_reg4_gap_256", **TINY), "blocks.*", "fc_norm", 4, 0),
    "beit": Case(_timm(BEIT, **TINY), "blocks.*", "fc_norm", 1, 1),
    "student": Case(_timm(BEIT, **TINY, **SHARED_BIAS), "blocks.*", "norm", 1, 1),
    "eva02": Case(_timm("eva02_base_patch16_clip_224", **TINY), "blocks.*", "norm", 1, 1),
    "dinov3": Case(_timm("vit_small_patch16_dinov3", **TINY), "blocks.*", "norm", 5, 5),
    "rope_mixed": Case(_timm("vit_small_patch16_rope_mixed_224", **TINY), "blocks.*", "norm", 1, 1),
    "pe_spatial": Case(_timm("vit_pe_spatial_tiny_patch16_512", **TINY), "blocks.*", "", 1, 1),
    "radio": Case(_timm("naflexvit_base_patch16_radio_v3", **TINY), "blocks.*", "", 8, 8),
    "swin": Case(
        _timm("swin_tiny_patch4_window7_224", **SWIN, window_size=4),
        "layers.*",
        "norm",
        size=(64, 64),
        is_channels_last=True,
    ),
    "swinv2": Case(
        _timm("swinv2_tiny_window8_256", **SWIN, window_size=4),
        "layers.*",
        "norm",
        size=(64, 64),
        is_channels_last=True,
    ),
    "convnext": Case(
        _timm("convnext_atto", depths=(1, 1, 2, 1), dims=(6, 8, 10, 12)), "stages.*", "head.norm", size=(64, 96)
    ),
    "convnext_norm_first": Case(
        _plain("convnext_atto", depths=(1, 1, 1, 1), dims=(6, 8, 10, 12), head_norm_first=True),
        "stages.*",
        "norm_pre",
        size=(64, 96),
    ),
    "resnet": Case(_timm("resnet10t", channels=(6, 8, 10, 12)), "layer+", "", size=(64, 96)),
    "open_clip_vit": Case(
        lambda: OpenClipVisionTransformer(48, 16, 24, 3, 3, 2.0, output_dim=7),
        "transformer.resblocks.*",
        "ln_post",
        1,
        1,
        read=open_clip_vit_tokens,
    ),
    "open_clip_resnet": Case(
        lambda: ModifiedResNet([1, 1, 1, 1], output_dim=7, heads=4, image_size=64, width=8),
        "layer+",
        "",
        size=(64, 96),
        read=open_clip_resnet_tokens,
    ),
}  # fmt: skip
WITH_STAGES = [name for name, case in CASES.items() if "layer" in case.layers or "stages" in case.layers]
WITH_BLOCKS = [name for name in CASES if name not in WITH_STAGES]


class Watched(NamedTuple):
    """A network under hooks: what each layer gave, and how often it was called."""

    network: nn.Module
    seen: dict[int, Tensor]
    calls: list[int]
    images: Tensor


def _watch(case: Case) -> Watched:
    network = case.build().eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim == 1:  # or norms and layer scales would be near the identity
                parameter.normal_(1.0 if name.endswith("weight") else 0.3, 0.3)
    watched = Watched(network, {}, [], torch.randn(2, 3, *case.size))
    for number, module in enumerate(_layers(network, case)):

        def hook(module: nn.Module, inputs: Any, output: Tensor, number: int = number) -> None:
            watched.seen[number] = output.clone()
            watched.calls.append(number)

        module.register_forward_hook(hook)
    return watched


def _layers(network: nn.Module, case: Case) -> list[nn.Module]:
    if case.layers == "layer+":
        return [network.get_submodule(f"layer{number}") for number in (1, 2, 3, 4)]
    return list(network.get_submodule(case.layers.removesuffix(".*")).children())


def _expected(case: Case, output: Tensor, norm: nn.Module | None) -> tuple[Tensor, Tensor]:
    """Prefix and patches of what a layer gave, normed one token at a time."""
    if output.ndim == 4:
        rows = output if case.is_channels_last else output.permute(0, 2, 3, 1)
        output = rows.reshape(rows.shape[0], -1, rows.shape[-1])
    if norm is not None:
        output = torch.stack([_one_normed(norm, token) for token in output.unbind(1)], dim=1)
    return output[:, : case.kept_prefix], output[:, case.num_prefix :]


def _one_normed(norm: nn.Module, token: Tensor) -> Tensor:
    """Layer norm of tokens (B, C), written out."""
    centred = token - token.mean(dim=-1, keepdim=True)
    variance = centred.square().mean(dim=-1, keepdim=True)
    return centred / (variance + norm.eps).sqrt() * norm.weight + norm.bias  # type: ignore[operator]


@pytest.mark.parametrize("name", CASES)
def test_every_layer_is_what_the_block_or_stage_itself_gives(name: str) -> None:
    case = CASES[name]
    watched = _watch(case)
    layers = list_layers(watched.network)
    with torch.no_grad():
        found = layer_tokens(watched.network, watched.images, range(len(layers)), norm=False)
    assert watched.calls == list(range(len(_layers(watched.network, case)))), "one pass through every layer"
    for number, (tokens, layer) in enumerate(zip(found, layers, strict=True)):
        prefix, patches = _expected(case, watched.seen[number], None)
        assert torch.equal(tokens.prefix, prefix)
        assert torch.equal(tokens.patches, patches)
        grid = (case.size[0] // layer.patch_size, case.size[1] // layer.patch_size)
        assert tokens.grid == grid
        assert patches.shape == (2, grid[0] * grid[1], layer.width)


@pytest.mark.parametrize("name", CASES)
def test_the_last_layer_with_the_norm_is_the_end_of_the_network(name: str) -> None:
    case = CASES[name]
    watched = _watch(case)
    with torch.no_grad():
        final = case.read(watched.network, watched.images)
        (last,) = layer_tokens(watched.network, watched.images, [-1], norm=True)
        (raw,) = layer_tokens(watched.network, watched.images, [-1], norm=False)
    assert torch.equal(last.all(), final.all())
    assert last.grid == final.grid
    assert torch.equal(raw.all(), final.all()) == (case.norm == "")


@pytest.mark.parametrize("name", WITH_BLOCKS)
def test_the_norm_of_a_block_is_the_networks_own_on_every_token(name: str) -> None:
    case = CASES[name]
    watched = _watch(case)
    norm = watched.network.get_submodule(case.norm) if case.norm else None
    with torch.no_grad():
        found = layer_tokens(watched.network, watched.images, [1, 0], norm=True)
        for number, tokens in zip((1, 0), found, strict=True):
            prefix, patches = _expected(case, watched.seen[number], norm)
            torch.testing.assert_close(tokens.prefix, prefix)
            torch.testing.assert_close(tokens.patches, patches)
            assert norm is None or not torch.allclose(patches, _expected(case, watched.seen[number], None)[1])


@pytest.mark.parametrize("name", CASES)
def test_the_pass_stops_behind_the_deepest_layer_asked_for(name: str) -> None:
    watched = _watch(CASES[name])
    num_layers = len(list_layers(watched.network))
    with torch.no_grad():
        second, again, first = layer_tokens(
            watched.network, watched.images, [1, 1 - num_layers, 0], norm=False
        )
    assert watched.calls == [0, 1]
    assert torch.equal(second.patches, again.patches)
    assert first.patches.shape != second.patches.shape or not torch.equal(first.patches, second.patches)


@pytest.mark.parametrize("name", WITH_STAGES)
def test_the_norm_at_an_earlier_stage_is_refused(name: str) -> None:
    watched = _watch(CASES[name])
    with pytest.raises(ConfigError, match=r"layer 1: the final norm of .* fits its last stage alone"):
        layer_tokens(watched.network, watched.images, [-1, 1], norm=True)
    assert watched.calls == []


def test_a_tower_around_a_timm_model_is_read_as_that_model() -> None:
    tower = TimmModel("vit_tiny_patch16_224", 8, pool="").eval()
    images = torch.randn(1, 3, 224, 224)
    assert list_layers(tower) == [Layer(192, 16)] * 12
    with torch.no_grad():
        last, second = layer_tokens(tower, images, [-1, 1], norm=True)
        expected = tower.trunk.forward_intermediates(images, indices=[1], norm=True, output_fmt="NLC")[1][0]
        assert torch.equal(last.all(), open_clip_trunk_tokens(tower, images).all())
    assert torch.equal(second.patches, expected)


@pytest.mark.parametrize(
    ("name", "stage", "grid", "width"), [("swin", 1, (8, 8), 24), ("resnet", 0, (16, 24), 6)]
)
def test_a_stage_has_its_own_grid_and_width(name: str, stage: int, grid: tuple[int, int], width: int) -> None:
    watched = _watch(CASES[name])
    (tokens,) = layer_tokens(watched.network, watched.images, [stage], norm=False)
    assert tokens.grid == grid
    assert tokens.patches.shape == (2, grid[0] * grid[1], width)
    assert tokens.prefix.shape == (2, 0, width)


def test_layers_that_are_not_there_are_refused() -> None:
    watched = _watch(CASES["vit"])
    assert layer_positions(watched.network, [0, 2, -1, -3], norm=True) == [0, 2, 2, 0]
    for wrong in (3, -4):
        with pytest.raises(ConfigError, match=f"layer {wrong}: VisionTransformer has 3 layers") as raised:
            layer_tokens(watched.network, watched.images, [0, wrong], norm=True)
        assert "0 to 2, or -3 to -1" in raised.value.hint
    with pytest.raises(ConfigError, match="no layer is named"):
        layer_tokens(watched.network, watched.images, [], norm=True)
    with pytest.raises(ConfigError, match="the layers of Hiera are not known"):
        list_layers(timm.create_model("hiera_tiny_224", embed_dim=24, num_heads=1, img_size=64))
