"""How processes find each other: a store that all reach, and a name for this meeting that no earlier one had.

torchrun keeps one store through all its restarts, and what processes of an earlier attempt left there, such as the
addresses they listened at, is still to be read. So processes meet first: each leaves a new token, rank 0 says which
tokens it saw and what the meeting is called, and who finds its own token among them knows that this is no old message.
"""

import json
import os
import queue
import threading
import time
import uuid
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from fdkit.errors import DistributedError

POLL_SECONDS = 0.05
CONNECT_LEEWAY = 5.0
"""Seconds that a connection may take beyond the time-out, by which torch itself gives up where nobody listens."""


def open_store(timeout_seconds: float, *, serves: bool) -> Any:
    """A connection to the store at MASTER_ADDR:MASTER_PORT; serves: keep the store in this process.

    Raises RuntimeError, as torch does, if the port is taken or nobody is there in time; DistributedError if what is
    there does not answer as a store does.
    """
    if serves:
        return _store(timeout_seconds, serves=True)
    # In a thread, as torch waits without end for a program that takes the connection and says nothing.
    outcome: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def connect() -> None:
        try:
            outcome.put(_store(timeout_seconds, serves=False))
        except Exception as error:
            outcome.put(error)

    threading.Thread(target=connect, name="fdkit-connect", daemon=True).start()
    try:
        found = outcome.get(timeout=timeout_seconds + CONNECT_LEEWAY)
    except queue.Empty:
        raise DistributedError(
            f"{_place()} takes connections and does not answer: another program may listen there",
            "choose another port with --master-port or --rdzv-endpoint",
        ) from None
    if isinstance(found, Exception):
        raise found
    return found


def _place() -> str:
    return f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"


def _store(timeout_seconds: float, *, serves: bool) -> Any:
    return dist.TCPStore(  # type: ignore[attr-defined]  # public, and missing from torch's list of names
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=serves,
        timeout=timedelta(seconds=timeout_seconds),
        wait_for_workers=False,
        multi_tenant=True,
        use_libuv=os.environ.get("USE_LIBUV", "1") == "1",
    )


def is_kept_by_torchrun() -> bool:
    """Whether the store is in the process of torchrun, which outlives those it starts, rather than in rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def meet(store: Any, rank: int, size: int, timeout_seconds: float) -> str:
    """The name of this meeting, the same on every rank and never used before, once all are there.

    Raises DistributedError naming the ranks that did not come in time.
    """
    token, deadline = uuid.uuid4().hex, time.monotonic() + timeout_seconds
    store.set(f"fdkit/token/{rank}", token)
    if rank == 0:
        return _invite(store, size, token, deadline, timeout_seconds)
    while time.monotonic() < deadline:
        name, tokens = json.loads(_read(store, ["fdkit/meeting"])[0] or '["", []]')
        if token in tokens:
            store.set(f"fdkit/here/{rank}", name)
            return str(name)
        time.sleep(POLL_SECONDS)
    raise _nobody_came([0], rank, size, timeout_seconds)


def _invite(store: Any, size: int, token: str, deadline: float, timeout_seconds: float) -> str:
    name, missing = uuid.uuid4().hex, list(range(1, size))
    while time.monotonic() < deadline:
        tokens = _read(store, [f"fdkit/token/{number}" for number in range(1, size)])
        store.set("fdkit/meeting", json.dumps([name, [token, *tokens]]))
        here = _read(store, [f"fdkit/here/{number}" for number in range(1, size)])
        missing = [number for number, seen in enumerate(here, start=1) if seen != name]
        if not missing:
            return name
        time.sleep(POLL_SECONDS)
    raise _nobody_came(missing, 0, size, timeout_seconds)


def _read(store: Any, keys: list[str]) -> list[str]:
    """The values of some keys, "" for those that are not there."""
    if store.check(keys):
        return [value.decode() for value in store.multi_get(keys)]
    return [store.get(key).decode() if store.check([key]) else "" for key in keys]


def _nobody_came(missing: list[int], rank: int, size: int, seconds: float) -> DistributedError:
    names = ", ".join(f"rank {number}" for number in missing)
    return DistributedError(
        f"rank {rank} of {size} waited {seconds:g} s at {_place()} for {names}",
        "see whether each host started its processes, with the same --nnodes, --rdzv-endpoint and --rdzv-id",
    )
