"""`fdkit distill --teacher clip_vitb --data PATH`: a better student from a pretrained teacher."""

from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import field_validator

from fdkit.commands._command import ModelOptions, Outcome, default_output, resolve
from fdkit.commands._training import TrainingCommand, run_training
from fdkit.config import Config
from fdkit.data.sources import ImageSource
from fdkit.data.views import CropConfig, RandomCrop
from fdkit.methods._method import Method
from fdkit.methods.feature_distillation import FeatureDistillation, FeatureDistillationConfig
from fdkit.models.attention import attention_path
from fdkit.models.student import StudentConfig, build_student
from fdkit.training.distributed import local_device
from fdkit.training.plan import choose_precision


class DistillConfig(ModelOptions, TrainingCommand):
    """Distil a pretrained teacher into a student that sees positions relatively and regresses whitened features.

    Example: fdkit distill --teacher demo --data demo --output runs/first
    """

    ALIASES: ClassVar[dict[str, str]] = {"--student": "--student.name"}

    teacher: str
    """A catalog name, timm:NAME, open_clip:ARCH/TAG, a checkpoint file, a run folder, or demo."""
    student: StudentConfig = StudentConfig()
    distillation: FeatureDistillationConfig = FeatureDistillationConfig()
    views: CropConfig = CropConfig()

    @field_validator("student", mode="before")
    @classmethod
    def _student_by_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


def config_class() -> type[Config]:
    """The configuration of the command."""
    return DistillConfig


def run(config: DistillConfig, *, handle_signals: bool = True) -> Outcome:
    """Train the student and leave it in the run folder."""
    folder = config.output or default_output("distill", config.teacher)

    def build(source: ImageSource) -> tuple[Method, dict[str, Any]]:
        wants_logits = config.distillation.target == "logits"
        teacher = config.load(config.teacher, seed=config.seed, keep_head=wants_logits)
        student = build_student(
            config.student, teacher.backbone, image_size=config.views.image_size, seed=config.seed
        )
        views = RandomCrop(config.views)
        method = FeatureDistillation(teacher, student, views, config.distillation, seed=config.seed)
        device = local_device(config.device)
        is_bf16 = choose_precision(config.train.precision, device) == "bf16"
        path = attention_path(device, torch.bfloat16 if is_bf16 else torch.float32)
        return method, {"teacher": teacher.identity(), "attention": path}

    return run_training(config, folder, build, handle_signals=handle_signals)


def distill(teacher: str | Path, data: str | Path, **fields: Any) -> Path:
    """The run folder of a finished distillation; fields are those of its configuration.

    Example: fdkit.distill("clip_vitb", "photos/", output="runs/a", train={"epochs": 10})
    """
    values = {"teacher": str(teacher), "data": str(data), **fields}
    config = resolve(DistillConfig, values, "distill", str(teacher))
    return Path(run(config, handle_signals=False).numbers["run"])
