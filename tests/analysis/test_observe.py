import math
import weakref
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from fdkit.analysis import (
    attention_distance,
    attention_entropy,
    attention_maps,
    attention_rollout,
    class_attention,
    head_similarity,
)
from fdkit.analysis._attention import LayerMeans, measure
from fdkit.analysis.observe import Attention, Images, num_attended_prefix_tokens, observe_attention, on_map
from fdkit.errors import ConfigError, NumericsError
from fdkit.models.libraries import build_open_clip, build_timm
from fdkit.teachers.teacher import Teacher
from tests.attention_cases import observed, random_attention, tiny, tiny_swin, windows

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


STATISTICS = {
    "distance": (attention_distance, attention_distance.AttentionDistanceConfig()),
    "similarity": (head_similarity, head_similarity.HeadSimilarityConfig()),
    "maps": (attention_maps, attention_maps.AttentionMapsConfig()),
    "entropy": (attention_entropy, attention_entropy.AttentionEntropyConfig()),
    "class": (class_attention, class_attention.ClassAttentionConfig(query="mean")),
    "rollout": (attention_rollout, attention_rollout.AttentionRolloutConfig()),
}


@pytest.mark.parametrize("make", [tiny, tiny_swin])
def test_statistics_that_share_a_pass_find_what_each_finds_alone(make):
    one = observed(model=make(), count=3, sizes=2)
    kinds = [kind for kind in STATISTICS.values() if make is tiny or kind is not STATISTICS["rollout"]]
    together = measure(one, [module.statistic(one, config) for module, config in kinds], kinds[0][1])
    for table, (module, config) in zip(together, kinds, strict=True):
        assert module.collect([table], config).numbers == module.analyze([one], config).numbers
        assert (table["name"], table["num_images"], table["image_size"]) == ("m", 3, one.model.image_size)


@pytest.mark.parametrize("kind", STATISTICS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_statistics_read_any_precision(kind, dtype):
    module, config = STATISTICS[kind]
    model = tiny()
    plain = module.analyze([observed(model=model)], config).numbers["models"][0]
    other = module.analyze([observed(model=model.to(dtype))], config).numbers["models"][0]
    tolerance = 0.1 if dtype == torch.bfloat16 else 1e-4
    for name, value in module.scalars(plain).items():
        assert module.scalars(other)[name] == pytest.approx(value, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("kind", STATISTICS)
def test_statistics_keep_no_attention(kind):
    module, config = STATISTICS[kind]
    one = observed(count=4, sizes=1)
    gathered = module.statistic(one, config)
    alive: list[weakref.ref] = []

    def visit(layer: int, attention: Attention) -> None:
        gathered.add(layer, attention)
        alive.append(weakref.ref(attention.weights.untyped_storage()))

    for images in one.batches:
        gathered.begin(images)
        tokens = observe_attention(one.model, images.pixels, visit)
        if hasattr(gathered, "end"):
            gathered.end(tokens)
        assert all(storage() is None for storage in alive)


def test_an_image_that_is_not_finite_is_refused():
    one = observed(count=4, sizes=4)
    pixels = one.batches[0].pixels.clone()
    pixels[3, :, 5, 5] = math.nan  # not the first of its batch, whose attention is looked at as it streams by
    config = STATISTICS["entropy"][1]
    with pytest.raises(NumericsError, match="the attention of m holds values that are not finite"):
        attention_entropy.analyze([one._replace(batches=[Images(pixels)])], config)


def test_means_count_each_image_alike():
    means = LayerMeans()
    means.add(0, torch.tensor([1.0, 2.0]), 3)
    means.add(1, torch.tensor([7.0]), 3)
    means.add(0, torch.tensor([5.0, 0.0]), 1)
    assert [one.tolist() for one in means.means()] == [[2.0, 1.5], [7.0]]
    assert len(means) == 2


def test_among_patches_leaves_out_prefix_tokens():
    attention = random_attention(2)
    assert torch.equal(attention.among_patches(), attention.weights[:, 0, :, 2:, 2:])
    assert attention.is_patch.tolist() == [[False, False, *[True] * 15]]
    assert bool(attention.sees().all())


def test_a_map_of_windows_holds_each_pair_of_a_window_once():
    # Two windows of a 2 x 2 map and a padded place: {0, 3} and {2, 1}
    places = torch.tensor([[3, 0, -1], [2, 1, -1]])
    weights = torch.tensor(
        [[[1.0, 2, 3], [4, 5, 6], [7, 8, 9]], [[10.0, 20, 30], [40, 50, 60], [70, 80, 90]]]
    )
    expected = [[5, 0, 0, 4], [0, 50, 40, 0], [0, 20, 10, 0], [2, 0, 0, 1]]
    assert on_map(weights, places, 4).tolist() == expected


def test_what_a_shift_joins_is_not_seen():
    for attention in windows():
        hidden = ~attention.sees()[None, :, None].expand_as(attention.weights)
        assert attention.weights[hidden].numel() == 0 or attention.weights[hidden].max() < 1e-30
        assert attention.weights[~hidden].min() > 1e-30
    assert [one.visible is not None for one in windows()] == [False, True, True, True]
