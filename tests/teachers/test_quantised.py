import pytest
import torch
from sklearn.decomposition import PCA
from torch import Tensor

from fdkit.errors import ConfigError, NumericsError
from fdkit.teachers.quantised import Stored, fit_reduction, quantise, restore, storage_error, stored_of


def _vectors(*shape: int) -> Tensor:
    """Of very different lengths, some channels far from zero."""
    generator = torch.Generator().manual_seed(3)
    vectors = torch.randn(*shape, generator=generator) * torch.logspace(-3, 3, shape[-2])[:, None]
    return vectors + torch.arange(shape[-1]) % 3


def test_an_int8_number_is_off_by_half_a_step_of_its_own_vector_at_most() -> None:
    vectors = _vectors(4, 9, 33)
    again = restore(quantise(vectors, "int8"))
    bound = vectors.abs().amax(dim=-1, keepdim=True) / 254
    assert ((again - vectors).abs() <= bound * 1.0001).all()
    assert ((again - vectors).abs() > bound * 0.9).any()  # no finer than it says, either
    largest = vectors.abs().argmax(dim=-1, keepdim=True)
    torch.testing.assert_close(again.gather(-1, largest), vectors.gather(-1, largest))


def test_fp16_keeps_eleven_bits() -> None:
    vectors = _vectors(2, 5, 8)
    torch.testing.assert_close(restore(quantise(vectors, "fp16")), vectors, rtol=2**-11, atol=1e-7)


def test_vectors_of_zeros_and_tiny_ones_stay_finite() -> None:
    vectors = torch.stack([torch.zeros(4), torch.full((4,), 1e-40), torch.full((4,), -1e-44)])[None]
    again = restore(quantise(vectors, "int8"))
    assert again.isfinite().all()
    assert (again - vectors).abs().max() < 1e-39


@pytest.mark.parametrize(("number", "dtype"), [(float("nan"), "int8"), (float("inf"), "int8"), (7e4, "fp16")])
def test_what_cannot_be_stored_is_refused(number: float, dtype: str) -> None:
    vectors = torch.zeros(1, 2, 3)
    vectors[0, 1, 2] = number
    with pytest.raises(NumericsError, match="not finite, or too large"):
        quantise(vectors, dtype)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["int8", "fp16"])
def test_bytes_come_back_to_the_bit(dtype: str) -> None:
    stored = quantise(_vectors(3, 5, 7), dtype)  # type: ignore[arg-type]
    contents = stored.to_bytes()
    assert {len(content) for content in contents} == {5 * 7 + 5 * 4 if dtype == "int8" else 5 * 7 * 2}
    again = [stored_of(content, 5, 7, dtype) for content in contents]  # type: ignore[arg-type]
    for part, other in zip(stored, zip(*again, strict=True), strict=True):
        assert torch.stack(other).equal(part)
    empty = stored_of(None, 5, 7, dtype)  # type: ignore[arg-type]
    assert [part.shape for part in empty] == [part.shape for part in again[0]]
    assert not restore(Stored(*(part[None] for part in empty))).any()


def test_components_are_those_of_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(20, 6, 9, generator=generator) @ torch.randn(9, 9, generator=generator) + 2
    reduction, kept = fit_reduction(vectors.split(7), 4)
    oracle = PCA(4).fit(vectors.flatten(0, 1).numpy())
    assert kept == pytest.approx(oracle.explained_variance_ratio_.sum(), abs=1e-5)
    cosines = (reduction.components * torch.tensor(oracle.components_)).sum(dim=1).abs()
    torch.testing.assert_close(cosines, torch.ones(4))
    rows = vectors.flatten(0, 1)
    expected = torch.tensor(oracle.inverse_transform(oracle.transform(rows.numpy())))
    torch.testing.assert_close(reduction.expand(reduction.reduce(rows)), expected, rtol=1e-4, atol=1e-4)
    whole, _ = fit_reduction([vectors], 4)
    torch.testing.assert_close(whole.components, reduction.components)
    assert (reduction.components.gather(1, reduction.components.abs().argmax(1, keepdim=True)) > 0).all()


def test_more_components_than_there_are_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"teacher_cache.pca 6 is more than 6 vectors of 9 numbers"):
        fit_reduction([torch.randn(2, 3, 9)], 6)


def test_the_stated_error_is_of_all_vectors_together() -> None:
    vectors, again = torch.tensor([[[3.0, 0.0], [0.0, 4.0]]]), torch.tensor([[[3.0, 1.0], [0.0, 4.0]]])
    error = storage_error(vectors, again)
    assert error.relative == pytest.approx(1 / 5)
    assert error.cosine == pytest.approx((3 / 10**0.5 + 1) / 2)
