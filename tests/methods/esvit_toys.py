"""A small EsViT, and the scores of its heads by their equation."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdkit.data.views import MultiCrop, MultiCropConfig
from fdkit.methods._method import Duration
from fdkit.methods._network import NetworkConfig
from fdkit.methods.esvit import EsViT, EsViTConfig, build

SWIN: dict[str, Any] = {
    "architecture": "swin_tiny_patch4_window7_224",
    "model_args": {
        "patch_size": 2,
        "embed_dim": 8,
        "depths": (1, 2),
        "num_heads": (1, 2),
        "window_size": 4,
        "layer_norm_eps": 1e-6,
    },
    "pooling": "patches",
}
VIT: dict[str, Any] = {
    "architecture": "vit_tiny_patch16_224",
    "model_args": {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2},
}
RESNET: dict[str, Any] = {"architecture": "resnet10t", "pooling": "patches"}
CROPS = MultiCropConfig(image_size=16, local_size=12, num_local=2)
"""Maps of 4x4 and 3x3 regions, the smaller from padded ones."""
HEADS = {"output_dim": 7, "hidden_dim": 12, "bottleneck_dim": 6}
DURATION = Duration(num_steps=8, steps_per_epoch=2, batch_size=3, part_size=3)


def tiny(
    network: dict[str, Any] = SWIN, *, seed: int = 0, crops: MultiCropConfig = CROPS, **fields: Any
) -> EsViT:
    config = EsViTConfig(**{**HEADS, "warmup_teacher_temperature_epochs": 3, **fields})
    method = build(config, crops, NetworkConfig(crop_ratio=1, **network), seed=seed).train()
    method.begin(DURATION)
    return method


def trained_apart(network: dict[str, Any] = SWIN, **fields: Any) -> EsViT:
    """In double precision; student, teacher and centres have left each other behind, as after many steps."""
    method = tiny(network, **fields).double()
    generator = torch.Generator().manual_seed(2)
    for name, value in method.state_dict().items():
        if value.is_floating_point() and not name.endswith(("running_mean", "running_var")):
            scale = 0.1 if "centre" in name or "gain" in name else 0.3
            value += scale * torch.randn(value.shape, generator=generator)
    return method


def images(crops: MultiCropConfig = CROPS, batch: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(batch, 3, size, size, generator=generator).double() for size in MultiCrop(crops).sizes]


def grads(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def score(head: Any, rows: Tensor) -> Tensor:
    """(..., K): a head's scores, by its equation."""
    prototypes = (
        head.prototypes.gain * head.prototypes.weight / head.prototypes.weight.norm(dim=1, keepdim=True)
    )
    return F.normalize(head.mlp(rows.flatten(0, -2)), dim=1).unflatten(0, rows.shape[:-1]) @ prototypes.T
