import itertools
import logging
import multiprocessing
import os
import signal
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fdkit.data.loader import (
    BadImages,
    Batch,
    LoaderConfig,
    _Stream,
    _tell_unless_orphaned,
    evaluation_batches,
    num_workers,
    steps_per_epoch,
)
from fdkit.data.loader import training_batches as batches_of
from fdkit.data.sources import ArraySource, BadImage, FolderSource
from fdkit.data.views import CenterCrop, CropConfig, RandomCrop, TwoViews, TwoViewsConfig
from fdkit.errors import ConfigError, DataError, ResourceError

HERE = LoaderConfig(workers=0)
VIEWS = RandomCrop(CropConfig(image_size=8))


def source(count: int = 23) -> ArraySource:
    images = np.random.default_rng(0).integers(0, 256, (count, 12, 10, 3), dtype=np.uint8)
    return ArraySource("random", images, np.arange(count) % 3, "abc")


def training_batches(images=None, views=VIEWS, config=HERE, **options) -> list[Batch]:
    defaults = {"batch_size": 6, "seed": 5, "start_step": 0, "num_steps": 8}
    return list(batches_of(images or source(), views, config, **{**defaults, **options}))


def assert_same(batches: list[Batch], others: list[Batch]) -> None:
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert torch.equal(batch.indices, other.indices)
        assert torch.equal(batch.labels, other.labels)
        for tensor, twin in zip(batch.crops + batch.colour, other.crops + other.colour, strict=True):
            assert torch.equal(tensor, twin)


def test_an_epoch_has_every_image_at_most_once_and_the_next_another_order() -> None:
    batches = training_batches(num_steps=6)  # 3 steps an epoch
    epochs = [torch.cat([batch.indices for batch in batches[start : start + 3]]).tolist() for start in (0, 3)]
    assert all(len(set(epoch)) == 18 for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert set(epochs[0]) != set(epochs[1])
    assert batches[0].labels.tolist() == [index % 3 for index in epochs[0][:6]]


def test_batch_shapes_and_types() -> None:
    batch = training_batches(views=TwoViews(TwoViewsConfig(image_size=8)))[0]
    assert [(crop.shape, crop.dtype) for crop in batch.crops] == [((6, 3, 8, 8), torch.uint8)] * 2
    assert [(row.shape, row.dtype) for row in batch.colour] == [((6, 11), torch.float32)] * 2
    assert batch.labels.dtype == batch.indices.dtype == torch.int64


def test_crops_belong_to_their_indices() -> None:
    images = np.arange(20, dtype=np.uint8)[:, None, None, None].repeat(9, 1).repeat(7, 2).repeat(3, 3)
    images[..., 1] += 50
    for batch in training_batches(ArraySource("flat", images, None)):
        expected = torch.stack([batch.indices, batch.indices + 50, batch.indices], dim=1)
        assert torch.equal(batch.crops[0], expected[..., None, None].expand(6, 3, 8, 8).to(torch.uint8))
        assert batch.labels.tolist() == [-1] * 6


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers: int) -> None:
    views = TwoViews(TwoViewsConfig(image_size=8))
    assert_same(
        training_batches(views=views, config=LoaderConfig(workers=workers)), training_batches(views=views)
    )


def test_resuming_at_any_step_gives_the_same_batches() -> None:
    whole = training_batches()
    for start in (1, 3, 7):
        assert_same(training_batches(start_step=start), whole[start:])
    assert training_batches(start_step=8) == []


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_out_the_global_batch(world_size: int) -> None:
    ranks = [training_batches(rank=rank, world_size=world_size) for rank in range(world_size)]
    joined = [
        Batch(
            *(
                torch.cat(parts)
                if torch.is_tensor(parts[0])
                else [torch.cat(p) for p in zip(*parts, strict=True)]
                for parts in zip(*step, strict=True)
            )
        )
        for step in zip(*ranks, strict=True)
    ]
    assert_same(joined, training_batches())


def test_seed_and_epoch_decide_the_augmentation() -> None:
    def crops_of(image: int, **options: int) -> list[torch.Tensor]:
        batches = training_batches(num_steps=12, **options)
        return [b.crops[0][row] for b in batches for row in (b.indices == image).nonzero().flatten()]

    first, other = crops_of(4), crops_of(4, seed=6)
    assert len(first) >= 2
    assert not torch.equal(first[0], first[1])
    assert not any(torch.equal(crop, twin) for crop, twin in zip(first, other, strict=False))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_global_generators_are_left_alone(workers: int) -> None:
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    training_batches(config=LoaderConfig(workers=workers))
    list(evaluation_batches(source(), CenterCrop(8), LoaderConfig(workers=workers), batch_size=5))
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpy_before).all()


def test_batch_sizes_that_do_not_fit() -> None:
    with pytest.raises(
        ConfigError, match=r"batch size 64 is more than the 23 images of random\n.*--train.batch-size 16"
    ):
        training_batches(batch_size=64)
    with pytest.raises(ConfigError, match=r"batch size 7 does not divide by 2 ranks\n.*--train.batch-size 6"):
        training_batches(batch_size=7, world_size=2)
    assert steps_per_epoch(source(), 6) == 3
    assert steps_per_epoch(source(), 23) == 1


def test_evaluation_reads_everything_in_order() -> None:
    for workers in (0, 2):
        batches = list(
            evaluation_batches(source(), CenterCrop(8), LoaderConfig(workers=workers), batch_size=5)
        )
        assert [len(batch.indices) for batch in batches] == [5, 5, 5, 5, 3]
        assert torch.cat([batch.indices for batch in batches]).tolist() == list(range(23))
        assert torch.cat([batch.labels for batch in batches]).tolist() == [index % 3 for index in range(23)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index in range(30):
        path = tmp_path / "ab"[index % 2] / f"{index:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (12, 10), (index, 0, 0)).save(path)
    return tmp_path


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_replaced_by_the_next_one_and_named_once(folder, caplog, workers: int) -> None:
    images = FolderSource(folder)
    whole = training_batches(images)
    damage(folder / "a" / "06.png")  # index 3; the next is a/08.png
    with caplog.at_level(logging.WARNING, logger="fdkit"):
        batches = training_batches(images, config=LoaderConfig(workers=workers), num_steps=8)
    assert caplog.messages.count(caplog.messages[0]) == len(caplog.messages) == 1
    assert caplog.messages[0].startswith(f"unreadable image left out: {folder}/a/06.png (")
    for batch, before in zip(batches, whole, strict=True):
        assert batch.indices.tolist() == [4 if index == 3 else index for index in before.indices.tolist()]
        assert batch.labels.tolist() == images.labels[batch.indices].tolist()
        red = batch.crops[0][:, 0, 0, 0].tolist()
        assert red == [int(Path(images.describe(i)).stem) for i in batch.indices.tolist()]


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_leaves_unreadable_images_out_and_shifts_no_label(folder, workers: int) -> None:
    images = FolderSource(folder)
    for name in ("a/00.png", "a/02.png", "b/29.png"):
        damage(folder / name)
    bad = BadImages(images, 0.5)
    config = LoaderConfig(workers=workers, max_bad_ratio=0.5)
    batches = list(evaluation_batches(images, CenterCrop(8), config, batch_size=2, bad_images=bad))
    indices = torch.cat([batch.indices for batch in batches])
    assert indices.tolist() == list(range(2, 29))
    assert torch.cat([batch.labels for batch in batches]).tolist() == images.labels[2:29].tolist()
    assert [os.path.relpath(path, folder) for path in bad.reasons] == ["a/00.png", "a/02.png", "b/29.png"]


def test_too_many_unreadable_images_end_the_run(folder) -> None:
    images = FolderSource(folder)
    damage(folder / "a" / "00.png")
    damage(folder / "b" / "01.png")
    with pytest.raises(
        DataError,
        match=r"2 of 30 images are unreadable \(6\.7%\), more than the 1\.0% allowed.*\n.*--loader.max-bad-ratio",
    ):
        training_batches(images)
    with pytest.raises(DataError, match="2 of 30 images"):
        list(evaluation_batches(images, CenterCrop(8), HERE, batch_size=4))
    assert len(training_batches(images, config=LoaderConfig(workers=0, max_bad_ratio=0.1))) == 8


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("max_bad_ratio", [0.01, 1.0])
def test_a_folder_without_one_readable_image_ends_the_run_at_once(
    folder, workers: int, max_bad_ratio: float
) -> None:
    for path in folder.glob("*/*.png"):
        path.write_bytes(b"")
    config = LoaderConfig(workers=workers, max_bad_ratio=max_bad_ratio)
    with pytest.raises(DataError, match="of 30 images are unreadable"):
        training_batches(FolderSource(folder), config=config)


def test_a_file_that_disappears_is_an_unreadable_image(folder, caplog) -> None:
    images = FolderSource(folder)
    (folder / "a" / "00.png").unlink()
    assert sum(len(b.indices) for b in evaluation_batches(images, CenterCrop(8), HERE, batch_size=4)) == 29
    assert "a/00.png (No such file or directory)" in caplog.text


class DyingSource(ArraySource):
    """Kills the process that reads image 3, unless it is the trainer."""

    trainer = os.getpid()

    def read(self, index: int) -> Image.Image:
        if index == 3 and os.getpid() != self.trainer:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(index)


def test_a_worker_that_dies_is_explained() -> None:
    dying = DyingSource("dying", source().images, None)
    with pytest.raises(
        ResourceError,
        match=r"reading images failed: DataLoader worker.*; worker 0 at dying\[3\]\n.*--loader.workers",
    ):
        list(evaluation_batches(dying, CenterCrop(8), LoaderConfig(workers=1), batch_size=5))


class SlowSource(ArraySource):
    def read(self, index: int) -> Image.Image:
        if index == 3:
            signal.pause()
        return super().read(index)


def test_a_worker_that_hangs_is_not_waited_for() -> None:
    slow = SlowSource("slow", source().images, None)
    with pytest.raises(ResourceError, match=r"timed out after 1\.0 seconds; worker 0 at slow\[3\]"):
        list(
            evaluation_batches(
                slow, CenterCrop(8), LoaderConfig(workers=1, timeout_seconds=1, retry_seconds=0), batch_size=5
            )
        )


def worker_ids() -> list[int]:
    return [process.pid for process in multiprocessing.active_children()]


@pytest.mark.parametrize("early", [True, False])
def test_workers_outlive_the_trainers_signals_and_end_with_the_iterator(monkeypatch, early: bool) -> None:
    def send(pid: int) -> None:
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)

    def start_and_send(process: BaseProcess) -> None:
        start(process)
        send(process.pid)

    start = BaseProcess.start
    if early:
        monkeypatch.setattr(BaseProcess, "start", start_and_send)
    before = set(worker_ids())
    batches = batches_of(
        source(), VIEWS, LoaderConfig(workers=2), batch_size=6, seed=5, start_step=0, num_steps=60
    )
    next(batches)
    mine = set(worker_ids()) - before
    assert len(mine) == 2
    if not early:
        for pid in mine:
            send(pid)
    assert len(list(itertools.islice(batches, 58))) == 58
    batches.close()
    assert not set(worker_ids()) & mine


def test_num_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    def auto(cores: int, *, cuda: bool = False, ranks: int = 1) -> int:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        return num_workers(LoaderConfig())

    assert num_workers(LoaderConfig(workers=3)) == 3
    assert [auto(cores) for cores in (1, 2, 4, 8, 64)] == [0, 0, 3, 7, 12]
    assert [auto(cores, cuda=True) for cores in (1, 2, 16)] == [1, 1, 12]
    assert auto(16, cuda=True, ranks=8) == 1


def test_bad_images_counts_each_path_once() -> None:
    bad = BadImages(source(), 0.1)
    bad.add([BadImage("x", "torn")] * 5)
    bad.add([BadImage("y", "torn")])
    assert bad.reasons == {"x": "torn", "y": "torn"}
    with pytest.raises(DataError, match=r"3 of 23 images are unreadable \(13\.0%\).*the first: x \(torn\)"):
        bad.add([BadImage("z", "torn")])


def test_a_place_in_the_stream_is_numpys_philox_at_that_counter() -> None:
    key = np.random.SeedSequence(7, spawn_key=(1,)).generate_state(2, np.uint64)
    stream = _Stream(7, 1)
    for epoch, index in [(0, 0), (3, 5), (5, 3), (3, 5)]:
        expected = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, index, epoch]))
        found = stream.at(epoch, index)
        assert found.integers(0, 2**31, dtype=np.int32) == expected.integers(0, 2**31, dtype=np.int32)
        assert found.random(5).tolist() == expected.random(5).tolist()
    assert (
        _Stream(7, 0).at(3, 5).random() != _Stream(7, 1).at(3, 5).random() != _Stream(8, 1).at(3, 5).random()
    )


def test_a_worker_whose_trainer_is_gone_prints_no_errors(capsys: pytest.CaptureFixture[str]) -> None:
    error = EOFError("the other end is closed")
    _tell_unless_orphaned(os.getppid() + 1, EOFError, error, None)
    assert capsys.readouterr().err == ""
    _tell_unless_orphaned(os.getppid(), EOFError, error, None)
    assert capsys.readouterr().err.strip() == "EOFError: the other end is closed"
