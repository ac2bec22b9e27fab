"""BEiT's layouts against a plain reading of the official forward, and its bias tables at other sizes."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.interpolate import RectBivariateSpline
from torch import Tensor

from fdkit.errors import WeightsError
from fdkit.teachers.official.bias_tables import bicubic_bias, geometric_bias, window_of
from tests import golden
from tests.official_files import Shapes, check_whole, filled, left_out, load, read_one, tokens, with_prefix

PATCH, GRID, WIDTH, HEADS, DEPTH = 4, 5, 24, 3, 2
IMAGES = torch.randn(2, 3, PATCH * GRID, PATCH * GRID, generator=torch.Generator().manual_seed(0))
TABLE = "relative_position_bias_table"


def beit_shapes(
    tables: str = "shared",
    *,
    sizes: tuple[int, int, int, int, int] = (PATCH, GRID, WIDTH, HEADS, DEPTH),
    has_scale: bool = True,
) -> Shapes:
    """Names and shapes of the official transformer: `tables` is shared, own (one a block) or none (positions)."""
    patch, grid, width, heads, depth = sizes
    table, index = ((2 * grid - 1) ** 2 + 3, heads), (grid * grid + 1,) * 2
    shapes: Shapes = {"cls_token": (1, 1, width), "patch_embed.proj.weight": (width, 3, patch, patch)}
    shapes["patch_embed.proj.bias"] = (width,)
    if tables == "shared":
        shapes |= {f"rel_pos_bias.{TABLE}": table, "rel_pos_bias.relative_position_index": index}
    elif tables == "none":
        shapes["pos_embed"] = (1, grid * grid + 1, width)
    block: Shapes = {"attn.qkv.weight": (3 * width, width), "attn.proj.weight": (width, width)}
    block |= {f"attn.{name}": (width,) for name in ("q_bias", "v_bias", "proj.bias")}
    block |= {f"{norm}.{leaf}": (width,) for norm in ("norm1", "norm2") for leaf in ("weight", "bias")}
    block |= {"mlp.fc1.weight": (4 * width, width), "mlp.fc1.bias": (4 * width,)}
    block |= {"mlp.fc2.weight": (width, 4 * width), "mlp.fc2.bias": (width,)}
    block |= {"gamma_1": (width,), "gamma_2": (width,)} if has_scale else {}
    block |= {f"attn.{TABLE}": table, "attn.relative_position_index": index} if tables == "own" else {}
    for number in range(depth):
        shapes |= with_prefix(f"blocks.{number}.", block)
    return shapes


def norm_shapes(name: str, width: int = WIDTH) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def linear_shapes(name: str, out: int, width: int = WIDTH) -> Shapes:
    return {f"{name}.weight": (out, width), f"{name}.bias": (out,)}


def layer_norm(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-6)


def bias_of(table: Tensor, grid: int) -> Tensor:
    """(heads, 1 + N, 1 + N), entry by entry: rows of the table by the query's place minus the key's."""
    places = [(row, column) for row in range(grid) for column in range(grid)]
    bias = torch.zeros(table.shape[1], len(places) + 1, len(places) + 1)
    for q, (row, column) in enumerate(places, start=1):
        for k, (other_row, other_column) in enumerate(places, start=1):
            down, right = row - other_row + grid - 1, column - other_column + grid - 1
            bias[:, q, k] = table[down * (2 * grid - 1) + right]
    bias[:, 0, 1:] = table[-3].unsqueeze(1)
    bias[:, 1:, 0] = table[-2].unsqueeze(1)
    bias[:, 0, 0] = table[-1]
    return bias


def official_tokens(state: dict[str, Tensor], images: Tensor, heads: int, norm: str = "norm") -> Tensor:
    """The official forward on official names, with `norm` on every token."""
    patches = F.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=PATCH)
    grid = patches.shape[-1]
    x = torch.cat([state["cls_token"].expand(len(images), -1, -1), patches.flatten(2).transpose(1, 2)], dim=1)
    x = x + state.get("pos_embed", torch.zeros(1))
    depth = len([key for key in state if key.endswith("attn.qkv.weight") and key.startswith("blocks.")])
    for i in range(depth):
        block = {k.removeprefix(f"blocks.{i}."): v for k, v in state.items() if k.startswith(f"blocks.{i}.")}
        table = state.get(f"rel_pos_bias.{TABLE}", block.get(f"attn.{TABLE}"))
        q_bias, v_bias = block["attn.q_bias"], block["attn.v_bias"]
        qkv_bias = torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])
        qkv = F.linear(layer_norm(x, block, "norm1"), block["attn.qkv.weight"], qkv_bias)
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        attended = (scores if table is None else scores + bias_of(table, grid)).softmax(-1) @ v
        attended = F.linear(
            attended.transpose(1, 2).flatten(2), block["attn.proj.weight"], block["attn.proj.bias"]
        )
        x = x + block.get("gamma_1", torch.ones(1)) * attended
        hidden = F.gelu(
            F.linear(layer_norm(x, block, "norm2"), block["mlp.fc1.weight"], block["mlp.fc1.bias"])
        )
        mixed = F.linear(hidden, block["mlp.fc2.weight"], block["mlp.fc2.bias"])
        x = x + block.get("gamma_2", torch.ones(1)) * mixed
    return layer_norm(x, state, norm) if norm else x


def strong(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights with biases, positions and LayerScale large enough to matter."""
    grown = {key: 20 * value if TABLE in key or "pos_embed" in key else value for key, value in state.items()}
    return {key: value + 1 if "gamma" in key else value for key, value in grown.items()}


def fd_content() -> tuple[dict[str, object], dict[str, Tensor]]:
    """A whole Feature-Distillation checkpoint, and its student's tensors."""
    student = strong(filled({**beit_shapes(), **norm_shapes("norm")}))
    beside = filled(
        {"decoder.0.weight": (32, WIDTH, 1), "decoder.0.bias": (32,), "feature_model.norm.weight": (32,)}
    )
    return {
        "model": with_prefix("encoder.", student) | beside,
        "optimizer": {"state": {}},
        "epoch": 3,
    }, student


def test_feature_distillation_student_equals_the_official_forward() -> None:
    content, student = fd_content()
    backbone, reading = load(content)
    found = tokens(backbone, IMAGES)
    assert reading.layout == "fd_vit"
    assert left_out(reading) == {"encoder", "decoder", "feature_model"}
    assert found.shape == (2, 1 + GRID * GRID, WIDTH)
    torch.testing.assert_close(found, official_tokens(student, IMAGES, HEADS), rtol=0, atol=2e-5)


@pytest.mark.parametrize("wrong", ["transposed table", "no table", "no norm", "one head", "no class rows"])
def test_plausible_wrong_students_differ(wrong: str) -> None:
    content, student = fd_content()
    backbone, _ = load(content)
    key = f"rel_pos_bias.{TABLE}"
    table = student[key]
    offsets = table[:-3].unflatten(0, (2 * GRID - 1, 2 * GRID - 1))
    changed = {
        "transposed table": {key: torch.cat([offsets.transpose(0, 1).flatten(0, 1), table[-3:]])},
        "no table": {key: torch.zeros_like(table)},
        "no class rows": {key: torch.cat([table[:-3], torch.zeros(3, HEADS)])},
    }.get(wrong, {})
    heads = 1 if wrong == "one head" else HEADS
    if wrong == "one head":
        changed = {key: table[:, :1]}
    other = official_tokens({**student, **changed}, IMAGES, heads, "" if wrong == "no norm" else "norm")
    assert (tokens(backbone, IMAGES) - other).abs().max() > 1e-2


@pytest.mark.parametrize("has_scale", [True, False])
def test_finetuned_file_norms_every_token_with_the_norm_after_pooling(has_scale: bool) -> None:
    shapes = {
        **beit_shapes("own", has_scale=has_scale),
        **norm_shapes("fc_norm"),
        **linear_shapes("head", 10),
    }
    state = strong(filled(shapes))
    backbone, reading = load({"model": state})
    assert reading.layout == "beit_finetuned"
    assert "BEiT v1" in reading.network.assumption
    expected = official_tokens(state, IMAGES, HEADS, "fc_norm")
    torch.testing.assert_close(tokens(backbone, IMAGES), expected, rtol=0, atol=2e-5)
    shared = {**state, **{k: state[f"blocks.0.attn.{TABLE}"] for k in state if k.endswith(TABLE)}}
    assert (expected - official_tokens(shared, IMAGES, HEADS, "fc_norm")).abs().max() > 1e-2


def test_finetuned_file_without_pooling_keeps_its_norm() -> None:
    state = strong(filled({**beit_shapes("own"), **norm_shapes("norm"), **linear_shapes("head", 10)}))
    backbone, reading = load(state)
    assert reading.layout == "beit_finetuned"
    expected = official_tokens(state, IMAGES, HEADS)
    torch.testing.assert_close(tokens(backbone, IMAGES), expected, rtol=0, atol=2e-5)


def pretrained_shapes(tables: str = "shared") -> Shapes:
    return {
        **beit_shapes(tables),
        **norm_shapes("norm"),
        **linear_shapes("lm_head", 50),
        "mask_token": (1, 1, WIDTH),
    }


def test_beit_pretrained_takes_half_as_statistics_and_leaves_its_head_out() -> None:
    state = strong(filled(pretrained_shapes()))
    backbone, reading = load({"model": state})
    assert reading.layout == "beit"
    assert reading.network.mean == reading.network.std == (0.5, 0.5, 0.5)
    assert left_out(reading) == {"lm_head", "mask_token", "rel_pos_bias"}
    expected = official_tokens(state, IMAGES, HEADS)
    torch.testing.assert_close(tokens(backbone, IMAGES), expected, rtol=0, atol=2e-5)


def test_beit_v2_leaves_the_blocks_of_class_token_pretraining_out() -> None:
    shapes = pretrained_shapes()
    block = {
        key.removeprefix("blocks.0."): shape for key, shape in shapes.items() if key.startswith("blocks.0.")
    }
    shapes |= {**with_prefix("cls_pt_layers.0.", block), **norm_shapes("cls_pt_norm")}
    state = strong(filled({**shapes, **linear_shapes("cls_pt_lm_head", 50)}))
    backbone, reading = load({"model": state})
    assert reading.layout == "beitv2"
    assert reading.network.mean == (0.485, 0.456, 0.406)
    assert {"cls_pt_layers", "cls_pt_norm", "cls_pt_lm_head"} < left_out(reading)
    expected = official_tokens(state, IMAGES, HEADS)
    torch.testing.assert_close(tokens(backbone, IMAGES), expected, rtol=0, atol=2e-5)


def test_beit_with_absolute_positions_takes_the_heads_of_its_width() -> None:
    sizes = (PATCH, GRID, 192, 3, 1)
    shapes = {**beit_shapes("none", sizes=sizes, has_scale=False), **norm_shapes("norm", 192)}
    state = strong(filled({**shapes, **linear_shapes("lm_head", 50, 192), "mask_token": (1, 1, 192)}))
    backbone, reading = load({"model": state})
    assert reading.network.assumed_args == {"num_heads": 3}
    assert "3 heads" in reading.network.assumption
    assert reading.network.mean == reading.network.std == (0.5, 0.5, 0.5)
    expected = official_tokens(state, IMAGES, 3)
    torch.testing.assert_close(tokens(backbone, IMAGES), expected, rtol=0, atol=2e-5)


def test_names_of_beit_at_a_width_it_never_had_are_not_guessed_at() -> None:
    with pytest.raises(AssertionError, match=r"\[\]"):
        read_one({"model": filled(pretrained_shapes("none"))})


@pytest.mark.slow
def test_golden_student_passes_through_the_layout(shared: Path) -> None:
    file = shared / "golden/fd_student.npz"
    state = with_prefix("encoder.", golden.state_dict(file, 23, prefix="encoder."))
    beside = filled({"decoder.0.weight": (384, 192, 1), "decoder.0.bias": (384,)})
    backbone, reading = load({"model": {**state, **beside}})
    with torch.no_grad():
        found = backbone(golden.images()).all()
    assert reading.network.mean == (0.485, 0.456, 0.406)
    assert backbone.preprocessing.image_size == 224
    torch.testing.assert_close(found[:, ::7], golden.arrays(file)["tokens"], rtol=0, atol=golden.TOLERANCE)


@pytest.mark.parametrize(
    ("layout", "tables", "extra"),
    [
        ("fd_vit", "shared", norm_shapes("norm", 768)),
        ("beit_finetuned", "own", {**norm_shapes("fc_norm", 768), **linear_shapes("head", 1000, 768)}),
        (
            "beit",
            "shared",
            {**norm_shapes("norm", 768), **linear_shapes("lm_head", 8192, 768), "mask_token": (1, 1, 768)},
        ),
    ],
)
def test_real_files_are_whole(layout: str, tables: str, extra: Shapes) -> None:
    shapes = {**beit_shapes(tables, sizes=(16, 14, 768, 12, 12)), **extra}
    prefix = "encoder." if layout == "fd_vit" else ""
    reading = check_whole(with_prefix(prefix, shapes))
    args = reading.network.model_args
    assert reading.layout == layout
    assert (args["img_size"], args["patch_size"], args["depth"], args["num_heads"]) == (224, 16, 12, 12)


def test_large_student_of_patch_14_shows_its_16_heads_and_grid() -> None:
    shapes = {**beit_shapes(sizes=(14, 16, 1024, 16, 24)), **norm_shapes("norm", 1024)}
    args = check_whole(with_prefix("encoder.", shapes)).network.model_args
    assert (args["img_size"], args["num_heads"], args["depth"]) == (224, 16, 24)


def official_resampling(table: np.ndarray, old: int, new: int) -> np.ndarray:
    """BEiT's scheme once more: growing steps by bisection, then FITPACK's bicubic spline, head by head."""
    half, reach = old - 1, new - 1
    low, high, ratio = 1.01, 1.5, 0.0
    while high - low > 1e-6:
        ratio = (low + high) / 2
        low, high = (low, ratio) if sum(ratio**i for i in range(half)) > reach else (ratio, high)
    steps = [sum(ratio**i for i in range(count)) for count in range(1, half + 1)]
    before = np.array([-step for step in reversed(steps)] + [0.0] + steps)
    after = np.arange(-reach, reach + 1, dtype=float)
    side = 2 * old - 1
    columns = []
    for head in range(table.shape[1]):
        spline = RectBivariateSpline(before, before, table[: side * side, head].reshape(side, side), s=0)
        columns.append(spline(after, after).reshape(-1))
    return np.concatenate([np.stack(columns, axis=1), table[side * side :]])


@pytest.mark.parametrize(("old", "new"), [(14, 24), (14, 32), (14, 16), (16, 14), (7, 5), (3, 14)])
def test_bias_tables_are_resampled_as_beit_does(old: int, new: int) -> None:
    table = golden.weight("table", ((2 * old - 1) ** 2 + 3, 3), 1) * 10
    found = geometric_bias(table, (old, old), (new, new))
    expected = torch.from_numpy(official_resampling(table.double().numpy(), old, new)).float()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert torch.equal(found[-3:], table[-3:])
    centre = (len(found) - 3) // 2
    torch.testing.assert_close(found[centre], table[(len(table) - 3) // 2])
    assert (found - bicubic_bias(table, (old, old), (new, new))).abs().max() > 1e-2, "Swin's way is another"


def test_a_grid_that_is_not_square_keeps_rows_and_columns_apart() -> None:
    table = torch.zeros(5 * 9 + 3, 1)
    table[:-3] = torch.arange(5.0).repeat_interleave(9).unsqueeze(1)
    wide = geometric_bias(table, (3, 5), (3, 8))[:-3].unflatten(0, (5, 15)).squeeze(-1)
    torch.testing.assert_close(wide, wide[:, :1].expand(5, 15))


def test_tables_of_no_square_or_too_small_a_window_are_refused() -> None:
    with pytest.raises(WeightsError, match="730 rows"):
        window_of(torch.zeros(730, 12), 3)
    with pytest.raises(WeightsError, match="2x2 cannot be resampled"):
        geometric_bias(torch.zeros(12, 1), (2, 2), (4, 4))
