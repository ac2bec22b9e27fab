"""Vision transformers in the names of transformers, and a plain re-writing of its forward."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


def seeded(shapes: Shapes, *, seed: int = 0) -> State:
    generator = torch.Generator().manual_seed(seed)

    def values(key: str, shape: tuple[int, ...]) -> Tensor:
        is_norm = "norm" in key and key.endswith("weight")
        scale = 1 / math.sqrt(shape[-1]) if len(shape) == 2 and "position" not in key else 0.2
        return is_norm + scale * torch.randn(shape, generator=generator)

    return {key: values(key, shape) for key, shape in shapes.items()}


def linear_shapes(name: str, out: int, into: int, *, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (out, into)} | ({f"{name}.bias": (out,)} if bias else {})


def norm_shapes(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def bert_shapes(
    kind: str,
    width: int,
    depth: int,
    patch: int,
    grid: int,
    hidden: int,
    *,
    prefix: str = "",
    num_registers: int = 0,
) -> Shapes:
    """Names and shapes of ViT, MAE, DeiT (kind vit, deit) and DINOv2 (dinov2, dinov2_swiglu)."""
    num_prefix = 2 if kind == "deit" else 1
    shapes: Shapes = {
        "embeddings.cls_token": (1, 1, width),
        "embeddings.position_embeddings": (1, grid * grid + num_prefix, width),
        "embeddings.patch_embeddings.projection.weight": (width, 3, patch, patch),
        "embeddings.patch_embeddings.projection.bias": (width,),
        **norm_shapes("layernorm", width),
    }
    shapes |= {"embeddings.distillation_token": (1, 1, width)} if kind == "deit" else {}
    shapes |= {"embeddings.register_tokens": (1, num_registers, width)} if num_registers else {}
    shapes |= {"embeddings.mask_token": (1, width)} if kind.startswith("dinov2") else {}
    for block in range(depth):
        name = f"encoder.layer.{block}"
        for part in ("query", "key", "value"):
            shapes |= linear_shapes(f"{name}.attention.attention.{part}", width, width)
        shapes |= linear_shapes(f"{name}.attention.output.dense", width, width)
        if not kind.startswith("dinov2"):
            shapes |= norm_shapes(f"{name}.layernorm_before", width) | norm_shapes(
                f"{name}.layernorm_after", width
            )
            shapes |= linear_shapes(f"{name}.intermediate.dense", hidden, width)
            shapes |= linear_shapes(f"{name}.output.dense", width, hidden)
            continue
        shapes |= norm_shapes(f"{name}.norm1", width) | norm_shapes(f"{name}.norm2", width)
        shapes |= {f"{name}.layer_scale{half}.lambda1": (width,) for half in (1, 2)}
        is_gated = kind == "dinov2_swiglu"
        first, second = ("weights_in", "weights_out") if is_gated else ("fc1", "fc2")
        shapes |= linear_shapes(f"{name}.mlp.{first}", hidden * (2 if is_gated else 1), width)
        shapes |= linear_shapes(f"{name}.mlp.{second}", width, hidden)
    return {prefix + key: shape for key, shape in shapes.items()}


def tower_shapes(kind: str, width: int, depth: int, patch: int, grid: int, hidden: int) -> Shapes:
    """Names and shapes of the image towers of CLIP and SigLIP, with what stands beside them."""
    shapes: Shapes = {"embeddings.position_embedding.weight": (grid * grid + (kind == "clip"), width)}
    shapes |= {
        "embeddings.patch_embedding.weight": (width, 3, patch, patch),
        **norm_shapes("post_layernorm", width),
    }
    if kind == "clip":
        shapes |= {"embeddings.class_embedding": (width,), **norm_shapes("pre_layrnorm", width)}
    else:
        shapes |= {"embeddings.patch_embedding.bias": (width,), "head.probe": (1, 1, width)}
        shapes |= {
            "head.attention.in_proj_weight": (3 * width, width),
            "head.mlp.fc1.weight": (hidden, width),
        }
    for block in range(depth):
        name = f"encoder.layers.{block}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= linear_shapes(f"{name}.self_attn.{part}", width, width)
        shapes |= norm_shapes(f"{name}.layer_norm1", width) | norm_shapes(f"{name}.layer_norm2", width)
        shapes |= linear_shapes(f"{name}.mlp.fc1", hidden, width) | linear_shapes(
            f"{name}.mlp.fc2", width, hidden
        )
    beside = {
        "text_model.embeddings.position_ids": (1, 6),
        "text_model.encoder.layers.0.mlp.fc1.weight": (4, 4),
    }
    beside |= {"logit_scale": (), "visual_projection.weight": (4, width), "text_projection.weight": (4, 4)}
    return {f"vision_model.{key}": shape for key, shape in shapes.items()} | beside


def dinov3_shapes(width: int, depth: int, hidden: int, *, is_gated: bool, num_registers: int = 4) -> Shapes:
    shapes: Shapes = {
        "embeddings.cls_token": (1, 1, width),
        "embeddings.mask_token": (1, 1, width),
        "embeddings.register_tokens": (1, num_registers, width),
        "embeddings.patch_embeddings.weight": (width, 3, 16, 16),
        "embeddings.patch_embeddings.bias": (width,),
        **norm_shapes("norm", width),
    }
    for block in range(depth):
        name = f"layer.{block}"
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes |= linear_shapes(f"{name}.attention.{part}", width, width, bias=part != "k_proj")
        shapes |= norm_shapes(f"{name}.norm1", width) | norm_shapes(f"{name}.norm2", width)
        shapes |= {f"{name}.layer_scale{half}.lambda1": (width,) for half in (1, 2)}
        for part in ("gate_proj", "up_proj") if is_gated else ("up_proj",):
            shapes |= linear_shapes(f"{name}.mlp.{part}", hidden, width)
        shapes |= linear_shapes(f"{name}.mlp.down_proj", width, hidden)
    return shapes


def linear(state: State, name: str, x: Tensor) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def norm(state: State, name: str, x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def attend(
    state: State,
    names: tuple[str, str, str],
    x: Tensor,
    heads: int,
    rotate: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    query, key, value = (linear(state, name, x).unflatten(-1, (heads, -1)).transpose(1, 2) for name in names)
    if rotate is not None:
        query, key = rotate(query), rotate(key)
    weights = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1)
    return (weights @ value).transpose(1, 2).flatten(2)


def bert_tokens(state: State, images: Tensor, *, heads: int, eps: float, act: str = "gelu") -> Tensor:
    """last_hidden_state of ViT, MAE (nothing masked), DeiT and DINOv2."""
    kernel = state["embeddings.patch_embeddings.projection.weight"]
    bias = state["embeddings.patch_embeddings.projection.bias"]
    patches = F.conv2d(images, kernel, bias, stride=kernel.shape[-1]).flatten(2).transpose(1, 2)
    names = ("embeddings.cls_token", "embeddings.distillation_token")
    prefix = [state[name].expand(len(images), -1, -1) for name in names if name in state]
    x = torch.cat([*prefix, patches], dim=1) + state["embeddings.position_embeddings"]
    if (registers := state.get("embeddings.register_tokens")) is not None:
        x = torch.cat([x[:, :1], registers.expand(len(images), -1, -1), x[:, 1:]], dim=1)
    for block in range(2):
        name = f"encoder.layer.{block}"
        is_dinov2 = f"{name}.norm1.weight" in state
        first, second = ("norm1", "norm2") if is_dinov2 else ("layernorm_before", "layernorm_after")
        names = tuple(f"{name}.attention.attention.{part}" for part in ("query", "key", "value"))
        attended = attend(state, names, norm(state, f"{name}.{first}", x, eps), heads)
        attended = linear(state, f"{name}.attention.output.dense", attended)
        x = x + attended * state.get(f"{name}.layer_scale1.lambda1", torch.ones(1))
        y = norm(state, f"{name}.{second}", x, eps)
        if f"{name}.mlp.weights_in.weight" in state:
            gate, value = linear(state, f"{name}.mlp.weights_in", y).chunk(2, dim=-1)
            y = linear(state, f"{name}.mlp.weights_out", F.silu(gate) * value)
        elif is_dinov2:
            y = linear(state, f"{name}.mlp.fc2", ACTIVATIONS[act](linear(state, f"{name}.mlp.fc1", y)))
        else:
            y = ACTIVATIONS[act](linear(state, f"{name}.intermediate.dense", y))
            y = linear(state, f"{name}.output.dense", y)
        x = x + y * state.get(f"{name}.layer_scale2.lambda1", torch.ones(1))
    return norm(state, "layernorm", x, eps)


def tower_tokens(state: State, images: Tensor, *, heads: int, eps: float, act: str) -> Tensor:
    """post_layernorm on every token of CLIP's and SigLIP's image tower."""
    state = {key.removeprefix("vision_model."): value for key, value in state.items()}
    kernel = state["embeddings.patch_embedding.weight"]
    x = F.conv2d(images, kernel, state.get("embeddings.patch_embedding.bias"), stride=kernel.shape[-1])
    x = x.flatten(2).transpose(1, 2)
    if (token := state.get("embeddings.class_embedding")) is not None:
        x = torch.cat([token.expand(len(images), 1, -1), x], dim=1)
    x = x + state["embeddings.position_embedding.weight"]
    if "pre_layrnorm.weight" in state:
        x = norm(state, "pre_layrnorm", x, eps)
    for block in range(2):
        name = f"encoder.layers.{block}"
        names = tuple(f"{name}.self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj"))
        attended = attend(state, names, norm(state, f"{name}.layer_norm1", x, eps), heads)
        x = x + linear(state, f"{name}.self_attn.out_proj", attended)
        y = ACTIVATIONS[act](linear(state, f"{name}.mlp.fc1", norm(state, f"{name}.layer_norm2", x, eps)))
        x = x + linear(state, f"{name}.mlp.fc2", y)
    return norm(state, "post_layernorm", x, eps)


def dinov3_tokens(state: State, images: Tensor, *, heads: int, theta: float = 100.0) -> Tensor:
    rows, columns = images.shape[-2] // 16, images.shape[-1] // 16
    kernel, bias = (state[f"embeddings.patch_embeddings.{leaf}"] for leaf in ("weight", "bias"))
    patches = F.conv2d(images, kernel, bias, stride=16).flatten(2).transpose(1, 2)
    prefix = [
        state[f"embeddings.{name}"].expand(len(images), -1, -1) for name in ("cls_token", "register_tokens")
    ]
    x = torch.cat([*prefix, patches], dim=1)
    num_prefix = x.shape[1] - rows * columns
    head_dim = x.shape[-1] // heads
    frequencies = 1 / theta ** torch.arange(0, 1, 4 / head_dim)
    centres = [(2 * (torch.arange(count) + 0.5) / count - 1) for count in (rows, columns)]
    places = torch.stack(torch.meshgrid(*centres, indexing="ij"), dim=-1).flatten(0, 1)
    angles = (2 * math.pi * places[:, :, None] * frequencies).flatten(1).tile(2)

    def rotate(y: Tensor) -> Tensor:
        first, patch = y[:, :, :num_prefix], y[:, :, num_prefix:]
        low, high = patch.chunk(2, dim=-1)
        turned = patch * angles.cos() + torch.cat([-high, low], dim=-1) * angles.sin()
        return torch.cat([first, turned], dim=2)

    for block in range(2):
        name = f"layer.{block}"
        names = tuple(f"{name}.attention.{part}" for part in ("q_proj", "k_proj", "v_proj"))
        attended = attend(state, names, norm(state, f"{name}.norm1", x, 1e-5), heads, rotate)
        x = x + linear(state, f"{name}.attention.o_proj", attended) * state[f"{name}.layer_scale1.lambda1"]
        y = norm(state, f"{name}.norm2", x, 1e-5)
        hidden = linear(state, f"{name}.mlp.up_proj", y)
        if f"{name}.mlp.gate_proj.weight" in state:
            hidden = F.silu(linear(state, f"{name}.mlp.gate_proj", y)) * hidden
        else:
            hidden = F.gelu(hidden)
        x = x + linear(state, f"{name}.mlp.down_proj", hidden) * state[f"{name}.layer_scale2.lambda1"]
    return norm(state, "norm", x, 1e-5)
