"""The contrast of queries and keys that several methods share: InfoNCE by cosine, in float32 or finer."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fdkit.models.representation import unit_rows


class Contrast(NamedTuple):
    """One direction of a contrast; three scalars, of which the loss alone has a gradient."""

    loss: Tensor
    positive_similarity: Tensor
    """Mean cosine of a query and its own key."""
    top1: Tensor
    """Share of the queries nearest to their own key."""


def info_nce(queries: Tensor, keys: Tensor, *, temperature: float, first_label: int = 0) -> Contrast:
    """How well each query (B, d) picks its key among all keys (N, d), by cosine.

    Row i belongs to key first_label + i; the loss is the mean over rows of
    -log softmax(cosines / temperature)[first_label + i]. Source: van den Oord et al. 2018, equation 4.
    """
    with torch.autocast(queries.device.type, enabled=False):
        cosines = unit_rows(queries) @ unit_rows(keys).T  # (B, N)
        labels = torch.arange(first_label, first_label + len(queries), device=queries.device)
        loss = F.cross_entropy(cosines / temperature, labels)
    cosines = cosines.detach()
    positive_similarity = cosines.gather(1, labels[:, None]).mean()
    return Contrast(loss, positive_similarity, (cosines.argmax(dim=1) == labels).float().mean())
