"""What a step costs, against FlopCounterMode, tensors that autograd really keeps, and the runs that were measured."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fdkit.commands import pretrain
from fdkit.commands._blueprint import blueprint
from fdkit.commands.distill import DistillConfig
from fdkit.config import validate
from fdkit.errors import ConfigError
from fdkit.methods._method import Method
from fdkit.training import cost
from fdkit.training.cost import Footprint, Measured, Rates
from fdkit.training.hardware import GPUS, find_gpu, reported_gpu
from fdkit.training.trace import Trace, trace_step

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "plan_error.json"
TINY = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
GIGA = 1e9


def distillation(teacher: str) -> Method:
    return blueprint("distill", validate(DistillConfig, {"data": "", "teacher": teacher}, ""), num_classes=1)


def pretraining(method: str, **values: Any) -> Method:
    """The method with random weights that are there."""
    kind = pretrain.config_class(method)
    return pretrain.build_method(validate(kind, {"data": ""} | values, ""))


def tiny(method: str, **more: Any) -> Method:
    return pretraining(
        method,
        network={"architecture": "vit_tiny_patch16_224", "model_args": TINY, "pooling": "patches"},
        views={"image_size": 32},
        **more,
    )


def traced(method: Method, batch_size: int, **options: Any) -> Trace:
    return trace_step(
        method,
        batch_size=batch_size,
        precision=options.pop("precision", "bf16"),
        on_gpu=options.pop("on_gpu", True),
        **options,
    )


def test_feature_distillation_of_vit_b_takes_the_published_operations() -> None:
    trace = traced(distillation("clip_vitb"), 2)
    assert trace.flops["teacher"] / GIGA == pytest.approx(35.1, rel=2e-3)
    assert trace.flops["student"] == pytest.approx(trace.flops["teacher"], rel=2e-3)
    assert trace.flops["backward"] == pytest.approx(2 * trace.flops["student"], rel=0.01)
    assert trace.total_flops / 1e12 == pytest.approx(0.141, rel=5e-3)


def test_pretraining_takes_the_operations_that_were_worked_out_by_hand() -> None:
    base = {"architecture": "vit_base_patch16_224"}
    kind = pretrain.config_class("mocov3")
    mocov3 = blueprint("pretrain", validate(kind, {"data": "", "network": base}, ""), num_classes=1)
    trace = traced(mocov3, 2)
    # Two views, each through both networks, of which one has a backward pass; the last block for one token.
    assert trace.total_flops / 1e12 == pytest.approx(0.262, rel=5e-3)
    assert trace.flops["momentum"] == pytest.approx(trace.flops["student"], rel=1e-3)
    kind = pretrain.config_class("mae")
    mae = traced(blueprint("pretrain", validate(kind, {"data": "", "network": base}, ""), num_classes=1), 2)
    assert mae.flops["student"] / GIGA == pytest.approx(8.8, rel=0.03)  # a quarter of the patches
    assert 8.8 < mae.flops["heads"] / GIGA < 10.8  # the decoder, whose last block skips what has no loss


@pytest.mark.parametrize("method", ["simsiam", "mae"])
def test_all_operations_are_those_that_a_real_step_runs(method: str) -> None:
    module = tiny(method).train()
    views = [torch.rand(4, 3, 32, 32) for _ in range(module.views.num_views)]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(views, 0.5)["loss"].backward()
    trace = traced(module, 4, precision="fp32", on_gpu=False)
    assert 4 * trace.total_flops == pytest.approx(counter.get_total_flops(), rel=1e-9)


def kept_bytes(method: Method, batch_size: int) -> int:
    """Bytes that autograd keeps of a real forward pass, weights left out."""
    kept: dict[int, int] = {}
    held = [*method.parameters(), *method.buffers()]
    own = {tensor.untyped_storage().data_ptr() for tensor in held}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    views = [torch.rand(batch_size, 3, 32, 32) for _ in range(method.views.num_views)]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = method(views, 0.5)["loss"]
    assert loss.requires_grad
    return sum(kept.values())


def test_memory_an_image_is_what_autograd_keeps_and_little_more() -> None:
    module = tiny("mae").train()
    kept = (kept_bytes(module, 192) - kept_bytes(module, 128)) / 64
    small, large = (traced(module, size, precision="fp32", on_gpu=False) for size in (128, 192))
    memory = cost.footprint(cost.count_weights(module), "adamw", small, large)
    assert 1.0 <= memory.per_image / kept < 1.35  # what is not kept lives for a moment


def test_tracing_changes_nothing() -> None:
    method = tiny("mocov3").train()
    before = {name: value.clone() for name, value in method.state_dict().items()}
    state = torch.get_rng_state()
    traced(method, 4)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in method.state_dict().items())
    assert all(parameter.grad is None for parameter in method.parameters())
    assert "pooled" not in method.student.__dict__


def test_a_fused_kernel_keeps_no_scores_and_does_the_same_operations() -> None:
    method = distillation("timm:deit_tiny_patch16_224.fb_in1k")
    fused, written_out = (traced(method, 4, on_gpu=on_gpu) for on_gpu in (True, False))
    assert fused.total_flops == pytest.approx(written_out.total_flops, rel=1e-9)
    scores = 4 * 12 * 3 * 197**2 * 2  # of every image, block and head, in bfloat16
    assert written_out.peak_bytes - fused.peak_bytes >= scores


def test_activation_checkpointing_costs_a_forward_pass_and_saves_memory() -> None:
    method = distillation("timm:deit_tiny_patch16_224.fb_in1k")
    plain, checkpointed = traced(method, 4), traced(method, 4, checkpoint_every=1)
    again = checkpointed.total_flops - plain.total_flops
    assert again == pytest.approx(plain.flops["student"], rel=0.03)  # but for both ends of it
    assert checkpointed.peak_bytes < 0.5 * plain.peak_bytes


def test_a_batch_in_cached_parts_takes_less_memory_and_more_operations() -> None:
    method = pretraining("mocov3", network={"architecture": "vit_tiny_patch16_224"})
    whole, parts = traced(method, 16), traced(method, 16, cached_parts=4)
    assert parts.peak_bytes < 0.6 * whole.peak_bytes
    assert parts.total_flops > 1.2 * whole.total_flops


def step(**values: Any) -> Trace:
    numbers: dict[str, Any] = {
        "batch_size": 4, "flops": {"student": 1e9, "backward": 2e9}, "traffic": 1e6, "num_operations": 10,
        "peak_bytes": 500,
    }  # fmt: skip
    return Trace(**numbers | values)


def test_step_time_is_products_and_moves_or_the_starts() -> None:
    rates = Rates(matmul_flops=6e9, bandwidth=8e6, seconds_per_operation=0.1)
    # 12e9 operations take 2 s, 4e6 bytes of images and 4e6 of the update 1 s.
    assert cost.step_seconds(step(), rates, update_bytes=4e6) == pytest.approx(3.0)
    assert not cost.is_launch_bound(step(), rates)
    assert cost.step_seconds(step(num_operations=50), rates) == pytest.approx(5.0)
    assert cost.is_launch_bound(step(num_operations=50), rates)
    assert cost.utilisation(step(), 4.0, 6e9) == pytest.approx(0.5)
    assert cost.floor_rate(step(), 6e9) == pytest.approx(2.0)


def test_footprint_is_the_line_through_both_traces_and_what_stays() -> None:
    weights = cost.Weights(trained=10, held=16, teacher=5, teacher_bytes=10, student=10, momentum=6)
    memory = cost.footprint(weights, "adamw", step(), step(batch_size=8, peak_bytes=900))
    assert memory == Footprint(state=4 * 16 + 8 * 10 + 10, fixed=100, per_image=100)
    assert cost.footprint(weights, "sgd", step(), step(batch_size=8, peak_bytes=900)).state == 64 + 40 + 10
    assert cost.disk_bytes(weights, "adamw", keep_checkpoints=2) == 3 * (64 + 80) + 40
    half = cost.sliced(memory, weights, 2)
    assert half.state == 10 + 144 / 2
    assert half.fixed == 100 - 20


@pytest.mark.parametrize("gigabytes", [24, 80])
def test_the_largest_batch_fits_and_one_more_does_not(gigabytes: float) -> None:
    memory = Footprint(state=5e9, fixed=0.6e9, per_image=123e6)
    largest = memory.largest_batch(gigabytes * GIGA)
    assert largest > 0
    assert memory.fits(largest, gigabytes * GIGA)
    assert not memory.fits(largest + 1, gigabytes * GIGA)
    assert Footprint(80e9, 0, 1).largest_batch(80e9) == 0


def test_calibration_finds_planted_constants() -> None:
    gpu = GPUS["a100"]
    rates = Rates(cost.MATMUL_SHARE * gpu.bf16_flops, 0.5 * gpu.bandwidth, 20e-6)
    traces = [
        step(flops={"student": flops}, traffic=traffic, num_operations=operations)
        for flops, traffic, operations in ((1e12, 1e9, 10), (1e11, 1e10, 10), (1e9, 1e6, 2000))
    ]
    runs = [
        Measured("", trace, 1e9, gpu, cost.step_seconds(trace, rates, update_bytes=1e9)) for trace in traces
    ]
    assert cost.calibrate(runs) == (0.5, 20e-6)


def test_the_constants_and_errors_stated_are_those_of_the_benchmark() -> None:
    result = json.loads(RESULT.read_text())
    fitted = result["fitted"]
    assert fitted["traffic_share"] == cost.TRAFFIC_SHARE
    assert pytest.approx(fitted["seconds_per_operation"]) == cost.SECONDS_PER_OPERATION
    assert pytest.approx(result["largest_step_error_percent"], abs=1) == cost.MAX_ERROR_PERCENT
    assert result["largest_step_error_percent"] <= cost.MAX_ERROR_PERCENT
    assert pytest.approx(result["largest_memory_error_percent"], abs=1) == cost.MAX_MEMORY_ERROR_PERCENT
    assert result["largest_memory_error_percent"] <= cost.MAX_MEMORY_ERROR_PERCENT


@pytest.mark.parametrize(
    ("reported", "name"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
    ],
)
def test_a_drivers_name_finds_its_data_sheet(reported: str, name: str) -> None:
    assert reported_gpu(reported) is GPUS[name]


def test_an_unknown_device_is_none_and_an_unknown_name_an_error() -> None:
    assert reported_gpu("Tesla K80") is None
    with pytest.raises(ConfigError, match=r"gpu h2000: .*\n.*h200"):
        find_gpu("h2000")
