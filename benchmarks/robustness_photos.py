"""Measures a real pretrained ViT-Tiny under all fifteen corruptions on labelled photos.

    python benchmarks/robustness_photos.py --model vit_tiny_patch16_224.safetensors --data clothing_small \
        --output benchmarks/results/robustness_photos.json

A logistic probe is chosen and fitted on the clean training photos; a fixed part of the test photos, an equal share of
each class, is shown at severities 1, 3 and 5. The intervals are over test photos alone.
"""

import argparse
import json
import time
from pathlib import Path

import fdkit
from fdkit.training.run import environment


def main() -> None:
    arguments = read_arguments()
    started, started_cpu = time.perf_counter(), time.process_time()
    numbers = fdkit.evaluate(
        "robustness",
        arguments.model,
        arguments.data,
        architecture="vit_tiny_patch16_224",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        severities=(1, 3, 5),
        limit=arguments.limit,
        cache=arguments.cache,
        seed=arguments.seed,
    )
    seconds = {"wall": time.perf_counter() - started, "cpu": time.process_time() - started_cpu}
    command = numbers.pop("command")
    command |= {"model": Path(arguments.model).name, "data": Path(arguments.data).name}
    command.pop("cache")
    for key in ("model", "model_source", "source"):
        numbers["test"][key] = Path(numbers["test"][key]).name
    record = {"environment": environment(), "seconds": seconds, "command": command, "results": numbers}
    Path(arguments.output).write_text(json.dumps(record, indent=2) + "\n")
    for name, row in numbers["corruptions"].items():
        cells = [f"{100 * cell['top1']:5.1f}" for cell in row["severities"].values()]
        print(f"{name:18s} {' '.join(cells)}")
    print(f"clean {numbers['top1']:.3f}, mean corruption error {numbers['mean_corruption_error']:.3f}")


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="file of the pretrained ViT-Tiny")
    parser.add_argument("--data", required=True, help="folder with train/ and test/ of class folders")
    parser.add_argument("--output", required=True, help="JSON file for the numbers")
    parser.add_argument("--limit", type=int, default=150, help="test photos")
    parser.add_argument("--cache", default="none", help="folder where features are kept; auto: the user's")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
