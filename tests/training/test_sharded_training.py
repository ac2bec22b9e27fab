"""Runs whose blocks lie in slices on several processes, against runs where every process holds all."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from block_toys import BlockMethod
from torch import Tensor
from training_toys import (
    CONFIG_YAML,
    Pictures,
    ToyMethod,
    exit_codes,
    same_bits,
    settings,
    start_ranks,
    untimed_metrics,
)

from fdkit.errors import ConfigError, WeightsError
from fdkit.methods._method import Method
from fdkit.teachers.run_checkpoint import network_state
from fdkit.teachers.shards import Rows, read_group
from fdkit.training.checkpoint import load_checkpoint, newest_sound
from fdkit.training.loop import train
from fdkit.training.run import Run

pytestmark = pytest.mark.distributed


class Count:
    """A monitor that reads every weight and computes with the network."""

    every_steps = 3

    def __call__(self, method: Method, step: int) -> dict[str, float]:
        method.eval()
        assert type(method) is BlockMethod
        with torch.no_grad():
            tokens = method.student(torch.linspace(0, 1, 48).reshape(1, 3, 4, 4)).patches
        weights = sum(float(value.double().sum()) for value in method.state_dict().values())
        return {"weights": weights, "tokens": float(tokens.double().sum())}


def run(folder: Path, changes: dict[str, Any] | None = None, method: type[Method] = BlockMethod) -> None:
    with Run.create(folder, CONFIG_YAML, resume=True, command=["toy"]) as opened:
        trained = method()
        train(trained, Pictures(), opened, **settings(monitors=[Count()], **(changes or {})))  # type: ignore[arg-type]
        assert type(trained) is method
        assert same_bits(trained.state_dict(), read_group(newest(folder), "model")), "whole on every process"
        trained([torch.rand(2, 3, 4, 4)], 0.0)["loss"].backward()


def run_on(count: int, folder: Path, **changes: Any) -> Path:
    if count == 1:
        run(folder, changes)
    else:
        codes = exit_codes(start_ranks(count, run, folder, changes))
        assert codes == [0] * count, [path.read_text() for path in folder.glob("errors/*")]
    return folder


def newest(folder: Path) -> Path:
    path = newest_sound(folder / "checkpoints")
    assert path is not None
    return path


def end_of(folder: Path) -> dict[str, Tensor]:
    tensors = load_checkpoint(newest(folder)).tensors
    return {
        f"{group}.{name}": one for group in ("model", "optimizer") for name, one in tensors[group].items()
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process."""
    return run_on(1, tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run in slices on two processes."""
    return run_on(2, tmp_path_factory.mktemp("cut") / "run", train_parallel="fsdp")


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_slices_train_as_one_process_does(whole: Path, cut: Path) -> None:
    assert_close(end_of(whole), end_of(cut))
    ours, theirs = untimed_metrics(whole), untimed_metrics(cut)
    assert len(ours) == len(theirs)
    assert any("monitor/tokens" in line for line in ours)
    assert "first_layer_grad_norm_max" in str(ours)
    for line, other in zip(ours, theirs, strict=True):
        for values in (line, other):
            values.pop("explained_variance", None)  # of a share of the batch, which is another number
        assert line == pytest.approx(other, rel=1e-5, abs=1e-5)
    assert json.loads((cut / "run.json").read_text())["parallel"] == "fsdp"
    assert json.loads((whole / "run.json").read_text())["parallel"] == "one process"
    exported = [safetensors.torch.load_file(folder / "student.safetensors") for folder in (whole, cut)]
    assert_close(*exported)


def test_every_process_writes_its_own_part_and_no_other(cut: Path) -> None:
    path = newest(cut)
    names = sorted(file.name for file in path.glob("*.safetensors"))
    assert names == [
        "generators-00001-of-00002.safetensors",
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
        "optimizer-00001-of-00002.safetensors", "optimizer-00002-of-00002.safetensors",
    ]  # fmt: skip
    parts = [safetensors.torch.load_file(path / f"model-0000{i}-of-00002.safetensors") for i in (1, 2)]
    name = "student.network.blocks.1.widen.weight"
    assert [tuple(part[name].shape) for part in parts] == [(3, 6), (2, 6)], (
        "five rows, of which each has some"
    )
    assert "student.network.patches.weight" in parts[0]
    assert "student.network.patches.weight" not in parts[1], "what is not cut is written once"


def test_rows_are_read_from_whatever_parts_there_are(cut: Path, whole: Path) -> None:
    name = "student.network.blocks.1.widen.weight"
    for folder in (cut, whole):
        all_rows = read_group(newest(folder), "model")[name]
        for start in range(6):
            for stop in range(start, 6):
                found = read_group(newest(folder), "model", {name: Rows(start, stop, (5, 6))})[name]
                assert torch.equal(found, all_rows[start:stop]), (start, stop)
        with pytest.raises(WeightsError, match=r"widen.weight is \(5, 6\), the run trains one of \(7, 6\)"):
            read_group(newest(folder), "model", {name: Rows(0, 5, (7, 6))})


def test_a_checkpoint_in_parts_is_a_model(cut: Path) -> None:
    state = network_state(newest(cut), "momentum_student")
    assert state["blocks.2.narrow.weight"].shape == (6, 5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second"),
    [((2, "fsdp"), (2, "ddp")), ((2, "ddp"), (2, "fsdp")), ((2, "fsdp"), (3, "fsdp")), ((3, "fsdp"), (1, "auto")),
     ((1, "auto"), (2, "fsdp"))],
)  # fmt: skip
def test_any_number_of_processes_goes_on_from_what_any_number_wrote(
    whole: Path, tmp_path: Path, first: tuple[int, str], second: tuple[int, str]
) -> None:
    """A batch of six divides by one, two and three; the run stops half way as its epochs say."""
    size = {"train_batch_size": 6}
    straight = run_on(1, tmp_path / "straight", **size)
    folder = run_on(first[0], tmp_path / "run", train_parallel=first[1], **size)
    before = sorted((folder / "checkpoints").iterdir())
    shutil.rmtree(before[-1])
    run_on(second[0], folder, train_parallel=second[1], **size)
    assert "resuming at step" in (folder / "log.txt").read_text()
    if first[0] != second[0]:
        said = f"saved by {first[0]} processes, resumed by {second[0]}"
        assert said in (folder / "log.txt").read_text()
    assert_close(end_of(straight), end_of(folder))


def test_an_interrupted_run_ends_in_the_same_bits(cut: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(cut, folder)
    shutil.rmtree(newest(folder))
    run_on(2, folder, train_parallel="fsdp")
    assert same_bits(end_of(cut), end_of(folder))


def test_a_missing_or_damaged_part_costs_the_steps_since_the_checkpoint_before(
    cut: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(cut, folder)
    last = newest(folder)
    (last / "optimizer-00002-of-00002.safetensors").unlink()
    run_on(2, folder, train_parallel="fsdp")
    said = (folder / "log.txt").read_text()
    assert "optimizer-00002-of-00002.safetensors: No such file" in said
    assert same_bits(end_of(cut), end_of(folder))
    file = newest(folder) / "model-00002-of-00002.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    run_on(2, folder, train_parallel="fsdp")
    assert "the SHA-256 of model-00002-of-00002.safetensors is wrong" in (folder / "log.txt").read_text()
    assert same_bits(end_of(cut), end_of(folder))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"train_accumulate": 2},
        {"train_accumulate": 2, "train_cached_batch": True},
        {"train_activation_checkpointing": True, "train_checkpoint_every": 2},
        {"optim_clip_grad": 0.01, "optim_clip_each_parameter": True},
        {"optim_clip_grad": 0.01},
        {"optim_name": "sgd"},
    ],
    ids="-".join,
)
def test_options_mean_the_same_in_slices(tmp_path: Path, changes: dict[str, Any]) -> None:
    short = {"train_epochs": 3, **changes}
    one = run_on(1, tmp_path / "one", **short)
    two = run_on(2, tmp_path / "two", train_parallel="fsdp", **short)
    assert_close(end_of(one), end_of(two))


def refused(folder: Path, changes: dict[str, Any], method: type[Method], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        run(folder, changes, method)


@pytest.mark.parametrize(
    ("changes", "method", "match"),
    [
        ({"optim_name": "lars"}, BlockMethod, "Lars needs norms of whole tensors"),
        ({}, ToyMethod, "ToyNetwork repeats no blocks"),
    ],
)
def test_what_cannot_be_cut_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], method: type[Method], match: str
) -> None:
    wanted = {"train_parallel": "fsdp", **changes}
    assert exit_codes(start_ranks(2, refused, tmp_path / "run", wanted, method, match)) == [0, 0]


def test_one_process_has_nothing_to_cut(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no effect with one process"):
        run(tmp_path / "run", {"train_parallel": "fsdp"})
