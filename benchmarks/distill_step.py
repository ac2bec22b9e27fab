"""The cost of one feature-distillation step, against a plain reading of the paper.

Both sides start from the same weights and see the same batch and the same random numbers; losses must agree before
anything is timed. The sides take turns in one process, and medians are compared: CPU-seconds at one thread, or CUDA
events. The plain side is how the method is usually first written: naive attention, images un-normalised and normalised
again for the teacher, a 1x1 convolution as projector, AdamW and clipping parameter by parameter, the loss read at every
step.

    python benchmarks/distill_step.py --output benchmarks/results/distill_step_cpu.json
"""

import argparse
import copy
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdkit.data.views import CropConfig, RandomCrop
from fdkit.methods.feature_distillation import FeatureDistillation, FeatureDistillationConfig
from fdkit.models.attention import attention_path
from fdkit.models.backbone import IMAGENET_MEAN, IMAGENET_STD, Backbone, Preprocessing
from fdkit.models.libraries import build_timm
from fdkit.models.student import StudentConfig, build_student
from fdkit.teachers.teacher import Teacher
from fdkit.training.optimizer import OptimizerConfig, build_optimizer

MODELS = {
    "tiny": "vit_tiny_patch16_224",
    "base": "vit_base_patch16_224",
    "large": "vit_large_patch14_224",
}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
OPTIM = OptimizerConfig(lr=1e-4)
MAX_NORM = 3.0

Step = Callable[[Tensor], Any]


class Case(NamedTuple):
    """One comparison."""

    model: str
    precision: str
    batch_size: int
    drop_path: float
    device: torch.device


def fdkit_step(teacher: Backbone, student: Backbone, projector: nn.Linear, case: Case) -> Step:
    """A step as fdkit trains; gives the loss as a tensor."""
    method = FeatureDistillation(
        Teacher(copy.deepcopy(teacher), name=case.model),
        copy.deepcopy(student),
        RandomCrop(CropConfig()),
        FeatureDistillationConfig(),
    )
    method.projector.load_state_dict(projector.state_dict())
    method = method.to(case.device).train()
    optimizer = build_optimizer(method, OPTIM)
    parameters = list(method.parameters())

    def step(images: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(case.device.type, torch.bfloat16, enabled=case.precision == "bf16"):
            loss = method([images], 0.0)["loss"]
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        optimizer.step()
        return loss.detach()

    return step


class PlainDistillation(nn.Module):
    """Feature distillation as first written: timm's networks on their unfused paths, a convolution as projector."""

    def __init__(self, teacher: Backbone, student: Backbone, projector: nn.Linear) -> None:
        super().__init__()
        self.teacher = unfused(teacher.network).requires_grad_(False)
        self.student = unfused(plain_copy(student))
        self.decoder = nn.Conv1d(projector.in_features, projector.out_features, kernel_size=1)
        with torch.no_grad():
            self.decoder.weight.copy_(projector.weight[:, :, None])
            self.decoder.bias.copy_(projector.bias)
        self.loss = nn.SmoothL1Loss(beta=2.0)
        statistics = {
            "mean": IMAGENET_MEAN,
            "std": IMAGENET_STD,
            "clip_mean": CLIP_MEAN,
            "clip_std": CLIP_STD,
        }
        for name, values in statistics.items():
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """The loss of images (B, 3, H, W) normalised with ImageNet statistics."""
        prediction = self.decoder(self.student.forward_features(images).transpose(1, 2)).transpose(1, 2)
        self.teacher.eval()
        with torch.no_grad():
            pixels = images * self.std + self.mean
            target = self.teacher.forward_features((pixels - self.clip_mean) / self.clip_std)
            target = F.layer_norm(target, target.shape[-1:])
        return self.loss(prediction, target).mean()


def plain_step(teacher: Backbone, student: Backbone, projector: nn.Linear, case: Case) -> Step:
    """A step of the plain side; gives the loss as a number."""
    model = PlainDistillation(teacher, student, projector).to(case.device).train()
    decay, exempt = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_exempt = parameter.ndim <= 1 or name.endswith((".bias", "cls_token"))
            (exempt if is_exempt else decay).append(parameter)
    groups = [{"params": decay, "weight_decay": OPTIM.weight_decay}, {"params": exempt, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=OPTIM.lr, betas=OPTIM.betas, foreach=False, fused=False)
    parameters = decay + exempt

    def step(images: Tensor) -> float:
        with torch.autocast(case.device.type, torch.bfloat16, enabled=case.precision == "bf16"):
            loss = model((images - model.mean) / model.std)
        optimizer.zero_grad()
        loss.backward()
        clip_one_by_one(parameters)
        optimizer.step()
        return loss.item()

    return step


def clip_one_by_one(parameters: list[nn.Parameter]) -> None:
    """Scales the gradient to a global norm of at most MAX_NORM, a parameter at a time."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    for gradient in gradients:
        gradient.mul_((MAX_NORM / (norm + 1e-6)).clamp(max=1.0))


def unfused(network: nn.Module) -> nn.Module:
    """A copy of a timm network whose attention writes its weights out."""
    network = copy.deepcopy(network)
    for module in network.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return network


def plain_copy(student: Backbone) -> nn.Module:
    """The student's network as timm itself makes it, with the same weights."""
    network = timm.create_model(student.recipe["architecture"], **student.recipe["model_args"])
    network.load_state_dict(student.network.state_dict())
    return network


def build_sides(case: Case) -> dict[str, Step]:
    """Both sides, from the same random weights."""
    torch.manual_seed(0)
    clip = Preprocessing(CLIP_MEAN, CLIP_STD, 224)
    teacher = build_timm(MODELS[case.model], {}, preprocessing=clip).eval()
    student = build_student(StudentConfig(drop_path=case.drop_path), teacher, image_size=224, seed=1)
    projector = nn.Linear(student.embed_dim, teacher.embed_dim)
    sides = {"plain": plain_step, "fdkit": fdkit_step}
    return {name: build(teacher, student, projector, case) for name, build in sides.items()}


def timed(step: Step, images: Tensor) -> tuple[float, float]:
    """Seconds one step takes (CPU time, or device time on CUDA), and its loss."""
    if images.is_cuda:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        loss = step(images)
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000, float(loss)
    begin = time.process_time()
    loss = step(images)
    return time.process_time() - begin, float(loss)


def compare(case: Case, *, repeats: int) -> dict[str, Any]:
    """Median seconds of both sides, taking turns, after losses of two steps agreed (the second after an update)."""
    sides = build_sides(case)
    generator = torch.Generator().manual_seed(2)
    images = torch.rand(case.batch_size, 3, 224, 224, generator=generator).to(case.device)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    losses: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(2 + repeats):
        for name in sorted(sides, reverse=turn % 2 == 1):
            torch.manual_seed(100 + turn)  # so that both drop the same paths
            elapsed, loss = timed(sides[name], images)
            losses[name].append(loss)
            if turn >= 2:
                seconds[name].append(elapsed)
        assert_parity(losses, case)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "model": case.model,
        "precision": case.precision,
        "batch_size": case.batch_size,
        "drop_path": case.drop_path,
        "attention": attention_path(case.device, PRECISIONS[case.precision]),
        "losses": losses,
        "seconds": seconds,
        "median_seconds": medians,
        "speedup": medians["plain"] / medians["fdkit"],
    }


def assert_parity(losses: dict[str, list[float]], case: Case) -> None:
    """Both sides have computed the same losses so far, to the precision at hand."""
    tolerance = 1e-4 if case.precision == "fp32" else 1e-2
    for ours, plain in zip(losses["fdkit"], losses["plain"], strict=True):
        assert abs(ours - plain) <= tolerance * abs(plain), f"losses differ: {losses}"


def environment(device: torch.device) -> dict[str, Any]:
    """Hardware, versions and commit."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "commit": git.stdout.strip() or None,
    }


def processor() -> str:
    """The CPU's model name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["tiny"])
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--drop-path", type=float, nargs="+", default=[0.2])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    cases = [
        Case(model, precision, args.batch_size, drop_path, args.device)
        for model in args.model
        for precision in args.precision
        for drop_path in args.drop_path
    ]
    results = [compare(case, repeats=args.repeats) for case in cases]
    document = json.dumps({"environment": environment(args.device), "results": results}, indent=2)
    if args.output:
        args.output.write_text(document + "\n")
    print(document)


if __name__ == "__main__":
    main()
