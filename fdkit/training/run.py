"""The run folder: who may write it, what was run, how it went.

`config.yaml` is the whole configuration, `run.json` the state and everything needed to know where the numbers come
from, `metrics.jsonl` a line a logged step, `log.txt` what was said, `errors/` what went wrong, in full. Rank 0 writes;
on other ranks a Run is silent, but for the traceback of a failure.
"""

import fcntl
import json
import logging
import os
import socket
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Literal, Self

from fdkit.config import parse_yaml
from fdkit.data.terminal import PlainFormatter
from fdkit.errors import (
    ConfigError,
    DistributedError,
    FdkitError,
    OutputError,
    PreemptedError,
    write_failure,
    write_failures_explained,
)
from fdkit.training.agreement import flat, require_same_setting
from fdkit.training.checkpoint import write_whole
from fdkit.training.distributed import current_world, launchers, told_of_loss
from fdkit.training.environment import environment
from fdkit.training.run_files import (
    FAILED,
    QuietLog,
    count_damaged_metrics,
    failed_steps,
    kind_of,
    read_metrics,
    read_status,
    refuse_a_third_time,
    set_aside,
)

__all__ = ["Run", "check_unchanged", "environment", "error_text", "read_metrics"]

log = logging.getLogger("fdkit")

State = Literal["planned", "running", "preempted", "done", "failed"]

HEARTBEAT_SECONDS = 15.0
STALE_SECONDS = 600.0
HARMLESS = (
    "output", "device", "resume", "overwrite", "json", "recipe", "loader.workers", "loader.decoder",
    "loader.retry_seconds", "loader.timeout_seconds", "train.log_every_steps", "train.save_every_minutes",
    "train.save_every_steps", "train.keep_checkpoints", "train.timeout_seconds", "train.max_bad_steps",
)  # fmt: skip
"""Fields that a resumed run may change: they do not change what is learned."""
HINT_OF_A_FULL_DISK = (
    "free some space (the checkpoints that are there are intact), then run the same command with --resume"
)


class Run:
    """A run folder held by this process; a context manager that records how the block inside ends."""

    _held: ClassVar[set[Path]] = set()

    def __init__(self, folder: Path, config_yaml: str, *, resumed: bool, writes: bool) -> None:
        self.folder = folder
        self.config_yaml = config_yaml
        self.resumed = resumed
        """Whether the folder already held this run."""
        self.writes = writes
        self.at_step: int | None = None
        """The step that training is at; None before the first."""
        self._lock: int | None = None
        self._facts: dict[str, Any] = {}
        self._last_heartbeat = 0.0
        self._log_handler: logging.Handler | None = None
        self._log_level = logging.NOTSET
        self._launchers: list[str] = []
        self._loss = ExitStack()

    @classmethod
    def create(
        cls,
        folder: Path,
        config_yaml: str,
        *,
        resume: bool = False,
        overwrite: bool = False,
        command: Sequence[str] | None = None,
    ) -> Self:
        """The run in `folder`, locked: new, or with `resume` the one that is there, if any.

        overwrite: a run that is there is moved to FOLDER.old-N, never deleted. command: what was typed.
        A process that torchrun started again goes on with its run, whatever was typed; every process calls this.
        Raises OutputError if the folder is in use, holds something and neither was asked for, or cannot be
        written; ConfigError if a resumed run would change its configuration, or the processes have different ones.
        """
        folder = Path(folder).absolute()
        if resume and overwrite:
            raise ConfigError("--resume and --overwrite exclude each other")
        require_same_setting(config_yaml, current_world())
        launchers_now = launchers(current_world())
        if not current_world().is_main:
            return cls(folder, config_yaml, resumed=resume, writes=False)
        kind = kind_of(folder)
        there = kind != "empty"
        is_restart = kind == "run" and _begun_by(folder, launchers_now)
        if is_restart:
            log.info("started again by torchrun: the run in %s goes on", folder)
            resume, overwrite = True, False
        if there and not (kind == "run" and (resume or overwrite)):
            raise _occupied(folder, is_run=kind == "run")
        if there and overwrite:
            _move_away(folder)
            there = False
        if resume and not there:
            log.info("--resume: %s holds no run yet; starting one", folder)
        run = cls(folder, config_yaml, resumed=there, writes=True)
        run._launchers = launchers_now
        run._acquire(is_restart=is_restart)
        try:
            with write_failures_explained(folder):
                run._open(list(sys.argv if command is None else command), is_restart=is_restart)
        except BaseException:
            run._release()
            raise
        return run

    def __enter__(self) -> Self:
        if self.writes:
            try:
                with write_failures_explained(self.folder):
                    self._log_handler = QuietLog(self.folder / "log.txt", encoding="utf-8")
            except BaseException:
                self._release()
                raise
            self._log_handler.setFormatter(PlainFormatter("%(asctime)s %(levelname)s %(message)s"))
            self._log_level = log.level
            log.setLevel(logging.DEBUG)
            log.addHandler(self._log_handler)
            self._loss.enter_context(told_of_loss(self._record_loss))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loss.close()
        explained = None if error is None else write_failure(error, self.folder, HINT_OF_A_FULL_DISK)
        ended = explained or error
        try:
            lost = self._record_end(ended, kind)
        finally:
            if self._log_handler is not None:
                log.removeHandler(self._log_handler)
                log.setLevel(self._log_level)
                with suppress(OSError):  # what a full disk did not take is said by now
                    self._log_handler.close()
            self._release()
        if explained is not None:
            raise explained from error
        if error is None and lost is not None:
            raise write_failure(lost, self.folder, HINT_OF_A_FULL_DISK) or lost

    def _record_end(self, error: BaseException | None, kind: type[BaseException] | None) -> OSError | None:
        """Say in run.json how the run ended; what kept that from being written."""
        state, code = _outcome(error)
        if not self.writes:
            if error is not None and state == "failed" and self.folder.is_dir():
                self._write_error(f"rank-{current_world().rank}-traceback.txt", error_text(error))
            return None
        reason = str(error) if error is not None and str(error) else (kind.__name__ if kind else "")
        try:
            if error is not None and state == "failed":
                self.save_error("traceback.txt", error_text(error))
        except OSError as failure:  # a full disk must not hide the error that ended the run
            log.error("%s: cannot keep the traceback: %s", self.folder, failure)
        try:
            failed_at = self._failed_at() if state == "failed" else {}
            self.update(state=state, exit_code=code, reason=reason, ended=_now(), **failed_at)
        except OSError as failure:
            log.error("%s: cannot record how the run ended: %s", self.folder, failure)
            return failure
        return None

    @property
    def facts(self) -> dict[str, Any]:
        """A copy of what run.json holds; empty on ranks that do not write."""
        return dict(self._facts)

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints are."""
        return self.folder / "checkpoints"

    def update(self, **facts: Any) -> None:
        """Add facts (plain JSON) to run.json, or replace them."""
        if self.writes:
            self._facts |= facts
            self._facts["updated"] = _now()
            write_whole(self.folder / "run.json", json.dumps(self._facts, indent=2, default=str) + "\n")

    def heartbeat(self, step: int) -> None:
        """Say in run.json, every 15 s at most, that the run lives and where it is."""
        if self.writes and time.monotonic() - self._last_heartbeat >= HEARTBEAT_SECONDS:
            self._last_heartbeat = time.monotonic()
            self.update(step=step)

    def check_data(self, fingerprint: str, *, name: str) -> None:
        """Record what the run trains on. Raises ConfigError if a resumed run began with other images."""
        before = self._facts.get("data", {})
        if before and before["fingerprint"] != fingerprint:
            raise ConfigError(
                f"{self.folder}: the images of {name} are not those the run began with "
                f"({before['name']}): fingerprint {fingerprint[:12]}, was {before['fingerprint'][:12]}",
                "resume with the same images, or choose another --output",
            )
        self.update(data={"name": name, "fingerprint": fingerprint})

    def log_metrics(self, metrics: Mapping[str, float | int]) -> None:
        """Append a line to metrics.jsonl; numbers that are not finite become null."""
        if not self.writes:
            return
        line = {name: value if abs(value) < float("inf") else None for name, value in metrics.items()}
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; one cut short by a crash is left out."""
        return read_metrics(self.folder)

    def sync_metrics(self) -> None:
        """Have metrics.jsonl on the disk before a checkpoint that counts on it."""
        path = self.folder / "metrics.jsonl"
        if self.writes and path.exists():
            with path.open("rb") as file:
                os.fsync(file.fileno())

    def forget_metrics_after(self, step: int) -> None:
        """Drop the lines of steps that will be done again, so that each step is there once."""
        path = self.folder / "metrics.jsonl"
        if self.writes and path.exists():
            if damaged := count_damaged_metrics(self.folder):
                log.warning("%s: %d damaged lines are left out", path, damaged)
            kept = [line for line in self.metrics() if line["step"] <= step]
            write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))

    def save_error(self, name: str, text: str) -> Path:
        """Write something for the one who looks for the cause into errors/; its path."""
        return self._write_error(name, text) if self.writes else self.folder / "errors"

    def _record_loss(self, error: DistributedError) -> None:
        """Say how the run ended where the process that waits for another one is ended by its watch."""
        self.update(
            state="failed", exit_code=error.exit_code, reason=str(error), ended=_now(), **self._failed_at()
        )

    def _failed_at(self) -> dict[str, list[int]]:
        """What run.json says of the steps at which this attempt and the one before failed, if training had begun."""
        return {} if self.at_step is None else {FAILED: [*failed_steps(self._facts)[-1:], self.at_step]}

    def _write_error(self, name: str, text: str) -> Path:
        path = self.folder / "errors" / f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{name}"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    def _open(self, command: list[str], *, is_restart: bool) -> None:
        """Check or write config.yaml and begin run.json. Raises DistributedError for a restart that is of no use."""
        config = self.folder / "config.yaml"
        if self.resumed:
            self._facts = read_status(self.folder)
        if is_restart:
            refuse_a_third_time(self._facts, self.folder)
        if self.resumed and config.exists():
            check_unchanged(_text_of(config), self.config_yaml, self.folder)
        else:
            write_whole(config, self.config_yaml)
        self.update(
            state="planned",
            exit_code=None,
            reason="",
            command=command,
            host=socket.gethostname(),
            pid=os.getpid(),
            launchers=self._launchers,
            started=self._facts.get("started", _now()),
            resumes=self._facts.get("resumes", -1) + 1,
            **({} if is_restart else {FAILED: []}),
            **environment(),
        )

    def _acquire(self, *, is_restart: bool = False) -> None:
        """Take the folder's lock; the kernel drops it when this process ends, however it ends.

        is_restart: whether the holder was started by the torchrun that started this, which has ended it.
        """
        path = self.folder / "lock"
        if path in Run._held:
            raise OutputError(f"{self.folder}: in use by this process")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise write_failure(error) or OutputError(
                f"{self.folder}: cannot be written: {error.strerror}", "choose another --output"
            ) from error
        try:
            holder = _lock_or_refuse(descriptor, self.folder, is_restart=is_restart)
        except BaseException:
            os.close(descriptor)
            raise
        if holder:
            log.info(
                "%s: taking over the lock of pid %s on %s, which ended", path, holder["pid"], holder["host"]
            )
        self._lock = descriptor
        Run._held.add(path)
        try:
            with write_failures_explained(self.folder):
                os.ftruncate(descriptor, 0)
                os.pwrite(
                    descriptor, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode(), 0
                )
        except BaseException:
            self._release()
            raise

    def _release(self) -> None:
        if self._lock is None:
            return
        with suppress(OSError):  # the kernel lets go in any case
            os.ftruncate(self._lock, 0)  # removing it would let two others lock two files of one name
        os.close(self._lock)
        self._lock = None
        Run._held.discard(self.folder / "lock")


def check_unchanged(before: str, now: str, folder: Path) -> None:
    """Raises ConfigError listing the fields of two configurations (YAML) that differ, but for harmless ones."""
    old, new = (dict(flat(parse_yaml(text, str(folder / "config.yaml")))) for text in (before, now))
    lines = [
        f"  {name}: was {old.get(name, '(not there)')!r}, now {new.get(name, '(not there)')!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
        and not any(name == field or name.startswith(f"{field}.") for field in HARMLESS)
    ]
    if lines:
        raise ConfigError(
            f"{folder}: the resumed run has another configuration:\n" + "\n".join(lines),
            f"resume with --recipe {folder / 'config.yaml'}, or choose another --output",
        )


def error_text(error: BaseException) -> str:
    """The traceback, with what caused it."""
    return "".join(traceback.format_exception(error))


def _outcome(error: BaseException | None) -> tuple[State, int]:
    if error is None:
        return "done", 0
    if isinstance(error, PreemptedError):
        return "preempted", error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "failed", 130
    if isinstance(error, SystemExit):
        return "failed", error.code if isinstance(error.code, int) else 1
    return "failed", error.exit_code if isinstance(error, FdkitError) else 1


def _occupied(folder: Path, *, is_run: bool) -> OutputError:
    if is_run:
        return OutputError(
            f"{folder}: already holds a run",
            "continue it with --resume, or set it aside with --overwrite (moved to "
            f"{folder.name}.old-N, not deleted)",
        )
    return OutputError(
        f"{folder}: not empty and not a run folder; --resume and --overwrite work on run folders only",
        "choose another --output",
    )


def _begun_by(folder: Path, launchers_now: list[str]) -> bool:
    """Whether the run in a folder was last started by one of the torchrun agents that started this process, too."""
    try:
        facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        return bool(set(facts.get("launchers", [])) & set(launchers_now))
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return False


def _move_away(folder: Path) -> None:
    """Rename a run that nobody holds to FOLDER.old-N."""
    holder = Run(folder, "", resumed=True, writes=True)
    holder._acquire()
    holder._release()
    try:
        aside = set_aside(folder, "old")
    except OSError as error:
        raise OutputError(
            f"{folder}: cannot be moved aside: {error.strerror}", "choose another --output"
        ) from error
    log.info("--overwrite: the run that was in %s is now in %s", folder, aside)


def _lock_or_refuse(descriptor: int, folder: Path, *, is_restart: bool) -> dict[str, Any]:
    """Lock the open lock file; who held it and ended without letting go, {} if nobody did.

    A POSIX record lock: forked loader workers do not inherit it, so it never outlives this process. A holder on
    another host, which such a lock may not reach, counts as alive while run.json was touched in the last 10 minutes.
    """
    text = os.pread(descriptor, 1000, 0)
    try:
        holder = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        holder = {}
    if not isinstance(holder, dict) or not {"pid", "host"} <= holder.keys():
        holder = {}
    who = f"pid {holder.get('pid', '?')} on {holder.get('host', '?')}"
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise OutputError(f"{folder}: in use by {who}", "wait for it, or choose another --output") from error
    status = folder / "run.json"
    if holder and holder["host"] != socket.gethostname() and status.exists() and not is_restart:
        quiet = time.time() - status.stat().st_mtime
        if quiet < STALE_SECONDS:
            when = f"{quiet:.0f} s ago" if quiet >= 0 else f"{-quiet:.0f} s ahead of this machine's clock"
            wait = f" or wait {STALE_SECONDS - quiet:.0f} s" if quiet >= 0 else ""
            raise OutputError(
                f"{folder}: in use by {who}, which wrote {when}",
                f"if that process is gone, delete {folder / 'lock'}{wait}",
            )
    return holder


def _text_of(config: Path) -> str:
    """The text of config.yaml. Raises ConfigError if it is none."""
    try:
        return config.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{config}: damaged: {error}",
            "put a sound copy back, or move it away and resume with the same options: it is then written anew",
        ) from error


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
