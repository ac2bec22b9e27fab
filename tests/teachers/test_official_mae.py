"""MAE, SupMAE, MaskFeat and CMAE: seeded files in the official layout against their forward written out."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from official_vits import (
    IMAGES,
    LARGER_IMAGES,
    Shapes,
    State,
    assert_holds_whole,
    block_shapes,
    fixed_table,
    hollow,
    linear_shapes,
    load,
    prefixed,
    seeded,
    vit_shapes,
    vit_tokens,
)

from fdkit.errors import WeightsError
from fdkit.teachers.official._layout import Change

CMAE = {
    "patch": "patch_embed.projection",
    "block": "layers",
    "norm1": "ln1",
    "qkv": "attn.qkv",
    "proj": "attn.proj",
    "norm2": "ln2",
    "fc1": "ffn.layers.0.0",
    "fc2": "ffn.layers.1",
    "norm": "ln1",
}


def decoder_shapes(width: int, rows: int, *, decoder: int = 32, depth: int = 2) -> Shapes:
    shapes: Shapes = {"mask_token": (1, 1, decoder), "decoder_pos_embed": (1, rows, decoder)}
    shapes |= linear_shapes("decoder_embed", decoder, width) | linear_shapes("decoder_norm", decoder)
    for index in range(depth):
        shapes |= block_shapes(f"decoder_blocks.{index}.", decoder, 4 * decoder)
    return shapes | linear_shapes("decoder_pred", 768, decoder)


def encoder() -> State:
    return seeded(vit_shapes(192)) | {"pos_embed": fixed_table(4, 192, "cr")}


def whole() -> State:
    return encoder() | seeded(decoder_shapes(192, 17)) | {"decoder_pos_embed": fixed_table(4, 32, "cr")}


def test_tokens_of_the_encoder_are_the_official_ones_with_or_without_decoder() -> None:
    state = encoder()
    expected = vit_tokens(state, IMAGES, 3)
    alone = load({"model": state})
    with_decoder = load({"model": whole(), "optimizer": {}, "epoch": 400})
    for loaded in (alone, with_decoder):
        assert loaded.reading.layout == "mae"
        assert (loaded.tokens(IMAGES) - expected).abs().max() < 1e-4
    transposed = fixed_table(4, 192, "rc")
    assert (expected - vit_tokens(state, IMAGES, 3, positions=transposed)).abs().max() > 1e-2
    assert (expected - vit_tokens(state, IMAGES, 3, norm=None)).abs().max() > 1e-2
    dropped = {change.key for change in with_decoder.reading.audit if change.became is None}
    assert dropped == set(decoder_shapes(192, 17))


def test_a_fine_tuned_file_keeps_the_norm_behind_its_pooling() -> None:
    shapes = vit_shapes(192) | linear_shapes("fc_norm", 192) | linear_shapes("head", 1000, 192)
    state = {name: value for name, value in seeded(shapes).items() if not name.startswith("norm.")}
    loaded = load({"model": state})
    assert loaded.reading.layout == "mae"
    assert (loaded.tokens(IMAGES) - vit_tokens(state, IMAGES, 3, norm="fc_norm")).abs().max() < 1e-4
    assert Change("head.weight", None, "classifier") in loaded.reading.audit


def resized(table: torch.Tensor, size: int, **options: Any) -> torch.Tensor:
    """The patches' rows of a 4x4 table resized by F.interpolate, the class token's as it is."""
    patches = table[0, 1:].reshape(4, 4, -1).permute(2, 0, 1)[None]
    new = F.interpolate(patches, size=(size, size), mode="bicubic", align_corners=False, **options)
    return torch.cat([table[:, :1], new[0].permute(1, 2, 0).reshape(1, size * size, -1)], dim=1)


def test_positions_for_another_size_are_resampled_as_in_its_fine_tuning_code() -> None:
    state = encoder()
    tokens = load({"model": state}, image_size=96).tokens(LARGER_IMAGES)
    right, wrong = (resized(state["pos_embed"], 6, antialias=flag) for flag in (False, True))
    assert (tokens - vit_tokens(state, LARGER_IMAGES, 3, positions=right)).abs().max() < 1e-4
    assert (tokens - vit_tokens(state, LARGER_IMAGES, 3, positions=wrong)).abs().max() > 1e-3
    anew = fixed_table(6, 192, "cr")
    assert (tokens - vit_tokens(state, LARGER_IMAGES, 3, positions=anew)).abs().max() > 1e-2


@pytest.mark.parametrize(("width", "depth", "patch", "rows"), [(768, 12, 16, 197), (1280, 32, 14, 257)])
def test_maes_files_of_real_size_are_held_whole(width: int, depth: int, patch: int, rows: int) -> None:
    shapes = vit_shapes(width, depth, patch=patch, rows=rows) | decoder_shapes(
        width, rows, decoder=512, depth=8
    )
    reading = assert_holds_whole({"model": hollow(shapes)}, "mae")
    assert reading.network.model_args["img_size"] == 224
    assert reading.network.assumed_args == {"num_heads": {768: 12, 1280: 16}[width]}


def supmae_shapes(width: int, rows: int, depth: int = 2, *, hidden: int = 24) -> Shapes:
    shapes = vit_shapes(width, depth, rows=rows) | decoder_shapes(width, rows, depth=1)
    shapes |= linear_shapes("cls_head.0", hidden, width) | linear_shapes("cls_head.1", hidden)
    shapes |= {f"cls_head.1.{leaf}": (hidden,) for leaf in ("running_mean", "running_var")}
    return shapes | {"cls_head.1.num_batches_tracked": ()} | linear_shapes("cls_head.3", 1000, hidden)


def test_supmae_is_mae_with_a_classifier_left_out() -> None:
    state = seeded(supmae_shapes(192, 17)) | {"pos_embed": fixed_table(4, 192, "cr")}
    loaded = load({"model": state, "epoch": 400})
    assert loaded.reading.layout == "supmae"
    assert (loaded.tokens(IMAGES) - vit_tokens(state, IMAGES, 3)).abs().max() < 1e-4
    assert_holds_whole({"model": hollow(supmae_shapes(768, 197, 12, hidden=3072))}, "supmae")


def maskfeat_shapes(width: int, rows: int = 17, depth: int = 2) -> Shapes:
    """MaskMViT of SlowFast: the encoder without its norm, the head with its own."""
    shapes = {
        name: shape
        for name, shape in vit_shapes(width, depth, rows=rows).items()
        if not name.startswith("norm.")
    }
    shapes |= {"mask_token": (1, 1, width), "hogs.0.weight_x": (3, 1, 3, 3), "hogs.0.weight_y": (3, 1, 3, 3)}
    shapes |= linear_shapes("pred_head.transforms.0.0", width)
    return shapes | linear_shapes("pred_head.projections.0", 108, width)


def test_maskfeat_ends_without_a_norm() -> None:
    state = seeded(maskfeat_shapes(192))
    loaded = load({"epoch": 1599, "model_state": state, "optimizer_state": {"state": {}}, "cfg": "MVIT: {}"})
    assert loaded.reading.layout == "maskfeat"
    tokens = loaded.tokens(IMAGES)
    assert (tokens - vit_tokens(state, IMAGES, 3, norm=None)).abs().max() < 1e-4
    heads_norm = vit_tokens(state, IMAGES, 3, norm="pred_head.transforms.0.0")
    assert (tokens - heads_norm).abs().max() > 1e-2
    assert loaded.reading.network.resample_positions is None
    assert_holds_whole({"model_state": hollow(maskfeat_shapes(1024, 197, 24))}, "maskfeat")


def cmae_shapes(width: int, rows: int = 17, depth: int = 2) -> Shapes:
    """The two networks and what stands beside them; the target ends without a norm."""
    online = vit_shapes(width, depth, rows=rows, names=CMAE)
    target = {name: shape for name, shape in online.items() if not name.startswith("ln1.")}
    shapes = prefixed(online, "backbone.") | prefixed(target, "target_backbone.")
    for name in ("pixel_decoder", "feature_decoder"):
        shapes |= prefixed(decoder_shapes(width, rows), f"{name}.")
    for name in ("projector", "target_projector", "head.predictor"):
        shapes |= linear_shapes(f"{name}.fc0", 24, width) | linear_shapes(f"{name}.bn0", 24)
        shapes |= {f"{name}.bn0.{leaf}": (24,) for leaf in ("running_mean", "running_var")}
        shapes |= {f"{name}.bn0.num_batches_tracked": (), f"{name}.fc1.weight": (8, 24)}
    return shapes


def test_cmaes_online_network_is_read_with_its_norm_and_the_target_without() -> None:
    content = {"meta": {"epoch": 300}, "state_dict": seeded(cmae_shapes(192)), "message_hub": {}}
    loaded = load(content)
    assert loaded.reading.layout == "cmae"
    online, target = (
        {
            name.removeprefix(prefix): value
            for name, value in content["state_dict"].items()
            if name.startswith(prefix)
        }
        for prefix in ("backbone.", "target_backbone.")
    )
    expected = vit_tokens(online, IMAGES, 3, names=CMAE)
    assert (loaded.tokens(IMAGES) - expected).abs().max() < 1e-4
    assert (load({"state_dict": online, "author": "CMAE"}).tokens(IMAGES) - expected).abs().max() < 1e-4
    tokens = load(content, checkpoint_key="target_backbone").tokens(IMAGES)
    assert (tokens - vit_tokens(target, IMAGES, 3, names=CMAE, norm=None)).abs().max() < 1e-4
    positions = resized(online["pos_embed"], 6)
    larger = load(content, image_size=96).tokens(LARGER_IMAGES)
    assert (larger - vit_tokens(online, LARGER_IMAGES, 3, names=CMAE, positions=positions)).abs().max() < 1e-4


def test_a_fine_tuned_cmae_keeps_the_norm_behind_its_pooling() -> None:
    shapes = vit_shapes(192, names=CMAE | {"norm": "fc_norm"})
    state = prefixed(seeded(shapes), "backbone.") | seeded(linear_shapes("head.fc_cls", 1000, 192))
    expected = vit_tokens(seeded(shapes), IMAGES, 3, names=CMAE | {"norm": "fc_norm"})
    assert (load({"state_dict": state}).tokens(IMAGES) - expected).abs().max() < 1e-4


def test_cmaes_file_of_real_size_is_held_whole() -> None:
    assert_holds_whole({"state_dict": hollow(cmae_shapes(768, 197, 12))}, "cmae")


def test_positions_that_are_no_square_are_refused() -> None:
    state = seeded(vit_shapes(192, names=CMAE, rows=19))
    with pytest.raises(WeightsError, match=r"grid of the positions \(1, 19, 192\): it is not square"):
        load({"state_dict": state})
