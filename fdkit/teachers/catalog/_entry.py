"""What a row of the catalog says."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from fdkit.teachers.licensing import forbids_commerce

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)

PERMISSIVE = frozenset({"apache-2.0", "bsd-2-clause", "bsd-3-clause", "cc-by-4.0", "cc0-1.0", "isc", "mit"})
"""Licences that allow any use against a notice at most. One with terms of its own (dinov3-license, apple-ascl,
nvidia-open-model-license) is none of these, nor non-commercial unless it says so: it is to be read."""


class Official(NamedTuple):
    """The file the authors published, and what it is."""

    layout: str
    """Which of the layouts in `fdkit.teachers.official` it is written in."""
    architecture: str
    """The timm model its weights belong in."""
    url: str = ""
    """Its documented address; empty where the page gives none that lasts."""
    model_args: Mapping[str, Any] = MappingProxyType({})
    """What that timm model has to be built with."""
    sha256: str | None = None
    """Published SHA-256 in hex, or as many of its first digits as are published."""
    md5: str | None = None
    """Likewise, where MD5 is what the authors published."""
    checkpoint_key: str | None = None
    """Which of several networks in the file is meant; None if there is one, or the layout's own choice is right."""
    page: str = ""
    """Where the authors document the file."""


class Entry(NamedTuple):
    """One teacher: adding it is adding a row; a name once given never changes its model."""

    name: str
    architecture: str
    """For people, such as ViT-B/16."""
    model: str
    """The model in long form, `timm:NAME` or `open_clip:ARCH/TAG`; empty if only the authors' own file exists."""
    patch_size: int
    """Input pixels between neighbouring final tokens."""
    embed_dim: int
    """Width of the final tokens."""
    family: str
    """One word, such as dinov2; the first part of the name, mostly."""
    license: str
    """Of the weights, in the hub's spelling: an SPDX name in lower case where there is one, or "unstated"."""
    paper: str
    """arXiv number."""
    image_size: int = 224
    """Height and width in pixels the teacher is fed by default: what its weights were made for, but for DINOv2."""
    num_prefix_tokens: int = 1
    """Class and register tokens before the patches."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Of RGB in [0, 1], as the network expects it."""
    std: tuple[float, float, float] = IMAGENET_STD
    published: Mapping[str, float] = MappingProxyType({})
    """Top-1 accuracy on ImageNet-1K as the authors state it, a fraction: `linear` and `knn` on frozen features,
    `finetune` after fine-tuning, `supervised` of the classifier the weights were trained with, `zeroshot` by text
    prompts, `linear_real` linear on the ReaL labels."""
    published_source: str = ""
    """Where these figures stand."""
    official: Official | None = None
    note: str = ""
    """What to know before using it."""

    @property
    def is_noncommercial(self) -> bool:
        """Whether the licence forbids commercial use of the weights; one that allows research alone does."""
        return forbids_commerce(self.license)

    @property
    def is_permissive(self) -> bool:
        """Whether the licence allows any use against a notice at most."""
        return self.license.lower() in PERMISSIVE

    def to_json(self) -> dict[str, Any]:
        """The row as plain data."""
        official = self.official
        return {
            **self._asdict(),
            "mean": list(self.mean),
            "std": list(self.std),
            "published": dict(self.published),
            "official": official and {**official._asdict(), "model_args": dict(official.model_args)},
            "is_noncommercial": self.is_noncommercial,
        }
