import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from fdkit.data import demo
from fdkit.data.demo import LUMA, digits_of, open_demo
from fdkit.data.sources import ArraySource
from fdkit.errors import DataError


@pytest.fixture(scope="module")
def train() -> ArraySource:
    return open_demo("train")


@pytest.fixture(scope="module")
def test() -> ArraySource:
    return open_demo("test")


def flat(source: ArraySource) -> np.ndarray:
    return source.images.reshape(len(source), -1) / np.float32(255)


def test_reads_32_pixel_rgb_images_of_ten_classes(train, test):
    assert (len(train), len(test)) == (5388, 900)
    assert train.classes == test.classes == tuple("0123456789")
    for source, index in [(train, 0), (train, 5387), (test, 899)]:
        image = source.read(index)
        assert image.mode == "RGB"
        assert image.size == (32, 32)
        assert source.describe(index) == f"demo[{index}]"


def test_opening_again_gives_the_same_images(train):
    again = open_demo("train")
    assert again.fingerprint == train.fingerprint
    assert np.array_equal(again.images, train.images)


def test_an_image_does_not_depend_on_how_many_are_made(train, monkeypatch):
    monkeypatch.setitem(demo.RENDERINGS, "train", 1)
    fewer = open_demo("train")
    assert len(fewer) == 1347
    assert np.array_equal(fewer.images, train.images[:1347])


def test_renderings_of_a_digit_differ_and_splits_draw_apart(train, test):
    unique = {image.tobytes() for source in (train, test) for image in source.images}
    assert len(unique) == len(train) + len(test)
    first_pixels = train.images[:900, 0, 0]
    assert not np.array_equal(first_pixels, test.images[:, 0, 0])


def test_all_is_train_then_test(train, test):
    both = open_demo("all")
    assert np.array_equal(both.images, np.concatenate([train.images, test.images]))
    assert np.array_equal(both.labels, np.concatenate([train.labels, test.labels]))


def test_no_digit_is_in_both_splits_and_none_is_left_out():
    train, test = digits_of("train"), digits_of("test")
    assert not set(train) & set(test)
    assert set(train) | set(test) == set(range(1797))
    assert np.unique(train, return_counts=True)[1].tolist() == [4] * 1347
    assert np.unique(test, return_counts=True)[1].tolist() == [2] * 450


@pytest.mark.parametrize("split", ["train", "test"])
def test_labels_are_those_of_the_digits_shown_and_balanced(split, train, test):
    source = {"train": train, "test": test}[split]
    assert np.array_equal(source.labels, load_digits().target[digits_of(split)])
    counts = np.bincount(source.labels, minlength=10)
    assert counts.min() > 0.95 * len(source) / 10
    assert counts.max() < 1.05 * len(source) / 10


def test_images_show_their_digit_upright(train):
    """Ink, found by luma and cut to its bounding box, resembles its own digit, and neither a wrong nor a turned one."""
    ink = (train.images[:300] @ LUMA - demo.BACKGROUND) / (demo.STROKE - demo.BACKGROUND)
    digits = load_digits().images[digits_of("train")[:300]] / 16
    wrong = {
        "next": np.roll(digits, 1, axis=0),
        "mirrored": digits[:, :, ::-1],
        "upside down": digits[:, ::-1],
        "transposed": digits.swapaxes(1, 2),
    }
    own = mean_resemblance(ink, digits)
    assert own > 0.5
    for what, others in wrong.items():
        assert mean_resemblance(ink, others) < own - 0.2, what


def mean_resemblance(ink: np.ndarray, digits: np.ndarray) -> float:
    pairs = zip(map(shrink, ink), map(shrink, digits), strict=True)
    return float(np.mean([np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in pairs]))


def shrink(ink: np.ndarray) -> np.ndarray:
    """(8, 8): what lies within the bounding box of ink above a half, by nearest pixels."""
    rows, columns = (np.flatnonzero((ink > 0.5).any(axis=axis)) for axis in (1, 0))
    y = np.linspace(rows[0], rows[-1], 8).round().astype(int)
    x = np.linspace(columns[0], columns[-1], 8).round().astype(int)
    return ink[np.ix_(y, x)]


def test_brightness_tells_no_image_apart(train):
    """Else two crops of an image match by brightness, and self-supervised training need not look at shape."""
    luma = train.images @ LUMA  # (N, 32, 32)
    assert np.abs(np.median(luma, axis=(1, 2)) - demo.BACKGROUND).max() < 1
    assert np.abs(luma.max(axis=(1, 2)) - demo.STROKE).max() < 4


def test_raw_pixels_tell_little_but_more_than_chance(train, test):
    raw = KNeighborsClassifier(20, metric="cosine").fit(flat(train), train.labels)
    assert 0.2 < raw.score(flat(test), test.labels) < 0.5


def test_colour_alone_tells_nothing(train, test):
    mean_colour = LogisticRegression().fit(train.images.mean(axis=(1, 2)) / 255, train.labels)
    assert mean_colour.score(test.images.mean(axis=(1, 2)) / 255, test.labels) < 0.2


def test_unknown_split_is_refused():
    with pytest.raises(DataError, match=r"no split 'validation'"):
        open_demo("validation")
