"""Two hosts, imitated by network namespaces: one is lost for good, and the run goes on on the other."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_elastic import TOY, finish

NAMES = ("fdkit-a", "fdkit-b")
ADDRESSES = ("10.231.7.1", "10.231.7.2")


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
    known.write_text("".join(f"{at} {name}\n" for at, name in zip(ADDRESSES, NAMES, strict=True)))
    run = f"exec {sys.executable} -m torch.distributed.run {' '.join(options)} {TOY}"
    run = f"hostname {NAMES[number]} && mount --bind {known} /etc/hosts && {run}"
    return subprocess.Popen(
        ["ip", "netns", "exec", NAMES[number], "unshare", "-u", "-m", "sh", "-c", f"{run} {folder} new"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "fdkit0", "PAUSE_SECONDS": "0.5"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for_checkpoint(folder: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not list((folder / "checkpoints").glob("step-*")):
        assert time.monotonic() < deadline, "no checkpoint came"
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_lost_host_costs_the_steps_since_the_last_checkpoint(hosts: None, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    both = [on_host(number, folder) for number in (0, 1)]
    try:
        wait_for_checkpoint(folder, 90)
        first = json.loads((folder / "run.json").read_text())
        assert len(first["launchers"]) == 2, "each host has a torchrun of its own"
        ip(
            "-n", NAMES[1], "link", "set", "fdkit0", "down"
        )  # as if the power were cut: no connection is closed
        os.killpg(both[1].pid, 9)
        code, output = finish(both[0], 150)
    finally:
        for process in both:
            if process.poll() is None:
                os.killpg(process.pid, 9)
    assert code == 0, output
    facts = json.loads((folder / "run.json").read_text())
    assert (facts["state"], facts["derived"]["world_size"]) == ("done", 1)
    said = (folder / "log.txt").read_text()
    assert "saved by 2 processes, resumed by 1: the same images, not the same bits" in said
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [5, 10, 15, 20, 24], "each step once"
