import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fdkit.data import decode as decoding
from fdkit.data import reading
from fdkit.data.decode import decoder_for, decoding_with, read_pixels
from fdkit.data.loader import LoaderConfig, readers_of, training_batches
from fdkit.data.reading import NOTHING, Cost, Readers, ReadingCosts, advice, total, waiting_advice
from fdkit.data.sources import ArraySource, FolderSource
from fdkit.data.views import CropConfig, RandomCrop
from fdkit.errors import ConfigError

SMALL = Cost(100, 0.6, 0.4, 0.0, 25_600)
"""6 ms to read, 4 ms to crop, a short side of 256 pixels."""
LARGE = SMALL._replace(short_sides=102_400)


def said(cost: Cost = SMALL, *, workers: int = 2, cores: int = 16, rate: float = 450, size: int = 224) -> str:
    return advice(cost, Readers(workers, "torchcodec", cores), 0.34, rate, image_size=size)


def test_the_cost_and_the_workers_that_keep_up_are_named() -> None:
    assert said() == (
        "training waits for images 34 % of the time: an image takes 10.0 ms (6.0 to read and decode, 4.0 to crop), "
        "so 2 workers make 200 images/s, and training could take 450\n"
        "  --loader.workers 5 would keep up (16 cores here)"
    )
    assert "one process makes 100 images/s" in said(workers=0)
    assert "--loader.workers 5 would keep up" in said(workers=0)


def test_what_the_cores_do_not_allow_is_not_advised() -> None:
    text = said(cores=4)
    assert (
        "5 workers would keep up, more than the 4 cores here allow; --loader.workers 3 makes 300 images/s"
        in text
    )
    text = said(workers=3, cores=4)
    assert "5 workers would keep up, more than the 4 cores here allow" in text
    assert "--loader.workers" not in text


def test_enough_workers_are_not_told_to_be_more() -> None:
    assert "workers" not in said(workers=5).partition("\n")[2]


def test_large_images_are_to_be_packed_for_the_size_of_the_views() -> None:
    assert "`fdkit pack PATH --output DIR --short-side 256`" in said(LARGE)
    assert "a short side of 1024 pixels, 16.0 times the pixels that views of 224 need" in said(LARGE)
    assert "--short-side 448`" in said(LARGE, size=384)
    assert "--short-side 256`" in said(LARGE, size=96)
    assert "fdkit pack" not in said(SMALL)
    assert "fdkit pack" not in said(LARGE, size=640)


def test_a_slow_disk_is_told_from_slow_decoding() -> None:
    assert "7.0 ms of it wait for the disk or for a core" in said(SMALL._replace(idle_seconds=0.7))
    assert "disk" not in said(SMALL._replace(idle_seconds=0.3))


def test_the_faster_decoder_is_named_where_it_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Readers(2, "pillow", 16)
    monkeypatch.setattr(reading, "has_torchcodec", lambda: False)
    assert "pip install torchcodec" in advice(SMALL, slow, 0.1, 450, image_size=224)
    monkeypatch.setattr(reading, "has_torchcodec", lambda: True)
    assert "--loader.decoder auto" in advice(SMALL, slow, 0.1, 450, image_size=224)
    assert "torchcodec" not in said().lower()


def test_before_any_image_only_the_share_is_known() -> None:
    assert advice(NOTHING, Readers(2, "pillow", 4), 0.5, 10, image_size=224) == (
        "training waits for images 50 % of the time"
    )


def test_each_rank_needs_its_share_of_the_rate() -> None:
    costs = ReadingCosts()
    costs.add(SMALL)
    costs.add(SMALL)
    say = waiting_advice(costs, Readers(2, "torchcodec", 16), image_size=224, world_size=4)
    assert say(0.34, 1800) == said(total([SMALL, SMALL]), rate=450)


@pytest.mark.parametrize("workers", [0, 1])
def test_costs_are_measured_where_images_are_read(workers: int) -> None:
    class Slow(ArraySource):
        def read(self, index: int) -> Image.Image:
            time.sleep(0.02)
            return super().read(index)

    source = Slow("slow", np.zeros((8, 30, 20, 3), np.uint8), None)
    costs = ReadingCosts()
    views, options = (
        RandomCrop(CropConfig(image_size=8)),
        {"batch_size": 4, "seed": 0, "start_step": 0, "num_steps": 2},
    )
    list(training_batches(source, views, LoaderConfig(workers=workers), costs=costs, **options))
    assert costs.total.num_images == 8
    assert costs.total.short_sides == 8 * 20
    assert 0.16 <= costs.total.read_seconds < 1
    assert costs.total.idle_seconds >= 0.15  # asleep, as one is that waits for a disk
    assert 0 < costs.total.crop_seconds < costs.total.read_seconds


def jpeg(path: Path) -> Path:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def torchcodec(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A stand-in for TorchCodec that notes how many bytes it was given and makes grey pixels."""
    given: list[int] = []

    def decode_jpeg(data: torch.Tensor) -> torch.Tensor:
        given.append(len(data))
        return torch.full((3, 20, 30), 77, dtype=torch.uint8)

    monkeypatch.setattr(decoding, "_torchcodec", lambda: decode_jpeg)
    return given


def test_the_decoder_asked_for_decodes_files_and_bytes(tmp_path: Path, torchcodec: list[int]) -> None:
    path = jpeg(tmp_path / "x.jpg")
    size = path.stat().st_size
    expected = torch.from_numpy(np.array(Image.open(path)))
    with decoding_with("pillow"):
        assert torch.equal(read_pixels(path), expected)
        assert torch.equal(read_pixels(path.read_bytes()), expected)
    assert torchcodec == []
    for asked in ("auto", "torchcodec"):
        with decoding_with(asked):
            assert read_pixels(path).unique().tolist() == [77]
            assert read_pixels(path.read_bytes()).unique().tolist() == [77]
    assert torchcodec == [size] * 4


@pytest.mark.parametrize("workers", [0, 1])
def test_the_loader_decodes_with_what_it_is_told(tmp_path: Path, torchcodec: list[int], workers: int) -> None:
    jpeg(tmp_path / "x.jpg")
    source, views = FolderSource(tmp_path), RandomCrop(CropConfig(image_size=8))

    def crops(decoder: str) -> torch.Tensor:
        config = LoaderConfig(workers=workers, decoder=decoder)
        batches = training_batches(source, views, config, batch_size=1, seed=0, start_step=0, num_steps=1)
        return next(iter(batches)).crops[0]

    assert crops("auto").unique().tolist() == crops("torchcodec").unique().tolist() == [77]
    assert len(crops("pillow").unique()) > 10


def test_a_decoder_that_is_not_there_is_refused_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "_torchcodec", lambda: None)
    assert decoder_for("auto") == decoder_for("pillow") == "pillow"
    config = LoaderConfig(workers=0, decoder="torchcodec")
    with pytest.raises(ConfigError, match=r"--loader\.decoder torchcodec: .* not installed.*\n.*pip install"):
        readers_of(config)
    jpeg(tmp_path / "x.jpg")
    options = {"batch_size": 1, "seed": 0, "start_step": 0, "num_steps": 1}
    with pytest.raises(ConfigError, match="torchcodec"):
        training_batches(FolderSource(tmp_path), RandomCrop(CropConfig(image_size=8)), config, **options)


def test_who_reads_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_torchcodec", lambda: lambda data: data)
    readers = readers_of(LoaderConfig(workers=3))
    assert readers == Readers(3, "torchcodec", reading.usable_cores())
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(10**6))
    assert reading.usable_cores() == 1
