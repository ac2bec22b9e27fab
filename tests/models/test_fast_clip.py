"""The fast attention of open_clip's towers, held against PyTorch's own module."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fdkit.models.fast_clip import FastMultiheadAttention, accelerate
from fdkit.models.libraries import build_open_clip


def _pair(**options: Any) -> tuple[nn.MultiheadAttention, nn.MultiheadAttention]:
    """PyTorch's module, and an accelerated copy."""
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(12, 3, **{"batch_first": True, **options})
    if plain.in_proj_bias is not None:
        nn.init.normal_(plain.in_proj_bias)
    fast = copy.deepcopy(plain)
    accelerate(fast)
    return plain, copy.deepcopy(fast)


def _tokens() -> Tensor:
    return torch.randn(2, 7, 12)


@pytest.mark.parametrize("options", [{}, {"bias": False}])
@pytest.mark.parametrize("is_frozen", [True, False])
def test_attended_tokens_and_gradients_are_pytorchs(options: dict[str, Any], is_frozen: bool) -> None:
    plain, fast = _pair(**options)
    assert type(fast) is FastMultiheadAttention
    tokens = _tokens()
    inputs = [tokens.clone().requires_grad_() for _ in range(2)]
    outputs = []
    for module, given in zip((plain, fast), inputs, strict=True):
        module.eval().requires_grad_(not is_frozen)
        attended, weights = module(given, given, given, need_weights=False)
        assert weights is None
        attended.square().sum().backward()
        outputs.append(attended)
    torch.testing.assert_close(outputs[1], outputs[0])
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
    if not is_frozen:
        torch.testing.assert_close(fast.in_proj_weight.grad, plain.in_proj_weight.grad)


def test_whatever_is_not_plain_self_attention_is_left_to_pytorch() -> None:
    plain, fast = (module.eval() for module in _pair())
    tokens, other = _tokens(), _tokens()
    mask = torch.ones(7, 7).tril() == 0
    padding = torch.tensor([[False] * 5 + [True] * 2] * 2)
    for arguments, options in (
        ((tokens, other, other), {"need_weights": False}),
        ((tokens, tokens, other), {"need_weights": False}),
        ((tokens, tokens, tokens), {"need_weights": False, "attn_mask": mask}),
        ((tokens, tokens, tokens), {"need_weights": False, "key_padding_mask": padding}),
        ((tokens, tokens, tokens, padding), {"need_weights": False}),
        ((tokens, tokens, tokens), {"average_attn_weights": False}),
    ):
        ours, theirs = fast(*arguments, **options), plain(*arguments, **options)
        torch.testing.assert_close(ours[0], theirs[0])
        if theirs[1] is not None:
            torch.testing.assert_close(ours[1], theirs[1])


@pytest.mark.parametrize(
    "options",
    [{"batch_first": False}, {"add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": 12, "vdim": 12}],
)
def test_other_forms_of_the_module_are_left_to_pytorch(options: dict[str, Any]) -> None:
    plain, fast = (module.eval() for module in _pair(**options))
    tokens = _tokens()
    ours, theirs = (module(tokens, tokens, tokens, need_weights=False)[0] for module in (fast, plain))
    torch.testing.assert_close(ours, theirs)


def test_dropout_is_kept_in_training() -> None:
    plain, fast = (module.train() for module in _pair(dropout=0.5))
    tokens = _tokens()
    seen = []
    for module in (plain, fast):
        torch.manual_seed(1)
        seen.append(module(tokens, tokens, tokens, need_weights=False)[0])
    assert torch.equal(seen[0], seen[1])


@torch.no_grad()
def test_an_open_clip_tower_keeps_its_names_and_features() -> None:
    backbone = build_open_clip("ViT-B-32", {"image_size": 64}).eval()
    plain = copy.deepcopy(backbone)
    for module in plain.network.modules():
        if isinstance(module, nn.MultiheadAttention):
            module.__class__ = nn.MultiheadAttention
    names = list(backbone.network.state_dict())
    accelerate(backbone.network)
    assert list(backbone.network.state_dict()) == names
    images = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(backbone(images).all(), plain(images).all(), rtol=1e-4, atol=1e-5)
