from pathlib import Path

import pytest
import torch

from fdkit.errors import ResourceError
from fdkit.models import free_memory as memory
from fdkit.models.libraries import RECIPE_FILE, build_open_clip, build_timm, load_backbone, save_backbone

INFO = """MemTotal:       25165824 kB
MemAvailable:   20000000 kB
SwapFree:              0 kB
HugePages_Total:       0
"""


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "meminfo").write_text(INFO)
    monkeypatch.setattr(memory, "MEMORY_INFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "CONTROL_GROUP", tmp_path / "group")
    (tmp_path / "group").mkdir()
    return tmp_path / "group"


def test_free_is_what_the_kernel_says_is_available(group: Path) -> None:
    assert memory.free_bytes() == 20_000_000 * 1024
    memory.MEMORY_INFO.write_text(INFO.replace("SwapFree:              0", "SwapFree:           5000"))
    assert memory.free_bytes() == 20_005_000 * 1024


def test_a_container_has_less_than_its_machine(group: Path) -> None:
    (group / "memory.max").write_text("3000000000\n")
    (group / "memory.current").write_text("2500000000\n")
    assert memory.free_bytes() == 500_000_000
    # files that the kernel keeps are given back when asked for
    (group / "memory.stat").write_text("anon 1700000000\ninactive_file 800000000\n")
    assert memory.free_bytes() == 1_300_000_000
    (group / "memory.max").write_text("max\n")
    assert memory.free_bytes() == 20_000_000 * 1024


def test_where_nothing_is_known_nothing_is_refused(group: Path) -> None:
    memory.MEMORY_INFO.write_text("MemAvailable: unknown")
    assert memory.free_bytes() is None
    memory.MEMORY_INFO.unlink()
    assert memory.free_bytes() is None
    with memory.WithinFreeMemory():
        assert torch.empty(1 << 20).numel() == 1 << 20


def test_networks_too_large_for_the_machine_are_refused_while_they_are_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Twenty blocks of 200 MB, each of which the machine would give; the first few are enough to say no."""
    monkeypatch.setattr(memory, "free_bytes", lambda: 300_000_000)
    made: list[int] = []
    monkeypatch.setattr(torch.nn.Linear, "reset_parameters", lambda layer: made.append(layer.weight.nbytes))
    with pytest.raises(ResourceError, match=r"224 with .*more than the 0\.3 GB of memory that are free"):
        build_timm("vit_tiny_patch16_224", {"embed_dim": 2048, "depth": 20, "num_heads": 2})
    assert 0 < sum(made) < 500_000_000
    with pytest.raises(ResourceError, match=r"ViT-B-16 with .*0\.3 GB"):
        build_open_clip("ViT-B-16")


def test_what_the_system_refuses_at_once_is_said_alike() -> None:
    with pytest.raises(ResourceError, match=r"224 with .*out of memory"):
        build_timm("vit_tiny_patch16_224", {"embed_dim": 1 << 22, "depth": 1, "num_heads": 2})


def test_what_a_file_describes_is_held_to_the_memory_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_backbone(build_timm("vit_tiny_patch16_224", {"embed_dim": 24, "depth": 1, "num_heads": 2}), tmp_path)
    recipe = tmp_path / RECIPE_FILE
    recipe.write_text(recipe.read_text().replace('"embed_dim": 24', '"embed_dim": 4096'))
    monkeypatch.setattr(memory, "free_bytes", lambda: 300_000_000)
    with pytest.raises(ResourceError, match="of memory that are free"):
        load_backbone(tmp_path)


def test_shapes_alone_take_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda: 1_000_000)
    with torch.device("meta"):
        network = build_timm("vit_tiny_patch16_224", {"embed_dim": 2048, "depth": 2, "num_heads": 2}).network
    assert next(network.parameters()).device.type == "meta"
