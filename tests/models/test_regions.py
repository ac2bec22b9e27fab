"""Compiled blocks: whichever way a network is called, they are what runs, and the numbers stay."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fdkit.errors import ConfigError
from fdkit.models.regions import compile_blocks, compile_teacher, repeated_blocks
from fdkit.teachers.loading import load_teacher
from fdkit.teachers.teacher import Teacher
from fdkit.training.compiling import compilation_facts, forget_compilations


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing compiled before, and a backend that runs the graphs as they are."""
    torch._dynamo.reset()
    forget_compilations()
    whole = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **how: whole(self, backend="eager", **how))
    with torch._dynamo.config.patch(recompile_limit=8):
        yield


def teacher(*, compile: bool, name: str = "timm:vit_tiny_patch16_224") -> Teacher:
    return load_teacher(name, pretrained=False, image_size=32, keep_head=True, compile=compile)


CALLS: dict[str, Any] = {
    "final": lambda one, images: one.encode(images).all(),
    "a layer": lambda one, images: one.encode(images, layer=-3).all(),
    "layers": lambda one, images: one.encode(images, layer=[2, 5], norm=False)[1].all(),
    "logits": lambda one, images: one.backbone.logits(images),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_compiled_teacher_runs_one_graph_however_it_is_asked(call: str) -> None:
    images = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        expected: Tensor = CALLS[call](teacher(compile=False), images)
        assert compilation_facts()["graphs"] == 0
        found = CALLS[call](teacher(compile=True), images)
    torch.testing.assert_close(found, expected)
    assert compilation_facts() == {"graphs": 1, "graph_breaks": {}, "limit_hit": False}


def test_a_teacher_of_open_clip_compiles_too() -> None:
    images = torch.rand(2, 3, 32, 32)
    found = teacher(compile=True, name="open_clip:ViT-B-32/laion2b_s34b_b79k").encode(images).all()
    torch.testing.assert_close(
        found, teacher(compile=False, name="open_clip:ViT-B-32/laion2b_s34b_b79k").encode(images).all()
    )
    assert compilation_facts()["graphs"] == 1


def test_a_network_that_repeats_nothing_is_refused_as_a_compiled_teacher() -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))
    assert compile_blocks(network) == 0
    with pytest.raises(ConfigError, match="teacher_compile: toy repeats no blocks"):
        compile_teacher(network, "toy")


def test_a_list_of_single_layers_is_no_list_of_blocks() -> None:
    def block() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 3), nn.GELU())

    class Blocks(nn.Module):
        def __init__(self, parts: list[nn.Module]) -> None:
            super().__init__()
            self.parts = nn.ModuleList(parts)

    assert list(repeated_blocks(Blocks([nn.Linear(3, 3), nn.Linear(3, 3)]))) == []
    assert list(repeated_blocks(Blocks([block()]))) == []
    assert len(list(repeated_blocks(Blocks([block(), block(), block()])))) == 3
