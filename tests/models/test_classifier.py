import json
import logging
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from fdkit.errors import ConfigError
from fdkit.models.backbone import Backbone
from fdkit.models.classifier import SHARED_TABLE, build_classifier, head_of
from fdkit.models.libraries import build_open_clip, build_timm, save_backbone
from fdkit.teachers.loading import load_teacher

CLASSES = ("hat", "shirt", "shoe")
SMALL: dict[str, Any] = {"img_size": 24, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
SWIN: dict[str, Any] = {
    "img_size": 32, "patch_size": 2, "embed_dim": 8, "num_heads": [2, 4], "window_size": 4, "depths": [1, 2]
}  # fmt: skip
SHARED: dict[str, Any] = {
    "global_pool": "token", "use_shared_rel_pos_bias": True, "use_rel_pos_bias": False, "use_abs_pos_emb": False
}  # fmt: skip


def pretrained(name: str, args: dict[str, Any]) -> Backbone:
    """A network whose every parameter is random, as after a training."""
    backbone = build_timm(name, args)
    with torch.no_grad():
        for parameter in backbone.network.parameters():
            parameter.normal_(std=0.2)
    return backbone.eval().requires_grad_(False)


def images(side: int, count: int = 2) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(5))


def with_random_head(backbone: Backbone) -> Backbone:
    for layer in head_of(backbone.network):
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    return backbone.eval()


VITS = [
    ("vit_tiny_patch16_224", SMALL),
    ("vit_base_patch16_clip_224", SMALL),
    ("vit_tiny_patch16_224", {**SMALL, "reg_tokens": 2}),
    ("beit_base_patch16_224", {**SMALL, **SHARED}),
    ("eva02_tiny_patch14_224", {**SMALL, "global_pool": "token"}),
]


@pytest.mark.parametrize(("name", "args"), VITS)
def test_the_mean_of_the_patches_goes_through_a_new_norm(
    name: str, args: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Pooled before the norm, without prefix tokens; the pretrained final norm has no say."""
    before = pretrained(name, args)
    caplog.set_level(logging.INFO, logger="fdkit")
    made = with_random_head(build_classifier(before, CLASSES))
    assert "fc_norm begins anew; the pretrained final norm is left out" in caplog.text
    old: Any = before.network
    old.norm = nn.Identity()
    x = before.normalise(images(24))
    tokens = old.forward_features(x)
    (head,) = head_of(made.network)
    patches = tokens[:, -9:].double().mean(dim=1)
    centred = patches - patches.mean(dim=1, keepdim=True)
    normed = centred / (centred.square().mean(dim=1, keepdim=True) + made.network.fc_norm.eps).sqrt()  # type: ignore[union-attr,operator]
    expected = normed @ head.weight.double().T + head.bias.double()
    torch.testing.assert_close(made.logits(images(24)).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "args"), VITS)
def test_the_class_token_keeps_the_pretrained_norm(name: str, args: dict[str, Any]) -> None:
    before = pretrained(name, args)
    made = with_random_head(build_classifier(before, CLASSES, pooling="cls"))
    (head,) = head_of(made.network)
    token = before(images(24)).prefix[:, 0]
    torch.testing.assert_close(made.logits(images(24)), head(token), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(made(images(24)).all(), before(images(24)).all(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", [24, 40])
def test_a_table_for_each_block_changes_no_token_and_each_is_its_own(side: int) -> None:
    before = pretrained("beit_base_patch16_224", {**SMALL, **SHARED, "img_size": side})
    own = build_classifier(before, CLASSES, pooling="cls").eval()
    shared = build_classifier(before, CLASSES, pooling="cls", per_block_bias=False).eval()
    x = images(side)
    torch.testing.assert_close(own(x).all(), before(x).all(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(shared(x).all(), before(x).all(), rtol=1e-5, atol=1e-6)
    assert SHARED_TABLE in shared.network.state_dict()
    tables = [
        parameter
        for name, parameter in own.network.named_parameters()
        if name.endswith("relative_position_bias_table")
    ]
    assert len(tables) == 2
    assert tables[0].data_ptr() != tables[1].data_ptr()
    assert all(torch.equal(table, before.network.state_dict()[SHARED_TABLE]) for table in tables)
    own(x).all().square().sum().backward()
    assert all(table.grad is not None and table.grad.abs().sum() > 0 for table in tables)
    assert not torch.equal(tables[0].grad, tables[1].grad)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("swin_tiny_patch4_window7_224", SWIN),
        ("swinv2_tiny_window8_256", SWIN),
        ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16], "img_size": 32}),
        ("resnet10t", {"img_size": 32, "channels": [8, 8, 16, 16], "stem_width": 4}),
    ],
)
def test_other_networks_keep_all_they_have_and_pool_as_in_timm(name: str, args: dict[str, Any]) -> None:
    before = pretrained(name, args)
    made = with_random_head(build_classifier(before, CLASSES, drop_path=0.1))
    state = before.network.state_dict()
    own = made.network.state_dict()
    (head,) = head_of(made.network)
    assert {key for key in own if key not in state} == {
        key
        for key, tensor in made.network.state_dict(keep_vars=True).items()
        if tensor is head.weight or tensor is head.bias
    }
    assert all(torch.equal(own[key], state[key]) for key in state)
    x = before.normalise(images(32))
    network: Any = before.network
    pooled = network.forward_head(network.forward_features(x))
    torch.testing.assert_close(made.logits(images(32)), head(pooled), rtol=1e-4, atol=1e-5)


def test_attention_pooling_is_left_out_with_the_rest_of_the_old_end() -> None:
    before = pretrained("vit_base_patch16_siglip_224", SMALL)
    assert any(key.startswith("attn_pool.") for key in before.network.state_dict())
    made = build_classifier(before, CLASSES)
    assert not any(key.startswith("attn_pool.") for key in made.network.state_dict())
    assert torch.equal(made.network.blocks[1].mlp.fc2.weight, before.network.blocks[1].mlp.fc2.weight)  # type: ignore[union-attr,index]


def test_a_network_without_a_final_norm_gets_one() -> None:
    args = {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16], "img_size": 32, "final_norm": False}
    made = build_classifier(pretrained("convnextv2_atto", args), CLASSES)
    assert torch.equal(made.network.head.norm.weight, torch.ones(16))  # type: ignore[union-attr]


def test_a_norm_behind_the_mean_is_kept_when_a_classifier_is_tuned_again() -> None:
    first = build_classifier(pretrained("vit_tiny_patch16_224", SMALL), ("a", "b", "c", "d"))
    nn.init.normal_(first.network.fc_norm.weight)  # type: ignore[union-attr,arg-type]
    again = build_classifier(first, CLASSES)
    assert torch.equal(again.network.fc_norm.weight, first.network.fc_norm.weight)  # type: ignore[union-attr,arg-type]
    assert head_of(again.network)[0].weight.shape == (3, 24)
    assert again.recipe["classes"] == list(CLASSES)


def test_both_heads_of_a_distilled_vit_begin_anew() -> None:
    before = pretrained("deit_tiny_distilled_patch16_224", SMALL)
    made = build_classifier(before, CLASSES, pooling="cls", head_scale=0.5)
    assert len(head_of(made.network)) == 2
    assert all(0.005 < layer.weight.std() < 0.015 for layer in head_of(made.network))


def test_the_head_begins_as_asked_for_the_seed_decides_and_nothing_else_is_drawn_from() -> None:
    before = pretrained("vit_tiny_patch16_224", {**SMALL, "embed_dim": 96})
    classes = [str(number) for number in range(40)]
    state = torch.get_rng_state()
    heads = [
        head_of(build_classifier(before, classes, head_std=std, head_scale=scale, seed=seed).network)[0]
        for std, scale, seed in ((0.02, 1.0, 1), (0.02, 1e-3, 1), (2e-5, 1.0, 1), (0.02, 1.0, 2))
    ]
    assert torch.equal(torch.get_rng_state(), state)
    deviations = [float(head.weight.detach().std()) for head in heads]
    assert deviations == pytest.approx([0.02, 2e-5, 2e-5, 0.02], rel=0.05)
    torch.testing.assert_close(heads[1].weight, heads[0].weight * 1e-3)
    assert not torch.equal(heads[3].weight, heads[0].weight)
    assert all(not head.bias.any() for head in heads)


def test_from_scratch_is_the_same_network_with_weights_of_its_own() -> None:
    before = pretrained("beit_base_patch16_224", {**SMALL, **SHARED})
    tuned, scratch = (build_classifier(before, CLASSES, keep_weights=keep) for keep in (True, False))
    states = [made.network.state_dict() for made in (tuned, scratch)]
    assert {key: value.shape for key, value in states[0].items()} == {
        key: value.shape for key, value in states[1].items()
    }
    assert tuned.recipe == scratch.recipe
    assert not torch.equal(states[0]["patch_embed.proj.weight"], states[1]["patch_embed.proj.weight"])
    assert torch.equal(
        states[0]["patch_embed.proj.weight"], before.network.state_dict()["patch_embed.proj.weight"]
    )


def test_what_is_saved_loads_into_timm_and_as_a_model_with_its_logits(tmp_path: Path) -> None:
    made = with_random_head(
        build_classifier(pretrained("beit_base_patch16_224", {**SMALL, **SHARED}), CLASSES, drop_path=0.1)
    )
    save_backbone(made, tmp_path)
    recipe = json.loads((tmp_path / "student.json").read_text())
    assert recipe["classes"] == list(CLASSES)
    network = timm.create_model(recipe["architecture"], **recipe["model_args"]).eval()
    network.load_state_dict(safetensors.torch.load_file(tmp_path / "student.safetensors"), strict=True)
    expected = made.logits(images(24))
    torch.testing.assert_close(network(made.normalise(images(24))), expected, rtol=1e-4, atol=1e-5)
    teacher = load_teacher(str(tmp_path), keep_head=True)
    torch.testing.assert_close(teacher.backbone.logits(images(24)), expected, rtol=1e-4, atol=1e-5)


def test_stochastic_depth_grows_to_what_was_asked_for() -> None:
    made = build_classifier(pretrained("vit_tiny_patch16_224", SMALL), CLASSES, drop_path=0.3)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in made.network.blocks]  # type: ignore[union-attr]
    assert rates == pytest.approx([0.0, 0.3])


def test_what_cannot_be_a_classifier_is_refused() -> None:
    with pytest.raises(ConfigError, match="resnet10t has no class token"):
        build_classifier(pretrained("resnet10t", {"img_size": 32}), CLASSES, pooling="cls")
    with pytest.raises(ConfigError, match="drop_path_rate") as caught:
        build_classifier(build_timm("vgg11", {}), CLASSES, drop_path=0.1)
    assert "drop-path 0" in caught.value.hint
    with pytest.raises(
        ConfigError, match="pooling patches: deit_tiny_distilled_patch16_224 has heads on its class"
    ):
        build_classifier(pretrained("deit_tiny_distilled_patch16_224", SMALL), CLASSES)
    with pytest.raises(ConfigError, match="Identity has no linear classifier"):
        head_of(nn.Identity())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "args"),
    [("ViT-S-32-alt", {"image_size": 64}), ("ViT-S-32-alt", {"image_size": 64, "quick_gelu": True})],
)
def test_an_open_clip_tower_becomes_the_timm_network_that_says_the_same(
    arch: str, args: dict[str, Any]
) -> None:
    from fdkit.methods._timm_tower import as_timm

    tower = build_open_clip(arch, args).eval()
    with torch.no_grad():
        for parameter in tower.network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    twin = as_timm(tower)
    assert twin.recipe["library"] == "timm"
    torch.testing.assert_close(twin.eval()(images(64)).all(), tower(images(64)).all(), rtol=1e-3, atol=1e-3)
    with pytest.raises(ConfigError, match="not of timm"):
        build_classifier(tower, CLASSES)
