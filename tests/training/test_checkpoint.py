import json
import os
from pathlib import Path

import pytest
import torch

import fdkit.training.checkpoint as module
from fdkit.errors import OutputError, ResourceError, WeightsError
from fdkit.training.checkpoint import Checkpoint, list_steps, load_checkpoint, newest_sound, save_checkpoint


def content(step: int) -> Checkpoint:
    weight = torch.full((2, 3), float(step))
    tensors = {"model": {"weight": weight, "tied": weight, "count": torch.tensor(step)}, "optimizer": {}}
    return Checkpoint(tensors, {"step": step, "share": 0.1})


def save(folder: Path, *steps: int, keep: int = 3) -> None:
    for step in steps:
        save_checkpoint(folder, step, content(step), keep=keep)


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    save(tmp_path, 7)
    path = newest_sound(tmp_path)
    assert path is not None
    loaded = load_checkpoint(path)
    assert loaded.state == {"step": 7, "share": 0.1}
    assert torch.equal(loaded.tensors["model"]["tied"], torch.full((2, 3), 7.0))
    assert loaded.tensors["model"]["count"].item() == 7
    assert sorted(file.name for file in path.iterdir()) == [
        "manifest.json", "model.safetensors", "optimizer.safetensors", "state.json",
    ]  # fmt: skip


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    save(tmp_path, 5, 10, 100, 20, keep=2)
    assert [path.name for path in list_steps(tmp_path)] == ["step-00000100", "step-00000020"]
    save(tmp_path, 200, keep=1)
    assert [path.name for path in list_steps(tmp_path)] == ["step-00000200"]


def test_nothing_saved_is_none(tmp_path: Path) -> None:
    assert newest_sound(tmp_path / "checkpoints") is None


def flip_a_bit(path: Path) -> None:
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-3] ^= 1
    (path / "model.safetensors").write_bytes(data)


def truncate(path: Path) -> None:
    file = path / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def empty_manifest(path: Path) -> None:
    (path / "manifest.json").write_text("")


def lose_the_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def lose_a_file(path: Path) -> None:
    (path / "state.json").unlink()


def claim_another_step(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"step": 99}))


DAMAGES = [flip_a_bit, truncate, empty_manifest, lose_the_manifest, lose_a_file, claim_another_step]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_is_set_aside_and_the_one_before_used(
    damage: object, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 4, 8)
    damage(tmp_path / "step-00000008")  # type: ignore[operator]
    assert newest_sound(tmp_path) == tmp_path / "step-00000004"
    assert (tmp_path / "step-00000008.corrupt-1").is_dir()
    assert "step-00000008 is damaged" in caplog.text
    save(tmp_path, 8)
    assert newest_sound(tmp_path) == tmp_path / "step-00000008"


def test_all_damaged_is_an_error_that_deletes_nothing_however_often(tmp_path: Path) -> None:
    save(tmp_path, 4, 8)
    flip_a_bit(tmp_path / "step-00000004")
    truncate(tmp_path / "step-00000008")
    for _ in range(2):
        with pytest.raises(
            WeightsError, match=r"no checkpoint is sound.*step-00000004.corrupt-1, step-00000008"
        ):
            newest_sound(tmp_path)
    assert len(list(tmp_path.glob("*/model.safetensors"))) == 2


def test_saving_a_step_again_keeps_a_sound_one_and_replaces_a_damaged_one(tmp_path: Path) -> None:
    save(tmp_path, 4)
    before = (tmp_path / "step-00000004" / "model.safetensors").stat().st_mtime_ns
    save(tmp_path, 4)
    assert (tmp_path / "step-00000004" / "model.safetensors").stat().st_mtime_ns == before
    flip_a_bit(tmp_path / "step-00000004")
    save(tmp_path, 4)
    assert newest_sound(tmp_path) == tmp_path / "step-00000004"


def test_a_crash_anywhere_while_writing_leaves_the_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 4)

    class Crash(BaseException):
        pass

    def crash(*_: object) -> None:
        raise Crash

    for name in ("sha256_now", "_sync", "write_whole"):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, crash)
            if name == "sha256_now":
                patch.setattr(module, "_damage", lambda path: None)
            with pytest.raises(Crash):
                save_checkpoint(tmp_path, 8, content(8), keep=1)
        assert newest_sound(tmp_path) == tmp_path / "step-00000004"
        assert not list(tmp_path.glob(".writing-*"))


def test_a_full_disk_names_the_room_and_keeps_the_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 4)
    usage = module.shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "disk_usage", lambda path: usage._replace(free=10))
        with pytest.raises(ResourceError, match=r"no room for the checkpoint .*GB needed, 0.00 GB free"):
            save(tmp_path, 8, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(OutputError, match="cannot write the checkpoint"):
        save(tmp_path / "checkpoints", 4)


def test_files_take_the_mode_that_the_umask_gives(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save(tmp_path, 4)
    finally:
        os.umask(before)
    modes = {oct(file.stat().st_mode & 0o777) for file in (tmp_path / "step-00000004").iterdir()}
    assert modes == {"0o640"}


def test_nan_in_a_saved_model_is_refused_by_name(tmp_path: Path) -> None:
    bad = Checkpoint({"model": {"head.weight": torch.tensor([1.0, float("nan")])}}, {"step": 1})
    path = save_checkpoint(tmp_path, 1, bad, keep=1)
    with pytest.raises(WeightsError, match=r"head\.weight of model.safetensors holds NaN"):
        load_checkpoint(path)
