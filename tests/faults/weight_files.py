"""Files of weights made to harm who reads them, and sound ones to be damaged at random."""

import io
import json
import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import timm
import torch
from faults.broken_images import MUTATIONS
from torch import Tensor, nn

ARCHITECTURE = "vit_tiny_patch16_224"
SIZES: dict[str, Any] = {"depth": 1, "embed_dim": 192, "img_size": 32, "num_classes": 3}


def tiny_state() -> dict[str, Tensor]:
    """The state of a ViT-Ti/16 of one block for images of 32 pixels."""
    torch.manual_seed(0)
    state: dict[str, Tensor] = timm.create_model(ARCHITECTURE, **SIZES).state_dict()
    return state


def saved(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def whole_weights() -> dict[str, bytes]:
    """Sound files in every container that is read, small, so that damage finds their structure."""
    state = {"blocks.0.weight": torch.arange(12.0).reshape(3, 4), "norm.bias": torch.ones(5).half()}

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    archive = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated; its archives stay around
        torch.jit.save(torch.jit.script(Small()), archive)
    return {
        "PyTorch zip": saved({"model": state, "epoch": 3}),
        "PyTorch pickle": saved({"model": state, "epoch": 3}, _use_new_zipfile_serialization=False),
        "safetensors": safetensors.torch.save(state),
        "TorchScript": archive.getvalue(),
    }


class _Call:
    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def evil_pickles(marker: str) -> dict[str, bytes]:
    """Files that would make a file named `marker` if their code ran, by how they ask for it."""
    import builtins
    import os
    import subprocess

    touch = f"touch {marker}"
    python = f"open({marker!r}, 'w').close()"
    calls = {
        "os.system": _Call(os.system, touch),
        "subprocess": _Call(subprocess.call, ["touch", marker]),
        "exec": _Call(builtins.exec, python),
        "eval": _Call(builtins.eval, python),
        "open": _Call(builtins.open, marker, "w"),
        "code in a tensor's place": _Call(torch.load, marker),
    }
    files = {f"{name}, zip": saved({"model": {}, "x": call}) for name, call in calls.items()}
    files |= {
        f"{name}, pickle": saved({"model": {}, "x": call}, _use_new_zipfile_serialization=False)
        for name, call in calls.items()
    }
    raw = {
        "GLOBAL": b"cos\nsystem\n(V" + touch.encode() + b"\ntR.",
        "INST": b"(V" + touch.encode() + b"\nios\nsystem\n.",
        "OBJ": b"(cos\nsystem\nV" + touch.encode() + b"\no.",
        "STACK_GLOBAL": b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c"
        + bytes([len(touch)])
        + touch.encode()
        + b"\x85R.",
        "getattr chain": b"cbuiltins\ngetattr\n(c__builtin__\n__import__\n(Vos\ntRVsystem\ntR(V"
        + touch.encode()
        + b"\ntR.",
        "BUILD": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)\x81}(Vx\ncos\nsystem\nub.",
        "extension registry": b"\x80\x02\x82\x01.",
        "persistent id": b"Vanything\nQ.",
    }
    for name, program in raw.items():
        files[f"{name}, alone"] = b"\x80\x02" + program if not program.startswith(b"\x80") else program
        files[f"{name}, in a zip"] = in_zip(program)
    files["a pickle beside the tensors"] = in_zip(
        saved_pickle(tiny={}), extra={"archive/code/evil.pkl": raw["GLOBAL"]}
    )
    return files


def saved_pickle(**content: Any) -> bytes:
    return pickle.dumps(content, protocol=2)


def in_zip(program: bytes, *, extra: dict[str, bytes] | None = None) -> bytes:
    """A PyTorch archive whose data.pkl is this program."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in {"archive/data.pkl": program, "archive/version": b"3\n", **(extra or {})}.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def strange_archives() -> dict[str, bytes]:
    """Zips that name places outside, repeat names, or unpack to more than they are."""
    program = saved_pickle(a=1)
    compressed = io.BytesIO()
    with zipfile.ZipFile(compressed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/data/0", bytes(200_000_000))
    twice = io.BytesIO()
    with zipfile.ZipFile(twice, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/data.pkl", b"cos\nsystem\n(Vtrue\ntR.")
    return {
        "path outside": in_zip(program, extra={"../../../../tmp/fdkit-owned": b"x"}),
        "absolute path": in_zip(program, extra={"/tmp/fdkit-owned": b"x"}),
        "200 MB in 200 kB": compressed.getvalue(),
        "one name twice": twice.getvalue(),
        "no archive at all": b"PK\x03\x04" + bytes(200),
        "an archive of nothing": b"PK\x05\x06" + bytes(18),
    }


def safetensors_with(header: Any, data: bytes = bytes(64), *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def lying_safetensors() -> dict[str, bytes]:
    """safetensors whose header does not describe what follows it."""

    def one(**changes: Any) -> Any:
        return {"a": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]} | changes}

    return {
        "header beyond the file": safetensors_with(one(), length=2**40),
        "header of all the numbers there are": safetensors_with(one(), length=2**64 - 1),
        "data beyond the file": safetensors_with(one(data_offsets=[0, 2**40])),
        "negative offsets": safetensors_with(one(data_offsets=[-64, 0])),
        "offsets turned round": safetensors_with(one(data_offsets=[64, 0])),
        "shape of more than the data": safetensors_with(one(shape=[2**31, 2**31])),
        "shape that wraps to the data": safetensors_with(one(shape=[2**62, 4, 4])),
        "negative shape": safetensors_with(one(shape=[-4, -4])),
        "no such dtype": safetensors_with(one(dtype="F31")),
        "two tensors in one place": safetensors_with(one() | {"b": one()["a"]}),
        "a hole": safetensors_with(one(data_offsets=[8, 72]), bytes(72)),
        "one name twice": safetensors_with(
            b'{"a":{"dtype":"F32","shape":[16],"data_offsets":[0,64]},"a":{"dtype":"F32","shape":[16],"data_offsets":[0,64]}}'
        ),
        "not JSON": safetensors_with(b"{" * 50),
        "deep JSON": safetensors_with(b'{"a":' * 50_000),
        "not text": safetensors_with(b"{\xff\xfe\x00"),
        "metadata that is no text": safetensors_with({"__metadata__": {"a": 1}}, b""),
        "nothing behind its length": struct.pack("<Q", 8),
    }


def odd_tensors() -> dict[str, dict[str, Any]]:
    """States of the right names that are no weights all the same."""
    name = "blocks.0.attn.qkv.weight"
    state = tiny_state()
    weight = state[name]

    def other(value: Any) -> dict[str, Any]:
        return state | {name: value}

    broken = weight.clone()
    broken[3, 4] = float("nan")
    huge = weight.clone()
    huge[0, 0] = float("inf")
    return {
        "NaN": other(broken),
        "infinity": other(huge),
        "complex": other(weight.to(torch.complex64)),
        "whole numbers": other(torch.ones_like(weight, dtype=torch.int64)),
        "truth values": other(torch.ones_like(weight, dtype=torch.bool)),
        "turned": other(weight.T.contiguous()),
        "flat": other(weight.flatten()),
        "empty": other(weight[:0]),
        "a scalar": other(torch.tensor(1.0)),
        "sparse": other(weight.to_sparse()),
        "a list": other([1.0, 2.0]),
        "text": other("weights"),
        "nothing": other(None),
        "expanded from one number": other(torch.zeros(1, 1).expand(weight.shape)),
    }


def damaged(files: dict[str, bytes], count: int, seed: int) -> list[tuple[str, bytes]]:
    """`count` random damages of sound files: (what, bytes)."""
    random = np.random.default_rng(seed)
    kinds = [(name, way) for name in files for way in MUTATIONS]
    return [
        (f"{name}, {way}", MUTATIONS[way](files[name], random))
        for name, way in (kinds[number % len(kinds)] for number in range(count))
    ]


# -- the trial


def try_weights(folder: Path, *, amount: int, seed: int) -> dict[str, Any]:
    """Every hostile file of weights, and `amount` damaged ones: "executions" counts code of theirs that was run."""
    from faults.limits import try_all

    from fdkit.errors import FdkitError
    from fdkit.teachers.files import read_file
    from fdkit.teachers.loading import load_teacher

    marker, path = folder / "marker", folder / "weights.pth"
    hostile = {**evil_pickles(str(marker)), **strange_archives(), **lying_safetensors()}

    def load(data: bytes) -> None:
        path.write_bytes(data)
        load_teacher(str(path), architecture=ARCHITECTURE)

    def read(data: bytes) -> None:
        path.write_bytes(data)
        read_file(path)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own words about damaged pickles
        made = try_all(load, list(hostile.items()), refusals=(FdkitError,))
        random = try_all(read, damaged(whole_weights(), amount, seed), refusals=(FdkitError,))
    outside = Path("/tmp/fdkit-owned")
    failures = made.failures + random.failures
    failures += ["a hostile file was read as weights"] if made.read else []
    failures += [f"{one} was made by a file of weights" for one in (marker, outside) if one.exists()]
    left = sorted(entry.name for entry in folder.iterdir())
    failures += [] if left == [path.name] else [f"left behind: {', '.join(left)}"]
    return {
        "tried": made.tried + random.tried,
        "hostile": made.tried,
        "damaged": random.tried,
        "read": made.read + random.read,
        "refused": made.refused + random.refused,
        "executions": int(marker.exists()) + int(outside.exists()),
        "failures": failures,
    }
