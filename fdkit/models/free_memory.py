"""Networks that this machine has no memory for are refused while they are made, before it is all taken.

Linux hands out memory that it has not got and ends a process when that is found out, without a word. What a file of
unknown origin describes may be of any size.
"""

from pathlib import Path
from typing import Any, Self

import torch
from torch.overrides import TorchFunctionMode

MAKERS = {torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn}
"""What weights are made with."""
MEMORY_INFO = Path("/proc/meminfo")
CONTROL_GROUP = Path("/sys/fs/cgroup")


class WithinFreeMemory(TorchFunctionMode):
    """Raises MemoryError inside, once the weights made there take more bytes than are free on the machine."""

    def __enter__(self) -> Self:
        self.free, self.made = free_bytes(), 0
        return super().__enter__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in MAKERS and result.device.type == "cpu":
            self.made += result.nbytes  # asked for; it is taken when numbers are written into it
            if self.free is not None and self.made > self.free:
                raise MemoryError(
                    f"its weights take more than the {self.free / 1e9:.1f} GB of memory that are free"
                )
        return result


def free_bytes() -> int | None:
    """Bytes of memory that this process can still be given, swap included; None where the system does not tell."""
    known = _stated(MEMORY_INFO)
    if "MemAvailable" not in known:
        return None
    free = known["MemAvailable"] + known.get("SwapFree", 0)
    try:
        limit, used = (int((CONTROL_GROUP / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no such group, or "max": no limit
        return free
    return min(free, max(0, limit - used + _stated(CONTROL_GROUP / "memory.stat").get("inactive_file", 0)))


def _stated(path: Path) -> dict[str, int]:
    """Numbers of a file of the kernel's, by name; kB become bytes. None of them if it cannot be read."""
    try:
        lines = [line.replace(":", "").split() for line in path.read_text().splitlines()]
        return {name: int(number) * (1024 if unit == ["kB"] else 1) for name, number, *unit in lines}
    except (OSError, ValueError):
        return {}
