import pytest
import torch
from torch import Tensor, nn

from fdkit.errors import ConfigError
from fdkit.models.backbone import Backbone, Preprocessing, Tokens, pool
from fdkit.models.libraries import build_timm

PREPROCESSING = Preprocessing((0.1, 0.2, 0.3), (0.5, 0.25, 2.0), image_size=6)


def _tokens(prefix: int) -> Tokens:
    values = torch.randn(2, prefix + 15, 7)
    return Tokens(values[:, :prefix], values[:, prefix:], (3, 5))


def _pixels(_: nn.Module, images: Tensor) -> Tokens:
    patches = images.flatten(2).transpose(1, 2)
    return Tokens(patches[:, :0], patches, (images.shape[2], images.shape[3]))


def _backbone() -> Backbone:
    return Backbone(
        nn.Identity(),
        _pixels,
        embed_dim=3,
        patch_size=1,
        num_prefix_tokens=0,
        preprocessing=PREPROCESSING,
        recipe={"architecture": "pixels"},
    )


def test_pool_reads_the_class_token_and_the_patches() -> None:
    tokens = _tokens(prefix=2)
    assert torch.equal(pool(tokens, "cls"), tokens.prefix[:, 0])
    naive = torch.stack([sum(row) / 15 for row in tokens.patches])  # type: ignore[misc]
    torch.testing.assert_close(pool(tokens, "patches"), naive)


def test_pool_refuses_a_class_token_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="no class token"):
        pool(_tokens(prefix=0), "cls")


def test_all_puts_the_prefix_first() -> None:
    tokens = _tokens(prefix=1)
    assert torch.equal(tokens.all()[:, 0], tokens.prefix[:, 0])
    assert tokens.all().shape == (2, 16, 7)


def test_forward_applies_the_models_own_statistics() -> None:
    images = torch.rand(2, 3, 6, 6)
    expected = (images[1, 1, 2, 5] - 0.2) / 0.25
    assert _backbone()(images).patches[1, 2 * 6 + 5, 1] == pytest.approx(expected.item(), rel=1e-6)


def test_forward_resizes_other_sizes_and_stays_in_range() -> None:
    tokens = _backbone()(torch.rand(2, 3, 11, 8).round())
    assert tokens.grid == (6, 6)
    values = tokens.patches * torch.tensor(PREPROCESSING.std) + torch.tensor(PREPROCESSING.mean)
    assert values.min() >= -1e-6
    assert values.max() <= 1 + 1e-6


def test_logits_without_a_head_says_what_to_use() -> None:
    with pytest.raises(ConfigError, match="pixels has no classifier"):
        _backbone().logits(torch.rand(1, 3, 6, 6))


def test_recipe_carries_the_preprocessing_as_plain_data() -> None:
    assert _backbone().recipe["preprocessing"]["mean"] == [0.1, 0.2, 0.3]


def _copying() -> Backbone:
    """A network with weights that hands its input on."""
    network = nn.Conv2d(3, 3, 1)
    with torch.no_grad():
        network.weight.copy_(torch.eye(3).view(3, 3, 1, 1))
        network.bias.zero_()  # type: ignore[union-attr]
    return Backbone(
        network,
        lambda conv, images: _pixels(conv, conv(images)),
        embed_dim=3,
        patch_size=1,
        num_prefix_tokens=0,
        preprocessing=PREPROCESSING,
        recipe={},
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_resizes_and_normalises_in_float32(dtype: torch.dtype) -> None:
    backbone, half = _copying(), _copying().to(dtype)
    assert (half.dtype, half.mean.dtype, half.std.dtype) == (dtype, torch.float32, torch.float32)
    images = torch.rand(2, 3, 11, 8)
    assert torch.equal(half(images).patches, backbone(images).patches.to(dtype))
    assert torch.equal(half(images.to(dtype)).patches, backbone(images.to(dtype)).patches.to(dtype))
    assert torch.equal(half.to(torch.float32).mean, backbone.mean)


@torch.no_grad()
def test_bfloat16_does_not_shift_the_input() -> None:
    """The mean error of an input whose statistics were rounded too, against that of one rounded last."""
    images = torch.rand(64, 3, 6, 6)
    exact = _copying().double()(images).patches
    mean, std = (torch.tensor(values).view(3, 1, 1).bfloat16() for values in PREPROCESSING[:2])
    rounded_early = ((images.bfloat16() - mean) / std).double().flatten(2).transpose(1, 2)
    shift, early_shift = (
        (tokens - exact).mean(dim=(0, 1)).abs().max()
        for tokens in (_copying().bfloat16()(images).patches.double(), rounded_early)
    )
    assert shift < 2e-4
    assert early_shift > 5 * shift


@torch.no_grad()
def test_double_precision_has_statistics_of_its_own() -> None:
    backbone = _copying().double()
    images = torch.rand(1, 3, 6, 6, dtype=torch.float64)
    expected = (images[0, 1, 2, 5] - 0.2) / 0.25
    assert backbone(images).patches[0, 2 * 6 + 5, 1].item() == pytest.approx(expected.item(), rel=1e-14)


@torch.no_grad()
def test_bfloat16_features_stay_within_its_rounding() -> None:
    backbone = build_timm(
        "vit_tiny_patch16_224", {"embed_dim": 48, "depth": 2, "num_heads": 3, "img_size": 32}
    ).eval()
    images = torch.rand(2, 3, 32, 32)
    full = backbone(images).all()
    half = backbone.bfloat16()(images).all()
    assert half.dtype == torch.bfloat16
    assert (half.float() - full).norm() / full.norm() < 2e-2
