import math
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from fdkit.errors import ConfigError
from fdkit.models.backbone import IMAGENET_MEAN, IMAGENET_STD, Backbone, Preprocessing
from fdkit.models.libraries import build_timm
from fdkit.models.masking import Split, split_patches
from fdkit.models.partial_block import block_shared
from fdkit.models.patches import patchify
from fdkit.models.pixel_decoder import (
    PixelDecoder,
    Reconstruction,
    patch_statistics,
    pixel_targets,
    reconstruct,
)

GRID = (2, 3)


def decoder(**options: int) -> PixelDecoder:
    made = PixelDecoder(
        10, GRID, patch_size=4, **{"width": 8, "depth": 2, "num_heads": 2, **options}
    ).double()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return made


def split(visible: int = 2, batch: int = 3) -> Split:
    return split_patches(torch.rand(batch, 6), visible)


def tokens(num_prefix: int = 1, visible: int = 2) -> Tensor:
    return torch.randn(3, num_prefix + visible, 10, dtype=torch.float64)


def in_place(made: PixelDecoder, encoded: Tensor, where: Split) -> Tensor:
    """Predictions as the paper describes them: mask tokens put back between the visible ones, one image at a time."""
    predictions = []
    for image, row in enumerate(encoded):
        known = made.embed(row)
        sequence = [known[0], *[made.mask_token[0, 0]] * 6]
        for number, place in enumerate(where.visible[image].tolist()):
            sequence[1 + place] = known[1 + number]
        states = torch.stack(sequence) + made.pos_embed[0]
        for block in made.blocks:
            states = block(states[None])[0]
        predictions.append(made.pred(made.norm(states))[1:])
    return torch.stack(predictions)


def test_predictions_are_those_of_mask_tokens_put_back_in_place() -> None:
    made, encoded, where = decoder(), tokens(), split()
    expected = in_place(made, encoded, where)
    torch.testing.assert_close(made.predict_all(encoded, where), expected)
    rows = torch.arange(3)[:, None]
    torch.testing.assert_close(made(encoded, where), expected[rows, where.hidden])
    elsewhere = in_place(made, encoded, Split(where.visible.roll(1, 0), where.hidden.roll(1, 0)))
    assert not torch.allclose(expected, elsewhere)


@pytest.mark.parametrize("num_prefix", [0, 1, 3])
@pytest.mark.parametrize(("depth", "visible"), [(1, 2), (2, 1), (2, 2), (2, 5), (3, 2)])
def test_leaving_out_what_the_loss_ignores_changes_no_value_and_no_gradient(
    num_prefix: int, depth: int, visible: int
) -> None:
    made, where = decoder(num_prefix_tokens=num_prefix, depth=depth), split(visible)
    encoded = tokens(num_prefix, visible).requires_grad_()
    rows = torch.arange(3)[:, None]
    grads, values = [], []
    for predict in (made, lambda *given: made.predict_all(*given)[rows, where.hidden]):
        made.zero_grad()
        encoded.grad = None
        predicted = predict(encoded, where)
        predicted.sin().sum().backward()
        values.append(predicted.detach())
        found = {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}
        assert encoded.grad is not None
        grads.append({**found, "tokens": encoded.grad.clone()})
    torch.testing.assert_close(*values)
    assert grads[0].keys() == grads[1].keys()
    assert len(grads[0]) == len(list(made.parameters()))  # all but the fixed positions, and the tokens
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], msg=name)


@pytest.mark.parametrize("num_blocks", [2, 3])
def test_the_first_block_projects_each_hidden_place_once(num_blocks: int) -> None:
    made = decoder(depth=num_blocks)
    counts = counted(made)
    made(tokens(), split())
    # Three images of a class token and two patches, and six places; the last block projects by parts.
    assert counts == [3 * (1 + 2), 6] + [3 * (1 + 6)] * (num_blocks - 2)


def test_other_devices_than_the_cpu_project_every_row() -> None:
    made = decoder(depth=2).to("meta")
    counts = counted(made)
    predicted = made(tokens().to("meta"), Split(*(index.to("meta") for index in split())))
    assert (predicted.shape, counts) == ((3, 4, 48), [3 * (1 + 6)])


def counted(made: PixelDecoder) -> list[int]:
    """Grows by the number of rows whenever a block projects some to queries, keys and values."""
    counts: list[int] = []

    def count(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        counts.append(output[..., 0].numel())

    for block in made.blocks:
        block.attn.qkv.register_forward_hook(count)
    return counts


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"qk_norm": True, "scale_attn_norm": True}, {"init_values": 0.3}, {"qkv_bias": False}]
)
def test_a_block_of_shared_rows_equals_the_block_of_their_copies(
    options: dict[str, Any], fused: bool
) -> None:
    block: Any = shaken(Block(8, 2, **{"qkv_bias": True, **options}), fused=fused)
    own, shared = (torch.randn(*shape, 8, dtype=torch.float64) for shape in ((3, 2), (5,)))
    assert_shared_equals_copies(block, own, shared)


def test_a_gated_block_of_shared_rows_equals_the_block_of_their_copies() -> None:
    from timm.layers import Attention

    block: Any = Block(8, 2)
    block.attn = Attention(8, 2, gated=True)
    own, shared = (torch.randn(*shape, 8, dtype=torch.float64) for shape in ((3, 2), (5,)))
    assert_shared_equals_copies(shaken(block), own, shared)


def shaken(block: Any, *, fused: bool = True) -> Any:
    """In float64, with no parameter left at zero or one."""
    block = block.double()
    block.attn.fused_attn = fused
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return block


def assert_shared_equals_copies(block: nn.Module, own: Tensor, shared: Tensor) -> None:
    """Values and every gradient; the second image repeats a row, and the last shared row stands nowhere."""
    index = torch.tensor([[0, 2, 1, 3], [3, 3, 0, 1], [2, 1, 0, 3]])
    own.requires_grad_()
    shared.requires_grad_()
    leaves = [own, shared, *block.parameters()]
    outputs = block_shared(block, own, shared, index), block(torch.cat([own, shared[index]], dim=1))
    results = [[output.detach(), *torch.autograd.grad(output.sin().sum(), leaves)] for output in outputs]
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)
    assert not results[0][2][4].any()
    assert results[0][2][:4].all()


def test_gradients_of_shared_rows_are_summed_finely_under_autocast() -> None:
    torch.manual_seed(0)
    block, count = Block(8, 2, qkv_bias=True), 600
    own, shared = torch.randn(1, 2, 8).expand(count, -1, -1), torch.randn(3, 8)
    index = torch.tensor([[0, 2]]).expand(count, -1)
    grads = []
    for coarse in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=coarse):
            output = block_shared(block, own, shared, index)
        grads.append(torch.autograd.grad(output.float().sin().sum(), list(block.attn.qkv.parameters())))
    for fine, rough in zip(*grads, strict=True):  # 600 equal numbers summed in bfloat16 stop at 256 of them
        assert (rough - fine).norm() < 0.05 * fine.norm()


def test_the_decoder_starts_as_the_official_one() -> None:
    torch.manual_seed(0)
    made = PixelDecoder(32, (14, 14), patch_size=16)
    assert [len(made.blocks), made.blocks[0].attn.num_heads, made.pos_embed.shape] == [8, 16, (1, 197, 512)]
    qkv = made.blocks[0].attn.qkv
    assert qkv.weight.abs().max() <= math.sqrt(
        6 / (512 + 3 * 512)
    )  # one matrix: as three it would reach sqrt(6 / 1024)
    assert qkv.weight.std().item() == pytest.approx(math.sqrt(2 / (4 * 512)), rel=0.01)
    assert all(not layer.bias.any() for layer in (qkv, made.embed, made.pred, made.blocks[3].mlp.fc1))
    assert made.mask_token.std().item() == pytest.approx(0.02, rel=0.15)
    assert {made.norm.eps, made.blocks[0].norm1.eps} == {1e-6}


def test_positions_are_fixed_zero_for_the_class_token_and_have_the_column_first() -> None:
    made = decoder()
    table = made.pos_embed[0]
    assert not made.pos_embed.requires_grad
    assert not table[0].any()
    # patch 1 lies right of patch 0, patch 3 below it: the first half of the channels encodes the column
    assert not torch.equal(table[1, :4], table[2, :4])
    assert torch.equal(table[1, 4:], table[2, 4:])
    assert torch.equal(table[1, :4], table[4, :4])


def test_a_width_that_does_not_divide_is_refused() -> None:
    for width in (10, 12):
        with pytest.raises(
            ConfigError, match=f"a decoder {width} wide needs a width that is a multiple of 4"
        ):
            decoder(width=width, num_heads=8)


# --- targets


def test_targets_are_whitened_by_the_unbiased_variance_of_each_patch() -> None:
    patches = torch.randn(2, 3, 12, dtype=torch.float64) * 3 + 2
    targets = pixel_targets(patches, norm_pixels=True)
    for image in range(2):
        for number in range(3):
            values = patches[image, number].tolist()
            mean = sum(values) / 12
            deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / 11 + 1e-6)
            expected = [(value - mean) / deviation for value in values]
            assert targets[image, number].tolist() == pytest.approx(expected, rel=1e-12)
    assert torch.equal(pixel_targets(patches, norm_pixels=False), patches)


def test_a_patch_of_one_colour_has_a_finite_target() -> None:
    assert torch.equal(pixel_targets(torch.ones(1, 1, 12), norm_pixels=True), torch.zeros(1, 1, 12))


# --- pictures


def backbone() -> Backbone:
    args = {"patch_size": 4, "embed_dim": 10, "depth": 1, "num_heads": 2, "img_size": 8}
    preprocessing = Preprocessing(IMAGENET_MEAN, IMAGENET_STD, 8)
    return build_timm("vit_tiny_patch16_224", args, preprocessing=preprocessing).eval()


def made_of(images: Tensor, where: Split, *, norm_pixels: bool) -> tuple[Reconstruction, Tensor]:
    """A reconstruction, and the decoder's own predictions."""
    encoder = backbone()
    made = PixelDecoder(10, (2, 2), patch_size=4, width=8, depth=1, num_heads=2)
    predictions: list[Tensor] = []
    made.pred.register_forward_hook(lambda module, args, output: predictions.append(output))
    result = reconstruct(encoder, made, images, where, norm_pixels=norm_pixels)
    shuffled = predictions[0]
    return result, torch.stack([one[order] for one, order in zip(shuffled, where.restoring(), strict=True)])


@pytest.mark.parametrize("norm_pixels", [True, False])
def test_a_reconstruction_shows_pixels_in_place(norm_pixels: bool) -> None:
    images, where = torch.rand(2, 3, 8, 8), split_patches(torch.rand(2, 4), 1)
    made, predictions = made_of(images, where, norm_pixels=norm_pixels)
    torch.testing.assert_close(made.original, images)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    patches = patchify((images - mean) / std, 4)
    for image in range(2):
        for place in range(4):
            rows, columns = (slice(4 * i, 4 * i + 4) for i in divmod(place, 2))
            is_hidden = place in where.hidden[image].tolist()
            assert (made.is_hidden[image, :, rows, columns] == is_hidden).all()
            predicted = predictions[image, place]
            if norm_pixels:
                own = patches[image, place]
                predicted = predicted * (own.var() + 1e-6).sqrt() + own.mean()
            shown = predicted.view(4, 4, 3).permute(2, 0, 1) * std + mean
            torch.testing.assert_close(made.prediction[image, :, rows, columns], shown.clamp(0, 1))
    statistics = patch_statistics(patches)
    targets = (patches - statistics.mean) / statistics.std if norm_pixels else patches
    for image, error in enumerate(made.error):
        hidden = where.hidden[image]
        expected = (predictions[image, hidden] - targets[image, hidden]).square().mean()
        torch.testing.assert_close(error, expected)


def test_errors_count_hidden_pixels_alone_and_the_reference_has_no_detail() -> None:
    images, where = torch.rand(2, 3, 8, 8), split_patches(torch.rand(2, 4), 1)
    made, _ = made_of(images, where, norm_pixels=False)
    errors = made.hidden_errors()
    for image in range(2):
        hidden = made.is_hidden[image].expand(3, -1, -1)
        for guess, error in zip((made.prediction, made.reference), errors, strict=True):
            difference = (guess[image] - images[image])[hidden]
            torch.testing.assert_close(error[image], difference.square().mean())
        visible_mean = images[image][~hidden].view(3, -1).mean(dim=1)
        torch.testing.assert_close(made.reference[image], visible_mean[:, None, None].expand(3, 8, 8))
    scaled, _ = made_of(images, where, norm_pixels=True)
    corner = scaled.reference[0, :, :4, :4]
    assert torch.equal(corner, corner[:, :1, :1].expand(3, 4, 4))
    assert (scaled.is_scaled, made.is_scaled) == (True, False)
