import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdkit.errors import ConfigError
from fdkit.models.backbone import Tokens
from fdkit.models.segmentation_heads import (
    BlockPyramid,
    FCNHead,
    LinearHead,
    StagePyramid,
    UPerNet,
    build_pyramid,
    has_stages,
    pyramid_layers,
    resize,
    token_map,
)

WIDTHS = (6, 7, 8, 9)
GRIDS = ((20, 28), (10, 14), (5, 7), (2, 3))


def levels(count: int = 2) -> list[Tensor]:
    return [torch.randn(count, width, *grid) for width, grid in zip(WIDTHS, GRIDS, strict=True)]


def vit(depth: int) -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224",
        num_classes=0,
        img_size=16,
        patch_size=8,
        embed_dim=12,
        depth=depth,
        num_heads=2,
    )


def test_tokens_become_a_map_row_by_row() -> None:
    patches = torch.randn(2, 15, 4)
    found = token_map(Tokens(patches[:, :0], patches, (3, 5)))
    assert found.shape == (2, 4, 3, 5)
    for row in range(3):
        for column in range(5):
            assert torch.equal(found[:, :, row, column], patches[:, row * 5 + column])


def test_the_linear_head_is_a_batch_norm_and_a_matrix_at_every_place() -> None:
    maps = [torch.randn(2, 3, 4, 6), torch.randn(2, 5, 2, 3)]
    head = LinearHead([3, 5], 7).double()
    nn.init.normal_(head.norm.weight)
    nn.init.normal_(head.norm.bias)
    maps = [one.double() for one in maps]
    found = head(maps)
    larger = F.interpolate(maps[1], size=(4, 6), mode="bilinear", align_corners=False)
    rows = torch.cat([maps[0], larger], dim=1).permute(0, 2, 3, 1).reshape(-1, 8)
    mean = rows.mean(dim=0)
    variance = (rows - mean).square().mean(dim=0)
    normed = (rows - mean) / (variance + 1e-5).sqrt() * head.norm.weight + head.norm.bias
    weight, bias = head.classifier.weight[:, :, 0, 0], head.classifier.bias
    expected = (normed @ weight.T + bias).view(2, 4, 6, 7).permute(0, 3, 1, 2)
    torch.testing.assert_close(found, expected)
    assert float(head.classifier.weight.detach().std()) == pytest.approx(0.01, rel=0.4)


def test_upernet_is_the_sum_of_its_parts() -> None:
    """Written out once more from the paper's figure, level by level, with the module's own weights."""
    head = UPerNet(WIDTHS, 3, channels=4, dropout=0.1).eval()
    maps = levels()
    pooled = []
    for grid, block in zip((1, 2, 3, 6), head.pooled, strict=True):
        small = F.adaptive_avg_pool2d(maps[3], grid)
        pooled.append(F.interpolate(block[1](small), size=GRIDS[3], mode="bilinear", align_corners=False))
    level3 = head.context(torch.cat([maps[3], *pooled], dim=1))
    level2 = head.lateral[2](maps[2]) + F.interpolate(
        level3, size=GRIDS[2], mode="bilinear", align_corners=False
    )
    level1 = head.lateral[1](maps[1]) + F.interpolate(
        level2, size=GRIDS[1], mode="bilinear", align_corners=False
    )
    level0 = head.lateral[0](maps[0]) + F.interpolate(
        level1, size=GRIDS[0], mode="bilinear", align_corners=False
    )
    smoothed = [head.smooth[0](level0), head.smooth[1](level1), head.smooth[2](level2), level3]
    stacked = [F.interpolate(one, size=GRIDS[0], mode="bilinear", align_corners=False) for one in smoothed]
    expected = head.classifier(head.fuse(torch.cat(stacked, dim=1)))
    assert expected.shape == (2, 3, *GRIDS[0])
    torch.testing.assert_close(head(maps), expected)


def test_every_part_of_upernet_learns_and_every_level_is_heard() -> None:
    head = UPerNet(WIDTHS, 3, channels=4, dropout=0.0)
    maps = [one.requires_grad_() for one in levels()]
    head(maps).square().sum().backward()
    assert all(one.grad is not None and one.grad.abs().sum() > 0 for one in maps)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())


def test_dropout_is_for_training_alone() -> None:
    head = FCNHead(6, 3, channels=16, dropout=0.5)
    features = torch.randn(2, 6, 4, 5)
    assert not torch.equal(head(features), head(features))
    head.eval()
    assert torch.equal(head(features), head(features))
    assert head(features).shape == (2, 3, 4, 5)


def test_blocks_become_levels_of_four_two_one_and_half() -> None:
    maps = [torch.randn(2, 8, 5, 7) for _ in range(4)]
    pyramid = BlockPyramid(8)
    found = pyramid(maps)
    assert [one.shape[1:] for one in found] == [(8, 20, 28), (8, 10, 14), (8, 5, 7), (8, 2, 3)]
    assert torch.equal(found[2], maps[2])
    assert torch.equal(found[3], F.max_pool2d(maps[3], 2))
    names = {name.partition(".")[2].partition(".")[0] for name, _ in pyramid.named_parameters()}
    assert names == {"0", "1"}, "the coarser levels have nothing to learn"


def test_stages_are_normalised_over_their_channels() -> None:
    found = StagePyramid(WIDTHS)(levels())
    for one in found:
        torch.testing.assert_close(one.mean(dim=1), torch.zeros_like(one[:, 0]), rtol=0, atol=1e-5)
        torch.testing.assert_close(
            one.var(dim=1, unbiased=False), torch.ones_like(one[:, 0]), rtol=1e-2, atol=1e-3
        )


@pytest.mark.parametrize(
    ("depth", "expected"), [(12, [2, 5, 8, 11]), (24, [5, 11, 17, 23]), (4, [0, 1, 2, 3]), (6, [0, 2, 3, 5])]
)
def test_blocks_are_evenly_spaced_and_end_with_the_last(depth: int, expected: list[int]) -> None:
    network = vit(depth)
    assert pyramid_layers(network) == expected
    assert not has_stages(network)
    assert isinstance(build_pyramid(network, [12] * 4), BlockPyramid)


def test_stages_are_taken_as_they_are() -> None:
    for name in ("resnet10t", "convnext_atto"):
        network = timm.create_model(name, num_classes=0)
        assert has_stages(network)
        assert pyramid_layers(network) == [0, 1, 2, 3]
        assert isinstance(build_pyramid(network, WIDTHS), StagePyramid)


def test_a_network_with_too_few_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match="upernet reads 4 levels, and VisionTransformer has 3 blocks"):
        pyramid_layers(vit(3))


def test_resize_leaves_its_own_grid_alone() -> None:
    one = torch.randn(1, 2, 3, 4)
    assert resize(one, (3, 4)) is one
    assert resize(one, (6, 4)).shape == (1, 2, 6, 4)
