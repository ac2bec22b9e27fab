"""What a person sees while training runs: a bar on a terminal, else a line now and then."""

import logging
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

log = logging.getLogger("fdkit")

LINE_EVERY_SECONDS = 30.0
WAIT_RATIO_WORTH_A_WARNING = 0.05
WAIT_SECONDS_BEFORE_A_WARNING = 60.0


def duration(seconds: float) -> str:
    """Two units at most: "42 s", "12 m 5 s", "9 h 12 m", "3 d 4 h"."""
    whole = round(seconds)
    for size, unit, smaller_size, smaller in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "m"),
        (60, "m", 1, "s"),
    ):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // smaller_size} {smaller}"
    return f"{whole} s"


def health_line(
    step: int,
    num_steps: int,
    metrics: Mapping[str, float],
    *,
    eta_seconds: float,
    found: Mapping[str, float] | None = None,
) -> str:
    """One line that says how training goes.

    metrics: a logged line; "explained_variance", if the method gives it, is the share of the target's variance
    that the student's prediction explains. found: what monitors found last, such as kNN accuracy, and the features'
    spread (std; 1 is the most) and rank, which fall in a collapse. They take the room of what is of no concern.
    """
    found = found or {}
    parts = [f"step {step}/{num_steps}", f"loss {metrics['loss']:.3g}"]
    if "explained_variance" in metrics:
        of_what = "" if found else " of the target's variance"
        parts.append(f"explains {100 * metrics['explained_variance']:.0f} %{of_what}")
    if "knn_top1" in found:
        parts.append(f"kNN {100 * found['knn_top1']:.1f} %")
    if "channel_std_ratio" in found:
        parts.append(f"std {found['channel_std_ratio']:.2f}  rank {found['effective_rank']:.0f}")
    parts += [
        f"lr {metrics['lr']:.1e}".replace("e-0", "e-"),
        f"{metrics['images_per_second']:.0f} img/s",
    ]
    if not found or metrics["data_wait_ratio"] > WAIT_RATIO_WORTH_A_WARNING:
        parts.append(f"data wait {100 * metrics['data_wait_ratio']:.0f} %")
    parts.append(f"eta {duration(eta_seconds)}")
    return "  ".join(parts)


class Clock:
    """How long steps take and which share of that is waiting for images; since the last reading and in all."""

    def __init__(self, batch_size: int, advise: Callable[[float, float], str] | None = None) -> None:
        """advise: what to say of a share waited, given it and the images a second there would be without waiting."""
        self._batch_size = batch_size
        self._advise = advise or (
            lambda ratio, _: f"training waits for images {100 * ratio:.0f} % of the time"
        )
        self._started = self._window_started = time.perf_counter()
        self._waited = self._window_waited = 0.0
        self._steps = self._window_steps = 0
        self._warned = False

    def waited(self, seconds: float) -> None:
        """Count time spent waiting for a batch."""
        self._window_waited += seconds

    def finished_step(self) -> None:
        """Count a finished step."""
        self._window_steps += 1

    def exclude(self, seconds: float) -> None:
        """Leave out time that went into checkpoints or monitors."""
        self._started += seconds
        self._window_started += seconds

    def read(self) -> dict[str, float]:
        """Since the last reading: images_per_second (all processes), data_wait_ratio in [0, 1]; and seconds in all."""
        now = time.perf_counter()
        elapsed = max(now - self._window_started, 1e-9)
        values = {
            "images_per_second": self._window_steps * self._batch_size / elapsed,
            "data_wait_ratio": min(1.0, self._window_waited / elapsed),
            "seconds": now - self._started,
        }
        self._waited += self._window_waited
        self._steps += self._window_steps
        self._window_started, self._window_waited, self._window_steps = now, 0.0, 0
        self._warn_of_waiting(values["seconds"])
        return values

    def eta_seconds(self, remaining_steps: int) -> float:
        """Time left at the mean speed so far."""
        return (time.perf_counter() - self._started) / max(1, self._steps) * remaining_steps

    def _warn_of_waiting(self, elapsed: float) -> None:
        ratio = self._waited / elapsed
        if self._warned or elapsed < WAIT_SECONDS_BEFORE_A_WARNING or ratio <= WAIT_RATIO_WORTH_A_WARNING:
            return
        self._warned = True
        rate = self._steps * self._batch_size / max(elapsed - self._waited, 1e-9)
        log.warning("%s", self._advise(ratio, rate))


class Progress:
    """Shows the health line: as a bar if standard error is a terminal, else as a log line every 30 s."""

    def __init__(self, num_steps: int, start_step: int, *, visible: bool) -> None:
        self._num_steps = num_steps
        self._last_line = float("-inf")
        self._found: dict[str, float] = {}
        self._bar: Any = None
        if visible and sys.stderr.isatty():
            self._bar, self._task = _terminal_bar(num_steps, start_step)

    def remember(self, found: Mapping[str, float]) -> None:
        """Show what a monitor found in the lines to come."""
        self._found |= found

    def show(self, step: int, metrics: Mapping[str, float], *, eta_seconds: float) -> None:
        """Show how training goes; on a terminal the line goes to the run's log alone."""
        line = health_line(step, self._num_steps, metrics, eta_seconds=eta_seconds, found=self._found)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, line=line.split("  ", 1)[1])
        now = time.monotonic()
        if now - self._last_line >= LINE_EVERY_SECONDS or step == self._num_steps:
            self._last_line = now
            log.log(logging.INFO if self._bar is None else logging.DEBUG, "%s", line)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()


def _terminal_bar(num_steps: int, start_step: int) -> tuple[Any, Any]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as RichProgress

    bar = RichProgress(
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[line]}", markup=False),
        console=Console(stderr=True),
    )
    task = bar.add_task("train", total=num_steps, completed=start_step, line="starting")
    bar.start()
    return bar, task
