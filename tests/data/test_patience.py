"""Disks that do not answer, and folders that go away for a while or for good."""

import errno
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fdkit.data import decode as decoding
from fdkit.data import patience
from fdkit.data.loader import LoaderConfig, training_batches
from fdkit.data.patience import LostData, read_patiently, waiting_up_to
from fdkit.data.sources import BadImage, FolderSource
from fdkit.data.views import CropConfig, RandomCrop


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "PAUSES", (0.0, 0.0, 0.0))
    monkeypatch.setattr(patience, "LOOK_EVERY_SECONDS", 0.02)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(8):
        Image.fromarray(random.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return folder


class Failing:
    """A read that fails some times with an error of the system, then succeeds."""

    def __init__(self, number: int, times: int) -> None:
        self.number, self.left, self.calls = number, times, 0

    def __call__(self, path: Path) -> str:
        self.calls += 1
        if self.left:
            self.left -= 1
            raise OSError(self.number, os.strerror(self.number))
        return "read"


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_a_disk_that_does_not_answer_is_asked_again_three_times(number: int, tmp_path: Path) -> None:
    read = Failing(number, 3)
    assert read_patiently(read, tmp_path / "a.png") == "read"
    assert read.calls == 4
    read = Failing(number, 4)
    with pytest.raises(OSError, match=os.strerror(number)):
        read_patiently(read, tmp_path / "a.png")
    assert read.calls == 4


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.ELOOP])
def test_what_is_wrong_with_the_file_itself_is_said_at_once(number: int, tmp_path: Path) -> None:
    read = Failing(number, 1)
    with pytest.raises(OSError, match=os.strerror(number)):
        read_patiently(read, tmp_path / "a.png")
    assert read.calls == 1


def test_a_folder_that_comes_back_is_waited_for(photos: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = FolderSource(photos)
    wanted = np.array(source.read(3))
    away = photos.with_name("away")
    photos.rename(away)
    timer = threading.Timer(0.3, lambda: away.rename(photos))
    timer.start()
    with waiting_up_to(30):
        assert np.array_equal(np.array(source.read(3)), wanted)
    timer.join()
    assert "is gone; waiting up to 30 s" in caplog.text
    assert "is there again after 0 s" in caplog.text


def test_one_that_does_not_ends_with_what_to_do(photos: Path) -> None:
    source = FolderSource(photos)
    photos.rename(photos.with_name("away"))
    start = time.monotonic()
    with (
        waiting_up_to(0.2),
        pytest.raises(LostData, match=r"photos: the folder of images is gone.*within 0 s") as lost,
    ):
        source.read(3)
    assert 0.2 <= time.monotonic() - start < 10
    assert "--loader.retry-seconds" in lost.value.hint
    assert lost.value.exit_code == 3


def test_a_file_that_is_gone_from_a_folder_that_is_there_is_one_bad_image(photos: Path) -> None:
    source = FolderSource(photos)
    (photos / "3.png").unlink()
    start = time.monotonic()
    with pytest.raises(BadImage, match="No such file"):
        source.read(3)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("workers", [0, 2])
def test_training_stops_with_one_sentence_when_its_folder_goes_away(workers: int, photos: Path) -> None:
    source = FolderSource(photos)
    config = LoaderConfig(workers=workers, retry_seconds=0.1)
    batches = training_batches(
        source, RandomCrop(CropConfig(image_size=8)), config, batch_size=4, seed=0, start_step=0, num_steps=40
    )
    next(batches)
    photos.rename(photos.with_name("away"))
    with pytest.raises(LostData) as lost:
        for _ in batches:
            pass
    assert "Traceback" not in str(lost.value)
    assert str(photos) in lost.value.message


def test_a_slow_disk_changes_no_pixel(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = FolderSource(photos)
    plain = [np.array(source.read(index)) for index in range(8)]
    calls, now = 0, decoding._bytes_now

    def sometimes(path: Path) -> bytes:
        nonlocal calls
        calls += 1
        if calls % 3:
            raise OSError(errno.EIO, "Input/output error")
        return now(path)

    monkeypatch.setattr(decoding, "_bytes_now", sometimes)
    assert all(np.array_equal(np.array(source.read(index)), plain[index]) for index in range(8))
    assert calls == 24
