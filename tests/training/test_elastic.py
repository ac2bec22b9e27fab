"""Processes that torchrun starts again, after one was killed."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import elastic_toy
import pytest
from training_toys import CONFIG_YAML, exit_codes, final_weights, same_bits, start_ranks, untimed_metrics

from fdkit.commands._command import default_output
from fdkit.errors import ConfigError, DistributedError
from fdkit.training.distributed import current_world, launchers
from fdkit.training.run import Run
from fdkit.training.stop import ECHO_SECONDS, StopRequest

TOY = Path(__file__).with_name("elastic_toy.py")


def torchrun(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", *arguments]
    return subprocess.Popen(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str], seconds: float = 120) -> tuple[int, str]:
    output = process.communicate(timeout=seconds)[0]
    return process.returncode, output


def run_toy(folder: Path, how: str, *options: str, **environment: str) -> tuple[int, str]:
    options = ("--standalone", "--nproc-per-node", "2", *options)
    return finish(torchrun(*options, str(TOY), str(folder), how, **environment))


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes that nothing disturbed."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    assert exit_codes(start_ranks(2, elastic_toy.main, folder, "new")) == [0, 0]
    return folder


@pytest.mark.slow
@pytest.mark.distributed
def test_a_killed_rank_costs_the_steps_since_the_last_checkpoint_and_no_bit(
    straight: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    with Run.create(folder, CONFIG_YAML) as run:
        run.log_metrics({"step": 1, "loss": 1.0})
    died = tmp_path / "died"
    code, output = run_toy(folder, "overwrite", "--max-restarts", "2", DIES_AT=f"0:10:{died}")
    assert code == 0, output
    assert died.exists()
    assert "resuming at step 8 of 24" in (folder / "log.txt").read_text()
    assert same_bits(final_weights(straight), final_weights(folder))
    assert untimed_metrics(straight) == untimed_metrics(folder)
    facts = json.loads((folder / "run.json").read_text())
    assert (facts["state"], facts["resumes"]) == ("done", 1)
    aside = [path.name for path in tmp_path.iterdir() if "old" in path.name]
    assert aside == ["run.old-1"], "an older run is moved once"


@pytest.mark.slow
@pytest.mark.distributed
def test_without_restarts_the_others_say_who_died(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    code, output = run_toy(folder, "new", DIES_AT=f"1:10:{tmp_path / 'died'}")
    assert code != 0
    facts = json.loads((folder / "run.json").read_text())
    assert facts["exit_code"] == 8, output
    assert "rank 0 of 2 lost the others: rank 1 died, last seen" in facts["reason"]


@pytest.mark.slow
@pytest.mark.distributed
def test_a_step_that_fails_twice_is_not_tried_a_third_time(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    code, output = run_toy(folder, "new", "--max-restarts", "4", DIES_AT="1:10:-")
    assert code != 0
    assert "step 10 failed twice" in output
    assert "rank 1 died" in output, "what it said stands there"
    assert (folder / "log.txt").read_text().count("resuming at step") == 1


def test_where_attempts_fail_is_counted_between_restarts_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    folder = tmp_path / "run"

    def fail_at(step: int, *, resume: bool = False) -> None:
        with suppress(ConfigError), Run.create(folder, CONFIG_YAML, resume=resume) as run:
            run.at_step = step
            raise ConfigError("bad")

    fail_at(3)
    fail_at(7)
    fail_at(9)
    fail_at(9)
    with pytest.raises(DistributedError, match=r"step 9 failed twice.*it said: bad"):
        fail_at(9)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another")
    monkeypatch.setattr("fdkit.training.run.launchers", lambda world: ["host:1:2"])
    fail_at(9, resume=True)
    fail_at(9)


def test_only_what_the_same_torchrun_began_goes_on_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert len(launchers_now := launchers(current_world())) == 1
    with Run.create(tmp_path / "run", "data: 1\n") as run:
        assert run.facts["launchers"] == launchers_now
    with Run.create(tmp_path / "run", "data: 1\n", overwrite=True) as run:
        assert run.resumed, "--overwrite moved it aside in the first attempt"
    recorded = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps(recorded | {"launchers": ["host:1:2"]}))
    with Run.create(tmp_path / "run", "data: 2\n", overwrite=True) as run:
        assert not run.resumed, "an older run, of another torchrun"
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    with Run.create(tmp_path / "run", "data: 3\n", overwrite=True) as run:
        assert not run.resumed


def test_a_restart_finds_its_folder_or_the_command_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    assert default_output("distill", "demo").parent == Path("runs")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(ConfigError, match="needs a run folder of a fixed name"):
        default_output("distill", "demo")


def test_a_signal_that_torchrun_passes_on_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    with StopRequest().catch() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert (stop.signal_name, ended) == ("SIGINT", [])
        stop._since -= ECHO_SECONDS
        os.kill(os.getpid(), signal.SIGTERM)
    assert ended == [128 + signal.SIGTERM]


def test_a_lock_from_a_lost_host_of_the_same_torchrun_is_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with Run.create(tmp_path / "run", CONFIG_YAML):
        pass
    (tmp_path / "run" / "lock").write_text(json.dumps({"host": "elsewhere", "pid": 4}))
    with Run.create(tmp_path / "run", CONFIG_YAML) as run:
        assert run.resumed
