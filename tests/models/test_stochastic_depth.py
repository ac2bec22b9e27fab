"""Batched stochastic depth against a naive loop, its mean, and what it costs."""

import copy
from typing import Any

import pytest
import timm
import torch
from timm.models.beit import Beit
from torch import Tensor

from fdkit.errors import ConfigError
from fdkit.models.fast_beit import BatchedBlock, accelerate, use_batched_depth
from fdkit.models.stochastic_depth import draw_kept
from fdkit.models.student import StudentConfig, build_student
from fdkit.teachers.loading import load_teacher

SIZES: dict[str, Any] = {
    "img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 0,
    "global_pool": "token", "use_shared_rel_pos_bias": True, "use_rel_pos_bias": False,
}  # fmt: skip


def beit(rate: float = 0.5) -> Beit:
    torch.manual_seed(0)
    network: Beit = timm.create_model("beit_base_patch16_224", drop_path_rate=rate, **SIZES)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.2)
    return network.train()


def batched(rate: float = 0.5) -> Beit:
    network = beit(rate)
    accelerate(network)
    use_batched_depth(network)
    return network


def by_hand(network: Beit, images: Tensor, rates: list[float]) -> Tensor:
    """The network image by image: a dropped branch adds nothing, a kept one B / K times what it says."""
    x = network.patch_embed(images)
    x = torch.cat([network.cls_token.expand(len(x), -1, -1), x], dim=1)
    bias = network.rel_pos_bias()
    for block, rate in zip(network.blocks, rates, strict=True):
        num_kept = max(1, round(len(x) * (1 - rate)))
        kept = (
            [range(len(x))] * 2
            if rate == 0
            else [torch.randperm(len(x))[:num_kept].tolist() for _ in range(2)]
        )
        for branch, samples in zip((0, 1), kept, strict=True):
            rows = []
            for index, row in enumerate(x):
                if index not in samples:
                    rows.append(row)
                    continue
                norm, gamma = (block.norm1, block.gamma_1) if branch == 0 else (block.norm2, block.gamma_2)
                tokens = norm(row[None])
                out = block.attn(tokens, shared_rel_pos_bias=bias) if branch == 0 else block.mlp(tokens)
                scale = len(x) / len(samples)
                rows.append(row + (out if gamma is None else gamma * out)[0] * scale)
            x = torch.stack(rows)
    return network.norm(x)


def test_it_equals_a_loop_over_images_with_the_same_draws() -> None:
    network, plain = batched().double(), beit().double()
    images = torch.rand(7, 3, 32, 32, dtype=torch.float64)
    torch.manual_seed(5)
    found = network.forward_features(images)
    torch.manual_seed(5)
    wanted = by_hand(plain, images, [0.0, 0.25, 0.5])
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    found.square().mean().backward()
    wanted.square().mean().backward()
    gradients = dict(plain.named_parameters())
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=1e-8, atol=1e-10)


def test_the_mean_over_draws_is_that_of_bernoullis_depth() -> None:
    """Of one block: there both means are the undropped block's. Without the scale B / K the mean would be smaller."""
    torch.manual_seed(1)
    block = batched(0.6).blocks[2]
    assert isinstance(block, BatchedBlock)
    x = torch.randn(5, 17, 24)
    with torch.no_grad():
        plain = copy.deepcopy(block).eval()
        attended = plain.attn(plain.norm1(x), shared_rel_pos_bias=None)
        block.gamma_2.zero_() if block.gamma_2 is not None else block.mlp.fc2.weight.zero_()
        if block.gamma_2 is None:
            block.mlp.fc2.bias.zero_()
        branch = attended if plain.gamma_1 is None else plain.gamma_1 * attended
        mean = torch.stack([block(x) for _ in range(1500)]).mean(dim=0)
    error = (mean - x - branch).abs().mean() / branch.abs().mean()
    assert error < 0.06
    assert (mean - x - 0.4 * branch).abs().mean() / branch.abs().mean() > 0.4


@pytest.mark.parametrize(
    ("count", "rate", "kept"), [(10, 0.25, 8), (10, 0.0, 10), (3, 0.9, 1), (1, 0.5, 1), (8, 0.3, 6)]
)
def test_a_fixed_number_of_samples_is_drawn_without_repeats(count: int, rate: float, kept: int) -> None:
    torch.manual_seed(0)
    draws = [draw_kept(count, rate, torch.device("cpu")) for _ in range(400)]
    assert all(len(draw) == kept == len(set(draw.tolist())) for draw in draws)
    share = torch.stack([torch.bincount(draw, minlength=count) for draw in draws]).double().mean(dim=0)
    torch.testing.assert_close(
        share, torch.full((count,), kept / count, dtype=torch.float64), atol=0.1, rtol=0
    )


def test_in_evaluation_it_is_the_plain_network_and_a_copy_is_one_of_its_own() -> None:
    network, plain = batched().eval(), beit().eval()
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(
        network.forward_features(images), plain.forward_features(images), rtol=1e-5, atol=1e-5
    )
    assert network.state_dict().keys() == plain.state_dict().keys()
    network.blocks[1].compile(backend="eager")
    twin = copy.deepcopy(network)
    assert "_compiled_kept" in network.blocks[1].__dict__
    assert "_compiled_kept" not in twin.blocks[1].__dict__


def test_dropped_samples_cost_nothing() -> None:
    network = batched(0.5).double()
    seen: list[int] = []
    network.blocks[2].attn.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    network.forward_features(torch.rand(8, 3, 32, 32, dtype=torch.float64))
    assert seen == [4]


def test_only_where_it_is_built_and_has_an_effect() -> None:
    teacher = load_teacher("timm:vit_tiny_patch16_224", pretrained=False, image_size=32).backbone

    def build(**fields: Any) -> Any:
        return build_student(
            StudentConfig(drop_path_mode="batched", **fields), teacher, image_size=32, seed=0
        )

    blocks = build(depth=2).network.blocks
    assert [type(block) for block in blocks] == [BatchedBlock] * 2
    with pytest.raises(ConfigError, match="ResNet has no batched stochastic depth"):
        build(name="resnet18", drop_path=0.1)
    with pytest.raises(ConfigError, match="no effect with"):
        build(depth=2, drop_path=0.0)
