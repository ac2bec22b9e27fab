"""Two real steps of every shipped recipe, through its own command, with only that cut which one core cannot hold.

A recipe keeps its method, network, width, views, losses, optimiser, schedule, precision and augmentation. Cut are the
batch, the epochs, the depth of networks, and what counts epochs or images; the trial lists each by comparing the
configuration of the run with the recipe.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
import yaml
from faults.children import facts_of, rows_of, run
from PIL import Image

from fdkit.config import find_recipe, read_yaml, recipe_names
from fdkit.data.sources import open_source

BATCH = 2
"""Images a step, twice as many where they are normalised in groups; the recipes for digits keep their own batch."""
TEACHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "clip_vitb": ("vit_base_patch16_clip_quickgelu_224", {"depth": 2}),
    "clip_vitl": ("vit_large_patch14_clip_quickgelu_224", {"depth": 1}),
    "deit_vitb": ("deit_base_patch16_224", {"depth": 2}),
    "dino_vitb": ("vit_base_patch16_224", {"depth": 2}),
    "dinov2_vitb14": ("vit_base_patch14_dinov2", {"depth": 2}),
    "esvit_swinb": ("swin_base_patch4_window7_224", {"window_size": 14, "depths": [2, 1, 1, 1]}),
    "mae_vitb": ("vit_base_patch16_224", {"embed_dim": 192, "depth": 12, "num_heads": 3}),
    "vit_tiny": ("vit_tiny_patch16_224", {"depth": 2}),
}
"""Networks of which a file of random weights stands in for the official one: timm's name, and what is cut."""
STUDENTS: dict[str, str] = {
    "finetune/fd_clip_vitb": "distill/clip_vitb",
    "finetune/fd_clip_vitb_100ep": "distill/clip_vitb_100ep",
    "finetune/fd_clip_vitl": "distill/clip_vitl",
    "finetune/fd_deit_vitb": "distill/deit_vitb",
    "finetune/fd_dino_vitb": "distill/dino_vitb",
    "finetune/fd_esvit_swinb": "distill/esvit_swinb",
    "finetune/mae_vitb": "pretrain/mae_vitb",
    "finetune/mae_vith": "pretrain/mae_vith",
    "finetune/mae_vitl": "pretrain/mae_vitl",
    "finetune/mocov3_vitb": "pretrain/mocov3_vitb",
    "finetune/mocov3_vits": "pretrain/mocov3_vits",
}
"""Recipes that go on with the run of another, and that one."""
EVERY_RECIPE = 1000
"""An amount that means all of them."""


class Steps(NamedTuple):
    """What two steps of a recipe came to."""

    name: str
    loss: list[float]
    cut: dict[str, str]
    """Fields in which the run differed from the recipe, as "4096 -> 4"."""
    moved: float
    """Share of the trained tensors that the second update changed."""
    failures: list[str]


def two_steps_of_every_recipe(folder: Path, *, amount: int, seed: int) -> dict[str, Any]:
    """Two steps of `amount` shipped recipes, drawn from the seed; EVERY_RECIPE means all."""
    names = recipe_names()
    if amount < len(names):
        names = np.random.default_rng(seed).choice(names, amount, replace=False).tolist()
    names.sort(
        key=lambda name: (name not in STUDENTS.values(), name)
    )  # those that others go on with come first
    return report([two_steps(name, folder, seed=seed) for name in names])


def report(steps: list[Steps]) -> dict[str, Any]:
    """The outcome of recipes as plain JSON."""
    return {
        "tried": len(steps),
        "failures": [f"{one.name}: {failure}" for one in steps for failure in one.failures],
        "recipes": {one.name: {"loss": one.loss, "moved": one.moved, "cut": one.cut} for one in steps},
    }


def two_steps(name: str, folder: Path, *, seed: int, prepare: Callable[[], object] = lambda: None) -> Steps:
    """Two steps of one recipe, after those of the recipe it goes on with; of its weights the exported ones stay.

    prepare: called in the recipe's process first.
    """
    images(folder / "images", seed)
    used = STUDENTS.get(name)
    if used is not None and not (folder / used / "student.safetensors").exists():
        before = _train(used, folder, seed=seed)
        if before:
            return Steps(name, [], {}, 0.0, [f"{used}, which it goes on with: {before[0]}"])
    failures = _train(name, folder, seed=seed, prepare=prepare)
    found = Steps(name, [], {}, 0.0, failures) if failures else _inspect(name, folder / name)
    for run_folder in [folder / name] if used is None else [folder / name, folder / used]:
        shutil.rmtree(run_folder / "checkpoints", ignore_errors=True)
    if name not in STUDENTS.values():
        shutil.rmtree(folder / name, ignore_errors=True)
    return found


def images(folder: Path, seed: int) -> None:
    """Smooth colours, a little larger than most recipes' views: in two classes, and as scenes with masks."""
    if folder.exists():
        return
    random = np.random.default_rng(seed)
    for split, count in (("train", 4 * BATCH), ("val", 2)):
        for number in range(count):
            coarse = Image.fromarray(random.integers(0, 256, (9, 9, 3), dtype=np.uint8))
            picture = coarse.resize((260, 240), Image.Resampling.BICUBIC)
            mask = Image.fromarray((np.asarray(picture)[:, :, 0] > 127).astype(np.uint8))
            for path, image in (
                (folder / "classes" / split / f"class{number % 2}" / f"{number}.jpg", picture),
                (folder / "scenes" / "images" / split / f"{number}.jpg", picture),
                (folder / "scenes" / "masks" / split / f"{number}.png", mask),
            ):
                path.parent.mkdir(parents=True, exist_ok=True)
                image.save(path)


def command_line(name: str, folder: Path, *, seed: int) -> list[str]:
    """The command of a recipe with what is cut, given the folder of images, teachers and runs."""
    command, _, short = name.partition("/")
    recipe = read_yaml(find_recipe(name, ""))
    scenes = "scenes" if command == "segment" else "classes"
    data = "demo" if short == "demo" else str(folder / "images" / scenes)
    arguments = {
        "distill": lambda: ["distill", "--teacher", _model(name, str(recipe.get("teacher", short)), folder)],
        "pretrain": lambda: ["pretrain", str(recipe["method"])],
        "finetune": lambda: ["finetune", _model(name, _command_word(name), folder)],
        "segment": lambda: ["segment", _model(name, _command_word(name), folder)],
    }[command]()
    arguments += ["--recipe", name, "--data", data, "--output", str(folder / name), "--seed", str(seed)]
    arguments += ["--loader.workers", "0", "--device", "cpu", "--train.log-every-steps", "1"]
    if command != "segment":  # looks for a collapse are no recipe's own, and take as long as both steps
        arguments += ["--monitor.collapse-every-epochs", "0"]
    groups = "num_splits" in recipe.get(str(recipe.get("method")), {})
    batch = int(recipe["train"]["batch_size"]) if short == "demo" else 2 * BATCH if groups else BATCH
    epochs = 2 / (len(open_source("demo", "train")) // batch) if short == "demo" else batch / (2 * BATCH)
    arguments += ["--train.batch-size", str(batch), "--train.epochs", str(epochs)]
    for field, value in {**_cut_network(command, recipe), **_cut_counts(command, recipe)}.items():
        arguments += [
            f"--{field.replace('_', '-')}",
            json.dumps(value) if isinstance(value, dict) else str(value),
        ]
    return arguments


def _cut_network(command: str, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Depths: one or two blocks; one in each stage of a ResNet, and a pair in a Swin's first, which shifts windows."""
    if command == "distill" and "position" in recipe["student"]:
        return {"student.depth": 1 if "vitl" in str(recipe["teacher"]) else 2}
    if command != "pretrain" or recipe["views"]["image_size"] == 32:  # the demo's
        return {}
    architecture = str(recipe["network"]["architecture"])
    args = dict(recipe["network"].get("model_args", {}))
    if architecture.startswith("vit"):
        args["depth"] = 1 if "huge" in architecture or "large" in architecture else 2
    elif architecture.startswith("swin"):
        args["depths"] = [2, 1, 1, 1]
    else:
        args["layers"] = [1, 1, 1, 1]
    return {"network.model_args": args}


def _cut_counts(command: str, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What counts images or epochs of a full run."""
    if command == "segment":
        upernet = recipe["segmentation"]["head"] == "upernet"
        return {"image_size": 64, "stride": 48, "segmentation.channels": 32} if upernet else {}
    method = str(recipe.get("method", ""))
    own = recipe.get(method.replace("-", "_"), {})
    cut: dict[str, Any] = {}
    if "num_splits" in own:
        cut[f"{method}.num_splits"] = 2
    if own.get("view_only_epochs"):
        cut[f"{method}.view_only_epochs"] = 0
    if own.get("freeze_prototypes_steps"):
        cut[f"{method}.freeze_prototypes_steps"] = 1
    if own.get("queue_start_epoch"):
        cut[f"{method}.queue_start_epoch"] = 0
    return cut


def _model(name: str, wanted: str, folder: Path) -> str:
    """The run a recipe goes on with, or a folder of random weights of the model it names."""
    if name in STUDENTS:
        return str(folder / STUDENTS[name])
    if wanted == "demo":
        return wanted
    from fdkit.models.libraries import build_timm, save_backbone

    architecture, cut = TEACHERS[wanted]
    model = folder / "models" / wanted
    if not model.exists():
        torch.manual_seed(0)
        save_backbone(build_timm(architecture, cut), model)
    return str(model)


def _command_word(name: str) -> str:
    """The MODEL in the command that a recipe states for itself."""
    [line] = [line for line in find_recipe(name, "").read_text().splitlines() if "Command:" in line]
    word = line.split("fdkit ")[1].split()[1]
    return "vit_tiny" if word == "RUN" else word


def _train(name: str, folder: Path, *, seed: int, prepare: Callable[[], object] = lambda: None) -> list[str]:
    """Run a recipe's two steps; what went wrong."""

    def prepared() -> None:
        prepare()
        _watch_updates()

    end = run(command_line(name, folder, seed=seed), folder / "log", prepare=prepared)
    if end.code != 0:
        return [f"exit code {end.code}: {end.words}"]
    return ["a traceback although it ended well"] if "Traceback" in end.text else []


def _watch_updates() -> None:
    """Leave in updates.json of the run folder which trained tensors the second update changed, and what is not finite.

    The loop stays as it is: what is asked is put around its `update`.
    """
    from fdkit.training.loop import Trainer

    update = Trainer.update

    def watched(self: Trainer, batch: Any) -> Any:
        before = [parameter.detach().clone() for parameter in self.parameters]
        verdicts = update(self, batch)
        moved = [not torch.equal(a, b) for a, b in zip(before, self.parameters, strict=True)]
        wrong = [name for name, value in self.method.state_dict().items() if not value.isfinite().all()]
        facts = {"steps": self.step, "moved": sum(moved) / len(moved), "not_finite": wrong}
        (self.run.folder / "updates.json").write_text(json.dumps(facts))
        return verdicts

    Trainer.update = watched  # type: ignore[method-assign]


def _inspect(name: str, run_folder: Path) -> Steps:
    """Look at what two steps left."""
    rows = [row for row in rows_of(run_folder) if "loss" in row]
    loss = [float(row["loss"]) for row in rows]
    seen = json.loads((run_folder / "updates.json").read_text())
    weights = safetensors.torch.load_file(run_folder / "student.safetensors")
    wrong = [key for key, value in weights.items() if not value.isfinite().all()]
    checks = {
        f"{seen['steps']} steps instead of 2": seen["steps"] == 2,
        f"{len(loss)} lines with a loss instead of 2": len(loss) == 2,
        f"loss {loss}": bool(np.isfinite(loss).all()),
        f"no weight moved: {seen['moved']}": seen["moved"] > 0,
        f"not finite: {seen['not_finite'][:3]}": not seen["not_finite"],
        f"exported not finite: {wrong[:3]}": not wrong,
        f"state {facts_of(run_folder)['state']}": facts_of(run_folder)["state"] == "done",
        "steps were left out": not facts_of(run_folder).get("bad_steps"),
    }
    failures = [failure for failure, holds in checks.items() if not holds]
    return Steps(name, loss, cut_in(name, run_folder), seen["moved"], failures)


def cut_in(name: str, run_folder: Path) -> dict[str, str]:
    """Fields of a recipe that the run changed, each with what it was and what it became."""
    recipe = read_yaml(find_recipe(name, ""))
    wanted, found = _flat(recipe), _flat(yaml.safe_load((run_folder / "config.yaml").read_text()))
    cut = {key: f"{value} -> {found.get(key)}" for key, value in wanted.items() if found.get(key) != value}
    command = name.partition("/")[0]
    for key, value in _flat({**_cut_network(command, recipe), **_cut_counts(command, recipe)}).items():
        if key not in wanted:
            cut[key] = f"the network's -> {value}"
    if name in STUDENTS:
        cut["the run it goes on with"] = f"{STUDENTS[name]}, cut as that is"
    model = Path(str(found.get("teacher", found.get("model", "")))).name
    if model in TEACHERS and name not in STUDENTS:
        cut[f"{model}, of random weights"] = json.dumps(TEACHERS[model][1])
    return cut


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
