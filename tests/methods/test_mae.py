import copy
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fdkit.config import with_defaults
from fdkit.data.views import CropConfig
from fdkit.errors import ConfigError
from fdkit.methods._network import NetworkConfig
from fdkit.methods.mae import DEFAULTS, MAE, MAEConfig, build
from fdkit.models.masking import split_patches
from fdkit.models.patches import patchify, take_rows
from fdkit.models.pixel_decoder import pixel_targets
from fdkit.models.vit import mae_initialise

TINY_VIT = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
DECODER = {"decoder_width": 8, "decoder_depth": 2, "decoder_heads": 2}
Network = with_defaults(NetworkConfig, DEFAULTS["network"])
SIZE, NUM_PATCHES = 12, 9


def tiny(seed: int = 0, network: dict[str, Any] | None = None, **fields: Any) -> MAE:
    settings = {"architecture": "vit_tiny_patch16_224", "model_args": TINY_VIT, **(network or {})}
    return build(
        MAEConfig(**{**DECODER, **fields}), CropConfig(image_size=SIZE), Network(**settings), seed=seed
    )


def batch(count: int = 5, size: int = SIZE) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def noise(count: int = 5) -> Tensor:
    return torch.rand(count, NUM_PATCHES, generator=torch.Generator().manual_seed(2))


def grads(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


# --- the whole model, written out


def layer_norm(row: Tensor, norm: Any) -> Tensor:
    mean = row.mean()
    variance = ((row - mean) ** 2).mean()
    return (row - mean) / torch.sqrt(variance + 1e-6) * norm.weight + norm.bias


def block_by_loops(rows: list[Tensor], block: Any, num_heads: int) -> list[Tensor]:
    """A pre-norm block, one query and one head at a time."""
    width = len(rows[0])
    size = width // num_heads
    weight, bias = block.attn.qkv.weight, block.attn.qkv.bias
    projected = [weight @ layer_norm(row, block.norm1) + bias for row in rows]
    outputs = []
    for row, own in zip(rows, projected, strict=True):
        heads = []
        for head in range(num_heads):
            part = slice(head * size, (head + 1) * size)
            scores = [
                float(own[:width][part] @ other[width : 2 * width][part]) / math.sqrt(size)
                for other in projected
            ]
            shares = [math.exp(score) / sum(math.exp(one) for one in scores) for score in scores]
            heads.append(
                sum(share * other[2 * width :][part] for share, other in zip(shares, projected, strict=True))
            )
        row = row + block.attn.proj.weight @ torch.cat(heads) + block.attn.proj.bias
        hidden = block.mlp.fc1.weight @ layer_norm(row, block.norm2) + block.mlp.fc1.bias
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        outputs.append(row + block.mlp.fc2.weight @ hidden + block.mlp.fc2.bias)
    return outputs


def patches_by_loops(image: Tensor, size: int) -> list[Tensor]:
    """Of one image (3, H, W): row by row, each as its rows, columns and channels."""
    rows, columns = image.shape[1] // size, image.shape[2] // size
    return [
        torch.stack(
            [
                image[c, top * size + i, left * size + j]
                for i in range(size)
                for j in range(size)
                for c in range(3)
            ]
        )
        for top in range(rows)
        for left in range(columns)
    ]


def loss_by_loops(method: MAE, image: Tensor, numbers: Tensor, *, biased: bool = False) -> list[float]:
    """The error of each hidden patch of one image; numbers: one a patch, the smallest are visible."""
    network: Any = method.student.network
    decoder: Any = method.decoder
    normalised = (image - method.student.mean) / method.student.std
    patches = patches_by_loops(normalised, 4)
    num_visible = int(len(patches) * (1 - method.config.mask_ratio))
    visible = sorted(range(len(patches)), key=lambda place: float(numbers[place]))[:num_visible]
    kernel = network.patch_embed.proj
    states = [network.cls_token[0, 0] + network.pos_embed[0, 0]]
    for place in visible:
        pixels = patches[place].view(4, 4, 3).permute(2, 0, 1)
        embedded = torch.stack([(weight * pixels).sum() for weight in kernel.weight]) + kernel.bias
        states.append(embedded + network.pos_embed[0, 1 + place])
    for block in network.blocks:
        states = block_by_loops(states, block, 2)
    states = [decoder.embed.weight @ layer_norm(row, network.norm) + decoder.embed.bias for row in states]
    known = dict(zip(visible, states[1:], strict=True))
    rows = [states[0], *(known.get(place, decoder.mask_token[0, 0]) for place in range(len(patches)))]
    rows = [row + position for row, position in zip(rows, decoder.pos_embed[0], strict=True)]
    for block in decoder.blocks:
        rows = block_by_loops(rows, block, 2)
    errors = []
    for place, patch in enumerate(patches):
        if place in known:
            continue
        predicted = decoder.pred.weight @ layer_norm(rows[1 + place], decoder.norm) + decoder.pred.bias
        if method.config.norm_pixels:
            variance = ((patch - patch.mean()) ** 2).sum() / (len(patch) - (0 if biased else 1))
            patch = (patch - patch.mean()) / torch.sqrt(variance + 1e-6)
        errors.append(float(((predicted - patch) ** 2).mean()))
    return errors


def moved(method: MAE) -> MAE:
    """In float64, with weights of some size, as after some steps."""
    generator = torch.Generator().manual_seed(2)
    for parameter in method.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return method.double()


@pytest.mark.parametrize(("norm_pixels", "mask_ratio"), [(True, 0.75), (False, 0.75), (True, 0.4)])
def test_the_loss_matches_naive_loops(norm_pixels: bool, mask_ratio: float) -> None:
    method = moved(tiny(norm_pixels=norm_pixels, mask_ratio=mask_ratio))
    pixels, numbers = batch(2).double(), noise(2)
    loss = method.predict(pixels, numbers)["loss"].item()
    with torch.no_grad():
        errors = [loss_by_loops(method, image, row) for image, row in zip(pixels, numbers, strict=True)]
    assert [len(one) for one in errors] == [9 - int(9 * (1 - mask_ratio))] * 2
    assert loss == pytest.approx(sum(map(sum, errors)) / sum(map(len, errors)), rel=1e-9)
    if norm_pixels:
        with torch.no_grad():
            wrong = [
                loss_by_loops(method, image, row, biased=True)
                for image, row in zip(pixels, numbers, strict=True)
            ]
        assert abs(loss - sum(map(sum, wrong)) / sum(map(len, wrong))) > 1e-3


# --- the loss


def plain_loss(method: MAE, pixels: Tensor, numbers: Tensor) -> Tensor:
    """As first written: all patches are embedded and all are decoded and compared, every token through every block."""
    network: Any = method.student.network
    split = split_patches(numbers, method.num_visible)
    images = method.student.normalise(pixels)
    patches = network.patch_embed(images) + network.pos_embed[:, 1:]
    first = (network.cls_token + network.pos_embed[:, :1]).expand(len(pixels), -1, -1)
    tokens = network.norm(network.blocks(torch.cat([first, take_rows(patches, split.visible)], dim=1)))
    predictions = method.decoder.predict_all(tokens, split)
    errors = (predictions - pixel_targets(patchify(images, 4), norm_pixels=True)).square().mean(dim=-1)
    return errors[split.is_hidden()].mean()


@pytest.mark.parametrize(
    ("sampling", "mask_ratio"),
    [("random", 0.75), ("random", 0.3), ("random", 0.9), ("block", 0.6), ("grid", 0.75)],
)
def test_three_steps_equal_those_of_the_plain_computation(sampling: Any, mask_ratio: float) -> None:
    network = Network(architecture="vit_tiny_patch16_224", model_args=TINY_VIT)
    config = MAEConfig(**{**DECODER, "decoder_depth": 3}, sampling=sampling, mask_ratio=mask_ratio)
    ours = moved(build(config, CropConfig(image_size=16), network, seed=0))
    plain = copy.deepcopy(ours)
    optimizers = [torch.optim.AdamW(one.parameters(), lr=1e-2) for one in (ours, plain)]
    torch.manual_seed(4)
    for count in (5, 2, 3):
        pixels = torch.rand(count, 3, 16, 16, dtype=torch.float64)
        numbers = ours.draw_noise(pixels)
        losses = ours.predict(pixels, numbers)["loss"], plain_loss(plain, pixels, numbers)
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
        torch.testing.assert_close(*losses, rtol=1e-10, atol=0)
        expected = grads(plain)
        assert grads(ours).keys() == expected.keys()
        for name, grad in grads(ours).items():
            torch.testing.assert_close(grad, expected[name], rtol=1e-7, atol=1e-10, msg=name)
        for optimizer in optimizers:
            optimizer.step()


def predicting(method: MAE, value: float) -> MAE:
    """With a decoder that always says the same."""
    with torch.no_grad():
        method.decoder.pred.weight.zero_()
        method.decoder.pred.bias.fill_(value)
    return method


def test_predicting_zero_costs_767_in_768() -> None:
    network = Network(architecture="vit_tiny_patch16_224", model_args={**TINY_VIT, "patch_size": 16})
    method = build(MAEConfig(**DECODER), CropConfig(image_size=64), network, seed=0)
    loss = predicting(method, 0.0).predict(batch(2, 64), torch.rand(2, 16))["loss"].item()
    assert loss == pytest.approx(767 / 768, abs=2e-5)
    assert abs(loss - 1) > 1e-3  # what the biased variance gives


def test_what_is_predicted_of_visible_patches_does_not_matter() -> None:
    method, pixels, numbers = predicting(tiny(norm_pixels=False), 0.3), batch(), noise()
    split = split_patches(numbers, method.num_visible)
    hidden = split.is_hidden()[:, :, None]
    patches = patchify(method.student.normalise(pixels), 4)
    errors = (0.3 - patches).square().mean(dim=-1, keepdim=True)
    loss = method.predict(pixels, numbers)["loss"]
    torch.testing.assert_close(loss.detach(), errors[hidden].mean())
    assert abs(loss.item() - errors.mean().item()) > 1e-3


def test_noise_decides_what_each_image_hides() -> None:
    method, pixels, numbers = moved(tiny()), batch().double(), noise()
    loss = method.predict(pixels, numbers)["loss"]
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(method.predict(pixels[order], numbers[order])["loss"], loss)
    assert abs(method.predict(pixels, numbers[order])["loss"] - loss) > 1e-6
    masks = split_patches(numbers, 2).is_hidden()
    assert not (masks == masks[:1]).all()


def test_masks_of_a_step_come_from_torchs_generator() -> None:
    method, pixels = tiny(), batch()
    torch.manual_seed(3)
    first, second = (method([pixels], 0.0)["loss"] for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(method([pixels], 0.0)["loss"], first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("sampling", ["random", "block", "grid"])
def test_every_sampling_hides_its_share(sampling: Any) -> None:
    views = CropConfig(image_size=16)
    network = Network(architecture="vit_tiny_patch16_224", model_args=TINY_VIT)
    method = build(MAEConfig(**DECODER, sampling=sampling), views, network, seed=0)
    hidden = split_patches(method.draw_noise(batch(3, 16)), method.num_visible).is_hidden()
    assert hidden.sum(dim=1).tolist() == [12, 12, 12]
    assert method([batch(3, 16)], 0.0)["loss"].isfinite()


def test_pixels_are_normalised_by_patch_unless_told_otherwise() -> None:
    assert MAEConfig().norm_pixels
    pixels, numbers = batch(), noise()
    brighter = (0.5 * pixels + 0.3).double()
    for norm_pixels in (True, False):
        method = predicting(tiny(norm_pixels=norm_pixels).double(), 0.1)
        losses = [method.predict(one, numbers)["loss"].item() for one in (0.5 * pixels.double(), brighter)]
        assert (abs(losses[0] - losses[1]) < 1e-3) == norm_pixels


def test_explained_variance_is_zero_for_the_mean_and_one_for_the_target() -> None:
    method, pixels, numbers = tiny(norm_pixels=False), batch(), noise()
    patches = patchify(method.student.normalise(pixels), 4)
    hidden = patches[split_patches(numbers, method.num_visible).is_hidden()]
    scalars = predicting(method, hidden.mean().item()).predict(pixels, numbers)
    assert scalars["explained_variance"].item() == pytest.approx(0, abs=1e-5)
    same = pixels[:1, :, :4, :4].repeat(1, 1, 3, 3)  # every patch equal: the offsets can hold them all
    with torch.no_grad():
        method.decoder.pred.bias.copy_(patchify(method.student.normalise(same), 4)[0, 0])
    scalars = method.predict(same, numbers[:1])
    assert scalars["explained_variance"].item() == pytest.approx(1, abs=1e-6)


def test_a_collapse_of_the_encoder_shows_in_feature_std() -> None:
    for pooling in ("cls", "patches"):
        method = moved(tiny(network={"pooling": pooling}))
        healthy = method.predict(batch().double(), noise())["feature_std"]
        network: Any = method.student.network
        with torch.no_grad():
            network.norm.weight.mul_(1e-4)
            network.norm.bias.fill_(1.0)
        assert method.predict(batch().double(), noise())["feature_std"] < 0.01 * healthy


def test_gradients_reach_everything_that_trains_and_nothing_else() -> None:
    method = tiny()
    method.predict(batch(), noise())["loss"].backward()
    trainable = {name for name, parameter in method.named_parameters() if parameter.requires_grad}
    assert grads(method).keys() == trainable
    fixed = {name for name, _ in method.named_parameters()} - trainable
    assert fixed == {"student.network.pos_embed", "decoder.pos_embed"}
    assert {"decoder.mask_token", "student.network.cls_token"} <= trainable


def test_the_loss_is_computed_in_float32_under_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scalars = tiny().predict(batch(), noise())
    assert scalars["loss"].dtype == torch.float32
    scalars["loss"].backward()


def test_twenty_steps_learn_and_log_scalars() -> None:
    method, pixels = tiny(norm_pixels=False), batch(8)
    optimiser = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(20):
        scalars = method([pixels], step / 20)
        optimiser.zero_grad()
        scalars["loss"].backward()
        optimiser.step()
        losses.append(scalars["loss"].item())
    assert losses[-1] < 0.9 * losses[0]
    assert scalars.keys() == {"loss", "explained_variance", "feature_std"}
    assert all(value.ndim == 0 and value.isfinite() for value in scalars.values())
    assert [name for name, value in scalars.items() if value.requires_grad] == ["loss"]


def test_a_resumed_run_goes_on_exactly() -> None:
    whole = moved(tiny())
    resumed = tiny(seed=9).double()
    resumed.load_state_dict(whole.state_dict())
    generator = torch.get_rng_state()
    expected = whole([batch().double()], 0.5)["loss"]
    torch.set_rng_state(generator)
    assert torch.equal(resumed([batch().double()], 0.5)["loss"], expected)


def test_activation_checkpointing_changes_no_gradient() -> None:
    found = []
    for is_saving in (False, True):
        method = moved(tiny()).train()
        network: Any = method.student.network
        network.set_grad_checkpointing(is_saving)
        method.predict(batch().double(), noise())["loss"].backward()
        found.append(grads(method))
    for name, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][name], msg=name)


def test_a_reconstruction_has_the_loss_of_its_masks() -> None:
    method, pixels = moved(tiny()), batch().double()
    made = method.reconstruct(pixels, torch.Generator().manual_seed(4))
    numbers = method.draw_noise(pixels, torch.Generator().manual_seed(4))
    torch.testing.assert_close(made.error.mean(), method.predict(pixels, numbers)["loss"].detach())
    assert made.is_scaled


# --- the network


def test_the_network_starts_as_the_official_one() -> None:
    method = tiny(network={"model_args": {"patch_size": 4, "embed_dim": 64, "depth": 1, "num_heads": 2}})
    network: Any = method.student.network
    qkv, projection = network.blocks[0].attn.qkv, network.patch_embed.proj
    assert qkv.weight.abs().max() <= math.sqrt(
        6 / (64 + 192)
    )  # as three matrices it would reach sqrt(6 / 128)
    assert qkv.weight.std().item() == pytest.approx(math.sqrt(2 / 256), rel=0.05)
    assert projection.weight.std().item() == pytest.approx(math.sqrt(2 / (48 + 64)), rel=0.05)
    assert 0.5 / math.sqrt(48) < projection.bias.abs().max() <= 1 / math.sqrt(48)
    assert network.cls_token.std().item() == pytest.approx(0.02, rel=0.4)
    assert not qkv.bias.any()
    # the column comes first: patch 1, right of patch 0, differs from it in the first half alone
    assert not network.pos_embed.requires_grad
    assert torch.equal(network.pos_embed[0, 1, 32:], network.pos_embed[0, 2, 32:])
    assert not torch.equal(network.pos_embed[0, 1, :32], network.pos_embed[0, 2, :32])
    assert not network.pos_embed[0, 0].any()


def test_fixed_positions_and_norms_are_left_alone_by_the_initialisation() -> None:
    network: Any = tiny().student.network
    before = network.pos_embed.clone()
    mae_initialise(network)
    assert torch.equal(network.pos_embed, before)
    assert (network.norm.weight == 1).all()


def test_a_start_from_given_weights_keeps_them(tmp_path: Path) -> None:
    from fdkit.models.libraries import save_backbone

    first = tiny(seed=5)
    save_backbone(first.student, tmp_path)
    second = tiny(seed=6, network={"init": str(tmp_path)})
    for one, other in zip(first.student.parameters(), second.student.parameters(), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(first.decoder.embed.weight, second.decoder.embed.weight)


def test_another_initialisation_is_taken_where_it_is_asked_for() -> None:
    network: Any = tiny(network={"initialisation": "xavier"}).student.network
    assert network.cls_token.abs().max() < 1e-4  # MoCo v3's


def test_the_defaults_are_those_of_the_documented_pretraining() -> None:
    config, views = MAEConfig(), with_defaults(CropConfig, DEFAULTS["views"])()
    assert (config.mask_ratio, config.sampling, config.norm_pixels) == (0.75, "random", True)
    assert (config.decoder_width, config.decoder_depth, config.decoder_heads) == (512, 8, 16)
    assert (views.min_scale, views.max_scale, views.interpolation, views.flip) == (0.2, 1, "bicubic", True)
    assert Network().architecture == "vit_base_patch16_224"


def test_the_exported_network_has_no_decoder() -> None:
    method = tiny()
    assert method.exported is method.student
    assert not any("decoder" in name or "mask" in name for name in method.student.state_dict())


def test_a_convolutional_stem_trains() -> None:
    network = Network(
        architecture="vit_tiny_patch16_224",
        model_args={"embed_dim": 16, "depth": 1, "num_heads": 2},
        stem="conv",
    )
    method = build(MAEConfig(**DECODER), CropConfig(image_size=48), network, seed=0)
    method([batch(2, 48)], 0.0)["loss"].backward()
    assert grads(method).keys() == {name for name, p in method.named_parameters() if p.requires_grad}


# --- what is refused


def test_a_mask_that_leaves_nothing_is_refused_before_training() -> None:
    with pytest.raises(ConfigError, match=r"a mask ratio of 0\.95 leaves none visible of 3x3 patches"):
        tiny(mask_ratio=0.95)
    with pytest.raises(ConfigError, match="3x3 patches do not divide into"):
        tiny(sampling="grid")
    for ratio in (0.0, 1.0):
        with pytest.raises(ValidationError, match="mask_ratio"):
            MAEConfig(mask_ratio=ratio)


def test_networks_that_cannot_leave_out_patches_are_refused() -> None:
    network = Network(architecture="resnet10t", position="learned", pooling="patches")
    with pytest.raises(ConfigError, match="resnet10t cannot leave out patches"):
        build(MAEConfig(**DECODER), CropConfig(image_size=32), network, seed=0)


def test_a_patch_that_does_not_divide_the_image_is_refused() -> None:
    network = Network(architecture="vit_tiny_patch16_224", model_args=TINY_VIT)
    with pytest.raises(ConfigError, match="14"):
        build(MAEConfig(**DECODER), CropConfig(image_size=14), network, seed=0)


def test_a_decoder_that_does_not_divide_into_its_heads_is_refused() -> None:
    with pytest.raises(ConfigError, match="a decoder 12 wide needs a width that is a multiple"):
        tiny(decoder_width=12, decoder_heads=8)


def test_other_than_one_view_is_refused() -> None:
    with pytest.raises(ConfigError, match="1 view of an image; the views make 2"):
        MAE(tiny().student, SimpleNamespace(num_views=2), MAEConfig(**DECODER), seed=0)  # type: ignore[arg-type]


# --- two processes


def one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    method = moved(tiny())
    method.draw_noise = lambda images, generator=None: noise(6).chunk(2)[rank]  # type: ignore[method-assign]
    parallel = DistributedDataParallel(method)  # a name of its own: once it is gone, nothing is averaged
    loss = parallel([batch(6).double().chunk(2)[rank]], 0.25)["loss"]
    loss.backward()
    torch.save({"loss": loss.detach(), "grads": grads(method)}, f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.distributed
def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    mp.spawn(one_rank, args=(str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    method = moved(tiny())
    loss = method.predict(batch(6).double(), noise(6))["loss"]
    loss.backward()
    torch.testing.assert_close((ranks[0]["loss"] + ranks[1]["loss"]) / 2, loss.detach())
    for key, grad in grads(method).items():
        for result in ranks:
            torch.testing.assert_close(result["grads"][key], grad, msg=key)
