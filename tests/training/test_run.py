import json
import logging
import os
import signal
import time
from pathlib import Path

import pytest
from training_toys import CONFIG_YAML, start

from fdkit.errors import ConfigError, DataError, OutputError, PreemptedError
from fdkit.training.distributed import current_world, local_device
from fdkit.training.run import Run
from fdkit.training.stop import StopRequest


def facts(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "run.json").read_text())
    return found


def test_a_new_run_records_where_it_comes_from(tmp_path: Path) -> None:
    with Run.create(tmp_path / "a" / "b", CONFIG_YAML, command=["fdkit", "distill"]) as run:
        assert facts(run.folder)["state"] == "planned"
        run.update(state="running", teacher={"name": "demo"})
        logging.getLogger("fdkit").info("hello")
    found = facts(run.folder)
    assert found["state"] == "done"
    assert found["exit_code"] == 0
    assert found["command"] == ["fdkit", "distill"]
    assert found["teacher"] == {"name": "demo"}
    assert {"torch", "python"} <= found["versions"].keys()  # type: ignore[attr-defined]
    assert (run.folder / "config.yaml").read_text() == CONFIG_YAML
    assert "INFO hello" in (run.folder / "log.txt").read_text()


@pytest.mark.parametrize(
    ("error", "state", "code"),
    [
        (DataError("no images"), "failed", 3),
        (PreemptedError("stopped"), "preempted", 75),
        (KeyboardInterrupt(), "failed", 130),
        (ZeroDivisionError("a bug"), "failed", 1),
    ],
)
def test_how_a_run_ends_is_recorded(error: BaseException, state: str, code: int, tmp_path: Path) -> None:
    with pytest.raises(type(error)), Run.create(tmp_path / "run", CONFIG_YAML):
        raise error
    found = facts(tmp_path / "run")
    assert (found["state"], found["exit_code"]) == (state, code)
    assert bool(list((tmp_path / "run").glob("errors/*traceback.txt"))) == (state == "failed")


def test_a_folder_with_a_run_is_refused_unless_asked_for(tmp_path: Path) -> None:
    with Run.create(tmp_path / "run", CONFIG_YAML):
        pass
    with pytest.raises(OutputError, match=r"already holds a run\n.*--resume.*--overwrite"):
        Run.create(tmp_path / "run", CONFIG_YAML)
    with Run.create(tmp_path / "run", CONFIG_YAML, resume=True) as run:
        assert run.resumed
        assert facts(run.folder)["resumes"] == 1


def test_overwriting_moves_the_old_run_aside(tmp_path: Path) -> None:
    for number in range(3):
        with Run.create(tmp_path / "run", f"data: {number}\n", overwrite=True) as run:
            assert not run.resumed
    kept = {path.name: (path / "config.yaml").read_text() for path in tmp_path.iterdir()}
    assert kept == {"run": "data: 2\n", "run.old-1": "data: 0\n", "run.old-2": "data: 1\n"}


@pytest.mark.parametrize("how", [{}, {"resume": True}, {"overwrite": True}])
def test_a_folder_of_something_else_is_never_touched(how: dict[str, bool], tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="not empty and not a run folder"):
        Run.create(tmp_path, CONFIG_YAML, **how)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_resuming_nothing_starts(tmp_path: Path) -> None:
    with Run.create(tmp_path / "run", CONFIG_YAML, resume=True) as run:
        assert not run.resumed


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written: Not a directory"):
        Run.create(tmp_path / "file" / "run", CONFIG_YAML)


def test_resume_and_overwrite_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="exclude each other"):
        Run.create(tmp_path, CONFIG_YAML, resume=True, overwrite=True)


def test_a_resumed_run_may_change_only_what_does_no_harm(tmp_path: Path) -> None:
    before = "data: a\noptim: {lr: 0.1, name: adamw}\ntrain: {epochs: 2, log_every_steps: 5}\nloader: {workers: 1}\n"
    with Run.create(tmp_path / "run", before):
        pass
    harmless = before.replace("log_every_steps: 5", "log_every_steps: 9").replace("workers: 1", "workers: 4")
    with Run.create(tmp_path / "run", harmless, resume=True):
        pass
    changed = before.replace("0.1", "0.2").replace("epochs: 2", "epochs: 3")
    with pytest.raises(ConfigError, match=r"optim.lr: was 0.1, now 0.2\n  train.epochs: was 2, now 3"):
        Run.create(tmp_path / "run", changed, resume=True)
    with Run.create(tmp_path / "run", before, resume=True):  # the refusal let go of the lock
        pass


def test_a_resumed_run_keeps_its_images(tmp_path: Path) -> None:
    with Run.create(tmp_path / "run", CONFIG_YAML) as run:
        run.check_data("a" * 64, name="photos")
    with Run.create(tmp_path / "run", CONFIG_YAML, resume=True) as run:
        run.check_data("a" * 64, name="photos")
        with pytest.raises(ConfigError, match="not those the run began with"):
            run.check_data("b" * 64, name="photos")


def hold(folder: Path) -> None:
    with Run.create(folder, CONFIG_YAML):
        (folder / "held").write_text("")
        time.sleep(60)


@pytest.mark.slow
def test_a_live_holder_is_refused_and_a_dead_one_taken_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fdkit")
    holder = start(hold, tmp_path / "run")
    while not (tmp_path / "run" / "held").exists():
        time.sleep(0.01)
    for how in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(OutputError, match=f"in use by pid {holder.pid} on "):
            Run.create(tmp_path / "run", CONFIG_YAML, **how)
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    with Run.create(tmp_path / "run", CONFIG_YAML, resume=True):
        assert f"taking over the lock of pid {holder.pid}" in caplog.text
        with pytest.raises(OutputError, match="in use by this process"):
            Run.create(tmp_path / "run", CONFIG_YAML, resume=True)


def test_a_lock_from_another_host_counts_while_its_run_is_fresh(tmp_path: Path) -> None:
    with Run.create(tmp_path / "run", CONFIG_YAML):
        pass
    (tmp_path / "run" / "lock").write_text(json.dumps({"host": "elsewhere", "pid": 4}))
    with pytest.raises(OutputError, match="in use by pid 4 on elsewhere, which wrote"):
        Run.create(tmp_path / "run", CONFIG_YAML, resume=True)
    long_ago = time.time() - 3600
    os.utime(tmp_path / "run" / "run.json", (long_ago, long_ago))
    with Run.create(tmp_path / "run", CONFIG_YAML, resume=True):
        pass


def test_metrics_of_steps_to_do_again_are_dropped_and_a_torn_line_too(tmp_path: Path) -> None:
    with Run.create(tmp_path / "run", CONFIG_YAML) as run:
        for step in (5, 10, 15):
            run.log_metrics({"step": step, "loss": 1 / 3, "odd": float("nan")})
        with (run.folder / "metrics.jsonl").open("a") as file:
            file.write('{"step": 20, "lo')
        run.forget_metrics_after(10)
        assert run.metrics() == [{"step": step, "loss": 1 / 3, "odd": None} for step in (5, 10)]


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert not current_world().is_main
    with Run.create(tmp_path / "run", CONFIG_YAML) as run:
        run.update(a=1)
        run.log_metrics({"step": 1})
        run.save_error("x", "y")
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    with pytest.raises(ZeroDivisionError), Run.create(tmp_path / "run", CONFIG_YAML):
        raise ZeroDivisionError("only here")
    [report] = (tmp_path / "run").rglob("*.txt")
    assert report.name.endswith("-rank-1-traceback.txt")
    assert "only here" in report.read_text()


def test_devices_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert local_device("cpu").type == "cpu"
    with pytest.raises(ConfigError, match="--device gpu: not a device"):
        local_device("gpu")
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(ConfigError, match="must be whole numbers"):
        current_world()


def test_signals_ask_only_inside_the_block() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    stop = StopRequest()
    with stop.catch():
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.signal_name == "SIGUSR1"
    assert signal.getsignal(signal.SIGUSR1) is before


def ask_twice() -> None:
    with StopRequest().catch():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)


def test_a_second_signal_ends_the_process_at_once() -> None:
    process = start(ask_twice)
    process.join(20)
    assert process.exitcode == 128 + signal.SIGTERM
