"""Feature vectors in few bytes: int8 with a scale for each vector, or float16; before that, fewer numbers by PCA.

The error of an int8 number is at most half a step, which is the vector's largest magnitude over 254.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fdkit.errors import ConfigError, NumericsError
from fdkit.teachers.cache_cost import CacheDtype

STEPS = 127


class Stored(NamedTuple):
    """N vectors of each of B images, as a cache keeps them."""

    values: Tensor
    """(B, N, K): int8 or float16."""
    scales: Tensor
    """(B, N) float32: what one step of int8 is worth; (B, 0) for float16."""

    def to_bytes(self) -> list[bytes]:
        """The content of one record an image."""
        values, scales = self.values.cpu().numpy(), self.scales.cpu().numpy()
        return [one.tobytes() + scale.tobytes() for one, scale in zip(values, scales, strict=True)]


def stored_of(content: bytes | None, num_tokens: int, width: int, dtype: CacheDtype) -> Stored:
    """What `to_bytes` gave for one image, without the batch axis: (N, K) and (N,); zeros for None."""
    kind = torch.int8 if dtype == "int8" else torch.float16
    num_scales = num_tokens if dtype == "int8" else 0
    if content is None:
        return Stored(torch.zeros(num_tokens, width, dtype=kind), torch.zeros(num_scales))
    buffer = bytearray(content)
    count = num_tokens * width
    values = torch.frombuffer(buffer, dtype=kind, count=count).view(num_tokens, width)
    if not num_scales:
        return Stored(values, torch.zeros(0))
    scales = torch.frombuffer(bytearray(content[count:]), dtype=torch.float32)
    return Stored(values, scales)


def quantise(vectors: Tensor, dtype: CacheDtype) -> Stored:
    """Vectors (B, N, K) float32 in their stored form. Raises NumericsError for what it cannot hold."""
    if dtype == "fp16":
        values = vectors.half()
        _check_finite(values, "fp16 holds numbers up to 65504; use teacher_cache.dtype int8")
        return Stored(values, vectors.new_zeros(len(vectors), 0))
    scales = vectors.abs().amax(dim=-1) / STEPS
    _check_finite(scales, "")
    steps = vectors / scales.clamp_min(torch.finfo(scales.dtype).tiny)[..., None]
    return Stored(steps.round().clamp(-STEPS, STEPS).to(torch.int8), scales)


def restore(stored: Stored) -> Tensor:
    """The vectors (B, N, K) float32 again, up to the rounding."""
    values = stored.values.float()
    return values * stored.scales[..., None] if stored.scales.shape[-1] else values


def _check_finite(numbers: Tensor, hint: str) -> None:
    if not numbers.isfinite().all():
        raise NumericsError("the teacher's features are not finite, or too large to be stored", hint)


class Reduction(NamedTuple):
    """Principal components of vectors of C numbers."""

    mean: Tensor
    """(C,) float32."""
    components: Tensor
    """(K, C) float32, orthonormal rows, by falling variance."""

    def reduce(self, vectors: Tensor) -> Tensor:
        """(..., C) -> (..., K)."""
        return F.linear(vectors - self.mean, self.components)

    def expand(self, reduced: Tensor) -> Tensor:
        """(..., K) -> (..., C), the nearest vectors these K numbers can tell."""
        return reduced @ self.components + self.mean


def fit_reduction(batches: Iterable[Tensor], num_components: int) -> tuple[Reduction, float]:
    """The principal components of vectors (..., C), batch by batch, and the share of the variance they keep.

    Sums are in float64; each component's largest number is positive, so that equal vectors give equal components.
    Raises ConfigError for fewer numbers or vectors than components.
    """
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for batch in batches:
        rows = batch.flatten(0, -2).double().cpu()
        count, total, squares = count + len(rows), total + rows.sum(dim=0), squares + rows.mT @ rows
    width = total.numel()
    if num_components > min(width, count - 1):
        raise ConfigError(
            f"teacher_cache.pca {num_components} is more than {count} vectors of {width} numbers have components",
            f"use at most {max(0, min(width, count - 1))}, or leave it out",
        )
    mean = total / count
    variances, vectors = torch.linalg.eigh(squares / count - torch.outer(mean, mean))
    components = vectors.mT.flip(0)[:num_components]
    largest = components.gather(1, components.abs().argmax(dim=1, keepdim=True))
    kept = variances.flip(0)[:num_components].sum() / variances.sum().clamp_min(1e-300)
    return Reduction(mean.float(), (components * largest.sign()).float().contiguous()), float(kept)


class StorageError(NamedTuple):
    """How far vectors that went through the cache are from those that did not."""

    cosine: float
    """Mean over vectors."""
    relative: float
    """Length of all differences over the length of all vectors."""


def storage_error(vectors: Tensor, again: Tensor) -> StorageError:
    """Between vectors (..., C) and what the cache makes of them."""
    cosine = F.cosine_similarity(vectors, again, dim=-1).mean()
    relative = (again - vectors).norm() / vectors.norm().clamp_min(1e-30)
    return StorageError(float(cosine), float(relative))
