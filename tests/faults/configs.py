"""Recipes and command lines drawn from what every command takes: odd values, wrong types, names that are none.

Whatever is drawn goes through the real command in a forked child that stops after two optimiser steps: it may do what
it was asked, or refuse in words with an exit code of its own. A traceback, exit code 1, or a crash is a failure.
"""

import ctypes
import json
import os
import resource
import shutil
import signal
import sys
import types
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import numpy as np
import yaml
from faults.children import run
from faults.jobs import NETWORK, SWIN
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from PIL import Image
from pydantic import TypeAdapter
from pydantic.fields import FieldInfo

from fdkit.commands._flags import nested_config
from fdkit.config import Config
from fdkit.errors import FdkitError

Strategy = st.SearchStrategy[Any]

INTEGERS = (-(10**18), -1, 0, 1, 2, 3, 4, 7, 8, 16, 31, 255, 10**6, 2**31, 10**12, 10**30)
REALS = (-1e9, -1.0, -0.0, 0.0, 1e-300, 1e-12, 1e-3, 0.1, 0.5, 0.9, 1.0, 1.5, 2.0, 30.0, 1e9, 1e300)
TEXTS = (
    "", " ", "auto", "digits", "demo", "none", "cls", "a b", "../..", "vit_tiny_patch16_224", "<b>", "ü\n", "0", "1e-3",
    "-", "--", "-1", "/", "/dev/null", "~", "x" * 300, "\x1b[31m[bold]x", "%s", "{}", "timm:", "hf:a/b", "wds:", "é",
    "open_clip:ViT-B-32", "torchvision:", "*", "a,b", "cuda:99", "null",
)  # fmt: skip
OF_WRONG_TYPE = (None, True, -3, 2.5, "text", [], [1, "a"], {}, {"a": 1}, [[1.0]], "nan", ".inf")
ALLOWED = {0, 2, 3, 4, 5, 6, 7}
MEGABYTES = 6000
SECONDS = 60.0
STEPS = 2


# -- values of a type, and recipes of a configuration, as hypothesis strategies


def values_of(annotation: Any) -> Strategy:
    """Values of a type, odd ones among them; of another type now and then."""
    right = _right_values(annotation)
    return st.integers(0, 24).flatmap(lambda draw: right if draw else st.sampled_from(OF_WRONG_TYPE))


def _right_values(annotation: Any) -> Strategy:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _right_values(arguments[0])
    if origin in (Union, types.UnionType):
        return st.one_of([values_of(one) for one in arguments])
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin is tuple and Ellipsis not in arguments:
        return st.tuples(*[values_of(one) for one in arguments]).map(list)
    if origin in (tuple, list, set):
        return st.lists(values_of(arguments[0]), max_size=3)
    if origin is dict:
        return st.dictionaries(st.sampled_from(TEXTS), values_of(arguments[1]), max_size=2)
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return recipes_of(annotation)
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return st.sampled_from([one.value for one in annotation])
    known: dict[Any, Strategy] = {
        type(None): st.none(),
        bool: st.booleans(),
        int: st.sampled_from(INTEGERS) | st.integers(-5, 40),
        float: st.sampled_from(REALS) | st.floats(allow_nan=False, allow_infinity=False, width=32),
        Any: st.sampled_from(OF_WRONG_TYPE),
    }
    return known.get(annotation, st.sampled_from(TEXTS))


class Field(NamedTuple):
    """One field of a configuration, however deep."""

    path: tuple[str, ...]
    info: FieldInfo

    def takes(self, value: Any) -> bool:
        """Whether its own rules allow the value; those between fields are not asked."""
        try:
            TypeAdapter(self.info.rebuild_annotation()).validate_python(value)
        except (ValueError, FdkitError):
            return False
        return True


@st.composite
def values_for(draw: Any, field: Field) -> Any:
    """A value for a field, twice in three times one that its own rules allow."""
    values = values_of(field.info.annotation)
    if draw(st.integers(0, 2)) == 0:
        return draw(values)
    candidates = draw(st.lists(values, min_size=8, max_size=8))
    return next((value for value in candidates if field.takes(value)), candidates[0])


def fields_of(kind: type[Config], above: tuple[str, ...] = (), *, excluded: bool = False) -> list[Field]:
    """Every field that a recipe may set; excluded: and those that only flags may."""
    found: list[Field] = []
    for name, field in kind.model_fields.items():
        if field.exclude and not excluded:
            continue
        annotation = field.annotation
        found.append(Field((*above, name), field))
        if isinstance(annotation, type) and issubclass(annotation, Config):
            found += fields_of(annotation, (*above, name), excluded=excluded)
    return found


@st.composite
def recipes_of(draw: Any, kind: type[Config], *, base: dict[str, Any] | None = None, most: int = 3) -> Any:
    """A recipe over `base` with up to `most` of its fields drawn, at any depth; now and then a name that is none."""
    recipe = json.loads(json.dumps(base or {}))
    fields = fields_of(kind)
    for _ in range(draw(st.integers(1, most))):
        field = draw(st.sampled_from(fields))
        target = recipe
        for name in field.path[:-1]:
            target = target.setdefault(name, {}) if isinstance(target, dict) else {}
        name = field.path[-1] if draw(st.integers(0, 49)) else f"{field.path[-1]}s"
        if isinstance(target, dict):
            target[name] = draw(values_for(field))
    return recipe


# -- command lines


class Subject(NamedTuple):
    """A command that is tried."""

    words: tuple[str, ...]
    """The command, its choice and what it must be given, with {data}, {run}, {masks} and {output} in it."""
    kind: Callable[[], type[Config]]
    base: dict[str, Any]
    """A recipe that makes it small; empty for what takes no recipe."""


TRAINING: dict[str, Any] = {
    "train": {"batch_size": 4, "epochs": 2, "precision": "fp32", "log_every_steps": 1},
    "loader": {"workers": 0},
    "monitor": {"every_epochs": 0, "collapse_every_epochs": 0},
}
ENDS = ["--device", "cpu", "--output", "{output}"]


def _training(method: str) -> dict[str, Any]:
    """A recipe of a pretraining method with networks and heads of a few numbers."""
    from fdkit.commands import pretrain

    kind: Any = pretrain.config_class(method)
    section = pretrain.section(method)
    own = kind.model_fields[section].annotation.model_fields
    views = kind.model_fields["views"].annotation.model_fields
    wide = {
        name: 64
        for name, field in own.items()
        if isinstance(default := field.get_default(call_default_factory=True), int)
        and not isinstance(default, bool)
        and default > 64
    }
    sizes = {"image_size": 16, "local_size": 8, "num_local": 2}
    return TRAINING | {
        "network": {**(SWIN if method == "esvit" else NETWORK)},
        "views": {name: value for name, value in sizes.items() if name in views},
        section: wide | ({"num_splits": 2} if "num_splits" in own else {}),
    }


def subjects() -> dict[str, Subject]:
    """Every command and choice but demo, which is made of others, by its words."""
    from fdkit.commands import (
        analyze,
        compare,
        distill,
        doctor,
        evaluate,
        finetune,
        pack,
        pretrain,
        report,
        segment,
        teachers,
    )
    from fdkit.commands.plan import config_class as planned
    from fdkit.commands.profile import config_class as profiled

    small = {"student": {"depth": 1, "width": 12, "num_heads": 2}, "views": {"image_size": 16}}
    model, measured = ["demo", "--data", "{data}"], ["--analyses", "cka", "--evaluators", "knn"]
    distilling = TRAINING | small
    small_comparison = {"frozen_only": True, "k": 3}
    long = distilling | {"train": TRAINING["train"] | {"epochs": 30}}
    tuning = TRAINING | {"image_size": 32}
    segmenting = tuning | {"monitor": {"every_epochs": 0}}
    of = ("distill", "--teacher", "demo", "--data", "{data}", "--device", "cpu")
    found = {
        "distill": Subject((*of[:5], *ENDS), distill.config_class, distilling),
        "finetune": Subject(("finetune", *model, *ENDS), finetune.config_class, tuning),
        "segment": Subject(("segment", "demo", "--data", "{masks}", *ENDS), segment.config_class, segmenting),
        "compare": Subject(("compare", "{run}", *model[1:], *ENDS), compare.config_class, small_comparison),
        "report": Subject(("report", *model, *measured, *ENDS), report.config_class, {}),
        "pack": Subject(("pack", "{data}", "--output", "{output}"), pack.config_class, {}),
        "teachers": Subject(("teachers",), teachers.config_class, {}),
        "doctor": Subject(("doctor", "demo", "--device", "cpu"), doctor.config_class, {}),
        "plan": Subject(("plan", *of), lambda: planned(distill.config_class()), distilling),
        "profile": Subject(("profile", *of), lambda: profiled(distill.config_class()), long),
    }  # fmt: skip
    for name in pretrain.choices():
        words = ("pretrain", name, "--data", "{data}", *ENDS)
        found[f"pretrain {name}"] = Subject(
            words, lambda name=name: pretrain.config_class(name), _training(name)
        )
    for name in evaluate.choices():
        own = {"knn": ["--k", "3"], "low-shot": ["--shots", "2"], "retrieval": ["--k", "1"]}.get(name, [])
        data = "{masks}" if name == "patch-knn" else "{data}"
        words = (
            "evaluate",
            name,
            "demo",
            "--data",
            data,
            *own,
            "--cache",
            "none",
            "--loader.workers",
            "0",
            *ENDS,
        )
        found[f"evaluate {name}"] = Subject(words, lambda name=name: evaluate.config_class(name), {})
    for name in analyze.choices():
        own = {"layer-knn": ["--k", "2"], "loss-landscape": ["--readout", "probe"]}.get(name, [])
        own = ["--unit", "percent"] if name in ("attention", "attention-distance") else own
        models = ["{run}"] if name == "trajectory" else ["demo", "{run}"]
        words = ("analyze", name, *models, "--data", "{data}", "--num-images", "8", *own, *ENDS)
        found[f"analyze {name}"] = Subject(words, lambda name=name: analyze.config_class(name), {})
    return found


def _word(value: Any) -> list[str]:
    """A value as words of a command line."""
    if isinstance(value, dict):
        return [json.dumps(value)]
    if isinstance(value, list):
        return [word for one in value for word in _word(one)]
    return [str(value).replace("\0", "")]


@st.composite
def flags_of(draw: Any, kind: type[Config], *, most: int = 3) -> list[str]:
    """Up to `most` flags of a command with drawn values; a flag that is none, a value too many, or none at all."""
    words: list[str] = []
    fields = [one for one in fields_of(kind, excluded=True) if nested_config(one.info.annotation) is None]
    for _ in range(draw(st.integers(1, most))):
        field = draw(st.sampled_from(fields))
        flag = "--" + ".".join(field.path).replace("_", "-")
        way = draw(st.integers(0, 29))
        flag += "x" if way == 0 else ""
        value = [] if way == 1 else _word(draw(values_for(field)))
        words += [f"{flag}={value[0]}"] if way in (2, 3) and value else [flag, *value]
        words += ["left over"] if way == 4 else ["--debug"] * (way == 5 and "--debug" not in words)
    return words


# -- the trial


def make_images(folder: Path) -> dict[str, str]:
    """Twelve pictures in two classes with a split, and with masks; what {data} and the others stand for."""
    random = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 4)):
        for number in range(count):
            pixels = Image.fromarray(random.integers(0, 256, (20, 24, 3), dtype=np.uint8))
            mask = Image.fromarray((np.arange(480).reshape(20, 24) // 60 % 2).astype(np.uint8))
            for path, image in (
                (folder / "data" / split / f"class{number % 2}" / f"{number}.png", pixels),
                (folder / "masks" / "images" / split / f"{number}.png", pixels),
                (folder / "masks" / "masks" / split / f"{number}.png", mask),
            ):
                path.parent.mkdir(parents=True, exist_ok=True)
                image.save(path)
    return {name: str(folder / name) for name in ("data", "masks", "run", "output")}


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def make_run(places: dict[str, str], log: Path) -> None:
    """A finished distillation with two checkpoints at {run}."""
    recipe = subjects()["distill"].base
    words = [
        "distill",
        "--teacher",
        "demo",
        "--data",
        places["data"],
        "--output",
        places["run"],
        "--device",
        "cpu",
    ]
    Path(places["run"]).with_name("first.yaml").write_text(yaml.safe_dump(recipe))
    words += ["--recipe", str(Path(places["run"]).with_name("first.yaml")), "--train.save-every-steps", "2"]
    end = run(words, log)
    assert end.code == 0, end.words


def _stop_early() -> None:
    """In the child: leave with code 0 once STEPS updates are done, and let memory end before the machine's does."""
    from fdkit.training.loop import Trainer

    update = Trainer.update
    done = 0

    def counted(self: Trainer, batch: Any) -> Any:
        nonlocal done
        verdicts = update(self, batch)
        done += 1
        if done == STEPS:
            print("took its steps", flush=True)
            sys.stderr.flush()
            os._exit(0)
        return verdicts

    Trainer.update = counted  # type: ignore[method-assign]
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # and not outlive the trial, however that ends
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEGABYTES * 1_000_000,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _complaint(words: list[str], code: int | None, text: str) -> str:
    """What is wrong with how a command ended; empty for nothing."""
    said = " | ".join(text.strip().splitlines()[-3:])[-300:]
    if code is not None and code not in ALLOWED:
        return f"exit code {code}: {said}"
    return f"a traceback: {said}" if "Traceback" in text and "--debug" not in words else ""


class _Tally:
    def __init__(self) -> None:
        self.tried = self.steps = self.slow = 0
        self.codes: dict[str, int] = {}
        self.failures: list[str] = []

    def add(self, words: list[str], end: Any, told: str) -> None:
        self.tried += 1
        self.steps += "took its steps" in end.text
        self.slow += end.code is None
        self.codes[str(end.code)] = self.codes.get(str(end.code), 0) + 1
        complaint = _complaint(words, end.code, end.text)
        if complaint:
            self.failures.append(f"{told}: {complaint}")


def try_configs(folder: Path, *, amount: int, seed: int, names: tuple[str, ...] = ()) -> dict[str, Any]:
    """`amount` drawn recipes and command lines, half of each, over all commands in turn, or those named.

    "took_steps": trainings that were found sound and took their steps; "codes": how many ended with which code;
    "slow": those that were still at work after SECONDS, which is no failure.
    """
    places = make_images(folder)
    make_run(places, folder / "log")
    tally = _Tally()
    chosen = {name: one for name, one in subjects().items() if not names or name in names}
    kinds = {name: one.kind() for name, one in chosen.items()}
    turns = [list(chosen)[number % len(chosen)] for number in range(amount)]
    counts = {name: turns.count(name) for name in chosen}

    def tried(name: str, words: list[str], told: str) -> None:
        _remove(folder / "output")
        os.chdir(folder)
        tally.add(words, run(words, folder / "log", seconds=SECONDS, prepare=_stop_early), told)

    before = Path.cwd()
    try:
        for number, (name, subject) in enumerate(chosen.items()):
            start = [word.format(**places) for word in subject.words]
            num_recipes = counts[name] // 2 + counts[name] % 2 * (number % 2) if subject.base else 0

            def by_recipe(recipe: Any, name: str = name, start: list[str] = start) -> None:
                (folder / "recipe.yaml").write_text(
                    yaml.safe_dump(recipe, allow_unicode=True), errors="replace"
                )
                words = [*start, "--recipe", str(folder / "recipe.yaml")]
                tried(name, words, f"{name} with {json.dumps(recipe)}")

            def by_flags(
                flags: list[str], name: str = name, start: list[str] = start, base: Any = subject.base
            ) -> None:
                (folder / "recipe.yaml").write_text(yaml.safe_dump(base))
                words = [*start, *(["--recipe", str(folder / "recipe.yaml")] if base else []), *flags]
                tried(name, words, f"{name} with {flags}")

            own = 1000 * seed + number
            _for_each(recipes_of(kinds[name], base=subject.base), num_recipes, own, by_recipe)
            _for_each(flags_of(kinds[name]), counts[name] - num_recipes, own, by_flags)
    finally:
        os.chdir(before)
    return {
        "tried": tally.tried,
        "took_steps": tally.steps,
        "slow": tally.slow,
        "codes": tally.codes,
        "failures": tally.failures,
    }


def _for_each(strategy: Strategy, count: int, seed: int, work: Callable[[Any], None]) -> None:
    """Give `count` draws of a strategy to a function; the same ones for the same seed."""
    if count < 1:
        return

    @seeded(seed)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def each(value: Any) -> None:
        work(value)

    each()
