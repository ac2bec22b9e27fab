"""The page of `fdkit demo`: what was distilled, how well it worked, and what that does and does not show."""

import json
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fdkit import __version__
from fdkit.analysis._analysis import Analysis
from fdkit.data.sources import ImageSource
from fdkit.report.figures import accuracy_bars, training_curves
from fdkit.report.page import Column, Details, Section, Table, picture, thumbnail, write_page
from fdkit.training.progress import duration

NUM_THUMBNAILS = 12


class Measured(NamedTuple):
    """The accuracies of one kind of features; empty if the images have no labels."""

    name: str
    numbers: dict[str, Any]


class Story(NamedTuple):
    """Everything the page tells."""

    data: str
    teacher: str
    images: ImageSource
    run: Path
    """The run folder of the student."""
    measured: list[Measured]
    distances: Analysis
    split_note: str
    seconds: float


def write_story(path: Path, story: Story) -> Path:
    """Write the page and return its path."""
    facts = json.loads((story.run / "run.json").read_text())
    rows = [json.loads(line) for line in (story.run / "metrics.jsonl").read_text().splitlines()]
    training = [row for row in rows if "loss" in row]
    sections = [
        *_accuracy_sections(story),
        _image_section(story),
        _training_section(training),
        _attention_section(story),
        _meaning_section(story),
        _next_section(story),
    ]
    teacher = facts.get("teacher", {})
    return write_page(
        path,
        "A student from a teacher's features",
        lead=_lead(story, training),
        sections=sections,
        facts=[
            ("teacher", str(teacher.get("source", story.teacher))),
            ("teacher's licence", str(teacher.get("license", "unstated"))),
            ("images", f"{story.data}, {len(story.images):,} shown and measured on"),
            ("time", duration(story.seconds)),
            ("fdkit", __version__),
        ],
    )


def _lead(story: Story, training: list[dict[str, Any]]) -> str:
    """The result in two sentences."""
    by_name = {one.name: one.numbers for one in story.measured if one.numbers}
    explained = training[-1].get("explained_variance") if training else None
    learned = (
        f"The student explains {explained:.0%} of the variance of its teacher's features. "
        if explained
        else ""
    )
    if "student" not in by_name:
        return learned + "Without labels there is no accuracy to report."
    student, teacher, start = (by_name[name]["knn_top1"] for name in ("student", "teacher", "untrained"))
    return (
        f"{learned}Frozen, it classifies {student:.1%} of unseen images by their nearest neighbours: "
        f"{start:.1%} before training, {teacher:.1%} for the teacher."
    )


def _accuracy_sections(story: Story) -> list[Section]:
    rows = [one for one in story.measured if one.numbers]
    if not rows:
        return [Section("Accuracy", [story.split_note])]
    columns = [Column("features"), Column("kNN, k = 20", ".1%", "max"), Column("linear probe", ".1%", "max")]
    cells = [[one.name, one.numbers["knn_top1"], one.numbers["linear_top1"]] for one in rows]
    num_classes, num_images = rows[0].numbers["num_classes"], rows[0].numbers["num_test_images"]
    chance = 1 / num_classes
    caption = (
        f"Top-1 accuracy on {num_images:,} unseen images of {num_classes} classes; chance is {chance:.0%}."
    )
    bars = picture(
        partial(_bars, rows, chance),
        "Bars of the accuracies in the table above",
    )
    paragraphs = [
        "All networks are frozen: kNN only compares features, the probe trains one linear layer on them, its learning "
        "rate chosen on a part of the training images. Raw pixels are the row that a network has to beat, and "
        "the untrained network is the student before its first step."
    ]
    notes = [story.split_note] if story.split_note else []
    return [Section("Accuracy", paragraphs + notes, table=Table(columns, cells, caption), pictures=[bars])]


def _bars(rows: list[Measured], chance: float, width: float) -> Any:
    accuracies = {
        "kNN": [one.numbers["knn_top1"] for one in rows],
        "linear probe": [one.numbers["linear_top1"] for one in rows],
    }
    return accuracy_bars([one.name for one in rows], accuracies, width, chance=chance)


def _image_section(story: Story) -> Section:
    source = story.images
    places = np.random.default_rng(0).permutation(len(source))[:NUM_THUMBNAILS].tolist()
    gallery = [thumbnail(source.read(place), _label(source, place)) for place in places]
    words = ["Some of the images that were measured on."]
    if story.data == "demo":
        words = [
            "Handwritten digits in random hues, turned, scaled and shifted, made from data that scikit-learn carries. "
            "Plain digits would be no test: raw pixels solve them. Here it is the hue that makes them hard: from the "
            "luma alone, pixels would do far better. What a network has to find out, without a label, is that colour "
            "does not matter and shape does.",
        ]
    return Section("Images", words, gallery=gallery)


def _label(source: ImageSource, place: int) -> str:
    return "" if source.labels is None else source.classes[int(source.labels[place])]


def _training_section(training: list[dict[str, Any]]) -> Section:
    words = [
        "The student sees the same crop as the teacher and regresses the teacher's whitened features. The loss is "
        "smooth L1; the share of the features' variance that it explains is easier to read: 0 % is what a constant "
        "reaches, 100 % a copy of the teacher."
    ]
    figure = picture(partial(training_curves, training), "Loss and explained variance over training steps")
    columns = [Column("step", ",.0f"), Column("loss", ".4f"), Column("explained", ".1%")]
    cells = [[row["step"], row["loss"], row.get("explained_variance")] for row in training]
    return Section(
        "Training", words, pictures=[figure], details=[Details("The numbers", table=Table(columns, cells))]
    )


def _attention_section(story: Story) -> Section:
    words = [
        "How far each attention head looks, in pixels of the input, layer by layer. Heads that spread out in a layer "
        "do different work. The student's relative position bias starts at zero and is learned."
    ]
    figure = picture(
        story.distances.figure, "Mean attention distance of every head over depth, for each network"
    )
    models = story.distances.numbers["models"]
    columns = [Column("layer"), *(Column(model["name"], ".1f") for model in models)]
    depth = max(len(model["mean"]) for model in models)
    cells = [
        [str(layer + 1), *(m["mean"][layer] if layer < len(m["mean"]) else None for m in models)]
        for layer in range(depth)
    ]
    table = Table(columns, cells, "Mean over heads, in pixels.")
    return Section(
        "Attention distance", words, pictures=[figure], details=[Details("The numbers", table=table)]
    )


def _meaning_section(story: Story) -> Section:
    words = [
        "It shows that the path works on these images: a network that started from random weights learned from a "
        "teacher's features alone, without a label, and the accuracies say how much. A high share of explained "
        "variance is less than it seems, because much of the variance of features is the same in all images.",
        "It does not show that the student is better than its teacher. That is reported by the papers after "
        "fine-tuning on ImageNet and hundreds of epochs of distillation. One run with one seed says nothing "
        "about differences of a few points.",
    ]
    return Section("What this shows, and what it does not", words)


def _next_section(story: Story) -> Section:
    code = (
        "fdkit distill --teacher clip_vitb --data PATH_TO_IMAGES --output runs/mine\n"
        "fdkit evaluate knn runs/mine --data PATH_TO_IMAGES --k 10,20\n"
        "fdkit analyze attention-distance clip_vitb runs/mine --data PATH_TO_IMAGES"
    )
    return Section("The same with a real teacher and your own images", code=code)
