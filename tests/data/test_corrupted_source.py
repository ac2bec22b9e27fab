import os

import numpy as np
import pytest
from PIL import Image

from fdkit.data.corrupted_source import CorruptedSource, reduced, spread_positions
from fdkit.data.corruptions import corrupt
from fdkit.data.sources import ArraySource, FolderSource
from fdkit.data.subset import Subset
from fdkit.errors import ConfigError


def source(count: int = 5, height: int = 40, width: int = 64) -> ArraySource:
    random = np.random.default_rng(0)
    images = random.integers(256, size=(count, height, width, 3), dtype=np.uint8)
    return ArraySource("noise", images, np.arange(count) % 2, ("ant", "bee"))


def test_images_are_corrupted_by_place_seed_name_and_severity_alone():
    clean = source()
    made = CorruptedSource(clean, "gaussian_noise", 2, seed=3)
    first = np.asarray(made.read(1))
    assert np.array_equal(np.asarray(made.read(1)), first)
    assert np.array_equal(np.asarray(CorruptedSource(clean, "gaussian_noise", 2, seed=3).read(1)), first)
    others = [
        CorruptedSource(clean, "gaussian_noise", 2, seed=4).read(1),
        CorruptedSource(clean, "gaussian_noise", 3, seed=3).read(1),
        CorruptedSource(clean, "shot_noise", 2, seed=3).read(1),
    ]
    assert not any(np.array_equal(np.asarray(other), first) for other in others)
    # The noise of two places is not the same noise.
    again = ArraySource("same", np.repeat(clean.images[1:2], 2, axis=0), np.array([0, 1]))
    twice = CorruptedSource(again, "gaussian_noise", 2, seed=3)
    assert not np.array_equal(np.asarray(twice.read(0)), np.asarray(twice.read(1)))


def test_a_subset_of_corrupted_images_shows_what_the_whole_shows():
    whole = CorruptedSource(source(), "snow", 3)
    part = Subset(whole, [1, 4])
    assert np.array_equal(np.asarray(part.read(1)), np.asarray(whole.read(4)))
    assert part.labels.tolist() == [1, 0]


def test_the_pixels_are_those_of_corrupt():
    clean = source()
    found = np.asarray(CorruptedSource(clean, "contrast", 4).read(2))
    assert np.array_equal(found, corrupt(clean.images[2], "contrast", 4, np.random.default_rng(0)))
    assert np.array_equal(np.asarray(CorruptedSource(clean, "contrast", 0).read(2)), clean.images[2])


def test_large_images_are_reduced_before_and_small_ones_left():
    clean = source()
    made = CorruptedSource(clean, "jpeg_compression", 5, short_side=20)
    small = clean.read(0).resize((32, 20), Image.Resampling.BILINEAR)
    expected = corrupt(np.asarray(small), "jpeg_compression", 5, np.random.default_rng(0))
    assert np.array_equal(np.asarray(made.read(0)), expected)
    assert reduced(Image.new("RGB", (50, 31)), 20).size == (32, 20)
    assert reduced(Image.new("RGB", (31, 50)), 20).size == (20, 32)
    assert reduced(Image.new("RGB", (20, 31)), 20).size == (20, 31)


def test_stamps_differ_in_whatever_changes_pixels_and_in_nothing_else():
    clean = source()
    kinds = [
        CorruptedSource(clean, "fog", 1),
        CorruptedSource(clean, "fog", 2),
        CorruptedSource(clean, "snow", 1),
        CorruptedSource(clean, "fog", 1, seed=1),
        CorruptedSource(clean, "fog", 1, short_side=20),
        CorruptedSource(clean, "fog", 0),
        CorruptedSource(source(4), "fog", 1),
        Subset(CorruptedSource(clean, "fog", 1), [0, 1]),
        Subset(CorruptedSource(clean, "fog", 1), [0, 2]),
        clean,
    ]
    assert len({kind.fingerprint for kind in kinds}) == len(kinds)
    assert len({kind.content_stamp for kind in kinds[:-1]}) == len(kinds) - 1
    same = CorruptedSource(clean, "fog", 1)
    assert (same.fingerprint, same.content_stamp) == (kinds[0].fingerprint, kinds[0].content_stamp)
    assert CorruptedSource(clean, "snow", 0, seed=9).fingerprint == kinds[5].fingerprint


def test_a_changed_file_changes_the_stamp_of_a_part_of_its_corrupted_images(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "1.png")
    stamps = []
    for moment in (1_000_000_000, 1_100_000_000):
        os.utime(tmp_path / "a" / "1.png", ns=(moment * 10, moment * 10))
        part = Subset(CorruptedSource(FolderSource(tmp_path), "fog", 1), [0])
        stamps.append((part.fingerprint, part.content_stamp))
    assert stamps[0][0] == stamps[1][0]
    assert stamps[0][1] != stamps[1][1]


def test_labels_classes_and_names_stay():
    clean = source()
    made = CorruptedSource(clean, "fog", 1)
    assert (len(made), made.classes, made.name) == (5, ("ant", "bee"), "noise")
    assert made.labels.tolist() == clean.labels.tolist()
    assert made.describe(3) == "noise[3]"


def test_unknown_corruptions_and_severities_are_refused_at_once():
    with pytest.raises(ConfigError, match="no corruption is called rain"):
        CorruptedSource(source(), "rain", 1)
    with pytest.raises(ConfigError, match="severity 7 is not"):
        CorruptedSource(source(), "fog", 7)


def test_a_part_keeps_the_shares_of_the_classes():
    labels = np.random.default_rng(0).permutation([0] * 60 + [1] * 30 + [2] * 10)
    chosen = spread_positions(labels, 20)
    assert np.bincount(labels[chosen]).tolist() == [12, 6, 2]
    assert np.array_equal(chosen, np.unique(chosen))
    assert np.array_equal(spread_positions(labels, 20), chosen)
    assert np.array_equal(spread_positions(labels, 1000), np.arange(100))
