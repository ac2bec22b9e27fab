import errno
import hashlib
import http.server
import json
import multiprocessing
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fdkit.errors import ResourceError, WeightsError
from fdkit.teachers import download as module
from fdkit.teachers.download import UnreachableError, download

CONTENT = bytes(range(256)) * 4000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """A file server whose faults are set from outside."""

    content = CONTENT
    version: str | None = '"v1"'
    gives_ranges = True
    gives_length = True
    statuses: list[int]
    """Answered first, one a request, in place of the file."""
    cuts: list[int]
    """After how many bytes the next answers end."""
    ranges: list[str | None]
    """What each request asked for."""
    delay = 0.0

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.statuses, self.cuts, self.ranges = [], [], []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/files/x.pth"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server = self.server
        server.ranges.append(self.headers["Range"])
        time.sleep(server.delay)
        if server.statuses:
            return self.send_error(server.statuses.pop(0))
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
        is_same = self.headers["If-Range"] in (None, server.version)
        start = int(asked[1]) if asked and is_same and server.gives_ranges else 0
        if start >= len(server.content):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header(
                "Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}"
            )
        if server.version:
            self.send_header("ETag", server.version)
        if server.gives_length:
            self.send_header("Content-Length", str(len(server.content) - start))
        self.end_headers()
        body = server.content[start:]
        self.wfile.write(body[: server.cuts.pop(0)] if server.cuts else body)
        return None

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(module, "_PAUSE_SECONDS", 0.0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield running
        running.shutdown()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints" / "x.pth"


def beside(path: Path) -> set[str]:
    return {file.name for file in path.parent.iterdir()}


@pytest.mark.parametrize("sha256", [None, SHA256, SHA256[:8]])
def test_a_file_comes_whole_and_alone(server: Server, path: Path, sha256: str | None) -> None:
    download(server.url, path, sha256=sha256)
    assert path.read_bytes() == CONTENT
    assert beside(path) == {"x.pth"}
    download(server.url, path)
    assert len(server.ranges) == 1


def test_a_cut_download_goes_on_where_it_stopped(server: Server, path: Path) -> None:
    server.cuts = [300_000, 200_000]
    download(server.url, path, sha256=SHA256)
    assert server.ranges == [None, "bytes=300000-", "bytes=500000-"]
    assert path.read_bytes() == CONTENT


def test_a_later_run_goes_on_with_what_is_kept(server: Server, path: Path) -> None:
    server.cuts = [400_000, *[0] * module.TRIES]
    with pytest.raises(
        UnreachableError, match=r"ended after 400000 of 1024000 bytes; 400000 bytes are kept in x.pth.part"
    ):
        download(server.url, path)
    assert not path.exists()
    server.ranges.clear()
    server.cuts = []
    download(server.url, path, sha256=SHA256)
    assert server.ranges == ["bytes=400000-"]
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize(
    "fault", ["no ranges", "no mark of its version", "another file by now", "another address"]
)
def test_what_cannot_be_continued_starts_anew(server: Server, path: Path, fault: str) -> None:
    server.cuts = [400_000, *[0] * module.TRIES]
    server.version = None if fault == "no mark of its version" else '"v1"'
    with pytest.raises(UnreachableError):
        download(server.url, path)
    server.cuts = []
    server.gives_ranges = fault != "no ranges"
    if fault == "another file by now":
        server.version, server.content = '"v2"', CONTENT[::-1]
    address = server.url + ("?other" if fault == "another address" else "")
    download(address, path)
    assert path.read_bytes() == server.content


def test_an_answer_about_another_file_starts_anew(server: Server, path: Path) -> None:
    server.cuts = [400_000, *[0] * module.TRIES]
    with pytest.raises(UnreachableError):
        download(server.url, path)
    note = path.with_name("x.pth.part.json")
    note.write_text(json.dumps({**json.loads(note.read_text()), "total": 999}))
    server.cuts = []
    download(server.url, path, sha256=SHA256)
    assert path.read_bytes() == CONTENT


def test_a_part_that_is_complete_is_taken_without_asking(server: Server, path: Path) -> None:
    path.parent.mkdir()
    path.with_name("x.pth.part").write_bytes(CONTENT)
    note = {"url": server.url, "validator": '"v1"', "total": len(CONTENT)}
    path.with_name("x.pth.part.json").write_text(json.dumps(note))
    download(server.url, path, sha256=SHA256)
    assert not server.ranges
    assert beside(path) == {"x.pth"}


def test_a_part_longer_than_the_file_starts_anew(server: Server, path: Path) -> None:
    path.parent.mkdir()
    path.with_name("x.pth.part").write_bytes(CONTENT + b"more")
    note = {"url": server.url, "validator": '"v1"', "total": 5_000_000}
    path.with_name("x.pth.part.json").write_text(json.dumps(note))
    download(server.url, path)
    assert path.read_bytes() == CONTENT


def test_a_server_that_tells_no_length_is_read_to_its_end(server: Server, path: Path) -> None:
    server.gives_length = False
    download(server.url, path, sha256=SHA256)
    assert path.read_bytes() == CONTENT


def test_a_wrong_checksum_leaves_nothing_behind(server: Server, path: Path) -> None:
    with pytest.raises(
        WeightsError, match=rf"wrong checksum: .* has SHA-256 {SHA256}, the published one is 00ff"
    ) as raised:
        download(server.url, path, sha256="00ff")
    assert server.url in raised.value.message
    assert raised.value.exit_code == 4
    assert not {"x.pth", "x.pth.part", "x.pth.part.json"} & beside(path)


@pytest.mark.parametrize(
    ("status", "words"),
    [(404, "no such file"), (403, "refuses it"), (401, "asks for a login"), (418, "answers 418")],
)
def test_refusals_are_told_at_once(server: Server, path: Path, status: int, words: str) -> None:
    server.statuses = [status] * 9
    with pytest.raises(UnreachableError, match=words):
        download(server.url, path)
    assert len(server.ranges) == 1


def test_a_server_in_trouble_is_asked_again(server: Server, path: Path) -> None:
    server.statuses = [503, 500, 429]
    download(server.url, path)
    assert path.read_bytes() == CONTENT
    path.unlink()
    server.statuses = [503] * module.TRIES
    with pytest.raises(UnreachableError, match="answers 503"):
        download(server.url, path)


def test_a_silent_server_is_given_up(server: Server, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STALL_SECONDS", 0.05)
    monkeypatch.setattr(module, "TRIES", 2)
    server.delay = 0.3
    start = time.perf_counter()
    with pytest.raises(UnreachableError, match=r"the connection broke \(TimeoutError\)"):
        download(server.url, path)
    assert time.perf_counter() - start < 5


def test_no_server_and_no_address_are_told(path: Path) -> None:
    with pytest.raises(UnreachableError, match=r"no connection to 127.0.0.1: .*refused"):
        download("http://127.0.0.1:9/x.pth", path)
    (path.parent / "secret").write_text("x")
    for address in (f"file://{path.parent}/secret", "x.pth", "ftp://127.0.0.1/x.pth"):
        with pytest.raises(UnreachableError, match=r"no http\(s\) address"):
            download(address, path)


@pytest.mark.parametrize("when", ["before", "while writing"])
def test_a_full_disk_is_named_with_its_remedy(
    server: Server, path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    if when == "before":
        free = type("Usage", (), {"free": 5_000})
        monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: free)
    else:

        def full(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(ResourceError, match=r"no room for x.pth.* in .*checkpoints: ") as raised:
        download(server.url, path)
    assert raised.value.exit_code == 6
    assert "TORCH_HOME" in raised.value.hint
    assert not path.exists()


def _download_in_process(url: str, path: Path, started: Any) -> None:
    started.wait()
    download(url, path, sha256=SHA256)


@pytest.mark.distributed
def test_of_two_processes_one_downloads(server: Server, path: Path) -> None:
    server.delay = 0.3
    context = multiprocessing.get_context("fork")
    started = context.Event()
    processes = [
        context.Process(target=_download_in_process, args=(server.url, path, started)) for _ in range(2)
    ]
    for process in processes:
        process.start()
    started.set()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(server.ranges) == 1
    assert path.read_bytes() == CONTENT
    assert beside(path) == {"x.pth"}


def test_threads_wait_for_each_other_too(server: Server, path: Path) -> None:
    server.delay = 0.2
    threads = [threading.Thread(target=download, args=(server.url, path)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(server.ranges) == 1
    assert path.read_bytes() == CONTENT


def test_a_lock_left_by_a_dead_process_does_not_hold(server: Server, path: Path) -> None:
    path.parent.mkdir()
    path.with_name(".x.pth.lock").touch()
    download(server.url, path)
    assert path.read_bytes() == CONTENT


def test_progress_is_shown_on_a_terminal_alone(
    server: Server, path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    download(server.url, path)
    assert capfd.readouterr().err == ""
    path.unlink()
    monkeypatch.setattr(module.sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    download(server.url, path)
    assert "x.pth" in capfd.readouterr().err
    assert path.read_bytes() == CONTENT


def test_permissions_follow_the_umask(server: Server, path: Path) -> None:
    before = os.umask(0o027)
    try:
        download(server.url, path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640
