"""Commands run on folders, classes, files and runs whose names a terminal would obey, and what of that they print."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from faults.children import run
from PIL import Image

NAME = "\x1b[31m[bold]x\x1b]0;owned\x07{y}%s"
"""A colour, the title of the window, a bell, rich's markup, and two placeholders."""
SHOWN = "\\x1b[31m[bold]x"
"""How it starts where it may be seen."""
SMALL = [
    *("--train.batch-size", "4", "--train.epochs", "2", "--train.precision", "fp32", "--train.log-every-steps", "1"),
    *("--loader.workers", "0", "--device", "cpu"),
]  # fmt: skip
STUDENT = [
    "--student.depth",
    "1",
    "--student.width",
    "12",
    "--student.num-heads",
    "2",
    "--views.image-size",
    "16",
]


def make_places(folder: Path) -> dict[str, str]:
    """Images with a broken one, masks, a tar, all of hostile names; and where runs and results go."""
    from faults.sound_files import picture, write_tar

    root = folder / NAME
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        for number in range(8):
            pixels = Image.fromarray(random.integers(0, 256, (20, 24, 3), dtype=np.uint8))
            mask = Image.fromarray((np.arange(480).reshape(20, 24) // 60 % 2).astype(np.uint8))
            for path, image in (
                (root / "data" / split / f"{NAME}{number % 2}" / f"{NAME}{number}.png", pixels),
                (root / "masks" / "images" / split / f"{NAME}{number}.png", pixels),
                (root / "masks" / "masks" / split / f"{NAME}{number}.png", mask),
            ):
                path.parent.mkdir(parents=True, exist_ok=True)
                image.save(path)
        (root / "data" / split / f"{NAME}0" / f"{NAME}broken.png").write_bytes(b"<html>")
    (root / "masks" / "classes.txt").write_text(f"{NAME}0\n{NAME}1\n")
    write_tar(root / "shards.tar", {f"{NAME}{n % 2}/{NAME}{n}.png": picture(n) for n in range(6)})
    (root / "classes.txt").write_text(f"{NAME}0\n{NAME}1\n")
    (root / "recipe.yaml").write_text(json.dumps({NAME: NAME, "train": {NAME: 3}}))
    (root / "weights.pth").write_bytes(b"none")
    names = ("data", "masks", "shards.tar", "recipe.yaml", "weights.pth", "out", "run")
    return {name: str(root / name) for name in names}


def command_lines(places: dict[str, str]) -> dict[str, list[str]]:
    """A run first; then commands that are refused, each with the name in what it must say; then every command."""
    data, out, run_folder = places["data"], places["out"], places["run"]
    cpu = ["--device", "cpu"]
    bad = ["--loader.max-bad-ratio", "0.5", "--loader.workers", "0"]
    digits = ["distill", "--teacher", "demo", "--data", "digits"]
    model = [run_folder, "--data", data, *cpu]
    return {
        "distill": ["distill", "--teacher", "demo", "--data", data, "--output", run_folder, *STUDENT, *SMALL, *bad[:2]],
        "no such folder": ["distill", "--teacher", "demo", "--data", f"{data}/none"],
        "no such teacher": ["distill", "--teacher", NAME, "--data", "digits"],
        "no such model": ["evaluate", "knn", NAME, "--data", "digits"],
        "no such command": [NAME],
        "no such choice": ["analyze", NAME],
        "no such flag": ["evaluate", "knn", "demo", "--data", "digits", f"--{NAME}", NAME],
        "no such value": ["evaluate", "knn", "demo", "--data", "digits", "--k", NAME],
        "no such teacher listed": ["teachers", NAME],
        "no such recipe": [*digits, "--recipe", NAME],
        "a recipe of odd fields": [*digits, "--recipe", places["recipe.yaml"]],
        "a folder that is no run": ["report", data],
        "weights that are none": ["doctor", places["weights.pth"]],
        "a run that is there": ["distill", "--teacher", "demo", "--data", data, "--output", run_folder, *SMALL],
        "pack": ["pack", data, "--output", f"{out}/packed", "--workers", "0", "--max-bad-ratio", "0.5"],
        "evaluate knn": ["evaluate", "knn", *model, "--k", "3", "--cache", "none", "--output", f"{out}/knn.json", *bad],
        "evaluate linear": ["evaluate", "linear", *model, "--cache", "none", "--output", f"{out}/linear.json", *bad],
        "analyze": ["analyze", "cka", "demo", *model, "--num-images", "4", "--output", out, *bad],
        "compare": ["compare", *model, "--frozen-only", "--k", "3", "--output", f"{out}/compare", *bad],
        "report": ["report", *model, "--analyses", "cka", "--evaluators", "knn", "--output", f"{out}/report", *bad],
        "finetune": ["finetune", run_folder, "--data", data, "--output", f"{out}/tuned", *SMALL, *bad[:2]],
        "segment": ["segment", run_folder, "--data", places["masks"], "--output", f"{out}/segmented", *SMALL],
        "plan": ["plan", "distill", "--teacher", "demo", "--data", data, *STUDENT, "--train.batch-size", "4", *bad[:2]],
        "profile": ["profile", "distill", "--teacher", "demo", "--data", data, *STUDENT, *SMALL, *bad[:2],
                    "--train.epochs", "30"],
        "doctor": ["doctor", run_folder, *cpu],
        "tars": ["evaluate", "knn", "demo", "--data", places["shards.tar"], *cpu, "--cache", "none"],
    }  # fmt: skip


def try_names(folder: Path, *, amount: int, seed: int) -> dict[str, Any]:
    """The first `amount` of the commands, in their order, which is not drawn: all of them above their number.

    What they print and log holds no control character of a name, and shows its markup as it was written.
    """
    places = make_places(folder)
    failures, codes, shown = [], {}, 0
    for name, words in list(command_lines(places).items())[:amount]:
        end = run(words, folder / "log", seconds=120)
        codes[name] = end.code
        text = end.text + "".join(
            path.read_text(errors="replace") for path in Path(places["run"]).parent.rglob("log.txt")
        )
        raw = sorted({char for char in text if not (char.isprintable() or char in "\n\t\r")})
        if raw:
            line = next(line for line in text.splitlines() if any(char in line for char in raw))
            failures.append(f"{name}: {raw} in {line[:200]!r}")
        failures += [f"{name}: a traceback: {end.words}"] if "Traceback" in text else []
        failures += [f"{name}: still at work"] if end.code is None else []
        shown += SHOWN in text
    shutil.rmtree(folder / NAME)
    return {"tried": len(codes), "codes": codes, "shown": shown, "failures": failures}
