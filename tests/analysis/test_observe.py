import math
import weakref
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from fdkit.analysis.observe import Attention, num_attended_prefix_tokens, observe_attention
from fdkit.errors import ConfigError
from fdkit.models.libraries import build_open_clip, build_timm
from fdkit.teachers.teacher import Teacher

BATCH = 2


def vit():
    return build_timm("vit_tiny_patch16_224", {"depth": 3, "img_size": 64, "embed_dim": 48})


def vit_with_registers():
    return build_timm("vit_tiny_patch16_224", {"depth": 3, "img_size": 64, "embed_dim": 48, "reg_tokens": 4})


def vit_with_registers_alone():
    args = {"depth": 3, "img_size": 64, "embed_dim": 48, "num_heads": 3}
    return build_timm("vit_little_patch16_reg1_gap_256", args)


def beit(shared: bool):
    args = {"depth": 3, "img_size": 64, "embed_dim": 48, "num_heads": 3, "init_values": 0.1}
    bias = {"use_shared_rel_pos_bias": shared, "use_rel_pos_bias": not shared, "use_abs_pos_emb": False}
    backbone = build_timm("beit_base_patch16_224", args | bias)
    for name, parameter in backbone.network.named_parameters():
        if "relative_position_bias_table" in name:
            nn.init.normal_(parameter)
    return backbone


def dinov3():
    return build_timm(
        "vit_small_patch16_dinov3", {"depth": 3, "img_size": 64, "embed_dim": 48, "num_heads": 3}
    )


def timm_clip():
    return build_timm(
        "vit_base_patch32_clip_224", {"depth": 3, "img_size": 96, "embed_dim": 48, "num_heads": 3}
    )


@cache
def open_clip():
    backbone = build_open_clip("ViT-B-32", {"image_size": 64})
    blocks = backbone.network.transformer
    blocks.resblocks = blocks.resblocks[:3]
    return backbone.eval()


BUILDERS = {
    "vit": vit,
    "registers": vit_with_registers,
    "registers without class token": vit_with_registers_alone,
    "beit, shared bias": lambda: beit(shared=True),
    "beit, a bias a block": lambda: beit(shared=False),
    "dinov3": dinov3,
    "clip of timm": timm_clip,
    "clip of open_clip": open_clip,
}


@pytest.fixture(params=BUILDERS, ids=str)
def backbone(request):
    return BUILDERS[request.param]().eval()


def images_for(backbone) -> Tensor:
    size = backbone.image_size
    return torch.rand(BATCH, 3, size, size)


def observe(backbone, images: Tensor) -> list[Tensor]:
    seen: list[Tensor] = []
    observe_attention(backbone, images, lambda layer, one: seen.append(one.weights[:, 0].clone()))
    return seen


def test_observing_changes_neither_output_nor_model(backbone):
    images = images_for(backbone)
    with torch.no_grad():
        fused = backbone(images)
    watched = observe_attention(backbone, images, lambda layer, attention: None)
    with torch.no_grad():
        after = backbone(images)
    torch.testing.assert_close(watched.all(), fused.all(), rtol=1e-5, atol=1e-5)
    assert torch.equal(after.all(), fused.all())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in backbone.modules())


def test_attention_is_a_distribution_over_all_tokens(backbone):
    seen = observe(backbone, images_for(backbone))
    side = backbone.image_size // backbone.patch_size
    num_tokens = num_attended_prefix_tokens(backbone) + side * side
    assert len(seen) == 3
    for attention in seen:
        assert attention.shape[0] == BATCH
        assert attention.shape[2:] == (num_tokens, num_tokens)
        torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:3]))


def by_hand(q: Tensor, k: Tensor, num_heads: int, bias: Tensor | float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias), an image, a head and a query at a time; q, k: (B, N, C)."""
    head_dim = q.shape[-1] // num_heads
    result = torch.empty(len(q), num_heads, q.shape[1], k.shape[1])
    bias = torch.broadcast_to(torch.as_tensor(bias), result.shape[1:])
    for image in range(len(q)):
        for head in range(num_heads):
            part = slice(head * head_dim, (head + 1) * head_dim)
            for query in range(q.shape[1]):
                logits = k[image, :, part] @ q[image, query, part] / math.sqrt(head_dim) + bias[head, query]
                result[image, head, query] = (logits - logits.logsumexp(0)).exp()
    return result


def inputs_of(modules: list[nn.Module], backbone, images: Tensor) -> list[Tensor]:
    seen: list[Tensor] = []
    handles = [m.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach())) for m in modules]
    with torch.no_grad():
        backbone(images)
    for handle in handles:
        handle.remove()
    return seen


def assert_same_attention(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("build", [vit, vit_with_registers, timm_clip])
@torch.no_grad()
def test_vit_attention_equals_one_made_from_queries_and_keys(build):
    backbone = build().eval()
    images = images_for(backbone)
    modules = [block.attn for block in backbone.network.blocks]
    for module in modules:
        module.qkv.weight.mul_(8)  # far from uniform, so that a wrong scale shows
    expected = []
    for module, x in zip(modules, inputs_of(modules, backbone, images), strict=True):
        q, k, _ = module.qkv(x).chunk(3, dim=-1)
        expected.append(by_hand(q, k, module.num_heads))
    assert_same_attention(observe(backbone, images), expected)


def bias_by_hand(table: Tensor, side: int) -> Tensor:
    """(H, N, N) from the table of offsets; the last three rows are class-to-patch, patch-to-class, class-to-class."""
    num_patches, width = side * side, 2 * side - 1
    bias = torch.empty(table.shape[1], num_patches + 1, num_patches + 1)
    bias[:, 0, :], bias[:, :, 0], bias[:, 0, 0] = table[-3, :, None], table[-2, :, None], table[-1]
    for query in range(num_patches):
        for key in range(num_patches):
            rows, columns = query // side - key // side, query % side - key % side
            bias[:, query + 1, key + 1] = table[(rows + side - 1) * width + columns + side - 1]
    return bias


@pytest.mark.parametrize("shared", [True, False])
@torch.no_grad()
def test_beit_attention_includes_its_relative_position_bias(shared):
    backbone = beit(shared).eval()
    images = images_for(backbone)
    modules = [block.attn for block in backbone.network.blocks]
    expected = []
    for module, x in zip(modules, inputs_of(modules, backbone, images), strict=True):
        owner = backbone.network.rel_pos_bias if shared else module
        q, k, _ = (x @ module.qkv.weight.T).chunk(3, dim=-1)
        bias = bias_by_hand(owner.relative_position_bias_table, side=4)
        expected.append(by_hand(q + module.q_bias, k, module.num_heads, bias))
    assert_same_attention(observe(backbone, images), expected)


@torch.no_grad()
def test_open_clip_attention_equals_one_made_from_queries_and_keys():
    backbone = open_clip()
    images = images_for(backbone)
    modules = [block.attn for block in backbone.network.transformer.resblocks]
    expected = []
    for module, x in zip(modules, inputs_of(modules, backbone, images), strict=True):
        q, k, _ = (x @ module.in_proj_weight.T + module.in_proj_bias).chunk(3, dim=-1)
        expected.append(by_hand(q, k, module.num_heads))
    assert_same_attention(observe(backbone, images), expected)


def test_no_more_than_one_attention_is_alive(backbone):
    earlier: list[weakref.ref] = []

    def visit(layer: int, attention: Attention) -> None:
        assert layer == len(earlier)
        assert all(one() is None for one in earlier)
        earlier.append(weakref.ref(attention.weights.untyped_storage()))

    observe_attention(backbone, images_for(backbone), visit)
    assert len(earlier) == 3


def test_a_model_in_training_is_observed_in_evaluation_and_left_training():
    backbone = build_timm("vit_tiny_patch16_224", {"depth": 2, "img_size": 64, "attn_drop_rate": 0.5}).train()
    backbone.network.blocks[0].eval()
    images = images_for(backbone)
    torch.testing.assert_close(observe(backbone, images), observe(backbone, images))
    assert backbone.network.blocks[1].attn.training
    assert not backbone.network.blocks[0].attn.training


def test_a_failing_visit_leaves_the_model_as_it_was(backbone):
    fused_before = [getattr(module, "fused_attn", None) for module in backbone.modules()]

    def fail(layer: int, attention: Attention) -> None:
        raise RuntimeError("visitor broke")

    backbone.train()
    with pytest.raises(RuntimeError, match="visitor broke"):
        observe_attention(backbone, images_for(backbone), fail)
    assert [getattr(module, "fused_attn", None) for module in backbone.modules()] == fused_before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in backbone.modules())
    assert backbone.training


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("resnet18", {}, "ResNet has no attention to observe"),
        ("hiera_tiny_224", {}, "the attention of MaskUnitAttention cannot be read"),
    ],
)
def test_unreadable_attention_is_refused(name, args, message):
    backbone = build_timm(name, args)
    with pytest.raises(ConfigError, match=message):
        observe(backbone, images_for(backbone)[:1])


def test_a_teacher_is_observed_like_its_backbone():
    backbone = vit()
    images = images_for(backbone)
    assert_same_attention(observe(Teacher(backbone, name="t"), images), observe(backbone, images))
