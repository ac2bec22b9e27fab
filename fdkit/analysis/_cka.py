"""Linear centred kernel alignment (CKA): how alike two representations of the same images are, whatever their widths.

HSIC is the unbiased estimate of Song et al. 2012 ("Feature selection via dependence maximization", JMLR 13, theorem 5),
so that batches of any size from 4 estimate the same value, and a mean over batches estimates it ever better.
Source: Nguyen, Raghu and Kornblith 2021 (arXiv 2010.15327), equations 2 and 3.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

SMALLEST_BATCH = 4
"""Images; the estimate divides by n - 3."""


def hsic_unbiased(first: Tensor, second: Tensor) -> float:
    """The unbiased estimate HSIC_1 of the dependence of two kernels over the same n images; 0 if independent.

    first, second: (n, n) symmetric Gram matrices, K and L; their diagonals do not count. Computed in float64; may be
    negative. With zeroed diagonals K' and L', Nguyen et al. 2021, equation 3:
    (tr(K'L') + sum K' sum L' / ((n-1)(n-2)) - 2 / (n-2) 1'K'L'1) / (n (n-3)).
    Raises ValueError for shapes that differ, are not square, or fewer than 4 images.
    """
    num_images = len(first)
    if first.shape != second.shape or first.shape != (num_images, num_images):
        raise ValueError(
            f"Gram matrices must be square and alike: {tuple(first.shape)} and {tuple(second.shape)}"
        )
    _check_size(num_images)
    first, second = (kernel.double() - kernel.double().diag().diag() for kernel in (first, second))
    together = (first * second).sum()
    apart = first.sum() * second.sum() / ((num_images - 1) * (num_images - 2))
    across = 2 / (num_images - 2) * (first.sum(0) * second.sum(0)).sum()
    return float((together + apart - across) / (num_images * (num_images - 3)))


class MinibatchCKA:
    """Linear CKA between every representation of one list and every one of another, gathered batch by batch.

    CKA = mean HSIC_1(K, L) / sqrt(mean HSIC_1(K, K) mean HSIC_1(L, L)), each mean over batches (equation 2), weighted
    by their images, which for batches of one size is the plain mean. Memory: num_a x num_b sums, and while a batch is
    added num_a + num_b matrices of B x B; nothing grows with the number of batches.
    """

    def __init__(self, num_a: int, num_b: int) -> None:
        self.num_images = 0
        self._across = torch.zeros(num_a, num_b, dtype=torch.float64)
        self._within_a = torch.zeros(num_a, dtype=torch.float64)
        self._within_b = torch.zeros(num_b, dtype=torch.float64)

    def add(self, list_a: Sequence[Tensor], list_b: Sequence[Tensor]) -> None:
        """Counts a batch: num_a and num_b features of the same B >= 4 images, each (B, D) of a width D of its own.

        Further dimensions are flattened into D. Raises ValueError for another number of features, for features of
        different images, or for fewer than 4.
        """
        if (len(list_a), len(list_b)) != tuple(self._across.shape):
            expected = " and ".join(map(str, self._across.shape))
            raise ValueError(
                f"{len(list_a)} and {len(list_b)} representations were given, {expected} expected"
            )
        sizes = {len(features) for features in (*list_a, *list_b)}
        if len(sizes) != 1:
            raise ValueError(f"the representations are of different numbers of images: {sorted(sizes)}")
        (num_images,) = sizes
        _check_size(num_images)
        kernels_a, kernels_b = (
            torch.stack([_centred_gram(one).flatten().cpu() for one in part]) for part in (list_a, list_b)
        )
        weight = 1 / (num_images - 3)  # 1 / (n (n-3)) of HSIC_1, times n images
        self._across += weight * kernels_a @ kernels_b.T
        self._within_a += weight * kernels_a.square().sum(1)
        self._within_b += weight * kernels_b.square().sum(1)
        self.num_images += num_images

    def value(self) -> Tensor:
        """(num_a, num_b) float64 CKA, at most 1, near or below 0 for independent representations.

        NaN where a representation is the same for all images, as that of a class token that has seen no patch is.
        Raises ValueError before any batch was added.
        """
        if self.num_images == 0:
            raise ValueError("no batch was added")
        return self._across / (self._within_a[:, None] * self._within_b).sqrt()


def _centred_gram(features: Tensor) -> Tensor:
    """The U-centred linear kernel of features (B, ...): (B, B) float64 with zero diagonal and rows that sum to 0.

    The inner product of two of them over n (n - 3) is HSIC_1 (Szekely and Rizzo 2014, "Partial distance correlation
    with methods for dissimilarities", section 2): the same sum, centred before it cancels. Removing each channel's mean
    first changes nothing but rounding; a channel that varies by no more than that is taken as constant.
    """
    rows = features.detach().flatten(1).double()
    rounding = 2 * torch.finfo(features.dtype).eps * rows.abs().amax(0)
    rows = rows - rows.mean(0)
    rows = rows * (rows.abs().amax(0) > rounding)
    gram = rows @ rows.T
    gram.fill_diagonal_(0)
    num_images = len(gram)
    margin = gram.sum(0) / (num_images - 2)
    gram = gram - margin - margin[:, None] + margin.sum() / (num_images - 1)
    return gram.fill_diagonal_(0)


def _check_size(num_images: int) -> None:
    if num_images < SMALLEST_BATCH:
        raise ValueError(
            f"unbiased HSIC needs batches of at least {SMALLEST_BATCH} images; this one has {num_images}"
        )
