"""Full, read-only and vanishing disks, and output that nobody takes: in words, with what was saved intact."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from faults import disks, jobs, kills
from faults.disks import can_mount, fill_again_and_again, fill_disks, lose_disk
from faults.kills import finish, start, wait

from fdkit.errors import ResourceError
from fdkit.evaluation._store import FeatureStore
from fdkit.evaluation.features import Rows

needs_mounting = pytest.mark.skipif(not can_mount(), reason="no file system may be mounted here")


@pytest.fixture(scope="module", autouse=True)
def _preloaded() -> None:
    kills.preload()


@needs_mounting
@pytest.mark.slow
def test_a_disk_full_at_any_moment_is_said_and_the_run_goes_on_with_room(tmp_path: Path) -> None:
    tally = fill_again_and_again(jobs.shortest(), tmp_path, 2, random.Random(3))
    assert tally["failures"] == []
    assert tally["full"] == tally["went_on_in_the_same_bits"] == 2
    assert len(tally["stages"]) > 1


@needs_mounting
@pytest.mark.parametrize(
    "job",
    [jobs.pack("--workers", "0"), pytest.param(disks.analysis(), marks=pytest.mark.long)],
    ids=lambda job: job.name,
)
def test_a_full_disk_stops_other_commands_in_words(job: kills.Job, tmp_path: Path) -> None:
    tally = fill_again_and_again(job, tmp_path, 2, random.Random(1))
    assert tally["failures"] == []
    assert tally["full"] == 2


@needs_mounting
def test_features_that_find_no_room_are_refused_and_end_no_process(tmp_path: Path) -> None:
    """Room that another process took after it was looked at: a mapped file without it would end this one by SIGBUS."""

    def fill() -> None:
        def make(indices: np.ndarray) -> Iterator[Rows]:
            yield Rows(torch.from_numpy(indices), torch.ones(len(indices), 64))

        store = FeatureStore(tmp_path / "disk", {}, num_images=4000, width=64)
        plenty = shutil.disk_usage(tmp_path)
        shutil.disk_usage = lambda path: plenty  # type: ignore[assignment]
        try:
            store.fill(make)
        except ResourceError as error:
            os._exit(6 if "No space left" in error.message else 1)

    with disks.small_disk(tmp_path / "disk", "256k"):
        child = os.fork()
        if child == 0:
            try:
                fill()
            finally:
                os._exit(0)
        assert wait(child, 30) == 6


@needs_mounting
@pytest.mark.slow
def test_a_disk_lost_while_training_is_loud_and_never_saved(tmp_path: Path) -> None:
    log = tmp_path / "log"
    code, seconds, intact = lose_disk(jobs.shortest(), tmp_path, log, after="checkpoints/step-00000002")
    text = log.read_text()
    assert (code, intact) == (5, True), text
    assert "Traceback" not in text
    assert "cannot" in text
    assert "done; the student" not in text
    assert "state saved" not in text
    assert seconds < 30


@needs_mounting
@pytest.mark.parametrize("job", [jobs.shortest(), jobs.pack("--workers", "0")], ids=lambda job: job.name)
def test_a_folder_that_may_not_be_written_is_refused_at_the_start(job: kills.Job, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with disks.small_disk(tmp_path / "disk", "64k,ro") as disk:
        assert finish(job.commands(disk / "run"), log) == 5
    text = log.read_text()
    assert "cannot be written: Read-only file system" in text
    assert "Traceback" not in text


@pytest.mark.slow
def test_two_runs_on_one_folder(tmp_path: Path) -> None:
    job, log, folder = jobs.shortest(), tmp_path / "log", tmp_path / "run"
    first = start(job.commands(folder), tmp_path / "first")
    while not (folder / "run.json").exists():
        assert wait(first, 0.001) is None
    os.kill(first, signal.SIGSTOP)  # alive and silent
    for command in (job.commands(folder), job.begun(folder), [[*job.commands(folder)[0], "--overwrite"]]):
        log.unlink(missing_ok=True)
        assert finish(command, log) == 5
        text = log.read_text()
        assert "Traceback" not in text
        assert f"in use by pid {first} on" in text or "already holds a run" in text
    os.kill(first, signal.SIGKILL)
    assert wait(first, 10) == -signal.SIGKILL
    log.unlink()
    assert finish(job.begun(folder), log) == 0
    assert f"taking over the lock of pid {first}" in log.read_text()


def fdkit(words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A shell's command line, in which FDKIT stands for the command."""
    command = f"{sys.executable} -c 'from fdkit.cli import main; main()'"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(
        ["bash", "-c", words.replace("FDKIT", command)],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    ended = fdkit("FDKIT teachers | head -1; echo ${PIPESTATUS[0]}", tmp_path)
    assert ended.stdout.splitlines()[-1] == "0", ended.stderr
    assert ended.stderr == ""
    # and where it has left before anything is said
    ended = fdkit("(sleep 0.5; FDKIT teachers; echo $? >&2) | true", tmp_path)
    assert ended.stderr == "0\n"
    ended = fdkit("FDKIT teachers >/dev/full; echo $?", tmp_path)
    assert ended.stdout == "6\n"
    assert "no room left on the disk" in ended.stderr
    assert "Traceback" not in ended.stderr
    ended = fdkit("FDKIT teachers >&-; echo $?", tmp_path)
    assert (ended.stdout, ended.stderr) == ("0\n", "")
    ended = fdkit("FDKIT teachers nobody 2>&-; echo $?", tmp_path)
    assert ended.stdout.splitlines()[-1] == "2"


@pytest.mark.long
def test_training_goes_on_though_nobody_reads_what_it_says(tmp_path: Path) -> None:
    command = " ".join(f"'{word}'" for word in jobs.shortest().commands(tmp_path / "run")[0])
    for number, streams in enumerate(("2>&1 | head -1 >/dev/null", "2>&1 | true", ">&- 2>&-")):
        words = command.replace(str(tmp_path / "run"), str(tmp_path / f"run-{number}"))
        fdkit(f"FDKIT {words} {streams}", tmp_path)
        facts = json.loads((tmp_path / f"run-{number}" / "run.json").read_text())
        assert facts["state"] == "done", (streams, facts["reason"])


@needs_mounting
@pytest.mark.long
def test_every_command_on_disks_of_many_sizes(tmp_path: Path) -> None:
    result = fill_disks(tmp_path, amount=16, seed=1)
    assert result["failures"] == []
    assert result["full"] > 10


@needs_mounting
@pytest.mark.long
def test_workers_without_shared_memory(tmp_path: Path) -> None:
    """A full /dev/shm, through which loader workers hand over batches, ends a run in words."""
    log = tmp_path / "log"
    job = jobs.training("distill", jobs.distill("--loader.workers", "2"))

    def fill() -> None:
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.unshare(0x00020000) == 0  # a mount name space of its own
        assert disks.mount("--make-rprivate", "/")
        assert disks.mount("-t", "tmpfs", "-o", "size=64k", "tmpfs", "/dev/shm")

    code = finish(job.commands(tmp_path / "run"), log, prepare=fill)
    text = log.read_text()
    assert code in (0, 6), text
    assert code == 0 or "shm" in text or "shared memory" in text


@pytest.mark.long
@pytest.mark.parametrize("kilobytes", [4, 40])
def test_a_limit_on_files_is_said_as_a_full_disk_is(kilobytes: int, tmp_path: Path) -> None:
    """The same without a file system of one's own: files may not grow beyond a limit."""
    log, out = tmp_path / "log", tmp_path / "run"

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000 * kilobytes, 1000 * kilobytes))

    assert finish(jobs.shortest().commands(out), log, prepare=limit) == 6
    text = log.read_text()
    assert "File too large" in text or "os error 27" in text
    assert "Traceback" not in text
    assert finish(jobs.shortest().begun(out), log) == 0
    assert kills.differences(jobs.shortest().result(jobs.finished()), jobs.shortest().result(out)) == []
