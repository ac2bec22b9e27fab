from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fdkit.errors import ConfigError
from fdkit.models.backbone import IMAGENET_MEAN, IMAGENET_STD, Backbone, Preprocessing
from fdkit.models.libraries import build_timm
from fdkit.models.masking import split_patches
from fdkit.models.patches import (
    encode_visible,
    patch_grid,
    patchify,
    require_maskable,
    take_rows,
    unpatchify,
)

TINY = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
GRID_SIDE = 3


def vit(size: int = 12, name: str = "vit_tiny_patch16_224", **args: Any) -> Backbone:
    preprocessing = Preprocessing(IMAGENET_MEAN, IMAGENET_STD, size)
    backbone = build_timm(name, {**TINY, "img_size": size, **args}, preprocessing=preprocessing)
    for parameter in backbone.parameters():  # positions and tokens large enough to be told apart
        nn.init.normal_(parameter, std=0.3)
    return backbone.double().eval()


def pixels(batch: int = 2, size: int = 12) -> Tensor:
    return torch.randn(batch, 3, size, size, dtype=torch.float64)


def some_visible(batch: int = 2, count: int = 4) -> Tensor:
    return split_patches(torch.rand(batch, GRID_SIDE**2), count).visible


def by_timm(backbone: Backbone, images: Tensor, visible: Tensor) -> Tensor:
    """Patches embedded, given positions and prefix by timm itself, and only then left out."""
    network: Any = backbone.network
    tokens = network._pos_embed(network.patch_embed(images))
    num_prefix = network.num_prefix_tokens
    rows = [
        torch.stack([one[i] for i in [*range(num_prefix), *(num_prefix + index).tolist()]])
        for one, index in zip(tokens, visible, strict=True)
    ]
    output: Tensor = network.fc_norm(network.norm(network.blocks(network.norm_pre(torch.stack(rows)))))
    return output


def test_patches_hold_rows_then_columns_then_channels() -> None:
    images = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6)
    patches = patchify(images, 2)
    assert patches.shape == (2, 6, 12)
    for image in range(2):
        for row in range(2):
            for column in range(3):
                expected = [
                    images[image, channel, 2 * row + i, 2 * column + j].item()
                    for i in range(2)
                    for j in range(2)
                    for channel in range(3)
                ]
                assert patches[image, 3 * row + column].tolist() == expected


def test_unpatchify_undoes_patchify_on_any_grid() -> None:
    images = torch.randn(2, 3, 8, 12)
    assert torch.equal(unpatchify(patchify(images, 4), (2, 3)), images)
    assert not torch.equal(unpatchify(patchify(images, 4), (3, 2)).reshape(images.shape), images)


def test_take_rows_takes_each_images_own() -> None:
    rows, index = torch.randn(2, 4, 3), torch.tensor([[3, 0], [1, 1]])
    assert torch.equal(take_rows(rows, index), torch.stack([rows[0, [3, 0]], rows[1, [1, 1]]]))


VARIANTS: list[dict[str, Any]] = [
    {},
    {"reg_tokens": 2},
    {"reg_tokens": 2, "no_embed_class": True},
    {"class_token": False, "global_pool": "avg"},
    {"class_token": False, "reg_tokens": 3, "global_pool": "avg"},
    {"pos_embed": "none"},
    {"pre_norm": True},
    {"init_values": 0.1, "qk_norm": True},
    {"dynamic_img_size": True},
    {"final_norm": False},
]


@pytest.mark.parametrize("args", VARIANTS, ids=str)
def test_only_visible_patches_are_computed_to_the_same_tokens_and_gradients(args: dict[str, Any]) -> None:
    backbone, images, visible = vit(**args), pixels(), some_visible()
    found: list[dict[str, Tensor]] = []
    outputs = []
    for compute in (encode_visible, by_timm):
        backbone.zero_grad()
        output = compute(backbone, images, visible)
        (output * torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view_as(output)).sum().backward()
        outputs.append(output)
        found.append({name: p.grad.clone() for name, p in backbone.named_parameters() if p.grad is not None})
    torch.testing.assert_close(outputs[0], outputs[1])
    assert found[0].keys() == found[1].keys() == {name for name, _ in backbone.named_parameters()}
    for name, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][name], msg=name)


def test_with_every_patch_visible_the_tokens_are_the_backbones() -> None:
    backbone, images = vit(), torch.rand(2, 3, 12, 12, dtype=torch.float64)
    everything = torch.arange(9).expand(2, -1)
    tokens = encode_visible(backbone, backbone.normalise(images), everything)
    torch.testing.assert_close(tokens, backbone(images).all())


def test_the_order_of_visible_patches_is_only_that_of_the_tokens() -> None:
    backbone, images, visible = vit(), pixels(), some_visible()
    forwards, backwards = (encode_visible(backbone, images, index) for index in (visible, visible.flip(1)))
    torch.testing.assert_close(forwards[:, 1:], backwards[:, 1:].flip(1))
    torch.testing.assert_close(forwards[:, 0], backwards[:, 0])


def test_hidden_pixels_reach_nothing() -> None:
    backbone, images, visible = vit(), pixels(), some_visible()
    tokens = encode_visible(backbone, images, visible)
    patches = patchify(images, 4)
    hidden = torch.ones(2, 9, dtype=torch.bool).scatter(1, visible, False)
    other = unpatchify(torch.where(hidden[..., None], torch.randn_like(patches), patches), (3, 3))
    assert torch.equal(encode_visible(backbone, other, visible), tokens)


def test_a_convolutional_stem_reads_the_whole_image() -> None:
    preprocessing = Preprocessing(IMAGENET_MEAN, IMAGENET_STD, 48)
    args = {"embed_dim": 16, "depth": 1, "num_heads": 2, "img_size": 48, "stem": "conv"}
    backbone = build_timm("vit_tiny_patch16_224", args, preprocessing=preprocessing).double().eval()
    images, visible = pixels(size=48), some_visible()
    torch.testing.assert_close(encode_visible(backbone, images, visible), by_timm(backbone, images, visible))


def test_the_encoder_sees_the_class_token_and_the_visible_patches_alone() -> None:
    backbone, seen = vit(), []
    network: Any = backbone.network
    network.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    encode_visible(backbone, pixels(), some_visible(count=4))
    assert seen == [(2, 5, 16)]


def test_activation_checkpointing_gives_the_same_gradients_and_computes_blocks_twice() -> None:
    backbone, images, visible, calls = vit(), pixels(), some_visible(), []
    network: Any = backbone.network
    network.blocks[0].register_forward_pre_hook(lambda *args: calls.append(1))
    grads = []
    for is_saving in (False, True):
        network.set_grad_checkpointing(is_saving)
        backbone.zero_grad()
        encode_visible(backbone, images, visible).square().sum().backward()
        grads.append([p.grad.clone() for p in backbone.parameters() if p.grad is not None])
    assert len(calls) == 3
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_a_network_that_normalises_images_itself_gives_the_same_tokens() -> None:
    backbone, images, visible = vit(), pixels(), some_visible()
    tokens = encode_visible(backbone, images, visible)
    assert backbone.fold_statistics()
    assert torch.equal(encode_visible(backbone, images, visible), tokens)


def test_the_grid_is_that_of_the_patches() -> None:
    assert patch_grid(vit(20)) == (5, 5)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("resnet10t", {}, "resnet10t cannot leave out patches: only timm's plain vision transformers can"),
        ("vit_tiny_patch16_224", {"patch_drop_rate": 0.5}, "drops patches or pools by attention itself"),
        ("vit_tiny_patch16_224", {"global_pool": "map"}, "drops patches or pools by attention itself"),
        ("deit_tiny_distilled_patch16_224", {}, "deit_tiny_distilled_patch16_224 cannot leave out patches"),
    ],
)
def test_networks_that_cannot_leave_out_patches_are_refused(
    name: str, args: dict[str, Any], message: str
) -> None:
    preprocessing = Preprocessing(IMAGENET_MEAN, IMAGENET_STD, 32)
    sizes = {} if name == "resnet10t" else {**TINY, "img_size": 32}
    backbone = build_timm(name, {**sizes, **args}, preprocessing=preprocessing)
    with pytest.raises(ConfigError, match=message):
        require_maskable(backbone)


def test_patches_that_do_not_divide_the_image_are_refused() -> None:
    backbone: Any = vit(12)
    odd = SimpleNamespace(network=backbone.network, recipe={}, image_size=14, patch_size=4)
    with pytest.raises(ConfigError, match="14x14 pixels does not divide into patches of 4") as refusal:
        require_maskable(odd)  # type: ignore[arg-type]
    assert "image size of 16" in refusal.value.hint
