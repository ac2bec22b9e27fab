"""Swin layouts against a plain reading of the official forward: attention over the whole map, window by mask."""

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdkit.errors import ConfigError, WeightsError
from fdkit.models.libraries import build_timm
from fdkit.teachers.official.bias_tables import bicubic_bias
from tests import golden
from tests.official_files import Shapes, check_whole, filled, left_out, load, read_one, tokens, with_prefix

PATCH, SIDE, WIDTH = 2, 32, 8
DEPTHS, HEADS = (2, 3, 1), (1, 2, 4)
IMAGES = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
Sizes = tuple[int, int, int, tuple[int, ...], tuple[int, ...]]
SMALL: Sizes = (PATCH, SIDE, WIDTH, DEPTHS, HEADS)
TABLE, INDEX = "attn.relative_position_bias_table", "attn.relative_position_index"


def block_windows(window: int, block: int, side: int) -> tuple[int, int]:
    """Window and shift of a block: a map no larger than the window is one window, unshifted."""
    if side <= window:
        return side, 0
    return window, 0 if block % 2 == 0 else window // 2


def swin_shapes(window: int, sizes: Sizes = SMALL, *, version: int = 1, has_masks: bool = True) -> Shapes:
    """Names and shapes of the official network, buffers included; `has_masks` is false for EsViT."""
    patch, image, width, depths, heads = sizes
    shapes: Shapes = {"patch_embed.proj.weight": (width, 3, patch, patch), "patch_embed.proj.bias": (width,)}
    shapes |= norm("patch_embed.norm", width)
    for stage, depth in enumerate(depths):
        side, wide = image // patch // 2**stage, width * 2**stage
        for number in range(depth):
            size, shift = block_windows(window, number, side)
            block = {**block_shapes(wide, heads[stage], version), INDEX: (size**2, size**2)}
            block |= {TABLE: ((2 * size - 1) ** 2, heads[stage])} if version == 1 else {}
            if has_masks and shift:
                block["attn_mask"] = ((side // size) ** 2, size**2, size**2)
            shapes |= with_prefix(f"layers.{stage}.blocks.{number}.", block)
        if stage < len(depths) - 1:
            shapes[f"layers.{stage}.downsample.reduction.weight"] = (2 * wide, 4 * wide)
            shapes |= norm(f"layers.{stage}.downsample.norm", (4 if version == 1 else 2) * wide)
    return {**shapes, **norm("norm", width * 2 ** (len(depths) - 1))}


def block_shapes(width: int, heads: int, version: int) -> Shapes:
    block: Shapes = {**norm("norm1", width), **norm("norm2", width), "attn.qkv.weight": (3 * width, width)}
    block |= {"attn.proj.weight": (width, width), "attn.proj.bias": (width,)}
    block |= {"mlp.fc1.weight": (4 * width, width), "mlp.fc1.bias": (4 * width,)}
    block |= {"mlp.fc2.weight": (width, 4 * width), "mlp.fc2.bias": (width,)}
    if version == 1:
        return {**block, "attn.qkv.bias": (3 * width,)}
    block |= {"attn.q_bias": (width,), "attn.v_bias": (width,), "attn.logit_scale": (heads, 1, 1)}
    block |= {"attn.cpb_mlp.0.weight": (512, 2), "attn.cpb_mlp.0.bias": (512,)}
    return {**block, "attn.cpb_mlp.2.weight": (heads, 512)}


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def coordinates(window: int, pretrained: int = 0) -> Tensor:
    """(1, 2w - 1, 2w - 1, 2): Swin V2's log-spaced coordinates, in steps of the window it was pretrained with."""
    table = torch.zeros(1, 2 * window - 1, 2 * window - 1, 2)
    for i in range(2 * window - 1):
        for j in range(2 * window - 1):
            for axis, place in enumerate((i, j)):
                far = 8 * (place - window + 1) / ((pretrained or window) - 1)
                table[0, i, j, axis] = math.copysign(math.log2(abs(far) + 1) / math.log2(8), far)
    return table


def coordinate_buffers(window: int, sizes: Sizes, pretrained: tuple[int, ...] = ()) -> dict[str, Tensor]:
    patch, image, _, depths, _ = sizes
    made = {}
    for stage, depth in enumerate(depths):
        size, _ = block_windows(window, 0, image // patch // 2**stage)
        table = coordinates(size, pretrained[stage] if pretrained else 0)
        made |= {f"layers.{stage}.blocks.{n}.attn.relative_coords_table": table for n in range(depth)}
    return made


def pairs(side: int, window: int, shift: int) -> tuple[Tensor, Tensor, Tensor]:
    """For every two places of a map: whether they share a window, and rows and columns between them; each (N, N).

    A shifted window that wraps around the edge is cut there.
    """
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    shares = torch.ones(side * side, side * side, dtype=torch.bool)
    for place in (row.flatten(), column.flatten()):
        moved = (place - shift) % side
        for label in (moved // window, moved >= side - shift):
            shares &= label[:, None] == label[None]
    down, right = (place.flatten()[:, None] - place.flatten()[None] for place in (row, column))
    return shares, down, right


def bias_map(block: dict[str, Tensor], window: int, pretrained: int) -> Tensor:
    """(2w - 1, 2w - 1, heads): bias by rows and columns between query and key."""
    if TABLE in block:
        return block[TABLE].unflatten(0, (2 * window - 1, 2 * window - 1))
    hidden = F.linear(
        coordinates(window, pretrained)[0], block["attn.cpb_mlp.0.weight"], block["attn.cpb_mlp.0.bias"]
    )
    return 16 * torch.sigmoid(F.linear(hidden.relu(), block["attn.cpb_mlp.2.weight"]))


def attend(
    x: Tensor, block: dict[str, Tensor], heads: int, window: int, shift: int, pretrained: int
) -> Tensor:
    """Window attention of a map as tokens (B, N, C), as attention over the whole map with other windows masked."""
    side = math.isqrt(x.shape[1])
    shares, down, right = pairs(side, window, shift)
    biases = bias_map(block, window, pretrained)
    bias = biases[(down + window - 1).clamp(0, 2 * window - 2), (right + window - 1).clamp(0, 2 * window - 2)]
    mask = bias.permute(2, 0, 1).masked_fill(~shares, -math.inf)
    qkv_bias = block.get("attn.qkv.bias")
    if qkv_bias is None:
        qkv_bias = torch.cat([block["attn.q_bias"], torch.zeros(x.shape[-1]), block["attn.v_bias"]])
    qkv = F.linear(x, block["attn.qkv.weight"], qkv_bias).unflatten(-1, (3, heads, -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    if "attn.logit_scale" in block:
        sharpness = block["attn.logit_scale"].clamp(max=math.log(100)).exp()
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-1, -2) * sharpness
    else:
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    mixed = ((scores + mask).softmax(-1) @ v).transpose(1, 2).flatten(2)
    return F.linear(mixed, block["attn.proj.weight"], block["attn.proj.bias"])


def official_tokens(
    state: dict[str, Tensor],
    images: Tensor,
    window: int,
    *,
    heads: tuple[int, ...] = HEADS,
    eps: float = 1e-5,
    pretrained: tuple[int, ...] = (0, 0, 0),
    has_norm: bool = True,
) -> Tensor:
    """The official forward on official names, V1 or V2 as the tensors tell."""

    def layer_norm(x: Tensor, tensors: dict[str, Tensor], name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"], eps=eps)

    is_v2 = any("logit_scale" in key for key in state)
    x = F.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=PATCH)
    x = layer_norm(x.flatten(2).transpose(1, 2), state, "patch_embed.norm")
    for stage, num_heads in enumerate(heads):
        start = f"layers.{stage}.blocks."
        for number in range(len({k.split(".")[3] for k in state if k.startswith(start)})):
            prefix = f"{start}{number}."
            block = {
                key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)
            }
            side = math.isqrt(x.shape[1])
            attention = partial(attend, block=block, heads=num_heads, pretrained=pretrained[stage])
            size, shift = block_windows(window, number, side)

            def mlp(y: Tensor, block: dict[str, Tensor] = block) -> Tensor:
                hidden = F.gelu(F.linear(y, block["mlp.fc1.weight"], block["mlp.fc1.bias"]))
                return F.linear(hidden, block["mlp.fc2.weight"], block["mlp.fc2.bias"])

            if is_v2:
                x = x + layer_norm(attention(x, window=size, shift=shift), block, "norm1")
                x = x + layer_norm(mlp(x), block, "norm2")
            else:
                x = x + attention(layer_norm(x, block, "norm1"), window=size, shift=shift)
                x = x + mlp(layer_norm(x, block, "norm2"))
        down = f"layers.{stage}.downsample"
        if f"{down}.reduction.weight" in state:
            square = x.unflatten(1, (math.isqrt(x.shape[1]), -1))
            corners = [square[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
            merged = torch.cat(corners, dim=-1).flatten(1, 2)
            reduction = state[f"{down}.reduction.weight"]
            if is_v2:
                x = layer_norm(F.linear(merged, reduction), state, f"{down}.norm")
            else:
                x = F.linear(layer_norm(merged, state, f"{down}.norm"), reduction)
    return layer_norm(x, state, "norm") if has_norm else x


def strong(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights with position biases large enough to matter."""
    return {key: 15 * value if TABLE in key or "cpb_mlp" in key else value for key, value in state.items()}


def esvit_content(window: int) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """A whole EsViT checkpoint, and its teacher's and student's networks."""
    shapes = swin_shapes(window, has_masks=False)
    wide = WIDTH * 4
    heads: Shapes = {}
    for name in ("head", "head_dense"):
        heads |= {f"{name}.mlp.0.weight": (16, wide), f"{name}.mlp.0.bias": (16,)}
        heads |= {f"{name}.last_layer.weight_g": (12, 1), f"{name}.last_layer.weight_v": (12, 16)}
    teacher, student = (strong(filled({**shapes, **heads}, seed)) for seed in (1, 2))
    content = {
        "student": with_prefix("module.", student),
        "teacher": teacher,
        "optimizer": {"state": {}},
        "dino_loss": {"center": torch.zeros(1, 12), "center_grid": torch.zeros(1, 12)},
        "epoch": 300,
    }
    return content, teacher, student


@pytest.mark.parametrize("window", [4, 8])
def test_esvit_teacher_equals_the_official_forward(window: int) -> None:
    content, teacher, student = esvit_content(window)
    backbone, reading = load(content)
    found = tokens(backbone, IMAGES)
    assert reading.layout == "esvit"
    assert {"head", "head_dense"} < left_out(reading)
    assert found.shape == (2, 16, WIDTH * 4)
    expected = official_tokens(teacher, IMAGES, window, eps=1e-6)
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-5)
    assert (found - official_tokens(student, IMAGES, window, eps=1e-6)).abs().max() > 1e-2


def test_esvit_student_by_key() -> None:
    content, _, student = esvit_content(4)
    backbone, _ = load(content, "student")
    expected = official_tokens(student, IMAGES, 4, eps=1e-6)
    torch.testing.assert_close(tokens(backbone, IMAGES), expected, rtol=0, atol=5e-5)


def transposed_tables(state: dict[str, Tensor]) -> dict[str, Tensor]:
    sides = {key: math.isqrt(len(value)) for key, value in state.items() if key.endswith(TABLE)}
    turned = {
        key: state[key].unflatten(0, (side, side)).transpose(0, 1).flatten(0, 1)
        for key, side in sides.items()
    }
    return {**state, **turned}


@pytest.mark.parametrize("wrong", ["transposed tables", "no shift", "no norm", "merging by rows"])
def test_plausible_wrong_readings_differ(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content, teacher, _ = esvit_content(4)
    backbone, _ = load(content)
    if wrong == "no shift":
        monkeypatch.setattr(f"{__name__}.block_windows", lambda window, block, side: (min(window, side), 0))
    state = transposed_tables(teacher) if wrong == "transposed tables" else teacher
    if wrong == "merging by rows":
        name = "layers.0.downsample.reduction.weight"
        state = {**teacher, name: teacher[name].unflatten(1, (2, 2, -1)).transpose(1, 2).flatten(1)}
    other = official_tokens(state, IMAGES, 4, eps=1e-6, has_norm=wrong != "no norm")
    assert (tokens(backbone, IMAGES) - other).abs().max() > 1e-2


def test_norms_are_esvits_own_and_not_those_of_its_copy_elsewhere() -> None:
    esvit, _ = load(esvit_content(4)[0])
    swin, _ = load({"model": swin_state()})
    for backbone, eps in ((esvit, 1e-6), (swin, 1e-5)):
        norms = [module.eps for module in backbone.network.modules() if isinstance(module, nn.LayerNorm)]
        assert set(norms) == {eps}
        assert len(norms) == 2 * sum(DEPTHS) + 4
    faint = IMAGES * 1e-2
    _, teacher, _ = esvit_content(4)
    teacher["patch_embed.proj.bias"] *= 1e-3
    found = tokens(load({"teacher": teacher})[0], faint)
    torch.testing.assert_close(found, official_tokens(teacher, faint, 4, eps=1e-6), rtol=0, atol=5e-5)
    assert (found - official_tokens(teacher, faint, 4, eps=1e-5)).abs().max() > 1e-2


def swin_state(window: int = 4) -> dict[str, Tensor]:
    return strong(filled({**swin_shapes(window), "head.weight": (10, WIDTH * 4), "head.bias": (10,)}))


def test_swin_equals_the_official_forward() -> None:
    state = swin_state()
    backbone, reading = load({"model": state, "max_accuracy": 81.2, "epoch": 299})
    assert reading.layout == "swin"
    assert reading.network.model_args["img_size"] == SIDE
    assert reading.network.assumption == ""
    torch.testing.assert_close(tokens(backbone, IMAGES), official_tokens(state, IMAGES, 4), rtol=0, atol=5e-5)


def test_downsampling_goes_to_the_stage_it_leads_to() -> None:
    state = swin_state()
    reading = read_one({"model": state})
    name = "downsample.reduction.weight"
    assert f"layers.0.{name}" not in reading.state
    assert torch.equal(reading.state[f"layers.2.{name}"], state[f"layers.1.{name}"])
    assert any(c.key == f"layers.0.{name}" and c.became == f"layers.1.{name}" for c in reading.audit)


def test_a_swin_without_masks_is_assumed_to_end_in_one_window() -> None:
    state = {key: value for key, value in swin_state(8).items() if not key.endswith("attn_mask")}
    network = read_one({"model": state}).network
    assert (network.model_args["img_size"], network.model_args["window_size"]) == (SIDE, 8)
    assert "last stage is one window" in network.assumption


def test_masks_show_an_image_larger_than_the_last_window() -> None:
    sizes: Sizes = (PATCH, 64, WIDTH, DEPTHS, HEADS)
    state = filled({**swin_shapes(4, sizes), "head.weight": (10, WIDTH * 4), "head.bias": (10,)})
    backbone, reading = load({"model": state})
    assert reading.network.model_args["img_size"] == 64
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(tokens(backbone, images), official_tokens(state, images, 4), rtol=0, atol=5e-5)


def test_swin_at_another_size_keeps_its_window_or_lets_it_grow() -> None:
    reading = read_one({"model": swin_state()})
    at_size = reading.network.at_size
    assert at_size is not None
    assert at_size(SIDE) == {}
    assert at_size(64) == {"window_size": 4}
    assert at_size(48) == {"window_size": 6}
    for size in (36, 34):
        with pytest.raises(ConfigError, match=f"image size {size}"):
            at_size(size)
    args = {**reading.network.model_args, **at_size(48), "img_size": 48}
    network = build_timm(reading.network.architecture, args).network
    state = {
        key: bicubic_bias(value, (4, 4), (6, 6)) if key.endswith(TABLE) else value
        for key, value in reading.state.items()
    }
    network.load_state_dict(state, strict=True)


@pytest.mark.parametrize(("old", "new"), [(7, 12), (7, 14), (14, 7)])
def test_tables_are_resampled_as_swin_does(old: int, new: int) -> None:
    table = golden.weight("table", ((2 * old - 1) ** 2, 3), 1)
    found = bicubic_bias(table, (old, old), (new, new))
    image = table.T.reshape(1, 3, 2 * old - 1, 2 * old - 1)
    official = F.interpolate(image, size=(2 * new - 1, 2 * new - 1), mode="bicubic")
    assert torch.equal(found, official.reshape(3, -1).T)
    crossed = bicubic_bias(image.transpose(2, 3).reshape(3, -1).T, (old, old), (new, new))
    assert (found - crossed).abs().max() > 1e-2


def test_esvit_takes_no_size_but_its_own() -> None:
    network = read_one(esvit_content(4)[0]).network
    assert network.at_size is not None
    assert network.at_size(SIDE) == {}
    with pytest.raises(
        ConfigError, match="image size 64: timm's Swin computes what EsViT's does at 32 pixels alone"
    ):
        network.at_size(64)
    assert network.resample_bias is None


def v2_state(window: int, pretrained: tuple[int, ...] = (), network: str = "cpb_mlp") -> dict[str, Tensor]:
    state = strong(filled(swin_shapes(window, version=2)))
    state = {**state, **coordinate_buffers(window, SMALL, pretrained)}
    return {key.replace("cpb_mlp", network): value for key, value in state.items()}


@pytest.mark.parametrize(("window", "pretrained"), [(4, ()), (8, (4, 4, 2))])
def test_swin_v2_equals_the_official_forward(window: int, pretrained: tuple[int, ...]) -> None:
    state = v2_state(window, pretrained)
    head = filled({"head.weight": (10, WIDTH * 4), "head.bias": (10,)})
    backbone, reading = load({"model": {**state, **head}})
    assert reading.layout == "swinv2"
    assert reading.network.model_args["pretrained_window_sizes"] == list(pretrained or (0, 0, 0))
    expected = official_tokens(state, IMAGES, window, pretrained=pretrained or (0, 0, 0))
    torch.testing.assert_close(tokens(backbone, IMAGES), expected, rtol=0, atol=5e-5)
    if pretrained:
        assert (expected - official_tokens(state, IMAGES, window)).abs().max() > 1e-2


@pytest.mark.parametrize("is_distilled", [True, False])
def test_feature_distillation_swin_equals_the_official_forward(is_distilled: bool) -> None:
    student = v2_state(8, network="rpe_mlp")
    beside = {"decoder.0.weight": (8, WIDTH * 4, 1), "feature_model.norm.weight": (8,)}
    head = {"head.weight": (10, WIDTH * 4), "head.bias": (10,)}
    content = (
        with_prefix("encoder.", student) | filled(beside) if is_distilled else {**student, **filled(head)}
    )
    backbone, reading = load({"model": content})
    assert reading.layout == "fd_swin"
    official = {key.replace("rpe_mlp", "cpb_mlp"): value for key, value in student.items()}
    expected = official_tokens(official, IMAGES, 8)
    torch.testing.assert_close(tokens(backbone, IMAGES), expected, rtol=0, atol=5e-5)


def test_swin_v2_keeps_its_coordinates_when_its_window_grows() -> None:
    network = read_one({"model": v2_state(8)}).network
    assert network.at_size is not None
    assert network.at_size(48) == {"window_size": 12, "pretrained_window_sizes": [8, 8, 4]}


def test_swin_v2_with_other_coordinates_or_without_windows_is_refused() -> None:
    state = v2_state(4)
    linear = torch.linspace(-1, 1, 7).view(1, 7, 1, 1).expand(1, 7, 7, 2)
    with pytest.raises(WeightsError, match="other coordinates"):
        read_one({"model": {**state, "layers.0.blocks.0.attn.relative_coords_table": linear}})
    with pytest.raises(WeightsError, match="does not show its windows"):
        read_one({"model": {key: value for key, value in state.items() if not key.endswith(INDEX)}})


@pytest.mark.parametrize(
    ("width", "depths", "heads", "window"),
    [
        (96, (2, 2, 6, 2), (3, 6, 12, 24), 7),
        (96, (2, 2, 18, 2), (3, 6, 12, 24), 14),
        (128, (2, 2, 18, 2), (4, 8, 16, 32), 7),
        (128, (2, 2, 18, 2), (4, 8, 16, 32), 14),
    ],
)
def test_real_esvit_files_are_whole(
    width: int, depths: tuple[int, ...], heads: tuple[int, ...], window: int
) -> None:
    shapes = swin_shapes(window, (4, 224, width, depths, heads), has_masks=False)
    head: Shapes = {"head.mlp.0.weight": (2048, width * 8), "head.last_layer.weight_g": (65536, 1)}
    network = check_whole({**shapes, **head, **{f"head_dense{key[4:]}": head[key] for key in head}}).network
    args = network.model_args
    assert (args["img_size"], args["window_size"], args["embed_dim"]) == (224, window, width)
    assert (tuple(args["depths"]), tuple(args["num_heads"])) == (depths, heads)
    last = shapes[f"layers.3.blocks.0.{TABLE}"][0]
    assert last == 169, "the last stage's window is its 7x7 map, also with windows of 14"


def test_real_swin_and_student_files_are_whole() -> None:
    base: Sizes = (4, 224, 128, (2, 2, 18, 2), (4, 8, 16, 32))
    head: Shapes = {"head.weight": (1000, 1024), "head.bias": (1000,)}
    large: Sizes = (4, 384, *base[2:])
    assert check_whole({**swin_shapes(12, large), **head}).network.model_args["img_size"] == 384
    student = {
        key.replace("cpb_mlp", "rpe_mlp"): shape for key, shape in swin_shapes(14, base, version=2).items()
    }
    values = with_prefix("encoder.", coordinate_buffers(14, base))
    reading = check_whole(with_prefix("encoder.", student), values)
    assert reading.network.model_args["window_size"] == 14
    v2: Sizes = (4, 384, *base[2:])
    values = coordinate_buffers(24, v2, (12, 12, 12, 6))
    args = check_whole({**swin_shapes(24, v2, version=2), **head}, values).network.model_args
    assert args["pretrained_window_sizes"] == [12, 12, 12, 6]
    assert args["img_size"] == 384
