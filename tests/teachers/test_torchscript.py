import os
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from fdkit.errors import WeightsError
from fdkit.teachers.files import read_file
from fdkit.teachers.torchscript import is_torchscript, read_torchscript


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width).half()
        self.num_heads = 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.fc(x.half()).float() * self.num_heads


class Tower(nn.Module):
    """Submodules, a shared one, buffers of several types and shapes, lists, numbers, half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(3), Block(3)])
        self.norm = nn.LayerNorm(3)
        self.norm_again = self.norm
        self.token = nn.Parameter(torch.randn(4, 3).t())
        self.register_buffer("input_resolution", torch.tensor(224))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("tail", torch.arange(10.0)[7:])
        self.offsets = [torch.ones(1), torch.zeros(2)]
        self.rates = [0.1, 0.2]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.norm_again(self.norm(x)) + self.tail + self.token[:, 0]


def save(path: Path, kind: str) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tower = Tower()
        program = torch.jit.script(tower) if kind == "script" else torch.jit.trace(tower, torch.rand(2, 3))
        program.save(str(path))
    return path


@pytest.fixture(scope="module", params=["script", "trace"])
def archive(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("jit") / f"{request.param}.pt", request.param)


def rewritten(path: Path, source: Path, change: Callable[[str, bytes], bytes | None], **options: int) -> Path:
    """A copy of an archive with parts changed, or left out where `change` gives None."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w", **options) as new:
        for part in old.infolist():
            content = change(part.filename.partition("/")[2], old.read(part))
            if content is not None:
                new.writestr(part.filename, content)
    return path


def with_pickle(path: Path, source: Path, pickled: bytes) -> Path:
    return rewritten(path, source, lambda name, old: pickled if name == "data.pkl" else old)


def test_tensors_are_those_torch_itself_loads(archive: Path) -> None:
    assert is_torchscript(archive)
    state = read_torchscript(archive)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = torch.jit.load(str(archive)).state_dict()
    assert {"blocks.1.fc.weight", "norm_again.bias", "input_resolution"} <= expected.keys()
    extra = set() if "trace" in archive.name else {"offsets.0", "offsets.1"}
    assert state.keys() == expected.keys() | extra
    for key, value in expected.items():
        assert state[key].dtype == value.dtype
        assert torch.equal(state[key], value)
    assert state["token"].shape == (3, 4)
    assert state["input_resolution"].item() == 224
    assert torch.equal(read_file(archive)["tail"], torch.tensor([7.0, 8, 9]))


def test_its_program_is_never_looked_at(archive: Path, tmp_path: Path) -> None:
    other = rewritten(
        tmp_path / "x.pt", archive, lambda name, old: b"raise" if name.startswith("code/") else old
    )
    with pytest.raises(RuntimeError), pytest.warns(FutureWarning, match="deprecated"):
        torch.jit.load(str(other))
    assert read_file(other).keys() == read_file(archive).keys()


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_code_in_the_pickle_is_refused_and_not_run(archive: Path, tmp_path: Path, protocol: int) -> None:
    marker = tmp_path / "marker"
    evil = pickle.dumps({"visual": [Evil(marker)]}, protocol=protocol)
    path = with_pickle(tmp_path / "x.pt", archive, evil)
    with pytest.raises(
        WeightsError, match=r"without running it: it(s pickle has| asks for posix\.system)"
    ) as raised:
        read_file(path)
    assert not marker.exists()
    assert raised.value.exit_code == 4
    pickle.loads(evil)
    assert marker.exists()  # the file was live: an unsafe reader would have run it


STRANGE = {
    "another function of torch": b"\x80\x02ctorch.storage\n_load_from_bytes\n(tR.",
    "a class of another library": b"\x80\x02cbuiltins\neval\n.",
    "an attribute of a module": b"\x80\x02ctorch._utils\nimportlib.import_module\n.",
    "an extension code": b"\x80\x02\x82\x01.",
    "an object that restores itself": b"\x80\x02c__torch__\nModel\n)\x81]K\x01ab.",
    "names that are no text": b"\x80\x02c__torch__\nModel\n)\x81}K\x01K\x02sb.",
    "no tensors": b"\x80\x02c__torch__\nModel\n)\x81}X\x01\x00\x00\x00aK\x01sb.",
    "a memo without end": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "a reference that is no storage": b"\x80\x02X\x01\x00\x00\x00aQ.",
}


@pytest.mark.parametrize("kind", STRANGE)
def test_what_torchscript_does_not_write_is_refused(archive: Path, tmp_path: Path, kind: str) -> None:
    path = with_pickle(tmp_path / "x.pt", archive, STRANGE[kind])
    with pytest.raises(WeightsError, match="cannot be read without running it") as raised:
        read_file(path)
    assert "clip_vitb" in raised.value.hint


def test_a_module_that_contains_itself_is_refused(archive: Path, tmp_path: Path) -> None:
    cycle = b"\x80\x02c__torch__\nModel\n)\x81q\x00}X\x01\x00\x00\x00ah\x00sb."
    with pytest.raises(WeightsError, match="repeat or contain themselves"):
        read_file(with_pickle(tmp_path / "x.pt", archive, cycle))


def test_modules_that_share_parts_over_and_over_are_refused(archive: Path, tmp_path: Path) -> None:
    doubled = b"\x80\x02K\x01" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(60)) + b"."
    with pytest.raises(WeightsError, match="repeat or contain themselves"):
        read_file(with_pickle(tmp_path / "x.pt", archive, doubled))


@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_truncated_archives_are_named_damaged(archive: Path, tmp_path: Path, share: float) -> None:
    content = archive.read_bytes()
    (tmp_path / "x.pt").write_bytes(content[: int(share * len(content))])
    with pytest.raises(WeightsError, match="damaged or cut short"):
        read_file(tmp_path / "x.pt")


@pytest.mark.parametrize("lie", ["more numbers than the part has", "a larger tensor", "no such part"])
def test_sizes_that_lie_are_named_damaged(archive: Path, tmp_path: Path, lie: str) -> None:
    def change(name: str, content: bytes) -> bytes | None:
        if name == "data.pkl" and lie == "more numbers than the part has":
            return content.replace(b"K\x0ct", b"J\xff\xff\xff\x7ft", 1)
        if name == "data.pkl" and lie == "a larger tensor":
            return content.replace(b"(K\x03K\x04t", b"(M\xff\xffM\xff\xfft", 1)
        return None if name == "data/1" and lie == "no such part" else content

    path = rewritten(tmp_path / "x.pt", archive, change)
    assert path.read_bytes() != archive.read_bytes()
    with pytest.raises(WeightsError, match="damaged or cut short"):
        read_file(path)


def test_a_tensor_that_repeats_its_numbers_is_refused(archive: Path, tmp_path: Path) -> None:
    def change(name: str, content: bytes) -> bytes:
        big = b"(M\xff\xffM\xff\xfft(K\x00K\x00t"
        return content.replace(b"(K\x03K\x04t(K\x01K\x03t", big, 1) if name == "data.pkl" else content

    path = rewritten(tmp_path / "x.pt", archive, change)
    with pytest.raises(WeightsError, match="damaged") as raised:
        read_file(path)
    assert "made of 12 numbers" in str(raised.value.__cause__)


def test_compressed_and_big_endian_tensors_are_refused(archive: Path, tmp_path: Path) -> None:
    path = rewritten(
        tmp_path / "x.pt", archive, lambda name, content: content, compression=zipfile.ZIP_DEFLATED
    )
    with pytest.raises(WeightsError, match="tensors are compressed"):
        read_file(path)
    path = rewritten(
        tmp_path / "y.pt", archive, lambda name, content: b"big" if name == "byteorder" else content
    )
    with pytest.raises(WeightsError, match="big-endian"):
        read_file(path)
    path = rewritten(
        tmp_path / "z.pt", archive, lambda name, content: None if name == "data.pkl" else content
    )
    with pytest.raises(WeightsError, match=r"before PyTorch 1\.4"):
        read_file(path)
