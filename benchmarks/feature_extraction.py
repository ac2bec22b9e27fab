"""How near the extraction of features comes to the bare forward pass, and what memory a large set of them takes.

Rate: the bare side is the network's own class token on a batch that is on the device already, again and again; fdkit's
reads images from memory, crops, batches, moves, forwards, checks and writes to disk. Both see the same images, in one
process, taking turns. Decoding files is left out: it costs the same to anybody, and `data_path.py` measures it.
Memory: a fresh process fills and reads a store of 1,281,167 x 768 features made without a network, and says how much
memory of its own it held besides the file's pages, which the system may drop.

    python benchmarks/feature_extraction.py --output benchmarks/results/feature_extraction_cpu.json
    python benchmarks/feature_extraction.py --device cuda --architecture vit_base_patch16_224 --images 20000 \
        --batch-size 256 --precision bf16 --workers 12 --output benchmarks/results/feature_extraction_gpu.json
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from distill_step import environment

from fdkit.data.loader import LoaderConfig
from fdkit.data.sources import ArraySource
from fdkit.evaluation._subject import Extraction, Subject
from fdkit.models.backbone import Preprocessing
from fdkit.models.libraries import build_timm
from fdkit.teachers.teacher import Teacher

IMAGENET = (1_281_167, 768)
GOAL_GB = 5.0
MEMORY = """
import resource, sys, time
from pathlib import Path
import numpy as np, torch
from fdkit.evaluation._store import FeatureStore
from fdkit.evaluation.features import Rows

def own():  # anonymous memory: pages of files are not counted
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

num_rows, width = int(sys.argv[2]), int(sys.argv[3])
highest = before = own()
def make(indices):
    global highest
    values = torch.randn(4096, width)
    for start in range(0, len(indices), 4096):
        rows = torch.from_numpy(indices[start : start + 4096])
        yield Rows(rows, values[: len(rows)])
        highest = max(highest, own())
store = FeatureStore(Path(sys.argv[1]), {"benchmark": 1}, num_images=num_rows, width=width)
start = time.perf_counter()
values, indices = store.fill(make)
filled = time.perf_counter() - start
start = time.perf_counter()
values, indices = store.read()
read = time.perf_counter() - start
for block in values.split(4096):
    block.sum()
    highest = max(highest, own())
size = (store.folder / "values.f32").stat().st_size
print(size, highest - before, filled, read)
"""


def rates(args: argparse.Namespace) -> dict[str, Any]:
    """Images a second of both sides, taking turns."""
    torch.manual_seed(0)
    size = args.image_size
    preprocessing = Preprocessing((0.5,) * 3, (0.5,) * 3, size, crop_ratio=1.0)
    backbone = build_timm(args.architecture, {"img_size": size}, preprocessing=preprocessing).eval()
    backbone.fold_statistics()
    teacher = Teacher(backbone, name=args.architecture).to(args.device)
    pixels = np.random.default_rng(0).integers(256, size=(args.images, size, size, 3), dtype=np.uint8)
    source = ArraySource("made", pixels, np.arange(args.images) % 10, [str(label) for label in range(10)])
    batch = torch.rand(args.batch_size, 3, size, size, device=args.device)
    extraction = Extraction(
        args.device,
        batch_size=args.batch_size,
        precision=args.precision,
        loader=LoaderConfig(workers=args.workers),
    )

    def bare() -> None:
        with (
            torch.no_grad(),
            torch.autocast(args.device.type, torch.bfloat16, enabled=args.precision == "bf16"),
        ):
            for _ in range(args.images // args.batch_size):
                backbone.pooled(batch, "cls")

    def extract() -> None:
        Subject(teacher, "made", "test", extraction).features(source)

    sides = {"bare": bare, "fdkit": extract}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(1 + args.repeats):
        for name in sorted(sides, reverse=turn % 2 == 1):
            elapsed = clock(args.device)
            sides[name]()
            elapsed = clock(args.device) - elapsed
            if turn:
                seconds[name].append(elapsed)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "architecture": args.architecture,
        "images": args.images,
        "batch_size": args.batch_size,
        "precision": args.precision,
        "workers": args.workers,
        "seconds": seconds,
        "images_per_second": {name: args.images / value for name, value in medians.items()},
        "share_of_bare_rate": statistics.median(
            bare / ours for bare, ours in zip(seconds["bare"], seconds["fdkit"], strict=True)
        ),
        "goal": 0.95,
    }


def clock(device: torch.device) -> float:
    """CPU seconds of this process, or wall seconds once the GPU is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def memory(num_rows: int, width: int) -> dict[str, Any]:
    """Size on disk, and the memory a process of its own held besides."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", MEMORY, folder, str(num_rows), str(width)]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    size, held, filled, read = (float(word) for word in printed)
    return {
        "rows": num_rows,
        "width": width,
        "disk_gb": size / 1e9,
        "own_memory_gb": held / 1e9,
        "fill_seconds": filled,
        "open_seconds_checksum_included": read,
        "goal_gb": GOAL_GB,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--architecture", default="vit_small_patch16_224")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=int, default=IMAGENET[0], help="of the store; 0 leaves memory out")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    document: dict[str, Any] = {"environment": environment(args.device), "rate": rates(args)}
    if args.rows:
        document["memory"] = memory(args.rows, IMAGENET[1])
    text = json.dumps(document, indent=2)
    if args.output:
        args.output.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
