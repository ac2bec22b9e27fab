"""What the features of a real ViT-Tiny say about every pixel of street images (CamVid), by several protocols.

Patch-kNN without training; a linear head and UPerNet on the frozen network; both with the network trained too; and, as
the control, a linear head on the same network with random weights. Every training sees the same number of images, so
few that a head at a low rate has not learned the rare classes: UPerNet and fine-tuning are given two rates.

    python benchmarks/segmentation_camvid.py --model vit_tiny_patch16_224.safetensors --data camvid_320x240 \
        --runs runs/camvid --output benchmarks/results/segmentation_camvid.json

One run, one seed, a length of minutes: it tells protocols apart by large steps, not by a point. Results are added to
the file, and a protocol that is there is not run again.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import fdkit
from fdkit.training.run import environment

CLASSES = [
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "sign",
    "fence",
    "car",
    "pedestrian",
    "bicyclist",
]
UNLABELLED = 11
CROP, STRIDE = 240, 80  # two squares cover an image of 320 x 240
FROZEN = {"optim": {"lr": 3e-3}}
UPERNET = {"head": "upernet", "channels": 64}
FINE_TUNED = {"lr": 5e-4, "layer_decay": 0.75, "weight_decay": 0.05}
FASTER = {**FINE_TUNED, "lr": 2e-3, "layer_decay": 0.65}
PROTOCOLS: dict[str, dict[str, Any]] = {
    "frozen linear": FROZEN,
    "untrained, frozen linear": {**FROZEN, "pretrained": False},
    "frozen upernet": {"segmentation": UPERNET, **FROZEN},
    "frozen upernet, lr 1e-3": {"segmentation": UPERNET, "optim": {"lr": 1e-3}},
    "fine-tuned linear": {"segmentation": {"freeze": False}, "optim": FINE_TUNED},
    "fine-tuned upernet": {"segmentation": {"freeze": False, **UPERNET}, "optim": FINE_TUNED},
    "fine-tuned linear, lr 2e-3": {"segmentation": {"freeze": False}, "optim": FASTER},
    "fine-tuned upernet, lr 2e-3": {"segmentation": {"freeze": False, **UPERNET}, "optim": FASTER},
}


def main() -> None:
    arguments = read_arguments()
    output = Path(arguments.output)
    record: dict[str, Any] = json.loads(output.read_text()) if output.exists() else {"results": {}}
    record |= {
        "environment": environment(),
        "arguments": {
            "model": Path(arguments.model).name,
            "data": Path(arguments.data).name,
            **{name: getattr(arguments, name) for name in ("epochs", "batch_size", "memory_size", "seed")},
        },
    }
    for name in arguments.protocols or ["patch-knn", *PROTOCOLS]:
        if name in record["results"]:
            continue
        wall, cpu = time.perf_counter(), time.process_time()
        numbers = run(name, arguments)
        found = summary(numbers)
        found |= {"wall_seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        record["results"][name] = found
        output.write_text(json.dumps(record, indent=2) + "\n")
        print(f"{name}: mIoU {100 * found['miou']:.2f} %, {found['cpu_seconds']:.0f} CPU seconds", flush=True)


def run(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The numbers of one protocol."""
    shared: dict[str, Any] = {
        "architecture": "vit_tiny_patch16_224",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "image_size": CROP,
        "stride": STRIDE,
        "ignore_label": (UNLABELLED,),
        "device": arguments.device,
        "seed": arguments.seed,
    }
    if name == "patch-knn":
        fields = {"memory_size": arguments.memory_size, "batch_size": 8}
        return fdkit.evaluate("patch-knn", arguments.model, arguments.data, **shared, **fields)
    own = PROTOCOLS[name]
    model = arguments.model
    if own.get("pretrained") is False:  # a file has no random weights of its own
        model = f"timm:{shared.pop('architecture')}"
    return fdkit.segment(
        model,
        arguments.data,
        **shared,
        **{key: value for key, value in own.items() if key != "optim"},
        optim={"warmup_epochs": arguments.epochs / 10, **own.get("optim", {})},
        train={"epochs": arguments.epochs, "batch_size": arguments.batch_size, "log_every_steps": 20},
        output=Path(arguments.runs) / name.replace(",", "").replace(" ", "-"),
        overwrite=True,
    )


def summary(numbers: dict[str, Any]) -> dict[str, Any]:
    """The numbers without paths and with names of classes."""
    kept = ("miou", "pixel_accuracy", "mean_accuracy", "k", "temperature", "labels", "memory", "settings")
    found = {name: numbers[name] for name in kept if name in numbers}
    ious = [one["iou"] for one in numbers["per_class"]]
    found["iou"] = dict(zip(CLASSES, ious, strict=True))
    command = numbers["command"]
    found["options"] = {name: command[name] for name in ("segmentation", "views", "optim") if name in command}
    found["num_images"] = numbers["data"]["num_images"]
    found["fingerprint"] = numbers["data"]["fingerprint"]
    return found


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="file of the pretrained ViT-Tiny")
    parser.add_argument(
        "--data", required=True, help="folder with images/ and masks/, each train/, val/ and test/"
    )
    parser.add_argument("--runs", required=True, help="folder for the run folders")
    parser.add_argument("--output", required=True, help="JSON file for the numbers")
    parser.add_argument("--protocols", nargs="+", help="some of: patch-knn, " + ", ".join(PROTOCOLS))
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--memory-size", type=int, default=30_000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
