"""Numbers that are not finite and memory that runs out, in real runs: nothing spoiled is kept, and the run goes on."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from faults.children import run
from faults.kills import left_by_training
from faults.numeric_faults import (
    FAULTS,
    Fault,
    inject_numbers,
    not_finite_in,
    out_of_memory_at,
    trainees,
    try_fault,
    try_memory,
    undisturbed,
)

WAYS = {way.name: way for way in trainees()}
NO_MEMORY = {
    "the device": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "the machine": lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate"
    ),
    "Python": MemoryError,
}


@pytest.mark.parametrize(
    ("name", "fault", "ended"),
    [
        ("distill", Fault("second moment", np.inf), "stopped"),
        ("mocov1", Fault("queue", np.inf), "stopped"),
        ("simclr", Fault("gradient", np.nan), "went on"),
        ("dino", Fault("image", np.nan), "went on"),
    ],
)
def test_a_number_that_is_not_finite_spoils_nothing(
    name: str, fault: Fault, ended: str, tmp_path: Path
) -> None:
    outcome = try_fault(WAYS[name], fault, tmp_path)
    assert outcome.failures == []
    assert outcome.ended == ended


@pytest.mark.long
@pytest.mark.parametrize("name", WAYS)
def test_every_fault_in_every_method(name: str, tmp_path: Path) -> None:
    ended = {}
    for fault in FAULTS:
        outcome = try_fault(WAYS[name], fault, tmp_path)
        assert outcome.failures == [], str(fault)
        ended[str(fault)] = outcome.ended
    assert {"went on", "stopped"} <= set(ended.values())


@pytest.mark.long
def test_faults_drawn_from_all(tmp_path: Path) -> None:
    outcome = inject_numbers(tmp_path, amount=6, seed=1)
    assert outcome["failures"] == []
    assert outcome["tried"] == sum(outcome["ended"].values()) == 6


@pytest.mark.parametrize(
    ("step", "what"), [(0, "the device"), pytest.param(6, "the machine", marks=pytest.mark.long)]
)
def test_without_memory_a_run_stops_in_words_and_goes_on_later(step: int, what: str, stopped: Path) -> None:
    assert try_memory(WAYS["distill"], stopped.parent, step=step, error=NO_MEMORY[what]) == []


def spoil_one(path: Path, name: str, value: float) -> None:
    """Put a number into a tensor of a checkpoint, and its digest into the manifest, so that nothing else is wrong."""
    tensors = safetensors.torch.load_file(path)
    tensors[name].view(-1)[0] = value
    safetensors.torch.save_file(tensors, path)
    manifest = path.parent / "manifest.json"
    content: dict[str, Any] = json.loads(manifest.read_text())
    from fdkit.training import checkpoint

    content["files"] |= checkpoint._facts([path])
    manifest.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ran out of memory behind its checkpoints of steps 3 and 6."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    end = run(
        WAYS["distill"].arguments(folder),
        folder.parent / "log",
        prepare=out_of_memory_at(6, NO_MEMORY["Python"]),
    )
    assert end.code == 6
    return folder


@pytest.mark.parametrize(
    ("file", "start", "value"),
    [("model", "student.", np.inf), ("model", "student.", np.nan), ("optimizer", "state.", np.inf)],
)
def test_a_checkpoint_that_holds_what_is_not_finite_is_refused_by_name(
    file: str, start: str, value: float, stopped: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(stopped, tmp_path / "run"))
    newest = max((folder / "checkpoints").glob("step-*"))
    path = newest / f"{file}.safetensors"
    name = next(name for name in sorted(safetensors.torch.load_file(path)) if name.startswith(start))
    spoil_one(path, name, value)
    assert not_finite_in(folder) == [f"{path.relative_to(folder)}: {name}"]
    end = run([*WAYS["distill"].arguments(folder), "--resume"], tmp_path / "log")
    assert end.code == 4, end.text
    for word in (str(newest), name, "NaN", "remove this checkpoint"):
        assert word in end.text
    assert newest.exists()


def test_runs_are_compared_with_what_can_differ(stopped: Path, tmp_path: Path) -> None:
    one = undisturbed(WAYS["distill"], stopped.parent)
    other = tmp_path / "other"
    assert run([*WAYS["distill"].arguments(other), "--seed", "1"], tmp_path / "log").code == 0
    found = left_by_training(other)
    weights = ("exported", "model.safetensors", "optimizer.safetensors", "metrics")
    assert all(one[name] != found[name] for name in weights)
    assert not_finite_in(other) == []


@pytest.mark.parametrize("where", NO_MEMORY)
def test_without_memory_any_command_says_so(
    where: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fdkit.cli import main
    from fdkit.commands import evaluate

    def without_memory(config: Any) -> Any:
        raise NO_MEMORY[where]()

    monkeypatch.setattr(evaluate, "run", without_memory)
    with pytest.raises(SystemExit) as end:
        main(["evaluate", "knn", "demo", "--data", "digits"])
    said = capsys.readouterr().err
    assert end.value.code == 6, said
    assert "out of memory" in said
    assert "--batch-size" in said
    assert "Traceback" not in said
