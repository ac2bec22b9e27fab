"""Every method with its blocks in slices on two processes, against the same method whole on each of them."""

import json
import os
import re
import socket
from pathlib import Path
from typing import Any

import pytest
import test_contracts as contracts
import torch
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.tensor import DTensor

from fdkit.data.views import CropConfig, RandomCrop
from fdkit.errors import WeightsError
from fdkit.methods._method import Method
from fdkit.methods.feature_distillation import FeatureDistillation, FeatureDistillationConfig
from fdkit.models.backbone import Backbone
from fdkit.models.libraries import build_timm
from fdkit.models.student import StudentConfig, build_student
from fdkit.teachers.loading import load_teacher
from fdkit.teachers.teacher import Teacher
from fdkit.training.distributed import World
from fdkit.training.optimizer import OptimizerConfig, build_optimizer
from fdkit.training.parallel import parallel

STEPS = 3
BLOCK = re.compile(r"student\.network\.(layers\.\d+\.)?blocks\.\d+\..*(weight|bias|gamma_\d)$")
STUDENTS: dict[str, dict[str, Any]] = {
    "distillation": {},
    "distillation, a table a layer": {"position": "rpb"},
    "distillation, batched": {"drop_path": 0.5, "drop_path_mode": "batched"},
    "distillation, swin": {"name": "swin_tiny_patch4_window7_224"},
}
NAMES = [*contracts.METHODS, *STUDENTS]


def build(name: str) -> Method:
    if name not in STUDENTS:
        return contracts.build(name).double()
    vit = {"embed_dim": 12, "depth": 3, "num_heads": 3, "img_size": 32}
    torch.manual_seed(3)
    teacher = Teacher(build_timm("vit_tiny_patch16_224", vit), name="tiny")
    if "swin" in name:
        size = {"img_size": 32, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "window_size": 2}
        student: Backbone = build_timm("swin_tiny_patch4_window7_224", {**size, "patch_size": 4})
    else:
        config = StudentConfig(**{"drop_path": 0.0, **STUDENTS[name]})
        student = build_student(config, teacher.backbone, image_size=32, seed=1)
    views = RandomCrop(CropConfig(image_size=32))
    method = FeatureDistillation(teacher, student, views, FeatureDistillationConfig()).train().double()
    teacher.double()
    return method


def views_of(method: Method, number: int) -> list[Tensor]:
    if isinstance(method, FeatureDistillation):
        return [torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(number)).double()]
    return [view.double() for view in contracts.images(method, number)]


def train(name: str, kind: Any, rank: int) -> dict[str, Any]:
    method = build(name)
    method.begin(method.duration._replace(num_steps=10, steps_per_epoch=5, part_size=4, world_size=2))
    world = World(rank, 2, rank)
    spread = parallel(method, world, torch.device("cpu"), wanted=kind)
    config = OptimizerConfig(name="sgd", lr=0.05, decay_exempt="none", weight_decay=0.1)
    optimizer = build_optimizer(method, config)
    if spread.shards is not None:
        spread.shards.take_over(optimizer)
    losses = []
    for number in range(STEPS):
        torch.manual_seed(10 * number + rank)
        optimizer.zero_grad(set_to_none=True)
        mine = [view[4 * rank : 4 * rank + 4] for view in views_of(method, number)]
        loss = spread.module(mine, number / 10)["loss"]
        loss.backward()
        method.before_step(number / 10)
        if spread.shards is not None:
            spread.shards.take_gradients()
        optimizer.step()
        method.after_step(number / 10)
        losses.append(loss.detach())
    if spread.shards is None:
        return {"losses": losses, "state": {key: one.clone() for key, one in method.state_dict().items()}}
    with spread.shards.whole() as whole:
        state = {key: one.clone() for key, one in whole.state_dict().items()} if rank == 0 else {}
    own = {id(parameter): parameter for group in optimizer.param_groups for parameter in group["params"]}
    return {
        "losses": losses,
        "state": state,
        "cut": sum(one.numel() for one in method.student.parameters() if isinstance(one, DTensor)),
        "here": sum(parameter.numel() for parameter in own.values()),
        "all": sum(parameter.numel() for parameter in method.parameters() if parameter.requires_grad),
    }


def one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    for place, name in enumerate(NAMES):
        torch.save({kind: train(name, kind, rank) for kind in ("ddp", "fsdp")}, f"{folder}/{place}-{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slices")
    mp.spawn(one_rank, args=(str(folder),), nprocs=2)
    return folder


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", NAMES)
def test_a_method_in_slices_is_the_method(trained: Path, name: str) -> None:
    ranks = [torch.load(trained / f"{NAMES.index(name)}-{rank}.pt", weights_only=True) for rank in (0, 1)]
    for rank in ranks:
        torch.testing.assert_close(rank["fsdp"]["losses"], rank["ddp"]["losses"], rtol=1e-9, atol=1e-12)
    wanted, found = ranks[0]["ddp"]["state"], ranks[0]["fsdp"]["state"]
    assert wanted.keys() == found.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-8, atol=1e-10, msg=key)
    blocks = sum(value.numel() for key, value in found.items() if BLOCK.match(key))
    for rank in ranks:
        facts = rank["fsdp"]
        assert facts["cut"] > 0.95 * blocks > 0, (
            "whatever is in the student's blocks, but for tables of positions"
        )
        assert facts["here"] == pytest.approx(facts["all"] - facts["cut"] / 2, rel=0.01)


def pretrain_in_slices(rank: int, folder: str, port: int) -> None:
    environment = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": 2,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in environment.items()})
    torch.set_num_threads(1)
    config = contracts.configuration(
        "byol",
        train={
            "epochs": 0.1,
            "batch_size": 32,
            "log_every_steps": 2,
            "save_every_steps": 2,
            "precision": "fp32",
            "parallel": "fsdp",
            "activation_checkpointing": True,
        },
        optim={
            "name": "adamw",
            "lr": 2e-3,
            "lr_reference_batch": None,
            "warmup_epochs": 0.05,
            "clip_grad": 3.0,
        },
        monitor={"every_epochs": 0.05, "max_images": 64},
        output=Path(folder) / "run",  # type: ignore[arg-type]
        device="cpu",  # type: ignore[arg-type]
    )
    contracts.pretrain.run(config, handle_signals=False)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_command_in_slices_measures_exports_and_its_checkpoints_are_models(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(pretrain_in_slices, args=(str(tmp_path), port), nprocs=2)
    run = tmp_path / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any("monitor/knn_top1" in line for line in lines)
    assert json.loads((run / "run.json").read_text())["parallel"] == "fsdp"
    last = sorted((run / "checkpoints").iterdir())[-1]
    assert (last / "shards.json").is_file()
    finished, kept = load_teacher(str(run)), load_teacher(str(last))
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(finished.encode(images).patches, kept.encode(images).patches)
    assert kept.sha256 != finished.sha256
    part = last / "model-00002-of-00002.safetensors"
    assert torch.equal(load_teacher(str(part)).encode(images).patches, kept.encode(images).patches)
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(data)
    with pytest.raises(WeightsError, match=r"the SHA-256 of model-00002-of-00002\.safetensors is wrong"):
        load_teacher(str(last))
