"""A teacher in eight-bit floating point, admitted only if it says what it said before.

The linear maps inside its blocks multiply in float8 (e4m3), activations scaled by row as they come, weights by row
once; everything else stays in bfloat16. torchao does it, on GPUs that compute in float8 (compute capability 8.9 and
later). Only a frozen network is treated so: the student's arithmetic is untouched.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdkit.errors import ConfigError, NumericsError, ResourceError
from fdkit.teachers.teacher import Teacher

LEAST_COSINE = 0.999
"""Between what is said in float8 and in bfloat16, as the student is taught it: every token whitened."""
FIRST_CAPABILITY = (8, 9)
"""CUDA compute capability with products in float8: Ada; Hopper is 9.0."""
MULTIPLE = 16
"""Rows and columns of a float8 product come in sixteens."""


def require_float8(device: torch.device) -> None:
    """Raises ConfigError without torchao, ResourceError where the device does not compute in float8."""
    if find_spec("torchao") is None:
        raise ConfigError(
            "teacher_precision fp8 needs torchao, which is not installed",
            "pip install 'fdkit[fp8]', or use --teacher-precision bf16",
        )
    if device.type != "cuda":
        raise ResourceError(
            f"teacher_precision fp8: {device} does not multiply in float8", "use --teacher-precision bf16"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < FIRST_CAPABILITY:
        name, version = torch.cuda.get_device_name(device), ".".join(map(str, capability))
        raise ResourceError(
            f"teacher_precision fp8: {name} (compute capability {version}) does not multiply in float8; "
            f"{'.'.join(map(str, FIRST_CAPABILITY))} and later do",
            "use --teacher-precision bf16",
        )


def float8_layers(network: nn.Module) -> dict[str, nn.Linear]:
    """The linear maps that are multiplied in float8, by name: those of the blocks whose sides divide by 16."""
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear)
        and any(part.isdigit() for part in name.split("."))
        and module.in_features % MULTIPLE == 0
        and module.out_features % MULTIPLE == 0
    }


@torch.no_grad()
def quantise_checked(teacher: Teacher, images: Tensor) -> dict[str, Any]:
    """Turn a bfloat16 teacher on a GPU to float8, in place, if its tokens stay the same; what was found.

    images: (B, 3, H, W) in [0, 1], the kind it will be shown. The cosine is the mean over whitened tokens, of which
    each has mean 0 and length sqrt(C), between before and after.
    Raises NumericsError for a cosine below LEAST_COSINE, ConfigError for a network without such layers.
    """
    layers = float8_layers(teacher.backbone.network)
    if not layers:
        raise ConfigError(
            f"teacher_precision fp8: {teacher.name} has no linear maps in blocks whose sides divide by {MULTIPLE}",
            "use --teacher-precision bf16",
        )
    before = whitened_tokens(teacher, images)
    quantise(teacher.backbone.network, layers)
    after = whitened_tokens(teacher, images)
    cosine = float(F.cosine_similarity(before, after, dim=-1).mean())
    if not cosine >= LEAST_COSINE:
        raise NumericsError(
            f"teacher_precision fp8: what {teacher.name} says in float8 has a cosine of {cosine:.4f} to what it says "
            f"in bfloat16, below {LEAST_COSINE}, on {len(images)} images",
            "use --teacher-precision bf16: this teacher's activations are too uneven for float8",
        )
    return {"cosine": cosine, "num_images": len(images), "num_layers": len(layers)}


def quantise(network: nn.Module, layers: dict[str, nn.Linear]) -> None:
    """Have torchao turn these linear maps of a network to float8, scaled by row."""
    torchao: Any = import_module("torchao.quantization")
    config = torchao.Float8DynamicActivationFloat8WeightConfig(granularity=torchao.PerRow())
    torchao.quantize_(network, config, filter_fn=lambda module, name: name in layers)


def whitened_tokens(teacher: Teacher, images: Tensor) -> Tensor:
    """(T, C) float32: all tokens of all images, each by itself to mean 0 and variance 1."""
    tokens = teacher.encode(images).all().float()
    return F.layer_norm(tokens, tokens.shape[-1:]).flatten(0, 1)
