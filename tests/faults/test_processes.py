"""Processes that train together, one of which is lost, or has something else than the others."""

import socket
import time
from itertools import count
from pathlib import Path

import pytest
import torch
from faults.jobs import STUDENT
from faults.kills import finish, left_by_training, start, wait
from faults.processes import DIFFERENCES, QUICK, lose_processes, photos, run_ranks, set_apart

pytestmark = pytest.mark.distributed


@pytest.mark.slow
def test_what_one_rank_has_otherwise_is_found_before_the_first_step(tmp_path: Path) -> None:
    found = set_apart(tmp_path, amount=len(DIFFERENCES), seed=0)
    assert found["failures"] == []
    assert found["tried"] == len(DIFFERENCES)
    assert found["longest_seconds"] < 60


@pytest.mark.long
def test_a_lost_rank_is_named_and_costs_no_bit(tmp_path: Path) -> None:
    found = lose_processes(tmp_path, amount=3, seed=0)
    assert found["failures"] == []
    assert found["bit_exact"] == 3


def distilling(folder: Path, *further: str) -> list[str]:
    return ["distill", "--teacher", "demo", "--data", str(folder / "photos"), *STUDENT, *QUICK, *further]


@pytest.mark.slow
def test_a_port_that_is_taken_ends_every_rank_with_a_word(tmp_path: Path) -> None:
    hosts = [tmp_path / "0", tmp_path / "1"]
    for host in hosts:
        photos(host / "photos")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        commands = [
            distilling(host, "--train.timeout-seconds", "3", "--output", str(tmp_path / "run"))
            for host in hosts
        ]
        end = run_ranks(commands, hosts, port=taken.getsockname()[1])
    assert end.codes == [8, 8]
    assert end.seconds < 60
    assert "in use" in end.said[0]
    assert "takes connections and does not answer" in end.said[1]
    assert "Traceback" not in "".join(end.said)


def jump_through_time() -> None:
    """Have the clock of this process jump by days, back and forth, each time it is looked at."""
    real, number = time.time, count()

    def jumping() -> float:
        return real() + 86400.0 * (37 if next(number) % 2 else -1400)

    time.time = jumping


@pytest.mark.slow
def test_a_clock_that_jumps_changes_nothing(tmp_path: Path) -> None:
    photos(tmp_path / "photos")
    log = tmp_path / "log"
    assert finish([distilling(tmp_path, "--output", str(tmp_path / "straight"))], log) == 0
    words = distilling(tmp_path, "--output", str(tmp_path / "run"), "--train.save-every-minutes", "1")
    assert wait(start([words, [*words, "--resume"]], log, prepare=jump_through_time), 60) == 0, (
        log.read_text()
    )
    assert left_by_training(tmp_path / "straight") == left_by_training(tmp_path / "run")


@pytest.mark.skipif(torch.cuda.is_available(), reason="has the device that is to be missing")
def test_a_device_that_is_not_there_is_said(tmp_path: Path) -> None:
    photos(tmp_path / "photos")
    log = tmp_path / "log"
    for device, code, words in (
        ("cuda", 6, "CUDA device 0 is not there; found 0"),
        ("tpu", 2, "not a device"),
    ):
        assert (
            finish([distilling(tmp_path, "--output", str(tmp_path / "run"), "--device", device)], log) == code
        )
        assert words in log.read_text()
    assert not (tmp_path / "run").exists()
