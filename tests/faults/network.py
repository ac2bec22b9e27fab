"""Commands in a network of their own that leads nowhere: what libraries in C say to anyone would fail, or take time."""

import ctypes
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults.kills import end_group, last_words, preload, start, wait

SMALL = ["--train.batch-size", "32", "--train.epochs", "0.05", "--device", "cpu", "--loader.workers", "0"]
VIT = '{"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}'
NEW_NETWORK = 0x40000000
"""CLONE_NEWNET: a network with no interface that is up, not even the one to this machine itself."""

COMMANDS: dict[str, Callable[[Path], list[str]]] = {
    "distill": lambda out: ["distill", "--teacher", "demo", "--data", "digits", "--student.depth", "1", *SMALL,
                            "--output", str(out)],
    "pretrain": lambda out: ["pretrain", "mae", "--data", "digits", "--network.architecture", "vit_tiny_patch16_224",
                             "--network.model-args", VIT, "--views.image-size", "32", *SMALL, "--output", str(out)],
    "finetune": lambda out: ["finetune", "demo", "--data", "digits", *SMALL, "--output", str(out)],
    "evaluate": lambda out: ["evaluate", "knn", "demo", "--data", "digits", "--cache", "none", "--device", "cpu"],
    "analyze": lambda out: ["analyze", "cka", "demo", "--data", "demo", "--num-images", "16", "--output", str(out)],
    "report": lambda out: ["report", "demo", "--data", "demo", "--analyses", "cka", "--output", str(out)],
    "doctor": lambda out: ["doctor", "demo"],
    "teachers": lambda out: ["teachers", "--family", "dino"],
    "plan": lambda out: ["plan", "distill", "--teacher", "clip_vitb"],
    "random weights": lambda out: ["evaluate", "knn", "dino_vits", "--no-pretrained", "--data", "digits",
                                   "--cache", "none", "--image-size", "32", "--device", "cpu"],
}  # fmt: skip
IMPORTED = ("torch", "torchvision", "timm", "open_clip", "huggingface_hub", "sklearn", "scipy", "matplotlib.pyplot",
            "pydantic", "tyro", "rich", "jinja2", "fdkit", "fdkit.commands.distill", "fdkit.evaluation.zero_shot",
            "fdkit.teachers.hub", "fdkit.teachers.loading")  # fmt: skip
"""What a command may import."""
LISTENER = """
import sys
def hook(event, values):
    if event in {"socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.sendmsg"} or (
        event == "socket.connect" and not isinstance(values[1], (str, bytes))
    ):
        print("said", event, values[1:], flush=True)
sys.addaudithook(hook)
for name in sys.argv[1:]:
    __import__(name)
"""


def leave_the_network() -> None:
    """Put this process into a network of its own. Raises PermissionError where that is not allowed."""
    if ctypes.CDLL(None, use_errno=True).unshare(NEW_NETWORK):
        raise PermissionError(ctypes.get_errno(), "a network of one's own is not allowed here")


def may_leave_the_network() -> bool:
    """Whether a process may do so here."""
    child = os.fork()
    if child == 0:
        try:
            leave_the_network()
        except (OSError, AttributeError):
            os._exit(1)
        os._exit(0)
    return wait(child, 10) == 0


def _as_users_have_it(*, alone: bool) -> None:
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = False
    if alone:
        leave_the_network()


def timed(name: str, folder: Path, *, alone: bool) -> tuple[float, str]:
    """Seconds a command takes, and what is wrong about its end; alone: in a network that leads nowhere."""
    preload()
    log = folder / f"log of {name}, {alone=}"
    begun = time.monotonic()
    arguments = COMMANDS[name](folder / f"{name}, {alone=}")
    child = start([arguments], log, prepare=lambda: _as_users_have_it(alone=alone))
    code = wait(child, 120)
    end_group(child)
    if code is None:
        wait(child, 10)
    return time.monotonic() - begun, "" if code == 0 else f"{name}: exit code {code}: {last_words(log)}"


def heard_at_import() -> list[str]:
    """What the libraries say to anyone when they are imported, in a new process."""
    words = [sys.executable, "-c", LISTENER, *IMPORTED]
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    done = subprocess.run(words, capture_output=True, text=True, timeout=180, env=environment, check=False)
    said = [line for line in done.stdout.splitlines() if line.startswith("said")]
    return said + [f"importing failed: {done.stderr[-300:]}"] * bool(done.returncode)


def speak_to_no_one(folder: Path, *, amount: int, seed: int) -> dict[str, Any]:
    """Run `amount` commands in a network that leads nowhere: they work, and take about as long as with one."""
    names = random.Random(seed).sample(list(COMMANDS), len(COMMANDS))
    failures = heard_at_import()
    seconds: dict[str, list[float]] = {}
    for number in range(amount):
        place = folder / str(number)
        place.mkdir()
        name = names[number % len(names)]
        with_network, wrong = timed(name, place, alone=False)
        without, wrong_alone = timed(name, place, alone=True)
        failures += [sentence for sentence in (wrong, wrong_alone) if sentence]
        if without > 3 * with_network + 10:
            failures.append(f"{name}: {without:.0f} s without a network, {with_network:.0f} s with one")
        seconds[name] = [round(with_network, 1), round(without, 1)]
    return {"tried": amount, "failures": failures, "seconds_with_and_without": seconds}
