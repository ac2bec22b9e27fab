"""How a teacher is named and loaded."""

import torch

from fdkit.errors import ConfigError
from fdkit.teachers.model import Request, load_model, with_preprocessing
from fdkit.teachers.teacher import Teacher


def load_teacher(
    name: str,
    *,
    image_size: int | None = None,
    pretrained: bool = True,
    architecture: str | None = None,
    mean: tuple[float, float, float] | None = None,
    std: tuple[float, float, float] | None = None,
    seed: int = 0,
    keep_head: bool = False,
) -> Teacher:
    """The teacher a MODEL names.

    name: a short name of the catalog; `timm:NAME`; `open_clip:ARCH/TAG`; a file of weights (.safetensors, .pth,
        .pt, .bin); a run folder; or `demo`.
    image_size: pixels the teacher is fed, None for its own size; position embeddings are resampled to it.
    pretrained: False builds catalog and library names with random weights, and says so loudly.
    architecture: for a file, the timm model or `open_clip:ARCH` it belongs to; None recognises a plain ViT.
    mean, std: statistics of RGB in [0, 1] in place of those known or assumed.
    seed: of random weights, so that a run with them can be repeated and resumed.
    keep_head: keep the model's own classifier (timm names and files of a named architecture; open_clip towers always
        have their projection), so that `backbone.logits` answers.
    Raises ConfigError for a name or size that cannot be, WeightsError for weights that are missing, damaged, unsafe,
    not finite, or of another architecture.
    """
    if image_size is not None and image_size < 1:
        raise ConfigError(f"image size {image_size} is not a number of pixels")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        loaded = load_model(Request(name, image_size, pretrained, architecture, keep_head))
    backbone = loaded.backbone
    changes = {key: value for key, value in (("mean", mean), ("std", std)) if value is not None}
    if changes:
        backbone = with_preprocessing(backbone, changes)
    return Teacher(backbone, name=name, source=loaded.source, license=loaded.license, sha256=loaded.sha256)
