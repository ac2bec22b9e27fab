"""ResNet layouts against a plain reading of torchvision's forward on the official names."""

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor
from torchvision.models.resnet import BasicBlock, Bottleneck

from fdkit.errors import WeightsError
from tests.official_files import Shapes, check_whole, filled, left_out, load, read_one, tokens, with_prefix

IMAGES = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
SMALL = {"layers": [1, 2, 1, 1], "width_per_group": 8}
FC = ("fc.weight", "fc.bias")


def torchvision_shapes(block: Any = Bottleneck, **sizes: Any) -> Shapes:
    """Names and shapes of torchvision's own network, counters included, without classifier."""
    with torch.device("meta"):
        network = torchvision.models.ResNet(block, **{**SMALL, **sizes})
    return {name: tuple(value.shape) for name, value in network.state_dict().items() if name not in FC}


def encoder(seed: int, block: Any = Bottleneck, **sizes: Any) -> dict[str, Tensor]:
    return filled(torchvision_shapes(block, **sizes), seed)


def projector(name: str, widths: tuple[int, ...], *, seed: int = 9) -> dict[str, Tensor]:
    """Linear layers with a BatchNorm behind each, numbered as in a sequence with ReLUs."""
    shapes: Shapes = {}
    for place, (wide, out) in enumerate(pairwise(widths)):
        shapes |= {f"{name}.{3 * place}.weight": (out, wide), f"{name}.{3 * place + 1}.running_mean": (out,)}
        shapes |= {
            f"{name}.{3 * place + 1}.running_var": (out,),
            f"{name}.{3 * place + 1}.num_batches_tracked": (),
        }
    return filled(shapes, seed)


def official_tokens(state: dict[str, Tensor], images: Tensor) -> Tensor:
    """The last stage's map as tokens: stem, then residual blocks whose stride is in the 3x3 convolution."""

    def conv(x: Tensor, name: str, **how: int) -> Tensor:
        weight = state[f"{name}.weight"]
        return F.conv2d(x, weight, groups=x.shape[1] // weight.shape[1], **how)

    def bn(x: Tensor, name: str) -> Tensor:
        mean, var, weight, bias = (
            state[f"{name}.{part}"].view(-1, 1, 1)
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    x = F.max_pool2d(bn(conv(images, "conv1", stride=2, padding=3), "bn1").relu(), 3, stride=2, padding=1)
    blocks = dict.fromkeys(name.rpartition(".conv1")[0] for name in state if name.endswith(".conv1.weight"))
    for name in blocks:
        stride = 2 if name.endswith(".0") and not name.startswith("layer1") else 1
        shortcut = x
        if f"{name}.downsample.0.weight" in state:
            shortcut = bn(conv(x, f"{name}.downsample.0", stride=stride), f"{name}.downsample.1")
        if f"{name}.conv3.weight" in state:
            x = bn(conv(x, f"{name}.conv1"), f"{name}.bn1").relu()
            x = bn(conv(x, f"{name}.conv2", stride=stride, padding=1), f"{name}.bn2").relu()
            x = bn(conv(x, f"{name}.conv3"), f"{name}.bn3")
        else:
            x = bn(conv(x, f"{name}.conv1", stride=stride, padding=1), f"{name}.bn1").relu()
            x = bn(conv(x, f"{name}.conv2", padding=1), f"{name}.bn2")
        x = (x + shortcut).relu()
    return x.flatten(2).transpose(1, 2)


def assert_reads_as(content: Any, expected: dict[str, Tensor], layout: str, key: str | None = None) -> Any:
    """The content's tokens are the official ones of the tensors expected, and its reading."""
    backbone, reading = load(content, key)
    assert reading.layout == layout
    found, right = tokens(backbone, IMAGES), official_tokens(expected, IMAGES)
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)
    assert found.shape[1] == 2 * 3
    return reading


@pytest.mark.parametrize(
    ("block", "sizes"), [(Bottleneck, {}), (Bottleneck, {"groups": 4}), (BasicBlock, {"width_per_group": 64})]
)
def test_torchvision_files_equal_the_plain_forward(block: Any, sizes: dict[str, int]) -> None:
    state = encoder(1, block, **sizes)
    channels = state["layer4.0.bn1.weight"].shape[0] if block is BasicBlock else 2048
    head = filled({"fc.weight": (10, channels), "fc.bias": (10,)})
    reading = assert_reads_as({**state, **head}, state, "resnet")
    assert left_out(reading) == {"fc"}
    assert reading.network.std == (0.229, 0.224, 0.225)


def test_plausible_wrong_forwards_differ() -> None:
    state = encoder(1)
    right = tokens(load(state)[0], IMAGES)
    no_statistics = {
        key: torch.zeros_like(value) if "running_mean" in key else value for key, value in state.items()
    }
    transposed = {key: value.transpose(-1, -2) if value.ndim == 4 else value for key, value in state.items()}
    for wrong in (no_statistics, transposed):
        assert (right - official_tokens(wrong, IMAGES)).abs().max() > 1e-2


def test_a_file_older_than_the_counters_gets_them_at_zero() -> None:
    state = {key: value for key, value in encoder(1).items() if not key.endswith("num_batches_tracked")}
    backbone, reading = load(state)
    assert backbone.network.bn1.num_batches_tracked == 0
    assert "starts at 0" in next(c.reason for c in reading.audit if c.became == "bn1.num_batches_tracked")
    torch.testing.assert_close(tokens(backbone, IMAGES), official_tokens(state, IMAGES), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("key", "is_online"), [(None, True), ("encoder_q", True), ("encoder_k", False)])
def test_moco_gives_its_encoder_and_the_momentum_encoder_by_key(key: str | None, is_online: bool) -> None:
    online, momentum = encoder(1), encoder(2)
    heads = filled({"fc.0.weight": (64, 2048), "fc.2.weight": (32, 64)})
    content = with_prefix("module.encoder_q.", {**online, **heads}) | with_prefix(
        "module.encoder_k.", {**momentum, **heads}
    )
    content |= {"module.queue": torch.randn(32, 64), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
    file = {"state_dict": content, "arch": "resnet50", "optimizer": {"state": {}}}
    reading = assert_reads_as(file, online if is_online else momentum, "moco", key)
    other = official_tokens(momentum if is_online else online, IMAGES)
    assert (tokens(load(file, key)[0], IMAGES) - other).abs().max() > 1e-2
    reasons = {change.key: change.reason for change in reading.audit if change.became is None}
    assert reasons["queue"].startswith("queue of keys")
    twin = "encoder_k" if is_online else "encoder_q"
    assert "momentum" in reasons[f"{twin}.conv1.weight"]
    assert f"{twin}.fc.0.weight" in reasons


@pytest.mark.parametrize(("key", "is_online"), [(None, True), ("momentum_encoder", False)])
def test_mocov3_resnet_gives_its_base_encoder(key: str | None, is_online: bool) -> None:
    online, momentum = encoder(1), encoder(2)
    heads = projector("fc", (2048, 64, 32))
    content = with_prefix("base_encoder.", {**online, **heads}) | with_prefix(
        "momentum_encoder.", {**momentum, **heads}
    )
    content |= projector("predictor", (32, 64, 32))
    file = {"state_dict": with_prefix("module.", content)}
    reading = assert_reads_as(file, online if is_online else momentum, "mocov3_resnet", key)
    assert left_out(reading) == {"base_encoder", "momentum_encoder", "predictor"}


def test_simsiam_leaves_projector_and_predictor_out() -> None:
    online = encoder(1)
    content = with_prefix("encoder.", {**online, **projector("fc", (2048, 64, 64, 32))})
    content |= projector("predictor", (32, 16, 32))
    reading = assert_reads_as({"state_dict": with_prefix("module.", content)}, online, "simsiam")
    assert left_out(reading) == {"encoder", "predictor"}


@pytest.mark.parametrize("prototypes", ["prototypes.weight", "prototypes.prototypes0.weight"])
def test_swav_divides_red_by_its_own_number(prototypes: str) -> None:
    online = encoder(1)
    content = {**online, **projector("projection_head", (2048, 64, 32)), prototypes: torch.randn(30, 32)}
    reading = assert_reads_as(with_prefix("module.", content), online, "swav")
    assert left_out(reading) == {"projection_head", "prototypes"}
    assert reading.network.std == (0.228, 0.224, 0.225)
    assert reading.network.interpolation == "bilinear"


def test_swav_pads_beside_its_first_convolution_to_the_same_effect() -> None:
    weight = encoder(1)["conv1.weight"]
    padded = F.conv2d(F.pad(IMAGES, (1, 1, 1, 1)), weight, stride=2, padding=2)
    torch.testing.assert_close(padded, F.conv2d(IMAGES, weight, stride=2, padding=3))


def test_swav_of_double_width_is_refused_since_timm_has_no_such_network() -> None:
    state = {**encoder(1), **projector("projection_head", (2048, 64, 32))}
    state["conv1.weight"] = torch.randn(128, 3, 7, 7)
    with pytest.raises(
        WeightsError, match=r"timm has no such ResNet: its first convolution is \(128, 3, 7, 7\)"
    ):
        read_one(state)


def fast_moco_content() -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    numbers = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}

    def in_a_row(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {f"{numbers[key.partition('.')[0]]}.{key.partition('.')[2]}": v for key, v in tensors.items()}

    online, momentum = encoder(1), encoder(2)
    heads = filled({"linear1.weight": (64, 2048), "bn1.running_mean": (64,), "linear3.bias": (32,)})
    content = filled({"predictor.linear1.weight": (16, 32), "predictor.layer2.bias": (32,)})
    for twin, backbone, tensors in (("encoder", "backbone", online), ("encoder_ema", "bbone_ema", momentum)):
        content |= with_prefix(f"{backbone}.", in_a_row(tensors))
        content |= with_prefix(f"{twin}.0.", in_a_row(tensors)) | with_prefix(f"{twin}.1.", heads)
    return {"model": with_prefix("module.", content), "last_iter": 5}, online, momentum


@pytest.mark.parametrize("key", [None, "encoder_ema"])
def test_fast_moco_gets_torchvisions_names_for_its_numbers(key: str | None) -> None:
    content, online, momentum = fast_moco_content()
    reading = assert_reads_as(content, momentum if key else online, "fastmoco", key)
    assert left_out(reading) == {"backbone", "bbone_ema", "encoder", "encoder_ema", "predictor"}
    renamed = {change.key: change.became for change in reading.audit if change.became}
    assert renamed[f"{key or 'encoder'}.0.5.0.conv2.weight"] == "layer2.0.conv2.weight"


@pytest.mark.parametrize("prefix", ["backbone.", "backbone.backbone."])  # EsViT wraps the network twice
@pytest.mark.parametrize("key", [None, "student"])
def test_dino_and_esvit_resnets_come_from_the_teacher(key: str | None, prefix: str) -> None:
    student, teacher = encoder(1), encoder(2)
    heads = {**projector("head.mlp", (2048, 32)), "head.last_layer.weight_g": torch.ones(8, 1)}
    heads |= {f"head_dense{name[4:]}": value for name, value in heads.items()}
    content = {
        name: with_prefix("module.", with_prefix(prefix, tensors) | heads)
        for name, tensors in (("student", student), ("teacher", teacher))
    }
    reading = assert_reads_as(content, student if key else teacher, "dino_resnet", key)
    assert left_out(reading) == {"head", "head_dense"}
    assert reading.network.interpolation == "bicubic"


@pytest.mark.parametrize(
    ("builder", "architecture"),
    [
        (torchvision.models.resnet18, "resnet18"),
        (torchvision.models.resnet34, "resnet34"),
        (torchvision.models.resnet50, "resnet50"),
        (torchvision.models.resnet101, "resnet101"),
        (torchvision.models.resnet152, "resnet152"),
        (torchvision.models.wide_resnet50_2, "resnet50"),
        (torchvision.models.resnext50_32x4d, "resnet50"),
    ],
)
def test_real_files_are_whole(builder: Any, architecture: str) -> None:
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in builder().state_dict().items()}
    network = check_whole(shapes).network
    assert network.architecture == f"{architecture}.tv_in1k"
    assert network.crop_ratio == 0.875
