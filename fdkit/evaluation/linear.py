"""Linear probe of frozen features: multinomial logistic regression by SGD, all candidates trained at the same time.

A candidate is a learning rate, a weight decay and an input, the columns of the features it reads. Candidates are
trained together, on one pass over cached features or, with random views, on one forward of the network a step;
each ends as it would alone. The candidate is chosen on a validation split carved out of train; test is read once, at
the end, by the chosen one alone. The official protocols choose by test, or fix one learning rate.
By default: SGD with momentum, cosine learning rate to zero, standardised features, no augmentation, no bias decay.
Source: Chen et al. 2021 (MoCo v3) for SGD and its schedule; He et al. 2022 (MAE), appendix A.1, for LARS and features
normalised without scale and offset; Oquab et al. 2023 (DINOv2), appendix B.3, for a grid of heads on one pass.
"""

import logging
from typing import Annotated, Any, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fdkit.data.views import CropConfig, Share, Views
from fdkit.errors import ConfigError, DataError, NumericsError
from fdkit.evaluation._columns import ALL
from fdkit.evaluation._draws import validation_split
from fdkit.evaluation._metrics import (
    Metrics,
    accuracies,
    expected_calibration_error,
    hits_to_text,
    negative_log_likelihood,
    rank_of_label,
)
from fdkit.evaluation._probe import Candidate, Probe, ProbeConfig
from fdkit.evaluation._probe_data import (
    CachedImages,
    ProbeData,
    StreamedImages,
    of_all_ranks,
    scores_of,
)
from fdkit.evaluation._random_views import CropBoxes, random_views
from fdkit.evaluation._statistics import bootstrap_interval
from fdkit.evaluation._subject import Subject
from fdkit.evaluation.features import Features, paired
from fdkit.models.collectives import rank, world_size

log = logging.getLogger("fdkit")

SWEPT = ("lr", "weight_decay", "inputs")


class LinearConfig(ProbeConfig):
    """The candidates of a linear probe and how they are trained and chosen."""

    lr: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0), min_length=1
    )
    """Peak learning rates to try, for lr_reference_batch images a step."""
    weight_decay: tuple[Annotated[float, Field(ge=0)], ...] = Field((0.0,), min_length=1)
    """Weight decays to try with each learning rate; biases are not decayed."""
    inputs: tuple[str, ...] = Field((ALL,), min_length=1)
    """What the classifier reads, to try with each of these: all that was extracted; tokens of the last layer, such as
    cls+patches, or of the last four, cls:4; or grid, DINOv2's four."""
    augment: Literal["none", "crop"] = "none"
    """Features of the evaluation crop, made once; or of new random crops at every step, which takes a forward pass of
    the network each."""
    crop_scale: tuple[Share, Share] = (0.08, 1.0)
    """Smallest and largest share of the image's area that a random crop covers."""
    crop_boxes: CropBoxes = "redrawn"
    """What becomes of boxes larger than the image: redrawn as in torchvision, or clipped to it as in BYOL and MAE."""
    crop_interpolation: Literal["model", "bilinear", "bicubic"] = "model"
    """How random crops are resized; model: as the network's evaluation crop."""
    validation_ratio: float = Field(0.1, gt=0, lt=1)
    """Fraction of the training images of each class on which the candidate is chosen."""
    refit: bool = True
    """Whether the chosen candidate is trained again on all training images before it meets test; with random crops
    that takes as many forward passes again. A single candidate is trained once, on all of them."""

    @model_validator(mode="after")
    def _has_a_crop(self) -> Self:
        low, high = self.crop_scale
        if high < low:
            raise ConfigError(
                f"crop_scale ({low:g}, {high:g}) ends below its beginning", "write the smaller share first"
            )
        fields = LinearConfig.model_fields
        changed = [
            name
            for name in ("crop_scale", "crop_boxes", "crop_interpolation")
            if getattr(self, name) != fields[name].default
        ]
        if changed and self.augment == "none":
            raise ConfigError(f"{changed[0]} has no effect without random crops", "use --augment crop")
        return self


class Choice(NamedTuple):
    """The probe chosen without looking at test, and how it was chosen."""

    probe: Probe
    """Of a single classifier, K = 1."""
    candidate: Candidate
    """Its setting."""
    candidates: list[dict[str, Any]]
    """Of each candidate: lr, weight_decay, inputs, validation_top1 and validation_loss (both None if it diverged);
    empty if there was a single one and it was trained on everything."""
    num_fit: int
    """Images the candidates were trained on."""
    num_validation: int
    """Images they were compared on."""


def evaluate(train: Features, test: Features, config: LinearConfig) -> Metrics:
    """Accuracy on test of the probe chosen on a part of train; runs on the device of train.values.

    Returns {"evaluator", "top1", "top5" (of 5 classes or more), "interval" (of top1 over test images, 95 %), "ece",
    "nll", "lr", "weight_decay", "inputs", "validation_top1", "validation_loss" (both only if there was a choice),
    "candidates", "protocol", "hits" (which test images were right, see `hits_to_text`), "train", "test"}. Logs a
    warning if the choice stands at the edge of the learning rates
    tried. Raises DataError if there is one class, if no class has two images to compare candidates on, or test has
    classes that train lacks; ConfigError for inputs that the features do not have, or a batch of one in front of batch
    norm; NumericsError if a feature is not finite or all candidates diverge.
    """
    if config.augment != "none":
        raise ConfigError(
            f"augment is {config.augment}, but these features are made already",
            "use `fdkit evaluate`, or augment none",
        )
    train, test = paired(train, test)
    return _evaluated(CachedImages(train, config.inputs, config), test, config, is_shared=False)


def measure(subject: Subject, config: LinearConfig) -> Metrics:
    """What `evaluate` returns, of a model and its images, with random crops if they are asked for.

    Under torchrun each process trains some of the candidates and makes its share of the features, and all of them know
    the result, which does not hang on their number but for rounding. Raises what `evaluate` raises, and ConfigError
    for a batch that cannot be cut out of the images or into equal shares.
    """
    if config.augment == "none":
        train, test = paired(*subject.splits())
        return _evaluated(CachedImages(train, config.inputs, config), test, config, is_shared=True)
    data = StreamedImages(subject, _views(subject, config), config.inputs, config)
    _, test = paired(data.stand_in(), subject.features(subject.split).to(subject.device))
    return _evaluated(data, test, config, is_shared=True)


def choose(train: Features, config: LinearConfig) -> Choice:
    """The best candidate on a stratified validation split of train: highest accuracy, then lowest loss.

    A candidate whose weights are not finite cannot be chosen. Raises what `evaluate` raises of train.
    """
    return _choose(CachedImages(train, config.inputs, config), config, is_shared=False)


def _evaluated(data: ProbeData, test: Features, config: LinearConfig, *, is_shared: bool) -> Metrics:
    choice = _choose(data, config, is_shared=is_shared)
    scores = scores_of(choice.probe, test.values)
    ranks = rank_of_label(scores, test.labels)
    chosen = choice.candidate._asdict()
    compared = next((row for row in choice.candidates if chosen.items() <= row.items()), {})
    protocol = config.model_dump(mode="json", include=set(LinearConfig.model_fields) - set(SWEPT))
    return {
        "evaluator": "linear",
        **accuracies(ranks, len(data.classes)),
        "interval": list(bootstrap_interval(ranks == 0, seed=config.seed)),
        "ece": expected_calibration_error(scores.double().softmax(dim=1), test.labels),
        "nll": negative_log_likelihood(scores, test.labels),
        **(chosen | compared),
        "candidates": choice.candidates,
        "protocol": protocol | {"num_fit": choice.num_fit, "num_validation": choice.num_validation},
        "hits": hits_to_text(ranks == 0),
        "train": data.info,
        "test": test.info,
    }


def _choose(data: ProbeData, config: LinearConfig, *, is_shared: bool) -> Choice:
    """is_shared: whether all processes are here, so that each may train some of the candidates."""
    every = torch.arange(len(data.labels), device=data.labels.device)
    candidates = list(
        dict.fromkeys(
            Candidate(lr, decay, name)
            for name in data.columns
            for decay in config.weight_decay
            for lr in config.lr
        )
    )
    _refuse_one_class(data)
    if config.refit:
        data.refuse_batches(len(every))
        if len(candidates) == 1:
            return Choice(_refitted(data, candidates[0], every), candidates[0], [], len(every), 0)
    fit_rows, validation_rows = validation_split(data.labels, config.validation_ratio, seed=config.seed)
    if len(validation_rows) == 0:
        raise DataError(
            f"no class has two images among the {len(every)} training images: nothing to compare on",
            "add labelled images",
        )
    data.refuse_batches(len(fit_rows))
    own = candidates[rank() :: world_size()] if is_shared else candidates
    fitted = data.fit(own, fit_rows)
    compared = data.compare(fitted, validation_rows)
    if is_shared:
        compared = {one: row for part in of_all_ranks(compared) for one, row in part.items()}
    best = _best([(one, compared[one]) for one in candidates], config)
    if config.refit:
        probe = _refitted(data, best, every)
    else:
        probe = _fitted(fitted, best, is_shared=is_shared).to(every.device)
    table = [one._asdict() | compared[one] for one in candidates]
    return Choice(probe, best, table, len(fit_rows), len(validation_rows))


def _best(compared: list[tuple[Candidate, dict[str, Any]]], config: LinearConfig) -> Candidate:
    """Of the highest accuracy, then the lowest loss. Raises NumericsError if all diverged."""
    alive = [(one, row) for one, row in compared if row["validation_loss"] is not None]
    if not alive:
        lrs = ", ".join(f"{lr:g}" for lr in config.lr)
        raise NumericsError(
            f"the linear probe diverged at every learning rate tried: {lrs}", "add smaller ones"
        )
    best = min(alive, key=lambda pair: (-pair[1]["validation_top1"], pair[1]["validation_loss"]))[0]
    if len(config.lr) > 2 and best.lr in (min(config.lr), max(config.lr)):
        log.warning(
            "the best learning rate %g is the edge of those tried: a wider range may do better", best.lr
        )
    return best


def _refitted(data: ProbeData, candidate: Candidate, rows: Tensor) -> Probe:
    """The candidate trained on all images; every process trains it, which is quicker than to wait for one."""
    probe = data.fit([candidate], rows)[0]
    if not (probe.weight.isfinite().all() and probe.bias.isfinite().all()):
        raise NumericsError(
            f"the chosen {candidate} diverged on all of train", "try a smaller --lr, or --no-refit"
        )
    return probe


def _fitted(probes: list[Probe], candidate: Candidate, *, is_shared: bool) -> Probe:
    """The classifier of a candidate as it was compared, on every process."""
    own = next((probe.only(candidate) for probe in probes if candidate in probe.candidates), None)
    if not is_shared or world_size() == 1:
        assert own is not None, "the chosen candidate was fitted"
        return own
    found = of_all_ranks(None if own is None else own.to("cpu"))
    return next(probe for probe in found if probe is not None)


def _refuse_one_class(data: ProbeData) -> None:
    held = data.labels.unique().tolist()
    if len(held) == 1:
        raise DataError(
            f"all {len(data.labels)} training images are of class {data.classes[held[0]]}: nothing to tell apart",
            "put the images of each class in a folder of its own",
        )


def _views(subject: Subject, config: LinearConfig) -> Views:
    """The random view of the configuration, at the size the network wants."""
    want = subject.teacher.backbone.preprocessing
    low, high = config.crop_scale
    crop = CropConfig(
        image_size=want.image_size,
        min_scale=low,
        max_scale=high,
        interpolation=want.interpolation
        if config.crop_interpolation == "model"
        else config.crop_interpolation,
    )
    return random_views(config.crop_boxes, crop)
