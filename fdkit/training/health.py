"""Tells when a run is going wrong: gradient spikes, falls of kNN accuracy, and a representation that collapses.

A spike of the first layer's gradient comes tens of steps before the others' and before a fall of kNN accuracy, from
which training starts anew in part and ends lower, while the loss shows little (Chen et al. 2021, MoCo v3, section 4).
Both are said in a warning. A collapse, from which a run does not come back, ends it.
The limits are this project's own: the paper shows curves and states none.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import inf, isfinite, log
from statistics import median
from typing import Any, NamedTuple

from fdkit.errors import NumericsError

SPIKE_RATIO = 5.0
"""A spike is a largest gradient norm of more than this many times the usual: the median of the logged lines before.
In steady small runs of MoCo v3 and SimSiam single steps stay below 2.6."""
SPIKE_HISTORY = 50
"""Logged lines that the median is of."""
SPIKE_RECENT = 5
"""Logged lines whose median is the usual where it is larger, so that a steady rise, as in a warm-up, is none."""
SPIKE_MIN_HISTORY = 10
"""Logged lines before the first spike can be told from the start of training."""
SPIKE_QUIET_LINES = 5
"""Logged lines without a spike after which another one is news."""
DIP = 0.05
"""A dip is kNN accuracy further than this below its best; twice the standard error of 450 test images."""
GRADIENTS = {
    "first_layer_grad_norm_max": "the first layer's gradient norm",
    "grad_norm_max": "the gradient norm",
}
"""What spikes are looked for in: the first of these that is logged."""


class Sign(NamedTuple):
    """A number that falls to its floor in a collapse, in a line of metrics or in what a monitor found.

    Networks start anywhere, a deep one with features that hardly differ, so the number has to be low by itself and by
    what it has been in this run.
    """

    floor: float
    """Its value in a complete collapse."""
    limit: float
    """What it has to be below; infinite where its scale hangs on the network."""
    share: float
    """It has to be nearer to the floor than this share of the best in this run, the start included."""
    patience: int
    """How many times in a row it has to be low."""
    words: str
    """What it is."""


MEASURED = {
    "channel_std_ratio": Sign(
        0, 0.05, 0.25, 2, "the spread of features over images, as a share of the most there can be"
    ),
    "effective_rank": Sign(1, 3, 0.1, 2, "the number of directions that features take up"),
}
"""By the collapse monitor."""
PATIENCE = 20
"""Logged lines in a row that a method's own number is low in a collapse; early in a run some are low for a while."""
LOGGED = {
    "feature_std": Sign(0, inf, 0.05, PATIENCE, "the spread of features over a batch"),
    "projection_std": Sign(0, inf, 0.05, PATIENCE, "the spread of the projector's outputs over a batch"),
    "target_information": Sign(
        0, 0.01, 0.05, PATIENCE, "what the teacher's choice of prototypes tells of an image, in nats,"
    ),
}
"""By methods, over the steps of a line."""
SIGNS = MEASURED | LOGGED


@dataclass
class Spikes:
    """Finds numbers that stand far above those before them."""

    recent: list[float] = field(default_factory=list)
    """The last numbers, spikes included: a level that stays is no spike for long."""

    def add(self, value: float) -> float | None:
        """How many times the usual the next number is, if that makes it a spike."""
        usual = inf
        if len(self.recent) >= SPIKE_MIN_HISTORY:
            usual = max(median(self.recent), median(self.recent[-SPIKE_RECENT:]))
        self.recent = [*self.recent, value][-SPIKE_HISTORY:]
        return value / usual if 0 < SPIKE_RATIO * usual < value else None


@dataclass
class Dips:
    """Finds falls of an accuracy below the best before them.

    The start does not count: features of a network that has learnt nothing are often better than those after a few
    steps.
    """

    best: float = -inf
    best_step: int = 0
    is_low: bool = False

    def add(self, step: int, value: float) -> bool:
        """Whether the next measurement lies in a dip."""
        if step > 0 and value > self.best:
            self.best, self.best_step = value, step
        self.is_low = self.best - value > DIP
        return self.is_low


@dataclass
class Fall:
    """How far a number has come down in a run, and for how long it has been low."""

    best: float = -inf
    lows: int = 0

    def add(self, sign: Sign, value: float) -> bool:
        """Whether the next number is low for the time after which that is a collapse."""
        self.best = max(self.best, value)
        is_low = value < sign.limit and value - sign.floor < sign.share * (self.best - sign.floor)
        self.lows = self.lows + 1 if is_low else 0
        return self.lows >= sign.patience


def target_information(values: Mapping[str, float]) -> dict[str, float]:
    """The mutual information of images and prototypes, in nats, of a line of a method that logs what it is made of.

    It is 0 if all images share one prototype and if each is spread over all alike, the two ways in which
    self-distillation collapses (Caron et al. 2021, section 5.3).
    """
    if not {"prototypes_used", "target_entropy"} <= values.keys() or not values["prototypes_used"] > 0:
        return {}
    return {"target_information": log(values["prototypes_used"]) - values["target_entropy"]}


class Health:
    """What a run's lines of metrics and its monitors' findings say about it.

    Every process has one and feeds it the same numbers, so that all of them stop at the same step.
    can_freeze: the patch projection trains and --network.freeze-patch-projection would keep it from that.
    """

    def __init__(self, steps_per_epoch: int, *, can_freeze: bool = False) -> None:
        self.steps_per_epoch = steps_per_epoch
        self.can_freeze = can_freeze
        self.spikes = Spikes()
        self.dips = Dips()
        self.falls: dict[str, Fall] = {}
        self.last_spike: int | None = None
        """The step whose line last showed a spike."""
        self.last_good_step: int | None = None
        """The last step at which nothing looked like a collapse; None if nothing was looked at yet."""
        self._quiet_lines = SPIKE_QUIET_LINES

    def logged(self, step: int, values: Mapping[str, float], *, kept: str = "") -> list[str]:
        """Warnings that follow from a line of metrics.

        kept: the last good checkpoint, for the message of a collapse; its path, or empty if there is none.
        Raises NumericsError if training has collapsed by what the method itself logs.
        """
        name = next((name for name in GRADIENTS if name in values), None)
        warnings = [] if name is None else self._watch_gradient(step, name, values[name])
        self._watch_signs(step, {**values, **target_information(values)}, LOGGED, kept)
        return warnings

    def found(self, step: int, values: Mapping[str, float], *, kept: str = "") -> list[str]:
        """Warnings that follow from what a monitor found.

        kept: as for `logged`. Raises NumericsError if the representation has collapsed.
        """
        warnings = []
        if "knn_top1" in values:
            warnings = self._watch_knn(step, values["knn_top1"])
        self._watch_signs(step, values, MEASURED, kept)
        return warnings

    def state(self) -> dict[str, Any]:
        """All that was learnt so far, as plain JSON."""
        return {
            "spikes": asdict(self.spikes),
            "dips": asdict(self.dips) if isfinite(self.dips.best) else {},
            "falls": {name: asdict(fall) for name, fall in self.falls.items()},
            "last_spike": self.last_spike,
            "last_good_step": self.last_good_step,
            "quiet_lines": self._quiet_lines,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Put back what `state` gave."""
        self.spikes = Spikes(**state["spikes"])
        self.dips = Dips(**state["dips"])
        self.falls = {name: Fall(**fall) for name, fall in state["falls"].items()}
        self.last_spike = state["last_spike"]
        self.last_good_step = state["last_good_step"]
        self._quiet_lines = state["quiet_lines"]

    def _watch_gradient(self, step: int, name: str, value: float) -> list[str]:
        """A warning at the first spike of several that follow each other closely."""
        if not isfinite(value):
            return []
        ratio = self.spikes.add(value)
        self._quiet_lines += 1
        if ratio is None:
            return []
        self.last_spike = step
        is_news, self._quiet_lines = self._quiet_lines > SPIKE_QUIET_LINES, 0
        sentence = (
            f"gradient spike by {self._place(step)}: {GRADIENTS[name]} reached {value:.3g}, {ratio:.0f} times the "
            f"usual {value / ratio:.2g}; a fall of kNN accuracy may follow"
        )
        return [sentence] if is_news else []

    def _watch_knn(self, step: int, value: float) -> list[str]:
        """A warning at the first measurement of a dip."""
        was_low, best_step = self.dips.is_low, self.dips.best_step
        if not self.dips.add(step, value) or was_low:
            return []
        after = ""
        if self.last_spike is not None and self.last_spike > best_step:
            after = f", after a gradient spike by step {self.last_spike}"
        freeze = "freezing the patch projection (--network.freeze-patch-projection), " * self.can_freeze
        return [
            f"kNN fell from {100 * self.dips.best:.1f} % at step {best_step} to {100 * value:.1f} % at "
            f"{self._place(step)}{after}: training is partly failing (Chen et al. 2021, section 4); "
            f"{freeze}a lower --optim.lr or a longer --optim.warmup-epochs helps"
        ]

    def _watch_signs(
        self, step: int, values: Mapping[str, float], signs: Mapping[str, Sign], kept: str
    ) -> None:
        """Note whether all is good. Raises NumericsError at a collapse."""
        seen = [name for name in signs if name in values and isfinite(values[name])]
        for name in seen:
            fall = self.falls.setdefault(name, Fall())
            if fall.add(signs[name], values[name]):
                raise self._collapse(step, name, values[name], kept)
        # A line between two looks of the monitor says less than they do.
        counts = signs is MEASURED or not self.falls.keys() & MEASURED.keys()
        if seen and counts and not any(fall.lows for fall in self.falls.values()):
            self.last_good_step = step

    def _collapse(self, step: int, name: str, value: float, kept: str) -> NumericsError:
        fall = self.falls[name]
        remedy = "try a lower --optim.lr, a longer --optim.warmup-epochs or the method's published settings"
        checkpoint = f"; the last good checkpoint is kept: {kept}" if kept else ""
        return NumericsError(
            f"training has collapsed at {self._place(step)}: {SIGNS[name].words} is {value:.3g}, "
            f"was {fall.best:.3g} at best, and has been as low {fall.lows} times in a row",
            remedy + checkpoint,
        )

    def _place(self, step: int) -> str:
        return f"step {step} (epoch {step / self.steps_per_epoch:.1f})"
