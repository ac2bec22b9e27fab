"""JSON that may have come from anywhere or been damaged: read, or refused in one way."""

import json
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 200_000_000


def parse_json(text: str | bytes) -> Any:
    """The value in JSON text. Raises ValueError for anything else, also for what is nested too deeply to be read."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises OSError, or ValueError if it holds anything else or is too large."""
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise ValueError(f"{size:,} bytes are more than {MAX_JSON_BYTES:,}")
    value = parse_json(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}, no object")
    return value
