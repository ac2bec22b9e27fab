"""`fdkit finetune MODEL --data PATH`: a classifier from a pretrained model and labelled images."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import tyro
from pydantic import Field, model_validator

from fdkit.commands._classification import Images, Validation, class_logits, measure, open_images
from fdkit.commands._command import ModelOptions, default_output, resolve, write_result
from fdkit.commands._dry_run import dry_run
from fdkit.commands._monitor import build_monitor
from fdkit.commands._outcome import Outcome
from fdkit.commands._published import against_published, show_protocol
from fdkit.commands._training import TrainingCommand, train_and_draw
from fdkit.commands.distill import announce_terms, teacher_facts
from fdkit.config import Config, find_recipe, read_yaml, to_yaml, validate
from fdkit.data.loader import steps_per_epoch
from fdkit.data.sources import ImageSource
from fdkit.data.supervised_views import SupervisedViews, SupervisedViewsConfig
from fdkit.errors import ConfigError
from fdkit.evaluation._protocols import Protocol, find_protocol, refuse_changes
from fdkit.methods._method import Method
from fdkit.methods._timm_tower import as_timm
from fdkit.methods.supervised import Supervised, SupervisedConfig
from fdkit.models.classifier import build_classifier
from fdkit.models.libraries import load_backbone
from fdkit.teachers.catalog import CATALOG
from fdkit.teachers.loading import load_teacher
from fdkit.teachers.origin import pinned, recorded_revisions
from fdkit.teachers.teacher import Teacher
from fdkit.training.agreement import require_agreed_teachers
from fdkit.training.distributed import broadcast, current_world, local_device, process_group
from fdkit.training.export import export_student
from fdkit.training.loop import TrainConfig
from fdkit.training.monitor import Monitor
from fdkit.training.optimizer import OptimizerConfig
from fdkit.training.run import Run

log = logging.getLogger("fdkit")

RESULT = Path("results") / "finetune-test.json"
PREDICTIONS = Path("results") / "finetune-test-predictions.json"
"""The label and the prediction of every test image, to compare two runs image by image."""
BEST = "best"


class FinetuneTrainConfig(TrainConfig):
    """How long and how the loop trains; nothing here depends on the method."""

    epochs: float = Field(50, gt=0)
    """Passes over the images; parts of a pass are allowed."""
    batch_size: int = Field(256, gt=0)
    """Images an update, over all processes."""


class FinetuneOptimizerConfig(OptimizerConfig):
    """The optimiser and its learning-rate schedule (linear warm-up, then half a cosine, an update at a time)."""

    lr: float = Field(5e-4, gt=0)
    """Peak learning rate for a global batch of lr_reference_batch images."""
    lr_reference_batch: int | None = Field(256, gt=0)
    """lr, warmup_lr and min_lr are given for this batch size and scale with the real one; null: used as given."""
    layer_decay: float | None = Field(0.65, gt=0, le=1)
    """Each layer learns at this times the rate of the layer behind it, the head at the full rate; null: all do."""
    clip_grad: float | None = Field(5.0, gt=0)
    """Largest global gradient norm; longer gradients are scaled down to it; null: off."""
    warmup_epochs: float = Field(5, ge=0)
    """Epochs of linear warm-up from warmup_lr to lr."""
    warmup_lr: float = Field(0, ge=0)
    """Learning rate of the first update, before scaling by the batch size."""
    min_lr: float = Field(1e-6, ge=0)
    """Learning rate the cosine ends at, before scaling by the batch size."""


class FinetuneConfig(ModelOptions, TrainingCommand):
    """Fine-tune a model on labelled images; its run folder is a MODEL with a classifier.

    Example: fdkit finetune demo --data demo --train.epochs 2
    """

    ALIASES: ClassVar[dict[str, str]] = ModelOptions.ALIASES

    model: tyro.conf.Positional[str]
    """A catalog name, timm:NAME, open_clip:ARCH/TAG, hf:ORG/REPO, a checkpoint file, a run folder, or demo."""
    data: str
    """Labelled images: a folder with train/ and test/ (or val/) of class folders or of tar shards, digits, demo,
    torchvision:CIFAR10."""
    pretrained: bool = True
    """Whether weights are loaded; `--pretrained false` trains the same network from scratch, as a control."""
    test_split: str = "test"
    """What is measured on once, at the end: test (test/, else val/ or validation/), or the name of a folder."""
    validate_every_epochs: float = Field(1, ge=0)
    """Epochs between two measurements on images held out for validation; 0: none, and all of train is trained on."""
    validation_ratio: float = Field(0.1, gt=0, lt=1)
    """Share of the training images of each class held out for validation, where no folder is named."""
    validation_split: str | None = None
    """A split of the data's own to validate on, such as val; null: a part of train."""
    keep_best: bool = False
    """Keep the weights of the highest validation accuracy in RUN/best, and test and export them instead of the last."""
    protocol: str | None = None
    """Fine-tune as a published number was made, by name, such as mae-finetune: its recipe is pinned."""
    supervised: SupervisedConfig = SupervisedConfig()
    views: SupervisedViewsConfig = SupervisedViewsConfig()
    train: FinetuneTrainConfig = FinetuneTrainConfig()
    optim: FinetuneOptimizerConfig = FinetuneOptimizerConfig()

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        if self.keep_best and not self.validate_every_epochs:
            raise ConfigError(
                "keep_best needs a validation to choose by, and validate_every_epochs is 0",
                "use --validate-every-epochs 1, or --keep-best false",
            )
        if self.validation_split is not None and not self.validate_every_epochs:
            raise ConfigError(
                f"validation_split {self.validation_split} has no effect with validate_every_epochs 0",
                "use --validate-every-epochs 1, or leave it out",
            )
        return self


def config_class() -> type[Config]:
    """The configuration of the command."""
    return FinetuneConfig


def run(config: FinetuneConfig, *, handle_signals: bool = True) -> Outcome:
    """Train the classifier, measure it on the test images once, and leave both in the run folder."""
    if config.protocol:
        _refuse_another(find_protocol(config.protocol), config)
    if config.dry_run:
        return dry_run("finetune", config, lambda: prepared(config))
    folder = config.output or default_output("finetune", config.model)
    device = local_device(config.device)
    with (
        process_group(device, config.train.timeout_seconds) as world,
        Run.create(folder, to_yaml(config), resume=config.resume, overwrite=config.overwrite) as run,
    ):
        images = _open(config)
        per_epoch = steps_per_epoch(images.train, config.train.batch_size)
        with pinned(recorded_revisions(broadcast(run.facts, world))):
            teacher = load(config)
        if config.pretrained:
            announce_terms([teacher])
            facts = teacher_facts([teacher])
            require_agreed_teachers(facts, world, recorded=run.facts, folder=folder)
            run.update(**facts)
        else:
            _warn_from_scratch(config)
        method = build_method(config, teacher, images.classes)
        monitors = _monitors(config, images, folder, per_epoch)
        train_and_draw(method, images.train, run, config, device, monitors, handle_signals=handle_signals)
        if config.keep_best and run.writes:
            _take_best(method, folder / BEST)
            export_student(method, run)
        numbers = _test(config, method, images, run)
    return Outcome(numbers, lambda: _show(folder, numbers))


def prepared(config: FinetuneConfig) -> tuple[Method, ImageSource]:
    """The method at its first step, and its training images."""
    images = _open(config)
    return build_method(config, load(config), images.classes), images.train


def _open(config: FinetuneConfig) -> Images:
    return open_images(
        config.data,
        split=config.validation_split,
        ratio=config.validation_ratio,
        validates=config.validate_every_epochs > 0,
        test_split=config.test_split,
        seed=config.seed,
    )


def load(config: FinetuneConfig) -> Teacher:
    """The model to begin with; what stands for its weights is loaded for its network, also from scratch."""
    needs_weights = config.pretrained or not _is_named(config.model)
    return load_teacher(config.model, **{**config.loading(), "pretrained": needs_weights}, seed=config.seed)


def _is_named(model: str) -> bool:
    """Whether a model's network can be built from its name alone, without fetching its weights."""
    return model in CATALOG or model.partition(":")[0] in ("timm", "open_clip")


def _warn_from_scratch(config: FinetuneConfig) -> None:
    """Layer decay spares weights that are good already, and random ones would stay random."""
    if config.optim.layer_decay not in (None, 1) and current_world().is_main:
        log.warning(
            "from scratch with optim.layer_decay %g: the first layers hardly learn; --optim.layer-decay None for all "
            "at one rate",
            config.optim.layer_decay,
        )


def build_method(config: FinetuneConfig, teacher: Teacher, classes: tuple[str, ...]) -> Supervised:
    """The method at its first step: the model with a new head."""
    own = config.supervised
    student = build_classifier(
        as_timm(teacher.backbone),
        classes,
        pooling=own.pooling,
        drop_path=own.drop_path,
        per_block_bias=own.per_block_bias,
        head_std=own.head_std,
        head_scale=own.head_scale,
        keep_weights=config.pretrained,
        seed=config.seed,
    )
    views = SupervisedViews(config.views, image_size=student.image_size, mean=student.preprocessing.mean)
    return Supervised(student, views, own, num_classes=len(classes))


def _monitors(config: FinetuneConfig, images: Images, folder: Path, per_epoch: int) -> list[Monitor]:
    monitors: list[Monitor] = [
        *build_monitor(
            config.monitor,
            config.data,
            steps_per_epoch=per_epoch,
            loader=config.loader,
            source=images.train,
        )
    ]
    if images.validation is not None:
        validation = Validation(
            images.validation,
            images.classes,
            every_steps=max(1, round(config.validate_every_epochs * per_epoch)),
            loader=config.loader,
            best=folder / BEST if config.keep_best else None,
        )
        monitors.append(validation)
    return monitors


def _take_best(method: Supervised, folder: Path) -> None:
    """Put the best weights in place of the last in what is exported."""
    method.exported.network.load_state_dict(load_backbone(folder).network.state_dict())


def _test(config: FinetuneConfig, method: Supervised, images: Images, run: Run) -> dict[str, Any]:
    """Measure what was exported on the test images, on one process, and write it into the run folder."""
    world = current_world()
    numbers: dict[str, Any] = {}
    if world.is_main:
        logits = class_logits(method.exported, images.test, config.loader)
        numbers = {
            "evaluator": "finetune",
            "run": str(run.folder),
            "model": config.model,
            "pretrained": config.pretrained,
            **measure(logits.values, logits.labels, images.classes),
            "classes": list(images.classes),
            "num_train": len(images.train),
            "num_validation": 0 if images.validation is None else len(images.validation),
            "test": logits.info,
            "settings": config.model_dump(mode="json"),
        }
        if config.protocol:
            numbers["named_protocol"] = against_published(
                find_protocol(config.protocol), config.model, numbers
            )
        write_result(run.folder / RESULT, numbers)
        predicted = logits.values.argmax(dim=1)
        both = {"labels": logits.labels.tolist(), "predicted": predicted.tolist()}
        write_result(run.folder / PREDICTIONS, both)
    return broadcast(numbers, world)


def _refuse_another(protocol: Protocol, config: FinetuneConfig) -> None:
    """Raises ConfigError if the run would differ from the recipe that the protocol pins."""
    if protocol.command != "finetune":
        raise ConfigError(
            f"protocol {protocol.name} measures frozen features",
            f"fdkit evaluate {config.model} --protocol {protocol.name}",
        )
    pinned = read_yaml(find_recipe(protocol.choice, "finetune"))
    kept = validate(FinetuneConfig, {"model": config.model, "data": config.data, **pinned}, protocol.choice)
    refuse_changes(protocol._replace(fields=_flat(kept, pinned)), _flat(config, pinned))


def _flat(config: Config, fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values a configuration has for the (nested) fields named, as "optim.lr"."""
    found: dict[str, Any] = {}
    for name, inner in fields.items():
        value = getattr(config, name)
        if isinstance(value, Config):
            found |= _flat(value, inner, f"{prefix}{name}.")
        else:
            found[prefix + name] = list(value) if isinstance(value, tuple) else value
    return found


def _show(folder: Path, numbers: dict[str, Any]) -> None:
    top5 = f", top-5 {100 * numbers['top5']:.2f} %" if "top5" in numbers else ""
    print(
        f"{folder}: done; test accuracy {100 * numbers['top1']:.2f} %{top5} of {numbers['num_images']} images, "
        f"calibration error {numbers['calibration_error']:.3f}"
    )
    if "named_protocol" in numbers:
        show_protocol(numbers["named_protocol"])
    print(f"saved {folder / RESULT}")
    print(f"next: fdkit evaluate knn {folder} --data LABELLED_IMAGES")


def finetune(model: str | Path, data: str | Path, **fields: Any) -> dict[str, Any]:
    """The test accuracy of a fine-tuned model and where its run folder is; fields are those of its configuration.

    Example: fdkit.finetune("runs/a", "photos/", output="runs/b", train={"epochs": 10})["top1"]
    """
    protocol = fields.get("protocol")
    recipe = {"recipe": find_protocol(protocol).choice} if protocol else {}
    values = {"model": str(model), "data": str(data), **recipe, **fields}
    return run(resolve(FinetuneConfig, values, "finetune", ""), handle_signals=False).numbers
