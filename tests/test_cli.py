import io
import json
import logging
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fdkit.cli import main

TINY = ["--teacher", "timm:vit_tiny_patch16_224", "--pretrained", "false", "--image-size", "32", "--data", "digits",
        "--views.image-size", "32", "--train.batch-size", "8", "--train.epochs", "0.012",
        "--optim.warmup-epochs", "0.006", "--student.depth", "2", "--loader.workers", "0"]  # fmt: skip


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    return int(stop.value.code or 0)


def test_the_overview_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    printed = capsys.readouterr().out
    for command in ("demo", "distill", "pretrain", "evaluate", "analyze"):
        assert f"fdkit {command}" in printed


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["distil"], 2, "did you mean distill?"),
        (["evaluate", "knnn", "demo"], 2, "did you mean knn?"),
        (["analyze", "attention-distanc", "demo"], 2, "did you mean attention-distance"),
        (["pretrain", "mocov4"], 2, "did you mean mocov3 or mocov2 or mocov1?"),
        (["distill", "--teacher", "demo"], 2, "--data"),
        (
            ["distill", "--teacher", "demo", "--data", "digits", "--optim.weigth-decay", "1"],
            2,
            "--optim.weight-decay",
        ),
        (["distill", "--teacher", "demo", "--data", "digits", "--train.epochs", "-1"], 2, "train.epochs"),
        (["distill", "--teacher", "demo", "--data", "digits", "--recipe", "clip_vitx"], 2, "did you mean"),
        (["distill", "--teacher", "demo", "--data", "nowhere/at/all"], 3, "nowhere/at/all"),
        (["distill", "--teacher", "clip_vit_l", "--data", "digits"], 2, "clip_vitl"),
        (["distill", "--teacher", "nowhere.pth", "--data", "digits"], 4, "nowhere.pth"),
        (["evaluate", "knn", "timm:vit_tini_patch16_224", "--data", "digits"], 2, "vit_tiny_patch16_224"),
        (["distill", "--teacher", "demo", "--data", "digits", "--device", "cuda:99"], 6, "cuda:99"),
        (["distill", "--teacher", "demo", "--data", "digits", "--device", "tpu9"], 2, "tpu9"),
    ],
)
def test_a_mistake_gets_its_exit_code_and_one_clear_message(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    if arguments[0] == "distill":
        arguments = [*arguments, "--output", str(tmp_path / "run")]
    assert run(*arguments) == code
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err


def test_a_recipe_with_a_misspelt_field_is_refused_under_its_own_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("optim:\n  wieght_decay: 0.1\n")
    assert run("distill", "--teacher", "demo", "--data", "digits", "--recipe", str(recipe)) == 2
    known = "weight_decay or weight_decay_end or layer_decay"
    wanted = f"{recipe}: optim.wieght_decay: unknown field; did you mean {known}?"
    assert wanted in capsys.readouterr().err


def test_a_flag_wins_over_the_recipe_and_the_recipe_over_the_default(tmp_path: Path) -> None:
    from fdkit.cli import _parse
    from fdkit.commands.distill import DistillConfig

    recipe = tmp_path / "mine.yaml"
    recipe.write_text("teacher: clip_vitb\noptim:\n  lr: 1e-4\n  weight_decay: 0.2\ntrain:\n  epochs: 7\n")
    arguments = ["--data", "digits", "--recipe", str(recipe), "--optim.lr", "5e-4", "--student", "resnet18",
                 "--pretrained", "false", "--optim.betas", "0.9,0.95"]  # fmt: skip
    config = _parse(DistillConfig, arguments, "distill", "")
    assert isinstance(config, DistillConfig)
    assert (config.teacher, config.train.epochs) == ("clip_vitb", 7)
    assert (config.optim.lr, config.optim.weight_decay) == (5e-4, 0.2)
    assert config.optim.betas == (0.9, 0.95)
    assert config.optim.warmup_epochs == DistillConfig(teacher="a", data="b").optim.warmup_epochs
    assert config.student.name == "resnet18"
    assert config.pretrained is False


def test_distil_evaluate_and_analyse_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert run("distill", *TINY, "--output", str(folder)) == 0
    facts = json.loads((folder / "run.json").read_text())
    assert (facts["state"], facts["exit_code"]) == ("done", 0)
    capsys.readouterr()

    assert run("distill", *TINY, "--output", str(folder)) == 5
    assert "--resume" in capsys.readouterr().err
    assert run("distill", *TINY, "--output", str(folder), "--resume") == 0
    assert run("distill", "--recipe", str(folder / "config.yaml"), "--output", str(tmp_path / "again")) == 0
    weights = [(place / "student.safetensors").read_bytes() for place in (folder, tmp_path / "again")]
    assert weights[0] == weights[1], "the saved configuration is a recipe for the same run"
    capsys.readouterr()

    assert run("evaluate", "knn", str(folder), "--data", "digits", "--k", "1,5", "--json") == 0
    numbers = json.loads(capsys.readouterr().out)
    assert [result["k"] for result in numbers["results"]] == [1, 5]
    assert 0 <= numbers["top1"] <= 1
    assert (folder / "results" / "knn-test.json").is_file()

    output = tmp_path / "distances"
    command = ["analyze", "attention-distance", str(folder), "--data", "digits", "--num-images", "4"]
    assert run(*command, "--output", str(output), "--json") == 0
    distance = json.loads(capsys.readouterr().out)["models"][0]["distance"]
    assert [len(heads) for heads in distance] == [3, 3]
    assert (output / "attention-distance.svg").is_file()
    assert run(*command, "--output", str(output)) == 5


def test_a_batch_larger_than_the_data_names_the_flag(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*TINY, "--output", str(tmp_path / "run"), "--train.batch-size", "4096"]
    assert run("distill", *arguments) == 2
    assert "--train.batch-size" in capsys.readouterr().err


def test_the_choices_of_a_command_come_with_what_they_are_and_the_recipes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("pretrain", "--help") == 0
    text = capsys.readouterr().out
    assert "  mocov3 " in text
    assert "MoCo v3: contrastive learning of two views" in text
    assert "recipes (--recipe NAME): " in text
    assert "mocov3_vitb" in text


@pytest.mark.parametrize(
    "arguments",
    [
        ["pack", "demo", "--output", "packed"],
        ["distill", "--teacher", "demo", "--data", "demo"],
        ["evaluate", "knn", "demo", "--data", "demo"],
    ],
)
def test_a_negative_seed_is_refused_in_words(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--seed", "-1"])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "seed" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("place", ["", ".", "folder"])
def test_a_folder_where_a_file_is_to_be_written_is_refused_at_once(
    place: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    assert run("evaluate", "knn", "demo", "--data", "digits", "--cache", "none", "--output", place) == 5
    assert "is a folder" in capsys.readouterr().err
    assert run("doctor", "demo", "--record", place) == 5


def test_of_several_processes_one_says_what_was_found(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank, wanted in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        assert run("teachers", "dino_vits") == 0
        assert ("dino_vits" in capsys.readouterr().out) == wanted


def test_each_call_logs_once_to_the_standard_error_it_finds_whoever_else_listens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log, heard = logging.getLogger("fdkit"), io.StringIO()
    other = logging.StreamHandler(heard)
    monkeypatch.setattr(log, "handlers", [other])  # of a program that calls commands
    for _ in range(2):
        error = io.StringIO()
        monkeypatch.setattr(sys, "stderr", error)
        with pytest.raises(SystemExit):
            main(["teachers"])
        log.warning("kept apart")
        assert error.getvalue().count("warning: kept apart") == 1
        error.close()
    assert heard.getvalue().count("kept apart") == 2


@pytest.mark.parametrize(("is_ignored", "code"), [(False, -signal.SIGINT), (True, 0)])
def test_an_interrupt_after_the_work_is_done_prints_nothing(is_ignored: bool, code: int) -> None:
    """As Ctrl-C while Python ends; jobs in the background of a shell do not hear it."""
    script = f"""
import atexit, os, signal, sys
if {is_ignored}:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
atexit.register(os.kill, os.getpid(), signal.SIGINT)
sys.argv = ["fdkit", "--version"]
from fdkit.__main__ import program
program()
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (code, "")
    assert ended.stdout.startswith("fdkit ")
