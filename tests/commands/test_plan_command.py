"""`fdkit plan` and `--dry-run` as a user types them."""

import importlib
import json
import socket
import time
from pathlib import Path
from typing import Any

import pytest

import fdkit
from fdkit.cli import main
from fdkit.commands._blueprint import blueprint
from fdkit.commands._forecast import larger_batch, micro_batch
from fdkit.config import find_recipe, read_yaml, recipe_names, validate
from fdkit.errors import ConfigError
from fdkit.methods._method import Method
from fdkit.training.plan import TrainConfig
from tests.segmentation_folders import write_scenes

TINY = '{"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}'
PRETRAIN = [
    "pretrain", "simsiam", "--network.architecture", "vit_tiny_patch16_224", "--network.model-args", TINY,
    "--views.image-size", "32", "--train.batch-size", "16", "--train.epochs", "2", "--device", "cpu",
    "--network.pooling", "patches", "--network.position", "learned",
]  # fmt: skip
DISTILL = ["distill", "--teacher", "demo", "--data", "demo", "--device", "cpu", "--train.batch-size", "8"]

ANY_MODEL = "timm:vit_base_patch16_224.mae"
MODELS = {"segment/dinov2_linear": "dinov2_vits", "finetune/demo": "demo"}


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    return int(caught.value.code or 0)


def numbers(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert run(*arguments, "--json") == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("planning asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.usefixtures("no_network")
def test_a_large_teacher_is_planned_in_seconds_without_its_weights(
    capsys: pytest.CaptureFixture[str],
) -> None:
    start = time.process_time()
    plan = numbers(
        capsys, "plan", "distill", "--teacher", "clip_vitl", "--gpu", "h200", "rtx4090", "--gpus", "8",
        "--price-per-hour", "2",
    )  # fmt: skip
    assert (
        time.process_time() - start < 40
    )  # most of it counting operations, on a machine that others use, too
    h200, rtx4090 = plan["devices"]
    assert plan["flops_per_image"]["total"] / 1e12 == pytest.approx(0.650, rel=5e-3)
    assert h200["floor_images_per_second"] == pytest.approx(8 * 989e12 / plan["flops_per_image"]["total"])
    assert h200["images_per_second"] < h200["floor_images_per_second"]
    images = plan["steps"] * plan["batch_size"]
    assert h200["hours"] == pytest.approx(images / h200["images_per_second"] / 3600)
    assert h200["price"] == pytest.approx(2 * 8 * h200["hours"])
    assert (h200["fits"], rtx4090["fits"]) == (True, False)
    assert h200["largest_batch_checkpointed"] > h200["largest_batch"] > plan["images_a_step_a_process"]
    assert any("rtx4090" in line and "--train.activation-checkpointing" in line for line in plan["advice"])
    assert any("--teacher-cache" in line for line in plan["advice"])


def test_a_price_is_printed_only_where_one_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", *PRETRAIN, "--gpu", "a100", "--images", "1000"]
    assert run(*arguments) == 0
    assert "price" not in capsys.readouterr().out
    assert run(*arguments, "--price-per-hour", "3") == 0
    printed = capsys.readouterr().out
    assert "price" in printed
    assert "1,000 images are taken as given" in printed


def test_the_users_images_are_counted_and_timed(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", *DISTILL[:5], "--train.batch-size", "8", "--gpu", "h100"]
    plan = numbers(capsys, *arguments, "--cores", "1")
    assert plan["images"] == 5388
    assert 1e-5 < plan["read_seconds_per_image"] < 1
    assert "timed on" in plan["read_source"]
    device = plan["devices"][0]
    assert device["images_per_second"] <= 1 / plan["read_seconds_per_image"] + 1e-6
    more = numbers(capsys, *arguments, "--cores", "1000000")["devices"][0]
    assert more["is_bound_by"] != "reading"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "distil"], "did you mean distill"),
        (["plan", *PRETRAIN, "--gpu", "h2000"], "gpu h2000: not among"),
        (["plan", *PRETRAIN, "--gpus", "3"], "does not divide by 3 processes"),
        (
            ["plan", *PRETRAIN, "--data", "digits", "--images", "5"],
            "images 5 has no effect beside --data digits",
        ),
        (["plan", *PRETRAIN, "--images", "5"], "batch size 16 is more than the 5 images"),
        (["plan", *PRETRAIN, "--train.parallel", "fsdp"], "no effect with one process"),
        (["plan", "distill", "--teacher", "hf:none/such"], "planning downloads nothing"),
        ([*DISTILL, "--dry-run", "--resume"], "resume has no effect with dry_run"),
        ([*DISTILL, "--dry-run", "--overwrite"], "overwrite has no effect with dry_run"),
    ],
)
def test_what_cannot_be_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) in {2, 4}
    assert message in capsys.readouterr().err


def test_help_names_the_options_of_both(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan", "distill", "--help") == 0
    printed = capsys.readouterr().out
    assert "--price-per-hour" in printed
    assert "--distillation.beta" in printed


def test_a_batch_divides_over_processes_and_parts() -> None:
    assert micro_batch(TrainConfig(batch_size=64, accumulate=4), 2) == 8
    assert micro_batch(TrainConfig(batch_size=64, accumulate=4, cached_batch=True), 2) == 32
    with pytest.raises(ConfigError, match="does not divide"):
        micro_batch(TrainConfig(batch_size=64), 3)
    assert larger_batch(12) % 12 == 0
    assert larger_batch(512) == 2048


def described(name: str) -> tuple[str, Any, Method]:
    """The command, configuration and method of a shipped recipe."""
    command, _, _ = name.partition("/")
    values: dict[str, Any] = {"data": "none", **read_yaml(find_recipe(name, command))}
    module = importlib.import_module(f"fdkit.commands.{command}")
    kind = module.config_class(values["method"]) if command == "pretrain" else module.config_class()
    if "model" in kind.model_fields:
        values.setdefault("model", MODELS.get(name, ANY_MODEL))
    if command == "distill":
        values.setdefault("teacher", "clip_vitb")
    config = validate(kind, values, name)
    return command, config, blueprint(command, config, num_classes=10)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_has_a_blueprint(name: str) -> None:
    _, config, method = described(name)
    assert sum(parameter.numel() for parameter in method.parameters()) > 1000
    assert config.train.batch_size > 0


def one_of_each() -> list[str]:
    """A recipe of every command and method, and the one whose queue takes few sizes of a batch."""
    chosen: dict[tuple[str, str], str] = {}
    for name in recipe_names():
        command = name.partition("/")[0]
        method = read_yaml(find_recipe(name, command)).get("method", "")
        chosen.setdefault((command, str(method)), name)
    return sorted({*chosen.values(), "pretrain/swav_256"})


@pytest.mark.slow
@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", one_of_each())
def test_a_recipe_of_each_kind_is_planned(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    command, _, recipe = name.partition("/")
    words = {"distill": ["--teacher", "clip_vitb"], "pretrain": []}.get(
        command, [MODELS.get(name, ANY_MODEL)]
    )
    values = read_yaml(find_recipe(name, command))
    choice = [values["method"]] if command == "pretrain" else []
    if "teacher" in values:
        words = ["--teacher", values["teacher"]]
    plan = numbers(capsys, "plan", command, *choice, *words, "--recipe", recipe, "--gpu", "h100")
    assert plan["devices"][0]["images_per_second"] > 0


def contents(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("command", ["distill", "pretrain", "finetune", "segment"])
def test_a_dry_run_does_two_steps_and_leaves_nothing(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("TMPDIR", str(work))
    monkeypatch.setattr("tempfile.tempdir", None)
    arguments = {
        "distill": [*DISTILL, "--teacher-cache", str(work / "cache")],
        "pretrain": [*PRETRAIN, "--data", "digits", "--upscale"],
        "finetune": ["finetune", "demo", "--data", "digits", "--train.batch-size", "8", "--device", "cpu"],
        "segment": [
            "segment", "demo", "--data", str(write_scenes(tmp_path / "scenes")), "--train.batch-size", "2",
            "--device", "cpu",
        ],
    }[command]  # fmt: skip
    found = numbers(capsys, *arguments, "--output", str(work / "run"), "--dry-run", "--loader.workers", "0")
    measured = found["measured"]
    assert measured["steps"] == 2
    assert len(measured["losses"]) == 2
    assert measured["losses"][0] != measured["losses"][1]
    assert measured["images_per_second"] > 0
    assert 0 <= measured["data_wait_ratio"] < 1
    assert found["flops_per_image"]["total"] > 0
    assert contents(work) == set()


def test_a_dry_run_leaves_a_run_folder_that_is_there_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_text("{}")
    assert run(*DISTILL, "--output", str(folder), "--dry-run", "--loader.workers", "0") == 0
    printed = capsys.readouterr().out
    assert f"would train in {folder}" in printed
    assert "2 steps" in printed
    assert contents(folder) == {"run.json"}
    assert (folder / "run.json").read_text() == "{}"


def test_a_dry_run_from_python_has_no_folder_to_give_back() -> None:
    with pytest.raises(ConfigError, match="dry_run makes no run folder"):
        fdkit.distill("demo", "demo", dry_run=True)
