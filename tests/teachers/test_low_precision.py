"""A teacher in float8: where it cannot be it is refused, and it is admitted only if it says the same."""

import importlib.util
from typing import Any

import pytest
import torch
from torch import nn

from fdkit.errors import ConfigError, NumericsError, ResourceError
from fdkit.teachers import low_precision
from fdkit.teachers.loading import load_teacher
from fdkit.teachers.low_precision import float8_layers, quantise_checked, require_float8, whitened_tokens
from fdkit.teachers.teacher import Teacher


@pytest.fixture
def teacher() -> Teacher:
    args = {"pretrained": False, "image_size": 32, "precision": "bf16"}
    return load_teacher("timm:vit_tiny_patch16_224", **args)  # type: ignore[arg-type]


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def rounded(coarse: bool) -> Any:
    """A stand-in for torchao, which needs a GPU: weights rounded by row to float8 and back, or far too coarsely."""

    def quantise(network: nn.Module, layers: dict[str, nn.Linear]) -> None:
        for layer in layers.values():
            scale = layer.weight.abs().amax(dim=1, keepdim=True) / (1.0 if coarse else 448.0)
            values = (layer.weight / scale).float()
            values = values.round() if coarse else values.to(torch.float8_e4m3fn).float()
            layer.weight.data = (values * scale.float()).to(layer.weight.dtype)

    return quantise


def test_a_faithful_teacher_is_admitted_with_its_cosine(
    teacher: Teacher, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(low_precision, "quantise", rounded(coarse=False))
    before = whitened_tokens(teacher, images)
    facts = quantise_checked(teacher, images)
    after = whitened_tokens(teacher, images)
    by_hand = (before * after).sum(1) / before.norm(dim=1) / after.norm(dim=1)
    assert facts == {
        "cosine": pytest.approx(float(by_hand.mean()), abs=1e-6),
        "num_images": 3,
        "num_layers": 48,
    }
    assert 0.999 <= facts["cosine"] < 1


def test_one_that_says_something_else_is_refused_with_the_number(
    teacher: Teacher, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(low_precision, "quantise", rounded(coarse=True))
    with pytest.raises(
        NumericsError, match=r"has a cosine of -?0\.\d+ .* below 0\.999, on 3 images"
    ) as refused:
        quantise_checked(teacher, images)
    assert "--teacher-precision bf16" in refused.value.hint


def test_layers_are_those_of_blocks_with_sides_in_sixteens() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.ModuleDict({"a": nn.Linear(32, 48), "b": nn.Linear(32, 40)})])
            self.head = nn.Linear(32, 16)

    assert list(float8_layers(Network())) == ["blocks.0.a"]


def test_a_network_without_them_is_refused(images: torch.Tensor) -> None:
    teacher = load_teacher("timm:resnet10t", pretrained=False, precision="bf16")
    with pytest.raises(ConfigError, match="has no linear maps in blocks"):
        quantise_checked(teacher, images)


def test_where_it_cannot_be_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_precision, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs torchao"):
        require_float8(torch.device("cuda", 0))
    monkeypatch.setattr(low_precision, "find_spec", lambda name: True)
    with pytest.raises(ResourceError, match="cpu does not multiply in float8"):
        require_float8(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ResourceError, match=r"A100 \(compute capability 8.0\).*8.9 and later"):
        require_float8(torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    require_float8(torch.device("cuda", 0))


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("torchao") is None,
    reason="needs a GPU and torchao",
)
def test_torchao_itself_on_a_gpu(teacher: Teacher, images: torch.Tensor) -> None:
    require_float8(torch.device("cuda", 0))
    facts = quantise_checked(teacher.cuda(), images.cuda())
    assert facts["cosine"] > 0.99
