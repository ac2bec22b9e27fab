"""A headless Chromium that opens a page from disk, driven over pipes by the DevTools protocol.

What it offers is what a reader does: look, hover, tap, press keys; and what a reader never sees: errors in the console.
"""

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-quic",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-pipe",
)  # fmt: skip
PATIENCE = 60.0
"""Seconds to wait for an answer."""
KEYS = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Tab": 9}


def chromium_or_skip() -> str:
    """The browser's path; skips the test where none is installed."""
    for name in NAMES:
        if path := shutil.which(name):
            return path
    pytest.skip("no Chromium is installed: `make browser` installs Debian's package")


class Browser:
    """One page in one browser; see `open_page`."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands = commands
        self._answers = answers
        self._buffer = b""
        self._last = 0
        self._session: str | None = None
        self.complaints: list[str] = []
        """Errors and warnings of the console, exceptions, and what the page's policy blocked."""

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """The browser's answer to a command of the DevTools protocol."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            answer = self._receive()
            if answer.get("id") == self._last:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
        raise TimeoutError(f"the browser did not answer {method}")

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            part = os.read(self._answers, 1 << 20)
            if not part:
                raise EOFError("the browser has ended")
            self._buffer += part
        text, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(text)
        self._note(message)
        return message

    def _note(self, message: dict[str, Any]) -> None:
        params = message.get("params", {})
        if message.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(str(params["exceptionDetails"]))
        elif message.get("method") == "Log.entryAdded" and params["entry"]["level"] != "info":
            self.complaints.append(params["entry"]["text"])
        elif message.get("method") == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.complaints.append(str(params["args"]))

    def attach(self) -> None:
        """Take the browser's first page."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def resize(self, width: int, height: int, *, phone: bool = False) -> None:
        """The window's inner size in CSS pixels; a phone has touch and twice the dots."""
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if phone else 1,
            mobile=phone,
        )
        self.send("Emulation.setTouchEmulationEnabled", enabled=phone)

    def set_dark(self, dark: bool) -> None:
        """Whether the reader prefers dark pages."""
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[feature])

    def open(self, path: Path) -> None:
        """Load a page from disk and wait until it is there."""
        self.send("Page.navigate", url=path.absolute().as_uri())
        self.wait_for("document.readyState === 'complete'")

    def run(self, expression: str) -> Any:
        """What a script's expression gives on the page."""
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait_for(self, condition: str) -> None:
        """Wait until an expression holds."""
        end = time.monotonic() + PATIENCE
        while not self.run(f"Boolean({condition})"):
            if time.monotonic() > end:
                raise TimeoutError(f"{condition} never held")
            time.sleep(0.05)

    def place(self, selector: str, x: float = 0.5, y: float = 0.5) -> tuple[float, float]:
        """Where a point of an element is, scrolled into view; x, y: from 0 to 1 from its left and top."""
        found = f"document.querySelector({json.dumps(selector)})"
        self.run(f"{found}.scrollIntoView({{block: 'center'}})")
        box = self.run(
            f"(({{left, top, width, height}}) => [left, top, width, height])({found}.getBoundingClientRect())"
        )
        return box[0] + x * box[2], box[1] + y * box[3]

    def hover(self, selector: str, x: float = 0.5, y: float = 0.5) -> None:
        """Move the mouse over a point of an element."""
        left, top = self.place(selector, x, y)
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=left, y=top)

    def click(self, selector: str, x: float = 0.5, y: float = 0.5) -> None:
        """Press and release the mouse."""
        left, top = self.place(selector, x, y)
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=left, y=top, button="left", clickCount=1)

    def tap(self, selector: str, x: float = 0.5, y: float = 0.5) -> None:
        """Touch a point of an element and let go."""
        left, top = self.place(selector, x, y)
        self.send("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": left, "y": top}])
        self.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def press(self, key: str) -> None:
        """Press a key, such as ArrowLeft or +."""
        text = {"text": key} if len(key) == 1 else {"windowsVirtualKeyCode": KEYS[key]}
        self.send("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key)

    def screenshot(self, path: Path, *, whole: bool = True) -> Path:
        """A picture (PNG) of the page, the whole of it or what the window shows."""
        options: dict[str, Any] = {}
        if whole:
            size = self.send("Page.getLayoutMetrics")["cssContentSize"]
            clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
            options = {"captureBeyondViewport": True, "clip": clip}
        content = self.send("Page.captureScreenshot", format="png", **options)["data"]
        path.write_bytes(base64.b64decode(content))
        return path


@contextmanager
def browser() -> Iterator[Browser]:
    """A browser with an empty page, ended afterwards; skips the test where none is installed."""
    program = chromium_or_skip()
    read_commands, commands = os.pipe()
    answers, write_answers = os.pipe()

    def as_three_and_four() -> None:  # where the browser looks for its pipes
        ends = os.dup(read_commands), os.dup(write_answers)
        os.dup2(ends[0], 3)
        os.dup2(ends[1], 4)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=as_three_and_four,  # noqa: PLW1509
            close_fds=False,
        )
        os.close(read_commands)
        os.close(write_answers)
        try:
            page = Browser(commands, answers)
            page.attach()
            yield page
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            os.close(commands)
            os.close(answers)
