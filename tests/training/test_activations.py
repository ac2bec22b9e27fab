"""Activations that are computed twice: the same gradients, and less that is kept."""

import copy
from typing import Any

import pytest
import torch
from block_toys import BlockMethod
from torch import Tensor

from fdkit.errors import ConfigError
from fdkit.methods._method import Method
from fdkit.training.activations import checkpoint_activations
from fdkit.training.plan import TrainConfig
from fdkit.training.sharding import whole_twin


def step(method: Method) -> tuple[dict[str, Tensor], int]:
    """Gradients, and the numbers kept for the backward pass; each tensor once, weights left out."""
    weights = {one.untyped_storage().data_ptr() for one in method.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes() // 4
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = method([torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(4))], 0.0)["loss"]
    loss.backward()
    return {name: one.grad for name, one in method.named_parameters() if one.grad is not None}, sum(
        kept.values()
    )


@pytest.fixture(scope="module")
def plain() -> tuple[dict[str, Tensor], int]:
    return step(BlockMethod())


def test_every_second_block_computed_again_gives_the_same_gradients_and_keeps_less(plain: Any) -> None:
    kept = []
    for every in (2, 3):
        method = BlockMethod()
        if every == 3:
            method.student.network.blocks.append(copy.deepcopy(method.student.network.blocks[2]))
            wanted = step(copy.deepcopy(method))
        else:
            wanted = plain
        checkpoint_activations(method, every=every)
        gradients, numbers = step(method)
        assert gradients.keys() == wanted[0].keys()
        assert all(torch.equal(gradients[name], wanted[0][name]) for name in gradients)
        assert numbers < wanted[1]
        kept.append(numbers / wanted[1])
    assert kept[0] < kept[1], "two of three blocks save more than two of four"


def test_a_copy_computes_with_its_own_weights() -> None:
    method = BlockMethod()
    checkpoint_activations(method, every=2)
    twin = whole_twin(method)
    twin.load_state_dict(
        {name: torch.zeros_like(one) for name, one in method.state_dict().items()}, assign=True
    )
    tokens = torch.ones(1, 4, 6, requires_grad=True)
    block = twin.student.network.blocks[0]  # type: ignore[union-attr, index]
    assert torch.equal(block(tokens), tokens), "without weights a block adds nothing"


def test_what_has_no_effect_is_refused() -> None:
    with pytest.raises(ConfigError, match="leaves one block or none of 3 in BlockNetwork"):
        checkpoint_activations(BlockMethod(), every=3)
    with pytest.raises(ConfigError, match="checkpoint_every 2 has no effect without"):
        TrainConfig(checkpoint_every=2)
    with pytest.raises(ConfigError, match="BlockNetwork does not offer it"):
        checkpoint_activations(BlockMethod())
