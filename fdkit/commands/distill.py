"""`fdkit distill --teacher clip_vitb --data PATH`: a better student from a pretrained teacher."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import field_validator, model_validator
from torch import Tensor

from fdkit.commands._command import ModelOptions, default_output, resolve
from fdkit.commands._dry_run import dry_run, refuse_dry_run
from fdkit.commands._outcome import Outcome
from fdkit.commands._teacher_cache import CacheRequest, TeacherCacheConfig, open_caches
from fdkit.commands._training import TrainingCommand, run_training
from fdkit.config import Config
from fdkit.data.loader import training_batches
from fdkit.data.sources import ImageSource, open_source
from fdkit.data.views import CropConfig, RandomCrop, Views
from fdkit.errors import ConfigError
from fdkit.methods._method import Method
from fdkit.methods.feature_distillation import (
    FeatureDistillation,
    FeatureDistillationConfig,
    check_targets,
)
from fdkit.models.fast_beit_attention import attention_facts
from fdkit.models.regions import compile_teacher
from fdkit.models.student import StudentConfig, build_student
from fdkit.teachers.licensing import UNSTATED
from fdkit.teachers.low_precision import quantise_checked, require_float8
from fdkit.teachers.teacher import Teacher
from fdkit.training.distributed import current_world, local_device
from fdkit.training.plan import choose_precision

logger = logging.getLogger("fdkit")

FLOAT8_IMAGES = 64
"""On how many images a teacher in float8 is compared with itself in bfloat16."""
OF_ONE_FILE = ("architecture", "checkpoint_key", "mean", "std")
"""Options that say what one file of weights does not tell."""


class DistillConfig(ModelOptions, TrainingCommand):
    """Distil a pretrained teacher into a student that sees positions relatively and regresses whitened features.

    Example: fdkit distill --teacher demo --data demo --output runs/first
    """

    ALIASES: ClassVar[dict[str, str]] = {
        **ModelOptions.ALIASES,
        "--student": "--student.name",
        "--teacher-cache": "--teacher-cache.folder",
    }

    teacher: str
    """A catalog name, timm:NAME, open_clip:ARCH/TAG, hf:ORG/REPO, a checkpoint file, a run folder, or demo; or
    several with commas between, where a student built like its teacher is like the first."""
    teacher_precision: Literal["fp32", "bf16", "fp8"] = "fp32"
    """Of the teacher's weights and arithmetic; the target is whitened in float32 whichever it is. fp8 takes a GPU that
    computes in it and torchao, and is refused where it changes what the teacher says."""
    teacher_compile: bool = False
    """Compile the teacher's blocks with torch.compile, one graph for those alike: a slow start, then faster steps."""
    student: StudentConfig = StudentConfig()
    distillation: FeatureDistillationConfig = FeatureDistillationConfig()
    views: CropConfig = CropConfig()
    teacher_cache: TeacherCacheConfig = TeacherCacheConfig()

    @property
    def teachers(self) -> list[str]:
        """The names of the teachers: one, unless there are commas between several; a path may hold commas."""
        if os.path.exists(os.path.expanduser(self.teacher)):  # unlike Path's, false for a name too long
            return [self.teacher]
        return [name.strip() for name in self.teacher.split(",")]

    @field_validator("student", mode="before")
    @classmethod
    def _student_by_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("teacher_cache", mode="before")
    @classmethod
    def _cache_by_folder(cls, value: Any) -> Any:
        return {"folder": str(value)} if isinstance(value, (str, Path)) else value

    @model_validator(mode="after")
    def _suits_its_teachers(self) -> Self:
        names = self.teachers
        if "" in names:
            raise ConfigError(f"teacher {self.teacher!r}: a name is missing between its commas")
        check_targets(self.distillation, names)
        if self.teacher_precision == "fp8" and self.teacher_cache.folder is not None:
            raise ConfigError(
                "teacher_precision fp8 and teacher_cache do not go together: a cached teacher runs once for each crop, "
                "and what it says is kept",
                "use --teacher-precision bf16 with the cache",
            )
        wrong = [option for option in OF_ONE_FILE if getattr(self, option) is not None]
        if len(names) > 1 and wrong:
            raise ConfigError(
                f"{wrong[0]} {getattr(self, wrong[0])} is of one file of weights, and {len(names)} teachers are named",
                "make a run folder or name a catalog teacher for each, or distil from one at a time",
            )
        return self


def one_line(teachers: str | Path | Sequence[str | Path]) -> str:
    """One teacher or several as one text, with commas between. Raises ConfigError for a comma in one of several."""
    if isinstance(teachers, (str, Path)):
        return str(teachers)
    names = [str(name) for name in teachers]
    if len(names) > 1 and any("," in name for name in names):
        raise ConfigError(
            f"teacher {names}: a path with a comma cannot be one of several", "rename the folder"
        )
    return ",".join(names)


def config_class() -> type[Config]:
    """The configuration of the command."""
    return DistillConfig


def run(config: DistillConfig, *, handle_signals: bool = True) -> Outcome:
    """Train the student and leave it in the run folder."""
    if config.dry_run:
        return dry_run("distill", config, lambda: prepared(_uncached(config)))
    folder = config.output or default_output("distill", config.teacher)
    return run_training(config, folder, lambda source: _build(config, source), handle_signals=handle_signals)


def prepared(config: DistillConfig) -> tuple[Method, ImageSource]:
    """The method at its first step, and its images."""
    source = open_source(config.data, "train")
    return _build(config, source)[0], source


def _uncached(config: DistillConfig) -> DistillConfig:
    """Without a teacher cache, of which two first steps read nothing, and a dry run writes none."""
    if config.teacher_cache.folder is not None:
        logger.info("a dry run leaves the teacher cache alone: the teacher runs in every step")
    return config.model_copy(update={"teacher_cache": TeacherCacheConfig()})


def _build(config: DistillConfig, source: ImageSource) -> tuple[Method, dict[str, Any]]:
    """The method at its first step, and what run.json is to say about it."""
    teachers, facts = load_teachers(config, source)
    announce_terms(teachers)
    student = build_student(
        config.student, teachers[0].backbone, image_size=config.views.image_size, seed=config.seed
    )
    device = local_device(config.device)
    is_bf16 = choose_precision(config.train.precision, device) == "bf16"
    views: Views = RandomCrop(config.views)
    cached = None
    if config.teacher_cache.folder is not None:
        request = cache_request(config, source, views, device, autocast=is_bf16)
        views, cached, facts["teacher_cache"] = open_caches(request, teachers)
    method = FeatureDistillation(
        teachers, student, views, config.distillation, seed=config.seed, cached=cached
    )
    dtype = torch.bfloat16 if is_bf16 else torch.float32
    return method, {**facts, **attention_facts(student.network, device, dtype)}


def load_teachers(config: DistillConfig, source: ImageSource) -> tuple[list[Teacher], dict[str, Any]]:
    """The teachers asked for, in the precision asked for, and what run.json says of them.

    Raises what `load_teacher` does, and for float8 what `quantise_checked` does, on crops of these images.
    """
    is_float8 = config.teacher_precision == "fp8"
    device = local_device(config.device)
    if is_float8:
        require_float8(device)
    teachers = [
        config.load(
            name,
            seed=config.seed,
            keep_head=config.distillation.target == "logits",
            precision="bf16" if is_float8 else config.teacher_precision,
            compile=config.teacher_compile and not is_float8,
        )
        for name in config.teachers
    ]
    facts = teacher_facts(teachers)
    if is_float8:
        images = _first_crops(config, source).to(device)
        facts["float8"] = {one.name: quantise_checked(one.to(device), images) for one in teachers}
        if config.teacher_compile:
            for one in teachers:
                compile_teacher(one.backbone.network, one.name)
    return teachers, facts


def _first_crops(config: DistillConfig, source: ImageSource) -> Tensor:
    """(B, 3, S, S) in [0, 1]: crops as training draws them, of up to FLOAT8_IMAGES images."""
    views = RandomCrop(config.views)
    loader = config.loader.model_copy(update={"workers": 0})
    size = min(FLOAT8_IMAGES, len(source))
    batches = training_batches(
        source, views, loader, batch_size=size, seed=config.seed, start_step=0, num_steps=1
    )
    batch = next(iter(batches))
    return views.finish(batch.crops, batch.colour)[0]


def cache_request(
    config: DistillConfig, source: ImageSource, views: Views, device: torch.device, *, autocast: bool
) -> CacheRequest:
    """What the configuration says about keeping the teachers' features of these images."""
    return CacheRequest(
        config=config.teacher_cache,
        distillation=config.distillation,
        crops=config.views,
        views=views,
        source=source,
        loader=config.loader,
        seed=config.seed,
        epochs=config.train.epochs,
        autocast=autocast,
        device=device,
        world=current_world(),
    )


def teacher_facts(teachers: Sequence[Teacher]) -> dict[str, Any]:
    """What run.json says of the teachers: "teacher" of one, "teachers" of several."""
    identities = [teacher.identity() for teacher in teachers]
    return {"teacher": identities[0]} if len(identities) == 1 else {"teachers": identities}


def announce_terms(teachers: Sequence[Teacher]) -> None:
    """Say, once and on one process alone, what the teachers' licences mean for the student."""
    if not current_world().is_main:
        return
    forbidding = [teacher for teacher in teachers if teacher.is_noncommercial]
    if forbidding:
        logger.warning(
            "non-commercial: %s; the student learns from these weights, so their licence may bind it too",
            ", ".join(f"{teacher.name} ({teacher.license})" for teacher in forbidding),
        )
    unstated = [teacher.name for teacher in teachers if teacher.license == UNSTATED]
    if unstated:
        logger.info("the licence of %s is unstated", ", ".join(unstated))


def distill(teacher: str | Path | Sequence[str | Path], data: str | Path, **fields: Any) -> Path:
    """The run folder of a finished distillation; fields are those of its configuration.

    teacher: one, or several for one student. Example:
    fdkit.distill("clip_vitb", "photos/", output="runs/a", train={"epochs": 10})
    """
    names = one_line(teacher)
    values = {"teacher": names, "data": str(data), **fields}
    config = resolve(DistillConfig, values, "distill", names)
    refuse_dry_run(config)
    return Path(run(config, handle_signals=False).numbers["run"])
