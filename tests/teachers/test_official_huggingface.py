"""Each family against a plain re-writing of its forward in transformers, on that library's own names."""

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers_models import (
    Shapes,
    State,
    bert_shapes,
    bert_tokens,
    dinov3_shapes,
    dinov3_tokens,
    seeded,
    tower_shapes,
    tower_tokens,
)

from fdkit.errors import WeightsError
from fdkit.models.backbone import IMAGENET_MEAN
from fdkit.models.libraries import build_timm
from fdkit.models.vit import sincos_position
from fdkit.teachers.official import LAYOUTS, Reading
from fdkit.teachers.official.huggingface import read_configured
from tests.official_files import read


def recognised(state: State, **options: Any) -> Reading:
    reading = read(state, LAYOUTS, source="x.safetensors", **options)
    assert reading is not None
    return reading


@torch.no_grad()
def tokens_of(reading: Reading, images: Tensor, **args: Any) -> Tensor:
    network = reading.network
    backbone = build_timm(network.architecture, {**network.assumed_args, **network.model_args, **args})
    backbone.network.load_state_dict(reading.state, strict=True)
    return backbone.eval().network.forward_features(images)


def close(mine: Tensor, theirs: Tensor) -> bool:
    return mine.shape == theirs.shape and bool((mine - theirs).abs().max() < 2e-5)


SMALL = {"width": 128, "depth": 2, "patch": 8, "grid": 4, "hidden": 200}
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(7))


def with_fixed_positions(state: State, prefix: str = "") -> State:
    table = sincos_position((4, 4), 128, first="column")
    state[f"{prefix}embeddings.position_embeddings"] = torch.cat([torch.zeros(1, 128), table]).unsqueeze(0)
    return state


def without(prefix: str, state: State) -> State:
    return {key.removeprefix(prefix): value for key, value in state.items()}


@pytest.mark.parametrize("prefix", ["vit.", ""])
def test_vit(prefix: str) -> None:
    extras = (
        {"classifier.weight": (5, 128), "classifier.bias": (5,)}
        if prefix
        else {"pooler.dense.weight": (128, 128)}
    )
    state = seeded(bert_shapes("vit", **SMALL, prefix=prefix) | extras)
    reading = recognised(state)
    assert reading.layout == "hf_vit"
    assert reading.network.assumed_args == {"num_heads": 2}
    assert "2 heads" in reading.network.assumption
    assert "preprocessor_config.json" in reading.network.assumption
    expected = bert_tokens(without(prefix, state), IMAGES, heads=2, eps=1e-12)
    assert close(tokens_of(reading, IMAGES), expected)
    assert not close(tokens_of(reading, IMAGES, num_heads=4), expected)
    assert not close(tokens_of(reading, IMAGES, act_layer="quick_gelu"), expected)


def test_a_config_decides_heads_activation_and_epsilon() -> None:
    state = seeded(bert_shapes("vit", **SMALL, prefix="vit."))
    config = {
        "model_type": "vit",
        "num_attention_heads": 4,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 0.1,
    }
    reading = read_configured(state, config | {"image_size": 32, "hidden_size": 128}, source="x")
    assert (reading.network.assumption, reading.network.assumed_args) == ("", {})
    expected = bert_tokens(without("vit.", state), IMAGES, heads=4, eps=0.1, act="gelu_pytorch_tanh")
    assert close(tokens_of(reading, IMAGES), expected)
    assert not close(tokens_of(reading, IMAGES, layer_norm_eps=1e-6), expected)


def test_a_missing_line_of_a_config_is_its_classs_default() -> None:
    args = SMALL | {"width": 192}
    state = seeded(bert_shapes("vit", **args))
    reading = read_configured(state, {"model_type": "vit"}, source="x")
    assert reading.network.model_args["num_heads"] == 12  # where the standard for the width is 3
    assert reading.network.model_args["layer_norm_eps"] == 1e-12
    assert close(tokens_of(reading, IMAGES), bert_tokens(state, IMAGES, heads=12, eps=1e-12))


def test_mae_with_its_decoder() -> None:
    shapes = bert_shapes("vit", **SMALL, prefix="vit.")
    shapes |= {"decoder.mask_token": (1, 1, 16), "decoder.decoder_embed.weight": (16, 128)}
    shapes |= {"decoder.decoder_layers.0.intermediate.dense.weight": (8, 16)}
    state = with_fixed_positions(seeded(shapes), "vit.")
    reading = recognised(state)
    assert reading.layout == "hf_vit_mae"
    assert reading.network.mean == IMAGENET_MEAN
    expected = bert_tokens(without("vit.", state), IMAGES, heads=2, eps=1e-12)
    assert close(tokens_of(reading, IMAGES), expected)
    dropped = {change.key for change in reading.audit if change.became is None}
    assert dropped == {key for key in state if key.startswith("decoder.")}


def test_distilled_deit() -> None:
    state = seeded(bert_shapes("deit", **SMALL, prefix="deit.") | {"cls_classifier.weight": (5, 128)})
    reading = recognised(state)
    assert reading.layout == "hf_deit"
    assert close(tokens_of(reading, IMAGES), bert_tokens(without("deit.", state), IMAGES, heads=2, eps=1e-12))


@pytest.mark.parametrize("kind", ["dinov2", "dinov2_swiglu"])
@pytest.mark.parametrize("num_registers", [0, 3])
def test_dinov2(kind: str, num_registers: int) -> None:
    state = seeded(bert_shapes(kind, **SMALL, num_registers=num_registers))
    reading = recognised(state)
    assert reading.layout == "hf_dinov2"
    expected = bert_tokens(state, IMAGES, heads=2, eps=1e-6)
    assert close(tokens_of(reading, IMAGES), expected)
    assert reading.network.resample_positions is not None
    resampled = reading.network.resample_positions(reading.state["pos_embed"][:, -16:], (4, 4), (6, 6))
    table = state["embeddings.position_embeddings"][:, 1:].reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
    theirs = F.interpolate(table, size=(6, 6), mode="bicubic", antialias=num_registers > 0)
    assert torch.allclose(resampled, theirs.flatten(2).transpose(1, 2), atol=1e-6)


@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize("size", [(32, 32), (48, 32)])
def test_dinov3(is_gated: bool, size: tuple[int, int]) -> None:
    state = seeded(dinov3_shapes(128, 2, 192, is_gated=is_gated))
    reading = recognised(state)
    assert reading.layout == "hf_dinov3"
    images = torch.randn(2, 3, *size)
    expected = dinov3_tokens(state, images, heads=2)
    assert close(tokens_of(reading, images), expected)
    assert not close(tokens_of(reading, images, rope_temperature=10000.0), expected)
    config = {
        "model_type": "dinov3_vit",
        "num_attention_heads": 4,
        "hidden_act": "silu" if is_gated else "gelu",
    }
    configured = read_configured(state, config | {"rope_theta": 50.0}, source="x")
    assert close(tokens_of(configured, images), dinov3_tokens(state, images, heads=4, theta=50.0))
    assert configured.network.model_args["img_size"] == 224  # its class's, where timm's models have 256
    sized = read_configured(state, config | {"image_size": [160, 160]}, source="x").network
    assert build_timm(sized.architecture, sized.model_args).image_size == 160
    with pytest.raises(WeightsError, match="activation quick_gelu"):
        read_configured(state, config | {"hidden_act": "quick_gelu"}, source="x")


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_clip_has_the_activation_its_config_states(act: str) -> None:
    state = seeded(tower_shapes("clip", **SMALL))
    state["vision_model.embeddings.position_ids"] = torch.arange(17).unsqueeze(0)
    vision = {"num_attention_heads": 2, "hidden_size": 128} | ({"hidden_act": act} if act == "gelu" else {})
    reading = read_configured(
        state, {"model_type": "clip", "vision_config": vision, "hidden_act": "relu"}, source="x"
    )
    assert reading.layout == "hf_clip"
    assert reading.network.mean == pytest.approx((0.4815, 0.4578, 0.4082), abs=1e-4)
    expected = tower_tokens(state, IMAGES, heads=2, eps=1e-5, act=act)
    assert close(tokens_of(reading, IMAGES), expected)
    other = "gelu" if act == "quick_gelu" else "quick_gelu"
    assert not close(tokens_of(reading, IMAGES, act_layer=other), expected)


def test_clip_without_its_config_has_to_be_named() -> None:
    state = seeded(tower_shapes("clip", **SMALL))
    with pytest.raises(WeightsError, match="QuickGELU or GELU") as raised:
        read(state, LAYOUTS, source="x")
    assert "--arch" in raised.value.hint
    reading = recognised(state, architecture="vit_base_patch16_clip_quickgelu_224")
    assert close(tokens_of(reading, IMAGES), tower_tokens(state, IMAGES, heads=2, eps=1e-5, act="quick_gelu"))


def test_siglip() -> None:
    state = seeded(tower_shapes("siglip", **SMALL))
    reading = recognised(state)
    assert reading.layout == "hf_siglip"
    assert reading.network.mean == reading.network.std == (0.5, 0.5, 0.5)
    expected = tower_tokens(state, IMAGES, heads=2, eps=1e-6, act="gelu_pytorch_tanh")
    mine = tokens_of(reading, IMAGES)
    assert mine.shape == (2, 16, 128)
    assert close(mine, expected)
    assert not close(tokens_of(reading, IMAGES, act_layer="quick_gelu"), expected)


def test_a_tower_saved_alone_by_version_5_has_no_prefix() -> None:
    for kind, act, eps in (("clip", "quick_gelu", 1e-5), ("siglip", "gelu_pytorch_tanh", 1e-6)):
        state = seeded(tower_shapes(kind, **SMALL))
        alone = {
            key.removeprefix("vision_model."): value
            for key, value in state.items()
            if key.startswith("vision_model.")
        }
        config = {"model_type": f"{kind}_vision_model", "num_attention_heads": 2}
        expected = tower_tokens(state, IMAGES, heads=2, eps=eps, act=act)
        assert close(tokens_of(read_configured(alone, config, source="x"), IMAGES), expected)
        reading = recognised(alone, architecture="vit_base_patch16_clip_quickgelu_224")
        assert reading.layout == f"hf_{kind}"
        assert close(tokens_of(reading, IMAGES), expected)


def meta(shapes: Shapes) -> State:
    """Tensors without values, but for positions and class tokens, whose values are looked at."""
    seen = ("position", "cls_token")
    return {
        key: torch.zeros(shape, device="cpu" if any(word in key for word in seen) else "meta")
        for key, shape in shapes.items()
    }


REAL = {
    "vit_base_patch16_224": (bert_shapes("vit", 768, 12, 16, 14, 3072, prefix="vit."), "hf_vit"),
    "vit_large_patch14_dinov2": (bert_shapes("dinov2", 1024, 24, 14, 37, 4096), "hf_dinov2"),
    "vit_giant_patch14_dinov2": (bert_shapes("dinov2_swiglu", 1536, 40, 14, 37, 4096), "hf_dinov2"),
    "vit_small_patch14_reg4_dinov2": (
        bert_shapes("dinov2", 384, 12, 14, 37, 1536, num_registers=4),
        "hf_dinov2",
    ),
    "deit_base_distilled_patch16_224": (
        bert_shapes("deit", 768, 12, 16, 14, 3072, prefix="deit."),
        "hf_deit",
    ),
    "vit_large_patch14_clip_quickgelu_336": (tower_shapes("clip", 1024, 24, 14, 24, 4096), "hf_clip"),
    "vit_base_patch16_siglip_gap_224": (tower_shapes("siglip", 768, 12, 16, 14, 3072), "hf_siglip"),
    "vit_so400m_patch14_siglip_gap_224": (tower_shapes("siglip", 1152, 27, 14, 16, 4304), "hf_siglip"),
    "vit_base_patch16_dinov3_qkvb": (dinov3_shapes(768, 12, 3072, is_gated=False), "hf_dinov3"),
    "vit_small_plus_patch16_dinov3_qkvb": (dinov3_shapes(384, 12, 1536, is_gated=True), "hf_dinov3"),
    "vit_huge_plus_patch16_dinov3_qkvb": (dinov3_shapes(1280, 32, 5120, is_gated=True), "hf_dinov3"),
}


@pytest.mark.parametrize("name", REAL)
def test_real_sizes_fit_timms_model_to_the_last_tensor(name: str) -> None:
    shapes, layout = REAL[name]
    state = meta(shapes)
    matching = [known.name for known in LAYOUTS if known.prefix_in(state, None) is not None]
    assert matching == [layout]
    reading = recognised(state, architecture=name if layout == "hf_clip" else None)
    network = reading.network
    args = {**network.assumed_args, **network.model_args}
    with torch.device("meta"):
        built = build_timm(network.architecture, args).network.state_dict()
        own = timm.create_model(name, num_classes=0)
    expected = {key: tuple(value.shape) for key, value in own.state_dict().items()}
    assert {key: tuple(value.shape) for key, value in reading.state.items()} == expected
    assert {key: tuple(value.shape) for key, value in built.items()} == expected
    assert args["num_heads"] == own.blocks[0].attn.num_heads


def test_tensors_of_another_model_than_the_config_are_refused() -> None:
    state = seeded(bert_shapes("vit", **SMALL))
    for config, words in [
        ({"model_type": "vit", "hidden_size": 256}, r"states hidden_size 256, and the tensors show 128"),
        ({"model_type": "vit", "num_hidden_layers": 3}, "num_hidden_layers 3, and the tensors show 2"),
        ({"model_type": "vit", "image_size": [224, 224]}, "image_size 224, and the tensors show 32"),
        ({"model_type": "dinov2"}, "its tensors are of another model"),
        ({"model_type": "vit", "hidden_act": "tanh"}, "activation tanh"),
        ({"model_type": "bert"}, "model_type bert; known are vit"),
        ({}, "model_type None"),
    ]:
        with pytest.raises(WeightsError, match=words):
            read_configured(state, config, source="x")
    assert (
        read_configured(state, {"model_type": "vit", "image_size": [32, 32]}, source="x").layout == "hf_vit"
    )


def test_unknown_tensors_are_left_over() -> None:
    state = seeded(
        bert_shapes("vit", **SMALL) | {"encoder.layer.0.attention.attention.relative_position": (3, 3)}
    )
    assert any("relative_position" in key for key in recognised(state).state)
