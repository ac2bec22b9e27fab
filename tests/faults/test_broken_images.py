"""A folder of broken and hostile images: each is read or refused in words; no crash, no hang, little memory."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from faults.broken_images import IMAGES, MUTATIONS, NO_IMAGES, make_collection, try_images
from PIL import Image

from fdkit.data.decode import BadImage
from fdkit.data.sources import FolderSource


def test_every_one_is_listed_and_read_or_refused(tmp_path: Path) -> None:
    result = try_images(tmp_path, amount=700, seed=3)
    assert result["failures"] == []
    assert result["tried"] >= 700
    assert result["read"] > 100
    assert result["refused"] > 200
    assert result["kinds"].keys() >= NO_IMAGES | IMAGES | MUTATIONS.keys()


def test_the_trial_sees_what_is_read_wrongly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A source that takes every file for an image, and one that raises what it must not, fail it."""
    monkeypatch.setattr(FolderSource, "read", lambda self, index: Image.new("RGB", (2, 2)))
    failures = try_images(tmp_path / "a", amount=100, seed=0)["failures"]
    assert any(words.startswith("bomb of real pixels") for words in failures)
    monkeypatch.setattr(FolderSource, "read", lambda self, index: {}[index])
    failures = try_images(tmp_path / "b", amount=100, seed=0)["failures"]
    assert any("KeyError" in words for words in failures)


def test_a_file_that_disappears_after_it_was_listed_is_a_bad_image(tmp_path: Path) -> None:
    for number in range(3):
        Image.new("RGB", (9, 9)).save(tmp_path / f"{number}.png")
    source = FolderSource(tmp_path)
    (tmp_path / "1.png").unlink()
    assert len(source) == 3
    with pytest.raises(BadImage, match=r"1\.png \(No such file"):
        source.read(1)
    assert source.read(2).size == (9, 9)


def test_a_folder_that_may_not_be_read_is_left_out_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may read everything, so the system's refusal is put in by hand."""
    for name in ("open", "shut\x1b[31m"):
        (tmp_path / "all" / name).mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(tmp_path / "all" / name / "x.png")
    scan = os.scandir

    def refused(path: Any) -> Any:
        if "shut" in os.fspath(path):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refused)
    source = FolderSource(tmp_path / "all")
    assert [source.describe(index) for index in range(len(source))] == [
        str(tmp_path / "all" / "open" / "x.png")
    ]
    [said] = [message for message in caplog.messages if "unreadable folder" in message]
    assert said.isprintable()


@pytest.mark.slow
def test_training_names_each_once_and_shifts_no_label(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two classes, whose broken images lie between the whole ones; the whole ones are told apart by their colour."""
    from fdkit.commands.distill import distill
    from fdkit.data.loader import LoaderConfig, evaluation_batches
    from fdkit.data.views import CenterCrop

    folder = tmp_path / "photos"
    names = {
        label: make_collection(folder / label, 80, seed=number)
        for number, label in enumerate(["blue", "red"])
    }
    for label in names:
        for path in (folder / label).iterdir():  # only what was made unreadable stays of the collection
            try:
                from fdkit.data.decode import decode

                decode(path)
            except BadImage:
                continue
            path.unlink()
        for number in range(40):
            colour = (0, 0, 255) if label == "blue" else (255, 0, 0)
            Image.new("RGB", (40, 40), colour).save(folder / label / f"{number:02}-good.png")
    source = FolderSource(folder)
    num_broken = len(source) - 80
    assert num_broken > 60
    allowing = LoaderConfig(workers=0, max_bad_ratio=1)
    seen = 0
    for batch in evaluation_batches(source, CenterCrop(32), allowing, batch_size=16):
        is_red = batch.crops[0][:, 0].float().mean(dim=(1, 2)) > 128
        assert is_red.long().tolist() == batch.labels.tolist()
        seen += len(batch.labels)
    assert seen == 80
    caplog.clear()
    values: dict[str, Any] = {
        "teacher": "timm:vit_tiny_patch16_224", "pretrained": False, "image_size": 32, "views": {"image_size": 32},
        "student": {"depth": 1}, "train": {"batch_size": 16, "epochs": 2}, "optim": {"warmup_epochs": 0.5},
    }  # fmt: skip
    run = distill(data=folder, **values, loader={"max_bad_ratio": 1.0, "workers": 0}, output=tmp_path / "run")
    named = json.loads((run / "run.json").read_text())["unreadable_images"]
    said = [message for message in caplog.messages if message.startswith("unreadable image left out")]
    assert len(said) == len(named) == len(set(named))
    assert num_broken - 20 <= len(named) <= num_broken
    assert all(message.isprintable() for message in said)
