"""Loads state dicts whole: nothing is guessed, and nothing is left out unsaid.

Of a file's tensors, only those an explicit rule names are left out; any other difference between the file and the
network is an error, found before the network is touched.
"""

import logging
import math
import re
import sys
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fdkit.errors import WeightsError
from fdkit.models.backbone import Backbone
from fdkit.models.libraries import check_state
from fdkit.teachers.memory import mappings, own_copy
from fdkit.teachers.official import Change
from fdkit.teachers.official._layout import Grid, Resample

logger = logging.getLogger("fdkit")

State = dict[str, Tensor]


class Rule(NamedTuple):
    """Tensors that may be in a library's file and not in the network."""

    what: str
    pattern: str


RULES = (
    Rule("classifier and training heads", r"(head|head_dist|head_dense|fc|classifier|cls_head)\.(?!norm)"),
    Rule("masked-image decoder", r"decoder(_\w+)?(\.|$)"),
    Rule("mask token", r"mask_token$"),
    Rule("index buffers", r"(.*\.)?(relative_position_index|relative_coords_table|attn_mask)$"),
)
UNTRAINED_NORM = Rule("norm behind the last stage, which the pretraining did not have", r"head\.norm\.")
CLIP_RULES = (
    Rule(
        "text tower and logit scale",
        r"(text\.|transformer\.|token_embedding\.|ln_final\.|positional_embedding$|text_projection$|attn_mask$"
        r"|logit_scale$|logit_bias$|input_resolution$|context_length$|vocab_size$)",
    ),
)


class WithoutInit(TorchFunctionMode):
    """While entered, parameters are not initialised: their memory stays untouched, and no generator is drawn from.

    For networks whose every parameter is about to be loaded. Building one costs seconds less, holds no memory for the
    values that are to be replaced, and does not move the global random state.
    """

    _RANDOM = ("uniform_", "normal_", "random_")
    _NO_VALUES = ("requires_grad_", "detach_", "set_", "share_memory_")
    """Of the methods that change a tensor, those that write no values into it."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        target = args[0] if args else (kwargs or {}).get("tensor")
        writes = name.endswith("_") and not name.endswith("__") and name not in self._NO_VALUES
        if writes and (isinstance(target, nn.Parameter) or name in self._RANDOM):
            return target
        return func(*args, **(kwargs or {}))


def fit_library(
    backbone: Backbone, state: State, *, source: str, hint: str = "", resample: Resample | None = None
) -> tuple[Change, ...]:
    """Weights into a network through its library's own conversion; what became of every tensor of the file.

    For files in timm's names or any that timm converts, and for the image tower of an open_clip file.
    resample: how the authors' own code makes absolute positions for another input size; None is as the library does.
    Raises WeightsError as `load_whole`.
    """
    network: Any = backbone.network
    own = network.state_dict()
    has_no_norm = backbone.recipe.get("model_args", {}).get("final_norm") is False
    rules = (*RULES, UNTRAINED_NORM) if has_no_norm else RULES
    _refuse_other_patch_size(own, state, source=source, hint=hint)
    tower, left_out = _image_tower(state, source=source)
    if resample is not None and "pos_embed" in tower:
        grid = network.patch_embed.grid_size
        tower["pos_embed"], _ = resampled_positions(tower["pos_embed"], grid, resample)
    try:
        converted = _converted(backbone, tower)
    except Exception as error:
        _check_keys(network, _without(tower, own, rules)[0], source=source, hint=hint)
        raise WeightsError(f"{source} does not fit the model: {error}", hint=hint) from error
    fitted, dropped = _without(converted, own, rules)
    load_whole(network, fitted, source=source, hint=hint)
    origin = {value.data_ptr(): key for key, value in state.items() if value.numel()}
    left_out |= {origin.get(converted[key].data_ptr(), key): why for key, why in dropped.items()}
    return _audit(state, fitted, left_out)


def load_whole(network: nn.Module, state: State, *, source: str, hint: str = "") -> None:
    """Makes a state dict a network's own, in memory of its own: what becomes of the file later does not matter.

    source, hint: name the file, and the remedy, in messages.
    Raises WeightsError with the first differing keys and their shapes, or the name of a tensor that is not finite or
    holds no real numbers where the network has them; the network is then as it was.
    """
    own = network.state_dict()
    _refuse_other_patch_size(own, state, source=source, hint=hint)
    _check_keys(network, state, source=source, hint=hint)
    _check_kinds(own, state, source=source)
    known = mappings()
    fitted = {key: own_copy(value, own[key].dtype, known) for key, value in state.items()}
    check_finite(fitted, source=source)
    network.load_state_dict(fitted, strict=True, assign=True)


def check_finite(state: State, *, source: str) -> None:
    """Raises WeightsError naming the first tensor that holds NaN or infinity."""
    for key, value in state.items():
        # The sum needs no tensor of flags; one that overflows is looked at closely, and may be sound.
        if value.is_floating_point() and not value.sum().isfinite() and not value.isfinite().all():
            count = int((~value.isfinite()).sum())
            raise WeightsError(
                f"{source}: {key} holds {count} values that are not finite, of {value.numel()}",
                hint="the weights are damaged or their training diverged: get them again",
            )


def check_dense(state: State, *, source: str) -> None:
    """Raises WeightsError naming the first tensor that is sparse, quantised or on no device: no plain numbers."""
    for key, value in state.items():
        if value.layout is not torch.strided or value.is_quantized or value.is_meta:
            kind = "quantised" if value.is_quantized else "on no device" if value.is_meta else "sparse"
            raise WeightsError(
                f"{source}: {key} is {kind}, not a plain tensor", hint="save the dense float weights instead"
            )


def resampled_positions(positions: Tensor, grid: Grid, resample: Resample) -> tuple[Tensor, Grid]:
    """Absolute positions (1, P + h*w, D) for another grid, and the one they had; the P rows of prefix tokens stay."""
    side = math.isqrt(positions.shape[1])
    num_prefix, old = positions.shape[1] - side * side, (side, side)
    if old == grid:
        return positions, old
    patches = resample(positions[:, num_prefix:], old, grid)
    return torch.cat([positions[:, :num_prefix], patches], dim=1), old


def _converted(backbone: Backbone, state: State) -> State:
    """The tensors under the network's names, position tables for its grid, as the library itself does it."""
    if backbone.recipe["library"] == "timm":
        return _timm_converted(backbone, state)
    import open_clip

    open_clip.model.resize_pos_embed(state, SimpleNamespace(visual=backbone.network))
    return {key.removeprefix("visual."): value for key, value in state.items()}


def _timm_converted(backbone: Backbone, state: State) -> State:
    """What timm itself does to a published file before loading it."""
    import timm

    architecture = backbone.recipe["architecture"].partition(".")[0]
    module = sys.modules[timm.models.model_entrypoint(architecture).__module__]
    names = ("checkpoint_filter_fn", "_filter_fn", "_filter_torchvision_pretrained")
    convert = next((getattr(module, name) for name in names if hasattr(module, name)), None)
    if convert is None:
        return state
    options: dict[str, Any] = {}
    if module.__name__.endswith(".deit"):
        options = {"adapt_layer_scale": True}
    if "flexi" in architecture or "radio" in architecture:
        options = {"interpolation": "bilinear", "antialias": False}
    return dict(convert(dict(state), backbone.network, **options))


def _image_tower(state: State, *, source: str) -> tuple[State, dict[str, str]]:
    """A CLIP state without its text tower, which shares names with the image tower's, and what was left out and why;
    any other state unchanged.

    Raises WeightsError for keys that belong to neither tower.
    """
    if not any(key.startswith("visual.") for key in state):
        return dict(state), {}
    kept, dropped = _without(state, (), CLIP_RULES)
    if others := sorted(key for key in kept if not key.startswith("visual.")):
        raise WeightsError(
            f"{source} holds a CLIP model and {len(others)} unknown tensors: {', '.join(others[:5])}"
        )
    return kept, dropped


def _without(state: State, own: Iterable[str], rules: Iterable[Rule]) -> tuple[State, dict[str, str]]:
    """The state without the keys that are not the network's `own` and that a rule names; and those, with the rule."""
    kept, dropped = dict(state), {}
    for key in state.keys() - set(own):
        rule = next((rule for rule in rules if re.match(rule.pattern, key)), None)
        if rule:
            del kept[key]
            dropped[key] = rule.what
    return kept, dropped


def _audit(state: State, fitted: State, dropped: dict[str, str]) -> tuple[Change, ...]:
    """What became of each tensor of a file that a library converted, followed by where its values lie in memory."""
    names = {value.data_ptr(): key for key, value in fitted.items() if value.numel()}
    changes = []
    for key in sorted(state):
        became = names.get(state[key].data_ptr())
        if key in dropped:
            changes.append(Change(key, None, dropped[key]))
        elif became is not None:
            changes.append(
                Change(key, became, "" if became in (key, key.removeprefix("visual.")) else "renamed")
            )
        elif key in fitted:
            changes.append(Change(key, key, "converted by the library, for the network's size or layout"))
        else:
            changes.append(Change(key, None, "taken apart or left out by the library's own conversion"))
    return tuple(changes)


def _check_keys(network: nn.Module, state: State, *, source: str, hint: str) -> None:
    try:
        check_state(network, state, source=source)
    except WeightsError as error:
        raise WeightsError(error.message, hint=hint) from None


def _check_kinds(own: State, state: State, *, source: str) -> None:
    """Refuses whole numbers, truth values and complex numbers where the network has real ones."""
    for key, value in state.items():
        if own[key].is_floating_point() and not value.is_floating_point():
            raise WeightsError(
                f"{source}: {key} holds {str(value.dtype).removeprefix('torch.')}, not real numbers",
                hint="the file holds no weights under this name, or weights made for another library: get it again",
            )


def _refuse_other_patch_size(own: State, state: State, *, source: str, hint: str) -> None:
    """Refuses another patch size or width before a library's conversion could resample it."""
    wanted = own.get("patch_embed.proj.weight")
    if wanted is None:
        return
    for key in ("patch_embed.proj.weight", "visual.conv1.weight"):
        kernel = state.get(key, wanted)
        if kernel.ndim == wanted.ndim and kernel.shape != wanted.shape:
            raise WeightsError(
                f"{source} does not fit the model: wrong shape 1: {key} {tuple(kernel.shape)}, "
                f"the model has {tuple(wanted.shape)}",
                hint=hint,
            )
