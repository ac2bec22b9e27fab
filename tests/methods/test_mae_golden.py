"""MAE against what the official code gives for seeded weights and given masks (../shared/golden)."""

from pathlib import Path

import pytest
import torch

from fdkit.config import with_defaults
from fdkit.data.views import CropConfig
from fdkit.methods._network import NetworkConfig
from fdkit.methods.mae import DEFAULTS, MAE, MAEConfig, build
from fdkit.models.masking import split_patches
from fdkit.models.patches import encode_visible
from tests.golden import TOLERANCE, arrays, images, state_dict


def golden_model(shared: Path) -> MAE:
    """The seeded weights in their official names; positions, which no seed makes, are ours."""
    network = with_defaults(NetworkConfig, DEFAULTS["network"])()
    method = build(MAEConfig(norm_pixels=False), CropConfig(), network, seed=0).eval()
    state = {
        key: value
        for key, value in state_dict(shared / "golden" / "mae_vitb.npz", 7).items()
        if "pos_embed" not in key
    }
    own = {key: value for key, value in state.items() if key.startswith("decoder_") or key == "mask_token"}
    encoder = {key: value for key, value in state.items() if key not in own}
    result = method.student.network.load_state_dict(encoder, strict=False)
    assert result.missing_keys == ["pos_embed"]
    own = {key.removeprefix("decoder_"): value for key, value in own.items()}
    assert method.decoder.load_state_dict(own, strict=False).missing_keys == ["pos_embed"]
    return method


@torch.no_grad()
def test_loss_mask_and_predictions_are_those_of_the_official_code(shared: Path) -> None:
    method, expected = golden_model(shared), arrays(shared / "golden" / "mae_loss_0.npz")
    pixels = images()
    loss = method.predict(pixels, expected["noise"])["loss"]
    assert loss.item() == pytest.approx(expected["loss"].item(), abs=TOLERANCE)
    split = split_patches(expected["noise"], 49)
    assert torch.equal(split.is_hidden().float(), expected["mask"])
    encoded = encode_visible(method.student, method.student.normalise(pixels), split.visible)
    assert encoded.shape == (2, 50, 768)
    predicted = method.decoder.predict_all(encoded, split)[:, ::7]
    assert (predicted - expected["pred"]).abs().max() < TOLERANCE
