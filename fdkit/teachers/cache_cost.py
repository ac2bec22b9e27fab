"""What a cache of teacher features costs and what it can save: arithmetic alone, nothing is read or run.

A cache stores, for every image and each of V crops of it, the vectors that the student imitates. It replaces the
teacher's share of a step by reading these bytes, from the second pass over the same crops on.
Source: the idea is that of fast knowledge distillation, Shen and Xing 2021 (arXiv 2112.01528), section 3.
"""

import math
from typing import Literal

CacheDtype = Literal["int8", "fp16"]

HEADER_BYTES = 16
"""Before every record: a mark, checksums of its content and of the crop it was made of."""
SCALE_BYTES = 4
"""Of the one number beside each int8 vector."""


def record_bytes(num_tokens: int, width: int, dtype: CacheDtype, pca: int | None = None) -> int:
    """Bytes of one crop: num_tokens vectors of `width` numbers, or of `pca` numbers where they are reduced."""
    numbers = width if pca is None else pca
    vector = numbers + SCALE_BYTES if dtype == "int8" else 2 * numbers
    return HEADER_BYTES + num_tokens * vector


def cache_bytes(
    num_images: int, views: int, num_tokens: int, width: int, dtype: CacheDtype, pca: int | None = None
) -> int:
    """Bytes of a whole cache: one record for each of `views` crops of every image."""
    return num_images * views * record_bytes(num_tokens, width, dtype, pca)


def break_even_read_rate(bytes_per_image: int, teacher_seconds_per_image: float) -> float:
    """Bytes a second that one device must get from the disk so that reading takes no longer than the teacher would."""
    if teacher_seconds_per_image <= 0:
        raise ValueError(f"teacher_seconds_per_image {teacher_seconds_per_image} is not above 0")
    return bytes_per_image / teacher_seconds_per_image


def views_filled(epochs: float, views: int) -> int:
    """How many of the crops of an image a run meets: one an epoch, begun ones too, and no more than there are."""
    return min(views, math.ceil(epochs))


def share_read(epochs: float, views: int) -> float:
    """Share of a run's steps, in [0, 1), whose features an empty cache gives back: those after the first V epochs."""
    return max(0.0, epochs - views) / epochs


def speed_up_bound(epochs: float, views: int, teacher_share: float, *, is_complete: bool = False) -> float:
    """How many times faster a run can become, were reading free; at least 1.

    teacher_share: of a step's time without the cache, in [0, 1). is_complete: whether another run has filled the
    cache already, so that the teacher never runs.
    """
    if not 0 <= teacher_share < 1:
        raise ValueError(f"teacher_share {teacher_share} is not in [0, 1)")
    saved = 1.0 if is_complete else share_read(epochs, views)
    return 1 / (1 - teacher_share * saved)
