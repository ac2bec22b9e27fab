"""What holds for every pretraining method: each file in fdkit/methods is tested here the day it appears."""

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from fdkit.commands import pretrain
from fdkit.config import Values, validate
from fdkit.data.sources import ImageSource, open_source
from fdkit.errors import ConfigError
from fdkit.methods._method import Duration, Method
from fdkit.teachers.loading import load_teacher

METHODS = pretrain.choices()
SWIN = {
    "architecture": "swin_tiny_patch4_window7_224",
    "model_args": {"patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2},
    "pooling": "patches",
}
VIT = {
    "architecture": "vit_tiny_patch16_224",
    "model_args": {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2},
}
NETWORKS = {"esvit": SWIN}
VIEWS = {"image_size": 16, "local_size": 8, "num_local": 2}
BATCH = 8


def small(name: str, fields: Any) -> Any:
    """A size that runs in milliseconds: every count above 64 becomes 64."""
    default = fields[name].get_default(call_default_factory=True)
    return 64 if isinstance(default, int) and not isinstance(default, bool) and default > 64 else default


def configuration(method: str, **changes: Values) -> Any:
    kind = pretrain.config_class(method)
    sections = {name: kind.model_fields[name].annotation.model_fields for name in ("views", "network")}
    own = kind.model_fields[pretrain.section(method)].annotation.model_fields
    values: Values = {
        "data": "demo",
        "network": {**NETWORKS.get(method, VIT), "crop_ratio": 1},
        "views": {name: value for name, value in VIEWS.items() if name in sections["views"]},
        pretrain.section(method): {name: small(name, own) for name in own}
        | ({"num_splits": 2} if "num_splits" in own else {}),
        **changes,
    }
    return validate(kind, values, "test")


def build(method: str, **changes: Values) -> Method:
    built = pretrain.build_method(configuration(method, **changes)).train()
    built.begin(Duration(num_steps=10, steps_per_epoch=5, batch_size=BATCH, part_size=BATCH))
    return built


@cache
def built_in() -> ImageSource:
    return open_source("demo", "train")


def images(method: Method, seed: int = 0) -> list[Tensor]:
    """Views as the loader and the device make them, from the built-in images."""
    source, random = built_in(), np.random.default_rng(seed)
    samples = [method.views(source.read(seed * BATCH + i), random) for i in range(BATCH)]
    crops = [torch.stack(view) for view in zip(*(sample.crops for sample in samples), strict=True)]
    colour = [torch.stack(view) for view in zip(*(sample.colour for sample in samples), strict=True)]
    return method.views.finish(crops, colour)


def optimiser(method: Method) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.05)


def step(method: Method, number: int, optimizer: torch.optim.Optimizer) -> Tensor:
    torch.manual_seed(number)
    progress = number / 10
    optimizer.zero_grad(set_to_none=True)
    loss: Tensor = method(images(method, number), progress)["loss"]
    loss.backward()
    method.before_step(progress)
    optimizer.step()
    method.after_step(progress)
    return loss.detach()


@pytest.mark.parametrize("name", METHODS)
def test_the_loss_is_finite_and_its_gradient_reaches_what_trains_and_nothing_else(name: str) -> None:
    method = build(name)
    scalars = method(images(method), 0.0)
    assert all(value.ndim == 0 and value.isfinite() for value in scalars.values())
    assert [key for key, value in scalars.items() if value.requires_grad] == ["loss"]
    scalars["loss"].backward()
    for key, parameter in method.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"{key} trains and gets no gradient"
            assert parameter.grad.isfinite().all(), key
        else:
            assert parameter.grad is None, f"{key} is frozen and gets a gradient"


CONV_STEM: Values = {
    "architecture": "vit_tiny_patch16_224",
    "model_args": {"embed_dim": 16, "depth": 1, "num_heads": 2},
    "stem": "conv",
    "freeze_patch_projection": False,
    "pooling": "cls",
}
RESNET: Values = {
    "architecture": "resnet10t",
    "model_args": {"channels": [8, 8, 16, 16], "stem_width": 4},
    "pooling": "patches",
    "position": "learned",
    "initialisation": "timm",
    "freeze_patch_projection": False,
}
LARGE = {"image_size": 64, "local_size": 32, "num_local": 1}


@pytest.mark.parametrize("kind", ["conv stem", "resnet"])
@pytest.mark.parametrize("name", METHODS)
def test_other_kinds_of_networks_learn_too(name: str, kind: str) -> None:
    network = CONV_STEM if kind == "conv stem" else RESNET
    fields = pretrain.config_class(name).model_fields["views"].annotation.model_fields  # type: ignore[union-attr]
    views = {key: value for key, value in LARGE.items() if key in fields}
    if (name, kind) == ("mae", "resnet"):
        with pytest.raises(ConfigError, match="cannot leave out patches"):
            build(name, network=network, views=views)
        return
    method = build(name, network=network, views=views)
    method(images(method), 0.0)["loss"].backward()
    gradients = [p.grad for p in method.student.parameters() if p.requires_grad]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_method_goes_on_to_the_bit(name: str) -> None:
    whole = build(name)
    optimizer = optimiser(whole)
    for number in range(3):
        step(whole, number, optimizer)
    state = copy.deepcopy(whole.state_dict())
    resumed = pretrain.build_method(
        configuration(name, seed=9)  # type: ignore[arg-type]
    ).train()
    resumed.load_state_dict(state)
    resumed.begin(whole.duration)
    second = optimiser(resumed)
    for number in range(3, 6):
        assert torch.equal(step(whole, number, optimizer), step(resumed, number, second))
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


@pytest.mark.parametrize("name", METHODS)
def test_the_seed_decides_the_weights_and_the_global_generator_is_left_alone(name: str) -> None:
    before = torch.get_rng_state()
    states = [pretrain.build_method(configuration(name, seed=s)).state_dict() for s in (3, 3, 4)]  # type: ignore[arg-type]
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert any(not torch.equal(states[0][key], states[2][key]) for key in states[0])


def comparing() -> list[str]:
    """Methods whose images meet in the loss; the others' ranks only average."""
    return [name for name in METHODS if pretrain.build_method(configuration(name)).compares_images]


def double(name: str) -> tuple[Method, list[Tensor]]:
    method = build(name).double()
    return method, [view.double() for view in images(method)]


def one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    results = {}
    for name in comparing():
        method, views = double(name)
        method.begin(method.duration._replace(part_size=BATCH // 2, world_size=2))
        parallel = DistributedDataParallel(method, broadcast_buffers=False)
        torch.manual_seed(0)
        loss = parallel([view[rank * BATCH // 2 : (rank + 1) * BATCH // 2] for view in views], 0.0)["loss"]
        loss.backward()
        results[name] = {
            "loss": loss.detach(),
            "grads": {key: p.grad for key, p in method.named_parameters() if p.grad is not None},
            "buffers": dict(method.named_buffers()),
        }
    torch.save(results, f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.distributed
def test_two_processes_equal_one(tmp_path: Path) -> None:
    mp.spawn(one_rank, args=(str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    assert set(ranks[0]) == set(comparing())
    for name in comparing():
        method, views = double(name)
        torch.manual_seed(0)
        loss = method(views, 0.0)["loss"]
        loss.backward()
        mean = (ranks[0][name]["loss"] + ranks[1][name]["loss"]) / 2
        torch.testing.assert_close(mean, loss.detach(), rtol=1e-7, atol=1e-9, msg=name)
        for key, parameter in method.named_parameters():
            if parameter.grad is None:
                continue
            for rank in ranks:
                got = rank[name]["grads"][key]
                torch.testing.assert_close(got, parameter.grad, rtol=1e-5, atol=1e-9, msg=f"{name} {key}")
        for key, value in method.named_buffers():
            for rank in ranks:
                torch.testing.assert_close(rank[name]["buffers"][key], value, msg=f"{name} {key}")


@pytest.mark.parametrize("name", METHODS)
def test_a_tiny_run_learns_without_collapse_and_is_a_teacher_at_once(name: str, tmp_path: Path) -> None:
    config = configuration(
        name,
        train={"epochs": 0.5, "batch_size": 64, "log_every_steps": 4, "precision": "fp32"},
        optim={"lr": 2e-3, "lr_reference_batch": None, "warmup_epochs": 0.05, "clip_grad": 3.0},
        output=tmp_path / "run",  # type: ignore[arg-type]
        device="cpu",  # type: ignore[arg-type]
    )
    run = Path(pretrain.run(config, handle_signals=False).numbers["run"])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    # A centred target's entropy rises while its centre settles, and the loss with it; what is learnt is the rest.
    learnt = "divergence" if any("divergence" in line for line in lines) else "loss"
    values = [line[learnt] for line in lines if learnt in line][
        1:
    ]  # in the first line a queue is still random
    assert values[-1] < values[0], values
    teacher = load_teacher(str(run))
    features = teacher.encode(torch.rand(32, 3, 16, 16)).patches.mean(dim=1)
    spread = torch.nn.functional.normalize(features, dim=1).std(dim=0).mean() * features.shape[1] ** 0.5
    assert spread > 0.02, "the representation has collapsed"
    recipe = json.loads((run / "student.json").read_text())
    assert recipe["library"] == "timm"
    network = timm.create_model(
        recipe["architecture"], **recipe["model_args"], checkpoint_path=run / "student.safetensors"
    )
    assert sum(p.numel() for p in network.parameters()) > 0
