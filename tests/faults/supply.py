"""A hub of this machine, spoken to by the real client: its branches move, its downloads are cut, its files change."""

import hashlib
import http.server
import json
import random
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

REPO = "someone/model"
TIMM_ARGS = {"depth": 1, "embed_dim": 48, "num_heads": 3, "img_size": 32, "num_classes": 0}


class Hub(http.server.ThreadingHTTPServer):
    """Repositories by commit, and what goes wrong with them next."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.commits: dict[str, dict[str, bytes]] = {}
        self.branches: dict[str, str] = {}
        self.cut_after: int | None = None
        """Bytes after which every answer ends."""
        self.lies = False
        """Whether files come with other bytes than their checksums say."""
        self.asked: list[str] = []
        """METHOD path of every request."""
        self.told: list[str] = []
        """What each request says of who asks."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def publish(self, files: dict[str, bytes], branch: str = "main") -> str:
        """A new commit of these files, to which the branch moves; its hash."""
        text = json.dumps({name: hashlib.sha256(data).hexdigest() for name, data in files.items()})
        commit = hashlib.sha1(f"{len(self.commits)} {text}".encode(), usedforsecurity=False).hexdigest()
        self.commits[commit] = files
        self.branches[branch] = commit
        return commit


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        hub = self.server
        hub.asked.append(f"{self.command} {self.path}")
        hub.told.append(self.headers.get("User-Agent", ""))
        parts = unquote(self.path).strip("/").split("/")
        if len(parts) != 5 or "/".join(parts[:2]) != REPO:
            self._head(200 if self.path == "/" else 404, {"Content-Length": "0"})
            return
        revision, name = parts[3:]
        commit = hub.branches.get(revision, revision)
        if commit not in hub.commits:
            self._head(404, {"X-Error-Code": "RevisionNotFound", "Content-Length": "0"})
            return
        if name not in hub.commits[commit]:
            missing = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit, "Content-Length": "0"}
            self._head(404, missing)
            return
        data = hub.commits[commit][name]
        self._head(200, _described(name, data, commit))
        if with_body:
            data = bytes([data[0] ^ 1]) + data[1:] if hub.lies else data
            self.wfile.write(data if hub.cut_after is None else data[: hub.cut_after])

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


def _described(name: str, data: bytes, commit: str) -> dict[str, str]:
    """What the hub says of a file: large ones by SHA-256, small ones by the hash git keeps them under."""
    git = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    mark = git if name.endswith((".json", ".md")) else hashlib.sha256(data).hexdigest()
    return {"ETag": f'"{mark}"', "X-Repo-Commit": commit, "Content-Length": str(len(data))}


@contextmanager
def hub_here(cache: Path) -> Iterator[Hub]:
    """A hub that the client of this process, and of its children, takes for the real one; with an empty cache."""
    from huggingface_hub import constants, file_download
    from huggingface_hub.utils import _http

    hub = Hub()
    threading.Thread(target=hub.serve_forever, args=(0.02,), daemon=True).start()
    wanted = {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_PROGRESS_BARS": True,
    }
    before = {name: getattr(constants, name) for name in wanted}
    waits = _http.time.sleep
    try:
        for name, value in wanted.items():
            setattr(constants, name, value)
        _http.time.sleep = lambda seconds: None  # type: ignore[assignment]  # the client waits between its attempts
        file_download.are_symlinks_supported(cache)
        yield hub
    finally:
        _http.time.sleep = waits  # type: ignore[assignment]
        for name, value in before.items():
            setattr(constants, name, value)
        hub.shutdown()
        hub.server_close()


def timm_files(seed: int) -> dict[str, bytes]:
    """A small timm model as the hub keeps it."""
    import safetensors.torch
    import timm
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        state = timm.create_model("vit_tiny_patch16_224", **TIMM_ARGS).state_dict()
    config = {"architecture": "vit_tiny_patch16_224", "model_args": TIMM_ARGS}
    return {"config.json": json.dumps(config).encode(), "model.safetensors": safetensors.torch.save(state)}


def _damage(blob: Path, kind: str, draw: random.Random) -> None:
    data = bytearray(blob.read_bytes())
    if kind == "a flipped bit in the cache":
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif kind == "a cut file in the cache":
        del data[draw.randrange(len(data)) :]
    else:
        data = bytearray(draw.randbytes(len(data)))
    blob.write_bytes(data)


FAULTS = (
    "a flipped bit in the cache", "a cut file in the cache", "another file in the cache", "a cut download",
    "a hub that sends other bytes", "a branch that moved", "a commit that is gone",
)  # fmt: skip


def tamper(folder: Path, *, amount: int, seed: int) -> dict[str, Any]:
    """Have files of a repository damaged, cut, changed or moved `amount` times, and fetch them.

    A fetch is to give the bytes of the commit it names, or to be refused by WeightsError; and to work once the fault is
    gone and what the message names is deleted.
    """
    draw = random.Random(seed)
    failures: list[str] = []
    counts = dict.fromkeys(FAULTS, 0)
    refused = 0
    for number in range(amount):
        kind = FAULTS[number % len(FAULTS)]
        place = folder / str(number)
        with hub_here(place) as hub:
            was_refused, wrong = _try_fault(kind, hub, place, draw)
        counts[kind] += 1
        refused += was_refused
        failures += [f"{kind}: {sentence}" for sentence in wrong]
        shutil.rmtree(place, ignore_errors=True)
    return {"tried": amount, "failures": failures, "refused": refused, "by_kind": counts}


def _try_fault(kind: str, hub: Hub, place: Path, draw: random.Random) -> tuple[bool, list[str]]:
    from fdkit.errors import WeightsError
    from fdkit.teachers.hub import fetch_repo

    files = {"config.json": b'{"architecture": "x"}', "model.safetensors": draw.randbytes(5000)}
    commit = hub.publish(files)
    hub.cut_after = draw.randrange(1, 5000) if kind == "a cut download" else None
    hub.lies = kind == "a hub that sends other bytes"
    if kind.endswith("cache"):
        fetch_repo(REPO)
        blobs = sorted((place / f"models--{REPO.replace('/', '--')}" / "blobs").iterdir())
        _damage(draw.choice(blobs), kind, draw)
    if kind in ("a branch that moved", "a commit that is gone"):
        newer = hub.publish({**files, "model.safetensors": draw.randbytes(5000)})
        if kind == "a commit that is gone":
            del hub.commits[commit]
    wanted = commit if kind == "a branch that moved" else None
    asked = commit if kind == "a commit that is gone" else "main"
    try:
        found = fetch_repo(REPO, wanted or asked)
    except WeightsError as error:
        if kind == "a branch that moved":
            return True, [f"refused: {error.message}"]
        return True, _again(error, kind, hub, place, newer if kind == "a commit that is gone" else commit)
    if kind == "a branch that moved":
        return False, _compare(found.path, found.revision, hub, commit)
    return False, [f"taken: {found}"]


def _again(error: Exception, kind: str, hub: Hub, place: Path, commit: str) -> list[str]:
    """Fetch once more, without the fault and as the message tells to; what is wrong."""
    from fdkit.errors import WeightsError
    from fdkit.teachers.hub import fetch_repo

    hub.cut_after, hub.lies = None, False
    for blob in place.rglob("blobs/*"):
        if str(blob) in str(error):
            blob.unlink()
    try:
        found = fetch_repo(REPO)
    except WeightsError as second:
        return [f"refused after the remedy, too: {second.message}"]
    return _compare(found.path, found.revision, hub, commit)


def _compare(folder: Path, revision: str | None, hub: Hub, commit: str) -> list[str]:
    if revision != commit:
        return [f"commit {revision} came, not {commit}"]
    return [f"{name} is not the one of {commit}" for name, data in hub.commits[commit].items()
            if (folder / name).read_bytes() != data]  # fmt: skip
