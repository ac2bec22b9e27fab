"""Fine-tunes a real pretrained ViT-Tiny on labelled photos, beside the same network from scratch and its frozen self.

    python benchmarks/finetune_photos.py --model vit_tiny_patch16_224.safetensors --data clothing_small \
        --run runs/photos-finetune --output benchmarks/results/finetune_photos.json

All see images of one size. The data's own validation split watches training, the test split is read once by each. One
run and one seed an arm; the intervals are over test images alone.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import fdkit
from fdkit.evaluation._statistics import paired_difference
from fdkit.training.run import environment

HALF = (0.5, 0.5, 0.5)
GENTLE = {
    "pooling": "cls",
    "head_std": 0.02,
    "head_scale": 1.0,
    "drop_path": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "erase_probability": 0.0,
}
"""Two passes leave nothing to regularise; the class token and its norm are what these weights were trained with."""


def main() -> None:
    arguments = read_arguments()
    surroundings = environment()  # as it is now: a checkout may change while this runs
    of_file = {
        "architecture": "vit_tiny_patch16_224",
        "image_size": arguments.image_size,
        "mean": HALF,
        "std": HALF,
    }
    arms: dict[str, Any] = {}
    for name, pretrained, layer_decay, lr in (
        ("finetuned", True, 0.75, 5e-4),
        ("scratch", False, None, 1e-3),
    ):
        arms[name] = train(arguments, name, of_file, pretrained, layer_decay=layer_decay, lr=lr)
        print(name, arms[name]["top1"], arms[name]["top1_interval"], flush=True)
    frozen = {
        "knn": fdkit.evaluate("knn", arguments.model, arguments.data, **of_file)["top1"],
        "linear": fdkit.evaluate("linear", arguments.model, arguments.data, **of_file)["top1"],
    }
    print("frozen", frozen, flush=True)
    record = {
        "environment": surroundings,
        "arguments": {
            "model": Path(arguments.model).name,
            "data": Path(arguments.data).name,
            "image_size": arguments.image_size,
            "epochs": arguments.epochs,
            "seed": arguments.seed,
        },
        "frozen": frozen,
        "arms": arms,
        "finetuned_minus_scratch": difference(Path(arguments.run))._asdict(),
    }
    Path(arguments.output).write_text(json.dumps(record, indent=2) + "\n")


def train(
    arguments: argparse.Namespace,
    name: str,
    of_file: dict[str, Any],
    pretrained: bool,
    *,
    layer_decay: float | None,
    lr: float,
) -> dict[str, Any]:
    """The test numbers of one arm, with how its training went."""
    folder = Path(arguments.run) / name
    started, cpu = time.perf_counter(), time.process_time()
    numbers = fdkit.finetune(
        arguments.model,
        arguments.data,
        **of_file,
        pretrained=pretrained,
        output=folder,
        resume=folder.exists(),
        seed=arguments.seed,
        validation_split="validation",
        monitor={"collapse_every_epochs": 0},
        supervised=GENTLE,
        views={"min_scale": 0.25, "randaugment": None, "colour_jitter": 0.2},
        train={"epochs": arguments.epochs, "batch_size": 32, "log_every_steps": 24},
        optim={
            "lr": lr,
            "lr_reference_batch": None,
            "layer_decay": layer_decay,
            "warmup_epochs": arguments.epochs / 10,
        },
        loader={"workers": 0},
    )
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    settings = numbers.pop("settings")
    settings |= {"model": Path(arguments.model).name, "data": Path(arguments.data).name}
    numbers |= {"run": name, "model": Path(arguments.model).name}
    numbers["test"] |= {"source": Path(arguments.data).name}
    return {
        **numbers,
        "validation": [
            [row["step"], row["monitor/validation_top1"]] for row in rows if "monitor/validation_top1" in row
        ],
        "last_metrics": [row for row in rows if "loss" in row][-1],
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu,
        "settings": settings,
    }


def difference(runs: Path) -> Any:
    """Of the accuracies of both arms, over the test images drawn together."""
    import torch

    hits = []
    for name in ("finetuned", "scratch"):
        both = json.loads((runs / name / "results" / "finetune-test-predictions.json").read_text())
        hits.append(torch.tensor(both["labels"]) == torch.tensor(both["predicted"]))
    return paired_difference(*hits)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="file of the pretrained ViT-Tiny")
    parser.add_argument(
        "--data", required=True, help="folder with train/, validation/ and test/ of class folders"
    )
    parser.add_argument("--run", required=True, help="folder of the two runs; continued if they are there")
    parser.add_argument("--output", required=True, help="JSON file for the numbers")
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
