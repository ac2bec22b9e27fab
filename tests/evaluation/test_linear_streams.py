"""Probes trained on random views, alone and by two processes, held against an ordinary training loop."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from PIL import Image
from torch import nn

from fdkit.data.loader import LoaderConfig, training_batches
from fdkit.data.subset import Subset
from fdkit.data.views import CropConfig, RandomCrop
from fdkit.errors import ConfigError, DataError, NumericsError
from fdkit.evaluation._probe import Candidate
from fdkit.evaluation._probe_data import StreamedImages
from fdkit.evaluation._random_views import ClippedCrop
from fdkit.evaluation._subject import Extraction, Subject
from fdkit.evaluation.linear import LinearConfig, evaluate, measure, validation_split
from fdkit.teachers.loading import load_teacher

IN_PROCESS = LoaderConfig(workers=0)
SWEEP: dict[str, Any] = {"epochs": 3, "lr": (0.01, 0.1, 0.5), "train_batch_size": 8}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """33 noisy training images and 12 of test, in three classes of faintly different colour."""
    root, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, count in (("train", 11), ("test", 4)):
        for channel, name in enumerate(("ant", "bee", "cat")):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 200, size=(30 + number, 41 - number, 3))
                pixels[..., channel] += random.integers(0, 12)
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{number}.png")
    return root


def subject_of(root: Path, *, pooling: str = "cls+patches", layers: int = 2) -> Subject:
    teacher = load_teacher("timm:test_vit", pretrained=False, seed=0, image_size=32)
    extraction = Extraction(torch.device("cpu"), pooling, layers, 8, "fp32", IN_PROCESS, root / "cache")
    return Subject(teacher, str(root), "test", extraction)


def naive_head(
    subject: Subject, views: RandomCrop, rows: torch.Tensor, lr: float, config: LinearConfig
) -> nn.Module:
    """Batch norm and one linear layer, trained on random views with autograd and torch's own SGD."""
    part = Subset(subject.source("train"), rows.numpy())
    size = config.train_batch_size
    steps = len(part) // size * config.epochs
    batches = training_batches(
        part, views, IN_PROCESS, batch_size=size, seed=config.seed, start_step=0, num_steps=steps
    )
    norm, head = nn.BatchNorm1d(256, eps=1e-6, affine=False), nn.Linear(256, 3)
    nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
    optimizer = torch.optim.SGD(head.parameters(), lr=lr, momentum=0.9)
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        values = subject.encode(views.finish(batch.crops, batch.colour)[0])
        optimizer.zero_grad()
        F.cross_entropy(head(norm(values)), batch.labels).backward()
        optimizer.step()
    return nn.Sequential(norm, head).eval().requires_grad_(False)


@pytest.mark.parametrize("boxes", ["redrawn", "clipped"])
def test_a_sweep_on_random_views_is_ordinary_training_of_each_head(photos, boxes):
    subject = subject_of(photos)
    config = LinearConfig(
        augment="crop",
        crop_boxes=boxes,
        crop_scale=(0.3, 0.9),
        crop_interpolation="bilinear",
        normalization="batch_norm",
        refit=False,
        **SWEEP,
    )
    crop = CropConfig(image_size=32, min_scale=0.3, max_scale=0.9)
    views = RandomCrop(crop) if boxes == "redrawn" else ClippedCrop(crop)
    found = measure(subject, config)
    labels = torch.as_tensor(subject.source("train").labels)
    fit_rows, held_rows = validation_split(labels, 0.1, seed=0)
    held = subject.features(Subset(subject.source("train"), held_rows.numpy()))
    for row in found["candidates"]:
        head = naive_head(subject, views, fit_rows, row["lr"], config)
        expected = F.cross_entropy(head(held.values), held.labels)
        assert row["validation_loss"] == pytest.approx(float(expected), rel=1e-4)
    best = naive_head(subject, views, fit_rows, found["lr"], config)
    test = subject.features("test")
    assert found["top1"] == pytest.approx(float((best(test.values).argmax(1) == test.labels).float().mean()))
    assert found["nll"] == pytest.approx(float(F.cross_entropy(best(test.values), test.labels)), rel=1e-4)
    assert (found["protocol"]["num_fit"], found["protocol"]["num_validation"]) == (30, 3)


def test_a_refit_sees_random_views_of_all_images(photos):
    subject = subject_of(photos)
    config = LinearConfig(augment="crop", normalization="batch_norm", **(SWEEP | {"lr": (0.1,)}))
    found = measure(subject, config)
    views = RandomCrop(CropConfig(image_size=32, interpolation="bicubic"))  # the network's own interpolation
    head = naive_head(subject, views, torch.arange(33), 0.1, config)
    test = subject.features("test")
    assert found["nll"] == pytest.approx(float(F.cross_entropy(head(test.values), test.labels)), rel=1e-4)
    assert (found["candidates"], found["protocol"]["num_fit"]) == ([], 33)


def test_standardised_random_views_take_their_statistics_from_evaluation_crops(photos):
    subject = subject_of(photos)
    config = LinearConfig(augment="crop", **(SWEEP | {"epochs": 1, "train_batch_size": 30}))
    views = RandomCrop(CropConfig(image_size=32))
    data = StreamedImages(subject, views, ("all",), config)
    rows = torch.arange(0, 33)[:30]
    (probe,) = data.fit([Candidate(0.1)], rows)
    crops = subject.features(Subset(subject.source("train"), rows.numpy())).values
    mean, scale = crops.mean(0), (crops.var(0, correction=0) + 1e-6).rsqrt()
    ((values, labels),) = subject.stream(
        Subset(subject.source("train"), rows.numpy()), views, batch_size=30, num_steps=1, seed=0
    )
    error = torch.full((30, 3), 1 / 3) - F.one_hot(labels, 3)
    weight = -0.1 * error.T @ ((values - mean) * scale) / 30 * scale  # of one step, on features as they are
    torch.testing.assert_close(probe.weight[0], weight, rtol=1e-4, atol=1e-6)


def test_random_views_are_repeatable_and_hang_on_the_seed(photos):
    subject = subject_of(photos)
    config = LinearConfig(augment="crop", normalization="none", inputs=("grid",), **SWEEP)
    first, second = measure(subject, config), measure(subject, config)
    assert first == second
    json.dumps(first, allow_nan=False)
    other = measure(subject, config.model_copy(update={"seed": 1}))
    assert other["candidates"] != first["candidates"]
    assert (
        measure(subject, config.model_copy(update={"augment": "none"}))["candidates"] != first["candidates"]
    )


def test_without_random_views_a_model_is_measured_on_its_cached_features(photos):
    subject = subject_of(photos)
    config = LinearConfig(inputs=("cls", "all"), **SWEEP)
    assert measure(subject, config) == evaluate(*subject.splits(), config)


SHARED = {
    "cached": {"inputs": ("grid",), "weight_decay": (0.0, 0.01)},
    "cached-kept": {"refit": False, "normalization": "batch_norm"},
    "crops": {"augment": "crop", "inputs": ("grid",), "normalization": "batch_norm", "init": "normal"},
    "crops-kept": {"augment": "crop", "refit": False, "optimizer": "lars", "init": "normal"},
    "one": {"augment": "crop", "lr": (0.1,), "normalization": "none"},
}


def shared_config(name: str) -> LinearConfig:
    return LinearConfig(**(SWEEP | SHARED[name]))


def one_rank(number: int, root: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=number, world_size=2)
    subject = subject_of(Path(root))
    found = {name: measure(subject, shared_config(name)) for name in SHARED}
    Path(f"{folder}/rank{number}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.mark.distributed
def test_two_processes_find_what_one_finds(photos, tmp_path):
    mp.spawn(one_rank, args=(str(photos), str(tmp_path)), nprocs=2)
    ranks = [json.loads((tmp_path / f"rank{number}.json").read_text()) for number in range(2)]
    assert ranks[0] == ranks[1]
    for name in SHARED:
        alone = json.loads(json.dumps(measure(subject_of(photos), shared_config(name))))
        together = ranks[0][name]
        for key in ("lr", "weight_decay", "inputs", "top1", "interval", "protocol", "train", "test"):
            assert together[key] == alone[key], (name, key)
        for found, expected in zip(together["candidates"], alone["candidates"], strict=True):
            assert found["validation_top1"] == expected["validation_top1"]
            assert found["validation_loss"] == pytest.approx(expected["validation_loss"], rel=1e-6)
        assert together["nll"] == pytest.approx(alone["nll"], rel=1e-6)


def test_bad_batches_are_refused_before_a_forward_pass(photos, monkeypatch):
    subject = subject_of(photos)
    monkeypatch.setattr(Subject, "stream", lambda *_, **__: pytest.fail("streamed"))

    def refused(**fields: Any) -> None:
        measure(subject, LinearConfig(augment="crop", **(SWEEP | fields)))

    with pytest.raises(
        ConfigError, match="train_batch_size 31 is more than the 30 images the probe is trained"
    ):
        refused(train_batch_size=31)
    with pytest.raises(ConfigError, match="needs two images a batch, and train_batch_size is 1"):
        refused(train_batch_size=1, normalization="batch_norm")
    with pytest.raises(
        ConfigError, match="inputs cls:4 reads cls of layer -4, which was not extracted; there is"
    ):
        refused(inputs=("cls:4",))
    monkeypatch.setattr("fdkit.evaluation._probe_data.world_size", lambda: 3)
    with pytest.raises(ConfigError, match="train_batch_size 8 does not divide by 3 processes"):
        refused()


def test_views_whose_features_are_not_finite_stop_the_probe(photos, monkeypatch):
    subject = subject_of(photos)
    stream = Subject.stream

    def damaged(self, *arguments, **fields):
        for step, (values, labels) in enumerate(stream(self, *arguments, **fields)):
            values[0, 0] = float("nan") if step == 4 else 0
            yield values, labels

    monkeypatch.setattr(Subject, "stream", damaged)
    with pytest.raises(NumericsError, match="random views are not finite, in epoch 2 of the probe"):
        measure(subject, LinearConfig(augment="crop", normalization="none", **SWEEP))


def test_images_of_one_class_are_refused(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split / "ant").mkdir(parents=True)
        for number in range(3):
            pixels = np.full((32, 32, 3), 40 * number, np.uint8)
            Image.fromarray(pixels).save(tmp_path / split / "ant" / f"{number}.png")
    with pytest.raises(DataError, match="all 3 training images are of class ant: nothing to tell apart"):
        measure(subject_of(tmp_path), LinearConfig(augment="crop", normalization="none"))
