"""A process that dies, leaves or hangs: the others name it, and end with exit code 8."""

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from training_toys import CONFIG_YAML, Pictures, ToyMethod, exit_codes, settings, start_ranks

import fdkit.training.watch as module
from fdkit.errors import DataError, DistributedError
from fdkit.training.distributed import current_world, process_group
from fdkit.training.loop import train
from fdkit.training.meeting import meet
from fdkit.training.run import Run
from fdkit.training.watch import Watch

CPU = torch.device("cpu")
SECONDS = 3.0


def hasten() -> None:
    """Pulses and patience short enough for a test, and long enough for a busy machine."""
    module.PULSE_SECONDS = 0.15
    module.SILENT_SECONDS = 4.0
    module.EXIT_LEEWAY = 0.5


class Faulty(ToyMethod):
    """A toy in which the process of rank 1 does something else at step 6."""

    fault = "none"

    def forward(self, views: list[Tensor], progress: float) -> dict[str, Tensor]:
        if current_world().rank == 1 and self.step(progress) == 6:
            time.sleep(1.0)  # several pulses, so that the others know where it is
            if self.fault == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.fault == "stops":
                os.kill(os.getpid(), signal.SIGSTOP)
            if self.fault == "hangs":
                time.sleep(3600)
            if self.fault == "leaves":
                raise DataError("the images\nare gone")
        if current_world().is_main and self.fault == "rank 0 leaves" and self.step(progress) == 6:
            time.sleep(1.0)
            raise DataError("the images\nare gone")
        return super().forward(views, progress)


class Stuck(Pictures):
    """Images that do not come on rank 1 after the 20th."""

    reads = 0

    def read(self, index: int) -> Image.Image:
        self.reads += 1
        if current_world().rank == 1 and self.reads == 20:
            time.sleep(3600)
        return super().read(index)


def faulty(folder: Path, fault: str) -> None:
    hasten()
    method = Faulty()
    method.fault = fault
    source: Any = Stuck() if fault == "reads" else Pictures()
    with process_group(CPU, SECONDS), Run.create(folder, CONFIG_YAML) as run:
        batch = 4 * current_world().size
        train(method, source, run, **settings(train_batch_size=batch, train_timeout_seconds=SECONDS))


def ended(folder: Path) -> str:
    """Why the run ended, as run.json says, which also says that the exit code is 8."""
    facts = json.loads((folder / "run.json").read_text())
    assert (facts["state"], facts["exit_code"]) == ("failed", 8)
    return str(facts["reason"])


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("fault", "reason", "codes"),
    [
        ("dies", "rank 1 died, last seen computing at step 6", [8, -9]),
        ("leaves", "rank 1 ended while computing at step 6: the images", [8, 3]),
        ("hangs", "rank 1 hangs: computing at step 6 for ", [8, 8]),
        ("reads", "rank 1 hangs: reading images at step 4 for ", [8, 8]),
    ],
)
def test_the_one_that_is_missed_is_named(fault: str, reason: str, codes: list[int], tmp_path: Path) -> None:
    begin = time.monotonic()
    assert exit_codes(start_ranks(2, faulty, tmp_path / "run", fault)) == codes
    assert time.monotonic() - begin < 45
    assert f"rank 0 of 2 lost the others: {reason}" in ended(tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-00000004"]


@pytest.mark.slow
@pytest.mark.distributed
def test_others_learn_why_rank_0_left_though_it_kept_the_store(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    begin = time.monotonic()
    assert exit_codes(start_ranks(2, faulty, tmp_path / "run", "rank 0 leaves")) == [3, 8]
    assert time.monotonic() - begin < 20, "nobody waits for a time-out"
    [report] = (tmp_path / "run" / "errors").glob("*rank-1-traceback.txt")
    assert "lost the others: rank 0 ended while computing at step 6: the images" in report.read_text()


@pytest.mark.slow
@pytest.mark.distributed
def test_all_that_are_left_name_the_one_that_died_not_each_other(tmp_path: Path) -> None:
    assert exit_codes(start_ranks(3, faulty, tmp_path / "run", "dies")) == [8, -9, 8]
    assert "rank 0 of 3 lost the others: rank 1 died, last seen computing at step 6" in ended(
        tmp_path / "run"
    )
    [report] = (tmp_path / "run" / "errors").glob("*rank-2-traceback.txt")
    assert "rank 2 of 3 lost the others: rank 1 died, last seen computing at step 6" in report.read_text()


def without_collectives(folder: Path) -> None:
    """A rank that waits for ever, as in a kernel of NCCL, for one that was stopped."""
    hasten()
    with process_group(CPU, 600) as world, Run.create(folder, CONFIG_YAML):
        if world.rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        threading.Event().wait()


@pytest.mark.slow
@pytest.mark.distributed
def test_a_process_that_waits_for_ever_is_ended_by_its_watch(tmp_path: Path) -> None:
    processes = start_ranks(2, without_collectives, tmp_path / "run")
    processes[0].join(40)
    os.kill(processes[1].pid, signal.SIGKILL)
    assert exit_codes(processes) == [8, -9]
    assert "rank 0 of 2 lost the others: rank 1 died, last seen starting" in ended(tmp_path / "run")


def test_a_process_that_never_came_is_named() -> None:
    store: Any = dist.HashStore()  # type: ignore[attr-defined]
    store.set("fdkit/token/2", "of an earlier attempt")
    with pytest.raises(DistributedError, match=r"rank 0 of 3 waited 0.3 s at .* for rank 1, rank 2"):
        meet(store, 0, 3, 0.3)
    with pytest.raises(DistributedError, match=r"rank 1 of 3 waited 0.3 s at .* for rank 0"):
        meet(store, 1, 3, 0.3)


def test_what_an_earlier_attempt_left_is_not_taken_for_this_one() -> None:
    store: Any = dist.HashStore()  # type: ignore[attr-defined]
    names = set()
    for _ in range(3):
        found: list[str] = ["", "", ""]

        def come(rank: int, found: list[str] = found) -> None:
            time.sleep(0.1 * (2 - rank))
            found[rank] = meet(store, rank, 3, 20)

        threads = [threading.Thread(target=come, args=(rank,)) for rank in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(found)) == 1, "all meet under one name"
        names.add(found[0])
    assert len(names) == 3, "which no earlier meeting had"


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(module, "time", fake)
    return fake


def watches(size: int) -> list[Watch]:
    store: Any = dist.HashStore()  # type: ignore[attr-defined]
    return [Watch(store, "test", rank, size, timeout_seconds=60) for rank in range(size)]


def pass_time(clock: Clock, seconds: float, living: list[Watch]) -> None:
    for _ in range(round(seconds)):
        clock.sleep(1)
        for watch in living:
            watch._write()
        for watch in living:
            watch._read()


def test_who_waits_is_not_blamed(clock: Clock) -> None:
    all_three = watches(3)
    for watch in all_three:
        watch.mark(1, "computing")
    pass_time(clock, 2, all_three)
    for watch in (all_three[0], all_three[2]):
        watch.mark(2, "computing")
    all_three[1].mark(2, "reading images")
    pass_time(clock, 59, all_three)
    assert [watch._verdict() for watch in all_three] == [""] * 3
    pass_time(clock, 4, all_three)
    assert {watch._verdict() for watch in all_three} == {"rank 1 hangs: reading images at step 2 for 62 s"}
    all_three[0].mark(2, "measuring")
    pass_time(clock, 2, all_three)
    assert [watch._verdict() for watch in all_three] == [""] * 3, "one got on"


def test_a_first_step_may_take_any_time_in_all_processes_at_once(clock: Clock) -> None:
    both = watches(2)
    for step in (7, 8):
        for watch in both:
            watch.mark(step, "computing")
        pass_time(clock, 70, both)
        found = {watch._verdict() for watch in both}
        assert found == {
            "" if step == 7 else "no process gets on: all are computing at step 8 for more than 60 s"
        }


def test_causes_are_told_from_consequences(clock: Clock) -> None:
    both = watches(3)
    for watch in both:
        watch.mark(3, "computing")
    pass_time(clock, 2, both)
    both[1].leave("CUDA out of memory")
    both[2].leave("rank 2 of 3 lost the others: rank 1 ended")
    both[1]._write()
    both[0]._read()
    assert both[0].explain() == "rank 1 ended while computing at step 3: CUDA out of memory"
    pass_time(clock, 31, both[:1])
    assert both[0]._verdict() == both[0].explain(), "and so does the watch, where the main thread only waits"


def test_a_store_that_is_gone_is_said(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = watches(2)[0]
    pass_time(clock, 2, [watch])
    assert watch._verdict() == ""
    clock.sleep(31)
    assert "the store of the processes does not answer" in watch._verdict()


def test_one_that_is_done_is_not_missed(clock: Clock) -> None:
    both = watches(2)
    pass_time(clock, 2, both)
    both[1].leave("")
    pass_time(clock, 40, both[:1])
    assert both[0]._verdict() == ""


def test_one_that_is_done_hides_none_that_hangs(clock: Clock) -> None:
    three = watches(3)
    for watch in three:
        watch.mark(3, "computing")
    pass_time(clock, 2, three)
    three[1].leave("")
    three[0].mark(4, "computing")
    three[2].mark(4, "reading images")
    pass_time(clock, 63, [three[0], three[2]])
    assert three[0]._verdict() == "rank 2 hangs: reading images at step 4 for 62 s"
