"""Bad files of weights, from the command line: one clear message, exit code 4, nothing half-loaded."""

import os
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from fdkit.cli import main
from fdkit.teachers.catalog import CATALOG, Official

TINY = {"depth": 2, "img_size": 32, "num_classes": 7}


def vit(**args: Any) -> dict[str, torch.Tensor]:
    return timm.create_model("vit_small_patch16_224", **{**TINY, **args}).state_dict()


def refused(path: Path, *flags: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What `fdkit doctor` says of a file it refuses; on standard output it says nothing."""
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", str(path), *flags])
    printed = capsys.readouterr()
    assert stopped.value.code == 4
    assert printed.out == ""
    assert "Traceback" not in printed.err
    assert str(path) in printed.err
    errors = [line for line in printed.err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    return printed.err


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def test_a_truncated_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path / "cut.pth", vit())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "damaged or cut short" in refused(path, capsys=capsys)


def test_a_pickle_with_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path / "evil.pth", {"model": vit(), "extra": Evil(tmp_path / "marker")})
    assert "asks to run code" in refused(path, capsys=capsys)
    assert not (tmp_path / "marker").exists()


def test_the_wrong_family_for_the_name_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefixed = {f"module.base_encoder.{key}": value for key, value in vit().items()}
    path = saved(tmp_path / "x.pth", {"state_dict": prefixed})
    said = refused(path, "--arch", "dinov2_vits", capsys=capsys)
    assert "is not dinov2_vits" in said
    assert "MoCo v3" in said
    said = refused(saved(tmp_path / "y.pth", vit()), "--arch", "swin_tiny_patch4_window7_224", capsys=capsys)
    assert "does not fit" in said
    assert "plain ViT" in said


def test_a_linear_probe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = {"state_dict": {"module.linear.weight": torch.ones(5, 4), "module.linear.bias": torch.ones(5)}}
    said = refused(saved(tmp_path / "alone.pth", alone), capsys=capsys)
    assert "linear classifier and no backbone" in said
    mae = {key: value for key, value in vit().items() if not key.startswith("head.")}
    mae |= {"head.0.running_mean": torch.zeros(384), "head.0.running_var": torch.ones(384)}
    mae |= {"head.1.weight": torch.zeros(7, 384), "head.1.bias": torch.zeros(7)}
    assert "file of a linear probe" in refused(saved(tmp_path / "mae.pth", {"model": mae}), capsys=capsys)
    module = {f"module.{key}": value for key, value in vit().items()}
    optimiser = {"state": {}, "param_groups": [{"lr": 3.0, "params": [0, 1]}]}
    moco = saved(tmp_path / "moco.pth", {"state_dict": module, "optimizer": optimiser, "arch": "vit_small"})
    assert "file of a linear probe" in refused(moco, capsys=capsys)


def test_an_optimiser_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path / "x.pth", {"optimizer": {"state": {}, "param_groups": []}, "epoch": 1})
    assert "state of an optimiser alone" in refused(path, capsys=capsys)


def test_another_patch_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path / "x.pth", vit(patch_size=8))
    said = refused(path, "--arch", "dino_vits", capsys=capsys)
    assert "(384, 3, 8, 8), the model has (384, 3, 16, 16)" in said
    assert "patch 8" in said


def test_an_unknown_layout_shows_its_first_keys_and_the_nearest_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strange = {key.replace("attn", "attention"): value for key, value in vit().items()}
    said = refused(saved(tmp_path / "x.pth", strange), capsys=capsys)
    assert "cls_token (1, 1, 384)" in said
    assert "nearest known layout" in said
    assert "blocks.0.attn.qkv.weight" in said


def test_a_wrong_checksum(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = CATALOG["dino_vits"]
    url = "https://example.org/models/dino_small.pth"
    official = Official("dino", "vit_small_patch16_224", url, sha256="c0ffee")
    monkeypatch.setitem(CATALOG, "dino_vits", entry._replace(official=official))
    said = refused(saved(tmp_path / "dino_small.pth", vit()), capsys=capsys)
    assert "wrong checksum" in said
    assert "c0ffee" in said


def test_a_tensor_that_no_rule_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path / "x.pth", vit() | {"blocks.0.adapter.weight": torch.zeros(3)})
    assert "unexpected 1: blocks.0.adapter.weight" in refused(path, capsys=capsys)


def test_a_lost_final_norm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(
        tmp_path / "x.pth", {key: value for key, value in vit().items() if not key.startswith("norm.")}
    )
    assert "norm.weight" in refused(path, capsys=capsys)
