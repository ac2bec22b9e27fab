import argparse
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch

from fdkit.errors import WeightsError
from fdkit.teachers.weights import RULES, check_finite, drop, load_whole, read_weights, sha256_of

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}


def save(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("container", ["model", "state_dict", "teacher", ""])
def test_containers_and_prefixes_are_opened(tmp_path: Path, container: str) -> None:
    state = {f"module.backbone.{key}": value for key, value in STATE.items()} | {
        "module.head.weight": torch.zeros(1)
    }
    path = save(tmp_path / "x.pth", {container: state, "epoch": 3} if container else state)
    weights = read_weights(path)
    assert weights.container == container
    assert weights.prefix == "module.backbone."
    assert weights.state.keys() == {"a.weight", "a.bias", "head.weight"}
    assert torch.equal(weights.state["a.weight"], STATE["a.weight"])


def test_teacher_is_taken_before_student(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pth", {"student": {"a": torch.zeros(1)}, "teacher": {"a": torch.ones(1)}})
    assert read_weights(path).state["a"] == 1


def test_options_of_training_beside_the_weights_are_allowed(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pth", {"model": STATE, "args": argparse.Namespace(lr=0.1)})
    assert read_weights(path).state.keys() == STATE.keys()


def test_legacy_files_are_read(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(read_weights(tmp_path / "x.pt").state["a.weight"], STATE["a.weight"])


def test_prefix_that_hides_two_models_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pth", {"a": torch.zeros(1), "module.a": torch.ones(1)})
    with pytest.raises(WeightsError, match="with and without the prefix module"):
        read_weights(path)


@pytest.mark.parametrize("kind", ["pickle", "legacy", "zip", "inside a container"])
def test_code_in_a_file_is_refused_and_not_run(tmp_path: Path, kind: str) -> None:
    marker, path = tmp_path / "marker", tmp_path / "x.pth"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Evil(marker)))
    elif kind == "legacy":
        torch.save({"a": Evil(marker)}, path, _use_new_zipfile_serialization=False)
    else:
        torch.save({"model": STATE, "x": Evil(marker)} if kind != "zip" else Evil(marker), path)
    with pytest.raises(WeightsError, match=r"refused: it asks to run code .*system") as raised:
        read_weights(path)
    assert not marker.exists()
    assert raised.value.exit_code == 4
    assert "weights_only" not in str(raised.value)
    pickle.load(path.open("rb")) if kind == "pickle" else torch.load(path, weights_only=False)
    assert marker.exists()  # the file was live: an unsafe reader would have run it


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_truncated_files_are_named_damaged(tmp_path: Path, suffix: str, share: float) -> None:
    path = tmp_path / f"x{suffix}"
    big = {"a": torch.zeros(4000), "b": torch.ones(4000)}
    torch.save(big, path) if suffix == ".pth" else safetensors.torch.save_file(big, path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(WeightsError, match="damaged or cut short"):
        read_weights(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"\n<!DOCTYPE html><html>Sign in</html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a Git LFS pointer"),
        (b'{"error": "gated"}', "a JSON text"),
        (b"\x00\x01\x02" * 50, "damaged or cut short"),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_what_is_no_file_of_weights_is_told_in_plain_words(
    tmp_path: Path, content: bytes, words: str, suffix: str
) -> None:
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=words):
        read_weights(path)


def test_missing_file_torchscript_and_no_tensors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="there is no file"):
        read_weights(tmp_path / "none.pth")
    with zipfile.ZipFile(tmp_path / "jit.pt", "w") as archive:
        archive.writestr("jit/constants.pkl", b"")
    with pytest.raises(WeightsError, match="TorchScript"):
        read_weights(tmp_path / "jit.pt")
    with pytest.raises(WeightsError, match="no state dict"):
        read_weights(save(tmp_path / "x.pth", {"epoch": 3}))
    with pytest.raises(WeightsError, match="no tensors under model"):
        read_weights(save(tmp_path / "y.pth", {"model": {"epoch": 3}}))


def test_sha256_is_the_known_one(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256_of(tmp_path / "x").startswith("ba7816bf8f01cfea")


def test_only_rules_drop_and_never_what_the_network_has() -> None:
    dropped = (
        "head.weight",
        "head.mlp.0.bias",
        "fc.bias",
        "decoder_blocks.0.norm1.weight",
        "decoder_pos_embed",
    )
    dropped += (
        "decoder.0.weight",
        "mask_token",
        "blocks.0.attn.relative_position_index",
        "predictor.0.weight",
    )
    kept = ("head.norm.weight", "norm.weight", "fc_norm.weight", "header.weight", "blocks.0.mlp.fc1.weight")
    state = dict.fromkeys(dropped + kept, torch.zeros(1))
    assert drop(state, (), RULES, source="x").keys() == set(kept)
    assert drop(state, ["fc.bias"], RULES, source="x").keys() == {*kept, "fc.bias"}


def fit(network: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    load_whole(network, state, adapt=dict, rules=RULES, source="x.pth", hint="look here")


def test_weights_load_whole_or_not_at_all() -> None:
    network = torch.nn.Linear(3, 2)
    good = {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}
    fit(network, good | {"head.weight": torch.zeros(1)})
    assert torch.equal(network.weight, torch.ones(2, 3))
    before = network.weight.clone()
    for state, words in [
        ({"weight": torch.zeros(2, 3)}, "missing 1: bias"),
        (good | {"extra.weight": torch.zeros(1)}, "unexpected 1: extra.weight"),
        (good | {"weight": torch.zeros(2, 4)}, r"weight \(2, 4\), the model has \(2, 3\)"),
        (good | {"weight": torch.full((2, 3), torch.nan)}, "weight holds 6 values that are not finite"),
    ]:
        with pytest.raises(WeightsError, match=words):
            fit(network, state)
        assert torch.equal(network.weight, before)


def test_a_crash_of_the_conversion_is_told_as_a_misfit() -> None:
    def adapt(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        raise KeyError("blocks.0")

    with pytest.raises(WeightsError, match="missing 2: bias, weight"):
        load_whole(torch.nn.Linear(3, 2), {}, adapt=adapt, rules=RULES, source="x")


def test_infinity_is_named() -> None:
    with pytest.raises(WeightsError, match="b holds 1 values that are not finite, of 2"):
        check_finite({"a": torch.ones(2), "b": torch.tensor([1.0, torch.inf])}, source="x")
