import torch

from fdkit.evaluation._metrics import accuracies, rank_of_label


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
