"""No command speaks to the network unless a download was asked for, and none tells anyone that it was used."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SPEAKING = {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.sendmsg"}
SMALL = ["--train.batch-size", "32", "--train.epochs", "0.05", "--device", "cpu", "--loader.workers", "0"]
VIT = '{"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}'


def listen(arguments: list[str], folder: Path) -> tuple[int, list[str]]:
    """Exit code of a command in a forked child, and what it tried to say to whom."""
    heard = folder / "heard.jsonl"
    child = os.fork()
    if child == 0:
        code = 1
        try:
            log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)

            def hook(event: str, values: tuple[Any, ...]) -> None:
                if event not in SPEAKING:
                    return
                if event == "socket.connect" and isinstance(values[1], (str, bytes)):
                    return  # a path is the address of a socket of this machine
                with heard.open("a") as file:
                    file.write(json.dumps(f"{event} {values[1:]!r}") + "\n")
                raise OSError("the network is blocked")

            sys.addaudithook(hook)
            from huggingface_hub import constants

            from fdkit.cli import main

            constants.HF_HUB_OFFLINE = False  # as users have it, unlike these tests
            main(arguments)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    said = [json.loads(line) for line in heard.read_text().splitlines()] if heard.exists() else []
    return os.waitstatus_to_exitcode(status), said


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


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_nothing_is_said_to_anyone(name: str, tmp_path: Path) -> None:
    code, said = listen(COMMANDS[name](tmp_path / "out"), tmp_path)
    assert said == []
    assert code == 0, (tmp_path / "log").read_text()[-2000:]


def test_a_download_that_is_asked_for_is_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The listening above can fail: a teacher whose weights are not here asks for them, and says so when it may not."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    code, said = listen(["doctor", "mocov3_vits"], tmp_path)
    assert said
    assert code == 4
    text = (tmp_path / "log").read_text()
    assert "Traceback" not in text


def test_only_what_loads_models_may_reach_the_network() -> None:
    root = Path(__file__).parents[2] / "fdkit"
    words = (
        "urllib.request",
        "import requests",
        "http.client",
        "socket.socket",
        "hf_hub_download",
        "snapshot_download",
    )
    found = {
        str(path.relative_to(root))
        for path in root.rglob("*.py")
        if any(word in path.read_text() for word in words)
    }
    assert found
    assert {name for name in found if not name.startswith("teachers/")} == set()
