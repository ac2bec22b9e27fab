"""Small files of plain vision transformers in their official layouts, and their forward written out once more.

`vit_tokens` is the oracle: functional torch on the official names, with no module of timm's or ours.
"""

import tempfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdkit.models.backbone import Backbone
from fdkit.models.libraries import build_timm
from fdkit.teachers.checkpoint_file import load_file
from fdkit.teachers.official import LAYOUTS, Network, Reading
from fdkit.teachers.official._layout import state_in
from fdkit.teachers.request import Request
from tests.official_files import read

State = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]

TIMM = {
    "patch": "patch_embed.proj",
    "block": "blocks",
    "norm1": "norm1",
    "qkv": "attn.qkv",
    "proj": "attn.proj",
    "norm2": "norm2",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
    "norm": "norm",
}
"""What the parts of a block are called in timm, and so in most official files."""


def seeded(shapes: Shapes) -> State:
    """A value for every name, which depends on the name and the shape alone; norms near 1, matrices of unit gain."""
    return {name: _value(name, shape) for name, shape in shapes.items()}


def _value(name: str, shape: tuple[int, ...]) -> Tensor:
    normal = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    leaf = name.rpartition(".")[2]
    if leaf == "num_batches_tracked":
        return torch.tensor(7)
    if leaf in ("running_var", "gamma", "gamma_1", "gamma_2") or (leaf == "weight" and len(shape) == 1):
        return 1 + 0.1 * normal.abs()
    if len(shape) >= 2 and "token" not in leaf and "pos" not in leaf:
        return 1.5 * normal / torch.Size(shape[1:]).numel() ** 0.5
    return 0.3 * normal


def block_shapes(prefix: str, width: int, hidden: int, names: dict[str, str] = TIMM) -> Shapes:
    """One pre-norm block."""
    matrices = {
        "qkv": (3 * width, width),
        "proj": (width, width),
        "fc1": (hidden, width),
        "fc2": (width, hidden),
    }
    shapes: Shapes = {}
    for part, (rows, columns) in matrices.items():
        shapes[f"{prefix}{names[part]}.weight"] = (rows, columns)
        shapes[f"{prefix}{names[part]}.bias"] = (rows,)
    for part in ("norm1", "norm2"):
        shapes |= linear_shapes(f"{prefix}{names[part]}", width)
    return shapes


def linear_shapes(name: str, *shape: int) -> Shapes:
    """A weight and a bias."""
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def vit_shapes(
    width: int = 384,
    depth: int = 2,
    *,
    patch: int = 16,
    rows: int = 17,
    names: dict[str, str] = TIMM,
) -> Shapes:
    """Class token, positions, patch projection, blocks and final norm; `rows` positions, 4x4 patches and one more."""
    shapes: Shapes = {"cls_token": (1, 1, width), "pos_embed": (1, rows, width)}
    shapes |= linear_shapes(names["patch"], width, 3, patch, patch)
    for index in range(depth):
        shapes |= block_shapes(f"{names['block']}.{index}.", width, 4 * width, names)
    return shapes | linear_shapes(names["norm"], width)


def prefixed(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The same under longer names."""
    return {prefix + name: value for name, value in state.items()}


def fixed_table(side: int, width: int, axes: str, *, num_prefix: int = 1) -> Tensor:
    """Sines and cosines of row ("r") and column ("c") in the order of `axes`, zeros for prefix tokens."""
    frequency = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    place = {"r": torch.arange(side).repeat_interleave(side), "c": torch.arange(side).repeat(side)}
    angles = [place[axis][:, None].double() * frequency for axis in axes]
    table = torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)
    return torch.cat([torch.zeros(num_prefix, width), table.float()]).unsqueeze(0)


class Loaded(NamedTuple):
    """A file read, and its network."""

    reading: Reading
    backbone: Backbone

    def tokens(self, images: Tensor) -> Tensor:
        """All final tokens of images in [0, 1]."""
        with torch.no_grad():
            return self.backbone(images).all()


def load(content: Any, *, checkpoint_key: str | None = None, image_size: int | None = None) -> Loaded:
    """The content, written to a file and loaded from it: claimed by one layout alone, every tensor accounted for."""
    whole = state_in(content, source="x.pth", checkpoint_key=checkpoint_key)
    claims = [layout.title for layout in LAYOUTS if layout.prefix_in(whole, checkpoint_key) is not None]
    assert len(claims) == 1, claims
    reading = read(content, LAYOUTS, source="x.pth", checkpoint_key=checkpoint_key)
    assert reading is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pth"
        torch.save(content, path)
        request = Request(str(path), image_size=image_size, checkpoint_key=checkpoint_key)
        backbone = load_file(path, request).backbone
    norms = {module.eps for module in backbone.network.modules() if isinstance(module, nn.LayerNorm)}
    assert norms == {1e-5 if reading.layout == "dinov3" else 1e-6}
    return Loaded(reading, backbone.eval())


def build(network: Network) -> Backbone:
    """The network a layout names, with random weights."""
    return build_timm(network.architecture, {**network.assumed_args, **network.model_args})


def normalised(
    images: Tensor, mean: tuple = (0.485, 0.456, 0.406), std: tuple = (0.229, 0.224, 0.225)
) -> Tensor:
    """Images in [0, 1] with a mean taken off and divided by a deviation."""
    return (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def patches_of(state: State, images: Tensor, names: dict[str, str] = TIMM) -> Tensor:
    """(B, h*w, D) patch embeddings of normalised images."""
    weight = state[f"{names['patch']}.weight"]
    convolved = F.conv2d(images, weight, state[f"{names['patch']}.bias"], stride=weight.shape[-1])
    return convolved.flatten(2).transpose(1, 2)


def layer_norm(x: Tensor, state: State, name: str, eps: float = 1e-6) -> Tensor:
    """LayerNorm from the two tensors of a name."""
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def linear(x: Tensor, state: State, name: str) -> Tensor:
    """A linear map from the two tensors of a name."""
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def attend(qkv: Tensor, num_heads: int) -> Tensor:
    """(B, N, D) softmax attention of (B, N, 3 D) queries, keys and values."""
    query, key, value = qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    weights = (query @ key.mT / query.shape[-1] ** 0.5).softmax(dim=-1)
    return (weights @ value).transpose(1, 2).flatten(2)


def run_blocks(x: Tensor, state: State, num_heads: int, names: dict[str, str] = TIMM) -> Tensor:
    """Every pre-norm block in turn, with layer scale where there is one."""
    index = 0
    while f"{names['block']}.{index}.{names['norm1']}.weight" in state:
        at = f"{names['block']}.{index}."
        scales = [state.get(f"{at}gamma_{i}", state.get(f"{at}ls{i}.gamma", torch.ones(()))) for i in (1, 2)]
        qkv = linear(layer_norm(x, state, at + names["norm1"]), state, at + names["qkv"])
        x = x + scales[0] * linear(attend(qkv, num_heads), state, at + names["proj"])
        hidden = F.gelu(linear(layer_norm(x, state, at + names["norm2"]), state, at + names["fc1"]))
        x = x + scales[1] * linear(hidden, state, at + names["fc2"])
        index += 1
    return x


def vit_tokens(
    state: State,
    images: Tensor,
    num_heads: int,
    *,
    names: dict[str, str] = TIMM,
    positions: Tensor | None = None,
    norm: str | None = "norm",
) -> Tensor:
    """Final tokens of images in [0, 1]: class token and patches, positions for both, blocks, norm.

    positions: those of the state if None. norm: the name of the final norm in `names`, or itself; None for no norm.
    """
    patches = patches_of(state, normalised(images), names)
    x = torch.cat([state["cls_token"].expand(len(images), -1, -1), patches], dim=1)
    x = x + (state["pos_embed"] if positions is None else positions)
    x = run_blocks(x, state, num_heads, names)
    return x if norm is None else layer_norm(x, state, names.get(norm, norm))


def assert_holds_whole(content: Any, layout: str) -> Reading:
    """A file of real size, its large tensors without memory, has exactly the tensors of the network it is read as."""
    reading = read(content, LAYOUTS, source="x.pth")
    assert reading is not None
    assert reading.layout == layout
    with torch.device("meta"):
        own = build(reading.network).network.state_dict()
    assert {key: tuple(value.shape) for key, value in reading.state.items()} == {
        key: tuple(value.shape) for key, value in own.items()
    }
    return reading


def hollow(shapes: Shapes) -> State:
    """Tensors of these shapes without values, but for tables and tokens, and vectors, which are small."""
    return {
        name: torch.zeros(shape) if len(shape) < 2 or "pos" in name or "token" in name else _meta(shape)
        for name, shape in shapes.items()
    }


def _meta(shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, device="meta")


IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(5))
"""Two images of 4x4 patches of 16 pixels."""
LARGER_IMAGES = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(6))
"""Two of 6x6."""
