import json
import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import Tensor

from fdkit.analysis._moments import Moments
from fdkit.analysis._pictures import image_from_text
from fdkit.analysis._residual import RIDGES, Folds, Parts, Unexplained, merged, squared_error
from fdkit.analysis._targets import final_tokens
from fdkit.analysis.distillation_residual import (
    DistillationResidualConfig,
    analyze,
    draw,
    is_fitted,
    scalars,
    summary,
)
from fdkit.analysis.observe import Images, Observed
from fdkit.errors import ConfigError, DataError, NumericsError
from fdkit.models.distillation_target import paired_tokens, whiten
from fdkit.models.libraries import build_timm

LEAST_SQUARES = DistillationResidualConfig(ridge=0, num_shown=2)


def tiny(name="vit_tiny_patch16_224", **args):
    return build_timm(name, {"depth": 1, "img_size": 64, "embed_dim": 24, **args}).eval()


def swin():
    args = {"img_size": 64, "embed_dim": 24, "depths": (1, 1), "num_heads": (2, 2), "window_size": 4}
    return build_timm("swin_tiny_patch4_window7_224", args).eval()


def batches(images: Tensor, sizes: int | list[int] = 4, first: int = 0) -> list[Images]:
    numbers = torch.arange(first, first + len(images))
    parts = zip(images.split(sizes), numbers.split(sizes), strict=True)
    return [Images(part, index % 3, index) for part, index in parts]


def folds_of(student: Tensor, teacher: Tensor) -> Folds:
    folds = Folds(student.shape[-1], teacher.shape[-1])
    folds.add(student, teacher)
    return folds


def measured(folds: Folds, student: Tensor, teacher: Tensor, *, num_prefix: int = 0, ridge=0.0):
    found = Unexplained(folds.fit(ridge), num_tokens=student.shape[1], num_prefix=num_prefix)
    found.add(student, teacher)
    return found.numbers((1, student.shape[1] - num_prefix))


def test_a_linear_map_of_the_teacher_is_fully_explained_and_a_constant_not_at_all():
    teacher = torch.randn(8, 5, 4)
    linear = teacher @ torch.randn(4, 6) + 3
    found = measured(folds_of(linear[:4], teacher[:4]), linear[4:], teacher[4:])
    assert found["explained_variance"] == pytest.approx(1, abs=1e-9)
    constant = torch.full((8, 5, 3), 7.0)
    found = measured(folds_of(constant[:4], teacher[:4]), constant[4:], teacher[4:])
    assert found["explained_variance"] == 0
    assert found["by_channel"] == [0, 0, 0, 0]


def test_the_rounding_of_a_constant_teacher_is_nothing_to_explain():
    teacher = torch.full((4, 5, 3), 1e3) * (1 + 1e-7 * torch.rand(4, 5, 3))
    with pytest.raises(NumericsError, match="nothing to explain"):
        folds_of(torch.randn(4, 5, 2), teacher).fit(0.0)


def test_a_channel_the_student_does_not_know_is_the_one_left_unexplained():
    teacher = torch.randn(400, 5, 4)
    student = teacher[..., [0, 1, 3]] @ torch.randn(3, 3)
    found = measured(folds_of(student[:200], teacher[:200]), student[200:], teacher[200:])
    assert found["by_channel"][2] == pytest.approx(0, abs=0.02)
    assert [found["by_channel"][one] for one in (0, 1, 3)] == pytest.approx([1, 1, 1])


@pytest.mark.parametrize("ridge", [0.0, 0.03, 2.0])
def test_the_map_is_that_of_ridge_regression(ridge):
    # A penalised intercept or a penalty in other units would differ.
    student, teacher = 3 * torch.randn(6, 5, 4) + 2, torch.randn(6, 5, 3) - 1
    linear = folds_of(student, teacher).fit(ridge)
    x, y = student.flatten(0, 1).double().numpy(), teacher.flatten(0, 1).double().numpy()
    alpha = ridge * len(x) * x.var(0).mean()
    oracle = Ridge(alpha=alpha, solver="svd").fit(x, y)
    np.testing.assert_allclose(linear.predict(student).flatten(0, 1), oracle.predict(x), rtol=1e-8, atol=1e-9)
    errors = ((oracle.predict(x) - y) ** 2).sum() / ((y - y.mean(0)) ** 2).sum()
    assert linear.explained_variance == pytest.approx(1 - errors)
    assert linear.num_tokens == 30


def test_a_student_without_some_direction_gets_the_solution_of_smallest_norm():
    student = torch.randn(6, 5, 2).double() @ torch.randn(2, 4).double()
    teacher = torch.randn(6, 5, 3).double()
    linear = folds_of(student, teacher).fit(0.0)
    x, y = (one.flatten(0, 1).numpy() for one in (student, teacher))
    oracle = np.linalg.lstsq(x - x.mean(0), y - y.mean(0), rcond=1e-8)[0]
    np.testing.assert_allclose(linear.weight, oracle, rtol=1e-6, atol=1e-9)


def test_the_penalty_is_the_one_that_serves_best_from_one_half_to_the_other():
    student = torch.randn(8, 3, 6)
    teacher = student @ torch.randn(6, 4) + 3 * torch.randn(8, 3, 4)
    errors = {}
    for ridge in RIDGES:
        errors[ridge] = 0.0
        for one, other in ((0, 1), (1, 0)):
            x, y = (part[one::2].flatten(0, 1).double().numpy() for part in (student, teacher))
            oracle = Ridge(alpha=ridge * len(x) * x.var(0).mean(), solver="svd").fit(x, y)
            held = teacher[other::2].flatten(0, 1).double().numpy()
            predicted = oracle.predict(student[other::2].flatten(0, 1).double().numpy())
            errors[ridge] += ((predicted - held) ** 2).sum()
    folds = Folds(6, 4)
    for start, stop in ((0, 3), (3, 4), (4, 8)):  # halves alternate across batches of odd size
        folds.add(student[start:stop], teacher[start:stop])
    chosen = folds.fit(None).ridge
    assert chosen == min(errors, key=errors.__getitem__)
    assert RIDGES[0] < chosen < RIDGES[-1]
    rows = torch.cat([student, teacher], dim=-1).double()
    for one, half in enumerate(folds.halves):
        torch.testing.assert_close(half.mean, rows[one::2].mean((0, 1)))


def test_the_error_on_other_tokens_counts_their_other_mean():
    student, teacher = torch.randn(4, 5, 3), torch.randn(4, 5, 2)
    linear = folds_of(student, teacher).fit(0.1)
    others = student + 2, 3 * teacher - 1
    moments = Moments(5)
    moments.add(torch.cat(others, dim=-1).flatten(0, 1))
    found = squared_error(linear, Parts.of(moments, 3))
    expected = (linear.predict(others[0]) - others[1]).square().sum().item()
    assert found == pytest.approx(expected, rel=1e-9)


def test_merged_moments_are_those_of_all_rows():
    rows = torch.randn(9, 3) + 5
    parts = [Moments(3), Moments(3)]
    parts[0].add(rows[:2])
    parts[1].add(rows[2:])
    both = merged(*parts)
    assert both.count == 9
    torch.testing.assert_close(both.mean, rows.double().mean(0))
    torch.testing.assert_close(both.covariance(), torch.cov(rows.double().T, correction=0))


@pytest.mark.parametrize("ratio", [0.5, 0.25, 0.9])
def test_the_fitted_images_are_spread_over_all(ratio):
    fitted = [is_fitted(position, ratio) for position in range(200)]
    assert abs(sum(fitted) - 200 * ratio) <= 1
    assert abs(sum(fitted[:100]) - 100 * ratio) <= 1  # the first part alone would be all of one kind


def by_numpy(teacher, student, images: Tensor) -> dict[str, object]:
    """Fit on every second image and measure the others, all at once."""
    own, target = paired_tokens(
        final_tokens(Observed("s", student, []), images), final_tokens(Observed("t", teacher, []), images)
    )
    own, target = own.double().numpy(), whiten(target, "layernorm").double().numpy()
    fitted = np.arange(len(images)) % 2 == 1
    x, y = own[fitted].reshape(-1, own.shape[-1]), target[fitted].reshape(-1, target.shape[-1])
    weight = np.linalg.lstsq(x - x.mean(0), y - y.mean(0), rcond=1e-7)[0]
    error = ((own[~fitted] - x.mean(0)) @ weight + y.mean(0) - target[~fitted]) ** 2
    spread = (target[~fitted] - y.mean(0)) ** 2
    held = target[~fitted][:, 0]
    return {
        "explained_variance": 1 - error.sum() / spread.sum(),
        "by_channel": 1 - error.sum((0, 1)) / spread.sum((0, 1)),
        "by_token": 1 - error.sum((0, 2)) / spread.sum((0, 2)),
        "by_image": 1 - error.sum((1, 2)) / spread.sum((1, 2)),
        "first_between": 1 - error[:, 0].sum() / ((held - held.mean(0)) ** 2).sum(),
        "residual": error.sum(2) / spread.sum(2).mean(),
    }


@pytest.mark.parametrize("kind", ["same", "registers", "larger", "swin"])
def test_numbers_equal_numpy_on_all_images_at_once(kind):
    # Fails if fitted images are measured, if registers are paired, or if the student's crops are its own.
    teacher = tiny(depth=2)
    student = {
        "same": tiny,
        "registers": lambda: tiny(reg_tokens=3),
        "larger": lambda: tiny(img_size=96),
        "swin": swin,
    }[kind]()
    images = torch.rand(13, 3, 64, 64)
    observed = [Observed("t", teacher, batches(images)), Observed("s", student, [])]
    found = analyze(observed, LEAST_SQUARES).numbers["models"][0]
    oracle = by_numpy(teacher, student, images)
    num_prefix = 0 if kind == "swin" else 1
    assert found["explained_variance"] == pytest.approx(oracle["explained_variance"], abs=1e-5)
    np.testing.assert_allclose(found["by_channel"], oracle["by_channel"], atol=1e-4)
    np.testing.assert_allclose(np.ravel(found["by_position"]), oracle["by_token"][num_prefix:], atol=1e-4)
    np.testing.assert_allclose(found["by_image"], oracle["by_image"], atol=1e-4)
    if kind == "swin":
        assert found["class_token"] is None
        assert found["class_token_between_images"] is None
    else:
        assert found["class_token"] == pytest.approx(oracle["by_token"][0], abs=1e-4)
        assert found["class_token_between_images"] == pytest.approx(oracle["first_between"], abs=1e-3)
    assert found["is_resampled"] == (kind in ("larger", "swin"))
    assert (found["num_images"], found["num_fitted_images"], found["grid"]) == (13, 6, [4, 4])
    worst = int(np.argmin(oracle["by_image"]))
    entry = found["worst"][0]
    assert entry["index"] == found["indices"][worst] == 2 * worst
    expected = oracle["residual"][worst, num_prefix:].reshape(4, 4)
    np.testing.assert_allclose(entry["residual"], expected, atol=2e-4)
    assert found["explained_variance_fitted"] > found["explained_variance"]


def test_a_student_that_is_the_teacher_matches_it():
    teacher, images = tiny(), torch.rand(10, 3, 64, 64)
    observed = [Observed("t", teacher, batches(images)), Observed("s", teacher, [])]
    found = analyze(observed, DistillationResidualConfig()).numbers["models"][0]
    assert found["explained_variance"] > 0.999
    assert found["ridge"] == RIDGES[0]


def test_batches_do_not_matter_and_each_student_stands_alone():
    teacher, images = tiny(depth=2), torch.rand(9, 3, 64, 64)
    students = [tiny(), tiny(img_size=96, embed_dim=12)]

    def run(sizes: list[int], chosen: list[int]) -> list[dict]:
        observed = [Observed("t", teacher, batches(images, sizes))]
        observed += [Observed(f"s{one}", students[one], []) for one in chosen]
        return analyze(observed, LEAST_SQUARES).numbers["models"]

    both = run([9], [0, 1])
    for number, alone in enumerate([*run([1] * 9, [0]), *run([4, 5], [1])]):
        assert alone["name"] == both[number]["name"] == f"s{number}"
        assert alone["by_image"] == pytest.approx(both[number]["by_image"], abs=1e-4)
        for part in ("worst", "best"):
            assert [one["index"] for one in alone[part]] == [one["index"] for one in both[number][part]]


def test_worst_and_best_images_are_named_and_pictured():
    images = torch.rand(12, 3, 64, 64)
    images[4] = torch.tensor([1.0, 0.0, 0.0])[:, None, None]
    names = ("<b>a</b>", "b", "c")
    observed = [
        Observed("t", tiny(depth=2), batches(images, 5, first=100), names, lambda index: f"/x/{index}.jpg"),
        Observed("s", tiny(), []),
    ]
    config = DistillationResidualConfig(ridge=0, num_shown=12, num_images=11)
    found = analyze(observed, config).numbers["models"][0]
    values = [one["explained_variance"] for one in found["worst"]]
    assert values == sorted(found["by_image"])
    assert [one["explained_variance"] for one in found["best"]] == values[::-1]
    assert sorted(one["index"] for one in found["worst"]) == [100, 102, 104, 106, 108, 110]
    red = next(one for one in found["worst"] if one["index"] == 104)
    assert red["description"] == "/x/104.jpg"
    assert red["label"] == names[104 % 3]
    picture = image_from_text(red["picture"])
    assert picture.shape == (112, 112, 3)
    assert np.abs(picture.astype(int) - [255, 0, 0]).max() < 6
    mean = np.mean([np.mean(one["residual"]) for one in found["worst"]])
    assert 0.5 < mean < 3  # in units of a token's deviation


def two_students() -> dict:
    images = torch.rand(12, 3, 64, 64)
    observed = [
        Observed("t", tiny(depth=2), batches(images)),
        Observed("near", tiny(), []),
        Observed("a student of a long name", tiny(img_size=96), []),
    ]
    return analyze(observed, LEAST_SQUARES).numbers


def test_numbers_are_plain_and_the_figure_shows_them():
    numbers = two_students()
    assert json.loads(json.dumps(numbers)) == numbers
    assert (numbers["analysis"], numbers["teacher"]) == ("distillation-residual", "t")
    for width in (7.2, 3.7):
        figure = draw(numbers, width=width)
        curves, *rest = figure.axes
        for line, model in zip(curves.lines[:2], numbers["models"], strict=True):
            expected = sorted((100 * one for one in model["by_channel"]), reverse=True)
            assert list(line.get_ydata()) == pytest.approx(expected)
        pictures = [axes.images[0].get_array() for axes in rest if axes.images]
        for shown, model in zip(pictures[:2], numbers["models"], strict=True):
            np.testing.assert_allclose(shown, 100 * np.array(model["by_position"]))
        residuals = [one for one in pictures[2:] if one.shape == (4, 4)]
        listed = [one["residual"] for m in numbers["models"] for part in ("worst", "best") for one in m[part]]
        np.testing.assert_allclose(np.array(residuals), listed)
        titles = [axes.get_title(loc="center") for axes in rest if axes.get_title(loc="center")]
        first = numbers["models"][0]["worst"][0]["explained_variance"]
        assert titles[0] == f"{100 * first:.1f} %"
        assert len(titles) == 8
    title, rows = summary(numbers)
    assert title.endswith("of t")
    assert rows[1][0] == "near"
    assert rows[1][1] == f"{100 * numbers['models'][0]['explained_variance']:.1f} %"


def test_scalars_leave_out_what_was_not_compared():
    model = {"explained_variance": 0.5, "class_token_between_images": 0.25}
    assert list(scalars(model).values()) == [50, 25]
    assert list(scalars(model | {"class_token_between_images": None}).values()) == [50]


def test_bad_input_is_refused():
    images = torch.rand(12, 3, 64, 64)
    teacher, student = Observed("t", tiny(), batches(images)), Observed("s", tiny(), [])
    with pytest.raises(ConfigError, match="needs a model"):
        analyze([], LEAST_SQUARES)
    with pytest.raises(ConfigError, match="sets students against a teacher; t is alone"):
        analyze([teacher], LEAST_SQUARES)
    with pytest.raises(DataError, match="no images to observe t on"):
        analyze([Observed("t", tiny(), []), student], LEAST_SQUARES)
    with pytest.raises(DataError, match="give 17 tokens: too few for a map of 24 channels"):
        analyze([teacher, student], DistillationResidualConfig(num_images=2))
    with pytest.raises(DataError, match="a single image to fit on cannot tell"):
        analyze([teacher, Observed("s", tiny(embed_dim=12), [])], DistillationResidualConfig(num_images=2))
    with pytest.raises(DataError, match="of 5 images, none is left to fit a map on"):
        analyze([teacher, student], DistillationResidualConfig(num_images=5, fit_ratio=0.1))
    constant = tiny()
    with torch.no_grad():
        constant.network.norm.weight.zero_()
    with pytest.raises(NumericsError, match="alike in all images: there is nothing to explain"):
        analyze([Observed("t", constant, batches(images)), student], LEAST_SQUARES)
    with torch.no_grad():
        constant.network.norm.bias[0] = math.inf
    with pytest.raises(NumericsError, match="final tokens of broken are not finite"):
        analyze([teacher, Observed("broken", constant, [])], LEAST_SQUARES)
