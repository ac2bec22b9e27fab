"""Several processes that train together: one is killed or stopped, or has something else than the others.

Processes of torchrun are real ones. Where only the start is looked at, ranks are forked children that meet at a port of
this machine, each in a working folder of its own, as hosts have their own disks.
"""

import os
import random
import shutil
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from faults.jobs import STUDENT
from faults.kills import end_group, last_words, preload, start, wait
from PIL import Image

QUICK = [
    *("--train.batch-size", "8", "--train.epochs", "1", "--train.precision", "fp32", "--device", "cpu"),
    *("--loader.workers", "0", "--train.timeout-seconds", "20", "--train.save-every-steps", "2"),
]  # fmt: skip
NAMED_WITHIN = 60.0
"""Seconds within which a run whose processes differ, or one of which is lost, has ended and said why."""


class End(NamedTuple):
    """How the ranks of one start ended."""

    codes: list[int | None]
    """Exit code of each rank; None for one that did not end in time."""
    said: list[str]
    seconds: float


def start_rank(arguments: Sequence[str], folder: Path, log: Path, environment: Mapping[str, str]) -> int:
    """Process id of a child that runs the command line in a folder."""

    def prepare() -> None:
        os.environ.update(environment)
        os.chdir(folder)
        if code := environment.get("PRETENDED_CODE"):
            from fdkit.training import agreement

            pretended = agreement.software() | {"fdkit": code}
            agreement.software = lambda: pretended  # type: ignore[assignment]

    preload()
    log.unlink(missing_ok=True)
    return start([list(arguments)], log, prepare=prepare)


def run_ranks(
    commands: Sequence[Sequence[str]],
    folders: Sequence[Path],
    *,
    seconds: float = NAMED_WITHIN,
    environments: Sequence[Mapping[str, str]] | None = None,
) -> End:
    """Run one command line a rank, each in its folder, and say how they ended."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": str(len(commands)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    logs = [folder / "log" for folder in folders]
    begun = time.monotonic()
    children = []
    for rank, (arguments, folder, log) in enumerate(zip(commands, folders, logs, strict=True)):
        own = dict(environments[rank]) if environments else {}
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        children.append(start_rank(arguments, folder, log, common | place | own))
    codes = [wait(child, max(0.1, begun + seconds - time.monotonic())) for child in children]
    elapsed = time.monotonic() - begun
    for child in children:
        end_group(child)
    for child, code in zip(children, codes, strict=True):
        if code is None:
            wait(child, 10)
    return End(codes, [log.read_text(errors="replace") for log in logs], elapsed)


def photos(folder: Path, *, count: int = 24, seed: int = 0) -> Path:
    """A folder of that many small pictures."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(seed)
    for number in range(count):
        pixels = draw.integers(0, 256, (16, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03}.bmp")
    return folder


class Difference(NamedTuple):
    """Something that one of two hosts has otherwise, and what is to be said of it."""

    name: str
    change: Callable[[Path], Any]
    """Changes what lies in the folder of rank 1."""
    codes: set[int]
    """With which the ranks may end."""
    words: tuple[str, ...]
    arguments: tuple[str, ...] = ()
    """What is typed on rank 1 alone."""
    pretended_code: str = ""


def _fewer(host: Path) -> None:
    (host / "photos/023.bmp").unlink()


def _renamed(host: Path) -> None:
    (host / "photos/007.bmp").rename(host / "photos/007b.bmp")


def _other_size(host: Path) -> None:
    Image.new("RGB", (9, 9)).save(host / "photos/011.bmp")


def _swapped_classes(host: Path) -> None:
    """The same number of files, one of them in another folder: what stands where differs from there on."""
    (host / "photos/a").mkdir()
    shutil.move(host / "photos/002.bmp", host / "photos/a/002.bmp")


def _other_teacher(host: Path) -> None:
    import safetensors.torch

    path = host / "teacher/student.safetensors"
    state = safetensors.torch.load_file(path)
    name = next(key for key, value in state.items() if value.is_floating_point())
    safetensors.torch.save_file(state | {name: state[name] + 1e-3}, path)


DIFFERENCES = (
    Difference("fewer images", _fewer, {3}, ("23 images there, 24 on rank 0",)),
    Difference("a file of another name", _renamed, {3}, ("image 7 is", "007b.bmp", "on rank 0", "007.bmp")),
    Difference("a file of another size", _other_size, {3}, ("the same names with other sizes",)),
    Difference("another order", _swapped_classes, {3}, ("sees other images", "image")),
    Difference("another teacher", _other_teacher, {4}, ("the weights of teacher have SHA-256", "on rank 0")),
    Difference(
        "another rate", lambda host: None, {2}, ("configuration: optim.lr is 0.5",), ("--optim.lr", "0.5")
    ),
    Difference("other code", lambda host: None, {8}, ("runs fdkit elsewhere, and rank 0",), (), "elsewhere"),
)  # fmt: skip


def try_difference(difference: Difference | None, folder: Path) -> tuple[End, list[str]]:
    """Start two ranks, the second with that difference; how they ended, and what is wrong about it."""
    from fdkit.teachers.model import DEMO_FOLDER

    hosts = [folder / "host-0", folder / "host-1"]
    for host in hosts:
        photos(host / "photos")
        shutil.copytree(DEMO_FOLDER, host / "teacher")
    command = [
        "distill",
        "--teacher",
        "teacher",
        "--data",
        "photos",
        *STUDENT,
        *QUICK,
        "--output",
        str(folder / "run"),
    ]
    own = list(difference.arguments) if difference else []
    pretended = (
        {"PRETENDED_CODE": difference.pretended_code} if difference and difference.pretended_code else {}
    )
    if difference:
        difference.change(hosts[1])
    end = run_ranks([command, [*command, *own]], hosts, environments=[{}, pretended])
    wanted = difference.codes if difference else {0}
    name = difference.name if difference else "no difference"
    wrong = [f"{name}: rank {rank} ended with {code}: {last_words(hosts[rank] / 'log')}"
             for rank, code in enumerate(end.codes) if code not in wanted]  # fmt: skip
    missing = [words for words in (difference.words if difference else ()) if words not in end.said[0]]
    wrong += [f"{name}: rank 0 does not say {words!r}: {last_words(hosts[0] / 'log')}" for words in missing]
    if difference and "rank 1 of 2" not in end.said[0]:
        wrong.append(f"{name}: rank 1 is not named: {last_words(hosts[0] / 'log')}")
    return end, wrong


def set_apart(folder: Path, *, amount: int, seed: int) -> dict[str, Any]:
    """Start two ranks that differ in one thing, `amount` times: each is refused, naming the rank and the thing."""
    draw = random.Random(seed)
    order = draw.sample(DIFFERENCES, len(DIFFERENCES))
    failures: list[str] = []
    seconds: list[float] = []
    for number in range(amount):
        place = folder / str(number)
        place.mkdir()
        end, wrong = try_difference(order[number % len(order)], place)
        failures += wrong
        seconds.append(end.seconds)
        shutil.rmtree(place)
    return {"tried": amount, "failures": failures, "longest_seconds": round(max(seconds), 1)}
