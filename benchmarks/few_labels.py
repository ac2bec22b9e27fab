"""How far few labels go on frozen features of a pretrained network and of an untrained one, and what the solver costs.

    python benchmarks/few_labels.py --model vit_tiny_patch16_224.safetensors --untrained timm:vit_tiny_patch16_224 \
        --data clothing_small --output benchmarks/results/few_labels_cpu.json

Features are extracted once; then every evaluator that is arithmetic on them runs, its CPU seconds beside its numbers.
The logistic regression is solved in turns with scikit-learn's, at the same C and tolerance on the same features.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

import fdkit
from fdkit.data.sources import open_source
from fdkit.evaluation import logistic, low_shot, prototype, retrieval
from fdkit.evaluation._softmax_regression import VARIANCE_FLOOR, fit_path
from fdkit.evaluation.features import Features, extract_features
from fdkit.training.run import environment

CS = (1e-4, 1e-2, 1.0)
TOLERANCE = 1e-6
REPEATS = 5
CLASSIFIERS: tuple[low_shot.LowShotConfig, ...] = (
    low_shot.LowShotConfig(),
    low_shot.LowShotConfig(classifier="prototype"),
    low_shot.LowShotConfig(classifier="knn"),
)


def main() -> None:
    arguments = read_arguments()
    torch.set_num_threads(1)
    results, features = {}, {}
    models = {
        "pretrained": fdkit.load_teacher(arguments.model),
        "untrained": fdkit.load_teacher(arguments.untrained, pretrained=False, seed=0),
    }
    for name, model in models.items():
        features[name] = [
            extract_features(model, open_source(arguments.data, split)) for split in ("train", "test")
        ]
        results[name] = measured(*features[name])
        print(name, json.dumps(results[name]["logistic"]), flush=True)
    record = {
        "environment": environment(),
        "arguments": {
            **vars(arguments),
            "model": Path(arguments.model).name,
            "data": Path(arguments.data).name,
        },
        "num_images": [len(part.values) for part in features["pretrained"]],
        "results": results,
        "solver": [against_sklearn(*features["pretrained"], c) for c in CS],
    }
    Path(arguments.output).write_text(json.dumps(record, indent=2) + "\n")


def measured(train: Features, test: Features) -> dict[str, Any]:
    """Every evaluator's numbers without the record of the features, and the CPU seconds it took."""
    tasks: dict[str, Callable[[], dict[str, Any]]] = {
        "logistic": lambda: logistic.evaluate(train, test, logistic.LogisticConfig()),
        "retrieval": lambda: retrieval.evaluate(train, test, retrieval.RetrievalConfig()),
        "retrieval-train": lambda: retrieval.evaluate(
            train, test, retrieval.RetrievalConfig(gallery="train")
        ),
    }
    for metric in ("cosine", "centred-cosine", "euclidean"):
        config = prototype.PrototypeConfig(metric=metric)
        tasks[f"prototype-{metric}"] = lambda config=config: prototype.evaluate(train, test, config)  # type: ignore[misc]
    for settings in CLASSIFIERS:
        tasks[f"low-shot-{settings.classifier}"] = lambda settings=settings: low_shot.evaluate(  # type: ignore[misc]
            train, test, settings
        )
    found = {}
    for name, task in tasks.items():
        started = time.process_time()
        numbers = task()
        seconds = time.process_time() - started
        kept = {key: value for key, value in numbers.items() if key not in ("train", "test")}
        found[name] = kept | {"cpu_seconds": seconds}
    return found


def against_sklearn(train: Features, test: Features, c: float) -> dict[str, Any]:
    """CPU seconds of both solvers in turns, their objectives, and whether they answer alike on test."""
    values = train.values.double()
    mean, scale = values.mean(dim=0), (values.var(dim=0, correction=0) + VARIANCE_FLOOR).rsqrt()
    inputs, labels = ((values - mean) * scale).numpy(), train.labels.numpy()
    ours, theirs = [], []
    for _ in range(REPEATS):
        started = time.process_time()
        fit = fit_path(train.values, train.labels, len(train.classes), [c], tolerance=TOLERANCE)[0]
        ours.append(time.process_time() - started)
        started = time.process_time()
        model = LogisticRegression(C=c, tol=TOLERANCE, max_iter=10_000).fit(inputs, labels)
        theirs.append(time.process_time() - started)
    queries = ((test.values.double() - mean) * scale).numpy()
    scores = inputs @ model.coef_.T + model.intercept_
    losses = np.logaddexp.reduce(scores, axis=1) - scores[np.arange(len(labels)), labels]
    same = model.predict(queries) == fit.scores(test.values).argmax(dim=1).numpy()
    return {
        "c": c,
        "tolerance": TOLERANCE,
        "objective": fit.objective,
        "objective_sklearn": float(c * losses.sum() + 0.5 * np.square(model.coef_).sum()),
        "same_answers": float(same.mean()),
        "iterations": fit.iterations,
        "iterations_sklearn": int(model.n_iter_[0]),
        "cpu_seconds": statistics.median(ours),
        "cpu_seconds_sklearn": statistics.median(theirs),
        "quartiles": [statistics.quantiles(times, n=4) for times in (ours, theirs)],
    }


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="file of the pretrained network, or a model's name")
    parser.add_argument("--untrained", required=True, help="name of the same network, for random weights")
    parser.add_argument("--data", required=True, help="folder with train/ and test/ of class folders")
    parser.add_argument("--output", required=True, help="JSON file for the numbers")
    return parser.parse_args()


if __name__ == "__main__":
    main()
