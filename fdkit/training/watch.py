"""Who is missing: every process says that it lives and what it does, and reads what the others say.

A collective that fails says only that some connection broke, and on a GPU it may never return. So each process writes
a pulse into the store by which the processes found each other, from a thread of its own. A process whose pulse stops is
dead, or its host is; one that lives but stays at one place for longer than the time-out hangs. The others then say
which it was, where it was, and end with exit code 8.
"""

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple, Protocol

from fdkit.data.terminal import escaped
from fdkit.errors import DistributedError

log = logging.getLogger("fdkit")

PULSE_SECONDS = 1.0
"""Between two pulses of a process, for up to 64 of them; of more it grows with their number, to spare the store."""
SILENT_SECONDS = 30.0
"""A process without a pulse for this long is dead, though no connection broke."""
HINT = "run the same command with --resume; torchrun --max-restarts 3 does so by itself"
EXIT_LEEWAY = 5.0
"""Seconds a process gets to end by itself before its watch ends it."""
DOINGS = ("starting", "measuring", "saving", "waiting for rank 0", "reading images", "computing")
"""What a process can be at, in the order in which it does that between two steps."""
_LOST = "lost the others"


class Store(Protocol):
    """What is used of torch's stores."""

    def set(self, key: str, value: str) -> None:
        """Keep a value under a key."""
        ...

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """The values of keys that are there."""
        ...


class Pulse(NamedTuple):
    """What one process last said."""

    beats: int
    """Pulses so far; it stands still in a process that is dead."""
    place: int
    """How many places it has been at; it stands still in a process that hangs."""
    step: int
    """Steps done, -1 before the first is begun."""
    doing: str
    """One of DOINGS."""
    is_broken: bool = False
    """Whether a collective failed there."""
    ended: str | None = None
    """Why the process left, "" if it was done; None while it is there."""


class Watch:
    """The pulses of all processes, seen from one of them.

    store: a connection of its own. keys begin with `name`, which all processes share and no earlier attempt used.
    timeout_seconds: how long a process may stay at one place once it has begun its first step.
    on_lost: what is called, in the watch's thread, when the main thread does not come back by itself.
    """

    def __init__(
        self,
        store: Store,
        name: str,
        rank: int,
        size: int,
        *,
        timeout_seconds: float,
        on_lost: Callable[[DistributedError], None] | None = None,
    ) -> None:
        self.rank, self.size, self.timeout_seconds = rank, size, timeout_seconds
        self.on_lost = on_lost or end_process
        self.period = PULSE_SECONDS * max(1.0, size / 64)
        self._store = store
        self._keys = [f"{name}/{number}" for number in range(size)]
        self._pulse = Pulse(0, 0, -1, "starting")
        self._seen = [self._pulse] * size
        now = time.monotonic()
        self._beaten = [now] * size
        self._moved = [now] * size
        self._answered = now
        self._beats = 0
        self._first_step: int | None = None
        self._stopping = threading.Event()
        self._threads = [
            threading.Thread(target=work, name=f"fdkit-watch-{work.__name__}", daemon=True)
            for work in (self._exchange, self._judge)
        ]
        self._write()

    def start(self) -> None:
        """Begin to watch; every process has made its Watch by now."""
        for thread in self._threads:
            thread.start()

    def mark(self, step: int, doing: str) -> None:
        """Say where this process is, with one of DOINGS; costs no more than an assignment."""
        if self._first_step is None:
            self._first_step = step
        self._pulse = self._pulse._replace(place=self._pulse.place + 1, step=step, doing=doing)

    def leave(self, reason: str) -> None:
        """Stop watching; the others read why this process left, "" for one that is done."""
        self._stopping.set()
        for thread in self._threads:
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join(2 * self.period)
        if not self._threads[0].is_alive():
            self._pulse = self._pulse._replace(ended=reason)
            try:
                self._write()
            except RuntimeError as error:  # whoever kept the store has left before
                log.debug("watch: the store is gone: %s", error)

    def wait_until_read(self) -> None:
        """Return once the others have left or had time to read why this process does; for the one with the store.

        Not for longer: those that wait in a collective for this process are free once it is gone.
        """
        deadline = time.monotonic() + 4 * self.period
        others = [number for number in range(self.size) if number != self.rank]
        while time.monotonic() < deadline and self._read():
            if all(self._seen[number].ended is not None or self._is_silent(number) for number in others):
                return
            time.sleep(self.period / 4)

    @property
    def patience(self) -> float:
        """Seconds without a pulse after which a process counts as gone, once something is known to have broken."""
        return 6 * self.period

    def explain(self) -> str:
        """Which processes are missing and where they were, after something broke; waits to see whose pulse stops."""
        self._pulse = self._pulse._replace(is_broken=True)
        deadline = time.monotonic() + 2 * self.patience
        while time.monotonic() < deadline:
            if sentence := self._who_left():
                return sentence
            time.sleep(self.period / 4)
        return (
            self._who_lags() or self._who_hangs() or "no process is missing: the network between them failed"
        )

    def _who_left(self) -> str:
        """Those whose pulse stopped and those that left for a reason of their own; "" if there are none."""
        silent, left = [], []
        for number in range(self.size):
            if number == self.rank:
                continue
            pulse = self._seen[number]
            if pulse.ended:
                is_told = pulse.ended.startswith(f"rank {number} ")
                told = f"rank {number} ended while {pulse.doing}{_of_step(pulse)}: "
                left.append(pulse.ended if is_told else told + pulse.ended)
            elif pulse.ended is None and self._is_silent(number):
                silent.append(f"rank {number} died, last seen {pulse.doing}{_of_step(pulse)}")
        causes = [sentence for sentence in left if _LOST not in sentence]
        if time.monotonic() - self._answered > self.patience:
            gone = "the store of the processes does not answer: its host, or rank 0 which keeps it, is gone"
            return "; ".join(causes) or gone
        return "; ".join(silent + causes) or "; ".join(left)

    def _who_lags(self) -> str:
        """The processes that are furthest behind, if some are."""
        places = {
            number: (pulse.step, DOINGS.index(pulse.doing))
            for number, pulse in enumerate(self._all())
            if pulse.ended is None
        }
        last, first = min(places.values()), max(places.values())
        return self._stand_still([number for number, place in places.items() if first > place == last])

    def _who_hangs(self) -> str:
        """The processes in which no collective failed, although one did in this process."""
        here = enumerate(self._all())
        return self._stand_still([n for n, pulse in here if pulse.ended is None and not pulse.is_broken])

    def _all(self) -> list[Pulse]:
        return [self._pulse if number == self.rank else pulse for number, pulse in enumerate(self._seen)]

    def _stand_still(self, ranks: list[int]) -> str:
        here, now = self._all(), time.monotonic()
        return "; ".join(
            f"rank {number} hangs: {here[number].doing}{_of_step(here[number])} for "
            f"{now - self._moved[number]:.0f} s"
            for number in ranks
        )

    def _is_silent(self, number: int) -> bool:
        return time.monotonic() - self._beaten[number] > self.patience

    def _write(self) -> None:
        self._beats += 1
        self._store.set(self._keys[self.rank], json.dumps(self._pulse._replace(beats=self._beats)))

    def _read(self) -> bool:
        """Take note of what the others say; whether the store answered."""
        try:
            values = self._store.multi_get(self._keys)
        except RuntimeError as error:
            log.debug("watch: the store does not answer: %s", error)
            return False
        self._answered = now = time.monotonic()
        for number, value in enumerate(values):
            pulse, before = Pulse(*json.loads(value)), self._seen[number]
            if pulse.beats != before.beats:
                self._beaten[number] = now
            if pulse.place != before.place:
                self._moved[number] = now
            self._seen[number] = pulse
        return True

    def _exchange(self) -> None:
        """Write and read until told to stop; a thread of its own, as a store whose host is gone may never answer."""
        while not self._stopping.wait(self.period):
            try:
                self._write()
            except RuntimeError as error:
                log.debug("watch: the store does not answer: %s", error)
                continue
            self._read()

    def _judge(self) -> None:
        """End this process once another one is lost and the main thread does not notice by itself."""
        while not self._stopping.wait(self.period):
            if not self._verdict() or self._stopping.wait(EXIT_LEEWAY) or self._pulse.is_broken:
                continue
            sentence = self._verdict()  # again: by now the others may have said more
            if sentence:
                self._end(sentence)
                return

    def _end(self, sentence: str) -> None:
        error = lost(self.rank, self.size, sentence)
        is_own_fault = sentence.startswith(f"rank {self.rank} hangs")
        self._pulse = self._pulse._replace(ended=sentence if is_own_fault else error.message)
        with suppress(RuntimeError):
            self._write()
        self.on_lost(error)

    def _verdict(self) -> str:
        """What is wrong beyond doubt; "" if nothing is."""
        now = time.monotonic()
        if now - self._answered > SILENT_SECONDS:
            return self._who_left()
        for number, pulse in enumerate(self._seen):
            is_quiet = number != self.rank and now - self._beaten[number] > SILENT_SECONDS
            if is_quiet and pulse.ended != "":
                return self._who_left()
        running = [number for number, pulse in enumerate(self._all()) if pulse.ended is None]
        if any(self._all()[number].step < 0 for number in running):
            return ""
        if min(now - self._moved[number] for number in running) <= self.timeout_seconds:
            return ""
        some_broke = any(pulse.is_broken for pulse in self._all())
        return self._who_lags() or (self._who_hangs() if some_broke else self._all_hang())

    def _all_hang(self) -> str:
        if self._pulse.step == self._first_step:  # compiling may take any time, in all processes at once
            return ""
        return (
            f"no process gets on: all are {self._pulse.doing}{_of_step(self._pulse)} for more than "
            f"{self.timeout_seconds:g} s"
        )


def lost(rank: int, size: int, sentence: str) -> DistributedError:
    """The error of a process that cannot go on without another one."""
    return DistributedError(f"rank {rank} of {size} {_LOST}: {sentence}", HINT)


def end_process(error: DistributedError) -> None:
    """End this process at once, whatever its main thread waits for."""
    print(f"error: {escaped(str(error))}", file=sys.stderr, flush=True)
    os._exit(error.exit_code)


def _of_step(pulse: Pulse) -> str:
    return f" at step {pulse.step}" if pulse.step >= 0 else ""
