"""Several processes that train together: one is killed or stopped, or has something else than the others.

Processes of torchrun are real ones. Where only the start is looked at, ranks are forked children that meet at a port of
this machine, each in a working folder of its own, as hosts have their own disks.
"""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from faults.jobs import STUDENT
from faults.kills import end_group, last_words, left_by_training, preload, start, wait
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
    port: int | None = None,
) -> End:
    """Run one command line a rank, each in its folder, and say how they ended. port: where they meet, a free one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = port or probe.getsockname()[1]
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


FAULTS = (
    ("SIGKILL", 1, 2), ("SIGKILL", 0, 0), ("SIGSTOP", 1, 0), ("SIGKILL", 0, 2),
    ("SIGKILL", 1, 0), ("SIGSTOP", 0, 2), ("SIGKILL", 0, 2), ("SIGKILL", 1, 2),
)  # fmt: skip
"""What happens to which rank, and how often torchrun may start the processes again."""
STEPS = 60


def torchrun(
    folder: Path, *further: str, restarts: int = 0, port: int | None = None
) -> subprocess.Popen[str]:
    """A distillation of 60 steps by two ranks under torchrun, in a folder that has photos/; output goes to `said`."""
    meeting = ["--standalone"] if port is None else ["--master-addr=127.0.0.1", f"--master-port={port}"]
    command = [sys.executable, "-m", "torch.distributed.run", *meeting, "--nproc-per-node=2"]
    command += [
        f"--max-restarts={restarts}",
        "-m",
        "fdkit",
        "distill",
        "--teacher",
        "demo",
        "--data",
        "photos",
    ]
    command += [*STUDENT, *QUICK, "--train.epochs", "20", "--train.log-every-steps", "1", "--output", "run"]
    root = Path(__file__).parents[2]
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(root)}
    with (folder / "said").open("a") as said:
        return subprocess.Popen(
            [*command, *further],
            cwd=folder,
            env=os.environ | environment,
            stdout=said,
            stderr=said,
            text=True,
            start_new_session=True,
        )


def ranks_of(agent: int) -> dict[int, int]:
    """Process ids of what torchrun started, by rank."""
    found = {}
    try:
        children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
        for child in children:
            words = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            ranks = [int(word[5:]) for word in words if word.startswith(b"RANK=")]
            found |= dict.fromkeys(ranks, int(child))
    except (OSError, ValueError):  # one that has just ended
        return {}
    return found


def _steps_logged(folder: Path) -> int:
    path = folder / "run" / "metrics.jsonl"
    return path.read_text().count('"loss"') if path.exists() else 0


def _end_all(agent: subprocess.Popen[str]) -> None:
    for child in ranks_of(agent.pid).values():
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    if agent.poll() is None:
        os.killpg(agent.pid, signal.SIGKILL)
    agent.wait()


def _strike(
    agent: subprocess.Popen[str], folder: Path, kind: str, rank: int, after: int, jitter: float
) -> bool:
    """Send the signal once that many steps are logged; False if the run was over before."""
    while agent.poll() is None:
        ranks = ranks_of(agent.pid)
        if len(ranks) == 2 and _steps_logged(folder) >= after:
            time.sleep(jitter)
            with suppress(ProcessLookupError):
                os.kill(ranks[rank], getattr(signal, kind))
                return True
        time.sleep(0.02)
    return False


def _until_named(agent: subprocess.Popen[str], folder: Path, rank: int) -> float | None:
    """Seconds until the rank that is lost is named; None if torchrun ended, or two minutes went by, without that."""
    begun = time.monotonic()
    words = (f"rank {rank} died", f"rank {rank} hangs", f"rank      : {rank} (", f"local_rank: {rank} (")
    while time.monotonic() - begun < 120:
        has_ended = agent.poll() is not None
        text = (folder / "said").read_text(errors="replace")
        if any(word in text for word in words):
            return time.monotonic() - begun
        if has_ended:
            return None
        time.sleep(0.1)
    return None


class Loss(NamedTuple):
    """What came of one rank that was killed or stopped."""

    struck: bool
    seconds: float | None
    wrong: list[str]


def lose_one(folder: Path, kind: str, rank: int, restarts: int, draw: random.Random) -> Loss:
    """Kill or stop a rank at a random step, have the run end or go on by itself, and bring it to its end."""
    photos(folder / "photos")
    label = f"{kind} to rank {rank}, {restarts} restarts"
    agent = torchrun(folder, restarts=restarts)
    try:
        struck = _strike(agent, folder, kind, rank, draw.randint(0, STEPS * 2 // 3), draw.uniform(0, 0.3))
        seconds = _until_named(agent, folder, rank) if struck else 0.0
        code = agent.wait(180)
    except subprocess.TimeoutExpired:
        return Loss(True, None, [f"{label}: still running after 180 s"])
    finally:
        _end_all(agent)
    wrong = []
    if struck and seconds is None:
        wrong.append(f"{label}: the rank is not named: {last_words(folder / 'said')}")
    if seconds is not None and seconds > NAMED_WITHIN:
        wrong.append(f"{label}: named after {seconds:.0f} s")
    if restarts and code != 0:
        wrong.append(f"{label}: torchrun ended with {code}: {last_words(folder / 'said')}")
    if struck and not restarts and code == 0:
        wrong.append(f"{label}: torchrun ended well though a rank was lost")
    if code != 0:
        wrong += _continued(folder, label)
    return Loss(struck, seconds, wrong)


def _continued(folder: Path, label: str) -> list[str]:
    again = torchrun(folder, "--resume")
    try:
        code = again.wait(120)
    except subprocess.TimeoutExpired:
        return [f"{label}: --resume still runs after 120 s"]
    finally:
        _end_all(again)
    return [f"{label}: --resume ended with {code}: {last_words(folder / 'said')}"] if code else []


def lose_processes(folder: Path, *, amount: int, seed: int) -> dict[str, Any]:
    """Kill or stop one of two ranks under torchrun `amount` times: it is named within a minute, and what the run leaves
    in the end, after torchrun's own restart or --resume, equals what an undisturbed one leaves, to the bit."""
    draw = random.Random(seed)
    straight = folder / "straight"
    photos(straight / "photos")
    whole = torchrun(straight)
    try:
        if code := whole.wait(180):
            return {
                "tried": 0,
                "failures": [f"undisturbed: exit code {code}: {last_words(straight / 'said')}"],
            }
    finally:
        _end_all(whole)
    wanted = left_by_training(straight / "run")
    failures: list[str] = []
    seconds: dict[str, list[float]] = {"SIGKILL": [], "SIGSTOP": []}
    same = 0
    for number in range(amount):
        kind, rank, restarts = FAULTS[number % len(FAULTS)]
        place = folder / str(number)
        loss = lose_one(place, kind, rank, restarts, draw)
        failures += loss.wrong
        if loss.struck and loss.seconds is not None:
            seconds[kind].append(loss.seconds)
        if not loss.wrong:
            found = left_by_training(place / "run")
            differing = sorted(
                name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)
            )
            same += not differing
            failures += [f"{kind} to rank {rank}: not the same bits: {', '.join(differing)}"] * bool(
                differing
            )
            shutil.rmtree(place)
    return {
        "tried": sum(len(values) for values in seconds.values()),
        "failures": failures,
        "bit_exact": same,
        "longest_until_named_seconds": {
            kind: round(max(values), 1) for kind, values in seconds.items() if values
        },
    }
