"""What evaluators share: the place of the true class among the scores, how far probabilities can be trusted, and
the JSON they return.
"""

import base64
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Metrics = dict[str, Any]
"""Plain JSON; accuracies are fractions in [0, 1]."""


def rank_of_label(scores: Tensor, labels: Tensor) -> Tensor:
    """How many classes come before the true one, (N,) int64: 0 is a top-1 hit, below 5 a top-5 hit.

    scores: (N, C), higher is likelier; labels: (N,) in [0, C). Of equal scores the lower class comes
    first, so the answer is the same on every device, unlike that of argmax or topk. A score that is
    not a number is never a hit.
    """
    own = scores.gather(1, labels[:, None])
    classes = torch.arange(scores.shape[1], device=scores.device)
    tied_after = (scores == own) & (classes >= labels[:, None])
    return (~(scores < own) & ~tied_after).sum(dim=1)


def accuracies(ranks: Tensor, num_classes: int) -> dict[str, float]:
    """Fractions "top1" and, of at least 5 classes, "top5", of the ranks (N,) that `rank_of_label` returns."""
    tops = (1, 5) if num_classes >= 5 else (1,)
    return {f"top{top}": int((ranks < top).sum()) / len(ranks) for top in tops}


def hits_to_text(hits: Tensor) -> str:
    """Which test images were right, a bit an image, in base64: what a later comparison of two models needs.

    hits: (N,) bool, in the order of the images.
    """
    return base64.b64encode(np.packbits(hits.bool().cpu().numpy()).tobytes()).decode("ascii")


def hits_from_text(text: str, num_images: int) -> Tensor:
    """(N,) bool that `hits_to_text` wrote. Raises ValueError if the text is not of so many images."""
    packed = np.frombuffer(base64.b64decode(text, validate=True), dtype=np.uint8)
    if len(packed) != -(-num_images // 8):
        raise ValueError(f"{len(packed)} bytes do not hold a bit for each of {num_images} images")
    return torch.from_numpy(np.unpackbits(packed, count=num_images).astype(bool))


def per_class_accuracy(hits: Tensor, labels: Tensor, num_classes: int) -> list[float | None]:
    """Fraction of hits among the images of each class; None for a class without images.

    hits: (N,) bool or numbers in [0, 1]; labels: (N,) int64 in [0, num_classes).
    """
    hits, labels = (
        hits.double().cpu(),
        labels.cpu(),
    )  # on a GPU a weighted count has no fixed order of summation
    images = torch.bincount(labels, minlength=num_classes).tolist()
    found = torch.bincount(labels, weights=hits, minlength=num_classes).tolist()
    return [right / count if count else None for right, count in zip(found, images, strict=True)]


def expected_calibration_error(probabilities: Tensor, labels: Tensor, num_bins: int = 15) -> float:
    """Mean gap between confidence and accuracy, in [0, 1]; 0 if images given probability p are right p of the time.

    Images are put in `num_bins` bins of equal width by the probability of their likeliest class, bin m holding
    (m / num_bins, (m + 1) / num_bins]; each bin's gap counts as often as it has images. Of equal probabilities
    the lower class is the answer.
    probabilities: (N, C), rows sum to 1, N >= 1; labels: (N,) int64. Source: Guo et al. 2017, equation 3.
    """
    hits = (rank_of_label(probabilities, labels) == 0).double().cpu()
    confidence = probabilities.amax(dim=1).double().cpu()
    inner_edges = torch.arange(1, num_bins, dtype=torch.float64) / num_bins
    bins = torch.bucketize(confidence, inner_edges)  # an edge belongs to the bin below it
    gaps = torch.bincount(bins, weights=hits - confidence, minlength=num_bins)
    return float(gaps.abs().sum()) / len(labels)


def negative_log_likelihood(scores: Tensor, labels: Tensor) -> float:
    """Mean of -log p(label) in nats, where p is the softmax of scores.

    scores: (N, C), logits or logarithms of probabilities (a softmax leaves these as they are); labels: (N,) int64.
    Logits and not probabilities, since the probability of a confident mistake rounds to 0 and its logarithm to
    infinity.
    """
    return float(F.cross_entropy(scores.double(), labels))


def brier_score(probabilities: Tensor, labels: Tensor) -> float:
    """Mean over images of the squared distance between the probabilities and the one-hot label, in [0, 2].

    probabilities: (N, C), rows sum to 1; labels: (N,) int64. Source: Brier 1950.
    """
    distance = probabilities.double()  # |p - e|^2 = |p|^2 - 2 p_label + 1
    own = distance.gather(1, labels[:, None])[:, 0]
    return float((distance.square().sum(dim=1) - 2 * own + 1).mean())
