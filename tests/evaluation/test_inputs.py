import pytest
import torch

from fdkit.errors import ConfigError, DataError, NumericsError
from fdkit.evaluation._inputs import comparable
from fdkit.evaluation.features import Features


def some(count: int = 12, classes: tuple[str, ...] = ("ant", "bee", "cat"), width: int = 4) -> Features:
    values = torch.randn(count, width, generator=torch.Generator().manual_seed(count))
    return Features(values, torch.arange(count) % len(classes), classes, {"source": f"photos-{count}"})


def test_good_features_pass_with_test_counted_in_the_classes_of_train():
    test = some(8, ("bee", "cat"))
    train, found = comparable(some(), test)
    assert found.labels.tolist() == [1, 2] * 4
    assert torch.equal(train.values, some().values)
    assert torch.equal(found.values, test.values)


def test_a_class_of_train_without_images_is_no_harm_if_test_has_none_either():
    train = some(12, ("ant", "bee", "cat", "dog"))
    kept = train.labels != 3
    without = train._replace(values=train.values[kept], labels=train.labels[kept])
    assert comparable(without, some(6))[1].labels.tolist() == [0, 1, 2] * 2
    with pytest.raises(DataError, match="photos-8 has images of classes of which train has none: dog"):
        comparable(without, some(8, ("ant", "bee", "cat", "dog")))


def test_missing_labels_are_named():
    bare = some()._replace(labels=torch.empty(0, dtype=torch.int64))
    with pytest.raises(DataError, match="photos-12 has 12 training images and 0 labels"):
        comparable(bare, some(6))
    with pytest.raises(DataError, match="photos-12 has 12 test images and 0 labels"):
        comparable(some(6), bare)
    for wrong in (-1, 3):
        odd = some(6)
        odd = odd._replace(labels=odd.labels.where(odd.labels != 2, wrong))
        with pytest.raises(DataError, match="2 of 6 test labels of photos-6 stand for none of its 3 classes"):
            comparable(some(), odd)


def test_one_class_cannot_be_told_apart():
    train = some()._replace(labels=torch.ones(12, dtype=torch.int64))
    with pytest.raises(
        DataError, match="all 12 training images are of class bee: there is nothing to tell apart"
    ):
        comparable(train, some(6))


def test_a_class_that_train_lacks_is_named():
    with pytest.raises(DataError, match="classes without training images: zebra"):
        comparable(some(), some(6, ("ant", "bee", "zebra")))


def test_numbers_that_are_not_finite_are_counted():
    for wrong in (float("nan"), float("inf")):
        train = some()
        train.values[[2, 7], 1] = wrong
        with pytest.raises(NumericsError, match="2 of 12 training features are not finite"):
            comparable(train, some(6))
        with pytest.raises(NumericsError, match="2 of 12 test features are not finite"):
            comparable(some(6), train)


def test_features_that_are_all_the_same_are_refused():
    train = some()._replace(values=torch.full((12, 4), 0.3))
    with pytest.raises(NumericsError, match="the 12 training features are all the same"):
        comparable(train, some(6))
    train.values[5, 2] = 0.31  # one difference is enough to go on
    comparable(train, some(6))


def test_empty_sets_and_other_widths_are_refused():
    with pytest.raises(DataError, match="12 training and 0 test images"):
        comparable(some(), some(0))
    with pytest.raises(ConfigError, match="widths 4 and 5"):
        comparable(some(), some(6, width=5))
