"""A batch that goes through the trunk in parts is the whole batch to heads and loss."""

import copy
import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from training_toys import Pictures, exit_codes, final_weights, settings, start_ranks

from fdkit.data.views import TwoViews, TwoViewsConfig
from fdkit.errors import ConfigError
from fdkit.methods._network import NetworkConfig, build_network
from fdkit.methods.mocov3 import MoCoV3, MoCoV3Config
from fdkit.training.activations import cache_batch
from fdkit.training.loop import train
from fdkit.training.run import Run

TINY = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}


def mocov3(**network: Any) -> MoCoV3:
    torch.manual_seed(0)
    student = build_network(NetworkConfig(**{"model_args": TINY, **network}), image_size=8)
    config = MoCoV3Config(hidden_dim=12, output_dim=6)
    return MoCoV3(student, SimpleNamespace(num_views=2, image_size=8), config, seed=0).double()


def views(batch: int) -> list[Tensor]:
    return [torch.rand(batch, 3, 8, 8, dtype=torch.float64) for _ in range(2)]


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
@pytest.mark.parametrize("num_parts", [2, 5])
def test_loss_and_gradient_are_those_of_the_whole_batch(num_parts: int, drop_path: float) -> None:
    whole = mocov3(drop_path=drop_path)
    cached, images = copy.deepcopy(whole), views(7)  # parts of unequal size
    cache_batch(cached, num_parts)
    for method in (whole, cached):
        torch.manual_seed(3)
        method(images, 0.0)["loss"].backward()
    if drop_path:  # other images drop their paths, so only the second pass is held against the first
        assert all(p.grad is not None and p.grad.isfinite().all() for p in cached.student.parameters())
        return
    for (name, one), other in zip(whole.named_parameters(), cached.parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(other.grad, one.grad, rtol=1e-9, atol=1e-12, msg=name)


def test_the_second_pass_drops_the_same_paths_as_the_first() -> None:
    """Else the gradient would be of another network than the loss: finite differences tell."""
    method, images = mocov3(drop_path=0.5), views(6)
    cache_batch(method, 3)
    weight = method.student.network.blocks[0].mlp.fc1.weight

    def loss() -> Tensor:
        torch.manual_seed(3)
        with torch.enable_grad():
            value: Tensor = method(images, 0.0)["loss"]
        return value

    loss().backward()
    direction = torch.randn_like(weight)
    assert weight.grad is not None
    slope = (weight.grad * direction).sum()
    with torch.no_grad():
        weight += 1e-6 * direction
        above = loss()
        weight -= 2e-6 * direction
        below = loss()
    torch.testing.assert_close((above - below).detach() / 2e-6, slope, rtol=1e-4, atol=1e-9)


def saved_bytes(method: MoCoV3, images: list[Tensor]) -> int:
    """Bytes of the activations kept for the backward pass."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        method(images, 0.0)
    return sum(kept.values())


def test_the_trunks_activations_are_not_kept() -> None:
    whole, cached = mocov3(), mocov3()
    cache_batch(cached, 8)
    images = views(64)
    assert saved_bytes(cached, images) < 0.3 * saved_bytes(whole, images)


def trained(folder: Path, **changes: Any) -> dict[str, Tensor]:
    """Weights of the student after 6 steps on pictures of 7 x 9 pixels."""
    views = TwoViews(TwoViewsConfig(image_size=8))
    torch.manual_seed(0)
    student = build_network(NetworkConfig(model_args=TINY, pooling="cls"), image_size=8)
    method = MoCoV3(student, views, MoCoV3Config(hidden_dim=12, output_dim=6), seed=0)
    with Run.create(folder, "data: toy\n", command=[]) as run:
        train(method, Pictures(), run, **settings(train_epochs=2, optim_name="sgd", optim_lr=0.01, **changes))
    return {name: value.detach().clone() for name, value in method.student.state_dict().items()}


def test_a_run_is_that_of_the_whole_batch_and_not_that_of_its_parts(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole")
    cached = trained(tmp_path / "cached", train_accumulate=4, train_cached_batch=True)
    parts = trained(tmp_path / "parts", train_accumulate=4)

    def distance(other: dict[str, Tensor]) -> float:
        return max(float((whole[name] - value).abs().max()) for name, value in other.items())

    assert distance(cached) < 0.01 * distance(parts)


@pytest.mark.distributed
def test_two_processes_equal_one(tmp_path: Path) -> None:
    cached = {"train_accumulate": 2, "train_cached_batch": True}
    processes = start_ranks(2, functools.partial(trained, **cached), tmp_path / "two")
    assert exit_codes(processes) == [0, 0]
    trained(tmp_path / "one", **cached)
    one, two = (final_weights(tmp_path / name) for name in ("one", "two"))
    for name, value in one.items():
        if name.startswith("model."):
            torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_what_cannot_be_cached_is_refused() -> None:
    with pytest.raises(ConfigError, match="has no effect with train"):
        cache_batch(mocov3(), 1)
    resnet = {"architecture": "resnet18", "model_args": {}, "pooling": "patches"}
    with pytest.raises(ConfigError, match="batch norms"):
        cache_batch(mocov3(**resnet), 2)
    alone = mocov3()
    alone.compares_images = False
    with pytest.raises(ConfigError, match="compares no images"):
        cache_batch(alone, 2)
