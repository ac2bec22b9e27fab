"""A folder of broken and hostile images: each is read or refused in words; no crash, no hang, little memory."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from faults.broken_images import Specimen, make_collection
from faults.limits import try_all

from fdkit.data.decode import BadImage
from fdkit.data.sources import FolderSource

NO_IMAGES = {
    "directory", "dangling link", "link to itself", "link to a device", "link to a folder above", "pipe",
    "link to a pipe", "empty", "one byte", "web page", "script", "SVG", "PostScript", "PDF", "pickle",
    "bomb of 2 gigapixels", "bomb under Pillow's own limit", "bomb of real pixels", "width without height",
    "PPM that promises everything", "BMP with huge sides", "strange name of a cut file",
}  # fmt: skip
"""Kinds of which no specimen can be read."""


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Specimen]]:
    folder = tmp_path_factory.mktemp("broken") / "images"
    return folder, make_collection(folder, 700, seed=3)


def test_every_one_is_listed_and_read_or_refused(collection: tuple[Path, list[Specimen]]) -> None:
    folder, specimens = collection
    source = FolderSource(folder)
    kinds = {specimen.name: specimen.kind for specimen in specimens}
    listed = {os.fsencode(source._names[index]): index for index in range(len(source))}
    assert listed.keys() == {name for name in kinds if not name.startswith(b".")}
    inputs = [(f"{kinds[name]}: {name!r}", index) for name, index in listed.items()]
    trial = try_all(source.read, inputs, refusals=(BadImage,), seconds=10, megabytes=700)
    assert trial.failures == []
    assert trial.read > 100
    assert trial.refused > 200
    for name, index in listed.items():
        if kinds[name] in NO_IMAGES:
            with pytest.raises(BadImage) as refused:
                source.read(index)
            assert refused.value.path.isprintable()
            assert refused.value.reason
        elif kinds[name] in {"whole", "wrong extension", "strange name"}:
            assert source.read(index).mode == "RGB", name


@pytest.mark.slow
def test_training_names_each_once_and_shifts_no_label(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two classes, whose broken images lie between the whole ones; the whole ones are told apart by their colour."""
    from PIL import Image

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
