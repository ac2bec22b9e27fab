"""`fdkit profile` as a user types it, and the time line it rests on."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fdkit.cli import main
from fdkit.training.profiling import LABELS, Stopwatch, advise

DISTILL = [
    "profile", "distill", "--teacher", "demo", "--data", "demo", "--device", "cpu", "--train.batch-size", "8",
    "--loader.workers", "0", "--warmup-steps", "1", "--steps", "3",
]  # fmt: skip


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    return int(caught.value.code or 0)


def test_parts_add_up_to_the_step(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    result = tmp_path / "profile.json"
    assert run(*DISTILL, "--result", str(result), "--json") == 0
    numbers = json.loads(capsys.readouterr().out)
    assert numbers == json.loads(result.read_text())
    parts = numbers["parts_seconds"]
    assert sum(parts.values()) == pytest.approx(numbers["step_seconds"], rel=0.05)
    assert {"data wait", "teacher", "student", "heads", "backward", "optimizer"} <= set(parts) <= set(LABELS)
    assert all(parts[name] > 0 for name in ("teacher", "student", "backward", "data wait"))
    assert parts["backward"] > parts["heads"]
    assert numbers["images_per_second"] == pytest.approx(8 / numbers["step_seconds"])
    reached = numbers["flops_per_image"] * numbers["images_per_second"] / numbers["peak_flops"]
    assert numbers["utilisation"] == pytest.approx(reached)
    assert [path.name for path in tmp_path.iterdir()] == ["profile.json"]


def test_a_trace_is_written_and_never_over_another(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    trace = tmp_path / "deep" / "trace.json"
    assert run(*DISTILL, "--trace", str(trace)) == 0
    printed = capsys.readouterr().out
    assert "to change: " in printed
    assert "█" in printed
    assert json.loads(trace.read_text())["traceEvents"]
    assert run(*DISTILL, "--trace", str(trace)) == 5
    assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume"], "resume has no effect with profile"),
        (["--train.epochs", "0.001"], "1 + 3 steps are asked for and the run has 1"),
    ],
)
def test_what_cannot_be_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*DISTILL, *arguments) == 2
    assert message in capsys.readouterr().err


def test_nested_stretches_are_counted_once() -> None:
    watch = Stopwatch(torch.device("cpu"))
    watch.start()
    start = time.perf_counter()
    with watch.during("backward"):
        time.sleep(0.02)
        with watch.during("teacher"):
            time.sleep(0.05)
        time.sleep(0.01)
    spent = watch.seconds()
    assert sum(spent.values()) == pytest.approx(time.perf_counter() - start, abs=2e-3)
    assert spent["teacher"] >= 0.05
    assert 0.03 <= spent["backward"] < spent["teacher"] + 0.03
    with pytest.raises(ValueError, match="no label lunch"):
        watch.switch("lunch")


def judged(mean: dict[str, float], **facts: Any) -> tuple[str, float]:
    known: dict[str, Any] = {
        "utilisation": 0.5, "launch_bound": False, "is_compiled": False, "is_cached": False,
        "teacher_is_bf16": True, "on_gpu": True,
    }  # fmt: skip
    return tuple(advise(mean, **known | facts))


def test_one_thing_is_advised_with_what_it_can_gain() -> None:
    text, gain = judged({"data wait": 2.0, "teacher": 4.0, "student": 4.0})
    assert "workers" in text
    assert gain == pytest.approx(10 / 8)
    text, gain = judged({"teacher": 4.0, "student": 6.0})
    assert "--teacher-cache" in text
    assert gain == pytest.approx(10 / 6)
    assert "--teacher-precision bf16" in judged({"teacher": 4.0, "student": 6.0}, teacher_is_bf16=False)[0]
    assert "near the limit" in judged({"teacher": 4.0, "student": 6.0}, is_cached=True)[0]
    assert "--train.compile" in judged({"student": 6.0, "heads": 4.0}, launch_bound=True)[0]
    assert "larger batch" in judged({"student": 6.0}, utilisation=0.1)[0]
    assert judged({"student": 6.0}, utilisation=0.1, on_gpu=False) == judged({"student": 6.0})
    assert judged({"data wait": 0.4, "student": 9.6})[1] == 1.0


@pytest.mark.gpu
def test_parts_add_up_to_the_step_on_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU: its time line is made of events of its stream")
    arguments = [word if word != "cpu" else "cuda" for word in DISTILL]
    assert run(*arguments, "--json") == 0
    numbers = json.loads(capsys.readouterr().out)
    assert sum(numbers["parts_seconds"].values()) == pytest.approx(numbers["step_seconds"], rel=0.05)
