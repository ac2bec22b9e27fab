import json

import numpy as np
import pydantic
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, top_k_accuracy_score

from fdkit.data.sources import open_source
from fdkit.data.subset import Subset
from fdkit.errors import ConfigError, DataError, NumericsError
from fdkit.evaluation._draws import folds, validation_split
from fdkit.evaluation._metrics import expected_calibration_error
from fdkit.evaluation._statistics import bootstrap_interval
from fdkit.evaluation.features import Features, extract_features
from fdkit.evaluation.logistic import LogisticConfig, choose, evaluate
from fdkit.teachers.loading import load_teacher

GRID = (1e-4, 1e-2, 1.0)


def blobs(count: int, *, num_classes: int = 7, width: int = 6, seed: int = 0, noise: float = 1.5) -> Features:
    """Overlapping classes; channels of very different means and scales, as features of networks have."""
    random = torch.Generator().manual_seed(seed)
    centres = torch.randn(num_classes, width, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(num_classes, (count,), generator=random)
    values = centres[labels] + noise * torch.randn(count, width, generator=random)
    values = values * torch.logspace(-1, 1, width) + torch.linspace(-3, 5, width)
    return Features(values, labels, tuple(f"c{index}" for index in range(num_classes)), {"source": "blobs"})


def oracle(train: Features, c: float) -> tuple[LogisticRegression, torch.Tensor, torch.Tensor]:
    """scikit-learn's classifier on standardised features, and their mean and scale."""
    values = train.values.double()
    mean, std = values.mean(0), (values.var(0, correction=0) + 1e-6).sqrt()
    model = LogisticRegression(C=c, tol=1e-9, max_iter=10_000)
    return model.fit(((values - mean) / std).numpy(), train.labels.numpy()), mean, std


def rows_of(train: Features, rows: torch.Tensor) -> Features:
    return train._replace(values=train.values[rows], labels=train.labels[rows])


def test_numbers_on_test_are_those_of_scikit_learn():
    train, test = blobs(211), blobs(157, seed=1)
    metrics = evaluate(train, test, LogisticConfig(c=(0.05,)))
    model, mean, std = oracle(train, 0.05)
    probabilities = model.predict_proba(((test.values.double() - mean) / std).numpy())
    labels = test.labels.numpy()
    hits = torch.from_numpy(probabilities.argmax(axis=1) == labels)
    assert metrics["top1"] == float(hits.double().mean())
    assert metrics["top5"] == pytest.approx(top_k_accuracy_score(labels, probabilities, k=5))
    assert metrics["nll"] == pytest.approx(log_loss(labels, probabilities), abs=1e-5)
    assert metrics["brier"] == pytest.approx(
        ((probabilities - np.eye(7)[labels]) ** 2).sum(1).mean(), abs=1e-5
    )
    expected = expected_calibration_error(torch.from_numpy(probabilities), test.labels)
    assert metrics["ece"] == pytest.approx(expected, abs=1e-4)
    assert metrics["interval"] == list(bootstrap_interval(hits))
    assert metrics["interval"][0] < metrics["top1"] < metrics["interval"][1]


def test_choice_is_the_best_of_scikit_learns_fits_on_the_validation_split():
    train, config = blobs(211), LogisticConfig(c=GRID, seed=3)
    fit_rows, held_rows = validation_split(train.labels, 0.1, seed=3)
    choice = choose(train, config)
    held = rows_of(train, held_rows)
    expected = []
    for row in choice.candidates:
        model, mean, std = oracle(rows_of(train, fit_rows), row["c"])
        inputs = ((held.values.double() - mean) / std).numpy()
        top1 = model.score(inputs, held.labels.numpy())
        loss = log_loss(held.labels.numpy(), model.predict_proba(inputs), labels=range(7))
        assert row["validation_top1"] == pytest.approx(top1)
        assert row["validation_loss"] == pytest.approx(loss, abs=1e-5)
        assert row["converged"]
        expected.append((-top1, loss, row["c"]))
    assert [row["c"] for row in choice.candidates] == list(GRID)
    assert choice.c == min(expected)[2]
    assert choice.num_validation == len(held_rows)


def test_cross_validation_counts_every_image_once():
    train, config = blobs(97), LogisticConfig(c=GRID, cross_validation=3, seed=2)
    fold = folds(train.labels, 3, seed=2)
    choice = choose(train, config)
    assert choice.num_validation == 97
    for row in choice.candidates:
        hits, loss = 0, 0.0
        for number in range(3):
            model, mean, std = oracle(rows_of(train, fold != number), row["c"])
            held = rows_of(train, fold == number)
            probabilities = model.predict_proba(((held.values.double() - mean) / std).numpy())
            hits += int((probabilities.argmax(axis=1) == held.labels.numpy()).sum())
            loss += log_loss(held.labels.numpy(), probabilities, labels=range(7), normalize=False)
        assert row["validation_top1"] == pytest.approx(hits / 97)
        assert row["validation_loss"] == pytest.approx(loss / 97, abs=1e-5)
    best = min(choice.candidates, key=lambda row: (-row["validation_top1"], row["validation_loss"]))
    assert choice.c == best["c"]
    metrics = evaluate(train, blobs(40, seed=1), config)
    assert metrics["protocol"]["cross_validation"] == 3
    assert metrics["validation_top1"] == best["validation_top1"]


def test_of_equal_candidates_the_lower_loss_wins_and_not_the_order():
    train = blobs(150, noise=0.05)
    choice = choose(train, LogisticConfig(c=(1.0, 0.1, 10.0)))
    top1 = {row["validation_top1"] for row in choice.candidates}
    assert top1 == {1.0}
    assert choice.c == min(choice.candidates, key=lambda row: row["validation_loss"])["c"] == 10.0


def test_the_chosen_c_is_fitted_to_all_of_train():
    train, test = blobs(211), blobs(157, seed=1)
    metrics = evaluate(train, test, LogisticConfig(c=GRID))
    again = evaluate(train, test, LogisticConfig(c=(metrics["c"],)))
    for key in ("top1", "top5", "ece", "nll", "brier", "interval"):
        assert metrics[key] == again[key]
    part = rows_of(train, validation_split(train.labels, 0.1, seed=0)[0])
    assert evaluate(part, test, LogisticConfig(c=(metrics["c"],)))["nll"] != metrics["nll"]


def test_test_labels_cannot_influence_the_choice():
    train, test = blobs(120), blobs(80, seed=1)
    shuffled = test._replace(labels=test.labels.roll(11))
    honest, blind = (evaluate(train, part, LogisticConfig(c=GRID)) for part in (test, shuffled))
    assert blind["top1"] < honest["top1"]
    assert blind["candidates"] == honest["candidates"]
    assert blind["c"] == honest["c"]


def test_metrics_are_json_with_the_protocol():
    metrics = evaluate(blobs(120), blobs(40, seed=1), LogisticConfig(c=GRID))
    json.dumps(metrics, allow_nan=False)
    assert metrics["evaluator"] == "logistic"
    assert metrics["protocol"]["num_fit"] == 120
    assert 0 < metrics["protocol"]["num_validation"] < 24
    assert metrics["protocol"]["tolerance"] == 1e-6
    assert metrics["converged"]
    assert metrics["gradient"] <= 1e-6
    assert metrics["train"] == metrics["test"] == {"source": "blobs"}
    chosen = next(row for row in metrics["candidates"] if row["c"] == metrics["c"])
    assert metrics["validation_loss"] == chosen["validation_loss"]


def test_standardising_matters_and_can_be_left_out():
    train, test = blobs(211), blobs(157, seed=1)
    plain, raw = (
        evaluate(train, test, LogisticConfig(c=(0.01,), standardize=choice)) for choice in (True, False)
    )
    assert plain["nll"] != pytest.approx(raw["nll"], abs=1e-3)
    scaled = [part._replace(values=part.values * 8 - 3) for part in (train, test)]
    assert evaluate(*scaled, LogisticConfig(c=(0.01,)))["nll"] == pytest.approx(plain["nll"], abs=1e-5)


def test_runs_are_repeatable_and_the_same_from_a_file(tmp_path):
    train, test = blobs(120), blobs(80, seed=1)
    stored = []
    for name, part in (("train", train), ("test", test)):
        array = np.memmap(tmp_path / name, dtype=np.float32, mode="w+", shape=tuple(part.values.shape))
        array[:] = part.values.numpy()
        stored.append(part._replace(values=torch.from_numpy(array)))
    torch.manual_seed(1)
    first, state = evaluate(train, test, LogisticConfig(c=GRID)), torch.get_rng_state()
    torch.manual_seed(2)
    assert evaluate(train, test, LogisticConfig(c=GRID)) == first
    assert evaluate(*stored, LogisticConfig(c=GRID)) == first
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert evaluate(train, test, LogisticConfig(c=GRID, seed=1))["candidates"] != first["candidates"]


def test_stopping_early_is_said(caplog):
    with caplog.at_level("WARNING", "fdkit"):
        metrics = evaluate(blobs(120), blobs(40, seed=1), LogisticConfig(c=(1.0,), max_iterations=2))
    assert not metrics["converged"]
    assert metrics["gradient"] > 1e-6
    assert "logistic regression with C 1 stopped after 2 steps" in caplog.text


def test_best_c_at_the_edge_is_said_and_only_there(caplog):
    with caplog.at_level("WARNING", "fdkit"):
        choose(blobs(150, noise=0.05), LogisticConfig(c=(1e-3, 1e-2, 1e-1)))
    assert "the best C 0.1 is the edge of those tried" in caplog.text
    caplog.clear()
    with caplog.at_level("WARNING", "fdkit"):
        choose(blobs(150, noise=0.05), LogisticConfig(c=(1e-3, 1e-1)))
    assert caplog.text == ""


def test_one_image_a_class_needs_a_given_c():
    train = blobs(7)._replace(labels=torch.arange(7))
    with pytest.raises(DataError, match="no class has two images among the 7 training images"):
        evaluate(train, blobs(9), LogisticConfig())
    assert evaluate(train, blobs(9), LogisticConfig(c=(0.1,)))["candidates"] == []


def test_refusals_name_the_value():
    train, test = blobs(90), blobs(30, seed=1)
    with pytest.raises(
        ConfigError, match=r"validation_ratio is 0\.2, but cross_validation 5 chooses on folds"
    ):
        LogisticConfig(validation_ratio=0.2, cross_validation=5)
    for wrong in (
        {"c": ()},
        {"c": (0.0,)},
        {"cross_validation": 1},
        {"tolerance": 0.0},
        {"max_iterations": 0},
    ):
        with pytest.raises(pydantic.ValidationError):
            LogisticConfig(**wrong)
    with pytest.raises(DataError, match="all 90 training images are of class c2"):
        evaluate(train._replace(labels=torch.full((90,), 2)), test, LogisticConfig())
    with pytest.raises(DataError, match="classes without training images: zebra"):
        evaluate(train, test._replace(classes=(*test.classes[:-1], "zebra")), LogisticConfig())
    train.values[3, 2] = float("nan")
    with pytest.raises(NumericsError, match="1 of 90 training features are not finite"):
        evaluate(train, test, LogisticConfig())


@pytest.mark.slow
def test_a_pretrained_network_knows_real_photos(shared):
    """On a part of the photos at 96 pixels; on all of them at 224, C = 0.01 is chosen and right for 0.909 of test."""
    weights = next((shared / "weights/vit_tiny_patch16_224").glob("*.safetensors"))
    teacher, data = load_teacher(str(weights), image_size=96), str(shared / "data/clothing_small")
    parts = []
    for split, step in (("train", 4), ("test", 2)):
        whole = open_source(data, split)
        parts.append(extract_features(teacher, Subset(whole, range(0, len(whole), step))))
    metrics = evaluate(*parts, LogisticConfig())
    assert metrics["c"] == 0.01
    assert metrics["top1"] == pytest.approx(0.694, abs=0.02)
    assert metrics["interval"][0] < 0.694 < metrics["interval"][1]
