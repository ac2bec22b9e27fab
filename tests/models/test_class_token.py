"""The shortened last block, held against timm's own path through the whole network."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.layers import QuickGELU, RmsNorm, SwiGLU
from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock
from torch import Tensor, nn

from fdkit.models.backbone import Backbone
from fdkit.models.class_token import class_token, has_fast_class_token
from fdkit.models.libraries import build_timm
from fdkit.models.stochastic_depth import add_stochastic_depth
from fdkit.models.tokens import timm_tokens

TINY = {"img_size": 12, "patch_size": 4, "embed_dim": 12, "depth": 3, "num_heads": 3}


def tiny(**args: Any) -> Backbone:
    """A ViT whose every parameter counts, in double precision and training mode."""
    torch.manual_seed(0)
    backbone = build_timm("vit_tiny_patch16_224", {**TINY, **args})
    for parameter in backbone.network.parameters():
        nn.init.normal_(parameter, std=0.5)
    return backbone.double().train()


def images(size: int = 12, batch: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(batch, 3, size, size, dtype=torch.float64, generator=generator)


def outcome(
    network: nn.Module, inputs: Tensor, compute: Callable[[nn.Module, Tensor], Tensor], *, seed: int = 3
) -> dict[str, Tensor]:
    """The class token, and the gradients of a loss of it that treats no channel as another."""
    network.zero_grad()
    inputs = inputs.clone().requires_grad_()
    torch.manual_seed(seed)
    token = compute(network, inputs)
    (token * torch.arange(1, token.numel() + 1, dtype=token.dtype).view_as(token)).sum().backward()
    gradients = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    return {"token": token.detach(), "images": inputs.grad, **gradients}


def plainly(network: nn.Module, inputs: Tensor) -> Tensor:
    return timm_tokens(network, inputs).prefix[:, 0]


FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "layer_scale": {"init_values": 0.3},
    "query_key_norm": {"qk_norm": True},
    "no_qkv_bias": {"qkv_bias": False},
    "registers": {"reg_tokens": 2},
    "registers_without_position": {"reg_tokens": 2, "no_embed_class": True},
    "norm_before_and_rms": {"pre_norm": True, "norm_layer": RmsNorm},
    "gated_mlp": {"mlp_layer": SwiGLU},
    "norms_inside": {"scale_attn_norm": True, "scale_mlp_norm": True, "act_layer": QuickGELU},
    "norm_after_pool": {"global_pool": "avg", "fc_norm": True},
    "no_norm": {"final_norm": False},
    "conv_stem": {"patch_size": 16, "img_size": 32, "embed_dim": 24, "stem": "conv"},
    "one_block": {"depth": 1},
}


@pytest.mark.parametrize("is_fused", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_the_class_token_and_all_gradients_are_those_of_the_whole_network(form: str, is_fused: bool) -> None:
    network = tiny(**FORMS[form]).network
    for module in network.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = is_fused
    assert has_fast_class_token(network)
    inputs = images(FORMS[form].get("img_size", 12))
    expected = outcome(copy.deepcopy(network), inputs, plainly)
    found = outcome(network, inputs, class_token)
    assert found.keys() == expected.keys() >= {name for name, _ in network.named_parameters()}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("is_training", [True, False])
def test_a_gate_on_the_attention_is_read_for_the_class_token(is_training: bool) -> None:
    network: Any = tiny().network
    for block in network.blocks:
        block.attn.gate = nn.Linear(12, 12).double()
    network.train(is_training)
    torch.testing.assert_close(class_token(network, images()), plainly(network, images()))


@pytest.mark.parametrize("form", ["timm", "constant"])
def test_stochastic_depth_drops_the_same_samples(form: str) -> None:
    network = tiny(drop_path_rate=0.6 if form == "timm" else 0.0).network
    if form == "constant":
        add_stochastic_depth(network, 0.6)
    tokens = []
    for seed in range(4):
        expected = outcome(network, images(batch=6), plainly, seed=seed)
        found = outcome(network, images(batch=6), class_token, seed=seed)
        tokens.append(found["token"])
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9, msg=name)
    assert not torch.allclose(tokens[0], tokens[1])


def test_another_query_is_another_token() -> None:
    """A query of the second token, as one row too far would be, is told apart."""
    network: Any = tiny().network

    def shifted(network: Any, inputs: Tensor) -> Tensor:
        network.blocks[-1].attn.register_forward_hook(lambda module, args, output: output.roll(1, dims=1))
        return plainly(network, inputs)

    wrong = outcome(copy.deepcopy(network), images(), shifted)
    assert not torch.allclose(outcome(network, images(), class_token)["token"], wrong["token"], rtol=1e-3)


def test_half_precision_is_within_its_rounding() -> None:
    network = tiny().network.float()
    inputs = images().float()
    exact = class_token(network, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens = class_token(network, inputs), plainly(network, inputs)
    assert tokens[0].dtype == tokens[1].dtype
    errors = [(token.float() - exact).norm() / exact.norm() for token in tokens]
    assert errors[0] < 1.5 * errors[1] < 0.1


def count_calls(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the sequences that the last block's MLP works on from now on."""
    lengths: list[int] = []
    forward = nn.Linear.forward
    watched = backbone.network.blocks[-1].mlp.fc1

    def counting(layer: nn.Linear, rows: Tensor) -> Tensor:
        if layer is watched:
            lengths.append(rows.shape[1])
        return forward(layer, rows)

    monkeypatch.setattr(nn.Linear, "forward", counting)
    return lengths


def test_a_backbone_takes_the_short_way_for_the_class_token_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny()
    lengths = count_calls(backbone, monkeypatch)
    tokens = backbone(images())
    torch.testing.assert_close(backbone.pooled(images(), "cls"), tokens.prefix[:, 0])
    torch.testing.assert_close(backbone.pooled(images(), "patches"), tokens.patches.mean(dim=1))
    assert lengths == [10, 1, 10]


def checkpointed(network: Any) -> None:
    network.set_grad_checkpointing(True)


def hook(*path: str) -> Callable[[nn.Module], None]:
    return lambda network: (
        network.get_submodule(".".join(path)).register_forward_hook(lambda *_: None) and None
    )


def own_forward(network: Any) -> None:
    network.blocks[-1].attn.forward = network.blocks[-1].attn.forward


def parametrised(network: Any) -> None:
    nn.utils.parametrizations.weight_norm(network.blocks[-1].attn.qkv)


def batch_norm_inside(network: Any) -> None:
    network.blocks[-1].norm2 = nn.BatchNorm1d(10).double()


def own_features(network: Any) -> None:
    network.forward_features = lambda inputs: inputs


@pytest.mark.parametrize(
    "change",
    [
        checkpointed,
        hook("blocks"),
        hook("blocks", "2"),
        hook("blocks", "2", "attn"),
        hook("blocks", "2", "mlp", "fc2"),
        hook("norm"),
        own_forward,
        parametrised,
        batch_norm_inside,
        own_features,
    ],
)
def test_a_network_that_somebody_looks_into_or_changed_goes_the_whole_way(
    change: Callable[[nn.Module], None],
) -> None:
    network = tiny().network
    assert has_fast_class_token(network)
    change(network)
    assert not has_fast_class_token(network)


def test_hooks_elsewhere_see_what_they_always_saw() -> None:
    network = tiny().network
    seen: list[Tensor] = []
    network.blocks[1].register_forward_hook(lambda module, args, output: seen.append(output))
    assert has_fast_class_token(network)
    plainly(network, images())
    class_token(network, images())
    assert torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("args", [{"proj_drop_rate": 0.1}, {"attn_drop_rate": 0.1}])
def test_dropout_of_values_goes_the_whole_way_in_training_alone(args: dict[str, float]) -> None:
    network = tiny(**args).network
    assert not has_fast_class_token(network)
    assert has_fast_class_token(network.eval())
    torch.testing.assert_close(class_token(network, images()), plainly(network, images()))


@pytest.mark.parametrize(
    "args",
    [
        {"block_fn": ResPostBlock},
        {"block_fn": ParallelScalingBlock},
        {"attn_layer": "diff"},
        {"class_token": False, "global_pool": "avg"},
        {"patch_drop_rate": 0.5},
    ],
)
def test_other_blocks_and_tokens_go_the_whole_way(args: dict[str, Any]) -> None:
    assert not has_fast_class_token(tiny(**args).network)


@pytest.mark.parametrize(
    "name", ["resnet10t", "test_vit3", "beit_base_patch16_224", "eva02_tiny_patch14_224"]
)
def test_other_networks_go_the_whole_way(name: str) -> None:
    with torch.device("meta"):
        assert not has_fast_class_token(timm.create_model(name))
