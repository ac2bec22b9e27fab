"""The cost of one feature-distillation step, against a plain reading of the paper.

All sides start from the same weights and see the same batch and the same random numbers; losses must agree before
anything is timed (closely where a side draws its own dropped paths: batched ones, or compiled). The sides take turns in
one process; what is compared is the median of the ratios within turns: CPU-seconds at one thread, or CUDA events. The
plain side is how the method is usually first written: naive attention, images un-normalised and normalised again for
the teacher, a 1x1 convolution as projector, AdamW and clipping parameter by parameter, the loss read at every step.

    python benchmarks/distill_step.py --output benchmarks/results/distill_step_cpu.json
    python benchmarks/distill_step.py --device cuda --model base large --precision bf16 --batch-size 128 --sides plain \
        fdkit batched plain-compiled fdkit-compiled batched-compiled --output benchmarks/results/distill_step_gpu.json
"""

import argparse
import copy
import gc
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
from torch.utils.flop_counter import FlopCounterMode

from fdkit.data.views import CropConfig, RandomCrop
from fdkit.methods.feature_distillation import FeatureDistillation, FeatureDistillationConfig
from fdkit.models.attention import attention_path
from fdkit.models.backbone import IMAGENET_MEAN, IMAGENET_STD, Backbone, Preprocessing
from fdkit.models.fast_beit import use_batched_depth
from fdkit.models.libraries import build_timm
from fdkit.models.regions import compile_teacher
from fdkit.models.student import StudentConfig, build_student
from fdkit.teachers.teacher import Teacher
from fdkit.training.compiling import compile_regions
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
SIDES = ("plain", "fdkit", "batched", "plain-compiled", "fdkit-compiled", "batched-compiled")
PEAK_FLOPS = {"H100": 989.4e12, "H200": 989.4e12}
"""Dense bfloat16 products a second, by the name of a GPU; NVIDIA's data sheets of the SXM boards."""
OWN_DRAWS_TOLERANCE = 0.05
"""Relative difference of losses allowed where a side drops other paths than the plain one."""

Step = Callable[[Tensor], Any]


class Case(NamedTuple):
    """One comparison."""

    model: str
    precision: str
    batch_size: int
    drop_path: float
    device: torch.device


def fdkit_step(
    teacher: Backbone, student: Backbone, projector: nn.Linear, case: Case, *, batched: bool, compiled: bool
) -> Step:
    """A step as fdkit trains; gives the loss as a tensor. batched: stochastic depth; compiled: with train.compile."""
    method = FeatureDistillation(
        Teacher(copy.deepcopy(teacher), name=case.model),
        copy.deepcopy(student),
        RandomCrop(CropConfig()),
        FeatureDistillationConfig(),
    )
    method.projector.load_state_dict(projector.state_dict())
    method = method.to(case.device).train()
    if batched:
        use_batched_depth(method.student.network)
    if compiled:
        compile_regions(method)
        compile_teacher(method.teacher.backbone.network, case.model)
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


def plain_step(
    teacher: Backbone, student: Backbone, projector: nn.Linear, case: Case, *, compiled: bool
) -> Step:
    """A step of the plain side; gives the loss as a number."""
    model = PlainDistillation(teacher, student, projector).to(case.device).train()
    if compiled:
        model.compile()
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


def build_side(side: str, case: Case) -> Step:
    """One side, from the same random weights as the others."""
    torch.manual_seed(0)
    clip = Preprocessing(CLIP_MEAN, CLIP_STD, 224)
    teacher = build_timm(MODELS[case.model], {}, preprocessing=clip).eval()
    student = build_student(StudentConfig(drop_path=case.drop_path), teacher, image_size=224, seed=1)
    projector = nn.Linear(student.embed_dim, teacher.embed_dim)
    kind, _, how = side.partition("-")
    if kind == "plain":
        return plain_step(teacher, student, projector, case, compiled=bool(how))
    return fdkit_step(teacher, student, projector, case, batched=kind == "batched", compiled=bool(how))


def images_of(case: Case) -> Tensor:
    """A batch in [0, 1]."""
    generator = torch.Generator().manual_seed(2)
    return torch.rand(case.batch_size, 3, 224, 224, generator=generator).to(case.device)


def flops_per_image(case: Case) -> float:
    """Operations of matrix products in a step that drops nothing, forward and backward; 2 for a multiply-add."""
    few = case._replace(drop_path=0.0, batch_size=1)
    step = build_side("plain", few)
    with FlopCounterMode(display=False) as counter:
        step(images_of(few))
    return float(counter.get_total_flops())


def matmul_flops(case: Case) -> float:
    """Operations a second that this machine reaches on one large product of this precision."""
    size = 8192 if case.device.type == "cuda" else 1536
    a, b = (torch.randn(size, size, device=case.device, dtype=PRECISIONS[case.precision]) for _ in range(2))

    def product(_: Tensor) -> Tensor:
        return (a @ b)[0, 0].float()

    seconds = [timed(product, a)[0] for _ in range(6)]
    return float(2 * size**3 / min(seconds[1:]))


def peak_bytes(side: str, case: Case) -> int:
    """Most memory of the GPU that one side alone takes in a step."""
    step, images = build_side(side, case), images_of(case)
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        step(images)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    del step, images
    gc.collect()
    torch.cuda.empty_cache()
    return int(peak)


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


def compare(case: Case, sides: list[str], *, repeats: int) -> dict[str, Any]:
    """Seconds of all sides, taking turns, after losses of two steps agreed (the second after an update)."""
    peaks = {side: peak_bytes(side, case) for side in sides} if case.device.type == "cuda" else {}
    flops, rate = flops_per_image(case), matmul_flops(case)
    steps = {side: build_side(side, case) for side in sides}
    images = images_of(case)
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    losses: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(2 + repeats):
        for side in sorted(sides, reverse=turn % 2 == 1):
            torch.manual_seed(100 + turn)  # so that both drop the same paths
            elapsed, loss = timed(steps[side], images)
            losses[side].append(loss)
            if turn >= 2:
                seconds[side].append(elapsed)
        assert_parity(losses, case)
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    name = torch.cuda.get_device_name() if case.device.type == "cuda" else ""
    peak = next((value for part, value in PEAK_FLOPS.items() if part in name), None)
    reached = {side: flops * case.batch_size / value for side, value in medians.items()}
    return {
        "model": case.model,
        "precision": case.precision,
        "batch_size": case.batch_size,
        "drop_path": case.drop_path,
        "attention": attention_path(case.device, PRECISIONS[case.precision]),
        "losses": losses,
        "seconds": seconds,
        "median_seconds": medians,
        "speedups": {side: speedup(seconds, side) for side in sides if side != "plain"},
        "speedup": speedup(seconds, "fdkit"),
        "flops_per_image": flops,
        "matmul_flops": rate,
        "share_of_matmul": {side: value / rate for side, value in reached.items()},
        "model_flops_utilisation": {side: value / peak for side, value in reached.items()} if peak else None,
        "peak_bytes": peaks or None,
        "peak_ratio": {side: peaks[side] / peaks["plain"] for side in sides} if peaks else None,
    }


def speedup(seconds: dict[str, list[float]], side: str) -> dict[str, float]:
    """How many times as fast as the plain side: quartiles of the ratios within turns."""
    ratios = [plain / ours for plain, ours in zip(seconds["plain"], seconds[side], strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


def assert_parity(losses: dict[str, list[float]], case: Case) -> None:
    """All sides have computed the same losses so far, to the precision at hand and to what they draw."""
    for side, values in losses.items():
        exact = 1e-4 if case.precision == "fp32" else 1e-2
        tolerance = exact if side in ("plain", "fdkit") else OWN_DRAWS_TOLERANCE
        for ours, plain in zip(values, losses["plain"], strict=True):
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
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=["plain", "fdkit", "batched"])
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
    results = [compare(case, args.sides, repeats=args.repeats) for case in cases]
    document = json.dumps({"environment": environment(args.device), "results": results}, indent=2)
    if args.output:
        args.output.write_text(document + "\n")
    print(document)


if __name__ == "__main__":
    main()
