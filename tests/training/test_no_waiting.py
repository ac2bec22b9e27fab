"""Between two logged lines nothing in a step reads a number from the device, which would hold it up.

On a GPU, PyTorch itself can tell. On a CPU a dispatch mode stands in: it refuses the operations that must read tensors'
values to go on.
"""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fdkit.commands import pretrain
from fdkit.methods._method import Method
from fdkit.training.optimizer import OptimizerConfig, build_optimizer
from fdkit.training.votes import Window

READS = {
    "aten::_local_scalar_dense",  # item(), tolist(), bool(), float()
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::equal",
    "aten::bincount",
}


class NothingIsRead(TorchDispatchMode):
    """Raises where a value of a tensor would be waited for; what runs on the host by design is let through."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        reads_mask = name in ("aten::index", "aten::index_put_") and any(
            isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1]
        )
        if name in READS or reads_mask:
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


def contracts() -> Any:
    """How every pretraining method is built small: the module of their common tests."""
    if "test_contracts" in sys.modules:
        return sys.modules["test_contracts"]
    path = Path(__file__).parents[1] / "methods" / "test_contracts.py"
    spec = importlib.util.spec_from_file_location("method_contracts", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def distillation() -> tuple[Method, list[Tensor]]:
    from fdkit.data.views import CropConfig, RandomCrop
    from fdkit.methods.feature_distillation import FeatureDistillation, FeatureDistillationConfig
    from fdkit.models.student import StudentConfig, build_student
    from fdkit.teachers.loading import load_teacher

    teacher = load_teacher("timm:vit_tiny_patch16_224", pretrained=False, image_size=32)
    # Batched: on a CPU alone, Bernoulli's dropped samples are left out, which reads the draws.
    student = build_student(
        StudentConfig(depth=2, drop_path_mode="batched"), teacher.backbone, image_size=32, seed=0
    )
    views = RandomCrop(CropConfig(image_size=32))
    method = FeatureDistillation(teacher, student, views, FeatureDistillationConfig()).train()
    return method, [torch.rand(4, 3, 32, 32)]


def update(method: Method, views: list[Tensor], optimizer: torch.optim.Optimizer, window: Window) -> None:
    """The device's part of a step of the loop."""
    optimizer.zero_grad(set_to_none=True)
    metrics = method(views, 0.1)
    metrics["loss"].backward()
    method.before_step(0.1)
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    metrics["grad_norm"] = torch.nn.utils.get_total_norm(gradients)
    torch.nn.utils.clip_grads_with_norm_(
        [p for group in optimizer.param_groups for p in group["params"]], 1.0, metrics["grad_norm"]
    )
    optimizer.step()
    method.after_step(0.1)
    window.add(metrics)


@pytest.mark.parametrize("name", ["feature-distillation", *pretrain.choices()])
def test_a_step_reads_nothing(name: str) -> None:
    if name == "feature-distillation":
        method, views = distillation()
    else:
        method = contracts().build(name)
        views = contracts().images(method)
    optimizer = build_optimizer(method, OptimizerConfig(warmup_epochs=0))
    window = Window()
    update(method, views, optimizer, window)  # lazily made state, such as the optimiser's, may read once
    with NothingIsRead():
        update(method, views, optimizer, window)


@pytest.mark.parametrize(
    "reading", [lambda x: x.item(), lambda x: bool(x > 0), lambda x: x[x > 0], lambda x: x.nonzero()]
)
def test_the_stand_in_finds_what_waits(reading: Any) -> None:
    with NothingIsRead(), pytest.raises(AssertionError, match="waits for the device"):
        reading(torch.ones(1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["feature-distillation", *pretrain.choices()])
def test_a_step_on_a_gpu_synchronises_nothing(name: str) -> None:
    if name == "feature-distillation":
        method, views = distillation()
    else:
        method = contracts().build(name)
        views = contracts().images(method)
    method, views = method.cuda(), [view.cuda() for view in views]
    optimizer, window = build_optimizer(method, OptimizerConfig(warmup_epochs=0)), Window()
    update(method, views, optimizer, window)
    torch.cuda.set_sync_debug_mode("error")
    try:
        update(method, views, optimizer, window)
    finally:
        torch.cuda.set_sync_debug_mode("default")
