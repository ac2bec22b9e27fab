import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from fdkit.errors import NumericsError
from fdkit.evaluation import _softmax_regression
from fdkit.evaluation._softmax_regression import Fit, _Problem, fit_path


def images(count: int = 157, num_classes: int = 5, width: int = 6, seed: int = 0, noise: float = 1.5):
    """Overlapping classes of unequal size; channels of very different means and scales."""
    random = torch.Generator().manual_seed(seed)
    centres = torch.randn(num_classes, width, generator=torch.Generator().manual_seed(99))
    chances = torch.arange(1, num_classes + 1).double()
    labels = torch.multinomial(chances, count, replacement=True, generator=random)
    values = centres[labels] + noise * torch.randn(count, width, generator=random)
    return values * torch.logspace(-1, 1, width) + torch.linspace(-3, 5, width), labels


def standardized(values: torch.Tensor, like: torch.Tensor) -> np.ndarray:
    like = like.double()
    return ((values.double() - like.mean(0)) / (like.var(0, correction=0) + 1e-6).sqrt()).numpy()


def objective(
    weight: np.ndarray, bias: np.ndarray, inputs: np.ndarray, labels: torch.Tensor, c: float
) -> float:
    """C * sum of losses + |weight|^2 / 2, an image at a time."""
    loss = 0.0
    for row, label in zip(inputs, labels.tolist(), strict=True):
        scores = weight @ row + bias
        loss += np.logaddexp.reduce(scores) - scores[label]
    return c * loss + 0.5 * float((weight**2).sum())


def in_standard_space(fit: Fit, values: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Weight and bias for standardised inputs, from those for features as they are."""
    mean, std = values.double().mean(0), (values.double().var(0, correction=0) + 1e-6).sqrt()
    return (fit.weight * std).numpy(), (fit.bias + fit.weight @ mean).numpy()


@pytest.mark.parametrize("standardize", [True, False])
def test_value_and_gradient_are_those_of_autograd(standardize):
    values, labels = images()
    problem = _Problem(values, labels, standardize=standardize)
    parameters = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    inputs = torch.from_numpy(standardized(values, values)) if standardize else values.double()
    weight, bias = parameters[:, :-1], parameters[:, -1]
    losses = torch.nn.functional.cross_entropy(inputs @ weight.T + bias, labels, reduction="sum")
    expected = (0.3 * losses + 0.5 * weight.square().sum()) / (0.3 * len(labels))
    expected.backward()
    value, gradient = problem.objective(parameters.detach().numpy().flatten(), 0.3)
    assert value == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(torch.from_numpy(gradient).view(5, 7), parameters.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("c", [1e-4, 0.01, 1.0, 50.0])
def test_optimum_and_predictions_are_scikit_learns(c):
    values, labels = images()
    others = images(401, seed=1)[0]
    inputs = standardized(values, values)
    oracle = LogisticRegression(C=c, tol=1e-10, max_iter=10_000).fit(inputs, labels.numpy())
    fit = fit_path(values, labels, 5, [c], tolerance=1e-8)[0]
    best = objective(oracle.coef_, oracle.intercept_, inputs, labels, c)
    found = objective(*in_standard_space(fit, values), inputs, labels, c)
    assert (found, fit.objective) == (pytest.approx(best, rel=1e-6), pytest.approx(best, rel=1e-6))
    expected = oracle.predict_proba(standardized(others, values))
    np.testing.assert_allclose(fit.scores(others).softmax(dim=1).numpy(), expected, atol=1e-4)
    assert np.array_equal(fit.scores(others).argmax(dim=1).numpy(), expected.argmax(axis=1))
    assert fit.converged
    assert fit.gradient <= 1e-8


def test_default_tolerance_is_within_a_millionth_of_the_optimum():
    values, labels = images()
    for c in (1e-4, 0.01, 1.0):
        near, exact = (fit_path(values, labels, 5, [c], **how)[0] for how in ({}, {"tolerance": 1e-10}))
        assert near.objective == pytest.approx(exact.objective, rel=1e-6)


def test_features_as_they_are_reach_scikit_learns_optimum_too():
    values, labels = images()
    inputs = values.double().numpy()
    oracle = LogisticRegression(C=0.05, tol=1e-10, max_iter=100_000).fit(inputs, labels.numpy())
    fit = fit_path(values, labels, 5, [0.05], standardize=False, tolerance=1e-8, max_iterations=10_000)[0]
    best = objective(oracle.coef_, oracle.intercept_, inputs, labels, 0.05)
    assert fit.objective == pytest.approx(best, rel=1e-6)
    assert np.array_equal(fit.scores(values).argmax(dim=1).numpy(), oracle.predict(inputs))


def test_plausible_wrong_objectives_end_elsewhere():
    values, labels = images()
    inputs, c = standardized(values, values), 0.01
    right = fit_path(values, labels, 5, [c])[0].objective
    shifted = np.c_[inputs, np.ones(len(inputs))]
    penalised_bias = LogisticRegression(C=c, tol=1e-10, max_iter=10_000, fit_intercept=False)
    penalised_bias.fit(shifted, labels.numpy())
    wrong = [(penalised_bias.coef_[:, :-1], penalised_bias.coef_[:, -1])]
    others = (c / 2, 2 * c, c / len(labels), c * len(labels))  # |w|^2 for |w|^2 / 2, a mean for a sum
    wrong += [in_standard_space(fit, values) for fit in fit_path(values, labels, 5, others)]
    for weight, bias in wrong:
        assert objective(weight, bias, inputs, labels, c) > right * (1 + 1e-4)


def test_a_path_finds_what_each_c_finds_alone_in_the_order_asked():
    values, labels = images()
    cs = [1.0, 1e-3, 0.1, 1e-3]
    path = fit_path(values, labels, 5, cs, tolerance=1e-9)
    for c, fit in zip(cs, path, strict=True):
        alone = fit_path(values, labels, 5, [c], tolerance=1e-9)[0]
        torch.testing.assert_close(fit.weight, alone.weight, rtol=1e-4, atol=1e-6)
    assert path[1] == path[3]
    assert path[0].objective > path[2].objective > path[1].objective


@pytest.mark.parametrize("budget", [1, 50, 1000])
def test_blocks_of_rows_join_up(monkeypatch, budget):
    values, labels = images()
    whole = fit_path(values, labels, 5, [0.1], tolerance=1e-9)[0]
    monkeypatch.setattr(_softmax_regression, "BLOCK_CPU", budget)
    parts = fit_path(values, labels, 5, [0.1], tolerance=1e-9)[0]
    torch.testing.assert_close(parts.weight, whole.weight, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(parts.scores(values), whole.scores(values), rtol=1e-6, atol=1e-6)


def test_a_class_without_images_is_never_the_answer():
    values, labels = images()
    shifted = labels + (labels >= 2).long()  # classes 0, 1, 3, 4, 5 of 6
    fit, plain = fit_path(values, shifted, 6, [0.1])[0], fit_path(values, labels, 5, [0.1])[0]
    probabilities = fit.scores(values).softmax(dim=1)
    assert (probabilities[:, 2] == 0).all()
    torch.testing.assert_close(probabilities[:, [0, 1, 3, 4, 5]], plain.scores(values).softmax(dim=1))


def test_stopping_early_is_said():
    values, labels = images()
    fit = fit_path(values, labels, 5, [10.0], max_iterations=3)[0]
    assert (fit.converged, fit.iterations) == (False, 3)
    assert fit.gradient > 1e-6


def test_a_file_gives_the_bits_that_memory_gives_and_twice_the_same(tmp_path):
    values, labels = images()
    stored = np.memmap(tmp_path / "values", dtype=np.float32, mode="w+", shape=tuple(values.shape))
    stored[:] = values.numpy()
    before = values.clone()
    plain, again, file = (
        fit_path(source, labels, 5, [0.1])[0] for source in (values, values, torch.from_numpy(stored))
    )
    for other in (again, file):
        assert torch.equal(other.weight, plain.weight)
        assert torch.equal(other.scores(values), plain.scores(values))
    assert torch.equal(values, before)


def test_a_constant_channel_does_no_harm():
    values, labels = images()
    widened = torch.nn.functional.pad(values, (0, 1), value=7.0)
    plain, wide = (fit_path(part, labels, 5, [0.1], tolerance=1e-9)[0] for part in (values, widened))
    torch.testing.assert_close(wide.scores(widened), plain.scores(values), rtol=1e-5, atol=1e-6)


def test_numbers_that_overflow_are_refused():
    values, labels = images()
    with pytest.raises(NumericsError, match="logistic regression with C 1 has an objective of"):
        fit_path(values * float("inf"), labels, 5, [1.0])
