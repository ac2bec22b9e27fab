import pytest
import timm
import torch
from torch import nn

from fdkit.errors import WeightsError
from fdkit.models.libraries import build_open_clip, build_timm
from fdkit.teachers.official import Change
from fdkit.teachers.weights import (
    RULES,
    WithoutInit,
    _without,
    check_dense,
    check_finite,
    fit_library,
    load_whole,
)

SMALL = {"depth": 1, "embed_dim": 48, "num_heads": 3, "img_size": 32}


def test_only_rules_drop_and_never_what_the_network_has() -> None:
    dropped = (
        "head.weight",
        "head.mlp.0.bias",
        "fc.bias",
        "decoder_blocks.0.norm1.weight",
        "decoder_pos_embed",
    )
    dropped += ("decoder.0.weight", "mask_token", "blocks.0.attn.relative_position_index", "head_dist.bias")
    kept = ("head.norm.weight", "norm.weight", "fc_norm.weight", "header.weight", "blocks.0.mlp.fc1.weight")
    kept += ("predictor.0.weight", "queue")
    state = dict.fromkeys(dropped + kept, torch.zeros(1))
    left, reasons = _without(state, (), RULES)
    assert left.keys() == set(kept)
    assert reasons.keys() == set(dropped)
    assert _without(state, ["fc.bias"], RULES)[0].keys() == {*kept, "fc.bias"}


def test_weights_load_whole_or_not_at_all() -> None:
    network = nn.Linear(3, 2)
    good = {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}
    load_whole(network, good, source="x.pth", hint="look here")
    assert torch.equal(network.weight, torch.ones(2, 3))
    before = network.weight.clone()
    for state, words in [
        ({"weight": torch.zeros(2, 3)}, "missing 1: bias"),
        (good | {"extra.weight": torch.zeros(1)}, "unexpected 1: extra.weight"),
        (good | {"weight": torch.zeros(2, 4)}, r"weight \(2, 4\), the model has \(2, 3\)"),
        (good | {"weight": torch.full((2, 3), torch.nan)}, "weight holds 6 values that are not finite"),
    ]:
        with pytest.raises(WeightsError, match=words):
            load_whole(network, state, source="x.pth", hint="look here")
        assert torch.equal(network.weight, before)


def test_half_precision_files_become_the_networks_dtype() -> None:
    network = nn.Linear(3, 2)
    load_whole(network, {"weight": torch.ones(2, 3).half(), "bias": torch.zeros(2).half()}, source="x")
    assert network.weight.dtype == network.bias.dtype == torch.float32
    assert network(torch.ones(1, 3)).tolist() == [[3.0, 3.0]]


def test_infinity_is_named() -> None:
    with pytest.raises(WeightsError, match="b holds 1 values that are not finite, of 2"):
        check_finite({"a": torch.ones(2), "b": torch.tensor([1.0, torch.inf])}, source="x")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.uint8])
def test_what_are_no_real_numbers_are_no_weights(dtype: torch.dtype) -> None:
    network = nn.Linear(3, 2)
    state = {"weight": torch.ones(2, 3).to(dtype), "bias": torch.zeros(2)}
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(WeightsError, match=f"weight holds {name}, not real numbers"):
        load_whole(network, state, source="x.pth")


def test_what_is_not_dense_is_named() -> None:
    sparse = {"a": torch.ones(2), "b": torch.eye(3).to_sparse()}
    with pytest.raises(WeightsError, match=r"x\.pth: b is sparse"):
        check_dense(sparse, source="x.pth")
    with pytest.raises(WeightsError, match="b is on no device"):
        check_dense({"b": torch.ones(2, device="meta")}, source="x.pth")
    check_dense({"a": torch.ones(3, 2).T, "b": torch.zeros(1).expand(4)}, source="x.pth")


def test_a_library_file_is_accounted_for() -> None:
    """BEiT-style files: timm itself renames and drops; each tensor's way is told."""
    source = timm.create_model("vit_tiny_patch16_224", num_classes=5, **SMALL)
    state = source.state_dict() | {"mask_token": torch.zeros(1, 1, 48)}
    backbone = build_timm("vit_tiny_patch16_224", {**SMALL, "img_size": 48})
    changes = {change.key: change for change in fit_library(backbone, state, source="x")}
    assert changes.keys() == state.keys()
    assert changes["norm.weight"] == Change("norm.weight", "norm.weight", "")
    assert changes["head.weight"].became is None
    assert changes["head.weight"].reason == "classifier and training heads"
    assert changes["pos_embed"].became == "pos_embed"
    assert "converted" in changes["pos_embed"].reason
    assert changes["mask_token"].became is None


def test_names_timm_changes_are_followed() -> None:
    args = {"embed_dim": 24, "depths": (1, 1), "num_heads": (1, 2)}
    network = timm.create_model("swin_tiny_patch4_window7_224", num_classes=5, **args)
    state = {key.replace("head.fc.", "head."): value for key, value in network.state_dict().items()}
    backbone = build_timm("swin_tiny_patch4_window7_224", args)
    changes = {change.key: change for change in fit_library(backbone, state, source="x")}
    assert changes["head.weight"].became is None
    assert {
        change.became for change in changes.values() if change.became
    } == backbone.network.state_dict().keys()


def test_a_crash_of_the_conversion_is_told_as_a_misfit(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*args: object, **options: object) -> None:
        raise KeyError("blocks.0")

    monkeypatch.setattr("timm.models.vision_transformer.checkpoint_filter_fn", crash)
    backbone = build_timm("vit_tiny_patch16_224", SMALL)
    state = backbone.network.state_dict()
    with pytest.raises(WeightsError, match=r"missing 1: norm\.bias"):
        fit_library(backbone, {k: v for k, v in state.items() if k != "norm.bias"}, source="x")
    with pytest.raises(WeightsError, match=r"x does not fit the model: 'blocks.0'"):
        fit_library(backbone, state, source="x")


def test_open_clip_towers_take_other_sizes_as_open_clip_does() -> None:
    import open_clip

    small = build_open_clip("ViT-S-32", {"image_size": 64})
    large = build_open_clip("ViT-S-32", {"image_size": 128})
    state = {f"visual.{key}": value for key, value in small.network.state_dict().items()}
    fit_library(large, state, source="x")
    model = open_clip.create_model("ViT-S-32", force_image_size=128)
    resized = dict(state)
    open_clip.model.resize_pos_embed(resized, model)
    assert torch.equal(large.network.positional_embedding, resized["visual.positional_embedding"])
    assert not torch.equal(large.network.positional_embedding[:5], small.network.positional_embedding)


def test_without_random_init_draws_nothing() -> None:
    before = torch.get_rng_state()
    with WithoutInit():
        nn.Linear(4, 4)
    assert torch.equal(torch.get_rng_state(), before)
