import json

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from fdkit.analysis._targets import final_tokens, target_tokens
from fdkit.analysis.observe import Images, Observed
from fdkit.analysis.target_statistics import (
    ChannelMoments,
    TargetStatisticsConfig,
    analyze,
    described,
    draw,
    scalars,
    summary,
)
from fdkit.errors import ConfigError, DataError, NumericsError
from fdkit.models.backbone import Tokens
from fdkit.models.distillation_target import whiten
from fdkit.models.libraries import build_timm


def tiny(**args):
    return build_timm("vit_tiny_patch16_224", {"depth": 1, "img_size": 64, "embed_dim": 24, **args}).eval()


def batches(images: Tensor, sizes: int | list[int] = 8) -> list[Images]:
    return [Images(part) for part in images.split(sizes)]


def tokens_of(num_prefix: int, grid: tuple[int, int], width: int) -> Tokens:
    return Tokens(torch.randn(2, num_prefix, width), torch.randn(2, grid[0] * grid[1], width), grid)


def test_moments_equal_those_of_scipy_however_the_rows_are_batched():
    # The shift of the first rows lies 30 deviations off the others; a biased or an excess kurtosis would differ.
    rows = torch.distributions.Gamma(torch.tensor(2.0), torch.tensor(1.0)).sample((300, 4))
    rows = rows * torch.tensor([1, 10, 0.1, 3]) + torch.tensor([0, 50, -2, 0])
    rows[:3] += 30
    for sizes in ([300], [3, 97, 200], [1] * 300):
        moments = ChannelMoments()
        for part in rows.split(sizes):
            moments.add(part)
        exact = rows.double().numpy()
        assert moments.count == 300
        np.testing.assert_allclose(moments.mean(), exact.mean(0), rtol=1e-10)
        np.testing.assert_allclose(moments.variance(), exact.var(0), rtol=1e-8)
        np.testing.assert_allclose(moments.kurtosis(), stats.kurtosis(exact, fisher=False), rtol=1e-6)


def test_what_is_said_of_channels_by_hand():
    mean = torch.tensor([0.0, -6.0, 1.0, 5.0]).double()
    variance = torch.tensor([1.0, 4.0, 100.0, 0.0]).double()
    table = described(mean, variance, torch.tensor([3.0, 9.0, 2.0, float("nan")]).double())
    assert table["std"] == [1, 2, 10, 0]
    assert table["num_constant_channels"] == 1
    assert table["rms"] == pytest.approx(((1 + 40 + 101 + 25) / 4) ** 0.5)
    assert table["largest_mean_over_std"] == 3
    assert table["largest_over_median_std"] == 5
    assert table["std_spread"] == pytest.approx(np.std([0, np.log10(2), 1]))
    assert (table["median_kurtosis"], table["largest_kurtosis"]) == (3, 9)
    assert table["top_variance_share"] == pytest.approx(100 / 105)  # 1 % of 4 channels is one channel
    flat = described(mean, torch.zeros(4).double(), torch.full((4,), float("nan")).double())
    assert flat["largest_kurtosis"] is None
    assert flat["num_constant_channels"] == 4


def test_one_percent_of_channels_is_rounded_up():
    variance = torch.ones(250).double()
    table = described(torch.zeros(250).double(), variance, 3 * variance)
    assert table["top_variance_share"] == pytest.approx(3 / 250)


def test_numbers_equal_numpy_on_all_tokens():
    model, images = tiny(reg_tokens=2), torch.rand(5, 3, 64, 64)
    observed = [Observed("vit", model, batches(images, [3, 2]))]
    found = analyze(observed, TargetStatisticsConfig()).numbers["models"][0]
    tokens = final_tokens(observed[0], images)
    rows = torch.cat([tokens.prefix[:, 0], tokens.patches.flatten(0, 1)]).double()  # no registers
    assert (found["num_images"], found["num_tokens"], found["width"]) == (5, len(rows), 24)
    assert len(rows) == 5 * 17
    for kind in ("none", "layernorm", "l2", "batch"):
        target = whiten(rows, kind)
        table = found[kind]
        np.testing.assert_allclose(table["mean"], target.mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(table["std"], target.std(0, correction=0), rtol=1e-4, atol=1e-6)
        assert table["rms"] == pytest.approx(target.square().mean().sqrt().item(), rel=1e-4)
        kurtosis = stats.kurtosis(target.numpy(), fisher=False)
        assert table["largest_kurtosis"] == pytest.approx(kurtosis.max(), rel=1e-3)


def test_whitened_tokens_have_one_scale_whatever_the_model():
    scaled = tiny()
    with torch.no_grad():
        scaled.network.norm.weight.mul_(40)
        scaled.network.norm.weight[3] *= 30
    images = torch.rand(3, 3, 64, 64)
    observed = [Observed("plain", tiny(), batches(images)), Observed("scaled", scaled, batches(images))]
    plain, outlier = analyze(observed, TargetStatisticsConfig()).numbers["models"]
    assert outlier["none"]["rms"] > 100 * plain["none"]["rms"]
    assert outlier["none"]["top_variance_share"] > 0.9
    for model in (plain, outlier):
        assert model["layernorm"]["rms"] == pytest.approx(1, rel=1e-3)
        assert model["l2"]["rms"] == pytest.approx(24**-0.5, rel=1e-4)
        assert max(abs(one - 1) for one in model["batch"]["std"]) < 0.01
    assert scalars(outlier)["root mean square before whitening"] == outlier["none"]["rms"]
    share = 100 * outlier["layernorm"]["top_variance_share"]
    assert scalars(outlier)["variance in the top 1 % of channels, after whitening (%)"] == share


def test_numbers_are_plain_and_the_figure_shows_them():
    images = torch.rand(2, 3, 64, 64)
    observed = [
        Observed(name, tiny(embed_dim=width), batches(images)) for name, width in (("a", 24), ("b", 36))
    ]
    analysis = analyze(observed, TargetStatisticsConfig(whitening="l2", num_images=2))
    numbers = analysis.numbers
    assert json.loads(json.dumps(numbers)) == numbers
    figure = analysis.figure()
    for axes, model in zip(figure.axes, numbers["models"], strict=True):
        before, after = axes.lines
        assert list(before.get_ydata()) == sorted(model["none"]["std"], reverse=True)
        assert list(after.get_ydata()) == sorted(model["l2"]["std"], reverse=True)
        assert before.get_xdata()[-1] == pytest.approx(100 * (1 - 0.5 / model["width"]))
        assert axes.get_yscale() == "log"
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()
    narrow = draw(numbers, width=3.7)
    assert narrow.axes[0].get_position().y0 > narrow.axes[1].get_position().y0
    title, rows = summary(numbers)
    assert "target-statistics" in title
    assert [row[:2] for row in rows[1:3]] == [
        ["a", "as given"],
        ["a", "scaled to length 1"],
    ]


def test_bad_input_is_refused():
    with pytest.raises(ConfigError, match="target-statistics needs a model"):
        analyze([], TargetStatisticsConfig())
    with pytest.raises(DataError, match="no images to observe vit on"):
        analyze([Observed("vit", tiny(), [])], TargetStatisticsConfig())
    broken = tiny()
    with torch.no_grad():
        broken.network.norm.bias[0] = float("nan")
    with pytest.raises(NumericsError, match="final tokens of vit are not finite"):
        analyze([Observed("vit", broken, batches(torch.rand(1, 3, 64, 64)))], TargetStatisticsConfig())


def test_the_class_token_counts_and_registers_do_not():
    tokens = tokens_of(3, (2, 2), 4)
    assert torch.equal(target_tokens(tokens), torch.cat([tokens.prefix[:, :1], tokens.patches], dim=1))
    assert target_tokens(tokens_of(0, (2, 2), 4)).shape == (2, 4, 4)
