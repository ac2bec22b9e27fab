"""Accuracy under corruption against one image at a time, and the other evaluators' own numbers on clean images."""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fdkit
from fdkit.data.corrupted_source import reduced, spread_positions
from fdkit.data.corruptions import COMMON, EXTRA, corrupt
from fdkit.data.imagenet_variants import imagenet_wnids
from fdkit.data.loader import LoaderConfig
from fdkit.data.sources import FolderSource
from fdkit.errors import ConfigError, DataError
from fdkit.evaluation import knn, linear, logistic, robustness
from fdkit.evaluation._classifier import make_classifier
from fdkit.evaluation._metrics import expected_calibration_error
from fdkit.evaluation._subject import Extraction, Subject
from fdkit.evaluation.features import evaluation_crop
from fdkit.evaluation.robustness import ALEXNET_ERROR, RobustnessConfig, Seen, measure
from fdkit.models.backbone import Preprocessing
from fdkit.models.libraries import build_timm
from fdkit.teachers.teacher import Teacher

IN_PROCESS = LoaderConfig(workers=0, max_bad_ratio=0.5)
PREPROCESSING = Preprocessing((0.5,) * 3, (0.5,) * 3, image_size=16)
VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 8, "depth": 2, "num_heads": 2}
COLOURS = {"ant": (200, 60, 60), "bee": (60, 180, 70), "cat": (70, 70, 190)}
NAMES = tuple(COLOURS)


def teacher(classes: tuple[str, ...] = (), num_classes: int = 0) -> Teacher:
    """A random tiny network; with a head where it has classes, whose names its recipe keeps."""
    torch.manual_seed(0)
    args = {**VIT, "num_classes": num_classes or len(classes)}
    backbone = build_timm("vit_tiny_patch16_224", args, preprocessing=PREPROCESSING)
    if classes:
        backbone.recipe["classes"] = list(classes)
        torch.nn.init.normal_(backbone.network.head.weight)
    return Teacher(backbone, name="tiny")


def draw(folder: Path, colour: tuple[int, ...], number: int, seed: int, *, side: int = 20) -> None:
    random = np.random.default_rng([seed, number])
    folder.mkdir(parents=True, exist_ok=True)
    shade = np.array(colour) + random.normal(0, 60, 3)  # classes overlap
    pixels = np.clip(random.normal(shade, 45, (side + number, 30, 3)), 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(folder / f"{number}.png")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for seed, (split, count) in enumerate((("train", 9), ("test", 5))):
        for position, (name, colour) in enumerate(COLOURS.items()):
            for number in range(count):
                draw(tmp_path / "photos" / split / name, colour, number, 10 * seed + position)
    return tmp_path / "photos"


def subject(photos: Path, model: Teacher | None = None) -> Subject:
    extraction = Extraction(torch.device("cpu"), loader=IN_PROCESS, cache=photos.parent / "cache")
    return Subject(model or teacher(), str(photos), "test", extraction)


def naive_logits(model: Teacher, source: FolderSource, rows: Any, name: str, severity: int, seed: int) -> Any:
    """Logits of one corrupted image at a time."""
    crop = evaluation_crop(PREPROCESSING)
    found = []
    for row in rows:
        random = np.random.default_rng([seed, int(row), zlib.crc32(name.encode()), severity])
        pixels = corrupt(np.asarray(reduced(source.read(row), 18)), name, severity, random)
        views = crop(Image.fromarray(pixels), random).crops[0][None]
        with torch.no_grad():
            found.append(model.backbone.logits(crop.finish([views], [])[0])[0])
    return torch.stack(found)


def test_equals_one_corrupted_image_at_a_time_through_the_head(photos: Path) -> None:
    model = teacher(NAMES)
    config = RobustnessConfig(
        classifier="head",
        corruptions=("fog", "gaussian_noise", "saturate"),
        severities=(5, 2),
        limit=11,
        corruption_size=18,
        seed=3,
    )
    numbers = measure(subject(photos, model), config)
    source = FolderSource(photos, "test")
    rows = spread_positions(source.labels, 11)
    labels = torch.tensor(source.labels[rows])
    errors: dict[str, list[float]] = {}
    for name in ("gaussian_noise", "fog", "saturate"):
        for severity in (2, 5):
            logits = naive_logits(model, source, rows, name, severity, 3)
            cell = numbers["corruptions"][name]["severities"][str(severity)]
            hits = int((logits.argmax(dim=1) == labels).sum())
            assert cell["top1"] == hits / 11
            assert cell["ece"] == pytest.approx(
                expected_calibration_error(logits.softmax(1), labels), abs=1e-5
            )
            assert cell["interval"][0] <= cell["top1"] <= cell["interval"][1]
            errors.setdefault(name, []).append(1 - hits / 11)
    clean = naive_logits(model, source, rows, "fog", 0, 0)
    top1 = int((clean.argmax(dim=1) == labels).sum()) / 11
    assert numbers["top1"] == top1
    for name, both in errors.items():
        assert numbers["corruptions"][name]["error"] == pytest.approx(sum(both) / 2)
        assert numbers["corruptions"][name]["relative_robustness"] == pytest.approx(
            (1 - sum(both) / 2) / top1
        )
    # saturate is no common corruption: it is measured, and no part of the mean.
    mean = sum(errors["fog"] + errors["gaussian_noise"]) / 4
    assert numbers["mean_corruption_error"] == pytest.approx(mean)
    assert numbers["relative_robustness"] == pytest.approx((1 - mean) / top1)
    low, high = numbers["mean_corruption_error_interval"]
    assert low < mean < high
    assert [numbers["corruptions"][name]["is_common"] for name in ("fog", "saturate")] == [True, False]
    assert numbers["test"]["num_images"] == 11
    json.dumps(numbers, allow_nan=False)


def test_clean_accuracy_is_that_of_the_evaluators(photos: Path) -> None:
    train, test = subject(photos).splits()
    expected = {
        "logistic": logistic.evaluate(train, test, logistic.LogisticConfig())["top1"],
        "linear": linear.evaluate(train, test, linear.LinearConfig())["top1"],
        "knn": knn.evaluate(train, test, knn.KNNConfig(k=(4,), temperature=(0.2,)))["top1"],
    }
    for kind, top1 in expected.items():
        votes = {"k": 4, "temperature": 0.2} if kind == "knn" else {}
        config = RobustnessConfig(classifier=kind, corruptions=("contrast",), severities=(5,), **votes)  # type: ignore[arg-type]
        numbers = measure(subject(photos), config)
        assert numbers["top1"] == top1
        assert 0.4 < top1 < 1
        assert (numbers["ece"] is None) == (kind == "knn")


def test_features_of_every_corruption_are_kept(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = RobustnessConfig(corruptions=("fog", "snow"), severities=(1, 3))
    first = measure(subject(photos), config)
    assert len(list((photos.parent / "cache").glob("*/features.json"))) == 1 + 1 + 4
    monkeypatch.setattr(Subject, "encode", property(lambda self: pytest.fail("the network ran")))
    assert measure(subject(photos), config) == first
    with pytest.raises(pytest.fail.Exception, match="the network ran"):
        measure(subject(photos), config.model_copy(update={"seed": 1}))


def test_logits_are_kept_apart_from_features(photos: Path) -> None:
    model = teacher(NAMES)
    features = subject(photos, model).features("test")
    logits = make_classifier(subject(photos, model), RobustnessConfig(classifier="head")).read(
        FolderSource(photos, "test")
    )
    assert features.values.shape == (15, 8)
    assert logits.values.shape == (15, 3)


def variant(root: Path, names: dict[str, str], count: int = 4) -> Path:
    """Class folders with images of the colours of the classes given."""
    for position, (folder, name) in enumerate(names.items()):
        for number in range(count):
            draw(root / folder, COLOURS[name], number, 50 + position)
    return root


def test_variants_are_answered_among_their_own_classes(photos: Path, tmp_path: Path) -> None:
    model = teacher(NAMES)
    folder = variant(tmp_path / "sketch", {"cat": "ant", "ant": "bee"})
    other = variant(tmp_path / "all", {"ant": "ant", "bee": "bee", "cat": "cat"})
    config = RobustnessConfig(
        classifier="head", corruptions=("fog",), severities=(1,), variant=(f"{folder},{other}",)
    )
    numbers = measure(subject(photos, model), config)
    first, second = numbers["variants"]
    source = FolderSource(folder)
    logits = torch.stack([_plain_logits(model, source, row) for row in range(8)])
    labels = torch.tensor([0] * 4 + [2] * 4)  # ant, cat
    restricted = 2 * logits[:, [0, 2]].argmax(dim=1)
    assert first["top1"] == float((restricted == labels).double().mean())
    assert not torch.equal(restricted, logits.argmax(dim=1)), "the restriction makes a difference here"
    assert first["ece"] == pytest.approx(
        expected_calibration_error(logits[:, [0, 2]].softmax(1), labels // 2), abs=1e-5
    )
    assert (first["num_classes"], first["is_restricted"], first["num_images"]) == (2, True, 8)
    assert (second["num_classes"], second["is_restricted"]) == (3, False)


def _plain_logits(model: Teacher, source: FolderSource, row: int) -> torch.Tensor:
    crop = evaluation_crop(PREPROCESSING)
    views = crop(source.read(row), np.random.default_rng(0)).crops[0][None]
    with torch.no_grad():
        return model.backbone.logits(crop.finish([views], [])[0])[0]


def test_neighbours_of_other_classes_do_not_vote_for_a_variant(photos: Path, tmp_path: Path) -> None:
    folder = variant(tmp_path / "two", {"ant": "cat", "bee": "bee"})
    config = RobustnessConfig(
        classifier="knn", k=5, corruptions=("fog",), severities=(1,), variant=(str(folder),)
    )
    numbers = measure(subject(photos), config)
    train = subject(photos).features("train")
    bank = train._replace(values=train.values[train.labels < 2], labels=train.labels[train.labels < 2])
    queries = subject(photos).features(FolderSource(folder))
    found = knn.predict(bank, queries.values, k=5, temperature=0.07)
    assert numbers["variants"][0]["top1"] == float((found == queries.labels).double().mean())
    whole = knn.predict(train, queries.values, k=5, temperature=0.07)
    assert 2 in whole.tolist()


def test_a_folder_laid_out_as_imagenet_c_is_brought_together(photos: Path, tmp_path: Path) -> None:
    for corruption in ("fog", "saturate"):
        for severity in ("1", "4"):
            variant(tmp_path / "c" / corruption / severity, {"ant": "ant", "cat": "cat"}, count=3)
    config = RobustnessConfig(corruptions=("fog",), severities=(1,), variant=(str(tmp_path / "c"),))
    *cells, together = measure(subject(photos), config)["variants"]
    assert [(cell["corruption"], cell["severity"]) for cell in cells] == [
        ("fog", 1),
        ("fog", 4),
        ("saturate", 1),
        ("saturate", 4),
    ]
    assert together["errors"]["fog"] == pytest.approx(1 - (cells[0]["top1"] + cells[1]["top1"]) / 2)
    assert together["mean_corruption_error"] == pytest.approx(together["errors"]["fog"])
    assert together["mean_corruption_error_over_alexnet"] is None, "it is not the whole of ImageNet-C"


def test_the_published_mean_needs_all_of_imagenet_c() -> None:
    """AlexNet itself is at 1, and half its errors at one half."""
    classes = imagenet_wnids()

    def cells(name: str, factor: float) -> dict[int, Seen]:
        wrong = round(factor * ALEXNET_ERROR[name] * 50000)
        hits = torch.arange(50000) >= wrong
        return {severity: Seen(hits, None, {}) for severity in (1, 2, 3, 4, 5)}

    class Head:
        def __init__(self, names: tuple[str, ...]) -> None:
            self.classes = names

    for factor in (1.0, 0.5):
        seen = {name: cells(name, factor) for name in COMMON}
        whole = robustness._as_imagenet_c(seen, Head(classes))  # type: ignore[arg-type]
        assert whole["mean_corruption_error_over_alexnet"] == pytest.approx(factor, abs=1e-4)
    few = robustness._as_imagenet_c(seen, Head(classes[:900]))  # type: ignore[arg-type]
    assert few["mean_corruption_error_over_alexnet"] is None
    del seen["fog"][3]
    part = robustness._as_imagenet_c(seen, Head(classes))  # type: ignore[arg-type]
    assert part["mean_corruption_error_over_alexnet"] is None


def test_a_head_of_a_thousand_outputs_answers_with_imagenets_ids(tmp_path: Path) -> None:
    wnids = imagenet_wnids()
    used = {wnids[7]: "ant", wnids[340]: "bee"}
    for split in ("train", "test"):
        variant(tmp_path / "photos" / split, used)
    model = teacher(num_classes=1000)
    config = RobustnessConfig(classifier="head", corruptions=("fog",), severities=(1,))
    numbers = measure(subject(tmp_path / "photos", model), config)
    source = FolderSource(tmp_path / "photos", "test")
    logits = torch.stack([_plain_logits(model, source, row) for row in range(8)])[:, [7, 340]]
    hits = logits.argmax(dim=1) == torch.tensor(source.labels)
    assert numbers["top1"] == float(hits.double().mean())
    assert [numbers[key] for key in ("classifier", "num_classes", "num_allowed")] == ["head", 1000, 2]


def test_heads_that_do_not_know_the_classes_are_refused(photos: Path) -> None:
    config = RobustnessConfig(classifier="head")
    with pytest.raises(ConfigError, match="tiny has no classifier of its own"):
        measure(subject(photos), config)
    with pytest.raises(
        ConfigError, match=r"head of tiny has ImageNet's 1000 classes.*ant, bee, cat: they have no name"
    ):
        measure(subject(photos, teacher(num_classes=1000)), config)
    with pytest.raises(ConfigError, match="head of tiny has 17 outputs"):
        measure(subject(photos, teacher(num_classes=17)), config)
    with pytest.raises(DataError, match="has 1 of 3 classes that are not known: cat"):
        measure(subject(photos, teacher(("bee", "ant", "dog"))), config)


def test_a_variant_with_other_classes_is_refused_before_anything_is_measured(
    photos: Path, tmp_path: Path
) -> None:
    folder = variant(tmp_path / "strange", {"emu": "ant"})
    with pytest.raises(DataError, match="no class in common with the 3 classes"):
        measure(subject(photos), RobustnessConfig(variant=(str(folder),)))
    assert len(list((photos.parent / "cache").glob("*/features.json"))) == 1  # of train alone


def test_images_without_labels_or_of_one_class_are_refused(tmp_path: Path) -> None:
    draw(tmp_path / "flat" / "train", (9, 9, 9), 0, 0)
    draw(tmp_path / "flat" / "test", (9, 9, 9), 0, 0)
    with pytest.raises(DataError, match="has no labels, and accuracy needs them"):
        measure(subject(tmp_path / "flat"), RobustnessConfig())
    for split in ("train", "test"):
        variant(tmp_path / "one" / split, {"ant": "ant"})
    with pytest.raises(DataError, match="are of one class: there is nothing to tell apart"):
        measure(subject(tmp_path / "one"), RobustnessConfig())


def test_settings_that_are_wrong_or_without_effect_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"(?s)no corruption is called fogg.*fog"):
        RobustnessConfig(corruptions=("fogg",))
    for severity in (0, 6):
        with pytest.raises(ConfigError, match=f"severity {severity} is not one of 1 to 5"):
            RobustnessConfig(severities=(1, severity))
    with pytest.raises(ConfigError, match="k has no effect on the classifier logistic"):
        RobustnessConfig(k=3)


def test_groups_and_commas_name_corruptions() -> None:
    assert RobustnessConfig().names == tuple(COMMON)
    assert set(RobustnessConfig(corruptions=("extra",)).names) == set(EXTRA)
    assert len(RobustnessConfig(corruptions=("all,extra",)).names) == 19
    assert RobustnessConfig(corruptions=("snow,fog", "fog")).names == ("snow", "fog")  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_command_loads_a_head_when_it_is_asked_for(tmp_path: Path) -> None:
    wnids = imagenet_wnids()
    for split in ("train", "test"):
        variant(tmp_path / "photos" / split, {wnids[3]: "ant", wnids[500]: "bee"}, count=2)
    numbers = fdkit.evaluate(
        "robustness",
        "timm:vit_tiny_patch16_224",
        tmp_path / "photos",
        pretrained=False,
        image_size=32,
        classifier="head",
        corruptions="contrast,fog",
        severities=(2,),
        cache="none",
    )
    assert set(numbers["corruptions"]) == {"contrast", "fog"}
    assert numbers["num_classes"] == 1000
