import cmath
import json
import math

import pytest
import torch
from torch import Tensor, nn

from fdkit.analysis.fourier import (
    FourierConfig,
    analyze,
    diagonal_frequencies,
    draw,
    log_amplitudes,
    scalars,
    summary,
)
from fdkit.analysis.observe import Images, Observed, observe_layers
from fdkit.errors import ConfigError, DataError, NumericsError
from fdkit.models.backbone import Tokens
from fdkit.models.libraries import build_timm


def images(count: int, size: int = 64) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(3))


def batches(pixels: Tensor, sizes: int | list[int] = 8) -> list[Images]:
    return [Images(part) for part in pixels.split(sizes)]


def tiny(**args):
    return build_timm("vit_tiny_patch16_224", {"depth": 2, "img_size": 64, "embed_dim": 24, **args}).eval()


def by_loops(patches: Tensor, side: int) -> list[list[float]]:
    """The definition, one image, frequency, channel and patch at a time."""
    rows = []
    for image in patches.double().tolist():
        row = []
        for k in range(side // 2 + 1):
            logs = []
            for channel in range(len(image[0])):
                amplitude = sum(
                    image[y * side + x][channel] * cmath.exp(-2j * cmath.pi * k * (y + x) / side)
                    for y in range(side)
                    for x in range(side)
                )
                logs.append(math.log(abs(amplitude) + 1e-6))
            row.append(sum(logs) / len(logs))
        rows.append(row)
    return rows


@pytest.mark.parametrize("side", [4, 5])
def test_equals_the_transform_by_loops(side):
    patches = torch.randn(2, side**2, 3, generator=torch.Generator().manual_seed(0))
    found = log_amplitudes(patches, (side, side))
    assert found.shape == (2, side // 2 + 1)
    torch.testing.assert_close(found, torch.tensor(by_loops(patches, side)), rtol=1e-4, atol=1e-4)
    # The log of the mean amplitude, or the first row in place of the diagonal, would be other numbers.
    spectrum = torch.fft.fft2(patches.unflatten(1, (side, side)), dim=(1, 2)).abs()
    of_mean = spectrum.diagonal(dim1=1, dim2=2)[..., : side // 2 + 1].mean(1).log()
    first_row = spectrum[:, 0, : side // 2 + 1].log().mean(-1)
    assert not torch.allclose(found, of_mean, atol=0.02)
    assert not torch.allclose(found, first_row, atol=0.02)


def test_frequencies_by_hand():
    assert diagonal_frequencies(4) == [0, 0.5, 1]
    assert diagonal_frequencies(5) == [0, 0.4, 0.8]
    assert diagonal_frequencies(14)[-1] == 1


def test_a_constant_is_all_at_zero_and_a_checkerboard_all_at_pi():
    y, x = torch.meshgrid(torch.arange(6), torch.arange(6), indexing="ij")
    board = (1 - 2 * ((y + x) % 2)).float().flatten()
    floor = math.log(1e-6)
    (constant,) = log_amplitudes(torch.ones(1, 36, 2), (6, 6)).tolist()
    assert constant == pytest.approx([math.log(36), floor, floor, floor], abs=0.5)
    (checkerboard,) = log_amplitudes(board[None, :, None].expand(1, 36, 2), (6, 6)).tolist()
    assert checkerboard == pytest.approx([floor, floor, floor, math.log(36)], abs=0.5)
    (stripes,) = log_amplitudes(board.view(6, 6)[0].repeat(6)[None, :, None], (6, 6)).tolist()
    assert max(stripes) < floor + 1  # of pi in columns and 0 in rows: not on the diagonal


def test_white_noise_is_flat_but_for_its_real_ends():
    noise = torch.randn(200, 64, 40, generator=torch.Generator().manual_seed(0))
    mean = log_amplitudes(noise, (8, 8)).mean(0)
    relative = (mean - mean[0]).tolist()
    assert relative == pytest.approx([0, *[math.log(2) / 2] * 3, 0], abs=0.03)


def test_louder_maps_have_the_same_relative_spectrum():
    patches = torch.randn(3, 36, 5, generator=torch.Generator().manual_seed(0))
    one, two = (log_amplitudes(scale * patches, (6, 6)) for scale in (1, 50))
    torch.testing.assert_close(two - one, torch.full_like(one, math.log(50)), rtol=0, atol=1e-3)


def test_numbers_equal_the_mean_over_images_however_they_are_batched():
    backbone, pixels = tiny(), images(5)
    expected = [
        log_amplitudes(layer.patches, layer.grid).mean(0) for layer in observe_layers(backbone, pixels)
    ]
    for sizes in ([5], [2, 2, 1]):
        (model,) = analyze([Observed("m", backbone, batches(pixels, sizes))], FourierConfig()).numbers[
            "models"
        ]
        torch.testing.assert_close(
            torch.tensor(model["log_amplitude"]), torch.stack(expected), rtol=1e-4, atol=1e-4
        )
        for line, mean, high in zip(
            model["relative_log_amplitude"], expected, model["high_frequency"], strict=True
        ):
            assert line == pytest.approx((mean - mean[0]).tolist(), abs=1e-3)
            assert high == line[-1]
    few = analyze([Observed("m", backbone, batches(pixels, 2))], FourierConfig(num_images=3)).numbers[
        "models"
    ][0]
    same = analyze([Observed("m", backbone, batches(pixels[:3]))], FourierConfig()).numbers["models"][0]
    assert few["num_images"] == 3
    assert few["high_frequency"] == pytest.approx(same["high_frequency"], abs=1e-4)


def test_numbers_are_plain_and_every_stage_has_its_own_frequencies():
    swin = build_timm("swin_tiny_patch4_window7_224", {"img_size": 64, "window_size": 4, "embed_dim": 24})
    models = [Observed("vit", tiny(), batches(images(2))), Observed("swin", swin, batches(images(2)))]
    numbers = analyze(models, FourierConfig()).numbers
    assert json.loads(json.dumps(numbers)) == numbers
    vit, swin_numbers = numbers["models"]
    assert (vit["side"], swin_numbers["side"]) == ([4, 4], [16, 8, 4, 2])
    assert swin_numbers["frequency"][-1] == [0, 1]
    high = vit["high_frequency"]
    assert list(scalars(vit).values()) == [high[1], pytest.approx(sum(high) / 2)]
    title, rows = summary(numbers)
    assert "2 images" in title
    assert rows[0] == ["layer", "vit", "swin"]
    assert rows[3][:2] == ["3", ""]
    assert rows[4][2] == f"{swin_numbers['high_frequency'][3]:.2f}"


@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (4, 1)])
def test_grids_without_a_spectrum_are_refused(monkeypatch, grid):
    rows, columns = grid
    tokens = Tokens(torch.zeros(1, 0, 2), torch.randn(1, rows * columns, 2), grid)
    monkeypatch.setattr("fdkit.analysis.fourier.observe_layers", lambda model, pixels: (tokens,))
    with pytest.raises(ConfigError, match=f"layer 1 of m has a grid of {rows} x {columns} patches"):
        analyze([Observed("m", tiny(), batches(images(1)))], FourierConfig())


def test_a_transform_along_a_diagonal_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"must be square .* \(2, 3\)"):
        log_amplitudes(torch.randn(1, 6, 2), (2, 3))


def test_nothing_to_observe_and_features_not_finite_are_refused():
    with pytest.raises(ConfigError, match="fourier needs a model"):
        analyze([], FourierConfig())
    with pytest.raises(DataError, match="no images to observe m on"):
        analyze([Observed("m", tiny(), [])], FourierConfig())
    backbone = tiny()
    projection = backbone.network.blocks[1].mlp.fc2
    assert isinstance(projection, nn.Linear)
    with torch.no_grad():
        projection.bias[0] = torch.nan
    with pytest.raises(NumericsError, match="features of layer 2 of m are not finite"):
        analyze([Observed("m", backbone, batches(images(1)))], FourierConfig())


@pytest.mark.parametrize("width", [7.2, 3.7])
def test_figure_shows_every_layer_and_the_highest_frequency(width):
    models = [
        Observed("a", tiny(), batches(images(2))),
        Observed("b", tiny(depth=3), batches(images(2))),
    ]
    numbers = analyze(models, FourierConfig()).numbers
    figure = draw(json.loads(json.dumps(numbers)), width)
    a, b, high = figure.axes[:3]
    for axes, model in ((a, numbers["models"][0]), (b, numbers["models"][1])):
        assert [line.get_ydata().tolist() for line in axes.lines] == model["relative_log_amplitude"]
        assert [line.get_xdata().tolist() for line in axes.lines] == model["frequency"]
        assert len({tuple(line.get_color()) for line in axes.lines}) == len(axes.lines)
    assert a.get_ylim() == b.get_ylim()
    assert high.lines[1].get_ydata().tolist() == numbers["models"][1]["high_frequency"]
    assert high.lines[1].get_xdata().tolist() == pytest.approx([1 / 3, 2 / 3, 1])
