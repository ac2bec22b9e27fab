"""The figures of many sections at once: drawing takes a second each, so all cores take part where that is safe."""

import multiprocessing
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module

from fdkit.report.page import Drawing, Picture, Section, picture


def with_pictures(sections: Sequence[Section]) -> list[Section | Exception]:
    """Each section with its drawings made into pictures, in order; or what was raised when one of them was drawn."""
    drawings = [one for section in sections for one in section.pictures if isinstance(one, Drawing)]
    drawn = iter(draw_all(drawings))
    found: list[Section | Exception] = []
    for section in sections:
        pictures = [next(drawn) if isinstance(one, Drawing) else one for one in section.pictures]
        failed = [one for one in pictures if isinstance(one, Exception)]
        shown = [one for one in pictures if not isinstance(one, Exception)]
        found.append(failed[0] if failed else section._replace(pictures=shown))
    return found


def draw_all(drawings: Sequence[Drawing]) -> list[Picture | Exception]:
    """Each drawing as a picture, in order; or what was raised when it was drawn.

    Processes are forked, so that nothing is imported or copied again, and only where this one has no other thread and
    no GPU in use, which a fork would break; otherwise one drawing follows the other.
    """
    count = min(_cores(), len(drawings))
    if count < 2 or not _may_fork():
        return [_attempt(one) for one in drawings]
    for module in ("font_manager", "figure", "backends.backend_agg", "backends.backend_svg"):
        import_module(f"matplotlib.{module}")  # once, here, instead of in every process
    _forked[:] = drawings
    try:
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(count, mp_context=context, initializer=_work_alone) as pool:
            # Pictures of pixels take longest, so they begin: the cores then end together.
            order = sorted(range(len(drawings)), key=lambda place: not drawings[place].photo)
            drawn = dict(zip(order, pool.map(_attempt_forked, order), strict=True))
            return [drawn[place] for place in range(len(drawings))]
    finally:
        _forked.clear()


_forked: list[Drawing] = []
"""How drawings, which cannot be pickled, get into the forked processes."""


def _work_alone() -> None:
    """One thread for PyTorch, as in a DataLoader's workers: its pool of threads does not live on in a fork, and a
    drawing that asked for it would wait for ever.
    """
    import torch

    torch.set_num_threads(1)


def _attempt_forked(place: int) -> Picture | Exception:
    return _attempt(_forked[place])


def _attempt(drawing: Drawing) -> Picture | Exception:
    try:
        return picture(drawing.draw, drawing.alt, photo=drawing.photo)
    except Exception as error:  # numbers of another version can fail anywhere in a drawing
        return error


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _may_fork() -> bool:
    import torch

    is_possible = "fork" in multiprocessing.get_all_start_methods()
    return is_possible and threading.active_count() == 1 and not torch.cuda.is_initialized()
