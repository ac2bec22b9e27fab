"""The errors a user can meet, each with its exit code; every other exception is a bug (exit code 1)."""

import difflib
import errno
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


class FdkitError(Exception):
    """A failure explained to the user: what failed, the value and where it came from, and what to do.

    hint: the command or change that fixes it, printed on its own line; empty if the message says it all.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message


class ConfigError(FdkitError):
    """Wrong usage or configuration."""

    exit_code = 2


class DataError(FdkitError):
    """The images are missing, unreadable or too few."""

    exit_code = 3


class WeightsError(FdkitError):
    """Weights are missing, unsafe to open, damaged, or belong to another model."""

    exit_code = 4


class OutputError(FdkitError):
    """The output folder is in use, holds another run, or cannot be written."""

    exit_code = 5


class ResourceError(FdkitError):
    """Memory, disk or a device is missing."""

    exit_code = 6


class NumericsError(FdkitError):
    """Loss or gradients are not finite."""

    exit_code = 7


class DistributedError(FdkitError):
    """A rank died or did not answer."""

    exit_code = 8


class PreemptedError(FdkitError):
    """Training was asked to stop and saved its state; running the command again continues."""

    exit_code = 75


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A phrase naming the nearest known names, such as "did you mean clip_vitl?"; empty if none is near."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f"did you mean {' or '.join(close)}?" if close else ""


_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_BARRED = {
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ESTALE,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.ENODEV,
}
_NUMBER = re.compile(r"os error (\d+)\b")


def write_failure(
    error: BaseException, folder: Path | None = None, hint: str = ""
) -> ResourceError | OutputError | None:
    """What a write that failed means for the user; None for any other error.

    A full disk counts wherever it is met; what cannot be written for another reason, only below `folder`.
    hint: what to do once there is room.
    """
    number = getattr(error, "errno", None)
    if number is None and (found := _NUMBER.search(str(error))):  # safetensors gives it in words alone
        number = int(found[1])
    name = getattr(error, "filename", None)
    where = name if name is not None else folder
    told = getattr(error, "strerror", None) or str(error)
    what = f"{where}: {told}" if where is not None else told
    if number in _FULL:
        return ResourceError(f"no room left on the disk: {what}", hint or "free some space and run it again")
    if number not in _BARRED or folder is None:
        return None
    if name is not None and not Path(str(name)).absolute().is_relative_to(folder.absolute()):
        return None
    return OutputError(
        f"cannot be written: {what}", "see whether the folder's disk is there and may be written"
    )


def memory_failure(error: BaseException) -> ResourceError | None:
    """What memory that ran out, of this machine or a GPU, means for the user; None for any other error."""
    is_device = type(error).__name__ == "OutOfMemoryError"  # PyTorch's, by name: nothing here imports it
    if not is_device and not isinstance(error, MemoryError) and "DefaultCPUAllocator" not in str(error):
        return None
    told = str(error).strip().partition("\n")[0].partition(". ")[0]
    of = "the device is" if is_device else "this machine is"
    return ResourceError(
        f"{of} out of memory{f': {told}' if told else ''}",
        "a smaller --batch-size, or --train.batch-size of a training, needs less; so do fewer --loader.workers",
    )


@contextmanager
def write_failures_explained(folder: Path, hint: str = "") -> Iterator[None]:
    """Turn a failed write into the error that `write_failure` makes of it."""
    try:
        yield
    except FdkitError:
        raise
    except Exception as error:
        explained = write_failure(error, folder, hint)
        if explained is None:
            raise
        raise explained from error
