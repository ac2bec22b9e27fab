"""Features on disk: resumed, checked, compacted where images are unreadable, and made by several processes."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

from fdkit.errors import ResourceError
from fdkit.evaluation import _store
from fdkit.evaluation._store import FeatureStore, default_cache, weights_digest
from fdkit.evaluation.features import Rows

WIDTH = 3
KEY = {"model": "m", "images": "i"}


def value_of(indices: np.ndarray) -> Tensor:
    return torch.from_numpy(indices[:, None] * 10.0 + np.arange(WIDTH)).float()


def maker(calls: list[int], *, unreadable: tuple[int, ...] = (), stop_after: int | None = None):
    """Two rows at a time; fails after `stop_after` batches, as a killed process does."""

    def make(indices: np.ndarray) -> Iterator[Rows]:
        for number, start in enumerate(range(0, len(indices), 2)):
            if number == stop_after:
                raise KeyboardInterrupt
            rows = np.array([i for i in indices[start : start + 2] if i not in unreadable], dtype=np.int64)
            calls.extend(rows.tolist())
            if len(rows):
                yield Rows(torch.from_numpy(rows), value_of(rows))

    return make


def store(folder: Path, num_images: int = 7, **key: str) -> FeatureStore:
    return FeatureStore(folder, KEY | key, num_images=num_images, width=WIDTH)


def test_features_are_made_once_and_mapped_from_disk(tmp_path: Path) -> None:
    calls: list[int] = []
    first, rows = store(tmp_path).fill(maker(calls))
    again, _ = store(tmp_path).fill(maker(calls))
    assert calls == list(range(7))
    assert torch.equal(rows, torch.arange(7))
    assert torch.equal(first, value_of(np.arange(7)))
    assert torch.equal(again, first)
    assert first.dtype == torch.float32
    # The file is mapped, not read: writing to the file shows in the tensor that was opened before.
    path = store(tmp_path).folder / "values.f32"
    np.memmap(path, np.float32, "r+")[0] = -5
    assert again[0, 0] == -5


def test_another_key_is_another_folder(tmp_path: Path) -> None:
    calls: list[int] = []
    store(tmp_path).fill(maker(calls))
    store(tmp_path, model="other").fill(maker(calls))
    assert calls == [*range(7), *range(7)]
    assert json.loads((store(tmp_path).folder / "key.json").read_text()) == KEY


def test_what_stopped_goes_on_where_it_stood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_store, "SECONDS_BETWEEN_FLUSHES", -1)
    calls: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        store(tmp_path).fill(maker(calls, stop_after=2))
    assert store(tmp_path).read() is None
    values, _ = store(tmp_path).fill(maker(calls))
    assert calls == list(range(7)), "no image is read twice"
    assert torch.equal(values, value_of(np.arange(7)))


def test_unreadable_images_leave_no_gap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_store, "BLOCK_BYTES", 4 * WIDTH)  # one row a block
    calls: list[int] = []
    values, rows = store(tmp_path).fill(maker(calls, unreadable=(0, 3, 4)))
    assert rows.tolist() == [1, 2, 5, 6]
    assert torch.equal(values, value_of(rows.numpy()))
    again, same = store(tmp_path).fill(maker(calls))
    assert torch.equal(again, values)
    assert torch.equal(same, rows)
    assert (store(tmp_path).folder / "values.f32").stat().st_size == 4 * 4 * WIDTH


def test_no_readable_image_is_an_empty_tensor(tmp_path: Path) -> None:
    values, rows = store(tmp_path).fill(maker([], unreadable=tuple(range(7))))
    assert (values.shape, len(rows)) == ((0, WIDTH), 0)


@pytest.mark.parametrize("damage", ["bit", "short", "record", "done"])
def test_damaged_features_are_made_again_and_said_to_be(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("fdkit"), "propagate", True)
    store(tmp_path).fill(maker([]))
    folder = store(tmp_path).folder
    if damage == "bit":
        content = bytearray((folder / "values.f32").read_bytes())
        content[17] ^= 1
        (folder / "values.f32").write_bytes(content)
    elif damage == "short":
        (folder / "values.f32").write_bytes((folder / "values.f32").read_bytes()[:-4])
    elif damage == "record":
        (folder / "features.json").write_text("{")
    else:
        (folder / "done.u8").write_bytes(bytes(7))
    calls: list[int] = []
    values, _ = store(tmp_path).fill(maker(calls))
    assert torch.equal(values, value_of(np.arange(7)))
    assert "making them again" in caplog.text
    assert calls == list(range(7))


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match=r"features cannot be kept here.*\n.*--cache"):
        store(tmp_path / "file").fill(maker([]))


def test_features_that_do_not_fit_are_refused_before_they_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_store.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 10}))
    calls: list[int] = []
    with pytest.raises(ResourceError, match="do not fit on its disk"):
        store(tmp_path).fill(maker(calls))
    assert calls == []


def test_the_digest_tells_weights_names_and_types_apart() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    before = weights_digest(network)
    assert weights_digest(network) == before
    network[1].running_mean += 1
    after = weights_digest(network)
    assert after != before
    assert weights_digest(network.double()) != after


def test_the_cache_stands_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FDKIT_CACHE", str(tmp_path))
    assert default_cache() == tmp_path / "features"
    monkeypatch.delenv("FDKIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert default_cache() == tmp_path / "x" / "fdkit" / "features"


def one_rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    calls: list[int] = []
    values, rows = store(Path(folder) / "shared").fill(maker(calls, unreadable=(2,)))
    torch.save({"values": values.clone(), "rows": rows, "calls": calls}, f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.distributed
def test_two_processes_share_the_work_and_both_have_all(tmp_path: Path) -> None:
    mp.spawn(one_rank, args=(str(tmp_path),), nprocs=2)
    alone, rows = store(tmp_path / "alone").fill(maker([], unreadable=(2,)))
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    for rank in ranks:
        assert torch.equal(rank["values"], alone)
        assert torch.equal(rank["rows"], rows)
    assert [rank["calls"] for rank in ranks] == [[0, 1, 3], [4, 5, 6]]
