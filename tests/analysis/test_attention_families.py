"""What is observed equals the attention inside the fused kernels of a normal forward pass, family by family.

The oracle stands where a network hands queries, keys and mask to its kernel, and works in float64. Versions that would
fail: one that leaves out a bias, a rotation, a norm of queries and keys, a scale or a mask; one whose windows lie
elsewhere than the network's.
"""

import math
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from timm.layers import Attention as TimmAttention
from timm.models.vision_transformer import ParallelScalingBlock
from torch import Tensor, nn

import fdkit.models.fast_beit_attention
from fdkit.analysis.observe import Attention, observe_attention, observe_pooling, on_map
from fdkit.errors import ConfigError, NumericsError
from fdkit.models.any_size import take_any_size
from fdkit.models.backbone import Backbone
from fdkit.models.libraries import build_open_clip, build_timm
from tests import golden

BATCH = 3
SMALL = {"depth": 2, "img_size": 64, "embed_dim": 48, "num_heads": 3}


def vit(name: str = "vit_tiny_patch16_224", **args):
    return build_timm(name, {**SMALL, **args})


def beit(**bias):
    return vit("beit_base_patch16_224", init_values=0.1, use_abs_pos_emb=False, **bias)


def swin(name: str = "swin_tiny_patch4_window7_224", size: int = 64, window: int = 4, **args):
    args = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "img_size": size, **args}
    return build_timm(name, {**args, "window_size": window})


def any_size_swin():
    """At a second size, whose map of 10x10 has to be padded for windows of 4."""
    backbone = swin(size=64)
    take_any_size(backbone, [40])
    return backbone


def any_size_vit():
    backbone = vit()
    take_any_size(backbone, [48])
    return backbone


def open_clip(arch: str = "ViT-B-32", **args):
    backbone = build_open_clip(arch, {"image_size": 64, **args})
    backbone.network.transformer.resblocks = backbone.network.transformer.resblocks[:2]
    return backbone


def naflex(name: str):
    backbone = build_timm(name, {"img_size": 64, "embed_dim": 48, "num_heads": 3})
    backbone.network.blocks = backbone.network.blocks[:2]
    return backbone


class Gated(TimmAttention):
    """What timm's own argument makes, which its vision transformer does not hand on."""

    def __init__(self, dim: int, **args) -> None:
        super().__init__(dim, **args, gated=True)


# Each with the size of the images that it sees.
FAMILIES = {
    "vit": (vit, 64),
    "vit with registers": (lambda: vit(reg_tokens=4), 64),
    "vit with registers alone": (lambda: vit("vit_little_patch16_reg1_gap_256"), 64),
    "vit at another size": (any_size_vit, 48),
    "vit with norms of queries and keys": (lambda: vit(qk_norm=True), 64),
    "vit with a gate": (lambda: vit("vit_tiny_patch16_224", attn_layer=Gated), 64),
    "vit with parallel branches": (lambda: vit(block_fn=ParallelScalingBlock), 64),
    "deit3": (lambda: vit("deit3_small_patch16_224"), 64),
    "dinov2 with registers": (lambda: vit("vit_small_patch14_reg4_dinov2", img_size=56), 56),
    "siglip": (lambda: vit("vit_base_patch16_siglip_224"), 64),
    "pe": (lambda: vit("vit_pe_core_tiny_patch16_384", attn_pool_num_heads=4), 64),
    "eva": (lambda: vit("eva_giant_patch14_224", img_size=56), 56),
    "eva02": (lambda: vit("eva02_tiny_patch14_224", img_size=56), 56),
    "dinov3": (lambda: vit("vit_small_patch16_dinov3"), 64),
    "rope, mixed": (lambda: vit("vit_small_patch16_rope_mixed_224"), 64),
    "beit, shared bias": (lambda: beit(use_shared_rel_pos_bias=True, use_rel_pos_bias=False), 64),
    "beit, a bias a block": (lambda: beit(use_shared_rel_pos_bias=False, use_rel_pos_bias=True), 64),
    "swin": (swin, 64),
    "swin, padded": (lambda: swin(size=72, depths=(1, 2), window=5), 72),
    "swin, padded and shifted": (lambda: swin(size=72), 72),
    "swin, oblong window": (lambda: swin(size=64, window=(4, 8)), 64),
    "swin at another size": (any_size_swin, 40),
    "swin v2": (lambda: swin("swinv2_tiny_window8_256"), 64),
    "swin v2, padded and shifted": (lambda: swin("swinv2_tiny_window8_256", size=72), 72),
    "clip of timm": (lambda: vit("vit_base_patch32_clip_224", img_size=96), 96),
    "clip of timm, quickgelu": (lambda: vit("vit_base_patch32_clip_quickgelu_224", img_size=96), 96),
    "clip of open_clip": (open_clip, 64),
    "clip of open_clip, quickgelu": (lambda: open_clip(quick_gelu=True), 64),
    "naflex": (lambda: naflex("naflexvit_base_patch16_gap"), 64),
}


def build(family: str) -> tuple[Backbone, Tensor]:
    """A network in float64 whose attention is far from uniform, and images."""
    make, size = FAMILIES[family]
    backbone = make().eval().double()
    for name, weight in backbone.network.named_parameters():
        if name.endswith(("qkv.weight", "q_proj.weight", "k_proj.weight", "in_proj_weight")):
            weight.data.mul_(6)
        elif name.endswith(("in_proj.weight", "q_norm.weight", "k_norm.weight")):
            weight.data.mul_(8)
        elif name.endswith(("position_bias_table", "in_proj_bias", "qkv.bias", "q_bias")):
            nn.init.normal_(weight)
        elif name.endswith("norm1.weight"):
            nn.init.ones_(weight)  # Swin V2 starts with 0, which hides what its attention does
    return backbone, torch.rand(BATCH, 3, size, size)


def observed(backbone: Backbone, images: Tensor) -> list[Attention]:
    seen: list[Attention] = []
    observe_attention(
        backbone, images, lambda layer, one: seen.append(one._replace(weights=one.weights.clone()))
    )
    return seen


class Kernel:
    """Stands where networks call the fused kernel and keeps the attention it computes, in float64."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.attentions: list[Tensor] = []
        fused, biased = F.scaled_dot_product_attention, fdkit.models.fast_beit_attention.bias_attention

        def kernel(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
            assert dropout_p == 0
            assert not is_causal
            self.keep(query, key, attn_mask, scale)
            return fused(query, key, value, attn_mask=attn_mask, scale=scale)

        def with_bias(query, key, value, bias, **wanted):
            self.keep(query, key, bias, None)
            return biased(query, key, value, bias, **wanted)

        monkeypatch.setattr(F, "scaled_dot_product_attention", kernel)
        monkeypatch.setattr(fdkit.models.fast_beit_attention, "bias_attention", with_bias)

    def keep(self, query: Tensor, key: Tensor, mask: Tensor | None, scale: float | None) -> None:
        scores = torch.einsum("bhqd,bhkd->bhqk", query.double(), key.double())
        scores *= query.shape[-1] ** -0.5 if scale is None else scale
        if mask is not None:
            assert mask.dtype != torch.bool
            scores += mask.double()
        self.attentions.append(scores.softmax(-1))


def turn_fused(backbone: Backbone) -> None:
    """timm leaves the fused kernel off for Swin; observing must not depend on it."""
    for module in backbone.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = True


FUSED = [family for family in FAMILIES if not family.startswith("swin v2")]


@pytest.mark.parametrize("family", FUSED)
@torch.no_grad()
def test_observed_is_what_the_fused_kernel_computes(family, monkeypatch):
    backbone, images = build(family)
    turn_fused(backbone)
    kernel = Kernel(monkeypatch)
    backbone(images)
    expected, kernel.attentions = kernel.attentions, []
    seen = observed(backbone, images)
    assert not kernel.attentions, "observing went through the fused kernel"
    assert len(seen) == len(expected) > 0
    for one, other in zip(seen, expected, strict=True):
        assert one.weights.shape[0] == BATCH
        torch.testing.assert_close(one.weights.flatten(0, 1), other, rtol=0, atol=1e-9)
        spread = (other - other.mean(-1, keepdim=True)).abs().sum(-1).mean() / 2
        assert spread > 0.2, "nearly uniform attention would not show a missing part"


@pytest.mark.parametrize("family", FAMILIES)
def test_observing_changes_neither_output_nor_model(family):
    backbone, images = build(family)
    turn_fused(backbone)
    before = {name: id(module) for name, module in backbone.named_modules()}
    state = [(dict(module.__dict__), module.training) for module in backbone.modules()]
    with torch.no_grad():
        plain = backbone(images)
        watched = observe_attention(backbone, images, lambda layer, attention: None)
        observe_pooling(backbone, watched)
        after = backbone(images)
    torch.testing.assert_close(watched.all(), plain.all(), rtol=1e-6, atol=1e-6)
    assert torch.equal(after.all(), plain.all())
    assert {name: id(module) for name, module in backbone.named_modules()} == before
    for module, (attributes, training) in zip(backbone.modules(), state, strict=True):
        assert module.training == training
        assert module.__dict__.keys() == attributes.keys()
        assert getattr(module, "fused_attn", True)
        assert not {**module._forward_hooks, **module._forward_pre_hooks}


def test_observing_leaves_no_masks_behind():
    backbone, images = build("swin at another size")
    observed(backbone, images)
    made = [set(block.masks) for block in blocks_of(backbone)]
    plain, _ = build("swin at another size")
    with torch.no_grad():
        plain(images)
    assert made == [set(block.masks) for block in blocks_of(plain)]
    assert any(made)


def cosine_attention(module, windows: Tensor, mask: Tensor | None) -> Tensor:
    """Liu et al. 2022, arXiv 2111.09883, equations 2 and 3, a pair of places at a time for the bias."""
    rows, columns = module.window_size
    places = [(row, column) for row in range(rows) for column in range(columns)]
    offsets = torch.tensor([[(q[0] - k[0], q[1] - k[1]) for k in places] for q in places]).double()
    scaled = 8 * offsets / torch.tensor([rows - 1, columns - 1])
    logged = scaled.sign() * (scaled.abs() + 1).log2() / math.log2(8)
    bias = 16 * module.cpb_mlp(logged).sigmoid().permute(2, 0, 1)
    weight = module.qkv.weight.unflatten(0, (3, module.num_heads, -1))
    query = torch.einsum("bnc,hdc->bhnd", windows, weight[0]) + module.q_bias.view(module.num_heads, 1, -1)
    key = torch.einsum("bnc,hdc->bhnd", windows, weight[1])
    cosine = torch.einsum("bhqd,bhkd->bhqk", F.normalize(query, dim=-1), F.normalize(key, dim=-1))
    scores = module.logit_scale.clamp(max=math.log(100)).exp() * cosine + bias
    if mask is not None:
        scores = scores + mask.repeat(len(windows) // len(mask), 1, 1)[:, None]
    return scores.softmax(-1)


@pytest.mark.parametrize("family", ["swin v2", "swin v2, padded and shifted"])
@torch.no_grad()
def test_swin_v2_attends_by_scaled_cosine(family):
    backbone, images = build(family)
    expected: list[Tensor] = []

    def keep(module, args, kwargs) -> None:
        expected.append(cosine_attention(module, args[0], kwargs["mask"]))

    for module in backbone.modules():
        if type(module).__name__ == "WindowAttention":
            nn.init.normal_(module.q_bias)
            module.register_forward_pre_hook(keep, with_kwargs=True)
    backbone(images)
    plain, expected = expected, []
    seen = observed(backbone, images)
    for one, other in zip(seen, plain, strict=True):
        torch.testing.assert_close(one.weights.flatten(0, 1), other, rtol=0, atol=1e-9)


def by_loops(windowed: Tensor, block, grid: tuple[int, int], *, pads_first: bool) -> Tensor:
    """(B, H, h*w, h*w): each window's attention at the places that the shift and the partition took its tokens from."""
    (height, width), (rows, columns), shift = grid, block.window_size, block.shift_size
    padded = (math.ceil(height / rows) * rows, math.ceil(width / columns) * columns)
    around = padded if pads_first else grid
    num_windows = padded[0] * padded[1] // (rows * columns)
    whole = torch.zeros(BATCH, windowed.shape[1], height * width, height * width, dtype=windowed.dtype)

    def origin(window: int, token: int) -> int | None:
        row = window // (padded[1] // columns) * rows + token // columns
        column = window % (padded[1] // columns) * columns + token % columns
        if not pads_first and (row >= height or column >= width):
            return None
        row, column = (row + shift[0]) % around[0], (column + shift[1]) % around[1]
        return row * width + column if row < height and column < width else None

    for window in range(num_windows):
        origins = [origin(window, token) for token in range(rows * columns)]
        for query, q in enumerate(origins):
            for key, k in enumerate(origins):
                if q is not None and k is not None:
                    whole[:, :, q, k] = windowed[window::num_windows, :, query, key]
    return whole


def blocks_of(backbone: Backbone) -> list[nn.Module]:
    return [block for stage in backbone.network.layers for block in stage.blocks]


SWINS = [family for family in FUSED if family.startswith("swin")]


@pytest.mark.parametrize("family", SWINS)
@torch.no_grad()
def test_windows_are_put_where_they_lie_in_the_image(family, monkeypatch):
    backbone, images = build(family)
    turn_fused(backbone)
    kernel = Kernel(monkeypatch)
    backbone(images)
    seen = observed(backbone, images)
    pads_first = family == "swin at another size"
    for one, windowed, block in zip(seen, kernel.attentions, blocks_of(backbone), strict=True):
        expected = by_loops(windowed, block, one.grid, pads_first=pads_first)
        torch.testing.assert_close(one.among_patches(), expected, rtol=0, atol=1e-9)
        on_patches = one.weights.sum((2, 3))[:, one.is_patch].sum()  # what patches get, of all queries
        assert one.among_patches().sum() <= on_patches + 1e-6
    assert any(any(block.shift_size) for block in blocks_of(backbone))


@pytest.mark.parametrize("family", [*SWINS, "swin v2", "swin v2, padded and shifted"])
@torch.no_grad()
def test_a_changed_patch_reaches_those_that_see_it_and_no_others(family):
    backbone, images = build(family)
    for one, block in zip(observed(backbone, images), blocks_of(backbone), strict=True):
        height, width = one.grid
        width_of_tokens = block.norm1.weight.shape[0]
        tokens = torch.randn(1, height, width, width_of_tokens, dtype=torch.float64)
        sees = on_map(one.sees().double(), one.places, height * width) > 0
        for changed in torch.randperm(height * width)[:12].tolist():
            other = tokens.clone()
            other[0, changed // width, changed % width] += torch.randn(width_of_tokens, dtype=torch.float64)
            difference = (block(other) - block(tokens)).abs().amax(-1).flatten()
            assert torch.equal(difference > 1e-9, sees[:, changed])


def test_the_last_stage_says_how_many_pixels_lie_between_its_tokens():
    # 72 pixels in patches of 4 are 18 places, then 9, then 5: not 72 / 5 pixels apart
    backbone = swin(size=72, depths=(1, 1, 1), num_heads=(2, 2, 4)).eval()
    seen = observed(backbone, torch.rand(1, 3, 72, 72))
    assert [(one.grid, one.stride) for one in seen] == [((18, 18), 4), ((9, 9), 8), ((5, 5), 16)]


POOLING = {
    "siglip": (partial(vit, "vit_base_patch16_siglip_224"), 16),
    "pe": (partial(vit, "vit_pe_core_tiny_patch16_384", attn_pool_num_heads=4), 17),
    "naflex": (partial(naflex, "naflexvit_base_patch16_siglip"), 16),
}


@pytest.mark.parametrize("family", POOLING)
@torch.no_grad()
def test_the_pooling_query_attends_as_in_the_models_own_head(family, monkeypatch):
    make, num_tokens = POOLING[family]
    backbone = make().eval().double()
    nn.init.normal_(backbone.network.attn_pool.latent, std=4)
    nn.init.normal_(backbone.network.attn_pool.kv.weight)
    images = torch.rand(BATCH, 3, 64, 64)
    seen = observe_pooling(backbone, observe_attention(backbone, images, lambda layer, one: None))
    assert seen is not None
    assert seen.shape == (BATCH, backbone.network.attn_pool.num_heads, num_tokens)
    kernel = Kernel(monkeypatch)
    backbone.network(backbone.normalise(images).double())
    torch.testing.assert_close(seen, kernel.attentions[-1][:, :, 0], rtol=0, atol=1e-6)
    assert (seen - seen.mean(-1, keepdim=True)).abs().sum(-1).mean() > 0.4


def test_models_that_pool_otherwise_have_no_pooling_query():
    backbone = vit().eval()
    tokens = observe_attention(backbone, torch.rand(1, 3, 64, 64), lambda layer, one: None)
    assert observe_pooling(backbone, tokens) is None


@torch.no_grad()
def test_the_last_attention_of_dino_is_the_official_one(shared: Path):
    file = shared / "golden" / "dino_vits.npz"
    backbone = build_timm("vit_small_patch16_224.dino", {}).eval()
    missing, _ = backbone.network.load_state_dict(golden.state_dict(file, 5), strict=False)
    assert not missing
    seen = observed(backbone, golden.images())
    found = seen[-1].weights[:, 0, :, 0, ::7]
    torch.testing.assert_close(
        found, golden.arrays(file)["last_attn_row"], rtol=golden.TOLERANCE, atol=golden.TOLERANCE
    )
    assert not torch.allclose(seen[-2].weights[:, 0, :, 0, ::7], found, rtol=0.1, atol=0.01)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        (
            "vit_tiny_patch16_224",
            {"attn_layer": "diff", "depth": 2, "img_size": 64},
            "DiffAttention .*not read",
        ),
        ("cait_xxs24_224", {"depth": 2}, "TalkingHeadAttn attends in a shape that is not read"),
        ("xcit_nano_12_p16_224", {"depth": 2}, "cannot be read|not read"),
        ("maxvit_tiny_tf_224", {}, "not read"),
        ("hiera_tiny_224", {}, "the attention of MaskUnitAttention cannot be read"),
        ("convnext_atto", {}, "ConvNeXt has no attention to observe"),
        ("resnet18", {}, "ResNet has no attention to observe"),
    ],
)
def test_other_attention_is_refused(name, args, message):
    backbone = build_timm(name, args).eval()
    with pytest.raises(ConfigError, match=message):
        observed(backbone, torch.rand(1, 3, backbone.image_size, backbone.image_size))


def test_the_resnet_of_clip_is_refused():
    backbone = build_open_clip("RN50", {"image_size": 64}).eval()
    with pytest.raises(ConfigError, match="ModifiedResNet has no attention to observe"):
        observed(backbone, torch.rand(1, 3, 64, 64))


class Talking(TimmAttention):
    """Mixes the heads behind the softmax, so that rows are no distribution."""

    def __init__(self, dim: int, **args) -> None:
        super().__init__(dim, **args)
        self.attn_drop = nn.Sequential(Scale())  # read at its input
        self.softmax_scale = 2.0

    def forward(self, x: Tensor, **args) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        attention = self.attn_drop(self.softmax_scale * (q @ k.transpose(-2, -1)).softmax(-1))
        return self.proj((attention @ v).transpose(1, 2).flatten(2))


class Scale(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def test_what_is_no_distribution_is_refused():
    with pytest.raises(ConfigError, match="Talking multiplies its values with does not sum to 1"):
        observed(vit(attn_layer=Talking).eval(), torch.rand(1, 3, 64, 64))


def test_attention_that_is_not_finite_is_refused():
    backbone = vit().eval()
    backbone.network.blocks[1].attn.qkv.weight.data[0, 0] = math.nan
    with pytest.raises(NumericsError, match="attention of Attention holds values that are not finite"):
        observed(backbone, torch.rand(1, 3, 64, 64))


def test_a_batch_that_goes_through_in_parts_is_observed_whole():
    backbone = vit().eval()
    images = torch.rand(BATCH, 3, 64, 64)
    whole = observed(backbone, images)
    backbone.num_parts = 2
    parts = observed(backbone, images)
    assert backbone.num_parts == 2
    for one, other in zip(whole, parts, strict=True):
        assert torch.equal(one.weights, other.weights)


@torch.no_grad()
def test_bfloat16_is_observed():
    backbone = vit().eval().to(torch.bfloat16)
    seen = observed(backbone, torch.rand(1, 3, 64, 64))
    assert {one.weights.dtype for one in seen} == {torch.bfloat16}
