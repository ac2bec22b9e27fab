from typing import Any

import pytest
import timm
from torch import nn

from fdkit.errors import ConfigError
from fdkit.models.depth import layer_ids, list_blocks
from fdkit.models.libraries import build_timm

VIT: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}
SWIN: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 2,
    "embed_dim": 8,
    "num_heads": [2, 2, 4],
    "window_size": 4,
}


def network(name: str, **args: Any) -> nn.Module:
    return build_timm(name, {"num_classes": 5, **args}).network


def test_a_vits_embeddings_come_first_its_blocks_follow_and_all_else_is_last() -> None:
    ids, last = layer_ids(network("vit_base_patch16_clip_224", **VIT))
    assert last == 4
    first = {"cls_token", "pos_embed", "patch_embed.proj.weight", "norm_pre.weight", "norm_pre.bias"}
    assert {name for name, layer in ids.items() if layer == 0} == first
    for block in range(3):
        assert {ids[name] for name in ids if name.startswith(f"blocks.{block}.")} == {block + 1}
    assert {name for name, layer in ids.items() if layer == 4} == {
        "norm.weight", "norm.bias", "head.weight", "head.bias",
    }  # fmt: skip


def test_a_shared_bias_table_belongs_to_the_end_and_a_blocks_own_to_its_block() -> None:
    shared = {**VIT, "global_pool": "avg", "use_abs_pos_emb": False}
    ids, last = layer_ids(
        network("beit_base_patch16_224", **shared, use_shared_rel_pos_bias=True, use_rel_pos_bias=False)
    )
    assert ids["rel_pos_bias.relative_position_bias_table"] == last == 4
    ids, last = layer_ids(network("beit_base_patch16_224", **shared))
    assert [ids[f"blocks.{i}.attn.relative_position_bias_table"] for i in range(3)] == [1, 2, 3]
    assert ids["fc_norm.weight"] == last


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"])
def test_a_swins_blocks_count_on_across_stages_and_merging_belongs_to_the_block_before(name: str) -> None:
    swin = network(name, **SWIN, depths=[1, 2, 1])
    ids, last = layer_ids(swin)
    assert last == 5
    expected = {
        "patch_embed.": 0,
        "layers.0.blocks.0.": 1,
        "layers.1.downsample.": 1,
        "layers.1.blocks.0.": 2,
        "layers.1.blocks.1.": 3,
        "layers.2.downsample.": 3,
        "layers.2.blocks.0.": 4,
        "norm.": 5,
        "head.": 5,
    }
    for prefix, layer in expected.items():
        found = {ids[key] for key in ids if key.startswith(prefix)}
        assert found == {layer}, prefix
    assert sum(key.startswith(tuple(expected)) for key in ids) == len(ids)
    assert len(list_blocks(swin)) == 4


def test_other_networks_are_grouped_by_timms_stages() -> None:
    ids, last = layer_ids(network("convnext_atto", depths=[1, 1, 1, 1], dims=[8, 8, 16, 16]))
    assert last == 5
    assert (ids["stem.0.weight"], ids["stages.2.downsample.1.weight"], ids["head.fc.weight"]) == (0, 3, 5)
    ids, last = layer_ids(network("resnet10t"))
    assert (ids["conv1.0.weight"], ids["layer4.0.conv1.weight"], ids["fc.weight"], last) == (0, 4, 5, 5)


def test_every_parameter_has_a_layer() -> None:
    for made in (
        network("vit_tiny_patch16_224", **VIT),
        network("resnet10t"),
        network("swin_tiny_patch4_window7_224", **SWIN, depths=[1, 1, 1]),
    ):
        ids, last = layer_ids(made)
        assert ids.keys() == dict(made.named_parameters()).keys()
        assert set(ids.values()) <= set(range(last + 1))


def test_unknown_layers_and_blocks_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"layer_decay: the layers of Linear are not known"):
        layer_ids(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="ResNet has no transformer blocks"):
        list_blocks(timm.create_model("resnet10t"))
