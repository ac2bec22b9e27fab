"""How images come into the space a CLIP model shares with its texts, and which text tower that space belongs to.

A CLIP model projects its own images there. A student distilled from one is brought there by what its run keeps: the
projector that maps its tokens to what the teacher said. What is known of that depends on the whitening of the target.
none: the target itself. l2: the target but for its length, which no cosine asks for. layernorm: the target but for
its mean and spread over channels. Of logits, the mean is lost, so cosines are taken among vectors without their mean,
images and texts alike; of final tokens, both can be worked out from the teacher's own final norm, whose output has a
known mean and spread before its weight and bias. batch: the means and spreads of channels are those of batches, which
no run keeps, so the target cannot be recovered.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdkit.config import read_yaml
from fdkit.data.json_file import read_object
from fdkit.errors import ConfigError, WeightsError
from fdkit.evaluation._classifier import with_head
from fdkit.evaluation._subject import Subject
from fdkit.evaluation.features import Features
from fdkit.models.backbone import Backbone
from fdkit.models.libraries import HEADS_FILE
from fdkit.teachers.files import read_file
from fdkit.teachers.licensing import recorded_teachers
from fdkit.teachers.loading import load_teacher

RUN_FILES = ("config.yaml", "run.json", HEADS_FILE)
OF_TEACHER = ("architecture", "checkpoint_key", "image_size", "mean", "std", "pretrained", "seed")
"""What a distillation's configuration says of how its teacher is loaded."""

HOSTED_BY_BOTH = {
    "vit_base_patch16_clip_224.datacompxl": "ViT-B-16/datacomp_xl_s13b_b90k",
    "vit_large_patch14_clip_224.datacompxl": "ViT-L-14/datacomp_xl_s13b_b90k",
    "vit_base_patch16_clip_224.laion2b": "ViT-B-16/laion2b_s34b_b88k",
    "vit_large_patch14_clip_224.laion2b": "ViT-L-14/laion2b_s32b_b82k",
    "vit_huge_patch14_clip_224.laion2b": "ViT-H-14/laion2b_s32b_b79k",
    "vit_base_patch16_siglip_224.v2_webli": "ViT-B-16-SigLIP2/webli",
    "vit_large_patch16_siglip_256.v2_webli": "ViT-L-16-SigLIP2-256/webli",
    "vit_so400m_patch14_siglip_224.v2_webli": "ViT-SO400M-14-SigLIP2/webli",
    "vit_giantopt_patch16_siglip_256.v2_webli": "ViT-gopt-16-SigLIP2-256/webli",
    "eva02_base_patch16_clip_224.merged2b": "EVA02-B-16/merged2b_s8b_b131k",
    "eva02_large_patch14_clip_224.merged2b": "EVA02-L-14/merged2b_s4b_b131k",
    "eva02_large_patch14_clip_336.merged2b": "EVA02-L-14-336/merged2b_s6b_b61k",
    "vit_pe_core_tiny_patch16_384.fb": "PE-Core-T-16-384/meta",
    "vit_pe_core_small_patch16_384.fb": "PE-Core-S-16-384/meta",
    "vit_pe_core_base_patch16_224.fb": "PE-Core-B-16/meta",
    "vit_pe_core_large_patch14_336.fb": "PE-Core-L-14-336/meta",
    "vit_pe_core_gigantic_patch14_448.fb": "PE-Core-bigG-14-448/meta",
}
"""timm's image towers of models that open_clip has whole, by their names: what to use in their place. The libraries
state no repository in common for them, so a tower of one is not trusted with the texts of the other."""


class TextSource(NamedTuple):
    """The open_clip model whose text tower shares the space."""

    arch: str
    quick_gelu: bool | None
    """None is the architecture's own value."""
    tag: str = ""
    """Name of its weights; empty where `file` has them, or they are random."""
    file: Path | None = None
    revision: str | None = None
    """The commit of the repository that the image tower is of; None is its main branch."""


class JointSpace(NamedTuple):
    """Images in the space of a CLIP model's texts."""

    read: Callable[[], Features]
    """Vectors (N, E) of the tested images, of any length."""
    text: TextSource
    is_random: bool
    """Whether the model is built without its weights, and its texts must be as well."""
    is_centred: bool
    """Whether images are known but for their mean over channels, so that texts lose theirs."""
    info: dict[str, Any]
    """How images come into the space, as plain JSON."""


class TokenHead(NamedTuple):
    """What a CLIP image tower does with the class token of its last block."""

    norm: nn.LayerNorm
    projection: Tensor
    """(C, E)."""


def joint_space(subject: Subject, config: Any) -> JointSpace:
    """The joint space of a CLIP model, or of the CLIP teacher of a run folder's student.

    Raises ConfigError for a model without a text tower, and for a student that was not taught what leads there.
    """
    folder = Path(subject.teacher.source)
    if folder.is_dir() and all((folder / name).is_file() for name in RUN_FILES):
        run_config, teachers = run_of(folder)
        if "distillation" in run_config:
            return _of_student(subject, folder, run_config, teachers)
    identity = subject.teacher.identity()
    text = text_source(identity)
    answering = with_head(subject, config)
    return JointSpace(
        lambda: answering.features(answering.split),
        text,
        is_random=identity["sha256"] is None,
        is_centred=False,
        info={"images": "the model's own projection"},
    )


def run_of(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The configuration of a run folder, and what it says of its teachers. Raises ConfigError if it does not."""
    run_config = read_yaml(folder / "config.yaml")
    try:
        return run_config, recorded_teachers(read_object(folder / "run.json"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{folder / 'run.json'}: cannot be read: {error}", "put the run's own back"
        ) from error


def text_source(identity: dict[str, Any]) -> TextSource:
    """Where the text tower of a model is; identity: as `Teacher.identity` gives it.

    Raises ConfigError for a model that is no CLIP model of open_clip's, nor of timm's with the same weights there.
    """
    recipe, source, name = identity["recipe"], str(identity["source"]), identity["name"]
    revision = (identity.get("origin") or {}).get("revision")
    if recipe["library"] == "open_clip":
        quick_gelu = recipe["model_args"].get("quick_gelu")
        if source.startswith("open_clip:"):
            arch, _, tag = source.removeprefix("open_clip:").partition("/")
            return TextSource(arch, quick_gelu, tag, revision=revision)
        if Path(source).is_file():
            return TextSource(recipe["architecture"], quick_gelu, file=Path(source))
    timm_name = source.removeprefix("timm:") if source.startswith("timm:") else ""
    if timm_name and (twin := _open_clip_twin(timm_name)):
        return TextSource(twin[0], None, twin[1], revision=revision)
    if timm_name in HOSTED_BY_BOTH:
        raise ConfigError(
            f"{name} is timm's image tower alone, and nothing states that open_clip's text tower has the same weights",
            f"use open_clip:{HOSTED_BY_BOTH[timm_name]}, or its student",
        )
    raise ConfigError(
        f"{name} has no text tower that could name classes: it is no CLIP model of open_clip",
        "use open_clip:ARCH/TAG, such as open_clip:ViT-B-16/datacomp_xl_s13b_b90k, or its student",
    )


def _open_clip_twin(name: str) -> tuple[str, str] | None:
    """ARCH and TAG of the open_clip model whose weights are in the same repository as those of a timm model."""
    import open_clip
    import timm

    stated = timm.get_pretrained_cfg(name) if timm.is_model(name.partition(".")[0]) else None
    if stated is None or not stated.hf_hub_id or not stated.num_classes:
        return None
    for arch, tag in open_clip.list_pretrained():
        twin = open_clip.get_pretrained_cfg(arch, tag)
        has_quick_gelu = bool((open_clip.get_model_config(arch) or {}).get("quick_gelu"))
        is_same = str(twin.get("hf_hub") or "").rpartition("/")[0] == stated.hf_hub_id
        if is_same and has_quick_gelu == bool(twin.get("quick_gelu")) == ("quickgelu" in name):
            return arch, tag
    return None


def _of_student(
    subject: Subject, folder: Path, run_config: dict[str, Any], teachers: list[dict[str, Any]]
) -> JointSpace:
    """The space of the one teacher of a distillation, if its target leads there."""
    target, whitening = _checked_target(folder, run_config["distillation"], teachers)
    text = text_source(teachers[0])
    projector = _projector(folder)
    reading = subject.extraction._replace(pooling="patches" if target == "logits" else "cls", layers=1)
    student = Subject(subject.teacher, subject.data, subject.split, reading)
    finish: Callable[[Tensor], Tensor] = lambda prediction: prediction  # noqa: E731
    if target == "feature_map":
        finish = _finish_of_teacher(subject, run_config, whitening)

    def read() -> Features:
        found = student.features(student.split)
        with torch.no_grad():
            return found._replace(values=finish(projector(found.values.double())).float(), parts=())

    return JointSpace(
        read,
        text,
        is_random=teachers[0]["sha256"] is None,
        is_centred=target == "logits" and whitening == "layernorm",
        info={
            "images": "the student's projector" + (", then the teacher's head" * (target == "feature_map")),
            "teacher": teachers[0]["name"],
            "target": target,
            "whitening": whitening,
        },
    )


def _checked_target(
    folder: Path, distillation: dict[str, Any], teachers: list[dict[str, Any]]
) -> tuple[str, str]:
    """The target and its whitening. Raises ConfigError where they do not lead to the space of texts."""
    target, whitening = distillation["target"], distillation["whitening"]
    hint = "distil with --distillation.target logits"
    if len(teachers) != 1:
        raise ConfigError(
            f"{folder} was distilled from {len(teachers)} teachers: its texts could be of any of them",
            "distil from one CLIP model",
        )
    if target == "pooled":
        raise ConfigError(
            f"{folder} learned the mean of the teacher's patch tokens, which its projection does not read",
            hint,
        )
    if distillation["layer"] is not None or not distillation["norm"]:
        raise ConfigError(f"{folder} learned a layer that does not end the teacher", hint)
    if whitening == "batch":
        raise ConfigError(
            f"{folder} learned a target whitened over batches, whose means and variances no run keeps",
            "distil with --distillation.whitening layernorm, l2 or none",
        )
    return target, whitening


def _projector(folder: Path) -> nn.Linear:
    """The linear map of heads.safetensors, in float64. Raises WeightsError if it is not there."""
    state = read_file(folder / HEADS_FILE)
    if not {"projector.weight", "projector.bias"} <= state.keys():
        raise WeightsError(f"{folder / HEADS_FILE} holds no projector to the teacher")
    weight, bias = state["projector.weight"], state["projector.bias"]
    if weight.ndim != 2 or bias.shape != weight.shape[:1] or not weight.is_floating_point():
        raise WeightsError(
            f"{folder / HEADS_FILE}: its projector is no linear map", "copy the run folder again"
        )
    projector = nn.Linear(weight.shape[1], weight.shape[0], dtype=torch.float64)
    projector.load_state_dict({"weight": weight.double(), "bias": bias.double()})
    return projector


def _finish_of_teacher(
    subject: Subject, run_config: dict[str, Any], whitening: str
) -> Callable[[Tensor], Tensor]:
    """From a predicted, whitened class token to the joint space, as the teacher's own head does it."""
    if subject.teacher.num_prefix_tokens == 0:
        raise ConfigError(
            f"{subject.teacher.name} has no class token, and the teacher's projection reads nothing else",
            "distil with --distillation.target logits",
        )
    options = {key: run_config[key] for key in OF_TEACHER}
    teacher = load_teacher(run_config["teacher"], keep_head=True, **options)
    head = token_head(teacher.backbone)
    weight, bias = head.norm.weight.detach().double(), head.norm.bias.detach().double()
    projection = head.projection.double()
    if whitening == "layernorm":
        return lambda prediction: unwhitened(prediction, weight, bias) @ projection
    return lambda prediction: prediction @ projection


def token_head(backbone: Backbone) -> TokenHead:
    """The norm and projection of a CLIP ViT that ends in its class token. Raises ConfigError for other towers."""
    network: Any = backbone.network
    projection: Tensor | None = None
    if backbone.recipe["library"] == "open_clip":
        reads_token = getattr(network, "pool_type", "") == "tok" and not network.final_ln_after_pool
        norm = getattr(network, "ln_post", None)
        has_more = getattr(network, "attn_pool", None) is not None
        if isinstance(getattr(network, "proj", None), Tensor):
            projection = network.proj.detach()
    else:
        reads_token = getattr(network, "global_pool", "") == "token"
        norm = getattr(network, "norm", None)
        has_more = not isinstance(getattr(network, "fc_norm", nn.Identity()), nn.Identity)
        head = getattr(network, "head", None)
        if isinstance(head, nn.Linear) and (head.bias is None or not bool(head.bias.any())):
            projection = head.weight.detach().T
    if not reads_token or has_more or projection is None or not isinstance(norm, nn.LayerNorm):
        raise ConfigError(
            f"the head of {backbone.recipe['architecture']} is no linear map of its normed class token, so it cannot "
            "be applied to what a student predicts",
            "distil with --distillation.target logits",
        )
    return TokenHead(norm, projection)


def unwhitened(whitened: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The outputs z (N, C) of a LayerNorm with that weight and bias, of LayerNorm(z) without any.

    z is spread * whitened + mean, two unknowns a row. Before its weight and bias, the norm's output (z - bias) / weight
    has mean 0 and mean square 1 (to its epsilon), two equations: the first gives the mean, the second the spread.
    Raises ConfigError where these have no single answer: weights of zero, or biases that outweigh them.
    """
    if bool((weight.abs() < 1e-6 * weight.abs().amax()).any()):
        raise ConfigError("the teacher's final norm has weights of zero, so its scale cannot be recovered")
    inverse = 1 / weight
    slope = (whitened * inverse).mean(dim=1, keepdim=True) / inverse.mean()
    start = (bias * inverse).mean() / inverse.mean()
    # z = spread * (whitened - slope) + start, and (z - bias) / weight = spread * along + rest, both of mean 0.
    along, rest = (whitened - slope) * inverse, (start - bias) * inverse
    a, b, c = along.square().mean(dim=1), (along * rest).mean(dim=1), rest.square().mean() - 1
    if float(c) >= 0:
        raise ConfigError(
            "the biases of the teacher's final norm outweigh its weights, so its scale cannot be recovered",
            "distil with --distillation.target logits",
        )
    spread = (-b + (b.square() - a * c).sqrt()) / a  # the only positive root, since c is negative
    return spread[:, None] * (whitened - slope) + start


def centred(vectors: Tensor) -> Tensor:
    """Vectors (N, E) without their mean over channels."""
    return vectors - vectors.mean(dim=1, keepdim=True)


def cosines(images: Tensor, texts: Tensor) -> Tensor:
    """(N, K) of images (N, E) and texts (K, E), float64."""
    return F.normalize(images.double(), dim=1) @ F.normalize(texts.double(), dim=1).T
