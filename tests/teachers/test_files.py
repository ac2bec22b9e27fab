import argparse
import os
import pathlib
import pickle
import struct
import sys
import tarfile
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from fdkit.errors import WeightsError
from fdkit.teachers.files import read_file, sha256_of, verify

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.half": torch.ones(2).half()}
BIG = {"a": torch.zeros(4000), "b": torch.ones(4000)}


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def write(path: Path, content: dict, kind: str) -> Path:
    if kind == "safetensors":
        safetensors.torch.save_file(content, path)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    return path


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("name", ["x.pth", "x.pt.tar", "x"])
def test_a_file_is_told_by_its_content_not_its_name(tmp_path: Path, kind: str, name: str) -> None:
    content = read_file(write(tmp_path / name, STATE, kind))
    assert content.keys() == STATE.keys()
    assert all(torch.equal(content[key], value) for key, value in STATE.items())
    assert content["a.half"].dtype == torch.float16


@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_a_pickle_named_safetensors_is_not_opened(tmp_path: Path, kind: str) -> None:
    with pytest.raises(WeightsError, match=r"named .safetensors and is a PyTorch file"):
        read_file(write(tmp_path / "x.safetensors", STATE, kind))


def test_what_training_left_beside_the_weights_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    yacs, config = types.ModuleType("yacs"), types.ModuleType("yacs.config")
    node = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    config.CfgNode, yacs.config = node, config
    monkeypatch.setitem(sys.modules, "yacs", yacs)
    monkeypatch.setitem(sys.modules, "yacs.config", config)
    options = node({"MODEL": node({"NAME": "vit"}), "LR": 0.1})
    options.__dict__["__immutable__"] = True
    content = {
        "model": STATE,
        "args": argparse.Namespace(lr=0.1, output_dir=pathlib.PurePosixPath("runs")),
        "config": options,
        "max_accuracy": np.float64(83.1),
        "epoch": 3,
    }
    torch.save(content, tmp_path / "x.pth")
    read = read_file(tmp_path / "x.pth")
    assert torch.equal(read["model"]["a.weight"], STATE["a.weight"])
    assert read["args"].lr == 0.1
    assert read["config"] == {"MODEL": {"NAME": "vit"}, "LR": 0.1}
    assert type(read["config"]["MODEL"]).__module__ == "collections"
    assert read["epoch"] == 3


@pytest.mark.parametrize("kind", ["pickle", "legacy", "zip", "beside the weights", "as yacs options"])
def test_code_in_a_file_is_refused_and_not_run(tmp_path: Path, kind: str) -> None:
    marker, path = tmp_path / "marker", tmp_path / "x.pth"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Evil(marker), protocol=2))
    elif kind == "as yacs options":
        path.write_bytes(
            b"\x80\x02cyacs.config\nCfgNode\n)\x81" + pickle.dumps(Evil(marker), protocol=2)[2:-1] + b"b."
        )
    else:
        content = {"model": STATE, "x": Evil(marker)} if kind.startswith("beside") else Evil(marker)
        torch.save(content, path, _use_new_zipfile_serialization=kind != "legacy")
    with pytest.raises(WeightsError, match=r"refused: it asks to run code \(posix\.system\)") as raised:
        read_file(path)
    assert not marker.exists()
    assert raised.value.exit_code == 4
    assert "weights_only" not in str(raised.value)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("share", [0.003, 0.02, 0.5, 0.98])
def test_truncated_files_are_named_damaged(tmp_path: Path, kind: str, share: float) -> None:
    path = write(tmp_path / "x.pth", BIG, kind)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(WeightsError, match=r"damaged or cut short") as raised:
        read_file(path)
    assert f"({path.stat().st_size} bytes)" in raised.value.message


@pytest.mark.parametrize(
    ("content", "words", "remedy"),
    [
        (b"", "is empty", "delete it"),
        (b"\n<!DOCTYPE html><html>Sign in</html>", "a web page", "get the file of weights"),
        (b"<?xml version='1.0'?><Error><Code>AuthenticationFailed", "a web page", ""),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a Git LFS pointer", "git lfs pull"),
        (b'{"error": "gated"}', "a JSON text", ""),
        (b"\x1f\x8b" + b"\x00" * 90, "compressed with gzip", "unpack"),
        (b"\x89HDF\r\n\x1a\n" + b"\x00" * 90, "an HDF5 file", ""),
        (b"\x00\x01\x02" * 50, "damaged or cut short", "SHA-256"),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_what_is_no_file_of_weights_is_told_in_plain_words(
    tmp_path: Path, content: bytes, words: str, remedy: str, suffix: str
) -> None:
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=words) as raised:
        read_file(path)
    assert str(path) in raised.value.message
    assert remedy in raised.value.hint


def test_numpy_archives_are_named_as_big_visions(tmp_path: Path) -> None:
    np.savez(tmp_path / "B_16.npz", **{"params/img/embedding/kernel": np.zeros((2, 2)), "opt": np.zeros(1)})
    with pytest.raises(
        WeightsError, match=r"NumPy archive \(params/img/embedding/kernel, ...\), as Big Vision"
    ) as raised:
        read_file(tmp_path / "B_16.npz")
    assert "timm:NAME" in raised.value.hint
    np.savez_compressed(tmp_path / "x.npz", w=np.zeros(9))
    with pytest.raises(WeightsError, match="NumPy archive"):
        read_file((tmp_path / "x.npz").rename(tmp_path / "x.pth"))


def test_archives_of_other_files_are_not_unpacked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("../../outside.txt", b"1")
    with pytest.raises(WeightsError, match=r"a zip archive of other files \(../../outside.txt\)"):
        read_file(tmp_path / "x.zip")
    torch.save(STATE, tmp_path / "in.pth")
    with tarfile.open(tmp_path / "y.tar", "w") as archive:
        archive.add(tmp_path / "in.pth", arcname="../in.pth")
    with pytest.raises(WeightsError, match=r"an archive \(tar\) of other files"):
        read_file(tmp_path / "y.tar")
    assert {path.name for path in tmp_path.iterdir()} == {"x.zip", "in.pth", "y.tar"}


def test_sizes_that_lie_are_refused_without_the_memory_they_claim(tmp_path: Path) -> None:
    state = {"a": torch.arange(1000.0)}
    path = write(tmp_path / "x.pth", state, "zip")
    with (
        zipfile.ZipFile(path) as archive,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for part in archive.infolist():
            bomb.writestr(part.filename, archive.read(part) + b"\0" * 10_000_000)
    assert (tmp_path / "bomb.pth").stat().st_size < 100_000
    with pytest.raises(WeightsError, match="tensors are compressed"):
        read_file(tmp_path / "bomb.pth")
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(tmp_path / "lie.pth", "w") as lie:
        for part in archive.infolist():
            lie.writestr(part.filename, archive.read(part).replace(b"M\xe8\x03", b"J\xff\xff\xff\x7f"))
    with pytest.raises(WeightsError, match="damaged"):
        read_file(tmp_path / "lie.pth")
    path = write(tmp_path / "legacy.pth", state, "legacy")
    huge = path.read_bytes().replace(struct.pack("<q", 1000), struct.pack("<q", 1 << 50))
    path.write_bytes(huge.replace(b"M\xe8\x03", b"\x8a\x07" + struct.pack("<q", 1 << 50)[:7]))
    with pytest.raises(WeightsError, match="damaged"):
        read_file(path)


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="there is no file"):
        read_file(tmp_path / "none.pth")
    with pytest.raises(WeightsError, match="is not a file"):
        read_file(tmp_path)


def test_sha256_is_the_known_one_and_follows_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    assert sha256_of(path).startswith("ba7816bf8f01cfea")
    path.unlink()
    path.write_bytes(b"abcd")
    assert sha256_of(path).startswith("88d4266fd4e6338d")


def test_a_wrong_checksum_names_both_and_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    path.write_bytes(b"abc")
    verify(path, "BA7816BF")
    verify(path, sha256_of(path))
    for wrong in ("ba7816c0", "", sha256_of(path) + "0"):
        with pytest.raises(WeightsError, match=r"wrong checksum: .* has SHA-256 ba7816bf") as raised:
            verify(path, wrong)
        assert raised.value.message.endswith(f"the published one is {wrong}")
        assert "delete it and get it again" in raised.value.hint
    verify(path, "900150983cd24fb0", algorithm="md5")
    with pytest.raises(WeightsError, match="has MD5 900150983cd24fb0"):
        verify(path, "ba7816bf", algorithm="md5")
