"""How a command gives back what it found; it stands alone because `fdkit teachers` needs nothing that imports torch."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Outcome(NamedTuple):
    """What a command found: plain numbers for `--json`, and the way to show them to a person."""

    numbers: dict[str, Any]
    show: Callable[[], None]
    exit_code: int = 0
