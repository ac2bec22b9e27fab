import copy

import pytest
import timm
import torch
from torch import nn

from fdkit.errors import ConfigError
from fdkit.models import fast_beit_attention
from fdkit.models.fast_beit import accelerate
from fdkit.models.fast_beit_attention import FastAttention, attention_facts, use_attention

CPU = torch.device("cpu")


def _beit(**kwargs: bool) -> nn.Module:
    torch.manual_seed(0)
    positions = {"use_shared_rel_pos_bias": True, "use_abs_pos_emb": False} | kwargs
    network = timm.models.beit.Beit(
        img_size=(48, 80), patch_size=16, embed_dim=24, depth=3, num_heads=3, num_classes=0, **positions
    )
    accelerate(network)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "bias_table" in name:
                parameter.normal_()
    return network


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("wanted", ["sdpa", "matmul", "matmul_fp32"])
def test_every_layer_takes_the_way_asked_for_and_the_numbers_stay(
    wanted: str, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = _beit(use_rel_pos_bias=own)
    images = torch.rand(2, 3, 48, 80)
    expected = network.forward_features(images)
    expected.square().mean().backward()
    grads = [parameter.grad for parameter in network.parameters()]
    use_attention(network, wanted)
    twin = copy.deepcopy(network)
    twin.zero_grad()
    asked: list[str] = []
    attend = fast_beit_attention.bias_attention

    def spy(*operands: torch.Tensor, wanted: str) -> torch.Tensor:
        asked.append(wanted)
        return attend(*operands, wanted=wanted)

    monkeypatch.setattr(fast_beit_attention, "bias_attention", spy)
    found = twin.forward_features(images)
    found.square().mean().backward()
    assert asked == [wanted] * 3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for grad, parameter in zip(grads, twin.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-3, atol=1e-6)


def test_the_facts_name_what_runs() -> None:
    network = _beit()
    assert attention_facts(network, CPU, torch.float32) == {"attention": "matmul"}
    use_attention(network, "sdpa")
    expected = {"attention": "sdpa", "attention_kernel": "math"}
    assert attention_facts(network, CPU, torch.float32) == expected


def test_a_network_without_a_learned_bias_has_nothing_to_say_and_refuses() -> None:
    for network in (nn.Linear(2, 2), _beit(use_shared_rel_pos_bias=False)):
        use_attention(network, "auto")
        assert attention_facts(network, CPU, torch.float32) == {}
        with pytest.raises(ConfigError, match="attention matmul has no effect"):
            use_attention(network, "matmul")


def test_what_the_device_cannot_take_is_refused() -> None:
    network = _beit()
    use_attention(network, "fused")
    assert {layer.wanted_attention for layer in network.modules() if isinstance(layer, FastAttention)} == {
        "fused"
    }
    with pytest.raises(ConfigError, match="attention fused cannot run: it needs a CUDA device"):
        attention_facts(network, CPU, torch.float32)
    with pytest.raises(ConfigError, match="needs a CUDA device"):
        network.forward_features(torch.rand(1, 3, 48, 80))
