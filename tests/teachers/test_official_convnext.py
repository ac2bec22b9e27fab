"""ConvNeXt layouts against a plain reading of the official forward on the official names."""

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.official_files import Shapes, check_whole, filled, left_out, load, read_one, tokens, with_prefix

DEPTHS, DIMS = (1, 2, 1, 1), (8, 16, 24, 32)
IMAGES = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def convnext_shapes(
    depths: tuple[int, ...] = DEPTHS,
    dims: tuple[int, ...] = DIMS,
    *,
    has_grn: bool = False,
    has_norm: bool = True,
) -> Shapes:
    """Names and shapes of the official dense network, without classifier."""
    shapes: Shapes = {
        "downsample_layers.0.0.weight": (dims[0], 3, 4, 4),
        "downsample_layers.0.0.bias": (dims[0],),
    }
    shapes |= norm("downsample_layers.0.1", dims[0])
    for stage, (depth, width) in enumerate(zip(depths, dims, strict=True)):
        if stage:
            down = f"downsample_layers.{stage}"
            shapes |= {
                **norm(f"{down}.0", dims[stage - 1]),
                f"{down}.1.weight": (width, dims[stage - 1], 2, 2),
            }
            shapes[f"{down}.1.bias"] = (width,)
        block: Shapes = {"dwconv.weight": (width, 1, 7, 7), "dwconv.bias": (width,), **norm("norm", width)}
        block |= {"pwconv1.weight": (4 * width, width), "pwconv1.bias": (4 * width,)}
        block |= {"pwconv2.weight": (width, 4 * width), "pwconv2.bias": (width,)}
        if has_grn:
            block |= {f"grn.{name}": (1, 1, 1, 4 * width) for name in ("gamma", "beta")}
        else:
            block["gamma"] = (width,)
        for number in range(depth):
            shapes |= with_prefix(f"stages.{stage}.{number}.", block)
    return {**shapes, **(norm("norm", dims[-1]) if has_norm else {})}


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def global_response(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """GRN of one map (C, h, w) at a time: each channel's norm over the mean of all channels' norms."""
    out = []
    for image in x:
        size = image.pow(2).sum((1, 2)).sqrt()
        scaled = image * (size / (size.mean() + 1e-6)).view(-1, 1, 1)
        out.append(gamma.view(-1, 1, 1) * scaled + beta.view(-1, 1, 1) + image)
    return torch.stack(out)


def official_map(state: dict[str, Tensor], images: Tensor, response: Any = global_response) -> Tensor:
    """(B, C, h, w): the last stage's map, in channels-first convolutions throughout."""

    def layer_norm(x: Tensor, name: str) -> Tensor:
        mean, var = x.mean(1, keepdim=True), x.var(1, keepdim=True, unbiased=False)
        weight, bias = (state[f"{name}.{part}"].view(-1, 1, 1) for part in ("weight", "bias"))
        return (x - mean) / (var + 1e-6).sqrt() * weight + bias

    def pointwise(x: Tensor, name: str) -> Tensor:
        return F.conv2d(x, state[f"{name}.weight"][:, :, None, None], state[f"{name}.bias"])

    x = images
    for stage in range(4):
        down = f"downsample_layers.{stage}"
        conv, before, after = (f"{down}.0", "", f"{down}.1") if stage == 0 else (f"{down}.1", f"{down}.0", "")
        x = layer_norm(x, before) if before else x
        stride = state[f"{conv}.weight"].shape[-1]
        x = F.conv2d(x, state[f"{conv}.weight"], state[f"{conv}.bias"], stride=stride)
        x = layer_norm(x, after) if after else x
        for number in range(len({key.split(".")[2] for key in state if key.startswith(f"stages.{stage}.")})):
            name = f"stages.{stage}.{number}"
            weight, bias = state[f"{name}.dwconv.weight"], state[f"{name}.dwconv.bias"]
            y = layer_norm(F.conv2d(x, weight, bias, padding=3, groups=len(weight)), f"{name}.norm")
            y = F.gelu(pointwise(y, f"{name}.pwconv1"))
            if f"{name}.grn.gamma" in state:
                y = response(y, state[f"{name}.grn.gamma"], state[f"{name}.grn.beta"])
            y = pointwise(y, f"{name}.pwconv2")
            x = x + state.get(f"{name}.gamma", torch.ones(1)).view(-1, 1, 1) * y
    return x


def official_tokens(state: dict[str, Tensor], images: Tensor, **how: Any) -> Tensor:
    """The map as tokens, each through the final norm where there is one."""
    flat = official_map(state, images, **how).flatten(2).transpose(1, 2)
    if "norm.weight" not in state:
        return flat
    return F.layer_norm(flat, flat.shape[-1:], state["norm.weight"], state["norm.bias"], eps=1e-6)


def strong(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights with layer scales and GRN large enough to matter."""
    return {key: value * 10 + 1 if key.endswith(("gamma", "beta")) else value for key, value in state.items()}


def assert_equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


HEAD: Shapes = {"head.weight": (10, DIMS[-1]), "head.bias": (10,)}


@pytest.mark.parametrize("has_grn", [False, True])
def test_dense_files_equal_the_official_forward(has_grn: bool) -> None:
    state = strong(filled({**convnext_shapes(has_grn=has_grn), **HEAD}))
    backbone, reading = load({"model": state, "epoch": 299})
    assert reading.layout == ("convnextv2" if has_grn else "convnext")
    assert left_out(reading) == {"head"}
    found = tokens(backbone, IMAGES)
    assert found.shape == (2, 2 * 3, DIMS[-1])
    assert_equal(found, official_tokens(state, IMAGES))


def test_a_network_without_layer_scale_or_response_norm_has_neither() -> None:
    shapes = {name: shape for name, shape in convnext_shapes().items() if not name.endswith(".gamma")}
    state = filled(shapes)
    backbone, reading = load(state)
    assert reading.layout == "convnext"
    assert_equal(tokens(backbone, IMAGES), official_tokens(state, IMAGES))


def without_mean(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    size = x.pow(2).sum((2, 3), keepdim=True).sqrt()
    scaled = x * size / (size.sum(1, keepdim=True) + 1e-6)
    return gamma.view(-1, 1, 1) * scaled + beta.view(-1, 1, 1) + x


def over_the_batch(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    size = x.pow(2).sum((0, 2, 3), keepdim=True).sqrt()
    return gamma.view(-1, 1, 1) * x * size / (size.mean() + 1e-6) + beta.view(-1, 1, 1) + x


@pytest.mark.parametrize("wrong", ["no mean", "over the batch", "no final norm", "no response", "transposed"])
def test_plausible_wrong_forwards_differ(wrong: str) -> None:
    state = strong(filled(convnext_shapes(has_grn=True)))
    found = tokens(load(state)[0], IMAGES)
    response = {"no mean": without_mean, "over the batch": over_the_batch, "no response": lambda x, *_: x}
    changed = {
        key: value for key, value in state.items() if wrong != "no final norm" or not key.startswith("norm.")
    }
    if wrong == "transposed":
        changed = {
            key: value.transpose(-1, -2) if "dwconv.weight" in key else value for key, value in state.items()
        }
    other = official_tokens(changed, IMAGES, response=response.get(wrong, global_response))
    assert (found - other).abs().max() > 1e-2


def sparse(dense: dict[str, Tensor]) -> dict[str, Tensor]:
    """An encoder's dense tensors as MinkowskiEngine keeps them: a kernel's first coordinate runs fastest."""
    made = {}
    for key, value in dense.items():
        stem, leaf = key.rpartition(".")[::2]
        if key.startswith("downsample_layers.0."):
            made[key] = value
        elif "grn" in key:
            made[key] = value.reshape(1, -1)
        elif value.ndim == 4:
            made[f"{stem}.kernel"] = sparse_kernel(value)
        elif stem.endswith("dwconv") or re.fullmatch(r"downsample_layers\.\d\.1", stem):
            made[key] = value.reshape(1, -1)
        else:
            made[f"{stem}.{'linear' if 'pwconv' in stem else 'ln'}.{leaf}"] = value
    return made


def sparse_kernel(weight: Tensor) -> Tensor:
    """(k*k, in, out) of an ordinary kernel, (k*k, C) of a depthwise one."""
    out, wide, side, _ = weight.shape
    kernel = torch.empty(side * side, wide, out)
    for row in range(side):
        for column in range(side):
            kernel[column * side + row] = weight[:, :, row, column].T
    return kernel.squeeze(1)


def decoder(width: int = 12) -> Shapes:
    shapes: Shapes = {
        "proj.weight": (width, DIMS[-1], 1, 1),
        "proj.bias": (width,),
        "mask_token": (1, width, 1, 1),
    }
    shapes |= {"pred.weight": (32 * 32 * 3, width, 1, 1), "pred.bias": (32 * 32 * 3,)}
    shapes |= {"decoder.0.dwconv.weight": (width, 1, 7, 7), "decoder.0.grn.gamma": (1, 1, 1, 4 * width)}
    return {**shapes, "decoder.0.pwconv1.weight": (4 * width, width), **norm("decoder.0.norm", width)}


def test_sparse_pretraining_file_equals_the_dense_forward_without_a_final_norm() -> None:
    dense = strong(filled(convnext_shapes(has_grn=True, has_norm=False)))
    content = with_prefix("encoder.", sparse(dense))
    assert content["encoder.stages.0.0.dwconv.kernel"].shape == (49, DIMS[0])
    assert content["encoder.downsample_layers.1.1.kernel"].shape == (4, DIMS[0], DIMS[1])
    assert content["encoder.stages.0.0.dwconv.bias"].shape == (1, DIMS[0])
    assert content["encoder.downsample_layers.2.0.ln.bias"].shape == (DIMS[1],)
    assert content["encoder.stages.1.1.pwconv2.linear.weight"].shape == (DIMS[1], 4 * DIMS[1])
    backbone, reading = load({"model": {**content, **filled(decoder())}, "optimizer": {"state": {}}})
    assert reading.layout == "fcmae"
    assert left_out(reading) == {"decoder", "proj", "pred", "mask_token"}
    found = tokens(backbone, IMAGES)
    assert_equal(found, official_tokens(dense, IMAGES))
    straight = {
        key: value.transpose(-1, -2) if value.ndim == 4 and "grn" not in key else value
        for key, value in dense.items()
    }
    straight["downsample_layers.0.0.weight"] = dense["downsample_layers.0.0.weight"]
    assert (found - official_tokens(straight, IMAGES)).abs().max() > 1e-2


def test_released_pretraining_file_is_dense_and_has_no_final_norm() -> None:
    dense = strong(filled(convnext_shapes(has_grn=True, has_norm=False)))
    backbone, reading = load({"model": dense})
    assert reading.layout == "fcmae"
    assert not any("head" in name for name in backbone.network.state_dict())
    found = tokens(backbone, IMAGES)
    assert_equal(found, official_tokens(dense, IMAGES))
    normed = {**dense, "norm.weight": torch.ones(DIMS[-1]), "norm.bias": torch.zeros(DIMS[-1])}
    assert (found - official_tokens(normed, IMAGES)).abs().max() > 1e-2


def test_dinov3_norms_every_place_and_names_its_norm_twice() -> None:
    state = strong(filled(convnext_shapes()))
    twice = {**state, "norms.3.weight": state["norm.weight"], "norms.3.bias": state["norm.bias"]}
    backbone, reading = load(twice)
    assert reading.layout == "dinov3_convnext"
    assert left_out(reading) == {"norms"}
    assert_equal(tokens(backbone, IMAGES), official_tokens(state, IMAGES))


def test_every_norm_has_epsilon_1e_6() -> None:
    for has_grn in (False, True):
        network = load(filled(convnext_shapes(has_grn=has_grn)))[0].network
        epsilons = {module.eps for module in network.modules() if hasattr(module, "eps")}
        assert epsilons == {1e-6}


@pytest.mark.parametrize(
    ("size", "depths", "width", "has_grn"),
    [
        ("convnext_tiny", (3, 3, 9, 3), 96, False),
        ("convnext_xlarge", (3, 3, 27, 3), 256, False),
        ("convnextv2_atto", (2, 2, 6, 2), 40, True),
        ("convnextv2_base", (3, 3, 27, 3), 128, True),
        ("convnextv2_huge", (3, 3, 27, 3), 352, True),
    ],
)
def test_real_files_are_whole(size: str, depths: tuple[int, ...], width: int, has_grn: bool) -> None:
    dims = tuple(width * 2**stage for stage in range(4))
    shapes = convnext_shapes(depths, dims, has_grn=has_grn)
    head: Shapes = {"head.weight": (1000, dims[-1]), "head.bias": (1000,)}
    network = check_whole({**shapes, **head}).network
    assert network.architecture == size
    assert (tuple(network.model_args["depths"]), tuple(network.model_args["dims"])) == (depths, dims)
    if has_grn:
        released = {name: shape for name, shape in shapes.items() if not name.startswith("norm.")}
        assert check_whole(released).layout == "fcmae"
    else:
        assert check_whole({**shapes, **norm("norms.3", dims[-1])}).layout == "dinov3_convnext"


def test_what_no_rule_names_stays() -> None:
    reading = read_one({**filled(convnext_shapes()), "projectors.0.weight": torch.ones(3)})
    assert "projectors.0.weight" in reading.state
