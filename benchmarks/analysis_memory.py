"""Whether the memory of attention distance grows with the number of images.

    python benchmarks/analysis_memory.py --output benchmarks/results/analysis_memory.json

Three ways on the same random ViT and the same random images, a fresh process each: `streamed` is fdkit's;
`collected` keeps every attention matrix until the end, as one does with an extractor that returns them; `plain` only
runs the model, on its fused path. The first two must find the same distances. Goal: streamed stays below 2 GB and
does not grow from the fewest images to the most.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

LIMIT_GB = 2.0
FLAT_RATIO = 1.05


def measure(way: str, model: str, num_images: int, batch_size: int) -> dict[str, Any]:
    """Distances and this process's peak memory."""
    import torch

    from fdkit.analysis.attention_distance import AttentionDistanceConfig, analyze
    from fdkit.analysis.observe import Images, Observed
    from fdkit.models.libraries import build_timm

    torch.manual_seed(0)
    backbone = build_timm(model, {}).eval()
    side = backbone.image_size
    sizes = [batch_size] * (num_images // batch_size)
    batches = (
        Images(torch.rand(size, 3, side, side, generator=torch.Generator().manual_seed(i)))
        for i, size in enumerate(sizes)
    )
    if way == "streamed":
        config = AttentionDistanceConfig(num_images=num_images, batch_size=batch_size)
        mean = analyze([Observed(model, backbone, batches)], config).numbers["models"][0]["mean"]
    elif way == "collected":
        mean = collected(backbone, batches)
    else:
        mean = None
        with torch.no_grad():
            for images in batches:
                backbone(images.pixels)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return {"way": way, "num_images": num_images, "peak_rss_gb": peak, "mean": mean}


def collected(backbone: Any, batches: Any) -> list[float]:
    """The same means from attention of all layers and images, kept until the end."""
    import torch

    from fdkit.analysis.attention_distance import attention_distance
    from fdkit.analysis.observe import Attention, observe_attention

    kept: dict[int, list[Attention]] = {}
    for images in batches:
        observe_attention(backbone, images.pixels, lambda layer, one: kept.setdefault(layer, []).append(one))
    return [
        attention_distance(layer[0]._replace(weights=torch.cat([one.weights for one in layer])))
        .renormalised.mean()
        .item()
        for layer in kept.values()
    ]


def in_fresh_process(way: str, num_images: int, options: argparse.Namespace) -> dict[str, Any]:
    """`measure` in a process of its own; this one stays without torch, since peak memory is inherited."""
    command = [sys.executable, __file__, "--model", options.model, "--batch-size", str(options.batch_size)]
    child = subprocess.run(
        [*command, "--child", way, str(num_images)], check=True, capture_output=True, text=True
    )
    result: dict[str, Any] = json.loads(child.stdout)
    print(
        f"{way:>9} {num_images:>5} images: {result['peak_rss_gb']:.2f} GB",
        file=sys.stderr,
    )
    return result


def commit() -> str:
    """The commit measured, marked if files differ from it; "uncommitted" before the first."""
    git = ["git", "-C", str(Path(__file__).parent)]
    found = subprocess.run(
        [*git, "describe", "--always", "--dirty", "--abbrev=12"], check=False, capture_output=True, text=True
    )
    return found.stdout.strip() or "uncommitted"


def environment() -> dict[str, Any]:
    """Hardware, versions and commit."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    versions = {name: version(name) for name in ("torch", "timm", "numpy")}
    return {
        "cpu": cpu,
        "system": platform.system(),
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        "python": platform.python_version(),
        **versions,
        "commit": commit(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument(
        "--streamed", type=int, nargs="+", default=[8, 32, 128], help="image counts, multiples of the batch"
    )
    parser.add_argument(
        "--collected", type=int, nargs="+", default=[8, 32], help="image counts, multiples of the batch"
    )
    parser.add_argument(
        "--plain", type=int, nargs="+", default=[8], help="image counts, multiples of the batch"
    )
    parser.add_argument("--output", type=Path)
    parser.add_argument("--child", nargs=2, metavar=("WAY", "IMAGES"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        way, num_images = options.child
        print(json.dumps(measure(way, options.model, int(num_images), options.batch_size)))
        return
    runs = [in_fresh_process("streamed", count, options) for count in options.streamed]
    runs += [in_fresh_process("collected", count, options) for count in options.collected]
    runs += [in_fresh_process("plain", count, options) for count in options.plain]
    result = judged(runs) | {"model": options.model, "batch_size": options.batch_size}
    text = json.dumps(
        {"question": __doc__.partition("\n")[0], **result, "environment": environment()}, indent=2
    )
    if options.output:
        options.output.write_text(text + "\n")
    print(text)
    sys.exit(0 if result["passed"] else 1)


def judged(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The runs without their distances, and whether the goal is met."""
    by_count: dict[int, list[list[float]]] = {}
    for one in runs:
        mean = one.pop("mean")
        if mean is not None:
            by_count.setdefault(one["num_images"], []).append(mean)
    worst = max(abs(a - b) for means in by_count.values() for a, b in zip(means[0], means[-1], strict=True))
    streamed = [one["peak_rss_gb"] for one in runs if one["way"] == "streamed"]
    growth = streamed[-1] / streamed[0]
    return {
        "runs": runs,
        "largest_difference_in_pixels": worst,
        "streamed_growth_ratio": growth,
        "limit_gb": LIMIT_GB,
        "limit_growth_ratio": FLAT_RATIO,
        "passed": max(streamed) < LIMIT_GB and growth < FLAT_RATIO and worst < 1e-3,
    }


if __name__ == "__main__":
    main()
