"""Inputs given to a reader in forked children: a crash, a hang or a flood of memory is counted there, not suffered."""

import os
import pickle
import resource
import signal
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")


class Trial(NamedTuple):
    """What a reader did with all inputs."""

    tried: int
    read: int
    refused: int
    failures: list[str]
    """Inputs on which it raised what it must not, died, hung or took too much memory."""


def try_all(
    read: Callable[[T], Any],
    inputs: Sequence[tuple[str, T]],
    *,
    refusals: tuple[type[BaseException], ...],
    seconds: float = 20,
    megabytes: int = 2000,
    chunk: int = 100,
) -> Trial:
    """Give each named input to the reader. refusals: what it may raise; seconds: for one input; megabytes: of memory,
    more than the process has at the start."""
    read_well = refused = 0
    failures: list[str] = []
    start = 0
    while start < len(inputs):
        part = inputs[start : start + chunk]
        done, dying = _in_child(read, part, refusals, seconds, megabytes)
        read_well += sum(outcome == "read" for outcome in done)
        refused += sum(outcome == "refused" for outcome in done)
        failures += [
            f"{name}: {outcome}"
            for (name, _), outcome in zip(part, done, strict=False)
            if outcome not in {"read", "refused"}
        ]
        if dying:  # the child died of the input after those done; go on behind it
            failures.append(f"{part[len(done)][0]}: {dying}")
        start += len(done) + bool(dying)
    return Trial(len(inputs), read_well, refused, failures)


def _in_child(
    read: Callable[[T], Any],
    inputs: Sequence[tuple[str, T]],
    refusals: tuple[type[BaseException], ...],
    seconds: float,
    megabytes: int,
) -> tuple[list[str], str]:
    """Outcomes of the inputs that were finished, and how the child died if it did."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            _limit(megabytes)
            with os.fdopen(writer, "wb") as pipe:
                for _, value in inputs:
                    signal.setitimer(signal.ITIMER_REAL, seconds)  # SIGALRM ends the process
                    pickle.dump(_outcome(read, value, refusals), pipe)
                    pipe.flush()
        finally:
            os._exit(0)
    os.close(writer)
    outcomes: list[str] = []
    with os.fdopen(reader, "rb") as pipe:
        while True:
            try:
                outcomes.append(pickle.load(pipe))
            except (EOFError, pickle.UnpicklingError):
                break
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if len(outcomes) == len(inputs):
        return outcomes, ""
    return outcomes, "hung" if code == -signal.SIGALRM else f"died, exit code {code}"


def _limit(megabytes: int) -> None:
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + megabytes * 1_000_000,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _outcome(read: Callable[[T], Any], value: T, refusals: tuple[type[BaseException], ...]) -> str:
    try:
        read(value)
    except refusals:
        return "refused"
    except BaseException as error:
        return f"raised {type(error).__name__}: {str(error)[:200]}"
    return "read"
