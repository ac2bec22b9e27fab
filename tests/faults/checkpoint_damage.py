"""A finished run whose files are damaged one at a time: what is resumed or read must say so, and lose nothing else.

Most damage is done to files in place and looked at in this process, thousands of times; some of it is resumed for real.
"""

import json
import logging
import random
import shutil
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from faults.jobs import finished, shortest
from faults.kills import differences, finish, last_words, preload

from fdkit.errors import FdkitError, WeightsError
from fdkit.teachers.shards import SHARDS_FILE, part_name
from fdkit.training import checkpoint as writing
from fdkit.training.checkpoint import Checkpoint, list_steps, load_checkpoint, newest_sound

Draw = random.Random
PAGE = b"<!DOCTYPE html><html><body>404 Not Found</body></html>\n"
RESUMES_PER = 200
"""Damages looked at for one that is resumed for real."""


def flip_a_bit(data: bytes, draw: Draw) -> bytes:
    place = draw.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1 :]


def cut(data: bytes, draw: Draw) -> bytes:
    return data[: draw.randrange(len(data))]


def zero(data: bytes, draw: Draw) -> bytes:
    start = draw.randrange(len(data))
    stop = draw.randint(start + 1, len(data))
    return data[:start] + bytes(stop - start) + data[stop:]


def grow(data: bytes, draw: Draw) -> bytes:
    return data + draw.randbytes(draw.randint(1, 64))


def swap_pages(data: bytes, draw: Draw) -> bytes:
    """Two parts of 512 bytes change places, as a disk that mixes up its blocks does; of a small file its halves."""
    size = min(512, len(data) // 2)
    first, second = draw.randrange(0, len(data) - 2 * size + 1), len(data) - size
    parts = data[:first], data[second:], data[first + size : second], data[first : first + size]
    return b"".join(parts)


WAYS: dict[str, Callable[[bytes, Draw], bytes | None]] = {
    "one bit": flip_a_bit,
    "cut": cut,
    "zeros": zero,
    "longer": grow,
    "pages swapped": swap_pages,
    "empty": lambda data, draw: b"",
    "a web page": lambda data, draw: PAGE,
    "gone": lambda data, draw: None,
}


@contextmanager
def damaged(path: Path, way: str, draw: Draw) -> Iterator[bool]:
    """A file damaged while the block runs; whether it is another one then. What happened to its name is undone."""
    whole, folder = path.read_bytes(), path.parent
    content = WAYS[way](whole, draw)
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    try:
        yield content != whole
    finally:
        for aside in folder.parent.glob(f"{folder.name}.corrupt-*"):
            aside.rename(folder)
        for aside in folder.glob(f"{path.name}.corrupt-*"):
            aside.unlink()
        path.write_bytes(whole)


@contextmanager
def heard() -> Iterator[list[str]]:
    """What fdkit says while the block runs, heard by nobody else."""
    said: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    log, ear = logging.getLogger("fdkit"), Ear()
    before, log.handlers, propagates = log.handlers, [ear], log.propagate
    log.propagate = False
    try:
        yield said
    finally:
        log.handlers, log.propagate = before, propagates


def in_parts(plain: Path, folder: Path, count: int = 2) -> None:
    """The checkpoints of a folder as `count` processes would have written them: cut by rows."""
    for path in reversed(list_steps(plain)):
        content = load_checkpoint(path)
        target = folder / path.name
        partial = writing._begin(folder, target)
        assert partial is not None
        files, index = {}, {}
        for number in range(count):
            own: dict[str, dict[str, Any]] = {}
            for group, tensors in content.tensors.items():
                edges = {
                    name: [len(one) * part // count for part in range(count + 1)]
                    for name, one in tensors.items()
                    if one.ndim and len(one) >= count and group != "generators"
                }
                index[group] = edges
                own[group] = {
                    name: one[edges[name][number] : edges[name][number + 1]] if name in edges else one
                    for name, one in tensors.items()
                    if name in edges or number == 0
                }
            names = {group: part_name(group, number, count) for group, tensors in own.items() if tensors}
            files |= writing._write_groups(partial, names, Checkpoint(own, {}))
        (partial / SHARDS_FILE).write_text(json.dumps(index) + "\n")
        files |= writing._facts([partial / SHARDS_FILE])
        writing._finish(partial, target, files, content.state)


def damage_checkpoints(folder: Path, *, amount: int, seed: int) -> dict[str, Any]:
    """Damage the newest checkpoint of a finished run `amount` times, whole and in parts, and look for a sound one; for
    every 200 a run is resumed for real, in every way in turn; and once with all checkpoints damaged."""
    preload()
    draw, job, log = Draw(seed), shortest(), folder / "log"
    run = folder / "run"
    shutil.copytree(finished(), run)
    plain, parts = run / "checkpoints", folder / "parts"
    in_parts(plain, parts)
    counts: Counter[str] = Counter()
    failures = []
    for number in range(amount):
        way = list(WAYS)[number % len(WAYS)]
        failures += _look(parts if draw.random() < 0.5 else plain, way, draw, counts)
    failures += _all_damaged(parts, draw) + _all_damaged(plain, draw)
    wanted = job.result(run)
    resumed = max(1, amount // RESUMES_PER)
    for number in range(resumed):
        way = list(WAYS)[number % len(WAYS)]
        failures += _resumed(run, folder / "copy", way, draw, wanted, log)
    failures += _resumed_without_any(run, folder / "copy", draw, log)
    return {
        "tried": amount + resumed,
        "found": counts["found"],
        "harmless": counts["harmless"],
        "resumed_in_the_same_bits": resumed - sum("resumed" in failure for failure in failures),
        "damages_by_file": {name: count for name, count in sorted(counts.items()) if "." in name},
        "failures": failures,
    }


def _look(folder: Path, way: str, draw: Draw, counts: Counter[str]) -> list[str]:
    """Damage one file of the newest checkpoint, and look for a sound one."""
    newest, before = list_steps(folder)[:2]
    path = draw.choice(sorted(newest.iterdir()))
    counts[path.name] += 1
    what = f"{path.name} of {newest.name}, {way}"
    files = _names(folder)
    with damaged(path, way, draw) as changed, heard() as said:
        meaning = _is_same_manifest(path, folder)
        found = newest_sound(folder)
        aside = f"{newest.name}.corrupt-1"
        kept = {name.replace(aside, newest.name) for name in _names(folder)}
        if kept != files - ({f"{newest.name}/{path.name}"} if way == "gone" else set()):
            return [f"{what}: {sorted(files ^ kept)} came or went"]
        if found == newest:
            counts["harmless"] += 1
            return [] if not changed or meaning else [f"{what}: taken for sound"]
        counts["found"] += 1
        if found != before:
            return [f"{what}: went on with {found}"]
        if not any(
            aside in line and (path.name in line or path.name == writing.MANIFEST_FILE) for line in said
        ):
            return [f"{what}: said {said}"]
    return []


def _is_same_manifest(path: Path, folder: Path) -> bool:
    """Whether a damaged manifest still says what one that is sound says, as one with another blank does."""
    if path.name != writing.MANIFEST_FILE:
        return False
    try:
        manifest = json.loads(path.read_text())
        files = {
            name: {
                "sha256": writing.sha256_now(path.parent / name),
                "size": (path.parent / name).stat().st_size,
            }
            for name in manifest["files"]
        }
        return bool(manifest["step"] == writing.step_of(path.parent) and files == manifest["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def _all_damaged(folder: Path, draw: Draw) -> list[str]:
    """Damage every checkpoint of a copy: an error, and nothing deleted, however often it is tried."""
    copy = folder.with_name("all-damaged")
    shutil.copytree(folder, copy)
    for path in list_steps(copy):
        _damage_one(path, "one bit", draw)
    total = sum(path.stat().st_size for path in copy.rglob("*"))
    failures = []
    for _ in range(2):
        try:
            with heard():
                failures.append(f"all damaged: took {newest_sound(copy)}")
        except WeightsError:
            pass
    if sum(path.stat().st_size for path in copy.rglob("*")) != total:
        failures.append("all damaged: something was deleted")
    shutil.rmtree(copy)
    return failures


def _damage_one(path: Path, way: str, draw: Draw) -> Path:
    """Damage a file of tensors or state for good; which."""
    file = draw.choice(sorted(one for one in path.iterdir() if one.name != writing.MANIFEST_FILE))
    content = WAYS[way](file.read_bytes(), draw)
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    return file


def _resumed(run: Path, copy: Path, way: str, draw: Draw, wanted: dict[str, str], log: Path) -> list[str]:
    """Resume a copy of a run whose newest checkpoint is damaged."""
    shutil.copytree(run, copy)
    log.unlink(missing_ok=True)
    newest = list_steps(copy / "checkpoints")[0]
    file = _damage_one(newest, way, draw)
    what = f"{file.name}, {way}, resumed"
    code = finish(shortest().begun(copy), log)
    text = log.read_text()
    try:
        if code != 0 or "Traceback" in text:
            return [f"{what}: exit code {code}: {last_words(log)}"]
        if f"checkpoint {newest.name} is damaged ({file.name}" not in text.replace("the SHA-256 of ", ""):
            return [f"{what}: not said: {last_words(log)}"]
        if not newest.with_name(f"{newest.name}.corrupt-1").is_dir():
            return [f"{what}: not set aside"]
        differing = differences(wanted, shortest().result(copy))
        return [f"{what}: {', '.join(differing)} differ"] * bool(differing)
    finally:
        shutil.rmtree(copy)


def _resumed_without_any(run: Path, copy: Path, draw: Draw, log: Path) -> list[str]:
    """Resume a copy of a run all of whose checkpoints are damaged."""
    shutil.copytree(run, copy)
    log.unlink(missing_ok=True)
    for path in list_steps(copy / "checkpoints"):
        _damage_one(path, "cut", draw)
    num_files = len(_names(copy / "checkpoints"))
    code = finish(shortest().begun(copy), log)
    failures = []
    if code != 4 or "no checkpoint is sound" not in log.read_text() or "Traceback" in log.read_text():
        failures.append(f"no sound checkpoint: exit code {code}: {last_words(log)}")
    if len(_names(copy / "checkpoints")) != num_files:
        failures.append("no sound checkpoint: something was deleted")
    shutil.rmtree(copy)
    return failures


OWN_FILES = ("run.json", "metrics.jsonl", "config.yaml", "lock", "log.txt")
READ_FILES = ("student.safetensors", "student.json", "run.json")


def damage_run_files(folder: Path, *, amount: int, seed: int) -> dict[str, Any]:
    """Damage the other files of a finished run `amount` times: resumed, it goes on or says why not; read as a model, it
    gives the very weights or says why not."""
    preload()
    draw, run = Draw(seed), folder / "run"
    shutil.copytree(finished(), run)
    counts: Counter[str] = Counter()
    failures = []
    weights = _weights(run)
    (run / "lock").write_text(json.dumps({"host": socket.gethostname(), "pid": 2**22 + 1}))  # nobody's
    for number in range(amount):
        way = list(WAYS)[number % len(WAYS)]
        name = draw.choice(OWN_FILES)
        with damaged(run / name, way, draw), heard():
            failures += _opened(run, f"{name}, {way}", counts)
        name = draw.choice(READ_FILES)
        with damaged(run / name, way, draw), heard():
            failures += _read(run, f"{name}, {way}", weights, counts)
    return {"tried": 2 * amount, **{name: counts[name] for name in sorted(counts)}, "failures": failures}


def _opened(run: Path, what: str, counts: Counter[str]) -> list[str]:
    """Open a run as --resume does."""
    from fdkit.training.run import Run

    config = run.with_name("config")
    if not config.exists():
        config.write_bytes((run / "config.yaml").read_bytes())
    kept = {name: (run / name).read_bytes() for name in OWN_FILES if (run / name).exists()}
    try:
        with Run.create(run, config.read_text(), resume=True) as opened:
            opened.forget_metrics_after(4)
            opened.check_data("0" * 64, name="digits") if not opened.facts.get("data") else None
        counts["resumed"] += 1
    except FdkitError as error:
        counts["refused"] += 1
        named = what.partition(",")[0]
        return [] if named in str(error) else [f"{what}: said {error}"]
    except Exception as error:
        return [f"{what}: {type(error).__name__}: {error}"]
    finally:
        for name, data in kept.items():
            (run / name).write_bytes(data)
    return []


def _weights(run: Path) -> dict[str, Any]:
    from fdkit.teachers.loading import load_teacher

    return dict(load_teacher(str(run)).backbone.network.state_dict())


def _read(run: Path, what: str, weights: dict[str, Any], counts: Counter[str]) -> list[str]:
    """Load a run as a model."""
    try:
        found = _weights(run)
    except FdkitError as error:
        counts["not taken for a model"] += 1
        return [] if error.exit_code in (2, 4) else [f"{what}: exit code {error.exit_code}: {error}"]
    except Exception as error:
        return [f"{what}: {type(error).__name__}: {error}"]
    counts["read"] += 1
    same = weights.keys() == found.keys() and all(weights[name].equal(found[name]) for name in weights)
    return [] if same else [f"{what}: other weights were taken without a word"]
