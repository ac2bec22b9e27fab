"""Images a second that a teacher encodes, and the memory it takes to load one, against timm and open_clip themselves.

Both sides have the same random weights and see the same images in [0, 1], in one process, taking turns. The library's
side is its plain forward under inference mode, with the normalisation its images need, and without it (as if they came
normalised); fdkit's is `Teacher.encode`, which folds the normalisation into the first convolution where that is exact.
What both say must agree before anything is timed. Times are CPU-seconds at one thread, or CUDA events. A speed-up is
that of one turn; each turn also times the library against itself, and fdkit counts as not slower where its median
speed-up is 1, or lacks no more of it than a quartile of that control does.

Memory is that of a fresh process that loads CLIP's ViT-L/14 from a file: the highest it held, the file's pages
included, over what it held before, as a multiple of the weights.

    python benchmarks/teacher_throughput.py --output benchmarks/results/teacher_throughput.json
"""

import argparse
import json
import logging
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import safetensors.torch
import timm
import torch
from torch import Tensor

from fdkit.models.attention import has_fast_bfloat16
from fdkit.models.backbone import Tokens
from fdkit.models.folding import folded_statistics
from fdkit.teachers.loading import load_teacher
from fdkit.teachers.teacher import Teacher

MODELS = {
    "dino_vits16": "timm:vit_small_patch16_224.dino",
    "clip_vitb16_timm": "timm:vit_base_patch16_clip_quickgelu_224.openai",
    "clip_vitb16_open_clip": "open_clip:ViT-B-16-quickgelu/openai",
    "swin_tiny": "timm:swin_tiny_patch4_window7_224.ms_in1k",
    "resnet50": "timm:resnet50.a1_in1k",
}
LARGE = "vit_large_patch14_clip_quickgelu_224"
FULL_MODELS = {**MODELS, "clip_vitl14_timm": f"timm:{LARGE}.openai"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}
CONTROL = "library again"
MEMORY_GOAL = 1.3
LOAD = """
import logging, sys
from pathlib import Path
import fdkit.teachers.model, open_clip, timm
from fdkit.teachers.loading import load_teacher

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])

way, path, architecture = sys.argv[1:]
logging.disable(logging.WARNING)
load_teacher("timm:vit_tiny_patch16_224", pretrained=False)  # what libraries keep once they are used
before = status("VmRSS")
if way == "fdkit":
    network = load_teacher(path, architecture=architecture).backbone.network
else:
    network = timm.create_model(architecture, num_classes=0, checkpoint_path=path)
print((status("VmHWM") - before) / sum(weight.nbytes for weight in network.parameters()))
"""

Side = Callable[[Tensor], Any]


class Case(NamedTuple):
    """One comparison."""

    model: str
    precision: str
    is_compiled: bool
    batch_size: int
    device: torch.device


def compare(case: Case, *, repeats: int) -> dict[str, Any]:
    """Seconds of every side in every turn, and the speed-ups turn by turn."""
    teacher = load_teacher(
        FULL_MODELS[case.model], pretrained=False, precision=case.precision, compile=case.is_compiled
    ).to(case.device)
    generator = torch.Generator().manual_seed(1)
    size = teacher.image_size
    images = torch.rand(case.batch_size, 3, size, size, generator=generator).to(case.device)
    sides: dict[str, Side] = {"encode": teacher.encode, **library_sides(teacher, case)}
    assert_parity(teacher, sides, images, TOLERANCE[case.precision])
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(-1, repeats):
        names = list(sides)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            elapsed = timed(sides[name], images)
            if turn >= 0:
                seconds[name].append(elapsed)
    control = ratios(seconds["library"], seconds[CONTROL])
    speedups = {
        name: ratios(seconds[name], seconds["encode"]) for name in sides if name.startswith("library")
    }
    noise = max(abs(1 - quartile) for quartile in control["quartiles"])
    return {
        **case._asdict(),
        "device": str(case.device),
        "folded": folded_statistics(teacher.backbone.network) is not None,
        "images_per_second": {
            name: round(case.batch_size / statistics.median(values), 2) for name, values in seconds.items()
        },
        "speedup_over": speedups,
        "control": control,
        "not_slower": speedups["library"]["median"] >= 1 - noise,
        "seconds": {name: [round(value, 5) for value in values] for name, values in seconds.items()},
    }


def library_sides(teacher: Teacher, case: Case) -> dict[str, Side]:
    """The library's own network and forward, with the normalisation it needs and without."""
    library, _, name = FULL_MODELS[case.model].partition(":")
    dtype = DTYPES[case.precision]
    if library == "timm":
        network = timm.create_model(name, pretrained=False, num_classes=0)
        forward = network.forward_features
    else:
        network = open_clip.create_model(name.partition("/")[0]).visual
        forward = network
    # The very tensors: where weights lie in memory is worth two per cent.
    network.load_state_dict(teacher.backbone.network.state_dict(), assign=True)
    network.eval().to(case.device, dtype)
    mean, std = (
        torch.tensor(values, device=case.device).view(3, 1, 1)
        for values in teacher.backbone.preprocessing[:2]
    )

    def normalised(images: Tensor) -> Any:
        return forward(((images - mean) / std).to(dtype))

    def plain(images: Tensor) -> Any:
        return forward(images.to(dtype))

    sides = {"library": normalised, CONTROL: normalised, "library without normalisation": plain}
    return {name: torch.inference_mode()(compiled(side, case)) for name, side in sides.items()}


def compiled(side: Side, case: Case) -> Side:
    return torch.compile(side) if case.is_compiled else side


def assert_parity(teacher: Teacher, sides: dict[str, Side], images: Tensor, tolerance: float) -> None:
    """Both sides say the same of the images: every token, or CLIP's embedding of the class token."""
    tokens: Tokens = sides["encode"](images)
    theirs = sides["library"](images)
    ours = tokens.all()
    if theirs.ndim == 2:
        ours = tokens.prefix[:, 0] @ teacher.backbone.network.proj
    elif theirs.ndim == 4:
        is_channels_last = theirs.shape[-1] == teacher.embed_dim
        theirs = (theirs if is_channels_last else theirs.permute(0, 2, 3, 1)).flatten(1, 2)
    difference = (ours.float() - theirs.float()).norm() / theirs.float().norm()
    assert difference < tolerance, f"the sides differ by {difference:.1e}"


def timed(side: Side, images: Tensor) -> float:
    """Seconds one batch takes: CPU time, or device time on CUDA."""
    if images.is_cuda:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        side(images)
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1000
    begin = time.process_time()
    side(images)
    return time.process_time() - begin


def ratios(theirs: list[float], ours: list[float]) -> dict[str, Any]:
    """Their seconds over ours in the same turn: median, quartiles, lowest and highest."""
    values = sorted(their / our for their, our in zip(theirs, ours, strict=True))
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {
        "median": round(median, 4),
        "quartiles": [round(low, 4), round(high, 4)],
        "lowest_highest": [round(values[0], 4), round(values[-1], 4)],
    }


def memory() -> dict[str, Any]:
    """Peak memory of loading CLIP's ViT-L/14 from both kinds of files, over its weights; fdkit's way and timm's."""
    if not Path("/proc/self/status").exists():
        return {"skipped": "the system does not tell a process's peak memory"}
    with torch.device("meta"):
        network = timm.create_model(LARGE, num_classes=0)
    state = {
        key: torch.empty(value.shape).uniform_(-0.02, 0.02) for key, value in network.state_dict().items()
    }
    result: dict[str, Any] = {"model": LARGE, "goal": MEMORY_GOAL, "peak_over_weights": {}}
    with tempfile.TemporaryDirectory() as folder:
        for suffix, save in ((".safetensors", safetensors.torch.save_file), (".pth", torch.save)):
            path = Path(folder) / f"large{suffix}"
            save(state, path)
            ways = {way: in_fresh_process(way, path) for way in ("fdkit", "timm")}
            result["peak_over_weights"][suffix] = ways
            path.unlink()
    peaks = [ways["fdkit"] for ways in result["peak_over_weights"].values()]
    return result | {"goal_reached": max(peaks) < MEMORY_GOAL}


def in_fresh_process(way: str, path: Path) -> float:
    command = [sys.executable, "-c", LOAD, way, str(path), LARGE]
    root = Path(__file__).parents[1]
    child = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=root)
    return round(float(child.stdout), 3)


def environment(device: torch.device) -> dict[str, Any]:
    """Hardware, versions and commit."""
    packages = ("timm", "open_clip_torch", "safetensors")
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {"torch": torch.__version__, **{package: version(package) for package in packages}},
        "commit": git("rev-parse", "HEAD"),
        "modified_files": bool(git("status", "--porcelain", "--", "fdkit", "benchmarks")),
    }


def processor() -> str:
    """The CPU's model name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def git(*arguments: str) -> str:
    root = Path(__file__).parents[1]
    found = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    return found.stdout.strip()


def default_precisions(device: torch.device) -> list[str]:
    """bf16 where the device multiplies it faster than fp32."""
    return ["fp32", "bf16"] if device.type == "cuda" or has_fast_bfloat16() else ["fp32"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", choices=FULL_MODELS, default=list(MODELS))
    parser.add_argument("--full", action="store_true", help="every model, ViT-L/14 among them")
    parser.add_argument("--precision", nargs="+", choices=DTYPES, help="fp32, and bf16 where it is fast")
    parser.add_argument(
        "--compile", action="store_true", help="also both sides compiled; the default on CUDA"
    )
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--no-memory", action="store_true", help="leave out the memory of loading")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # random weights are meant
    ways = [False, True] if args.compile or args.device.type == "cuda" else [False]
    cases = [
        Case(model, precision, is_compiled, args.batch_size, args.device)
        for model in (FULL_MODELS if args.full else args.model)
        for precision in args.precision or default_precisions(args.device)
        for is_compiled in ways
    ]
    results = []
    for case in cases:
        torch.compiler.reset()
        results.append(compare(case, repeats=args.repeats))
        print(
            json.dumps({key: value for key, value in results[-1].items() if key != "seconds"}),
            file=sys.stderr,
        )
    document = {
        "question": __doc__.splitlines()[0],
        "goal_reached": all(one["not_slower"] for one in results),
        "memory": {} if args.no_memory else memory(),
        "repeats": args.repeats,
        "environment": environment(args.device),
        "results": results,
    }
    text = json.dumps(document, indent=2)
    if args.output:
        args.output.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
