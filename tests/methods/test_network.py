"""The network of every pretraining method: what it is built as, what it starts from, and what it refuses."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fdkit.errors import ConfigError, WeightsError
from fdkit.methods._network import NetworkConfig, build_network
from fdkit.models.backbone import Backbone
from fdkit.models.batch_norm import BatchNorm
from fdkit.models.libraries import build_backbone, save_backbone
from fdkit.models.stems import ConvStem
from fdkit.models.vit import sincos_position

TINY = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}


def tiny(*, image_size: int = 8, seed: int = 0, sizes: tuple[int, ...] = (), **fields: Any) -> Backbone:
    torch.manual_seed(seed)
    config = NetworkConfig(**{"architecture": "vit_tiny_patch16_224", "model_args": TINY, **fields})
    return build_network(config, image_size=image_size, sizes=sizes)


# --- vision transformers


@pytest.mark.parametrize("first", ["row", "column"])
def test_fixed_positions_put_their_first_axis_in_the_first_half(first: Any) -> None:
    position = tiny(position="sincos", sincos_first=first).network.pos_embed
    assert not position.requires_grad
    assert position[0, 0].abs().max() == 0  # the class token has none
    torch.testing.assert_close(position[0, 1:], sincos_position((2, 2), 16, first=first))
    right_of_it = position[0, 1] - position[0, 2]
    unchanged = right_of_it[:8] if first == "row" else right_of_it[8:]
    changed = right_of_it[8:] if first == "row" else right_of_it[:8]
    assert unchanged.abs().max() == 0
    assert changed.abs().max() > 0.1


def test_positions_are_learned_or_absent() -> None:
    assert tiny().network.pos_embed.requires_grad
    network = tiny(position="none").network
    assert network.pos_embed is None
    images = torch.rand(1, 3, 8, 8)
    backbone = tiny(position="none").eval()
    swapped = torch.cat([images[..., 4:], images[..., :4]], dim=-1)
    torch.testing.assert_close(backbone(images).prefix, backbone(swapped).prefix)  # patches have no place


def test_a_frozen_patch_projection_is_random_and_does_not_train() -> None:
    projection = tiny(freeze_patch_projection=True, initialisation="xavier").network.patch_embed.proj
    assert not any(parameter.requires_grad for parameter in projection.parameters())
    assert projection.weight.std() > 0.01
    assert all(parameter.requires_grad for parameter in tiny().network.patch_embed.parameters())


def test_a_xavier_start_has_its_bounds_and_zero_biases() -> None:
    network = tiny(initialisation="xavier").network
    bounds = {
        "patch_embed.proj.weight": (6 / (3 * 16 + 16)) ** 0.5,
        "blocks.0.attn.qkv.weight": (6 / (16 + 16)) ** 0.5,
        "blocks.0.mlp.fc1.weight": (6 / (16 + 64)) ** 0.5,
    }
    for name, bound in bounds.items():
        largest = network.get_parameter(name).abs().max().item()
        assert 0.95 * bound < largest <= bound
    assert network.get_parameter("blocks.1.attn.qkv.bias").abs().max() == 0
    assert network.cls_token.abs().max() < 1e-4


def test_a_convolutional_stem_takes_the_place_of_the_projection() -> None:
    args = {**TINY, "patch_size": 16}
    backbone = tiny(stem="conv", model_args=args, image_size=32, initialisation="xavier", position="sincos")
    assert isinstance(backbone.network.patch_embed, ConvStem)
    assert all(
        type(part) is BatchNorm
        for part in backbone.modules()
        if isinstance(part, nn.modules.batchnorm._BatchNorm)
    )
    assert backbone(torch.rand(2, 3, 32, 32)).grid == (2, 2)
    assert all(parameter.requires_grad for parameter in backbone.network.patch_embed.parameters())


def test_without_the_final_norm_the_last_block_is_the_end() -> None:
    backbone, normed = tiny(final_norm=False).eval(), tiny().eval()
    images = torch.rand(2, 3, 8, 8)
    layer_norm = nn.LayerNorm(16, eps=1e-6)  # as it starts
    torch.testing.assert_close(layer_norm(backbone(images).all()), normed(images).all())
    assert not torch.allclose(backbone(images).all(), normed(images).all())


def test_drop_path_grows_to_the_last_block() -> None:
    network = tiny(drop_path=0.3, model_args={**TINY, "depth": 4}).network
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in network.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])


def test_the_recipe_makes_the_same_network_again() -> None:
    for fields in ({"position": "none"}, {"final_norm": False}, {"drop_path": 0.2}, {"position": "sincos"}):
        backbone = tiny(**fields)
        again = build_backbone(backbone.recipe)
        again.network.load_state_dict(backbone.network.state_dict())
        images = torch.rand(2, 3, 8, 8)
        assert torch.equal(again.eval()(images).all(), backbone.eval()(images).all())


def test_the_preprocessing_is_the_configured_one() -> None:
    backbone = tiny(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), crop_ratio=1.0, image_size=12)
    want = backbone.preprocessing
    assert (want.mean, want.std, want.image_size, want.crop_ratio) == (
        (0.1, 0.2, 0.3),
        (0.5, 0.6, 0.7),
        12,
        1.0,
    )


def test_further_sizes_are_taken_as_they_are() -> None:
    backbone = tiny(image_size=16, sizes=(8,))
    assert backbone(torch.rand(1, 3, 8, 8)).grid == (2, 2)
    assert backbone(torch.rand(1, 3, 16, 16)).grid == (4, 4)
    assert backbone(torch.rand(1, 3, 12, 12)).grid == (4, 4)  # any other is resized


@pytest.mark.parametrize("architecture", ["resnet10t", "swin_tiny_patch4_window7_224"])
def test_other_networks_pool_their_map(architecture: str) -> None:
    args = (
        {}
        if architecture == "resnet10t"
        else {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2}
    )
    backbone = tiny(architecture=architecture, model_args=args, pooling="patches", image_size=32)
    assert backbone.pooled(torch.rand(2, 3, 32, 32), "patches").shape == (2, backbone.embed_dim)
    norms = [part for part in backbone.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    assert {type(part) for part in norms} <= {BatchNorm}
    assert bool(norms) == (architecture == "resnet10t")


# --- what is refused


def test_a_resnet_with_the_settings_of_a_transformer_is_refused_once_for_all() -> None:
    needed = (
        "stem: patch, position: none, initialisation: timm, freeze_patch_projection: false, final_norm: true"
    )
    with pytest.raises(
        ConfigError, match=f"resnet10t is no vision transformer; it needs {needed}, pooling: patches"
    ):
        tiny(
            architecture="resnet10t",
            model_args={},
            stem="conv",
            position="sincos",
            initialisation="xavier",
            freeze_patch_projection=True,
            final_norm=False,
        )


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_args": {**TINY, "img_size": 12}}, "img_size is 12, but the views are 8 pixels wide"),
        ({"model_args": {**TINY, "num_classes": 10}}, "num_classes is 10: pretraining has no classes"),
        (
            {"model_args": {**TINY, "class_token": False, "global_pool": "avg"}},
            "pooling cls: vit_tiny_patch16_224 has no class token",
        ),
        ({"image_size": 10}, "image_size 10 is no multiple of the 4 pixels of a patch"),
        ({"architecture": "vit_tinny_patch16_224"}, "unknown timm model vit_tinny_patch16_224"),
        (
            {
                "stem": "conv",
                "model_args": {**TINY, "patch_size": 16},
                "image_size": 32,
                "freeze_patch_projection": True,
            },
            "stem conv has no single patch projection to freeze",
        ),
        ({"architecture": "vit_tiny_patch16_224", "model_args": {**TINY, "wide": 3}}, "refuses"),
    ],
)
def test_what_the_network_does_not_have_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        tiny(**fields)


# --- starting from weights


SMALL = {"embed_dim": 384, "depth": 1}


def mocov3_file(folder: Path) -> tuple[str, Backbone]:
    """A ViT-S one block deep in the layout of MoCo v3's checkpoints, which have 12 heads."""
    trained = small(num_heads=12, seed=1)
    state = {f"module.base_encoder.{key}": value for key, value in trained.network.state_dict().items()}
    state |= {
        f"module.momentum_encoder.{key}": value + 1 for key, value in trained.network.state_dict().items()
    }
    path = folder / "checkpoint.pth.tar"
    torch.save({"epoch": 300, "arch": "vit_small", "state_dict": state}, path)
    return str(path), trained


def small(*, num_heads: int, seed: int = 2, **fields: Any) -> Backbone:
    args = {**SMALL, "num_heads": num_heads}
    position = {"position": "sincos", "image_size": 32, "seed": seed}
    return tiny(**{"architecture": "vit_small_patch16_224", "model_args": args, **position, **fields})


def assert_equal_weights(found: Backbone, expected: Backbone) -> None:
    state = found.network.state_dict()
    assert state.keys() == expected.network.state_dict().keys()
    for key, value in expected.network.state_dict().items():
        assert torch.equal(state[key], value), key


def test_an_official_file_is_the_start(tmp_path: Path) -> None:
    path, trained = mocov3_file(tmp_path)
    started = small(num_heads=12, init=path, freeze_patch_projection=True)
    assert_equal_weights(started, trained)
    frozen = {name for name, parameter in started.network.named_parameters() if not parameter.requires_grad}
    assert frozen == {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}


def test_a_run_folder_is_the_start(tmp_path: Path) -> None:
    trained = tiny(seed=1)
    save_backbone(trained, tmp_path)
    started = tiny(seed=2, init=str(tmp_path))
    assert_equal_weights(started, trained)
    assert all(parameter.requires_grad for parameter in started.network.parameters())
    assert not torch.equal(tiny(seed=2).network.cls_token, trained.network.cls_token)


def test_weights_for_another_number_of_heads_are_refused(tmp_path: Path) -> None:
    path, _ = mocov3_file(tmp_path)
    with pytest.raises(WeightsError, match=r"attention has \[12\] heads in a block, this network \[6\]"):
        small(num_heads=6, init=path)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    save_backbone(tiny(model_args={**TINY, "depth": 3}), tmp_path / "deeper")
    with pytest.raises(WeightsError):
        tiny(init=str(tmp_path / "deeper"))
    save_backbone(tiny(model_args={**TINY, "embed_dim": 24}), tmp_path / "wider")
    with pytest.raises(WeightsError, match="does not fit the model"):
        tiny(init=str(tmp_path / "wider"))
