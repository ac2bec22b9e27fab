"""A model and its images: features through the cache equal fresh ones, whatever changes makes them anew."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from PIL import Image

from fdkit.data.loader import LoaderConfig
from fdkit.data.views import CropConfig, RandomCrop
from fdkit.errors import ConfigError, DataError, NumericsError
from fdkit.evaluation import knn, retrieval
from fdkit.evaluation._subject import Extraction, Subject
from fdkit.evaluation.features import extract_features, paired
from fdkit.models.backbone import Preprocessing
from fdkit.models.libraries import build_timm
from fdkit.teachers.teacher import Teacher

IN_PROCESS = LoaderConfig(workers=0, max_bad_ratio=0.5)
VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 8, "depth": 2, "num_heads": 2}


def teacher(seed: int = 0) -> Teacher:
    torch.manual_seed(seed)
    preprocessing = Preprocessing((0.5,) * 3, (0.5,) * 3, image_size=16)
    return Teacher(build_timm("vit_tiny_patch16_224", VIT, preprocessing=preprocessing), name="tiny")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    for split, count in (("train", 5), ("test", 3)):
        for name in ("ant", "bee"):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(256, size=(20 + number, 30, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path / "photos"


def subject(photos: Path, model: Teacher | None = None, **changes: object) -> Subject:
    extraction = Extraction(torch.device("cpu"), loader=IN_PROCESS, cache=photos.parent / "cache")
    return Subject(model or teacher(), str(photos), "test", extraction._replace(**changes))  # type: ignore[arg-type]


def test_cached_features_equal_fresh_ones_to_the_bit(photos: Path) -> None:
    fresh = extract_features(teacher(), subject(photos).source("train"), loader=IN_PROCESS)
    for _ in range(2):
        cached = subject(photos).features("train")
        assert torch.equal(cached.values, fresh.values)
        assert torch.equal(cached.labels, fresh.labels)
        assert cached.classes == fresh.classes
        assert cached.parts == fresh.parts
        assert cached.info == fresh.info | {"weights": cached.info["weights"]}


def test_a_second_evaluation_runs_no_network(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = knn.evaluate(*subject(photos).splits(), knn.KNNConfig(k=(3,)))
    again = subject(photos)
    monkeypatch.setattr(type(again), "encode", property(lambda self: pytest.fail("the network ran")))
    second = knn.evaluate(*again.splits(), knn.KNNConfig(k=(3,)))
    assert first == second


def entries(photos: Path) -> int:
    return len(list((photos.parent / "cache").glob("*/features.json")))


def test_other_weights_crops_layers_or_images_are_other_features(photos: Path) -> None:
    subject(photos).features("test")
    subject(photos).features("test")
    assert entries(photos) == 1
    subject(photos, teacher(seed=1)).features("test")
    assert entries(photos) == 2
    subject(photos, pooling="patches").features("test")
    assert entries(photos) == 3
    subject(photos, layers=2).features("test")
    assert entries(photos) == 4
    subject(photos, precision="bf16").features("test")
    assert entries(photos) == 5
    changed = photos / "test" / "ant" / "0.png"
    status = changed.stat()
    os.utime(
        changed, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000_000)
    )  # same name and size, another content
    subject(photos).features("test")
    assert entries(photos) == 6


def test_unreadable_images_are_named_and_labels_do_not_shift(photos: Path) -> None:
    (photos / "test" / "ant" / "1.png").write_bytes(b"no image")
    features = subject(photos).features("test")
    assert features.labels.tolist() == [0, 0, 1, 1, 1]
    assert features.info["skipped"] == [str(photos / "test" / "ant" / "1.png")]
    fresh = extract_features(teacher(), subject(photos).source("test"), loader=IN_PROCESS)
    assert torch.equal(features.values, fresh.values)


def test_without_a_cache_nothing_stays(photos: Path) -> None:
    features = subject(photos, cache=None).features("test")
    assert len(features.values) == 6
    assert not (photos.parent / "cache").exists()


def test_images_without_labels_are_refused(photos: Path) -> None:
    (photos / "test" / "loose.png").write_bytes((photos / "test" / "ant" / "0.png").read_bytes())
    with pytest.raises(DataError, match="has no labels"):
        subject(photos).features("test")


def test_features_of_two_models_are_not_compared(photos: Path) -> None:
    train = subject(photos).features("train")
    with pytest.raises(ConfigError, match="two models are mixed"):
        paired(train, subject(photos, teacher(seed=1)).features("test"))
    with pytest.raises(ConfigError, match=r"pooling cls, test features patches"):
        paired(train, subject(photos, pooling="patches").features("test"))


def test_features_that_are_not_finite_are_counted(photos: Path) -> None:
    train, test = (subject(photos).features(split) for split in ("train", "test"))
    values = test.values.clone()
    values[2, 1], values[4, 0] = float("nan"), float("inf")
    with pytest.raises(NumericsError, match="2 of 6 test features are not finite, the first in row 2"):
        paired(train, test._replace(values=values))


def test_a_stream_gives_new_views_of_the_images_in_training_order(photos: Path) -> None:
    source = subject(photos).source("train")
    views = RandomCrop(CropConfig(image_size=16, min_scale=0.3))

    def stream(seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return list(subject(photos).stream(source, views, batch_size=4, num_steps=5, seed=seed))

    first, again, other = stream(0), stream(0), stream(1)
    assert [values.shape for values, _ in first] == [(4, 8)] * 5
    for one, two in zip(first, again, strict=True):
        assert torch.equal(one[0], two[0])
        assert torch.equal(one[1], two[1])
    assert any(not torch.equal(one[0], two[0]) for one, two in zip(first, other, strict=True))
    epochs = [torch.cat([values for values, _ in first[start : start + 2]]) for start in (0, 2)]
    assert not torch.equal(*epochs), "an image's crop changes from epoch to epoch"


def one_rank(rank: int, photos: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{photos}/../rendezvous", rank=rank, world_size=2
    )
    train, test = subject(Path(photos)).splits()
    result = knn.evaluate(train, test, knn.KNNConfig(k=(3,)))
    torch.save({"values": train.values.clone(), "top1": result["top1"]}, f"{photos}/../rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.distributed
def test_two_processes_give_the_numbers_of_one(photos: Path) -> None:
    mp.spawn(one_rank, args=(str(photos),), nprocs=2)
    alone = subject(photos, cache=photos.parent / "alone")
    train, test = alone.splits()
    expected = knn.evaluate(train, test, knn.KNNConfig(k=(3,)))["top1"]
    for rank in range(2):
        found = torch.load(photos.parent / f"rank{rank}.pt", weights_only=True)
        torch.testing.assert_close(found["values"], train.values)
        assert found["top1"] == expected


def test_several_processes_need_a_cache_they_share(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fdkit.evaluation._subject.world_size", lambda: 2)
    with pytest.raises(ConfigError, match="through the cache, and it is off"):
        subject(photos, cache=None).features("test")


@pytest.mark.parametrize("changes", [{"pooling": "patches"}, {"layers": 2}])
def test_a_choice_of_tokens_is_refused_where_it_has_no_effect(photos: Path, changes: dict[str, Any]) -> None:
    subject(photos).refuse_reading("the head reads its own")
    with pytest.raises(ConfigError, match="have no effect: the head reads its own"):
        subject(photos, **changes).refuse_reading("the head reads its own")


def test_retrieval_among_the_test_images_reads_no_training_image(photos: Path) -> None:
    found = retrieval.measure(subject(photos), retrieval.RetrievalConfig(k=(1,)))
    assert entries(photos) == 1
    assert retrieval.measure(subject(photos), retrieval.RetrievalConfig(k=(1,), gallery="train")) != found
    assert entries(photos) == 2
