"""How a method is spread over processes: what travels, in which numbers, compiled or not, and when blocks are cut."""

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from block_toys import BlockMethod, PlainBlockMethod
from torch import Tensor, nn
from training_toys import (
    CONFIG_YAML,
    Pictures,
    exit_codes,
    settings,
    start_ranks,
    untimed_metrics,
)

import fdkit.training.loop as loop
from fdkit.errors import OutputError, ResourceError
from fdkit.methods._method import Method
from fdkit.training import checkpoint as checkpoint_module
from fdkit.training.checkpoint import load_checkpoint
from fdkit.training.distributed import World, local_device, process_group
from fdkit.training.loop import train
from fdkit.training.parallel import Parallel, parallel
from fdkit.training.run import Run
from fdkit.training.sharding import is_too_large

CPU = torch.device("cpu")
RANKS = pytest.mark.distributed


def run(folder: Path, changes: dict[str, Any], method: type[Method] = BlockMethod) -> None:
    with Run.create(folder, CONFIG_YAML, resume=True, command=["toy"]) as opened:
        train(method(), Pictures(), opened, **settings(**changes))


class Exchanges:
    """Counts the exchanges of gradients of a run in this process."""

    def __init__(self) -> None:
        self.count = 0
        name = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
        self._scatter = getattr(dist, name)
        setattr(dist, name, self.scatter)
        loop.parallel = self.spread  # type: ignore[assignment]

    def scatter(self, *args: Any, **kwargs: Any) -> Any:
        self.count += 1
        return self._scatter(*args, **kwargs)

    def spread(self, *args: Any, **kwargs: Any) -> Parallel:
        made = parallel(*args, **kwargs)

        def hook(_: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
            self.count += 1
            dist.all_reduce(bucket.buffer().div_(2))
            done: torch.futures.Future[Tensor] = torch.futures.Future()
            done.set_result(bucket.buffer())
            return done

        made.module.register_comm_hook(None, hook)  # type: ignore[operator]
        return made


def counted(folder: Path, changes: dict[str, Any], method: type[Method]) -> None:
    exchanges = Exchanges()
    run(folder / "run", changes, method)
    (folder / str(exchanges.count)).touch()


@RANKS
@pytest.mark.slow
@pytest.mark.parametrize("method", [PlainBlockMethod, BlockMethod])
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_parts_of_a_batch_travel_once_an_update(tmp_path: Path, kind: str, method: type[Method]) -> None:
    """Twelve updates: a bucket of what is whole, and a message for each of three cut blocks.

    Of a block that is called twice in a part, either message of the last part may go alone.
    """
    each = 1 if kind == "ddp" else 4
    ends = {}
    for parts in (1, 4):
        folder = tmp_path / str(parts)
        folder.mkdir()
        changes = {
            "train_parallel": kind,
            "train_accumulate": parts,
            "train_epochs": 4,
            "optim_clip_grad": 1.0,
        }
        assert exit_codes(start_ranks(2, counted, folder, changes, method)) == [0, 0]
        (name,) = {path.name for path in folder.iterdir() if path.is_file()}
        most = 12 * (7 if kind == "fsdp" and method is BlockMethod else each)
        assert 12 * each <= int(name) <= most, f"{parts} parts"
        ends[parts] = load_checkpoint(folder / "run" / "checkpoints" / "step-00000012").tensors["model"]
    for name, value in ends[1].items():
        torch.testing.assert_close(ends[4][name], value, rtol=1e-4, atol=1e-5, msg=name)


def compiled(folder: Path, changes: dict[str, Any]) -> None:
    """With a backend that takes no compiler: what is traced, and what is not, is the same."""
    original = nn.Module.compile
    nn.Module.compile = lambda self, **_: original(self, backend="aot_eager")  # type: ignore[method-assign, assignment]
    run(folder, changes)


@RANKS
@pytest.mark.slow
def test_cut_blocks_compile_without_breaks_and_compute_the_same(tmp_path: Path) -> None:
    short = {"train_epochs": 2, "train_parallel": "fsdp"}
    assert exit_codes(start_ranks(2, run, tmp_path / "eager", short)) == [0, 0]
    changes = {**short, "train_compile": True}
    assert exit_codes(start_ranks(2, compiled, tmp_path / "compiled", changes), 120) == [0, 0]
    facts = json.loads((tmp_path / "compiled" / "run.json").read_text())
    assert facts["parallel"] == "fsdp"
    assert facts["compile"]["graphs"] >= 1
    assert facts["compile"]["graph_breaks"] == {}
    assert not facts["compile"]["limit_hit"]
    ours, theirs = untimed_metrics(tmp_path / "compiled"), untimed_metrics(tmp_path / "eager")
    for line, other in zip(ours, theirs, strict=True):
        assert line == pytest.approx(other, rel=1e-4)


def in_bfloat16(rank_folder: Path) -> None:
    with process_group(CPU) as world:
        method = BlockMethod()
        spread = parallel(method, world, CPU, wanted="fsdp", is_bf16=True)
        assert spread.shards is not None
        seen = []
        block = method.student.network.blocks[1]  # type: ignore[union-attr, index]
        block.register_forward_pre_hook(lambda module, _: seen.append(module.widen.weight.dtype))
        torch.manual_seed(world.rank)
        with torch.autocast("cpu", torch.bfloat16):
            loss = spread.module([torch.rand(2, 3, 4, 4)], 0.0)["loss"]
        loss.backward()
        assert set(seen) == {torch.bfloat16}
        for name, parameter in method.student.named_parameters():
            assert parameter.dtype == torch.float32, name
            assert parameter.grad is not None, name
            assert parameter.grad.dtype == torch.float32, name


@RANKS
def test_in_bfloat16_weights_of_blocks_travel_halved_and_gradients_add_up_in_float32(tmp_path: Path) -> None:
    assert exit_codes(start_ranks(2, in_bfloat16, tmp_path)) == [0, 0]


def without_room(folder: Path) -> None:
    """Rank 1 has no room for its part of the third checkpoint."""
    with process_group(CPU) as world:
        check = checkpoint_module._require_space

        def full(path: Path, content: Any) -> None:
            if world.rank == 1 and "step-00000012" in path.name:
                raise OSError(28, "No space left on device", str(path))
            check(path, content)

        checkpoint_module._require_space = full
        with pytest.raises(ResourceError, match=r"rank 1: no room for the checkpoint .*step-00000012"):
            run(folder, {"train_parallel": "fsdp"})


@RANKS
def test_a_part_that_cannot_be_written_stops_all_and_older_checkpoints_stay(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert exit_codes(start_ranks(2, without_room, folder)) == [0, 0]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        "step-00000004",
        "step-00000008",
    ]
    assert exit_codes(start_ranks(2, run, folder, {"train_parallel": "fsdp"})) == [0, 0]
    assert "resuming at step 8 of 24 from step-00000008" in (folder / "log.txt").read_text()


def test_a_part_on_another_hosts_disk_is_missed(tmp_path: Path) -> None:
    facts = {"model-00002-of-00002.safetensors": {"size": 7, "sha256": ""}}
    with pytest.raises(
        OutputError, match=r"model-00002-of-00002\.safetensors was written by another process"
    ):
        checkpoint_module._require_all(tmp_path, facts)
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(b"1234567")
    checkpoint_module._require_all(tmp_path, facts)


def test_blocks_are_cut_where_training_takes_more_than_a_quarter_of_a_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    method = BlockMethod()
    trained = sum(one.numel() for one in method.parameters() if one.requires_grad)
    frozen = sum(one.numel() for one in method.parameters() if not one.requires_grad)
    needed = 16 * trained + 4 * frozen
    assert frozen > 0
    device = torch.device("cuda", 0)

    class Card:
        total_memory = 4 * needed

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Card)
    assert not is_too_large(method, device)
    Card.total_memory -= 1
    assert is_too_large(method, device)
    assert not is_too_large(method, CPU), "the host's memory is not the question"


def test_one_process_calls_the_method_itself() -> None:
    method = BlockMethod()
    spread = parallel(method, World(0, 1, 0), CPU)
    assert spread.module is method
    assert spread.kind == "one process"


def on_gpus(rank: int, folder: str, kind: str, port: int) -> None:
    """Every process on a GPU of its own, through nccl."""
    place = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": 2,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in place.items()})
    run(Path(folder), {"train_parallel": kind, "device": local_device("cuda")})


@pytest.mark.gpu
@RANKS
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_agree_on_slices_and_copies(tmp_path: Path) -> None:
    for kind in ("ddp", "fsdp"):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        mp.spawn(on_gpus, args=(str(tmp_path / kind), kind, port), nprocs=2)
    one, other = (
        load_checkpoint(tmp_path / kind / "checkpoints" / "step-00000024").tensors["model"]
        for kind in ("ddp", "fsdp")
    )
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-4, msg=name)
