"""What reading an image costs a worker, and what to change when training waits for it."""

import math
import os
from collections.abc import Callable
from typing import NamedTuple

from fdkit.data.decode import has_torchcodec

PACK_WHEN_LARGER = 1.5
"""How many times the short side that is needed images must have, for packing to be advised."""
STALL_RATIO = 0.5
"""Share of the reading time without computing above which it is the disk that is slow."""


class Cost(NamedTuple):
    """Of one image or of several together."""

    num_images: int
    read_seconds: float
    """To read and decode."""
    crop_seconds: float
    idle_seconds: float
    """The part of both in which the worker did not compute: it waited for the disk, or for a core."""
    short_sides: float
    """Sum of the images' short sides, in pixels."""


NOTHING = Cost(0, 0.0, 0.0, 0.0, 0.0)


def total(costs: list[Cost]) -> Cost:
    """The sum of costs."""
    return Cost(*map(sum, zip(NOTHING, *costs, strict=True)))


class ReadingCosts:
    """What the images read so far cost."""

    def __init__(self) -> None:
        self.total = NOTHING

    def add(self, cost: Cost) -> None:
        """Add what a batch cost."""
        self.total = total([self.total, cost])


class Readers(NamedTuple):
    """Who reads the images of one process."""

    workers: int
    """0: the training process itself."""
    decoder: str
    cores: int
    """Cores for this process and its workers."""


def usable_cores() -> int:
    """Cores of this machine that this process may use, shared equally among the ranks on it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def waiting_advice(
    costs: ReadingCosts, readers: Readers, *, image_size: int, world_size: int = 1
) -> Callable[[float, float], str]:
    """What to say when training waits for images: a function of the share waited and the rate it could have.

    image_size: of the views, in pixels. The rate is in images a second of all world_size processes together.
    """
    return lambda ratio, rate: advice(costs.total, readers, ratio, rate / world_size, image_size=image_size)


def advice(cost: Cost, readers: Readers, ratio: float, rate: float, *, image_size: int) -> str:
    """Why training waits and what to change, in numbers.

    ratio: share of the time waited; rate: images a second this process could train on if it never waited.
    """
    head = f"training waits for images {100 * ratio:.0f} % of the time"
    if not cost.num_images:
        return head
    read, crop, idle = (
        1000 * seconds / cost.num_images
        for seconds in (cost.read_seconds, cost.crop_seconds, cost.idle_seconds)
    )
    made = max(1, readers.workers) * 1000 / (read + crop)
    who = f"{readers.workers} workers make" if readers.workers > 1 else "one process makes"
    why = (
        f"{head}: an image takes {read + crop:.1f} ms ({read:.1f} to read and decode, {crop:.1f} to crop), so {who} "
        f"{made:.0f} images/s, and training could take {rate:.0f}"
    )
    ways = [_more_workers(readers, (read + crop) / 1000, rate)]
    if idle > STALL_RATIO * (read + crop):
        ways.append(
            f"{idle:.1f} ms of it wait for the disk or for a core: a local disk, or `fdkit pack`, reads sooner"
        )
    ways.append(_smaller_images(cost.short_sides / cost.num_images, image_size))
    if readers.decoder == "pillow":
        ways.append(
            "--loader.decoder auto decodes JPEG files with TorchCodec, sooner"
            if has_torchcodec()
            else "pip install torchcodec: it decodes JPEG files sooner than Pillow"
        )
    return why + "".join(f"\n  {way}" for way in ways if way)


def _more_workers(readers: Readers, seconds: float, rate: float) -> str:
    needed = math.ceil(rate * seconds)
    most = max(1, readers.cores - 1) if readers.workers else readers.cores
    if needed <= readers.workers:
        return ""  # there are enough; something else is slow
    if needed <= most:
        return f"--loader.workers {needed} would keep up ({readers.cores} cores here)"
    more = f"; --loader.workers {most} makes {most / seconds:.0f} images/s" if most > readers.workers else ""
    return f"{needed} workers would keep up, more than the {readers.cores} cores here allow{more}"


def _smaller_images(short_side: float, image_size: int) -> str:
    wanted = max(256, math.ceil(image_size * 8 / 7 / 32) * 32)  # 256 for views of 224 pixels
    if short_side < PACK_WHEN_LARGER * wanted:
        return ""
    return (
        f"`fdkit pack PATH --output DIR --short-side {wanted}`: images have a short side of {short_side:.0f} pixels, "
        f"{(short_side / wanted) ** 2:.1f} times the pixels that views of {image_size} need"
    )
