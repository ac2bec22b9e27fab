"""Two hosts, imitated by network namespaces: one comes late and is lost for good, and the run goes on."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_elastic import TOY, finish

from fdkit.teachers.run_checkpoint import step_of
from fdkit.training.checkpoint import list_steps

NAMES = ("fdkit-a", "fdkit-b")
ADDRESSES = ("10.231.7.1", "10.231.7.2")
SHARED = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""Without it a host that comes later waits in vain for the address of rank 0 (torch 2.14)."""


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def remove() -> None:
    for name in NAMES:
        subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[None]:
    """Two network namespaces that a cable joins; the test is skipped where they may not be made."""
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("unshare") is None:
        pytest.skip("needs root, ip and unshare for network namespaces")
    remove()
    try:
        for name in NAMES:
            ip("netns", "add", name)
        ip("link", "add", "fdkit0", "netns", NAMES[0], "type", "veth", "peer", "fdkit0", "netns", NAMES[1])
        for name, address in zip(NAMES, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "fdkit0")
            ip("-n", name, "link", "set", "fdkit0", "up")
            ip("-n", name, "link", "set", "lo", "up")
    except subprocess.CalledProcessError as error:
        remove()
        pytest.skip(f"network namespaces are not allowed here: {error.stderr.strip()}")
    yield
    remove()


def on_host(number: int, folder: Path) -> subprocess.Popen[str]:
    """torchrun on one of the hosts, with a host name of its own; the first one keeps the rendezvous."""
    options = [
        "--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-backend=c10d", "--rdzv-id=hosts",
        f"--rdzv-endpoint={ADDRESSES[0]}:29411", f"--local-addr={ADDRESSES[number]}",
        "--rdzv-conf=last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=3",
    ]  # fmt: skip
    known = folder.with_name("hosts")
    known.write_text(
        "127.0.0.1 localhost\n" + "".join(f"{at} {name}\n" for at, name in zip(ADDRESSES, NAMES, strict=True))
    )
    run = f"exec {sys.executable} -m torch.distributed.run {' '.join(options)} {TOY}"
    run = f"hostname {NAMES[number]} && mount --bind {known} /etc/hosts && {run}"
    return subprocess.Popen(
        ["ip", "netns", "exec", NAMES[number], "unshare", "-u", "-m", "sh", "-c", f"{run} {folder} new"],
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "fdkit0", "PAUSE_SECONDS": "1", **SHARED},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for(what: Callable[[], bool], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.1)


def steps_saved(folder: Path) -> set[int]:
    return {step_of(path) for path in list_steps(folder / "checkpoints")}


@pytest.mark.slow
@pytest.mark.distributed
def test_a_host_joins_and_is_lost_again(hosts: None, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    running = [on_host(0, folder)]
    try:
        wait_for(lambda: bool(steps_saved(folder)))
        running.append(on_host(1, folder))
        wait_for(lambda: "saved by 1 processes, resumed by 2" in (folder / "log.txt").read_text())
        before = steps_saved(folder)
        wait_for(lambda: bool(steps_saved(folder) - before))
        assert len(json.loads((folder / "run.json").read_text())["launchers"]) == 2, "a torchrun on each host"
        ip(
            "-n", NAMES[1], "link", "set", "fdkit0", "down"
        )  # as if the power were cut: no connection is closed
        os.killpg(running[1].pid, 9)
        code, output = finish(running[0], 150)
    finally:
        for process in running:
            if process.poll() is None:
                os.killpg(process.pid, 9)
    assert code == 0, output
    facts = json.loads((folder / "run.json").read_text())
    assert (facts["state"], facts["derived"]["world_size"]) == ("done", 1)
    assert "saved by 2 processes, resumed by 1" in (folder / "log.txt").read_text()
    assert "rank 0 of 2 lost the others: rank 1 died, last seen" in output
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [5, 10, 15, 20, 24], "each step once"
