import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import fdkit
from fdkit.cli import main
from fdkit.commands.doctor import GOLDEN_FILE


def doctor(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", *arguments])
    printed = capsys.readouterr()
    return int(stopped.value.code or 0), printed.out, printed.err


@pytest.fixture
def mocov3_file(tmp_path: Path) -> Path:
    network = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=0)
    state = {f"module.base_encoder.{key}": value + 0.1 for key, value in network.state_dict().items()}
    state["module.base_encoder.head.0.weight"] = torch.zeros(8, 192)
    state["module.predictor.0.weight"] = torch.zeros(8, 8)
    torch.save({"state_dict": state, "arch": "vit_tiny"}, tmp_path / "checkpoint.pth.tar")
    return tmp_path / "checkpoint.pth.tar"


def test_the_embedded_teacher_is_trusted_and_equals_its_stored_feature(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, _ = doctor("demo", capsys=capsys)
    assert code == 0
    assert "demo: nothing found that speaks against it" in out
    assert "Apache-2.0" in out
    numbers = fdkit.doctor("demo")
    golden = next(check for check in numbers["checks"] if check["name"] == "golden feature")
    assert golden["status"] == "ok"
    assert numbers["sha256"] in json.loads(GOLDEN_FILE.read_text())


def test_random_weights_give_code_4(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = doctor(
        "timm:vit_tiny_patch16_224", "--pretrained", "false", "--image-size", "32", capsys=capsys
    )
    assert code == 4
    assert "NOT to be trusted: weights" in out
    assert "RANDOM WEIGHTS" in err


def test_every_tensor_of_an_official_file_is_listed(
    mocov3_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = doctor(str(mocov3_file), "--keys", "--json", capsys=capsys)
    numbers = json.loads(out)
    assert code == 0
    listed = {line["key"]: line for line in numbers["audit"]["tensors"]}
    assert listed.keys() == {key.removeprefix("module.") for key in torch.load(mocov3_file)["state_dict"]}
    assert listed["base_encoder.norm.weight"]["became"] == "norm.weight"
    assert listed["predictor.0.weight"]["became"] is None
    assert "MoCo v3" in numbers["read_as"]
    code, out, _ = doctor(str(mocov3_file), "--keys", capsys=capsys)
    assert "base_encoder.norm.weight -> norm.weight" in out
    assert "left out" in out


def test_a_recorded_feature_is_compared_on_the_next_visit(
    mocov3_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    golden = tmp_path / "golden.json"
    doctor(str(mocov3_file), "--record", str(golden), capsys=capsys)

    def check(*more: str) -> dict[str, Any]:
        _, out, _ = doctor(str(mocov3_file), "--golden", str(golden), "--json", *more, capsys=capsys)
        return next(check for check in json.loads(out)["checks"] if check["name"] == "golden feature")

    assert check()["status"] == "ok"
    wrong = check("--mean", "0.3", "0.3", "0.3")
    assert wrong["status"] == "wrong"
    code, _, _ = doctor("demo", "--golden", str(tmp_path / "none.json"), capsys=capsys)
    assert code == 2


def test_weights_that_do_not_load_give_code_4_and_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"optimizer": {"state": {}, "param_groups": []}}, tmp_path / "x.pth")
    code, out, err = doctor(str(tmp_path / "x.pth"), capsys=capsys)
    assert code == 4
    assert out == ""
    assert "state of an optimiser alone" in err
