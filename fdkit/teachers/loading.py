"""How a teacher is named and loaded."""

from typing import Literal

import torch

from fdkit.errors import ConfigError
from fdkit.models.regions import compile_teacher
from fdkit.teachers.building import with_preprocessing
from fdkit.teachers.model import load_model
from fdkit.teachers.request import Loaded, Request
from fdkit.teachers.teacher import Teacher


def load_teacher(
    name: str,
    *,
    image_size: int | None = None,
    pretrained: bool = True,
    architecture: str | None = None,
    checkpoint_key: str | None = None,
    mean: tuple[float, float, float] | None = None,
    std: tuple[float, float, float] | None = None,
    seed: int = 0,
    keep_head: bool = False,
    precision: Literal["fp32", "bf16"] = "fp32",
    compile: bool = False,
) -> Teacher:
    """The teacher a MODEL names.

    name: a short name of the catalog; `timm:NAME`, `open_clip:ARCH/TAG` or `hf:ORG/REPO`, each followed by
        `@REVISION` where another branch, tag or commit is meant than the newest; a file of weights (.safetensors,
        .pth, .pt, .bin, ...); a run folder, or one of its checkpoints (RUN/checkpoints/step-00000200); a folder from
        the hub; or `demo`.
    image_size: pixels the teacher is fed, None for its own size; position tables are resampled to it as the
        official code of its family does.
    pretrained: False builds catalog and library names with random weights, and says so loudly.
    architecture: for a file, the timm model, `open_clip:ARCH` or catalog name it belongs to; None recognises it.
    checkpoint_key: for a training checkpoint, which network of it, such as "student"; None is what the official
        code evaluates, or what the run exports.
    mean, std: statistics of RGB in [0, 1] in place of those known or assumed.
    seed: of random weights, so that a run with them can be repeated and resumed.
    keep_head: keep the model's own classifier (timm names and files of a named architecture; open_clip towers always
        have their projection), so that `backbone.logits` answers.
    precision: of the weights and the arithmetic; input statistics and resizing stay in float32.
    compile: compile the network's blocks with torch.compile, one graph for those alike, when they first run.
    Raises ConfigError for a name or size that cannot be, WeightsError for weights that are missing, damaged, unsafe,
    not finite, or of another architecture.
    """
    request = Request(
        name,
        image_size,
        pretrained,
        architecture,
        checkpoint_key,
        mean,
        std,
        seed,
        keep_head,
        precision,
        compile,
    )
    return load_audited(request)[1]


def load_audited(request: Request) -> tuple[Loaded, Teacher]:
    """The teacher asked for, and the account of how its weights were read; errors as for `load_teacher`."""
    if request.image_size is not None and request.image_size < 1:
        raise ConfigError(f"image size {request.image_size} is not a number of pixels")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(request.seed)
        loaded = load_model(request)
    backbone = loaded.backbone
    changes = {
        key: value for key, value in (("mean", request.mean), ("std", request.std)) if value is not None
    }
    if changes:
        backbone = with_preprocessing(backbone, changes)
    backbone.fold_statistics()
    teacher = Teacher(
        backbone,
        name=request.name,
        source=loaded.source,
        license=loaded.license,
        is_noncommercial=loaded.is_noncommercial,
        sha256=loaded.sha256,
        origin=loaded.origin,
    )
    if request.precision == "bf16":
        teacher = teacher.to(torch.bfloat16)
    if request.compile:
        compile_teacher(backbone.network, request.name)
    return loaded, teacher
