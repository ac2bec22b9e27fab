"""Weights leave their file: bit for bit, for good, and without the file's pages in memory beside them."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor

from fdkit.errors import WeightsError
from fdkit.teachers.loading import load_teacher
from fdkit.teachers.memory import Mapping, mappings, own_copy

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/smaps").exists(), reason="only Linux tells what is mapped"
)

LARGE = "vit_large_patch14_clip_quickgelu_224"
LOAD = """
import sys
from pathlib import Path
import fdkit.teachers.model, open_clip, timm
from fdkit.errors import WeightsError
from fdkit.teachers.loading import load_teacher

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])

load_teacher("timm:vit_tiny_patch16_224", pretrained=False)  # what libraries keep once they are used
before = status("VmRSS")
teacher = load_teacher(sys.argv[1], architecture=sys.argv[2])
peak = status("VmHWM") - before
print(peak / sum(weight.nbytes for weight in teacher.backbone.network.parameters()))
"""

Mapped = Callable[[dict[str, Tensor]], tuple[Path, dict[str, Tensor]]]


@pytest.fixture(params=["safetensors", "pth"])
def mapped(request: pytest.FixtureRequest, tmp_path: Path) -> Mapped:
    """Writes tensors into a file and maps them from there."""
    path = tmp_path / f"weights.{request.param}"

    def write(state: dict[str, Tensor]) -> tuple[Path, dict[str, Tensor]]:
        if path.suffix == ".safetensors":
            safetensors.torch.save_file(state, path)
            return path, safetensors.torch.load_file(path)
        torch.save(state, path)
        return path, torch.load(path, mmap=True, weights_only=True)

    return write


def _of(path: Path) -> list[Mapping]:
    return [one for one in mappings() if one.path == str(path)]


def test_copies_are_equal_and_nowhere_in_the_file(mapped: Mapped) -> None:
    state = {
        "single": torch.randn(33, 70),
        "long": torch.randn(3, 300_001),
        "half": torch.randn(5, 7, dtype=torch.float16),
        "brain": torch.randn(4, 9).bfloat16(),
        "count": torch.tensor(2**40 + 1),
        "none": torch.zeros(0, 3),
    }
    path, held = mapped(state)
    views = {"transposed": held["single"].t(), "part": held["single"][3:, 1::2], "row": held["half"][2]}
    (area,) = _of(path)
    for name, value in {**held, **views}.items():
        copy = own_copy(value, value.dtype, mappings())
        assert torch.equal(copy, value), name
        assert copy.is_contiguous(), name
        assert not area.start <= copy.data_ptr() < area.end, name
    assert torch.equal(own_copy(held["half"], torch.float32, mappings()), state["half"].float())


def test_the_bytes_are_read_from_the_file_and_not_through_the_mapping(mapped: Mapped) -> None:
    """The right tensor at the right offset, and only its own bytes."""
    state = {name: torch.randn(1 << 18) for name in "abcd"}
    path, held = mapped(state)
    before = _resident(path)
    copy = own_copy(held["c"], torch.float32, mappings())
    assert _resident(path) == before
    assert torch.equal(copy, state["c"])


def test_a_tensor_changed_in_place_keeps_its_change(mapped: Mapped) -> None:
    path, held = mapped({"first": torch.ones(5000), "second": torch.ones(5000)})
    held["first"][4000:] *= 3
    (area,) = _of(path)
    assert area.is_changed
    for name, total in (("first", 7000), ("second", 5000)):
        copy = own_copy(held[name], torch.float32, [area])
        assert copy.sum() == total
        assert not area.start <= copy.data_ptr() < area.end


@pytest.mark.parametrize("is_replaced", [False, True])
def test_a_file_that_is_gone_is_read_through_the_mapping(mapped: Mapped, is_replaced: bool) -> None:
    state = {"weight": torch.randn(3, 5)}
    path, held = mapped(state)
    path.unlink()
    if is_replaced:
        mapped({"weight": torch.zeros(3, 5)})
    copy = own_copy(held["weight"], torch.float32, mappings())
    assert torch.equal(copy, state["weight"])
    assert copy.data_ptr() != held["weight"].data_ptr()


def test_a_file_cut_short_meanwhile_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    value = torch.arange(8.0)
    path.write_bytes(value.numpy().tobytes()[:-1])
    area = Mapping(value.data_ptr(), value.data_ptr() + value.nbytes, 0, str(path))
    with pytest.raises(WeightsError, match=r"weights was cut short"):
        own_copy(value, torch.float32, [area])


def test_a_tensor_of_no_file_is_given_back_itself() -> None:
    value = torch.randn(3, 5)
    assert own_copy(value, torch.float32, mappings()) is value
    assert torch.equal(own_copy(value.t(), torch.float64, mappings()), value.t().double())


@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_a_teacher_outlives_its_file(kind: str, tmp_path: Path) -> None:
    """A file overwritten in place, as by a copy to the same name, changes nothing."""
    network = timm.create_model("vit_tiny_patch16_224", embed_dim=192, depth=2, img_size=32, num_classes=0)
    path = tmp_path / f"weights.{kind}"
    save = safetensors.torch.save_file if kind == "safetensors" else torch.save
    save(network.state_dict(), path)
    teacher = load_teacher(str(path))
    images = torch.rand(1, 3, 32, 32)
    before = teacher.encode(images).all()
    with path.open("r+b") as file:
        file.write(os.urandom(path.stat().st_size))
    assert _of(path) == []
    assert torch.equal(teacher.encode(images).all(), before)


@pytest.fixture(scope="module")
def large_state() -> dict[str, Tensor]:
    """Random weights of CLIP's ViT-L/14 in timm's names, 1.2 GB."""
    with torch.device("meta"):
        network = timm.create_model(LARGE, num_classes=0)
    return {
        key: torch.empty(value.shape).uniform_(-0.02, 0.02) for key, value in network.state_dict().items()
    }


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A place for one large file, which is not kept."""
    yield tmp_path / "large"
    (tmp_path / "large").unlink(missing_ok=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "dtype"), [("safetensors", torch.float32), ("pth", torch.float32), ("pth", torch.float16)]
)
def test_a_large_teacher_needs_little_more_than_its_weights(
    kind: str, dtype: torch.dtype, large_state: dict[str, Tensor], scratch: Path
) -> None:
    """Peak memory of a fresh process under 1.3 times the float32 weights, the file's pages included."""
    save = safetensors.torch.save_file if kind == "safetensors" else torch.save
    save({key: value.to(dtype) for key, value in large_state.items()}, scratch)
    command = [sys.executable, "-c", LOAD, str(scratch), LARGE]
    child = subprocess.run(
        command, check=False, capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert child.returncode == 0, child.stderr
    assert 0.9 < float(child.stdout) < 1.3


def _resident(path: Path) -> int:
    """Kilobytes of a file's mapping that are in memory."""
    text = Path("/proc/self/smaps").read_text()
    (area,) = [part for part in text.split("\nVmFlags") if str(path) in part]
    return int(area.partition("\nRss:")[2].split()[0])
