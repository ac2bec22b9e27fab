"""Regional compilation: one graph for blocks that are alike, and words for what the compiler leaves out."""

import copy
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from training_toys import train_toy

from fdkit.models.fast_beit import accelerate, use_batched_depth
from fdkit.models.regions import RECOMPILE_LIMIT, compile_blocks, repeated_blocks
from fdkit.models.stochastic_depth import BufferedDropPath, add_stochastic_depth, buffer_drop_rates
from fdkit.training.compiling import (
    compilation_facts,
    compile_regions,
    forget_compilations,
    warn_of_compilation,
)

VIT: dict[str, Any] = {"depth": 12, "embed_dim": 24, "num_heads": 2, "img_size": 32}
BEIT = VIT | {"global_pool": "token", "use_shared_rel_pos_bias": True, "use_rel_pos_bias": False}
SWIN: dict[str, Any] = {
    "embed_dim": 8, "depths": (2, 2, 6, 2), "num_heads": (1, 1, 2, 2), "img_size": 64, "window_size": 2
}  # fmt: skip


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing compiled before, and a backend that runs the graphs as they are: how many there are is the question."""
    torch._dynamo.reset()
    forget_compilations()
    whole, one = nn.Module.compile, torch.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **how: whole(self, backend="eager", **how))
    monkeypatch.setattr(torch, "compile", lambda f, *a, **k: one(f, *a, **{"backend": "eager", **k}))
    with torch._dynamo.config.patch(recompile_limit=8, optimize_ddp=True):
        yield


def step(network: Any, size: int) -> Tensor:
    output: Tensor = network.forward_features(torch.rand(8, 3, size, size))
    output.sum().backward()
    return output


@pytest.mark.parametrize(
    ("name", "args", "most"),
    [
        ("vit_tiny_patch16_224", VIT, 2),
        ("beit_base_patch16_224", BEIT, 2),
        ("swinv2_tiny_window8_256", SWIN, 8),
    ],
)
def test_blocks_that_differ_in_their_drop_rate_alone_share_a_graph(
    name: str, args: dict[str, Any], most: int
) -> None:
    """timm's own drop paths make one graph for each of the 12 until the limit of 8 is hit."""
    network = timm.create_model(name, drop_path_rate=0.3, **args).train()
    accelerate(network)
    assert compile_blocks(network) == 12
    torch._dynamo.config.recompile_limit = 8
    for _ in range(2):
        step(network, args["img_size"])
    facts = compilation_facts()
    assert 0 < facts["graphs"] <= most
    assert facts["graph_breaks"] == {}
    assert not facts["limit_hit"]


def test_without_buffers_the_limit_is_hit_and_said(caplog: pytest.LogCaptureFixture) -> None:
    network = timm.create_model("vit_tiny_patch16_224", drop_path_rate=0.3, **VIT).train()
    for block in repeated_blocks(network):
        block.compile()
    step(network, 32)
    facts = compilation_facts()
    assert facts["limit_hit"]
    warn_of_compilation(facts)
    assert "limit of 8 graphs for one function was hit" in caplog.text


def test_batched_depth_shares_graphs_whatever_number_of_samples_is_kept() -> None:
    network = timm.create_model("beit_base_patch16_224", drop_path_rate=0.5, **BEIT).train()
    accelerate(network)
    use_batched_depth(network)
    plain = copy.deepcopy(network)
    assert compile_blocks(network) == 12
    images = torch.rand(8, 3, 32, 32)
    for seed in range(2):
        outputs = []
        for one in (network, plain):
            torch.manual_seed(seed)
            outputs.append(one.forward_features(images))
        torch.testing.assert_close(*outputs)  # which drop the same samples
        outputs[0].sum().backward()
    torch.testing.assert_close(network.eval()(images), plain.eval()(images))
    assert not torch.allclose(network.train().forward_features(images), outputs[0])
    facts = compilation_facts()
    assert 0 < facts["graphs"] <= 4  # dropping nothing; one number kept; any number kept; gradients' shapes
    assert not facts["limit_hit"]


class _Breaks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if x.sum() > 0 else x


def test_a_graph_break_is_said_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    block = _Breaks()
    block.compile()
    block(torch.ones(2, 3))
    facts = compilation_facts()
    warn_of_compilation(facts)
    assert "parts of the blocks run uncompiled: Data-dependent branching (1 times)" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        warn_of_compilation({"graphs": 2, "graph_breaks": {}, "limit_hit": False})
    assert caplog.text == ""


def test_a_method_is_compiled_by_its_blocks_and_its_teachers_are_left_to_their_own_option() -> None:
    from fdkit.commands.pretrain import build_method, config_class
    from fdkit.config import validate

    values = {
        "data": "demo",
        "network": {
            "architecture": "vit_tiny_patch16_224",
            "model_args": VIT | {"depth": 3, "patch_size": 8},
        },
        "views": {"image_size": 32},
    }
    method = build_method(validate(config_class("mocov3"), values, "test"))
    assert compile_regions(method) == 6  # three of the student, three of its momentum copy
    assert torch._dynamo.config.recompile_limit == RECOMPILE_LIMIT
    assert torch._dynamo.config.optimize_ddp is False


@pytest.mark.parametrize(
    ("name", "args", "number"),
    [
        ("resnet18", {}, 8),
        ("convnext_atto", {}, 12),
        ("vit_tiny_patch16_224", {"depth": 2}, 2),
        ("swin_tiny_patch4_window7_224", {}, 12),
        ("mlp", {}, 0),
    ],
)
def test_blocks_are_found_in_every_kind_of_network(name: str, args: dict[str, Any], number: int) -> None:
    network = (
        nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)) if name == "mlp" else timm.create_model(name, **args)
    )
    assert len(list(repeated_blocks(network))) == number


def test_a_buffered_rate_has_timms_distribution_and_is_no_state() -> None:
    torch.manual_seed(0)
    drop = BufferedDropPath(0.3).train()
    out = drop(torch.ones(20000, 2, 3))
    values = out.unique()
    torch.testing.assert_close(values, torch.tensor([0.0, 1 / 0.7]))
    assert torch.equal(out[:, 0, 0], out[:, 1, 2])
    assert out.mean().item() == pytest.approx(1, abs=0.02)
    assert drop.state_dict() == {}
    assert torch.equal(drop.eval()(out), out)
    assert BufferedDropPath(0.3, scale_by_keep=False).train()(torch.ones(100, 1)).unique().tolist() == [0, 1]
    assert 0 < BufferedDropPath(0.5, always=True).eval()(torch.ones(100, 1)).mean() < 2


def test_blocks_that_leave_out_dropped_samples_do_so_with_a_buffered_rate_too() -> None:
    """Outside a graph, as where the compiler gave up."""
    network = timm.create_model("beit_base_patch16_224", drop_path_rate=0.5, **BEIT).train()
    accelerate(network)
    torch.manual_seed(1)
    images = torch.rand(8, 3, 32, 32)
    torch.manual_seed(2)
    expected = network.forward_features(images)
    for block in repeated_blocks(network):
        buffer_drop_rates(block)
    torch.manual_seed(2)
    torch.testing.assert_close(network.forward_features(images), expected)


def test_a_teachers_own_depth_is_buffered_too() -> None:
    network = timm.create_model("vit_tiny_patch16_224", depth=3, embed_dim=24, num_heads=2).eval()
    add_stochastic_depth(network, 0.5)
    buffer_drop_rates(network)
    rates = [m.keep_prob.item() for m in network.modules() if isinstance(m, BufferedDropPath)]
    assert rates == [1.0, 1.0, 0.75, 0.75, 0.5, 0.5]


@pytest.mark.parametrize("graphs", [0, 3])
def test_a_run_says_what_was_compiled_of_a_teacher_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, graphs: int
) -> None:
    facts = {"graphs": graphs, "graph_breaks": {"a print": 2} if graphs else {}, "limit_hit": False}
    monkeypatch.setattr("fdkit.training.compiling.compilation_facts", lambda: facts)
    train_toy(tmp_path / "run")
    said = json.loads((tmp_path / "run" / "run.json").read_text()).get("compile")
    assert said == (facts if graphs else None)
    assert ("run uncompiled: a print (2 times)" in caplog.text) == bool(graphs)
