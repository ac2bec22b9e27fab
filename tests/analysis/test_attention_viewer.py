import base64
import json

import numpy as np
import pytest
import torch
from torch import Tensor

from fdkit.analysis.attention_viewer import (
    AttentionViewerConfig,
    Sheet,
    analyze,
    cell_attention,
    decode,
    draw,
    encode,
    from_rows,
    summary,
    to_sheet,
)
from fdkit.analysis.observe import Attention, Images, Observed, observe_attention
from fdkit.errors import ConfigError, DataError
from fdkit.models.libraries import build_timm

GRID = (3, 5)


def random_attention(num_prefix: int, grid: tuple[int, int] = GRID) -> Attention:
    num_tokens = num_prefix + grid[0] * grid[1]
    weights = (3 * torch.randn(2, 1, 4, num_tokens, num_tokens)).softmax(-1)
    places = torch.cat([torch.full((num_prefix,), -1), torch.arange(grid[0] * grid[1])])
    return Attention(weights, places[None], grid, 16)


def tiny(**args):
    return build_timm("vit_tiny_patch16_224", {"depth": 2, "img_size": 64, "embed_dim": 48, **args}).eval()


def observed(backbone, count: int = 3, name: str = "m", size: int = 64, **fields) -> Observed:
    pixels = torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))
    return Observed(name, backbone, [Images(part) for part in pixels.split(2)], **fields)


@pytest.mark.parametrize("num_prefix", [0, 1, 5])
def test_cells_of_the_own_grid_are_the_patches(num_prefix):
    attention = random_attention(num_prefix)
    rows, elsewhere = cell_attention(attention, GRID, class_token=num_prefix > 0)
    weights = attention.weights[:, 0]
    expected = weights[:, :, num_prefix:, num_prefix:]
    if num_prefix:
        expected = torch.cat([weights[:, :, :1, num_prefix:], expected], dim=2)  # the class token asks first
    torch.testing.assert_close(rows, expected)
    torch.testing.assert_close(elsewhere, 1 - expected.sum(-1), rtol=1e-4, atol=1e-5)


def test_pooled_cells_sum_what_is_seen_and_average_who_sees():
    attention = random_attention(0, (3, 4))
    rows, _ = cell_attention(attention, (2, 2), class_token=False)
    cell_of = [2 * (row * 2 // 3) + column * 2 // 4 for row in range(3) for column in range(4)]
    expected = torch.zeros(2, 4, 4, 4)
    for query in range(12):
        for key in range(12):
            share = attention.weights[:, 0, :, query, key] / cell_of.count(cell_of[query])
            expected[:, :, cell_of[query], cell_of[key]] += share
    torch.testing.assert_close(rows, expected)
    torch.testing.assert_close(rows.sum(-1), torch.ones(2, 4, 4))


def test_windows_are_mapped_to_their_place_in_the_image():
    # Two windows of a 2x4 map whose tokens are given in no order; the second has padding.
    places = torch.tensor([[5, 0, 4, 1], [2, -1, 6, 3]])
    weights = torch.rand(1, 2, 1, 4, 4).softmax(-1)
    rows, elsewhere = cell_attention(Attention(weights, places, (2, 4), 4), (2, 4), class_token=False)
    expected = torch.zeros(8, 8)
    for window in range(2):
        for query in range(4):
            for key in range(4):
                if min(places[window, query], places[window, key]) >= 0:
                    expected[places[window, query], places[window, key]] = weights[0, window, 0, query, key]
    torch.testing.assert_close(rows[0, 0], expected)
    assert elsewhere[0, 0, 6].item() == pytest.approx(weights[0, 1, 0, 2, 1].item())
    assert elsewhere[0, 0, 3].item() == pytest.approx(weights[0, 1, 0, 3, 1].item())


def test_a_sheet_keeps_rows_to_a_part_in_two_hundred_of_their_largest():
    rows, elsewhere = torch.rand(3, 6, 10), torch.rand(3, 6)
    sheet = to_sheet(rows, elsewhere)
    assert sheet.rows.shape == (6, 30)
    assert np.array_equal(sheet.elsewhere, (255 * elsewhere).round().byte().numpy())
    true = (rows / rows.sum(-1, keepdim=True)).numpy()
    assert np.abs(from_rows(sheet.rows, 3) - true).max() < true.max() / 200


def test_a_row_without_attention_is_empty_and_not_an_error():
    sheet = to_sheet(torch.zeros(1, 2, 4), torch.ones(1, 2))
    assert not sheet.rows.any()
    assert not from_rows(sheet.rows, 1).any()
    assert (sheet.elsewhere == 255).all()


def stored(model: dict, image: int, layer: int) -> Tensor:
    content = base64.b64decode(model["sheets"][image][layer])
    return torch.from_numpy(from_rows(decode(content), model["layers"][layer]["num_heads"]))


@pytest.mark.parametrize(
    "args", [{}, {"class_token": False, "global_pool": "avg"}, {"reg_tokens": 4}], ids=str
)
def test_what_is_stored_is_the_models_attention(args):
    backbone, one = tiny(**args), observed(tiny(**args))
    for block in backbone.network.blocks:
        block.attn.qkv.weight.data *= 20  # far from uniform
    one = one._replace(model=backbone)
    numbers = analyze([one], AttentionViewerConfig()).numbers
    model = numbers["models"][0]
    assert json.loads(json.dumps(numbers)) == numbers
    assert "_sheets" not in model
    assert (numbers["quality"], len(model["pictures"]), model["num_images"]) == (90, 3, 3)
    true: list[Tensor] = []
    pixels = torch.cat([batch.pixels for batch in one.batches])

    def visit(layer: int, attention: Attention) -> None:
        true.append(cell_attention(attention, (4, 4), class_token=model["has_class_token"])[0])

    observe_attention(backbone, pixels, visit)
    assert model["has_class_token"] == (args.get("class_token", True))
    for image in range(3):
        for layer in range(2):
            expected = true[layer][image].double()
            expected = expected / expected.sum(-1, keepdim=True)
            error = 0.5 * (stored(model, image, layer) - expected).abs().sum(-1).mean()
            assert error < 0.06
    assert model["error"] < 0.06


def test_the_quality_falls_until_everything_fits():
    models = [observed(tiny(), count=4), observed(tiny(depth=4), count=4, name="n")]
    best = analyze(models, AttentionViewerConfig())
    size = len(json.dumps([model["sheets"] for model in best.numbers["models"]]))
    limit = 0.75 * size / 1e6
    smaller = analyze(models, AttentionViewerConfig(max_megabytes=limit)).numbers
    assert smaller["quality"] < best.numbers["quality"]
    stored_bytes = sum(
        len(text)
        for model in smaller["models"]
        for kind in ("sheets", "elsewhere")
        for image in model[kind]
        for text in image
    )
    assert stored_bytes <= 1e6 * limit
    errors = [
        (one["error"], other["error"])
        for one, other in zip(best.numbers["models"], smaller["models"], strict=True)
    ]
    assert all(fine < coarse for fine, coarse in errors)
    with pytest.raises(ConfigError, match=r"does not fit 0\.0 MB"):
        analyze(models, AttentionViewerConfig(max_megabytes=0.001))


def test_names_come_from_labels_or_paths():
    pixels = torch.rand(2, 3, 64, 64)
    batch = Images(pixels, torch.tensor([1, -1]), torch.tensor([4, 7]))
    one = Observed("m", tiny(), [batch], ("cat", "<b>dog</b>"), lambda index: f"folder/photo-{index}.jpg")
    model = analyze([one], AttentionViewerConfig()).numbers["models"][0]
    assert model["image_names"] == ["<b>dog</b>", "photo-7.jpg"]


def test_a_finer_grid_is_pooled_and_windows_are_read():
    swin = build_timm(
        "swin_tiny_patch4_window7_224", {"depths": (2, 1, 1, 1), "embed_dim": 24, "num_heads": (1, 2, 2, 2)}
    )
    numbers = analyze([observed(swin.eval(), count=1, size=224)], AttentionViewerConfig(max_cells=10)).numbers
    model = numbers["models"][0]
    assert [layer["grid"] for layer in model["layers"]] == [[10, 10], [10, 10], [10, 10], [10, 10], [7, 7]]
    assert [layer["num_heads"] for layer in model["layers"]] == [1, 1, 2, 2, 2]
    assert not model["has_class_token"]
    torch.testing.assert_close(stored(model, 0, 4).sum(-1), torch.ones(2, 49).double())


@pytest.mark.parametrize("width", [7.2, 3.7])
def test_the_figure_has_a_row_a_model(width):
    numbers = analyze([observed(tiny()), observed(tiny(depth=1), name="n")], AttentionViewerConfig()).numbers
    figure = draw(numbers, width)
    columns = 4 if width > 3.7 else 2
    assert len(figure.axes) == 2 * columns
    assert figure.axes[0].get_title(loc="left") == "m"
    assert figure.axes[columns].get_title(loc="left") == "n"
    title, rows = summary(numbers)
    assert "quality 90" in title
    assert rows[1][:4] == ["m", "3", "2 x 3", "4x4"]


def test_nothing_to_look_at_is_refused():
    with pytest.raises(ConfigError, match="needs a model"):
        analyze([], AttentionViewerConfig())
    with pytest.raises(DataError, match="no images to observe m on"):
        analyze([observed(tiny(), count=0)._replace(batches=[])], AttentionViewerConfig())
    with pytest.raises(ConfigError, match="ResNet has no attention"):
        analyze([observed(build_timm("resnet18", {}))], AttentionViewerConfig())


def test_encoding_keeps_the_shape_of_rows():
    sheet = Sheet(np.arange(60, dtype=np.uint8).reshape(4, 15), np.zeros((3, 4), np.uint8))
    assert decode(encode(sheet.rows, 90)).shape == (4, 15)
