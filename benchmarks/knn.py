"""What exact weighted kNN costs, against faiss and against the script that DINO's numbers come from.

    pip install faiss-cpu          (optional: without it that comparison is left out, and the result says so)
    python benchmarks/knn.py --output benchmarks/results/knn_cpu.json
    python benchmarks/knn.py --device cuda --queries 50000 --bank 1281167 --output benchmarks/results/knn_cuda.json

Features are drawn from a seed: `random` ones have no structure; `clustered` ones have 1,000 classes and variances that
fall with the channel, as those of networks do. All sides start from the same float32 features, so that scaling them to
length 1, building an index and rounding count. On a CPU, `faiss` (an exact index of inner products) finds the 20
nearest of every query; `script` is DINO's way for its four k: for each k anew, float32 products of 500 queries with the
whole bank, topk over them, and votes through a one-hot matrix. On CUDA there is no faiss. Sides take turns in one
process; medians of CPU seconds at one thread, wall seconds at two (which other work on the machine makes longer), or
wall seconds between synchronisations of the device. Answers are compared before anything is timed.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fdkit.evaluation._search import resolve_method, search_all
from fdkit.evaluation.features import Features
from fdkit.evaluation.knn import KNNConfig, evaluate

try:
    import faiss
except ImportError:
    faiss = None

NUM_CLASSES = 1000
SCRIPT_KS = (10, 20, 100, 200)
SCRIPT_BATCH = 500
TEMPERATURE = 0.07
NEIGHBOURS = 20
GOALS = {"cpu": {"faiss": 1.3, "script": 7.0}, "cuda": {"script": 10.0}}

Side = Callable[[], Any]


def draw(kind: str, num_rows: int, width: int, *, seed: int, device: torch.device) -> Features:
    """Labelled features, (num_rows, width) float32, drawn on the device a block at a time."""
    common = torch.Generator(device).manual_seed(0)
    scale = torch.arange(1, width + 1, device=device) ** -0.5
    centres = torch.randn(NUM_CLASSES, width, generator=common, device=device) * scale
    random = torch.Generator(device).manual_seed(seed)
    labels = torch.randint(NUM_CLASSES, (num_rows,), generator=random, device=device)
    values = torch.empty(num_rows, width, device=device)
    for part in torch.arange(num_rows, device=device).split(100_000):
        noise = torch.randn(len(part), width, generator=random, device=device)
        values[part] = noise if kind == "random" else centres[labels[part]] + 1.5 * noise * scale
    classes = tuple(str(index) for index in range(NUM_CLASSES))
    return Features(values, labels, classes, {"source": kind})


def script(train: Features, test: Features) -> list[dict[str, float]]:
    """Top-1 and top-5 accuracy for DINO's four k, each from a search of its own."""
    bank, queries = F.normalize(train.values, dim=1), F.normalize(test.values, dim=1)
    return [script_for_one_k(bank, train.labels, queries, test.labels, k) for k in SCRIPT_KS]


def script_for_one_k(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, k: int
) -> dict[str, float]:
    """The vote as in DINO's evaluation script."""
    top1 = top5 = 0.0
    for start in range(0, len(queries), SCRIPT_BATCH):
        batch, truth = queries[start : start + SCRIPT_BATCH], labels[start : start + SCRIPT_BATCH]
        similarity, rows = torch.mm(batch, bank.T).topk(k, largest=True, sorted=True)
        voters = bank_labels[rows]
        one_hot = torch.zeros(len(batch) * k, NUM_CLASSES, device=bank.device)
        one_hot.scatter_(1, voters.view(-1, 1), 1)
        weights = (similarity / TEMPERATURE).exp_()
        votes = (one_hot.view(len(batch), k, NUM_CLASSES) * weights[:, :, None]).sum(dim=1)
        hits = votes.sort(dim=1, descending=True).indices == truth[:, None]
        top1 += hits[:, :1].sum().item()
        top5 += hits[:, :5].sum().item()
    return {"top1": top1 / len(queries), "top5": top5 / len(queries)}


def faiss_search(train: Features, test: Features) -> tuple[np.ndarray, np.ndarray]:
    """Similarities and rows of the nearest, from an exact index."""
    bank, queries = train.values.numpy().copy(), test.values.numpy().copy()
    faiss.normalize_L2(bank)
    faiss.normalize_L2(queries)
    index = faiss.IndexFlatIP(bank.shape[1])
    index.add(bank)
    return index.search(queries, NEIGHBOURS)


def compare(
    name: str, ours: dict[str, Side], other: Side, args: argparse.Namespace, *known: float
) -> dict[str, Any]:
    """Seconds of fdkit's searches and of the other side, taking turns; those known of the other side count."""
    sides = {**ours, name: other}
    device = torch.device(args.device)
    seconds: dict[str, list[float]] = {side: [] for side in ours} | {name: list(known)}
    for turn in range(args.repeats):
        for side in sorted(sides, reverse=turn % 2 == 1):
            if side == name and len(seconds[side]) >= args.other_repeats:
                continue
            seconds[side].append(timed(sides[side], device))
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    quartiles = {side: np.percentile(values, [25, 75]).round(4).tolist() for side, values in seconds.items()}
    return {
        "against": name,
        "threads": torch.get_num_threads(),
        "seconds": "CPU" if counts_cpu(device) else "wall",
        "runs": {side: [round(value, 4) for value in values] for side, values in seconds.items()},
        "median": {side: round(value, 4) for side, value in medians.items()},
        "quartiles": quartiles,
        "speedup": {side: round(medians[name] / medians[side], 3) for side in ours},
    }


def counts_cpu(device: torch.device) -> bool:
    """Whether CPU seconds are counted: they add up over threads, so at one thread alone."""
    return device.type == "cpu" and torch.get_num_threads() == 1


def timed(side: Side, device: torch.device) -> float:
    """Seconds one call takes."""
    clock = time.process_time if counts_cpu(device) else time.perf_counter
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = clock()
    side()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def against_faiss(train: Features, test: Features, args: argparse.Namespace) -> dict[str, Any]:
    """The 20 nearest, once both sides found the same similarities to float32's rounding."""
    ours = {
        f"fdkit {method}": lambda method=method: search_all(
            test.values, train.values, NEIGHBOURS, method=method
        )
        for method in ("bf16", "fp32")
    }
    found, again = (side() for side in ours.values())
    assert torch.equal(found.rows, again.rows), "bf16 and fp32 differ"
    assert torch.equal(found.similarity, again.similarity), "bf16 and fp32 differ"
    similarity, rows = faiss_search(train, test)
    difference = float((found.similarity - torch.from_numpy(similarity)).abs().max())
    assert difference < 1e-5, f"similarities differ from faiss by {difference}"
    equal = {
        "largest_difference_of_similarity": difference,
        "same_row_in_same_place": float((found.rows == torch.from_numpy(rows)).float().mean()),
        "rechecked": int(found.rechecked.sum()),
    }
    return equal | compare("faiss", ours, lambda: faiss_search(train, test), args)


def against_script(train: Features, test: Features, args: argparse.Namespace) -> dict[str, Any]:
    """Accuracies of all four k, once they agree to two images in a thousand: near ties are broken otherwise."""
    ours = {
        f"fdkit {method}": lambda method=method: evaluate(
            train, test, KNNConfig(k=SCRIPT_KS, temperature=(TEMPERATURE,), search=method)
        )
        for method in ("bf16", "fp32")
    }
    first, second = (side() for side in ours.values())
    assert first["results"] == second["results"], "bf16 and fp32 differ"
    peak = peak_gib(next(iter(ours.values()))) if args.device == "cuda" else None
    largest = max(SCRIPT_KS)
    found, again = (search_all(test.values, train.values, largest, method=m) for m in ("bf16", "fp32"))
    assert torch.equal(found.rows, again.rows), "bf16 and fp32 differ"
    assert torch.equal(found.similarity, again.similarity), "bf16 and fp32 differ"
    theirs: list[dict[str, float]] = []
    seconds = timed(lambda: theirs.extend(script(train, test)), torch.device(args.device))
    for row, other in zip(first["results"], theirs, strict=True):
        for key, value in other.items():
            assert abs(row[key] - value) <= max(0.002, 1.5 / len(test.labels)), f"{row} against {other}"
    facts = {"results": first["results"], "script_results": theirs, "rechecked": first["search"]["rechecked"]}
    if peak is not None:
        few = test._replace(values=test.values[:SCRIPT_BATCH], labels=test.labels[:SCRIPT_BATCH])
        facts["peak_gib"] = {"fdkit bf16": peak, "script": peak_gib(lambda: script(train, few))}
    return facts | compare("script", ours, lambda: script(train, test), args, seconds)


def peak_gib(side: Side) -> float:
    """Device memory a call takes at most beyond what was there, in GiB."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    side()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**30, 3)


def environment(device: torch.device) -> dict[str, Any]:
    """Hardware, versions and commit."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    found = subprocess.run(git, check=False, capture_output=True, text=True)
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else processor(),
        "cpus": os.cpu_count(),
        "load_average": [round(value, 1) for value in os.getloadavg()],
        "native_bf16": resolve_method("auto", device) == "bf16",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "faiss": version("faiss-cpu") if faiss else "not installed: not compared",
        "commit": found.stdout.strip() or None,
    }


def processor() -> str:
    """The CPU's model name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def judged(result: dict[str, Any], device: str) -> dict[str, Any]:
    """The result with the goal for it, if there is one, and whether the search that fdkit chooses meets it."""
    goal = GOALS[device].get(result["against"])
    chosen = f"fdkit {resolve_method('auto', torch.device(device))}"
    return result | {"goal": goal, "met": goal is None or result["speedup"][chosen] >= goal}


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All comparisons, each printed and saved as soon as it is there."""
    device = torch.device(args.device)
    comparisons = {"faiss": against_faiss, "script": against_script}
    results: list[dict[str, Any]] = []
    for kind in args.features:
        train = draw(kind, args.bank, args.width, seed=1, device=device)
        test = draw(kind, args.queries, args.width, seed=2, device=device)
        for name in args.against:
            if name == "faiss" and (faiss is None or device.type == "cuda"):
                print("faiss is not compared: not installed, or not on this device", file=sys.stderr)
                continue
            for threads in args.threads if device.type == "cpu" else [torch.get_num_threads()]:
                torch.set_num_threads(threads)
                if faiss:
                    faiss.omp_set_num_threads(threads)
                sizes = {"queries": args.queries, "bank": args.bank, "width": args.width}
                result = judged(comparisons[name](train, test, args), args.device)
                results.append({"features": kind, **sizes, **result})
                print(json.dumps(results[-1]), file=sys.stderr, flush=True)
                save(args, results)
    return results


def save(args: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    """Write what there is so far."""
    if not args.output:
        return
    document = {
        "question": __doc__.partition("\n")[0],
        "environment": environment(torch.device(args.device)),
        "results": results,
    }
    args.output.write_text(json.dumps(document, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--queries", type=int, default=2000)
    parser.add_argument("--bank", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument(
        "--features", nargs="+", choices=["random", "clustered"], help="default: both; on CUDA clustered"
    )
    parser.add_argument("--against", nargs="+", choices=["faiss", "script"], default=["faiss", "script"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, help="default: 5; on CUDA 3")
    parser.add_argument("--other-repeats", type=int, help="of the other side; default: as many, on CUDA 1")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    args.features = args.features or (["clustered"] if args.device == "cuda" else ["random", "clustered"])
    args.repeats = args.repeats or (3 if args.device == "cuda" else 5)
    args.other_repeats = args.other_repeats or (1 if args.device == "cuda" else args.repeats)
    results = run(args)
    sys.exit(0 if all(result["met"] for result in results) else 1)


if __name__ == "__main__":
    main()
