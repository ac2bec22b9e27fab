"""Pretrains the embedded demonstration teacher again and puts it into the package: `make demo-teacher`.

    python benchmarks/make_demo_teacher.py --run runs/demo-teacher

A run that is there is continued, or only installed if it is done. The numbers, with hardware, versions and commit, go
to benchmarks/results/demo_teacher.json.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import fdkit
from fdkit.data.sources import open_source
from fdkit.evaluation import knn, linear
from fdkit.evaluation.features import raw_pixels
from fdkit.teachers.model import DEMO_FOLDER

RESULTS = Path(__file__).parent / "results" / "demo_teacher.json"
KEPT_FACTS = ("started", "ended", "commit", "versions", "hardware", "environment", "seed", "derived", "data")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/demo-teacher"), help="the run folder")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    run = fdkit.pretrain(
        "mocov3",
        "demo",
        recipe="demo",
        output=arguments.run,
        resume=True,
        seed=arguments.seed,
        loader={"workers": 0},
    )
    RESULTS.write_text(json.dumps(record(run), indent=2) + "\n")
    DEMO_FOLDER.mkdir(exist_ok=True)
    for name in ("student.safetensors", "student.json"):
        shutil.copyfile(run / name, DEMO_FOLDER / name)
    size = (DEMO_FOLDER / "student.safetensors").stat().st_size
    print(f"{DEMO_FOLDER}: {size:,} bytes; see {RESULTS}")


def record(run: Path) -> dict[str, Any]:
    """What the teacher is, how its training went, and how good its frozen features are."""
    facts = json.loads((run / "run.json").read_text())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train, test = (raw_pixels(open_source("demo", split), crop_ratio=0.875) for split in ("train", "test"))
    grey = [part._replace(values=part.values.view(-1, 3, 32 * 32).mean(1)) for part in (train, test)]
    pixels = {
        "knn": knn.evaluate(train, test, knn.KNNConfig())["top1"],
        "linear": linear.evaluate(train, test, linear.LinearConfig())["top1"],
        "grey_knn": knn.evaluate(*grey, knn.KNNConfig())["top1"],
    }
    return {
        "command": "fdkit pretrain mocov3 --recipe demo --data demo --loader.workers 0",
        "facts": {name: facts[name] for name in KEPT_FACTS if name in facts},
        "training_seconds": [row["seconds"] for row in rows if "seconds" in row][-1],
        "online_knn": [[row["step"], row["monitor/knn_top1"]] for row in rows if "monitor/knn_top1" in row],
        "last_metrics": [row for row in rows if "loss" in row][-1],
        "teacher": {
            "knn": fdkit.evaluate("knn", run, "demo")["top1"],
            "linear": fdkit.evaluate("linear", run, "demo")["top1"],
        },
        "raw_pixels": pixels,
        "note": "one run, one seed; accuracy on the 900 test images of the built-in set, 10 classes",
    }


if __name__ == "__main__":
    main()
