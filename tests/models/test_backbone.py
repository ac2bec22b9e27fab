import pytest
import torch
from torch import Tensor, nn

from fdkit.errors import ConfigError
from fdkit.models.backbone import Backbone, Preprocessing, Tokens, pool

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
