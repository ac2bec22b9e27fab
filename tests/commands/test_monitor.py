"""What the monitors measure, against the same measures on features drawn here, and what is refused before a run."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from fdkit.commands._monitor import Collapse, MonitorConfig, OnlineKNN, build_monitor
from fdkit.data.loader import LoaderConfig
from fdkit.data.sources import ArraySource, BadImage, ImageSource
from fdkit.data.views import (
    CropConfig,
    MultiCrop,
    MultiCropConfig,
    RandomCrop,
    TwoViews,
    TwoViewsConfig,
    Views,
)
from fdkit.errors import ConfigError, DataError, NumericsError
from fdkit.evaluation import knn
from fdkit.evaluation.features import extract_features
from fdkit.methods._method import Method
from fdkit.models.backbone import Backbone, Preprocessing, Tokens
from fdkit.models.representation import alignment, channel_std, effective_rank, uniformity

LOADER = LoaderConfig(workers=0)
SIZE = 8


class Network(nn.Module):
    """Patches of 4 x 4 pixels, with dropout as a sign of training mode; the prefix is their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 6, 4, stride=4)
        self.dropout = nn.Dropout(0.5)

    def forward(self, images: Tensor) -> Tokens:
        maps = self.dropout(self.patches(images).flatten(2).mT)
        return Tokens(maps.mean(dim=1, keepdim=True), maps, (2, 2))


def backbone(seed: int) -> Backbone:
    torch.manual_seed(seed)
    return Backbone(
        Network(),
        lambda network, images: network(images),
        embed_dim=6,
        patch_size=4,
        num_prefix_tokens=1,
        preprocessing=Preprocessing((0.5,) * 3, (0.25,) * 3, SIZE),
        recipe={"library": "timm", "architecture": "toy", "model_args": {}},
    )


class Toy(Method):
    """A method that exports another network than the one it trains."""

    def __init__(self, views: Views) -> None:
        super().__init__()
        self.student = backbone(1)
        self.teacher = backbone(2)
        self.views = views

    @property
    def exported(self) -> Backbone:
        return self.teacher


TWO = TwoViews(TwoViewsConfig(image_size=SIZE))
ONE = RandomCrop(CropConfig(image_size=SIZE, min_scale=0.3))
MANY = MultiCrop(MultiCropConfig(image_size=SIZE, local_size=4, num_local=3))


def pictures(count: int, *, seed: int = 0, num_classes: int = 4, labelled: bool = True) -> ArraySource:
    random = np.random.default_rng(seed)
    labels = np.arange(count) % num_classes
    pixels = random.integers(0, 256, (count, 9, 10, 3)) // 2 + 30 * labels[:, None, None, None]
    classes = [f"class {label}" for label in range(num_classes)] if labelled else ()
    return ArraySource("pictures", pixels.astype(np.uint8), labels if labelled else None, classes)


def collapse(source: ImageSource, max_images: int = 512) -> Collapse:
    return Collapse(source, max_images=max_images, every_steps=3, loader=LOADER)


@pytest.mark.parametrize("views", [TWO, MANY, ONE], ids=["two", "many", "one"])
def test_collapse_is_measured_on_two_views_of_what_is_exported(views: Views) -> None:
    method, source, looked_at = Toy(views), pictures(150), []
    pooled = method.teacher.pooled
    method.teacher.pooled = lambda images, pooling: looked_at.append(images) or pooled(images, pooling)  # type: ignore[method-assign,func-returns-value]
    found = collapse(source)(method, 3)
    first, second = (torch.cat(looked_at[start::2]) for start in (0, 1))
    assert first.shape == second.shape == (150, 3, SIZE, SIZE)
    assert not torch.equal(first, second)
    a, b = (pooled(images, "cls").detach() for images in (first, second))
    assert found == pytest.approx(
        {
            "channel_std_ratio": 6**0.5 * channel_std(a).item(),
            "effective_rank": effective_rank(a).item(),
            "alignment": alignment(a, b).item(),
            "uniformity": uniformity(a).item(),
        },
        rel=1e-5,
    )
    assert 0 < found["channel_std_ratio"] < 1
    assert found["alignment"] > 0


def test_the_same_views_come_every_time_and_no_generator_of_training_is_drawn_from() -> None:
    method, monitor = Toy(TWO), collapse(pictures(20))
    before = torch.get_rng_state()
    assert monitor(method, 1) == monitor(method, 2)
    assert torch.equal(torch.get_rng_state(), before)
    assert monitor(Toy(TWO), 1) == collapse(pictures(20))(Toy(TWO), 9)


def test_the_images_are_few_and_evenly_spread() -> None:
    class Counted(ArraySource):
        def read(self, index: int) -> Image.Image:
            read.append(index)
            return super().read(index)

    read: list[int] = []
    plain = pictures(40)
    source = Counted(plain.name, plain.images, plain.labels, plain.classes)
    collapse(source, max_images=8)(Toy(TWO), 1)
    assert read == list(range(0, 40, 5))


def test_the_network_is_looked_at_in_evaluation_mode() -> None:
    method = Toy(ONE).train()
    assert collapse(pictures(30))(method, 1) == collapse(pictures(30))(Toy(ONE).eval(), 1)


class Broken(ArraySource):
    def read(self, index: int) -> Image.Image:
        if index >= self.good:
            raise BadImage(self.describe(index), "broken")
        return super().read(index)


def broken(good: int) -> Broken:
    plain = pictures(20)
    source = Broken(plain.name, plain.images, plain.labels, plain.classes)
    source.good = good  # type: ignore[attr-defined]
    return source


def test_broken_images_are_left_out_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    plain = pictures(20)
    whole = ArraySource(plain.name, plain.images[:12], plain.labels[:12], plain.classes)  # type: ignore[index]
    assert collapse(broken(good=12))(Toy(TWO), 1) == pytest.approx(collapse(whole)(Toy(TWO), 1))
    assert caplog.records == []
    with pytest.raises(DataError, match="fewer than 2 images of pictures could be read"):
        collapse(broken(good=1))(Toy(TWO), 1)


def test_features_that_are_not_finite_are_said_to_be() -> None:
    method = Toy(TWO)
    nn.init.constant_(method.teacher.network.patches.weight, torch.nan)
    with pytest.raises(
        NumericsError, match=r"features of training images are not finite at step 70"
    ) as caught:
        collapse(pictures(20))(method, 70)
    assert "--optim.lr" in caught.value.hint


def test_equal_features_are_seen_as_a_collapse() -> None:
    method = Toy(TWO)
    nn.init.zeros_(method.teacher.network.patches.weight)
    found = collapse(pictures(20))(method, 1)
    assert found["channel_std_ratio"] == pytest.approx(0, abs=1e-6)
    assert found["effective_rank"] == pytest.approx(1, abs=1e-3)


def test_knn_is_of_what_is_exported() -> None:
    config = MonitorConfig(every_epochs=1, k=5)
    train, test = pictures(60), pictures(30, seed=1)
    method = Toy(TWO)
    found = OnlineKNN(train, test, config, every_steps=1, loader=LOADER)(method, 1)
    features = [extract_features(method.teacher, source, loader=LOADER) for source in (train, test)]
    expected = knn.evaluate(features[0], features[1], knn.KNNConfig(k=(5,)))["top1"]
    student = [extract_features(method.student, source, loader=LOADER) for source in (train, test)]
    assert found == {"knn_top1": expected}
    assert expected != knn.evaluate(student[0], student[1], knn.KNNConfig(k=(5,)))["top1"]


def opened(monkeypatch: pytest.MonkeyPatch, **splits: ImageSource) -> list[tuple[str, str]]:
    """What is asked for, answered with the splits given."""
    asked = []

    def open_source(data: str, split: str) -> ImageSource:
        asked.append((data, split))
        if split not in splits:
            raise DataError(f"{data}: no split '{split}'", "a hint")
        return splits[split]

    monkeypatch.setattr("fdkit.commands._monitor.open_source", open_source)
    return asked


def build(config: MonitorConfig, source: ImageSource | None = None, per_epoch: int = 10) -> list[Any]:
    return build_monitor(config, "images", steps_per_epoch=per_epoch, loader=LOADER, source=source)


def test_by_default_a_collapse_is_looked_for_once_in_twenty_thousand_images() -> None:
    (monitor,) = build(MonitorConfig(), pictures(400))
    assert (monitor.name, monitor.every_steps) == ("collapse", 500)
    large = ArraySource("large", np.zeros((25_000, 1, 1, 3), dtype=np.uint8), None)
    (monitor,) = build(MonitorConfig(), large)
    assert monitor.every_steps == 10


def test_each_monitor_has_its_own_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = opened(monkeypatch, train=pictures(40), test=pictures(20))
    config = MonitorConfig(every_epochs=2.5, collapse_every_epochs=0.04)
    assert [(one.name, one.every_steps) for one in build(config, pictures(40))] == [
        ("collapse", 1),
        ("knn", 25),
    ]
    assert asked == [("images", "train"), ("images", "test")]
    only = MonitorConfig(every_epochs=1, collapse_every_epochs=0, data="others")
    assert [one.name for one in build(only, pictures(40))] == ["knn"]
    assert asked[2:] == [("others", "train"), ("others", "test")]
    assert build(MonitorConfig(collapse_every_epochs=0), pictures(40)) == []
    assert build(MonitorConfig(), pictures(1)) == []


def test_the_training_images_are_opened_where_they_are_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = opened(monkeypatch, train=pictures(40))
    assert [one.name for one in build(MonitorConfig())] == ["collapse"]
    assert asked == [("images", "train")]


def test_knn_among_the_first_classes_sees_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = pictures(40), pictures(21, seed=1)
    opened(monkeypatch, train=train, test=test)
    config = MonitorConfig(every_epochs=1, num_classes=2, k=5, collapse_every_epochs=0)
    (monitor,) = build(config, train)
    method = Toy(TWO)

    def first_two(source: ArraySource) -> ArraySource:
        assert source.labels is not None
        chosen = source.labels < 2
        return ArraySource("few", source.images[chosen], source.labels[chosen], source.classes[:2])

    expected = OnlineKNN(first_two(train), first_two(test), config, every_steps=1, loader=LOADER)
    assert monitor(method, 1) == expected(method, 1)
    assert monitor(method, 1) != OnlineKNN(train, test, config, every_steps=1, loader=LOADER)(method, 1)


def test_more_classes_than_there_are_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    opened(monkeypatch, train=pictures(40), test=pictures(20))
    build(MonitorConfig(every_epochs=1, num_classes=4), pictures(40))
    with pytest.raises(
        ConfigError, match=r"^monitor.num_classes 5 is more than the 4 classes of pictures"
    ) as caught:
        build(MonitorConfig(every_epochs=1, num_classes=5), pictures(40))
    assert caught.value.hint == "use at most --monitor.num-classes 4"


def test_classes_without_images_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    test = pictures(20)
    test.labels = np.full(20, 3)
    opened(monkeypatch, train=pictures(40), test=test)
    with pytest.raises(DataError, match="no test image of pictures is of its first 2 classes"):
        build(MonitorConfig(every_epochs=1, num_classes=2), pictures(40))


def test_knn_without_labels_or_test_split_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    config = MonitorConfig(every_epochs=3)
    opened(monkeypatch, train=pictures(40))
    with pytest.raises(
        DataError, match=r"^monitor.every_epochs 3 asks for kNN accuracy, but images: no split 'test'"
    ) as caught:
        build(config, pictures(40))
    assert "--monitor.data DIR" in caught.value.hint
    assert "--monitor.every-epochs 0" in caught.value.hint
    opened(monkeypatch, train=pictures(40), test=pictures(20, labelled=False))
    with pytest.raises(DataError, match=r"but the test images of pictures have no labels"):
        build(config, pictures(40))


def test_a_folder_of_images_alone_is_looked_at_for_a_collapse(tmp_path: Path) -> None:
    for number, pixels in enumerate(pictures(6).images):
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    (monitor,) = build_monitor(MonitorConfig(), str(tmp_path), steps_per_epoch=1, loader=LOADER)
    assert monitor(Toy(TWO), 1)["effective_rank"] > 1
    with pytest.raises(DataError, match=r"kNN accuracy, but the train images of .* have no labels"):
        build_monitor(MonitorConfig(every_epochs=1), str(tmp_path), steps_per_epoch=1, loader=LOADER)
