"""What all statistics of attention cost beside plain forward passes, and whether their memory grows with the images.

    python benchmarks/attention_statistics.py --output benchmarks/results/attention_statistics.json

Two ways on the same random ViT and the same random images, batch by batch in turns: `plain` is the model alone on its
fused path; `observed` is one pass that gathers attention distance, similarity of heads, averaged maps and entropy.
Peak memory is of fresh processes. Goals: observed takes at most twice the time of plain, stays below 2 GB and does not
grow from the fewest images to the most.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

LIMIT_RATIO = 2.0
LIMIT_GB = 2.0
FLAT_RATIO = 1.05


def build(model: str, device: str) -> Any:
    """The model with random weights, in evaluation mode."""
    import torch

    from fdkit.models.libraries import build_timm

    torch.manual_seed(0)
    return build_timm(model, {}).eval().to(device)


def random_images(number: int, size: int, side: int) -> Any:
    import torch

    return torch.rand(size, 3, side, side, generator=torch.Generator().manual_seed(number))


def turns(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each way, a batch in turns, in one process."""
    import torch

    from fdkit.analysis.observe import Images, Observed, observe_attention
    from fdkit.commands._analyses import ATTENTION, own_config
    from fdkit.commands._command import plugin

    backbone = build(options.model, options.device)
    observed = Observed(options.model, backbone, [])
    gathering = [plugin("analysis", name).statistic(observed, own_config(name, {})) for name in ATTENTION]

    def visit(layer: int, attention: Any) -> None:
        for one in gathering:
            one.add(layer, attention)

    def wait() -> float:
        if options.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    seconds: dict[str, list[float]] = {"plain": [], "observed": []}
    for number in range(-(-options.images // options.batch_size) + 1):
        images = random_images(number, options.batch_size, backbone.image_size).to(options.device)
        order = ["plain", "observed"] if number % 2 else ["observed", "plain"]
        for way in order:
            start = wait()
            with torch.no_grad():
                if way == "plain":
                    backbone(images)
                else:
                    for one in gathering:
                        one.begin(Images(images))
                    observe_attention(backbone, images, visit)
            if number:  # the first turn warms up
                seconds[way].append(wait() - start)
    ratios = [one / other for one, other in zip(seconds["observed"], seconds["plain"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "num_images": options.images,
        "plain_seconds": sum(seconds["plain"]),
        "observed_seconds": sum(seconds["observed"]),
        "ratio_of_sums": sum(seconds["observed"]) / sum(seconds["plain"]),
        "ratio_median": middle,
        "ratio_quartiles": [low, high],
    }


def peak(way: str, num_images: int, options: argparse.Namespace) -> dict[str, Any]:
    """Peak memory of this process after one way on so many images."""
    import torch

    from fdkit.analysis.observe import Images, Observed
    from fdkit.commands._analyses import ATTENTION, own_config, perform

    backbone = build(options.model, "cpu")
    batches = [
        range(start, min(start + options.batch_size, num_images))
        for start in range(0, num_images, options.batch_size)
    ]
    images = (Images(random_images(part.start, len(part), backbone.image_size)) for part in batches)
    if way == "observed":
        fields = {"num_images": num_images, "batch_size": options.batch_size}
        perform(ATTENTION, [Observed(options.model, backbone, images)], lambda name: own_config(name, fields))
    else:
        with torch.no_grad():
            for one in images:
                backbone(one.pixels)
    gigabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return {"way": way, "num_images": num_images, "peak_rss_gb": gigabytes}


def in_fresh_process(way: str, num_images: int, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--model", options.model, "--batch-size", str(options.batch_size)]
    child = subprocess.run(
        [*command, "--child", way, str(num_images)], check=True, capture_output=True, text=True
    )
    result: dict[str, Any] = json.loads(child.stdout)
    print(f"{way:>9} {num_images:>5} images: {result['peak_rss_gb']:.2f} GB", file=sys.stderr)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--images", type=int, default=1000, help="images timed")
    parser.add_argument("--memory", type=int, nargs="*", default=[16, 256], help="image counts")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--child", nargs=2, metavar=("WAY", "IMAGES"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        way, num_images = options.child
        print(json.dumps(peak(way, int(num_images), options)))
        return
    from fdkit.training.run import environment

    memory = [in_fresh_process("observed", count, options) for count in options.memory]
    memory += [in_fresh_process("plain", count, options) for count in options.memory[:1]]
    timed = turns(options)
    observed = [one["peak_rss_gb"] for one in memory if one["way"] == "observed"]
    is_flat = not observed or (max(observed) < LIMIT_GB and observed[-1] / observed[0] < FLAT_RATIO)
    result = {
        "question": __doc__.partition("\n")[0],
        "model": options.model,
        "device": options.device,
        "batch_size": options.batch_size,
        "timed": timed,
        "memory": memory,
        "limits": {"ratio": LIMIT_RATIO, "gb": LIMIT_GB, "growth_ratio": FLAT_RATIO},
        "passed": timed["ratio_median"] <= LIMIT_RATIO and is_flat,
        "environment": environment(),
    }
    text = json.dumps(result, indent=2)
    if options.output:
        options.output.write_text(text + "\n")
    print(text)
    sys.exit(0 if result["passed"] else 1)


if __name__ == "__main__":
    main()
