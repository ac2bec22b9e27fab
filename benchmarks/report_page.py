"""How long `fdkit report` takes on a finished run with every analysis, and how large its page is.

    python benchmarks/report_page.py --output benchmarks/results/report_page.json

Two ViT-B/16 with random weights (12 layers of 12 heads) are analysed on random photos with the report's own analyses,
8 images in the attention viewer; then the page is made from what was saved, in fresh processes. Goals: under 10 s, and
under 15 MB.
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

LIMIT_SECONDS = 10.0
LIMIT_MEGABYTES = 15.0


def make_photos(folder: Path, count: int) -> None:
    """Textured images of two classes."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    for number in range(count):
        coarse = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((256, 256), Image.Resampling.BICUBIC)
        path = folder / ("even", "odd")[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)


def make_run(folder: Path) -> None:
    """A run folder as a finished distillation leaves it, with 2,000 logged steps and an untrained ViT-B/16."""
    import torch

    from fdkit.models.libraries import build_timm, save_backbone

    torch.manual_seed(1)
    save_backbone(build_timm("vit_base_patch16_224", {}), folder)
    rows = [
        {
            "step": 10 * number,
            "epoch": number / 20,
            "loss": 0.3 / number**0.5,
            "explained_variance": 0.5,
            "grad_norm_max": 1.0 / number,
        }
        for number in range(1, 2001)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text("teacher: vit\n")
    facts = {"state": "done", "command": ["fdkit", "distill"], "method": "feature_distillation"}
    (folder / "run.json").write_text(json.dumps(facts))


def measure_everything(root: Path, options: argparse.Namespace) -> None:
    """Results of all of the report's analyses of two models, in root/results."""
    import fdkit
    from fdkit.models.libraries import build_timm, save_backbone

    make_photos(root / "photos", options.images)
    make_run(root / "run")
    (root / "teacher").mkdir()
    save_backbone(build_timm("vit_base_patch16_224", {}), root / "teacher")
    fdkit.make_report(
        [root / "teacher", root / "run"],
        root / "photos",
        output=root / "measured",
        num_images=options.images,
        evaluators=(),
        names=("teacher", "student"),
        loader={"workers": 0},
    )


def make_page(root: Path) -> tuple[float, int]:
    """Seconds of one `fdkit report` in a fresh process, its start included, and the page's bytes."""
    command = [sys.executable, "-c", "from fdkit.cli import main; main()", "report", "--overwrite"]
    start = time.perf_counter()
    subprocess.run(
        [*command, str(root / "run"), str(root / "measured"), "--output", str(root / "page")],
        check=True,
        capture_output=True,
    )
    return time.perf_counter() - start, (root / "page" / "index.html").stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=32, help="images analysed")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "run").mkdir()
        start = time.perf_counter()
        measure_everything(root, options)
        measuring = time.perf_counter() - start
        made = [make_page(root) for _ in range(options.turns)]
        viewer = json.loads((root / "measured" / "results" / "attention-viewer.json").read_text())
        num_analyses = len(list((root / "measured" / "results").glob("*.json")))
    seconds, megabytes = [one for one, _ in made], made[0][1] / 1e6
    from fdkit.training.run import environment

    result: dict[str, Any] = {
        "question": __doc__.partition("\n")[0],
        "num_analyses": num_analyses,
        "seconds": seconds,
        "median_seconds": statistics.median(seconds),
        "page_megabytes": megabytes,
        "viewer": {
            "quality": viewer["quality"],
            "misplaced": [model["error"] for model in viewer["models"]],
            "images": len(viewer["models"][0]["sheets"]),
            "layers": len(viewer["models"][0]["layers"]),
            "heads": viewer["models"][0]["layers"][0]["num_heads"],
        },
        "measuring_seconds": measuring,
        "limits": {"seconds": LIMIT_SECONDS, "megabytes": LIMIT_MEGABYTES},
        "passed": statistics.median(seconds) < LIMIT_SECONDS and megabytes < LIMIT_MEGABYTES,
        "environment": environment(),
    }
    text = json.dumps(result, indent=2)
    if options.output:
        options.output.write_text(text + "\n")
    print(text)
    sys.exit(0 if result["passed"] else 1)


if __name__ == "__main__":
    main()
