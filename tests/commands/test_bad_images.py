import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fdkit.commands.distill import distill
from fdkit.errors import ConfigError, DataError

VALUES: dict[str, Any] = {
    "teacher": "timm:vit_tiny_patch16_224",
    "pretrained": False,
    "image_size": 32,
    "views": {"image_size": 32},
    "student": {"depth": 1},
    "train": {"batch_size": 4, "epochs": 2},
    "optim": {"warmup_epochs": 0.5},
}


def make_folder(folder: Path, good: int, bad: int) -> Path:
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(good):
        Image.fromarray(random.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / f"{number}.jpg")
    for number in range(bad):
        (folder / f"broken{number}.jpg").write_bytes(b"<html>not an image</html>")
    return folder


def test_a_broken_image_is_named_counted_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_folder(tmp_path / "images", good=11, bad=1)
    run = distill(data=folder, **VALUES, output=tmp_path / "run")
    facts = json.loads((run / "run.json").read_text())
    assert [Path(path).name for path in facts["unreadable_images"]] == ["broken0.jpg"]
    assert sum("broken0.jpg" in message for message in caplog.messages) == 1


def test_too_many_broken_images_stop_the_run_and_the_limit_is_settable(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "images", good=9, bad=3)
    with pytest.raises(DataError, match=r"of 12 images are unreadable") as caught:
        distill(data=folder, **VALUES, output=tmp_path / "run")
    assert "--loader.max-bad-ratio" in caught.value.hint
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (facts["state"], facts["exit_code"]) == ("failed", 3)
    run = distill(data=folder, **VALUES, loader={"max_bad_ratio": 0.5}, output=tmp_path / "again")
    assert len(json.loads((run / "run.json").read_text())["unreadable_images"]) == 3


def test_a_run_says_who_reads_its_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder(tmp_path / "images", good=8, bad=0)
    run = distill(data=folder, **VALUES, loader={"workers": 1, "decoder": "pillow"}, output=tmp_path / "run")
    loader = json.loads((run / "run.json").read_text())["derived"]["loader"]
    assert (loader["workers"], loader["decoder"]) == (1, "pillow")
    assert loader["cores"] >= 1
    monkeypatch.setattr("fdkit.data.decode._torchcodec", lambda: None)
    with pytest.raises(ConfigError, match="torchcodec: TorchCodec is not installed"):
        distill(data=folder, **VALUES, loader={"decoder": "torchcodec"}, output=tmp_path / "other")


def test_a_broken_image_in_a_shard_is_named_and_left_out_and_a_broken_shard_stops_the_run(
    tmp_path: Path,
) -> None:
    folder = make_folder(tmp_path / "images", good=11, bad=1)
    files = sorted(folder.iterdir())
    for number, part in enumerate([files[:5], files[5:]]):
        with tarfile.open(tmp_path / f"shard-{number}.tar", "w") as archive:
            for path in part:
                archive.add(path, path.name)
    shards = f"wds:{tmp_path}/shard-{{0..1}}.tar"
    run = distill(data=shards, **VALUES, output=tmp_path / "run")
    (broken,) = json.loads((run / "run.json").read_text())["unreadable_images"]
    assert broken == f"{tmp_path}/shard-1.tar:broken0.jpg"
    data = bytearray((tmp_path / "shard-0.tar").read_bytes())
    with tarfile.open(tmp_path / "shard-0.tar") as archive:
        offset = archive.getmembers()[2].offset
    data[offset : offset + 9] = b"\1" * 9
    (tmp_path / "shard-0.tar").write_bytes(data)
    with pytest.raises(DataError, match=rf"shard-0\.tar: damaged at byte {offset}"):
        distill(data=shards, **VALUES, output=tmp_path / "again")
