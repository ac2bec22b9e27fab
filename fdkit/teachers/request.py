"""What is asked of the loader, and what it gives back."""

from typing import Literal, NamedTuple

from fdkit.models.backbone import Backbone
from fdkit.teachers.official import Change
from fdkit.teachers.origin import Origin


class Request(NamedTuple):
    """What was asked for; the fields are the arguments of `load_teacher`."""

    name: str
    image_size: int | None = None
    pretrained: bool = True
    architecture: str | None = None
    checkpoint_key: str | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    seed: int = 0
    keep_head: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False


class Loaded(NamedTuple):
    """A backbone and where it came from."""

    backbone: Backbone
    source: str
    """The model in long form, or the absolute path of its file."""
    license: str = "unstated"
    sha256: str | None = None
    """Of the weight file; None for random weights."""
    is_noncommercial: bool = False
    layout: str = ""
    """For people: how the file was read, such as MoCo v3 (ViT); empty where a library reads its own file."""
    audit: tuple[Change, ...] = ()
    """What became of every tensor of the file; empty for random weights and run folders."""
    origin: Origin | None = None
    """Where published weights came from; None for files and folders of this machine, and for random weights."""
    assumption: str = ""
    """What the file does not show and was taken, in words."""
