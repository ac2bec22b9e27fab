"""Swin layouts against a plain reading of the official forward."""

import math

import pytest
import torch
import torch.nn.functional as F
from official_swins import (
    DEPTHS,
    HEADS,
    IMAGES,
    INDEX,
    PATCH,
    SIDE,
    TABLE,
    WIDTH,
    Sizes,
    coordinate_buffers,
    esvit_content,
    official_tokens,
    swin_shapes,
    swin_state,
    v2_state,
)
from torch import Tensor, nn

from fdkit.errors import WeightsError
from fdkit.teachers.official.bias_tables import bicubic_bias
from tests import golden
from tests.official_files import Shapes, check_whole, filled, left_out, load, read_one, tokens, with_prefix


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
        monkeypatch.setattr(
            "official_swins.block_windows", lambda window, block, side: (min(window, side), 0)
        )
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


@pytest.mark.parametrize(("old", "new"), [(7, 12), (7, 14), (14, 7)])
def test_tables_are_resampled_as_swin_does(old: int, new: int) -> None:
    table = golden.weight("table", ((2 * old - 1) ** 2, 3), 1)
    found = bicubic_bias(table, (old, old), (new, new))
    image = table.T.reshape(1, 3, 2 * old - 1, 2 * old - 1)
    official = F.interpolate(image, size=(2 * new - 1, 2 * new - 1), mode="bicubic")
    assert torch.equal(found, official.reshape(3, -1).T)
    crossed = bicubic_bias(image.transpose(2, 3).reshape(3, -1).T, (old, old), (new, new))
    assert (found - crossed).abs().max() > 1e-2


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
