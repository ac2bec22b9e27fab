"""What a layout is, and how a file's content is matched to one."""

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, TypeAlias

from torch import Tensor

from fdkit.errors import WeightsError
from fdkit.models.backbone import IMAGENET_MEAN, IMAGENET_STD

logger = logging.getLogger("fdkit")

State: TypeAlias = dict[str, Tensor]
Grid: TypeAlias = tuple[int, int]
Resample: TypeAlias = Callable[[Tensor, Grid, Grid], Tensor]
"""A table made for one grid of patches (rows, columns), for another grid."""

_WRAPPERS = ("module.", "_orig_mod.")
_CONTAINERS = (
    "state_dict_ema",
    "model_ema",
    "teacher",
    "model",
    "state_dict",
    "model_state",
    "model_state_dict",
    "student",
    "encoder",
    "network",
)


class Change(NamedTuple):
    """One line of the key audit: what became of a tensor of the file."""

    key: str
    """Its name in the file, wrapper prefixes such as `module.` taken off."""
    became: str | None
    """The network's name for it; None if it was left out."""
    reason: str
    """Why it was renamed, converted or left out; empty for a tensor used as it stands."""


class Network(NamedTuple):
    """The network a file's tensors belong to."""

    architecture: str
    """A timm model."""
    model_args: dict[str, Any]
    """Plain data: what the tensors show of it, such as depth and patch size, or the layout implies."""
    assumed_args: Mapping[str, Any] = MappingProxyType({})
    """What they do not show and was taken, such as the number of heads; an architecture that is named decides it."""
    assumption: str = ""
    """The same in words, for the reader of the log; empty if nothing was assumed."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    resample_positions: Resample | None = None
    """(1, h*w, D) positions for another input size, as the official code makes them; None: it takes no other."""
    resample_bias: Resample | None = None
    """(rows, heads) relative position biases likewise; the grids are windows."""
    at_size: Callable[[int], dict[str, Any]] | None = None
    """Arguments that change, beside img_size, with an image size in pixels; None: none does. It raises ConfigError for
    a size at which the timm network would not compute what the official one does."""
    crop_ratio: float | None = None
    """Image size over the short side after resizing, in the official evaluation; None: timm's for the architecture."""
    interpolation: Literal["bilinear", "bicubic"] | None = None
    """How the official evaluation resizes; None likewise."""


class Reading(NamedTuple):
    """A file read as what it is: its network, and every tensor of that network under the network's own name."""

    layout: str
    title: str
    network: Network
    state: State
    audit: tuple[Change, ...]


class Conversion:
    """The tensors of a file on their way to the network's names, with an account of each step.

    state: what is left and what it is called by now; layouts read it and change it through the methods alone.
    architecture: the timm model the file is said to belong to, for what no tensor shows; None if none is named.
    """

    def __init__(self, state: Mapping[str, Tensor], architecture: str | None = None) -> None:
        self.state: State = dict(state)
        self.architecture = architecture
        self._origin = {key: (key, "") for key in state}
        self._left_out: list[Change] = []
        self._merged: list[Change] = []

    def drop(self, pattern: str, reason: str) -> None:
        """Leave out the tensors whose whole name matches; no match is no error."""
        for key in self._matching(pattern):
            self._leave_out(key, reason)

    def rename(self, pattern: str, replacement: str, reason: str = "renamed") -> None:
        """Replace every match of a pattern (re.sub) in the names."""
        renamed = {re.sub(pattern, replacement, key): key for key in self.state}
        if len(renamed) < len(self.state):
            raise WeightsError(f"two tensors of the file have the same name after {pattern} -> {replacement}")
        old, old_origin = self.state, self._origin
        self.state = {new: old[key] for new, key in renamed.items()}
        self._origin = {
            new: old_origin[key] if new == key else (old_origin[key][0], reason)
            for new, key in renamed.items()
        }

    def convert(self, pattern: str, function: Callable[[Tensor], Tensor], reason: str) -> None:
        """Change the values of the tensors whose whole name matches, such as a transposed matrix."""
        for key in self._matching(pattern):
            self.state[key] = function(self.state[key])
            self._origin[key] = (self._origin[key][0], reason)

    def merge(
        self, keys: Iterable[str], into: str, function: Callable[[list[Tensor]], Tensor], reason: str
    ) -> None:
        """Make one tensor of several, such as query, key and value; KeyError if one is not there."""
        keys = list(keys)
        parts = [self.state.pop(key) for key in keys]
        origins = [self._origin.pop(key)[0] for key in keys]
        self._merged += [Change(origin, into, reason) for origin in origins[1:]]
        self.state[into] = function(parts)
        self._origin[into] = (origins[0], reason)

    def split(self, key: str, parts: Mapping[str, Tensor], reason: str) -> None:
        """Make several tensors of one."""
        del self.state[key]
        origin, _ = self._origin.pop(key)
        for name, tensor in parts.items():
            self.state[name] = tensor
            self._origin[name] = (origin, reason)

    def enter(self, prefix: str, reasons: Iterable[tuple[str, str]]) -> None:
        """Take `prefix` off the names that have it; the others are left out for the first reason whose pattern
        matches their whole name, and stay where none does.
        """
        for key in [key for key in self.state if not key.startswith(prefix)]:
            reason = next((why for pattern, why in reasons if re.fullmatch(pattern, key)), None)
            if reason:
                self._leave_out(key, reason)
        if prefix:
            self.rename("^" + re.escape(prefix), "", f"prefix {prefix} taken off")

    def audit(self) -> tuple[Change, ...]:
        """What became of every tensor, in order of its name in the file."""
        kept = [
            Change(origin, key, reason if origin != key or reason else "")
            for key, (origin, reason) in self._origin.items()
        ]
        return tuple(sorted([*kept, *self._merged, *self._left_out], key=lambda change: change.key))

    def _leave_out(self, key: str, reason: str) -> None:
        del self.state[key]
        origin, _ = self._origin.pop(key)
        self._left_out.append(Change(origin, None, reason))

    def _matching(self, pattern: str) -> list[str]:
        return [key for key in self.state if re.fullmatch(pattern, key)]


class Layout(NamedTuple):
    """One official way to write a network down."""

    name: str
    """One word, as in the catalog: mocov3."""
    title: str
    """For people: MoCo v3 (ViT)."""
    requires: tuple[str, ...]
    """Patterns; each must match the whole name of some tensor, prefix taken off."""
    convert: Callable[[Conversion], Network]
    """Drops and renames until the names are the network's, and says which network it is."""
    forbids: tuple[str, ...] = ()
    """Patterns no tensor's name may match."""
    prefixes: tuple[str, ...] = ("",)
    """Where the network may stand in the file; the first that fits is taken, or the one a checkpoint key asks for."""
    outside: tuple[tuple[str, str], ...] = ()
    """(pattern, reason): tensors beside the prefix that are no part of the network, such as a momentum encoder."""
    shows: Callable[[State], bool] = lambda state: True
    """A further look at the tensors, for layouts whose names are those of another: positions, sizes."""

    def prefix_in(self, state: Mapping[str, Tensor], checkpoint_key: str | None) -> str | None:
        """The prefix under which the file holds this layout; None if it does not."""
        prefixes = self.prefixes
        if checkpoint_key and f"{checkpoint_key}." in prefixes:
            prefixes = (f"{checkpoint_key}.",)
        for prefix in prefixes:
            inside = {key.removeprefix(prefix): key for key in state if key.startswith(prefix)}
            if self.missing(inside) or any(_any_match(pattern, inside) for pattern in self.forbids):
                continue
            if self.shows({short: state[key] for short, key in inside.items()}):
                return prefix
        return None

    def missing(self, keys: Iterable[str]) -> list[str]:
        """The required patterns that no key matches."""
        keys = list(keys)
        return [pattern for pattern in self.requires if not _any_match(pattern, keys)]


def match(
    state: State,
    layouts: Iterable[Layout],
    *,
    checkpoint_key: str | None = None,
    architecture: str | None = None,
) -> Reading | None:
    """A state dict read in the first layout that recognises it; None if none does.

    checkpoint_key: which of several networks in it, such as `momentum_encoder`; None is what the official code
        evaluates.
    architecture: the timm model it is said to belong to; a layout asks for it where its tensors leave two open.
    Raises WeightsError for a file that lacks a tensor of the layout it is in.
    """
    for layout in layouts:
        prefix = layout.prefix_in(state, checkpoint_key)
        if prefix is None:
            continue
        conversion = Conversion(state, architecture)
        conversion.enter(prefix, layout.outside)
        try:
            network = layout.convert(conversion)
        except KeyError as error:
            raise WeightsError(
                f"the file lacks {error.args[0]}, which every {layout.title} has",
                hint="it is cut short or was changed: get it again from its source",
            ) from error
        return Reading(layout.name, layout.title, network, conversion.state, conversion.audit())
    return None


def state_in(content: Any, *, source: str, checkpoint_key: str | None = None) -> State:
    """The state dict a file holds, wrapper prefixes such as `module.` taken off.

    Raises WeightsError if there is none, or none under `checkpoint_key`.
    """
    containers = _containers(content)
    if not containers:
        raise WeightsError(f"{source} holds no weights: {_what_instead(content)}")
    chosen = next((name for name in ("", *_CONTAINERS) if name in containers), next(iter(containers)))
    if checkpoint_key in containers:
        chosen = checkpoint_key
    state = containers[chosen]
    while prefix := next((p for p in _WRAPPERS if all(key.startswith(p) for key in state)), None):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    if checkpoint_key is not None and checkpoint_key != chosen:
        _require_prefix(state, checkpoint_key, containers, source=source)
    if chosen or len(containers) > 1:
        logger.info("%s: weights taken from %s", source, chosen or "its top level")
    return state


def _containers(content: Any) -> dict[str, State]:
    """The state dicts in a file by the key they stand under; the empty key for tensors at the top level."""
    if not isinstance(content, Mapping):
        return {}
    flat = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    found = (
        {"": flat} if flat and not any(isinstance(content.get(key), Mapping) for key in _CONTAINERS) else {}
    )
    for key, value in content.items():
        if isinstance(value, Mapping) and key not in ("optimizer", "scaler", "dino_loss", "args"):
            tensors = {str(name): tensor for name, tensor in value.items() if isinstance(tensor, Tensor)}
            if tensors:
                found[str(key)] = tensors
    return found


def _require_prefix(
    state: State, checkpoint_key: str, containers: Mapping[str, State], *, source: str
) -> None:
    """Refuses a checkpoint key that is neither a container nor the start of any name."""
    if any(key.startswith(f"{checkpoint_key}.") for key in state):
        return
    starts = sorted({key.partition(".")[0] for key in state if "." in key})
    known = [name for name in containers if name] + starts
    raise WeightsError(f"{source} holds no {checkpoint_key}", hint=f"it holds {', '.join(known[:12])}")


def _what_instead(content: Any) -> str:
    """What a file without a state dict seems to be."""
    if not isinstance(content, Mapping):
        return f"it is a {type(content).__name__}"
    if "optimizer" in content or {"state", "param_groups"} <= content.keys():
        return "it is the state of an optimiser alone"
    return "its keys are " + (", ".join(str(key) for key in list(content)[:5]) or "none")


def refuse_linear_probe(content: Any, state: State, *, source: str) -> None:
    """Raises WeightsError for a classifier trained on frozen features: alone, or with the backbone it was trained on.

    The second kind shows in the optimiser, which holds the two tensors of the classifier and no other, or in the
    BatchNorm before the classifier that MAE's protocol puts there.
    """
    hint = "give the file of the pretraining the probe was trained on"
    names = ", ".join(f"{key} {tuple(value.shape)}" for key, value in list(state.items())[:3])
    if all(re.fullmatch(r"(.*\.)?(linear|fc|head|classifier)(\.\d+)?\.(weight|bias)", key) for key in state):
        raise WeightsError(f"{source} holds a linear classifier and no backbone: {names}", hint=hint)
    optimizer = content.get("optimizer") if isinstance(content, Mapping) else None
    groups = optimizer.get("param_groups", []) if isinstance(optimizer, Mapping) else []
    num_trained = sum(len(group.get("params", [])) for group in groups)
    has_probe_head = "head.0.running_mean" in state and "head.1.weight" in state
    if has_probe_head or 0 < num_trained <= 2 < len(state):
        raise WeightsError(
            f"{source} is the file of a linear probe: a classifier was trained on frozen features", hint=hint
        )


def nearest(state: Mapping[str, Tensor], layouts: Iterable[Layout]) -> str:
    """In words, the known layout that shares most of its required names with the file."""
    best, best_share = "", 0.0
    for layout in layouts:
        for prefix in layout.prefixes:
            inside = [key.removeprefix(prefix) for key in state if key.startswith(prefix)]
            missing = layout.missing(inside)
            # A name that is lacking says more than a layout refused for what its tensors hold.
            share = 1 - len(missing) / len(layout.requires) if missing else 0.8
            if share > best_share:
                best_share = share
                lacking = (
                    f", but without {', '.join(pattern.replace(chr(92), '') for pattern in missing[:3])}"
                )
                best = layout.title + (
                    lacking if missing else ", but of other sizes or with tensors it has not"
                )
    return best or "none"


def _any_match(pattern: str, keys: Iterable[str]) -> bool:
    return any(re.fullmatch(pattern, key) for key in keys)
