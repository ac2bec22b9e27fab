"""Every file that fdkit reads and may not have written itself, damaged with an eye to what it is, given to its reader.

A reader gets a folder of sound files of which one was damaged. It may read it, or refuse it in words; anything else
that is raised, a crash, a hang and a flood of memory are failures, and so is a checkpoint or a record that is read as
what it never was.
"""

import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from faults.kills import last_words, start, wait
from faults.limits import try_all
from faults.mutations import damage
from faults.sound_files import (
    CONTENTS,
    FEATURES,
    HUB_SIZES,
    make_archives,
    make_checkpoint,
    make_feature_cache,
    make_hub_folder,
    make_index,
    make_pack,
    make_run,
    make_store,
    make_text_files,
    make_weights,
    sign,
)

from fdkit.data.decode import BadImage
from fdkit.errors import FdkitError

DEVICE = "cpu"


class Reader(NamedTuple):
    """What reads some files."""

    name: str
    make: Callable[[Path], object]
    """Puts sound files into an empty folder."""
    damaged: tuple[str, ...]
    """Patterns of the files of which one is damaged at a time."""
    read: Callable[[Path], object]
    weight: float = 1.0
    """Its share of the trials; less for what takes long."""
    changes: bool = False
    """Whether reading changes the folder, which then is made anew."""


def all_readers(run: Path) -> list[Reader]:
    """Every reader; run: the folder of a finished run, with a result and an analysis; made if it is not there."""

    def copied(folder: Path) -> None:
        if not run.exists():
            make_sound_run(run)
        shutil.copytree(run, folder, dirs_exist_ok=True)
        shutil.copy(folder / "config.yaml", folder / "asked.yaml")

    checkpoint = "checkpoints/step-00000003/"
    return [
        Reader("tar archives", make_archives, ("*.tar",), read_archives, 3),
        Reader("kept index of an archive", make_index, ("cache/tars/*.npz",), read_archives, 1.5),
        Reader("manifest of packed images", make_pack, ("packed/fdkit-pack.json",), read_packed, 1.5),
        Reader("manifest, packed again", make_pack, ("packed/fdkit-pack.json",), partial(read_packing, "packed"), 1),
        Reader("records of packing", make_pack, ("packing/.packing/*.json",), partial(read_packing, "packing"), 1.5),
        Reader("teacher cache: records", make_feature_cache, ("records-*", "journal-*"), read_features, 2, True),
        Reader("evaluation store", make_store, ("cache/*/*.json", "cache/*/*8", "cache/*/*32"), read_store, 1.5, True),
        Reader("checkpoints", make_checkpoint, (f"{checkpoint}*",), read_checkpoints, 1.5, True),
        Reader("checkpoints of another hand", make_checkpoint, (f"{checkpoint}*",), read_signed_checkpoint, 1.5, True),
        Reader("run.json", copied, ("run.json",), read_facts, 0.2),
        Reader("metrics.jsonl", copied, ("metrics.jsonl",), read_lines, 2),
        Reader("config.yaml", copied, ("config.yaml",), read_configuration, 0.3),
        Reader("lock and run.json at --resume", copied, ("lock", "run.json"), resume, 0.5, True),
        Reader("results", copied, ("results/*.json", "*.json"), read_results, 2),
        Reader("page of a report", copied, ("results/*.json", "run.json", "metrics.jsonl"), make_page, 0.02, True),
        Reader("student.json and student.safetensors", copied, ("student.*",), load_student, 1),
        *(
            Reader(f"hub folder of {kind}", partial(make_hub_folder, kind=kind), ("*.json", "*.md"), load_hub, 0.6)
            for kind in HUB_SIZES
        ),
        Reader("weights", make_weights, ("weights-*",), read_weights, 2),
        Reader("names of classes, recipes, notes", make_text_files, ("**/*.txt", "**/*.json", "*.yaml"), read_texts, 3),
    ]  # fmt: skip


# -- what reads them


def read_archives(folder: Path) -> None:
    """Every image of every archive of the folder; those that are unreadable are named."""
    from fdkit.data.tar_source import open_tars

    for path in sorted(folder.glob("*.tar")):
        _read_all(open_tars(str(path)))


def _read_all(source: Any) -> None:
    assert len(source.fingerprint) == len(source.content_stamp) == 64
    assert source.labels is None or source.labels.max(initial=0) < len(source.classes)
    for index in range(len(source)):
        assert source.describe(index).isprintable()
        with suppress(BadImage):
            source.read(index)


def read_packed(folder: Path) -> None:
    from fdkit.data.sources import open_source

    _read_all(open_source(str(folder / "packed"), split="train"))


def read_packing(name: str, folder: Path) -> None:
    """As `fdkit pack` does where it packed into `name`; a record that is believed is the one that was written."""
    from fdkit.commands.pack import _listed, _plan_there, _require_same_plan
    from fdkit.data.pack import Job, finished

    job = Job("shard-00000.tar", "all", np.arange(4))
    record = finished(folder / name, job, _listed(folder / name).get(job.file))
    if record is not None:
        assert all(isinstance(record[count], int) for count in ("bytes", "images", "resized"))
    begun = _plan_there(folder / name)
    assert begun is not None
    _require_same_plan(folder, begun, {"seed": 3, "short_side": 20})


def read_features(folder: Path) -> None:
    """Every record of a cache of teacher features: what counts as sound is what was stored, to the bit."""
    from fdkit.teachers.feature_cache import FeatureCache

    layout, crops = FEATURES
    cache = FeatureCache(folder, layout)
    cache.recover()
    for crop, content in zip(crops, CONTENTS, strict=True):
        found, state = cache.read(crop)
        assert state != "sound" or found == content, f"{crop}: other features than were stored"
    assert cache.fill(crops[:2], CONTENTS[:2]) == CONTENTS[:2]


def read_store(folder: Path) -> None:
    """Features that are damaged are made again, and those that are given back are the right ones."""
    import torch

    values, indices = make_store(folder)
    wanted = torch.arange(24.0).reshape(6, 4)[indices.long()]
    assert torch.equal(values, wanted), "other features than were made"


def read_checkpoints(folder: Path) -> None:
    """A damaged checkpoint is set aside, and the one before is whole."""
    import torch

    from fdkit.training.checkpoint import load_checkpoint, newest_sound

    newest = newest_sound(folder / "checkpoints")
    assert newest is not None
    tensors, state = load_checkpoint(newest)
    step = int(newest.name.removeprefix("step-"))
    assert state == {"step": step, "seed": 0}, state
    assert torch.equal(tensors["model"]["student.network.a"], torch.full((2, 3), float(step)))


def read_signed_checkpoint(folder: Path) -> None:
    """A checkpoint whose manifest is right, as one who means harm would write it."""
    from fdkit.teachers.run_checkpoint import network_state, require_sound
    from fdkit.training.checkpoint import load_checkpoint

    path = folder / "checkpoints" / "step-00000003"
    sign(path)
    require_sound(path)
    network_state(path)
    load_checkpoint(path)


def read_facts(folder: Path) -> None:
    """Everything that reads a run.json: reports, licences, comparisons, torchrun's restart, trajectories."""
    from fdkit.commands._trajectory import _last_step
    from fdkit.commands.compare import CompareConfig, read_distillation
    from fdkit.report.run_sections import facts_of, read_run, run_sections
    from fdkit.teachers.licensing import terms_of_run
    from fdkit.training.run import _begun_by

    run = read_run("it", folder)
    facts_of(run)
    run_sections([run])
    assert isinstance(run.command, str)
    _begun_by(folder, ["x"])
    _last_step(folder)
    _each(
        lambda: terms_of_run(folder),
        lambda: read_distillation(CompareConfig(run=str(folder), data="digits")),
        lambda: _space(folder),
    )


def _each(*readings: Callable[[], object]) -> None:
    """All of them, though some refuse; what the last to refuse said."""
    refusal: FdkitError | None = None
    for reading in readings:
        try:
            reading()
        except FdkitError as error:
            refusal = error
    if refusal is not None:
        raise refusal


def _space(folder: Path) -> None:
    from fdkit.evaluation._joint_space import run_of

    run_of(folder)


def read_lines(folder: Path) -> None:
    """What reports, resumed runs and comparisons make of metrics."""
    from fdkit.report.run_sections import read_run, run_sections
    from fdkit.training.run import Run, read_metrics

    assert all(isinstance(row, dict) for row in read_metrics(folder))
    run_sections([read_run("it", folder)])
    before = (folder / "metrics.jsonl").read_bytes()
    Run(folder, "", resumed=True, writes=True).forget_metrics_after(5)
    (folder / "metrics.jsonl").write_bytes(before)


def read_configuration(folder: Path) -> None:
    from fdkit.commands.compare import CompareConfig, read_distillation
    from fdkit.config import read_yaml
    from fdkit.report.run_sections import read_run, run_sections
    from fdkit.training.run import check_unchanged

    run_sections([read_run("it", folder)])
    text = (folder / "config.yaml").read_bytes().decode(errors="replace")
    _each(
        lambda: read_yaml(folder / "config.yaml"),
        lambda: read_distillation(CompareConfig(run=str(folder), data="digits")),
        lambda: check_unchanged(text, (folder / "asked.yaml").read_text(), folder),
    )


def resume(folder: Path) -> None:
    """Begin where the run stopped, and end again."""
    from fdkit.training.run import Run

    run = Run.create(folder, (folder / "config.yaml").read_text(), resume=True)
    with run, suppress(FdkitError):  # other images: what the run says of its own is looked at
        run.check_data("x", name="y")


def read_results(folder: Path) -> None:
    from fdkit.report.results import collect, difference

    found = collect([("", folder), ("mine", folder)])
    assert isinstance(found.models(), list)
    for one in found.evaluations:
        difference(one, found.evaluations[0])


def make_page(folder: Path) -> None:
    """The page of a report on the folder: what cannot be shown is told on it."""
    from fdkit.report.report import Report, write_report
    from fdkit.report.results import collect
    from fdkit.report.run_sections import read_run

    found = collect([("it", folder)])
    write_report(
        folder / "index.html", Report(["it"], [read_run("it", folder)], found, [], "fdkit report it")
    )
    assert (folder / "index.html").stat().st_size > 1000


def load_student(folder: Path) -> None:
    from fdkit.models.libraries import load_backbone
    from fdkit.teachers.loading import load_teacher

    _each(lambda: load_teacher(str(folder)), lambda: load_backbone(folder))


def load_hub(folder: Path) -> None:
    """The model of a folder from the hub; of open_clip, whose smallest is large, what the folder says of it."""
    from fdkit.teachers.huggingface_folder import OPEN_CLIP_CONFIG, read_folder
    from fdkit.teachers.loading import load_teacher

    if (folder / OPEN_CLIP_CONFIG).exists():
        read_folder(folder)
    else:
        load_teacher(str(folder))


def read_weights(folder: Path) -> None:
    """The files one after another, of which one is damaged."""
    from fdkit.teachers.files import read_file

    for path in sorted(folder.glob("weights-*")):
        read_file(path)


def read_texts(folder: Path) -> None:
    """Files of a few words each, every one given to its reader."""
    import torch

    from fdkit.commands._teacher_cache import _read_components, _read_manifest, form_of
    from fdkit.commands.distill import DistillConfig
    from fdkit.commands.doctor import _stored
    from fdkit.config import check_recipe, read_yaml
    from fdkit.data.segmentation import _read_classes
    from fdkit.evaluation.zero_shot import described
    from fdkit.teachers.diagnosis import _check_golden
    from fdkit.teachers.download import _read_note

    def cached() -> None:
        manifest = _read_manifest(folder)
        form_of(folder, manifest)
        _read_components(folder, manifest)

    def diagnosed() -> None:
        loaded, teacher = _demo()
        golden = _stored(folder / "golden.json")
        _check_golden(loaded._replace(sha256="known"), teacher, golden, torch.device(DEVICE))

    note = _read_note(folder / "file", "https://x/y")
    assert note.total is None or (type(note.total) is int and note.total >= 0), note
    assert isinstance(note.validator, str)
    note.validator.encode("latin-1")  # goes into a header
    assert note.validator.isprintable()
    _each(
        lambda: _read_classes(folder, np.arange(256)),
        lambda: _read_classes(folder / "listed", np.arange(256)),
        lambda: _read_classes(folder / "ade", np.arange(256)),
        lambda: described(["a", "b", "c"], folder / "classes.txt"),
        lambda: check_recipe(DistillConfig, read_yaml(folder / "recipe.yaml"), "recipe.yaml"),
        cached,
        diagnosed,
    )


@cache
def _demo() -> Any:
    from fdkit.teachers.loading import load_audited
    from fdkit.teachers.request import Request

    return load_audited(Request("demo"))


# -- the trial


def make_sound_run(folder: Path) -> Path:
    """A small distillation with a result of kNN and an analysis, made by the commands themselves."""
    return make_run(folder, lambda arguments: _command(arguments, folder.with_name("log")))


def _command(arguments: list[str], log: Path) -> None:
    code = wait(start([arguments], log), 120)
    assert code == 0, f"exit code {code} of {arguments}: {last_words(log)}"


def fuzz_readers(folder: Path, *, amount: int, seed: int, names: tuple[str, ...] = ()) -> dict[str, Any]:
    """About `amount` damaged files, shared out among all readers, or those named.

    "executions" counts them by reader, "refused" those that were refused in words.
    """
    readers = [one for one in all_readers(folder / "run") if not names or one.name in names]
    whole = sum(one.weight for one in readers)
    random = np.random.default_rng(seed)
    executions, refused, failures = {}, 0, []
    for number, reader in enumerate(readers):
        place = folder / f"reader-{number:02d}"
        with _quietly(place / "sound" / "cache"):
            trial = _fuzz(reader, place, max(1, round(amount * reader.weight / whole)), random)
        executions[reader.name] = trial.tried
        refused += trial.refused
        failures += [f"{reader.name}: {words}" for words in trial.failures]
        shutil.rmtree(place)
    tried = sum(executions.values())
    return {"tried": tried, "refused": refused, "executions": executions, "failures": failures}


@contextmanager
def _quietly(cache: Path) -> Iterator[None]:
    """A cache of its own, no warnings, no log."""
    before, level = os.environ.get("FDKIT_CACHE"), logging.getLogger("fdkit").level
    os.environ["FDKIT_CACHE"] = str(cache)
    logging.getLogger("fdkit").setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.getLogger("fdkit").setLevel(level)
        del os.environ["FDKIT_CACHE"]
        if before is not None:
            os.environ["FDKIT_CACHE"] = before


def _fuzz(reader: Reader, place: Path, count: int, random: np.random.Generator) -> Any:
    sound = place / "sound"
    sound.mkdir(parents=True)
    reader.make(sound)
    names = sorted({str(path.relative_to(sound)) for one in reader.damaged for path in sound.glob(one)})
    assert names, f"{reader.name}: nothing to damage"
    contents = {name: (sound / name).read_bytes() for name in names}

    def read(case: tuple[str, int]) -> None:
        name, own_seed = case
        folder = sound
        if reader.changes:
            folder = place / "copy"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(sound, folder)
        try:
            (folder / name).write_bytes(damage(name, contents[name], np.random.default_rng(own_seed)))
            reader.read(folder)
        finally:
            if not reader.changes:
                (folder / name).write_bytes(contents[name])

    reader.read(sound if not reader.changes else _copied(sound, place / "copy"))  # which is not refused
    seeds = random.integers(0, 2**62, count).tolist()
    cases = [(names[number % len(names)], own) for number, own in enumerate(seeds)]
    inputs = [(f"{name}, seed {own}", (name, own)) for name, own in cases]
    return try_all(read, inputs, refusals=(FdkitError,), seconds=30, megabytes=1500, chunk=400)


def _copied(folder: Path, place: Path) -> Path:
    shutil.copytree(folder, place)
    return place
