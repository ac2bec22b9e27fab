import errno
import hashlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fdkit.errors import ConfigError, ResourceError, WeightsError
from fdkit.teachers import hub
from fdkit.teachers.download import UnreachableError
from fdkit.teachers.hub import fetch_official, fetch_open_clip, fetch_repo, fetch_timm, file_name
from fdkit.teachers.loading import load_teacher
from fdkit.teachers.origin import Fetched

MOCOV3 = "https://dl.fbaipublicfiles.com/moco-v3/vit-s-300ep/vit-s-300ep.pth.tar"
TORCH_HOME = "set TORCH_HOME"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(
        sys.modules["huggingface_hub.file_download"], "HF_HUB_CACHE", str(tmp_path), raising=False
    )
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))


@pytest.mark.parametrize(
    ("fetch", "architecture"),
    [
        (lambda: fetch_timm("vit_small_patch16_224.dino"), "vit_small_patch16_224.dino"),
        (lambda: fetch_timm("vit_huge_patch14_gap_224.in1k_ijepa"), "vit_huge_patch14_gap_224.in1k_ijepa"),
        (lambda: fetch_open_clip("ViT-B-16-quickgelu", "openai"), "open_clip:ViT-B-16-quickgelu"),
        (lambda: fetch_open_clip("ViTamin-L-256", "datacomp1b"), "open_clip:ViTamin-L-256"),
        (lambda: fetch_official(MOCOV3, sha256=None, name="mocov3_vits"), "mocov3_vits"),
        (lambda: fetch_repo("google/vit-base-patch16-224"), "ARCH"),
    ],
)
def test_offline_and_not_cached_is_said_fast_with_the_way_out(
    fetch: Callable[[], Fetched], architecture: str, tmp_path: Path
) -> None:
    start = time.perf_counter()
    with pytest.raises(WeightsError, match=r"not in the cache .* could not be downloaded") as raised:
        fetch()
    assert time.perf_counter() - start < 10
    assert str(tmp_path) in raised.value.message
    assert raised.value.hint.endswith(f"--teacher FILE --architecture {architecture}")
    assert "download https://" in raised.value.hint
    assert raised.value.exit_code == 4


def test_a_dead_network_is_noticed_without_the_hubs_own_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    class Session:
        def head(self, url: str, timeout: float) -> None:
            assert timeout <= 5
            raise ConnectionError("no route to host\nand more")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    with pytest.raises(WeightsError, match=r"could not be downloaded: no route to host\n"):
        fetch_timm("vit_small_patch16_224.dino")


def cached(tmp_path: Path, repo: str, files: dict[str, str], *, known_missing: tuple[str, ...] = ()) -> Path:
    """Files in the hub's cache, as its client lays them down."""
    root = tmp_path / f"models--{repo.replace('/', '--')}"
    for folder in ("refs", f"snapshots/{COMMIT}", f".no_exist/{COMMIT}"):
        (root / folder).mkdir(parents=True)
    (root / "refs/main").write_text(COMMIT)
    for name, content in files.items():
        (root / f"snapshots/{COMMIT}" / name).write_text(content)
    for name in known_missing:
        (root / f".no_exist/{COMMIT}" / name).touch()
    return root / f"snapshots/{COMMIT}"


def test_a_cached_file_is_taken_without_the_network(tmp_path: Path) -> None:
    folder = cached(tmp_path, "timm/vit_small_patch16_224.dino", {"pytorch_model.bin": "x"})
    assert fetch_timm("vit_small_patch16_224.dino").path == folder / "pytorch_model.bin"


def test_names_without_weights_are_refused() -> None:
    with pytest.raises(WeightsError, match="timm has no pretrained weights"):
        fetch_timm("vit_tiny_patch16_18x2")


def test_a_teacher_without_cached_weights_is_an_error_not_random_weights() -> None:
    with pytest.raises(
        WeightsError, match=r"weights of timm:vit_small_patch16_224.dino are not in the cache"
    ):
        load_teacher("dino_vits")


def online(monkeypatch: pytest.MonkeyPatch, download: Callable[..., Any]) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_why_unreachable", lambda: "")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr("fdkit.teachers.download.download", download)


def test_an_official_file_comes_to_torchs_folder_with_its_checksum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, Path, str | None]] = []

    def download(url: str, path: Path, *, sha256: str | None) -> None:
        seen.append((url, path, sha256))

    online(monkeypatch, download)
    path = tmp_path / "torch/checkpoints/vit-s-300ep.pth.tar"
    assert fetch_official(MOCOV3, sha256="ab" * 32, name="mocov3_vits").path == path
    openai = f"https://openaipublic.azureedge.net/clip/models/{'cd' * 32}/ViT-B-16.pt"
    fetch_official(openai, sha256=None, name="clip_vitb")
    assert seen == [(MOCOV3, path, "ab" * 32), (openai, path.with_name("ViT-B-16.pt"), "cd" * 32)]


def test_a_cached_official_file_is_verified_each_time(tmp_path: Path) -> None:
    path = tmp_path / "torch/checkpoints/vit-s-300ep.pth.tar"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"weights")
    right = hashlib.sha256(b"weights").hexdigest()
    assert fetch_official(MOCOV3, sha256=right[:8], name="x").path == path
    assert fetch_official(MOCOV3, sha256=None, name="x").path == path
    with pytest.raises(WeightsError, match="wrong checksum") as raised:
        fetch_official(MOCOV3, sha256="00" * 32, name="x")
    assert "delete it" in raised.value.hint
    path.write_bytes(b"weights, changed")
    with pytest.raises(WeightsError, match="wrong checksum"):
        fetch_official(MOCOV3, sha256=right, name="x")


@pytest.mark.parametrize(
    ("failure", "kind", "words"),
    [
        (UnreachableError("no such file (404)"), WeightsError, r"mocov3_vits .* no such file \(404\)"),
        (PermissionError(13, "Permission denied"), WeightsError, "Permission denied"),
        (ResourceError("no room", TORCH_HOME), ResourceError, "no room"),
    ],
)
def test_why_an_official_file_could_not_be_had_is_said(
    monkeypatch: pytest.MonkeyPatch, failure: Exception, kind: type[WeightsError | ResourceError], words: str
) -> None:
    def download(url: str, path: Path, *, sha256: str | None) -> None:
        raise failure

    online(monkeypatch, download)
    with pytest.raises(kind, match=words) as raised:
        fetch_official(MOCOV3, sha256=None, name="mocov3_vits")
    assert (MOCOV3 if kind is WeightsError else TORCH_HOME) in raised.value.hint


def test_files_of_one_name_at_two_addresses_are_two_files() -> None:
    windows = [f"https://host/esvit/{window}/checkpoint_best.pth?sv=key" for window in ("w7", "w14")]
    names = {file_name(address) for address in windows}
    assert len(names) == 2
    assert all(name.startswith("checkpoint_best-") and name.endswith(".pth") for name in names)
    assert file_name(windows[0]) == file_name(windows[0].partition("?")[0])
    assert file_name(MOCOV3) == "vit-s-300ep.pth.tar"
    assert file_name("https://host/a/RN50.pt") == "RN50.pt"
    for address in (
        "https://host/a/",
        "https://host/..",
        "https://host/%2e%2e",
        "",
        "https://host/a/.bashrc",
        "https://h/a%0a",
    ):
        with pytest.raises(WeightsError, match="names no file of weights"):
            file_name(address)
    assert "/" not in file_name("https://host/..%2f..%2fx.pth")


TIMM_CONFIG = '{"architecture": "vit_tiny_patch16_224"}'
VIT_CONFIG = '{"model_type": "vit"}'


def test_a_cached_repository_is_taken_without_the_network(tmp_path: Path) -> None:
    folder = cached(tmp_path, "org/name", {"config.json": TIMM_CONFIG, "model.safetensors": "x"})
    assert fetch_repo("org/name").path == folder
    assert fetch_repo("org/name", COMMIT).path == folder


def test_offline_what_decides_the_statistics_has_to_be_known(tmp_path: Path) -> None:
    files = {"config.json": VIT_CONFIG, "model.safetensors": "x"}
    cached(tmp_path, "org/name", files)
    with pytest.raises(WeightsError, match=r"hf:org/name@main .* whether it has preprocessor_config.json"):
        fetch_repo("org/name")
    folder = cached(tmp_path, "org/other", files, known_missing=("preprocessor_config.json",))
    assert fetch_repo("org/other").path == folder


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        (
            {"config.json": TIMM_CONFIG, "model.safetensors": "", "open_clip_config.json": "{}"},
            "model.safetensors",
        ),
        (
            {"config.json": VIT_CONFIG, "pytorch_model.bin": "", "preprocessor_config.json": "{}"},
            "pytorch_model.bin",
        ),
        ({"open_clip_config.json": "{}", "open_clip_model.safetensors": ""}, "open_clip_model.safetensors"),
        (
            {
                "config.json": VIT_CONFIG,
                "open_clip_config.json": "{}",
                "model.safetensors": "",
                "open_clip_pytorch_model.bin": "",
            },
            "open_clip_pytorch_model.bin",
        ),
    ],
)
def test_a_repository_comes_in_one_version_with_the_weights_its_files_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], wanted: str
) -> None:
    from huggingface_hub.errors import EntryNotFoundError

    asked: list[tuple[str, str]] = []

    def download(repo: str, file: str, *, revision: str, etag_timeout: float) -> str:
        asked.append((file, revision))
        if file not in files:
            raise EntryNotFoundError(file)
        path = tmp_path / "snapshots" / COMMIT / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(files[file])
        return str(path)

    online(monkeypatch, download)
    folder = fetch_repo("org/name", "v2").path
    assert folder == tmp_path / "snapshots" / COMMIT
    assert asked[0] == ("config.json", "v2")
    assert {revision for _, revision in asked[2:]} <= {COMMIT}
    assert (folder / wanted).is_file()
    others = {
        "model.safetensors",
        "pytorch_model.bin",
        "open_clip_model.safetensors",
        "open_clip_pytorch_model.bin",
    }
    assert not any((folder / name).exists() for name in others - {wanted})


def refusal(name: str) -> Exception:
    import huggingface_hub.errors

    kind = getattr(huggingface_hub.errors, name)
    error: Exception = kind.__new__(kind)
    error.args = ("first line\nsecond",)
    return error


@pytest.mark.parametrize(
    ("make", "kind", "words", "remedy"),
    [
        (lambda: refusal("GatedRepoError"), WeightsError, "is gated", "hf auth login"),
        (
            lambda: refusal("RepositoryNotFoundError"),
            WeightsError,
            "no repository org/name",
            "download https://",
        ),
        (lambda: refusal("RevisionNotFoundError"), WeightsError, "no such revision", ""),
        (lambda: refusal("HfHubHTTPError"), WeightsError, "first line$|first line\n", ""),
        (
            lambda: refusal("EntryNotFoundError"),
            WeightsError,
            "neither config.json nor open_clip_config.json",
            "",
        ),
        (
            lambda: OSError(errno.ENOSPC, "No space left"),
            ResourceError,
            "no room .* No space left",
            "HF_HOME",
        ),
    ],
)
def test_refusals_of_the_hub_are_told_in_plain_words(
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[], Exception],
    kind: type[Exception],
    words: str,
    remedy: str,
) -> None:
    def download(*args: Any, **options: Any) -> str:
        raise make()

    online(monkeypatch, download)
    with pytest.raises(kind, match=words) as raised:
        fetch_repo("org/name")
    assert remedy in raised.value.hint


def test_what_is_no_repository_is_refused_before_anything_is_asked() -> None:
    for name in ("name", "a/b/c", "../x", "org/na me", ""):
        with pytest.raises(ConfigError, match="not the name of a repository"):
            fetch_repo(name)
