"""Files in an official layout: made of seeded values, read, and loaded whole into the network they show."""

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fdkit.models.backbone import Backbone
from fdkit.models.libraries import build_timm
from fdkit.teachers.checkpoint_file import load_file
from fdkit.teachers.official import LAYOUTS, Layout, Network, Reading
from fdkit.teachers.official._layout import match, refuse_linear_probe, state_in
from fdkit.teachers.request import Request
from tests import golden

Shapes = dict[str, tuple[int, ...]]


def filled(shapes: Mapping[str, tuple[int, ...]], seed: int = 1) -> dict[str, Tensor]:
    """A value for every name: counters 7, other tensors as in the golden files."""
    return {
        name: torch.tensor(7) if name.endswith("num_batches_tracked") else golden.weight(name, shape, seed)
        for name, shape in shapes.items()
    }


def with_prefix(prefix: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {prefix + name: value for name, value in tensors.items()}


def read(
    content: Any,
    layouts: Iterable[Layout],
    *,
    source: str,
    checkpoint_key: str | None = None,
    architecture: str | None = None,
) -> Reading | None:
    """A file's content read in the first layout that recognises it, as the loader does; None if none does."""
    state = state_in(content, source=source, checkpoint_key=checkpoint_key)
    refuse_linear_probe(content, state, source=source)
    return match(state, layouts, checkpoint_key=checkpoint_key, architecture=architecture)


def read_one(content: Any, checkpoint_key: str | None = None) -> Reading:
    """The content read; it must be recognised by one layout alone, and every tensor of it be accounted for once."""
    state = state_in(content, source="file", checkpoint_key=checkpoint_key)
    takers = [layout.name for layout in LAYOUTS if layout.prefix_in(state, checkpoint_key) is not None]
    assert len(takers) == 1, takers
    reading = read(content, LAYOUTS, source="file", checkpoint_key=checkpoint_key)
    assert reading is not None
    assert {change.key for change in reading.audit} == set(state)
    assert {change.became for change in reading.audit if change.became} == set(reading.state)
    assert all(change.reason for change in reading.audit if change.became is None)
    return reading


def load(content: Any, checkpoint_key: str | None = None) -> tuple[Backbone, Reading]:
    """The content, written to a file and loaded from it, and how it was read."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pth"
        torch.save(content, path)
        loaded = load_file(path, Request(str(path), checkpoint_key=checkpoint_key))
    return loaded.backbone.eval(), read_one(content, checkpoint_key)


def build(network: Network) -> Backbone:
    return build_timm(network.architecture, {**network.assumed_args, **network.model_args})


@torch.no_grad()
def tokens(backbone: Backbone, images: Tensor) -> Tensor:
    """(B, P + h*w, C): final tokens of normalised images."""
    return backbone.tokens_of(backbone.network, images).all()


def left_out(reading: Reading) -> set[str]:
    """First parts of the names of what was left out."""
    return {change.key.partition(".")[0] for change in reading.audit if change.became is None}


def check_whole(shapes: Mapping[str, tuple[int, ...]], values: Mapping[str, Tensor] | None = None) -> Reading:
    """A file of real size, without memory for its values, has all the tensors of its network and no other.

    values: those whose content is read, such as buffers.
    """
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    reading = read_one({"model": {**state, **(values or {})}})
    with torch.device("meta"):
        network = build(reading.network).network
    expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    assert {name: tuple(value.shape) for name, value in reading.state.items()} == expected
    return reading
