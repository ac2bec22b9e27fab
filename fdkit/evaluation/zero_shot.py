"""Zero-shot accuracy: images are named by the class whose description is nearest, with nothing trained.

Descriptions are templates filled with class names, embedded by the CLIP model's own text tower and averaged; images
are embedded by the model itself, or by a student distilled from it. Templates, tokenizer and the averaging are
open_clip's own.
Source: Radford et al. 2021 (CLIP), section 3.1.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fdkit.config import Config
from fdkit.data.imagenet_variants import imagenet_wnids
from fdkit.errors import ConfigError
from fdkit.evaluation._joint_space import JointSpace, TextSource, centred, cosines, joint_space
from fdkit.evaluation._metrics import (
    Metrics,
    accuracies,
    expected_calibration_error,
    hits_to_text,
    per_class_accuracy,
    rank_of_label,
)
from fdkit.evaluation._statistics import bootstrap_interval
from fdkit.evaluation._subject import Subject
from fdkit.evaluation.features import class_names, labels_of
from fdkit.models.text import TextTower, build_text, text_state
from fdkit.teachers.files import read_file
from fdkit.teachers.hub import fetch_open_clip
from fdkit.teachers.official._layout import state_in
from fdkit.teachers.weights import load_whole

log = logging.getLogger("fdkit")

CLASSES_AT_ONCE = 10


class ZeroShotConfig(Config):
    """How classes are described."""

    class_names: Path | None = None
    """File with a class name a line, in the order of the class folders; left out, the folders' names with spaces for
    underscores and hyphens, and for ImageNet's ids the names CLIP was tested with."""
    templates: str = Field("openai", min_length=1)
    """Descriptions to average over: openai (CLIP's 80), simple (its 7 best), or your own with {} for the name."""
    seed: int = Field(0, ge=0)
    """Seed of random weights, for models built without their own."""

    @model_validator(mode="after")
    def _has_a_place_for_the_name(self) -> Self:
        if self.templates not in ("openai", "simple") and "{}" not in self.templates:
            raise ConfigError(
                f"templates {self.templates!r} is neither openai nor simple and has no {{}} for the class name",
                "such as --templates 'a photo of a {}.'",
            )
        return self


def measure(subject: Subject, config: ZeroShotConfig) -> Metrics:
    """Accuracy of the nearest description on the tested split.

    Returns {"evaluator", "top1", "interval", "hits" (see `hits_to_text`), "top5" (of 5 classes or more), "ece" (of the
    softmax at the model's own scale), "per_class", "classes" (the names described), "templates", "num_templates",
    "space", "text", "test"}.
    Raises DataError without labels, ConfigError for a model without a text tower or a wrong file of class names,
    WeightsError if the text tower's weights cannot be had.
    """
    subject.refuse_reading("zero-shot reads what is compared with the texts")
    source = subject.source(subject.split)
    labels_of(source)
    names = described(class_names(source), config.class_names)
    space = joint_space(subject, config)
    tower = load_text(space.text, is_random=space.is_random, seed=config.seed).to(subject.device).eval()
    templates = templates_of(config.templates)
    with torch.no_grad():
        texts = describe(tower, names, templates)
    images = space.read()
    scores = similarity(images.values, texts, space) * float(tower.logit_scale.detach().exp())
    labels = images.labels
    ranks = rank_of_label(scores, labels)
    return {
        "evaluator": "zero-shot",
        **accuracies(ranks, len(names)),
        "interval": list(bootstrap_interval(ranks == 0)),
        "hits": hits_to_text(ranks == 0),
        "ece": expected_calibration_error(scores.softmax(dim=1), labels),
        "per_class": per_class_accuracy(ranks == 0, labels, len(names)),
        "classes": list(names),
        "templates": config.templates,
        "num_templates": len(templates),
        "space": space.info | {"is_centred": space.is_centred},
        "text": {"architecture": space.text.arch, "tag": space.text.tag, "is_random": space.is_random},
        "test": images.info,
    }


def described(classes: Sequence[str], file: Path | None) -> tuple[str, ...]:
    """What to call the classes: the lines of a file, CLIP's names of ImageNet's ids, or the names made readable.

    Raises ConfigError for a file that cannot be read, has an empty line, or is not of one name a class.
    """
    if file is not None:
        return _names_in(file, len(classes))
    wnids = {wnid: position for position, wnid in enumerate(imagenet_wnids())}
    if all(name in wnids for name in classes):
        from open_clip import IMAGENET_CLASSNAMES

        return tuple(IMAGENET_CLASSNAMES[wnids[name]] for name in classes)
    return tuple(name.replace("_", " ").replace("-", " ").strip() for name in classes)


def templates_of(choice: str) -> list[Any]:
    """The templates of that name, as open_clip's builder takes them, or the one given."""
    import open_clip

    if choice == "openai":
        return list(open_clip.OPENAI_IMAGENET_TEMPLATES)
    if choice == "simple":
        return list(open_clip.SIMPLE_IMAGENET_TEMPLATES)
    return [lambda name: choice.replace("{}", name)]


def describe(tower: TextTower, names: Sequence[str], templates: Sequence[Any]) -> Tensor:
    """(K, E): the mean description of each class, of length 1."""
    import open_clip

    device = tower.logit_scale.device
    found = open_clip.build_zero_shot_classifier(
        tower, tower.tokenize, names, templates, num_classes_per_batch=CLASSES_AT_ONCE, device=device
    )
    return found.T.float().cpu()


def similarity(images: Tensor, texts: Tensor, space: JointSpace) -> Tensor:
    """Cosines (N, K) of images (N, E) and texts (K, E), float64. Raises ConfigError if their widths differ."""
    if images.shape[1] != texts.shape[1]:
        raise ConfigError(
            f"images have {images.shape[1]} numbers and texts of {space.text.arch} {texts.shape[1]}: they are not of "
            "one model",
            "use the open_clip model itself, open_clip:ARCH/TAG",
        )
    if space.is_centred:
        images, texts = centred(images.double()), centred(texts.double())
    return cosines(images, texts)


def load_text(source: TextSource, *, is_random: bool, seed: int) -> TextTower:
    """The text tower with its weights, or random ones.

    Raises ConfigError and WeightsError as `build_text`, `fetch_open_clip` and `load_whole` do.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tower = build_text(source.arch, quick_gelu=source.quick_gelu)
    if is_random:
        log.warning(
            "RANDOM WEIGHTS: the text tower of %s is built without its pretrained weights", source.arch
        )
        return tower
    path = source.file or fetch_open_clip(source.arch, source.tag, source.revision).path
    state = text_state(state_in(read_file(path), source=str(path)), source=str(path))
    load_whole(tower, state, source=str(path))
    return tower


def _names_in(file: Path, num_classes: int) -> tuple[str, ...]:
    try:
        lines = file.expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"class names: {file} cannot be read: {error}") from error
    names = [line.strip() for line in lines]
    while names and not names[-1]:
        names.pop()
    if len(names) != num_classes:
        raise ConfigError(
            f"{file} has {len(names)} class names, and the data has {num_classes} classes",
            "write one name a line, in the sorted order of the class folders",
        )
    if "" in names:
        raise ConfigError(f"{file}: line {names.index('') + 1} has no class name", "write one name a line")
    return tuple(names)
