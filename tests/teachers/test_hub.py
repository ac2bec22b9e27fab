import sys
import time
from pathlib import Path

import pytest
import torch

from fdkit.errors import WeightsError
from fdkit.teachers.hub import fetch_open_clip, fetch_timm
from fdkit.teachers.loading import load_teacher


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
    ],
)
def test_offline_and_not_cached_is_said_fast_with_the_way_out(
    fetch, architecture: str, tmp_path: Path
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


def test_a_cached_file_is_taken_without_the_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    def cached(repo: str, file: str) -> str | None:
        return str(tmp_path / repo / file) if file.endswith(".bin") else None

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    assert (
        fetch_timm("vit_small_patch16_224.dino")
        == tmp_path / "timm/vit_small_patch16_224.dino/pytorch_model.bin"
    )


def test_names_without_weights_are_refused() -> None:
    with pytest.raises(WeightsError, match="timm has no pretrained weights"):
        fetch_timm("vit_tiny_patch16_18x2")


def test_a_teacher_without_cached_weights_is_an_error_not_random_weights() -> None:
    with pytest.raises(
        WeightsError, match=r"weights of timm:vit_small_patch16_224.dino are not in the cache"
    ):
        load_teacher("dino_vits")
