"""Files of a run damaged at any place: found, named and set aside, and what is sound is used."""

import json
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from faults import checkpoint_damage, kills
from faults.checkpoint_damage import WAYS, damage_checkpoints, damage_run_files
from faults.jobs import finished
from faults.kills import finish

from fdkit.training import checkpoint as reading


@pytest.mark.slow
def test_damaged_checkpoints_are_found_and_the_one_before_is_used(tmp_path: Path) -> None:
    result = damage_checkpoints(tmp_path, amount=160, seed=5)
    assert result["failures"] == []
    assert result["found"] > 130
    assert result["found"] + result["harmless"] == 160
    assert {"shards.json", "manifest.json", "state.json", "model.safetensors"} <= result[
        "damages_by_file"
    ].keys()


@pytest.mark.slow
def test_damaged_files_of_a_run_are_said(tmp_path: Path) -> None:
    result = damage_run_files(tmp_path, amount=64, seed=2)
    assert result["failures"] == []
    assert min(result["resumed"], result["refused"], result["not taken for a model"], result["read"]) > 0


def test_a_reader_without_checksums_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial can fail: where only sizes are compared, it tells of every bit that was flipped."""
    from tests.training.training_toys import train_toy

    run = train_toy(tmp_path / "run")
    monkeypatch.setattr("fdkit.teachers.run_checkpoint.sha256_now", lambda path: "")
    monkeypatch.setattr(reading, "_damage", lambda path: None)
    draw, counts = random.Random(0), Counter[str]()
    for way in ("one bit", "zeros"):
        said = [checkpoint_damage._look(run.checkpoints, way, draw, counts) for _ in range(6)]
        assert sum("taken for sound" in " ".join(one) for one in said) >= 4, said


READERS: dict[str, Any] = {
    "evaluate": lambda run, out: ["evaluate", "knn", str(run), "--data", "digits", "--cache", "none"],
    "report": lambda run, out: ["report", str(run), "--output", str(out)],
    "distill": lambda run, out: [
        "distill", "--teacher", str(run), "--data", "digits", "--train.batch-size", "8", "--dry-run",
    ],
    "analyze": lambda run, out: ["analyze", "cka", str(run), "--data", "digits", "--output", str(out)],
}  # fmt: skip


DAMAGES = (("student.safetensors", "cut"), ("student.json", "cut"), ("run.json", "one bit"))


@pytest.mark.parametrize(
    "damages",
    [pytest.param(DAMAGES[:1], marks=pytest.mark.slow), pytest.param(DAMAGES[1:], marks=pytest.mark.long)],
)
def test_commands_given_a_damaged_run_say_so(damages: Any, tmp_path: Path) -> None:
    kills.preload()
    log, run = tmp_path / "log", shutil.copytree(finished(), tmp_path / "run")
    draw, number = random.Random(4), 0
    for name, command in READERS.items():
        for file, way in damages:
            log.unlink(missing_ok=True)
            number += 1
            with checkpoint_damage.damaged(run / file, way, draw):
                code = finish([command(run, tmp_path / f"out-{number}")], log)
            text = log.read_text()
            assert "Traceback" not in text, (name, file, text)
            assert code in ((4,) if file != "run.json" and name != "report" else (0, 2, 4)), (
                name,
                file,
                code,
                text,
            )
            assert code == 0 or file in text, (name, file, text)


def test_every_way_of_damage_changes_a_file() -> None:
    draw, data = random.Random(1), json.dumps(list(range(1000))).encode()
    assert all(way(data, draw) != data for way in WAYS.values())
