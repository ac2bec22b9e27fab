import math

import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss

from fdkit.evaluation._metrics import (
    accuracies,
    brier_score,
    expected_calibration_error,
    hits_from_text,
    hits_to_text,
    negative_log_likelihood,
    per_class_accuracy,
    rank_of_label,
)


def predictions(count: int = 203, num_classes: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that lean to the true class and are too sure of themselves."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (count,), generator=random)
    scores = 3 * torch.randn(count, num_classes, generator=random)
    scores[torch.arange(count), labels] += 1.5
    return scores, labels


def naive_calibration_error(probabilities: torch.Tensor, labels: torch.Tensor, num_bins: int) -> float:
    """One bin and one image at a time."""
    error, rows = 0.0, list(zip(probabilities.double().tolist(), labels.tolist(), strict=True))
    for index in range(num_bins):
        held = [row for row in rows if index / num_bins < max(row[0]) <= (index + 1) / num_bins]
        if held:
            confidence = sum(max(p) for p, _ in held) / len(held)
            accuracy = sum(p.index(max(p)) == label for p, label in held) / len(held)
            error += len(held) / len(rows) * abs(accuracy - confidence)
    return error


def test_rank_counts_the_classes_before_the_true_one():
    scores = torch.tensor([[0.1, 0.7, 0.2], [0.1, 0.7, 0.2], [0.1, 0.7, 0.2]])
    assert rank_of_label(scores, torch.tensor([0, 1, 2])).tolist() == [2, 0, 1]


def test_of_equal_scores_the_lower_class_comes_first():
    scores = torch.tensor([[1.0, 2.0, 2.0, 2.0]] * 4)
    assert rank_of_label(scores, torch.tensor([0, 1, 2, 3])).tolist() == [3, 0, 1, 2]


def test_a_score_that_is_not_a_number_is_no_hit():
    scores = torch.tensor([[float("nan")] * 3, [0.0, float("nan"), 1.0]])
    assert rank_of_label(scores, torch.tensor([0, 1])).tolist() == [3, 3]


def test_rank_is_the_place_in_a_full_sort():
    scores, labels = torch.randn(50, 7), torch.randint(7, (50,))
    place = (scores.argsort(dim=1, descending=True) == labels[:, None]).int().argmax(dim=1)
    assert torch.equal(rank_of_label(scores, labels), place)


def test_accuracies_are_fractions_and_top5_needs_five_classes():
    ranks = torch.tensor([0, 4, 5, 0])
    assert accuracies(ranks, 10) == {"top1": 0.5, "top5": 0.75}
    assert accuracies(ranks, 4) == {"top1": 0.5}


def test_accuracy_of_each_class_is_that_of_its_own_images():
    hits, labels = torch.tensor([True, False, True, True, False]), torch.tensor([2, 2, 0, 2, 3])
    assert per_class_accuracy(hits, labels, 5) == [1.0, None, 2 / 3, 0.0, None]
    scores, labels = predictions()
    found = per_class_accuracy(rank_of_label(scores, labels) == 0, labels, 4)
    for label in range(4):
        own = labels == label
        assert found[label] == pytest.approx(accuracy_score(labels[own], scores[own].argmax(dim=1)))
    assert len(set(found)) > 1


def test_calibration_error_worked_by_hand():
    # Two bins: (0, 0.5] holds the first two images, mean confidence 0.45, accuracy 1/2;
    # (0.5, 1] holds the others, mean confidence 0.8, accuracy 1/3. ECE = 2/5 * 0.05 + 3/5 * (0.8 - 1/3).
    rows = [[0.5, 0.3, 0.2], [0.4, 0.3, 0.3], [0.1, 0.9, 0.0], [0.0, 0.3, 0.7], [0.8, 0.1, 0.1]]
    probabilities = torch.tensor(rows, dtype=torch.float64)
    labels = torch.tensor([0, 1, 1, 0, 2])
    expected = 0.4 * 0.05 + 0.6 * (0.8 - 1 / 3)
    assert expected_calibration_error(probabilities, labels, 2) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("num_bins", [1, 2, 7, 15])
def test_calibration_error_equals_a_naive_loop(num_bins):
    scores, labels = predictions()
    probabilities = scores.softmax(dim=1)
    expected = naive_calibration_error(probabilities, labels, num_bins)
    assert expected_calibration_error(probabilities, labels, num_bins) == pytest.approx(expected, abs=1e-12)
    assert expected > 0.02


def test_plausible_wrong_calibration_errors_answer_otherwise():
    scores, labels = predictions()
    probabilities = scores.double().softmax(dim=1)
    right = expected_calibration_error(probabilities, labels)
    own = probabilities.gather(1, labels[:, None])[:, 0]  # the probability of the label, not of the answer
    hits = (probabilities.argmax(dim=1) == labels).double()
    one_bin = float((hits.mean() - probabilities.amax(dim=1).mean()).abs())
    no_bins = float((hits - probabilities.amax(dim=1)).abs().mean())
    for wrong in (float((1 - own).mean()), one_bin, no_bins):
        assert abs(wrong - right) > 1e-3


def test_an_edge_belongs_to_the_bin_below_it():
    # 0.2 in the first fifth, 0.21 in the second: in one bin their gaps, -0.2 and 0.79, would cancel.
    probabilities = torch.tensor([[0.2] * 5, [0.21, 0.2, 0.2, 0.2, 0.19]], dtype=torch.float64)
    labels = torch.tensor([1, 0])
    assert expected_calibration_error(probabilities, labels, 5) == pytest.approx((0.2 + 0.79) / 2)


def test_perfect_and_hopeless_predictions_bound_the_scores():
    sure = torch.eye(3, dtype=torch.float64)
    right, wrong = torch.tensor([0, 1, 2]), torch.tensor([1, 2, 0])
    assert (expected_calibration_error(sure, right), expected_calibration_error(sure, wrong)) == (0.0, 1.0)
    assert (brier_score(sure, right), brier_score(sure, wrong)) == (0.0, 2.0)
    even = torch.full((3, 4), 0.25)
    assert brier_score(even, right) == pytest.approx(0.75)
    assert negative_log_likelihood(even.log(), right) == pytest.approx(math.log(4))


def test_likelihood_and_brier_score_equal_naive_sums():
    scores, labels = predictions()
    probabilities = scores.double().softmax(dim=1)
    assert negative_log_likelihood(scores, labels) == pytest.approx(log_loss(labels, probabilities), abs=1e-6)
    assert negative_log_likelihood(probabilities.log(), labels) == pytest.approx(
        log_loss(labels, probabilities), abs=1e-12
    )
    loss = 0.0
    for row, label in zip(probabilities.tolist(), labels.tolist(), strict=True):
        loss += sum((p - (c == label)) ** 2 for c, p in enumerate(row)) / len(labels)
    assert brier_score(probabilities, labels) == pytest.approx(loss, abs=1e-12)


def test_a_confident_mistake_has_a_finite_likelihood():
    assert negative_log_likelihood(torch.tensor([[500.0, -500.0]]), torch.tensor([1])) == pytest.approx(
        1000.0
    )


@pytest.mark.parametrize("count", [1, 8, 13])
def test_hits_come_back_from_their_text(count):
    hits = torch.arange(count) % 3 == 0
    assert torch.equal(hits_from_text(hits_to_text(hits), count), hits)
    with pytest.raises(ValueError, match=f"do not hold a bit for each of {count + 8} images"):
        hits_from_text(hits_to_text(hits), count + 8)
