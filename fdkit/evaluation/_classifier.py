"""A classifier on a frozen model, fitted on clean training features or the model's own, to be shown other images."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from fdkit.data.imagenet_variants import imagenet_wnids
from fdkit.data.sources import ImageSource
from fdkit.errors import ConfigError, DataError
from fdkit.evaluation import knn, linear, logistic
from fdkit.evaluation._softmax_regression import fit_path
from fdkit.evaluation._subject import Subject
from fdkit.evaluation.features import Features, class_names
from fdkit.models.backbone import Backbone, Tokens
from fdkit.models.libraries import RECIPE_FILE, read_recipe
from fdkit.teachers.teacher import Teacher

Kind = Literal["logistic", "linear", "knn", "head"]
IMAGENET_CLASSES = 1000


class Answers(NamedTuple):
    """What a classifier says of N images when only some of its classes are allowed."""

    predicted: Tensor
    """(N,) int64, positions in all its classes; of equal scores, the lowest."""
    probabilities: Tensor | None
    """(N, K) over the allowed classes, in their order; None from neighbours' votes."""


class Classifier(NamedTuple):
    """Names the classes of images."""

    classes: tuple[str, ...]
    """Names of all classes it knows."""
    read: Callable[[ImageSource], Features]
    """Features, or the head's logits, of a source's images, on the CPU."""
    answer: Callable[[Tensor, Tensor], Answers]
    """Answers for features (N, D) when the classes at the given positions (K,), ascending, are allowed."""
    info: dict[str, Any]
    """How it was made, as plain JSON."""


class Settings(Protocol):
    """The fields of a configuration that say which classifier is made."""

    @property
    def classifier(self) -> Kind:
        """Its kind."""

    @property
    def k(self) -> int:
        """Neighbours that vote."""

    @property
    def temperature(self) -> float:
        """Of their votes."""


class Loads(Protocol):
    """What the command's configuration also has: the model's name, and the way to load it."""

    model: str
    seed: int

    def load(self, name: str, **options: Any) -> Teacher:
        """As `load_teacher`."""


def make_classifier(subject: Subject, settings: Settings) -> Classifier:
    """The classifier of that kind: a probe chosen and fitted on the training images, or the model's head.

    Raises DataError if the training images are of one class, ConfigError if the model has no head, or one whose
    classes are not known by name.
    """
    if settings.classifier == "head":
        subject.refuse_reading("the model's own head reads what it was made for")
        return _head(with_head(subject, settings), subject.source(subject.split))
    train = subject.features("train")
    if len(train.labels.unique()) < 2:
        raise DataError(
            f"all training images of {subject.data} are of one class: there is nothing to tell apart",
            "give a folder with two classes or more",
        )
    train = train.to(subject.device)
    if settings.classifier == "knn":
        return _neighbours(subject, train, settings.k, settings.temperature)
    return _probe(subject, train, settings.classifier)


def with_head(subject: Subject, config: Any) -> Subject:
    """The same subject with the model's own head as its features: logits, or CLIP's projected embedding.

    A model that was loaded without its head is loaded again. Raises ConfigError if it has none.
    """
    teacher = subject.teacher
    if teacher.backbone.logits_of is None and hasattr(config, "load"):
        loads = cast(Loads, config)
        teacher = loads.load(loads.model, seed=loads.seed, keep_head=True)
    if teacher.backbone.logits_of is None:
        raise ConfigError(
            f"{teacher.name} has no classifier of its own",
            "use --classifier logistic, or a model that was trained to classify or fine-tuned",
        )
    answering = Teacher(
        answers_as_tokens(teacher.backbone),
        name=teacher.name,
        source=teacher.source,
        license=teacher.license,
        is_noncommercial=teacher.is_noncommercial,
        sha256=teacher.sha256,
    )
    extraction = subject.extraction._replace(pooling="cls", layers=1)
    return Subject(answering, subject.data, subject.split, extraction)


def answers_as_tokens(backbone: Backbone) -> Backbone:
    """The same network, whose class token is what its head says, (B, 1, K), and which has no patch tokens.

    So answers are kept, shared among processes and read as features are, under a recipe of their own.
    """
    logits_of = backbone.logits_of
    assert logits_of is not None, "the caller has refused models without a head"

    def tokens_of(network: nn.Module, images: Tensor) -> Tokens:
        answers = logits_of(network, images)[:, None]
        return Tokens(answers, answers[:, :0], (0, 0))

    size = backbone.image_size
    blank = torch.zeros(1, 3, size, size, device=backbone.mean.device)
    with torch.no_grad():
        width = backbone.logits(blank).shape[1]
    return Backbone(
        backbone.network,
        tokens_of,
        embed_dim=width,
        patch_size=size,
        num_prefix_tokens=1,
        preprocessing=backbone.preprocessing,
        recipe={**backbone.recipe, "read": "logits"},
        logits_of=logits_of,
    )


def _head(subject: Subject, images: ImageSource) -> Classifier:
    """The model's own classifier, its classes named by the run it comes from, or by ImageNet's ids."""
    backbone = subject.teacher.backbone
    classes = _head_classes(subject.teacher, backbone.embed_dim, class_names(images))
    info = {"classifier": "head", "num_classes": len(classes)}
    return Classifier(classes, subject.features, _by_scores(lambda values: values), info)


def _head_classes(teacher: Teacher, width: int, wanted: tuple[str, ...]) -> tuple[str, ...]:
    """Names of the head's classes. Raises ConfigError if they are not those of the data."""
    recipe = teacher.backbone.recipe
    if "classes" not in recipe and (Path(teacher.source) / RECIPE_FILE).is_file():
        recipe = read_recipe(Path(teacher.source) / RECIPE_FILE)
    classes = tuple(recipe.get("classes") or ())
    if len(classes) != width:
        classes = imagenet_wnids() if width == IMAGENET_CLASSES else ()
    if set(wanted) & set(classes):
        return classes
    head = (
        "ImageNet's 1000 classes, named n01440764 and so on"
        if width == IMAGENET_CLASSES
        else f"{width} outputs"
    )
    raise ConfigError(
        f"the head of {teacher.name} has {head}, and the classes of the data are {', '.join(wanted[:5])}: "
        "they have no name in common",
        "use --classifier logistic, which learns the data's own classes",
    )


def _probe(subject: Subject, train: Features, kind: Literal["logistic", "linear"]) -> Classifier:
    """A linear classifier by its evaluator's own rules, chosen on a part of train and fitted on all of it."""
    if kind == "logistic":
        settings = logistic.LogisticConfig()
        c = logistic.choose(train, settings).c
        (fitted,) = fit_path(train.values, train.labels, len(train.classes), [c])
        info = {"classifier": kind, "c": c, "converged": fitted.converged}
        weight, bias = fitted.weight, fitted.bias
    else:
        choice = linear.choose(train, linear.LinearConfig())
        weight, bias = choice.probe.weight[0], choice.probe.bias[0]
        info = {"classifier": kind, **choice.candidate._asdict()}
    weight, bias = weight.double().cpu(), bias.double().cpu()
    info |= {"num_classes": len(train.classes), "num_train": len(train.labels)}
    score = _by_scores(lambda values: values.double() @ weight.T + bias)
    return Classifier(train.classes, subject.features, score, info)


def _neighbours(subject: Subject, train: Features, k: int, temperature: float) -> Classifier:
    """The vote of the nearest training images of the allowed classes."""

    def answer(values: Tensor, allowed: Tensor) -> Answers:
        rows = torch.isin(train.labels.cpu(), allowed).to(train.values.device)
        bank = train._replace(values=train.values[rows], labels=train.labels[rows])
        found = knn.predict(bank, values.to(train.values.device), k=k, temperature=temperature)
        return Answers(found.cpu(), None)

    info = {"classifier": "knn", "k": k, "temperature": temperature, "num_classes": len(train.classes)}
    return Classifier(train.classes, subject.features, answer, info)


def _by_scores(score: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Answers]:
    def answer(values: Tensor, allowed: Tensor) -> Answers:
        scores = score(values)[:, allowed]
        best = (scores == scores.amax(dim=1, keepdim=True)).int().argmax(dim=1)
        return Answers(allowed[best], scores.softmax(dim=1))

    return answer
