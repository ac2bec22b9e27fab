"""`fdkit compare RUN --data PATH`: whether a distillation was worth it, beside what one would have done without it.

Controls: the teacher, frozen and fine-tuned directly by the same recipe, tuned as much; the student's own network,
untrained, and trained from scratch on as many images as distillation and fine-tuning saw together.
"""

import json
import logging
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import torch
import tyro
from pydantic import Field, model_validator
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fdkit.analysis._figure import save_figure
from fdkit.commands import finetune
from fdkit.commands._command import Command, default_output, resolve, write_result
from fdkit.commands._outcome import Outcome
from fdkit.commands.distill import DistillConfig
from fdkit.commands.finetune import PREDICTIONS, FinetuneConfig, FinetuneOptimizerConfig, FinetuneTrainConfig
from fdkit.config import Config, read_yaml, validate
from fdkit.data.json_file import read_object
from fdkit.data.loader import LoaderConfig
from fdkit.data.supervised_views import SupervisedViewsConfig
from fdkit.errors import ConfigError, OutputError
from fdkit.evaluation._classifier import make_classifier
from fdkit.evaluation._comparison import MEASURES, Candidate, Measure, table, verdict
from fdkit.evaluation._comparison import compare as compare_hits
from fdkit.evaluation._store import default_cache
from fdkit.evaluation._subject import Extraction, Subject
from fdkit.methods.supervised import SupervisedConfig
from fdkit.models.student import build_student
from fdkit.report.figures import comparison_intervals
from fdkit.teachers.loading import load_teacher
from fdkit.teachers.teacher import Teacher
from fdkit.training.distributed import current_world, local_device, process_group
from fdkit.training.run_files import read_metrics

log = logging.getLogger("fdkit")

Hits = dict[Candidate, dict[Measure, Tensor]]
NAMES: dict[Candidate, str] = {
    "student": "student",
    "teacher": "teacher",
    "untrained": "untrained",
    "scratch": "from scratch",
}


WATCHED = "monitor/validation_top1"


class CompareConfig(Command):
    """Set a distilled student beside its teacher and its own network without distillation, on labelled images.

    Example: fdkit compare runs/mine --data PATH --train.epochs 20
    """

    run: tyro.conf.Positional[str]
    """The run folder of a distillation."""
    data: str
    """Labelled images: a folder with train/ and test/ (or val/, validation/) of class folders, digits, or demo."""
    split: str = "test"
    """The split to measure on: test (the first of test/, val/, validation/ that is there) or a folder's name."""
    teacher: str | None = None
    """The teacher as a MODEL; left out, the one the run names."""
    frozen_only: bool = False
    """Compare frozen features alone, and fine-tune nothing."""
    lr_factors: tuple[Annotated[float, Field(gt=0)], ...] = Field((0.3, 1.0, 3.0), min_length=1)
    """Each fine-tuning is done with optim.lr times each of these, and the best on validation images counts: all
    candidates are tuned alike."""
    scratch_epochs: float | None = Field(None, gt=0)
    """Epochs from scratch; left out, as many images as distillation and fine-tuning saw together."""
    image_size: int | None = Field(None, ge=1)
    """Height and width of the fine-tuned networks' input in pixels; none means each one's own."""
    validate_every_epochs: float = Field(1, ge=0)
    """Epochs between two measurements on images held out of train, by the last of which a rate is chosen; 0: none, and
    all of train is trained on, at a single rate."""
    recipe: str | None = Field(default=None, exclude=True)
    """How to fine-tune: a YAML file, or a shipped recipe such as finetune/demo; flags win over it."""
    k: int = Field(20, ge=1)
    """Neighbours that vote in kNN."""
    temperature: float = Field(0.07, gt=0)
    """Divides cosine similarity in kNN's votes."""
    batch_size: int = Field(64, ge=1)
    """Images a forward pass of frozen networks."""
    supervised: SupervisedConfig = SupervisedConfig()
    views: SupervisedViewsConfig = SupervisedViewsConfig()
    train: FinetuneTrainConfig = FinetuneTrainConfig()
    optim: FinetuneOptimizerConfig = FinetuneOptimizerConfig()
    loader: LoaderConfig = LoaderConfig()
    output: Path | None = Field(default=None, exclude=True)
    """Folder for the table, the figure and the fine-tuned runs; what is finished in it is not done again."""

    @model_validator(mode="after")
    def _can_choose(self) -> Self:
        if not self.validate_every_epochs and len(self.lr_factors) > 1:
            raise ConfigError(
                f"{len(self.lr_factors)} lr_factors are to be tried, and validate_every_epochs 0 holds out no images "
                "to choose by",
                "use --validate-every-epochs 1, or a single --lr-factors 1",
            )
        return self


class Distillation(NamedTuple):
    """What a run folder says of a finished distillation."""

    folder: Path
    config: DistillConfig
    teacher: str
    loading: dict[str, Any]
    """How the teacher is loaded, as arguments of `load_teacher`; none for one that was named anew."""
    num_images: int
    """Images it saw, repetitions counted."""


def config_class() -> type[Config]:
    """The configuration of the command."""
    return CompareConfig


def run(config: CompareConfig) -> Outcome:
    """Measure the student and its controls, and say whether the distillation helped."""
    distillation = read_distillation(config)
    folder = config.output or default_output("compare", distillation.folder.name)
    hits = frozen_hits(config, distillation)
    budgets: dict[str, Any] = {}
    if not config.frozen_only:
        budgets = add_finetuned(hits, config, distillation, folder)
    comparisons = compare_hits(hits, seed=config.seed)
    numbers: dict[str, Any] = {
        "verdict": verdict(comparisons),
        "candidates": table(hits, seed=config.seed),
        "comparisons": [
            {
                "measure": one.measure,
                "control": one.control,
                "outcome": one.outcome,
                **one.gap._asdict(),
                "sentence": one.sentence(),
            }
            for one in comparisons
        ],
        "num_test": len(next(iter(hits["student"].values()))),
        "teacher": distillation.teacher,
        "distillation_images": distillation.num_images,
        "finetuning": budgets,
        "settings": config.model_dump(mode="json"),
    }
    if current_world().is_main:
        write_result(folder / "compare.json", numbers)
        save_figure(comparison_intervals(_rows(numbers)), folder / "compare")
    return Outcome(numbers, lambda: _show(numbers, folder))


def read_distillation(config: CompareConfig) -> Distillation:
    """What was distilled from what. Raises ConfigError if the folder is no distillation, or not a finished one."""
    folder = Path(config.run).expanduser()
    try:
        facts = read_object(folder / "run.json")
        values = read_yaml(folder / "config.yaml")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{config.run}: no run folder of a distillation ({error})",
            "give what `fdkit distill --output` made",
        ) from error
    recorded = facts.get("teacher")
    teacher = config.teacher or (recorded.get("source") if isinstance(recorded, dict) else None)
    if not isinstance(teacher, str) or "distillation" not in values:
        raise ConfigError(
            f"{config.run}: this run was not distilled from one teacher",
            "give the run folder of `fdkit distill`, or name one of its teachers with --teacher",
        )
    if not (folder / "student.safetensors").is_file():
        raise ConfigError(f"{config.run}: the distillation is not finished", "continue it with --resume")
    kind = validate(DistillConfig, values, str(folder / "config.yaml"))
    loading = {} if config.teacher else kind.loading()
    return Distillation(folder, kind, teacher, loading, _images_seen(folder, facts.get("derived")))


def _images_seen(folder: Path, derived: Any) -> int:
    """Images a run saw, by its run.json. Raises ConfigError if that does not tell."""
    stated = derived if isinstance(derived, dict) else {}
    num_steps, batch_size = stated.get("num_steps"), stated.get("batch_size")
    if type(num_steps) is not int or type(batch_size) is not int or min(num_steps, batch_size) < 1:
        raise ConfigError(
            f"{folder / 'run.json'}: does not tell how many images the distillation saw",
            "put the run's own run.json back",
        )
    return num_steps * batch_size


def frozen_hits(config: CompareConfig, distillation: Distillation) -> Hits:
    """Which test images student, teacher and untrained student name right, by kNN and logistic regression."""
    device = local_device(config.device)
    extraction = Extraction(device, batch_size=config.batch_size, loader=config.loader, cache=default_cache())
    hits: Hits = {}
    with process_group(device):
        teacher = load_teacher(distillation.teacher, **distillation.loading, seed=config.seed)
        models: dict[Candidate, Teacher] = {
            "student": load_teacher(str(distillation.folder)),
            "teacher": teacher,
            "untrained": untrained_student(distillation, teacher),
        }
        for candidate, model in models.items():
            log.info("frozen features of the %s", NAMES[candidate])
            subject = Subject(model, config.data, config.split, extraction)
            hits[candidate] = {kind: _frozen(subject, kind, config) for kind in ("knn", "logistic")}
    return hits


def untrained_student(distillation: Distillation, teacher: Teacher) -> Teacher:
    """The student before its first step, as the distillation drew it."""
    settings = distillation.config
    student = build_student(
        settings.student, teacher.backbone, image_size=settings.views.image_size, seed=settings.seed
    )
    return Teacher(student, name=f"{distillation.folder.name} before training")


def _frozen(subject: Subject, kind: Literal["knn", "logistic"], config: CompareConfig) -> Tensor:
    test = subject.features(subject.split)
    classifier = make_classifier(subject, _Settings(kind, config.k, config.temperature))
    answers = classifier.answer(test.values, torch.arange(len(classifier.classes)))
    names = [classifier.classes.index(name) for name in test.classes]
    return answers.predicted == torch.tensor(names)[test.labels]


class _Settings(NamedTuple):
    """As `make_classifier` reads them."""

    classifier: Literal["knn", "logistic"]
    k: int
    temperature: float


def add_finetuned(
    hits: Hits, config: CompareConfig, distillation: Distillation, folder: Path
) -> dict[str, Any]:
    """Fine-tune student and teacher, and train the student's network from scratch; says how each was tuned."""
    budgets: dict[str, Any] = {}
    for candidate in ("student", "teacher", "scratch"):
        epochs = _epochs(config, distillation, candidate, folder)
        runs = [
            _finetune(config, distillation, candidate, factor=factor, epochs=epochs, folder=folder)
            for factor in config.lr_factors
        ]
        best = max(runs, key=lambda one: one["validation_top1"]) if len(runs) > 1 else runs[0]
        predicted = json.loads((Path(best["run"]) / PREDICTIONS).read_text())
        right = torch.tensor(predicted["predicted"]) == torch.tensor(predicted["labels"])
        hits.setdefault(candidate, {})["finetune"] = right
        budgets[candidate] = {"epochs": epochs, "chosen": best, "tried": runs}
    return budgets


def _epochs(config: CompareConfig, distillation: Distillation, candidate: Candidate, folder: Path) -> float:
    """Epochs of a fine-tuning; from scratch, with those the distillation had, in images seen."""
    if candidate != "scratch":
        return config.train.epochs
    if config.scratch_epochs is not None:
        return config.scratch_epochs
    done = json.loads(next(folder.glob("student-*/results/finetune-test.json")).read_text())
    return config.train.epochs + distillation.num_images / done["num_train"]


def _finetune(
    config: CompareConfig,
    distillation: Distillation,
    candidate: Candidate,
    *,
    factor: float,
    epochs: float,
    folder: Path,
) -> dict[str, Any]:
    """One fine-tuning, continued where it stopped: its run folder, learning rate, and accuracies."""
    output = folder / f"{candidate}-lr{factor:g}"
    lr = config.optim.lr * factor
    of_teacher = candidate == "teacher"
    loading = distillation.loading if of_teacher else {"pretrained": candidate != "scratch"}
    if config.image_size is not None:
        loading = {**loading, "image_size": config.image_size}
    settings = FinetuneConfig(
        model=distillation.teacher if of_teacher else str(distillation.folder),
        **loading,
        data=config.data,
        test_split=config.split,
        output=output,
        resume=True,
        device=config.device,
        seed=config.seed,
        loader=config.loader,
        supervised=config.supervised,
        views=config.views,
        train=config.train.model_copy(update={"epochs": epochs}),
        validate_every_epochs=config.validate_every_epochs,
        optim=config.optim.model_copy(
            update={"lr": lr, "layer_decay": config.optim.layer_decay if candidate != "scratch" else None}
        ),
    )
    log.info("%s: %s, learning rate %g, %g epochs", output, NAMES[candidate], lr, epochs)
    numbers = finetune.run(settings, handle_signals=False).numbers
    watched = [row[WATCHED] for row in read_metrics(output) if row.get(WATCHED) is not None]
    if not watched and config.validate_every_epochs:
        raise OutputError(f"{output}: no validation accuracy to choose by", "remove the folder and run again")
    chosen_by = watched[-1] if watched else None
    return {"run": str(output), "lr": lr, "validation_top1": chosen_by, "top1": numbers["top1"]}


def _rows(numbers: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(name, measure -> its row) of each candidate, under people's names."""
    return [
        (
            NAMES[row["candidate"]],
            {MEASURES[measure]: row[measure] for measure in MEASURES if measure in row},
        )
        for row in numbers["candidates"]
    ]


def _show(numbers: dict[str, Any], folder: Path) -> None:
    """The table and the sentences, on one process alone."""
    if not current_world().is_main:
        return
    shown = [measure for measure in MEASURES if any(measure in row for row in numbers["candidates"])]
    table = Table(
        title=f"accuracy in % on {numbers['num_test']} test images, with 95 % intervals", title_justify="left"
    )
    table.add_column("")
    for measure in shown:
        table.add_column(MEASURES[measure], justify="right")
    for name, row in _rows(numbers):
        cells = [row.get(MEASURES[measure]) for measure in shown]
        table.add_row(name, *("" if cell is None else _cell(cell) for cell in cells))
    console = Console(markup=False, highlight=False)
    console.print(table)
    for comparison in numbers["comparisons"]:
        console.print(f"- {comparison['sentence']}")
    console.print(f"\n{numbers['verdict']}")
    console.print(f"saved {folder}/compare.json, compare.svg and compare.png")


def _cell(measured: dict[str, Any]) -> str:
    low, high = measured["interval"]
    return f"{100 * measured['top1']:.1f} ({100 * low:.1f}-{100 * high:.1f})"


def compare(run_folder: str | Path, data: str | Path, **fields: Any) -> dict[str, Any]:
    """The numbers of `fdkit compare`; fields are those of its configuration.

    Example: fdkit.compare("runs/mine", "photos/", train={"epochs": 20})["verdict"]
    """
    values = {"run": str(run_folder), "data": str(data), **fields}
    return run(resolve(CompareConfig, values, "compare", "")).numbers
