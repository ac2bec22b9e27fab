"""No command speaks to the network unless a download was asked for, and none tells anyone that it was used."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from faults.network import COMMANDS, may_leave_the_network, speak_to_no_one, timed

SPEAKING = {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.sendmsg"}


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


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_nothing_is_said_to_anyone(name: str, tmp_path: Path) -> None:
    code, said = listen(COMMANDS[name](tmp_path / "out"), tmp_path)
    assert said == []
    assert code == 0, (tmp_path / "log").read_text()[-2000:]


@pytest.mark.slow
def test_commands_work_where_there_is_no_network_at_all(tmp_path: Path) -> None:
    """Libraries in C raise no audit events; where no address answers, not even this machine's own, they would fail."""
    if not may_leave_the_network():
        pytest.skip("needs the right to make a network namespace")
    for name in ("distill", "evaluate"):
        assert timed(name, tmp_path, alone=True)[1] == ""


@pytest.mark.long
def test_every_command_works_without_a_network_and_no_import_speaks(tmp_path: Path) -> None:
    if not may_leave_the_network():
        pytest.skip("needs the right to make a network namespace")
    assert speak_to_no_one(tmp_path, amount=len(COMMANDS), seed=0)["failures"] == []


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
