"""Distils a real pretrained ViT-Tiny on labelled photos, and measures teacher, student and untrained network.

    python benchmarks/distill_photos.py --teacher vit_tiny_patch16_224.safetensors --data clothing_small \
        --run runs/photos --output benchmarks/results/distill_photos.json

One run, one seed: differences of a few points between models say little; the JSON holds the configuration.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import fdkit
from fdkit.models.libraries import save_backbone
from fdkit.models.student import StudentConfig, build_student
from fdkit.training.run import environment


def main() -> None:
    arguments = read_arguments()
    folder = Path(arguments.run)
    started = time.perf_counter()
    fdkit.distill(
        arguments.teacher,
        arguments.data,
        output=folder,
        resume=folder.exists(),
        image_size=arguments.image_size,
        seed=arguments.seed,
        views={"image_size": arguments.image_size, "min_scale": 0.25},
        student={"drop_path": 0.0},
        train={"epochs": arguments.epochs, "batch_size": 32, "log_every_steps": 50, "save_every_minutes": 5},
        optim={
            "lr": 8e-4,
            "lr_reference_batch": None,
            "warmup_lr": 1e-6,
            "min_lr": 1e-5,
            "warmup_epochs": arguments.epochs / 10,
        },
    )
    seconds = time.perf_counter() - started
    models = {
        "teacher": (arguments.teacher, {"image_size": arguments.image_size}),
        "student": (str(folder), {}),
        "untrained": (str(untrained_student(arguments, folder)), {}),
    }
    results: dict[str, Any] = {}
    for name, (model, options) in models.items():
        measured = {
            evaluator: fdkit.evaluate(evaluator, model, arguments.data, **options, **fields)
            for evaluator, fields in (("knn", {"k": (10, 20)}), ("linear", {}))
        }
        distance = fdkit.analyze(
            "attention-distance",
            model,
            arguments.data,
            split="test",
            **options,
            output=folder / f"distance-{name}",
        )
        results[name] = {
            "knn": {str(entry["k"]): entry["top1"] for entry in measured["knn"]["results"]},
            "linear": measured["linear"]["top1"],
            "attention_distance": distance["models"][0],
        }
        print(name, results[name]["knn"], results[name]["linear"], flush=True)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    record = {
        "environment": environment(),
        "arguments": {
            **vars(arguments),
            "teacher": Path(arguments.teacher).name,
            "data": Path(arguments.data).name,
        },
        "training_seconds_of_last_session": seconds,
        "last_metrics": [row for row in rows if "loss" in row][-1],
        "explained_variance": [
            [row["step"], row["explained_variance"]] for row in rows if "explained_variance" in row
        ],
        "results": results,
    }
    Path(arguments.output).write_text(json.dumps(record, indent=2) + "\n")


def untrained_student(arguments: argparse.Namespace, folder: Path) -> Path:
    """A folder with the student as it was before its first step."""
    teacher = fdkit.load_teacher(arguments.teacher, image_size=arguments.image_size)
    start = build_student(
        StudentConfig(drop_path=0.0), teacher.backbone, image_size=arguments.image_size, seed=arguments.seed
    )
    target = folder / "untrained"
    target.mkdir(exist_ok=True)
    save_backbone(start, target)
    return target


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", required=True, help="file of the pretrained ViT-Tiny")
    parser.add_argument("--data", required=True, help="folder with train/ and test/ of class folders")
    parser.add_argument("--run", required=True, help="run folder; continued if it is there")
    parser.add_argument("--output", required=True, help="JSON file for the numbers")
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--epochs", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
