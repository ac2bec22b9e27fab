import hashlib

import pytest
import torch

from fdkit.errors import ConfigError, DataError
from fdkit.evaluation._draws import fingerprint, folds, places


def labels_of(*counts: int) -> torch.Tensor:
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(3))]


def test_places_number_each_class_in_a_shuffled_order():
    labels = labels_of(5, 0, 3, 1)
    found = places(labels, 0)
    for label in (0, 2, 3):
        assert sorted(found[labels == label].tolist()) == list(range(int((labels == label).sum())))
    assert torch.equal(places(labels, 0), found)
    first = {tuple((places(labels, seed) == 0).nonzero()[:, 0].tolist()) for seed in range(150)}
    assert len(first) == 15  # each of 5 * 3 * 1 ways to take one image a class


def test_the_global_generator_is_left_alone():
    state = torch.get_rng_state()
    places(labels_of(5, 3), 1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("num_folds", [2, 3, 7])
def test_folds_are_stratified_even_and_spare_one_image_a_class(num_folds):
    labels = labels_of(20, 11, 2, 3, 1, 0, 1)
    found = folds(labels, num_folds, seed=0)
    assert (found[labels == 4] == -1).all()
    assert (found[labels == 6] == -1).all()
    sizes = torch.bincount(found[found >= 0], minlength=num_folds)
    assert sizes.max() - sizes.min() <= 1
    for label in (0, 1, 2, 3):
        own = torch.bincount(found[labels == label], minlength=num_folds)
        assert own.max() - own.min() <= 1
        assert own.max() < own.sum()  # something is left to fit
    assert torch.equal(folds(labels, num_folds, seed=0), found)
    assert not torch.equal(folds(labels, num_folds, seed=1), found)


def test_folds_refuse_what_cannot_be_held_out():
    with pytest.raises(DataError, match="no class has two images among the 3 training images"):
        folds(torch.tensor([0, 1, 2]), 2, seed=0)
    with pytest.raises(
        ConfigError, match="--cross-validation is 5, but classes of two images or more hold 4"
    ):
        folds(torch.tensor([0, 0, 1, 1, 2]), 5, seed=0)


def test_a_fingerprint_is_of_the_rows_as_little_endian_int64():
    expected = hashlib.sha256(bytes([3] + 7 * [0] + [0, 1] + 6 * [0])).hexdigest()
    assert fingerprint(torch.tensor([3, 256])) == expected
    assert fingerprint(torch.tensor([3, 257])) != expected
