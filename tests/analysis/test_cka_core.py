import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fdkit.analysis._cka import MinibatchCKA, hsic_unbiased


def gram(num_images: int, width: int) -> Tensor:
    features = torch.randn(num_images, width).double()
    return features @ features.T


def hsic_by_counting(first: Tensor, second: Tensor) -> float:
    """The U-statistic that HSIC_1 is: means of products over distinct images, one tuple at a time."""
    n = range(len(first))
    pairs = list(itertools.permutations(n, 2))
    triples = list(itertools.permutations(n, 3))
    quadruples = list(itertools.permutations(n, 4))
    both = sum(first[i, j] * second[i, j] for i, j in pairs) / len(pairs)
    apart = sum(first[i, j] * second[k, m] for i, j, k, m in quadruples) / len(quadruples)
    chain = sum(first[i, j] * second[i, k] for i, j, k in triples) / len(triples)
    return float(both + apart - 2 * chain)


@pytest.mark.parametrize("num_images", [4, 5, 7])
def test_hsic_is_the_mean_over_tuples_of_distinct_images(num_images):
    # Fails for the biased HSIC tr(KHLH) / (n-1)^2, and if the diagonals are kept.
    first, second = gram(num_images, 3), gram(num_images, 5)
    assert hsic_unbiased(first, second) == pytest.approx(hsic_by_counting(first, second), rel=1e-9)
    filled = first + torch.diag(torch.rand(num_images).double())
    assert hsic_unbiased(filled, second) == pytest.approx(hsic_unbiased(first, second), rel=1e-9)


def test_hsic_of_independent_features_is_zero_on_average():
    values = torch.tensor([hsic_unbiased(gram(6, 2), gram(6, 3)) for _ in range(2000)])
    assert abs(values.mean().item()) < 4 * values.std().item() / math.sqrt(len(values))
    assert values.min() < 0


def by_definition(batches_a: list[list[Tensor]], batches_b: list[list[Tensor]]) -> Tensor:
    """Equation 2 of Nguyen et al. 2021, with the HSIC above, for batches of one size."""

    def mean(pairs: list[tuple[Tensor, Tensor]]) -> float:
        values = [hsic_unbiased(a.double() @ a.double().T, b.double() @ b.double().T) for a, b in pairs]
        return sum(values) / len(values)

    result = torch.zeros(len(batches_a[0]), len(batches_b[0])).double()
    for i, j in itertools.product(range(result.shape[0]), range(result.shape[1])):
        a, b = [batch[i] for batch in batches_a], [batch[j] for batch in batches_b]
        across = mean(list(zip(a, b, strict=True)))
        within = mean(list(zip(a, a, strict=True))) * mean(list(zip(b, b, strict=True)))
        result[i, j] = across / math.sqrt(within)
    return result


def test_minibatches_follow_the_equation():
    # Fails for a mean of the batches' own CKA, and for the biased HSIC.
    shared = [torch.randn(6, 4) for _ in range(3)]
    batches_a = [[x + 0.3 * torch.randn(6, 4), torch.randn(6, 2)] for x in shared]
    batches_b = [[x @ torch.randn(4, 3) + 5, torch.randn(6, 7), x] for x in shared]
    cka = MinibatchCKA(2, 3)
    for a, b in zip(batches_a, batches_b, strict=True):
        cka.add(a, b)
    torch.testing.assert_close(cka.value(), by_definition(batches_a, batches_b), rtol=1e-6, atol=1e-9)
    own = [MinibatchCKA(2, 3) for _ in shared]
    for one, a, b in zip(own, batches_a, batches_b, strict=True):
        one.add(a, b)
    mean_of_ratios = torch.stack([one.value() for one in own]).mean(0)
    assert not torch.allclose(cka.value(), mean_of_ratios, rtol=1e-3)
    assert cka.num_images == 18


def test_a_batch_counts_by_its_images():
    parts = [(torch.randn(n, 3), torch.randn(n, 5)) for n in (4, 8)]
    cka = MinibatchCKA(1, 1)
    for a, b in parts:
        cka.add([a], [b])

    def total(first: int, second: int) -> float:
        return sum(len(p[0]) * hsic_unbiased(p[first] @ p[first].T, p[second] @ p[second].T) for p in parts)

    expected = total(0, 1) / math.sqrt(total(0, 0) * total(1, 1))
    assert cka.value().item() == pytest.approx(expected, rel=1e-4)


@given(scale=st.floats(1e-3, 1e3), shift=st.floats(-100, 100), width=st.integers(2, 6))
def test_blind_to_rotation_scale_and_shift(scale, shift, width):
    features, other = torch.randn(8, width).double(), torch.randn(8, 3).double()
    rotation = torch.linalg.qr(torch.randn(width, width).double()).Q
    cka = MinibatchCKA(3, 1)
    cka.add([features, scale * features @ rotation + shift, other], [features])
    same, turned, apart = cka.value().flatten().tolist()
    assert same == pytest.approx(1, abs=1e-9)
    assert turned == pytest.approx(1, abs=1e-6)
    assert apart < 1 - 1e-6


def test_an_uneven_stretch_is_seen():
    features = torch.randn(12, 2)
    cka = MinibatchCKA(1, 1)
    cka.add([features], [features * torch.tensor([1, 10])])
    assert cka.value().item() < 0.98


def test_features_alike_for_all_images_have_no_value():
    # The rounding of float32 around a large constant must not pass for a representation.
    constant = torch.full((5, 8), 1e4) * (1 + 1e-7 * torch.rand(5, 8))
    cka = MinibatchCKA(2, 1)
    features = torch.randn(5, 3)
    cka.add([constant, features], [features])
    assert cka.value()[0].isnan().all()
    assert cka.value()[1].item() == pytest.approx(1)


def test_maps_are_flattened():
    maps, other = torch.randn(5, 3, 2, 4), torch.randn(5, 6)
    flat, whole = MinibatchCKA(1, 1), MinibatchCKA(1, 1)
    whole.add([maps], [other])
    flat.add([maps.flatten(1)], [other])
    assert torch.equal(whole.value(), flat.value())


def test_what_does_not_fit_is_refused():
    cka = MinibatchCKA(1, 2)
    with pytest.raises(ValueError, match="no batch was added"):
        cka.value()
    with pytest.raises(ValueError, match="1 and 1 representations were given, 1 and 2 expected"):
        cka.add([torch.rand(5, 2)], [torch.rand(5, 2)])
    with pytest.raises(ValueError, match=r"different numbers of images: \[5, 6\]"):
        cka.add([torch.rand(5, 2)], [torch.rand(5, 2), torch.rand(6, 2)])
    with pytest.raises(ValueError, match="at least 4 images; this one has 3"):
        cka.add([torch.rand(3, 2)], [torch.rand(3, 2)] * 2)
    with pytest.raises(ValueError, match="at least 4 images; this one has 2"):
        hsic_unbiased(torch.eye(2), torch.eye(2))
    with pytest.raises(ValueError, match=r"square and alike: \(4, 4\) and \(5, 5\)"):
        hsic_unbiased(torch.eye(4), torch.eye(5))
