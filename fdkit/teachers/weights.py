"""Reads weight files safely and loads them whole: nothing is run, nothing is guessed, nothing is left out unsaid.

A file may name only tensors and plain containers. Of its keys, only those an explicit rule names are left out;
any other difference between the file and the network is an error.
"""

import argparse
import contextlib
import hashlib
import logging
import pickle
import pickletools
import re
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fdkit.errors import WeightsError
from fdkit.models.libraries import check_state

logger = logging.getLogger("fdkit")

State = dict[str, Tensor]


class Unwrapped(NamedTuple):
    """The state dict inside a file, and how it was wrapped."""

    state: State
    container: str
    """The key it stood under, such as `model`; empty for a flat file."""
    prefix: str
    """What was taken off the front of the keys, such as `module.backbone.`."""


class Rule(NamedTuple):
    """Keys that may be in a file and not in the network."""

    what: str
    pattern: str


HEADS = Rule("classifier and training heads", r"(head|head_dist|head_dense|fc|classifier|cls_head)\.(?!norm)")
RULES = (
    HEADS,
    Rule("masked-image decoder", r"decoder(_\w+)?(\.|$)"),
    Rule("mask token", r"mask_token$"),
    Rule("index buffers", r"(.*\.)?(relative_position_index|relative_coords_table|attn_mask)$"),
    Rule("momentum encoder and predictor", r"(momentum_encoder|predictor|projector|projection_head|queue)"),
)
CLIP_RULES = (
    Rule(
        "text tower and logit scale",
        r"(text\.|transformer\.|token_embedding\.|ln_final\.|positional_embedding$|text_projection$|attn_mask$"
        r"|logit_scale$|logit_bias$|input_resolution$|context_length$|vocab_size$)",
    ),
)

_CONTAINERS = ("state_dict_ema", "model_ema", "teacher", "model", "state_dict", "student", "encoder")
_PREFIXES = ("module.", "_orig_mod.", "backbone.", "base_encoder.")
_ALIEN = (
    (rb"\s*<(!doctype|html|\?xml|head|body)", "a web page"),
    (rb"version https://git-lfs", "a Git LFS pointer"),
    (rb"\s*\{\s*\"", "a JSON text"),
)


class WithoutRandomInit(TorchFunctionMode):
    """While entered, random initialisation leaves tensors unwritten and draws from no generator.

    For networks whose every parameter is about to be loaded: building one then costs seconds less, and loading a
    teacher does not move the global random state.
    """

    _TENSOR = (Tensor.uniform_, Tensor.normal_, Tensor.random_)
    _INIT = ("uniform_", "normal_", "trunc_normal_", "orthogonal_")

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        is_random_init = getattr(func, "__module__", "") == "torch.nn.init" and name.endswith(self._INIT)
        if is_random_init or func in self._TENSOR:
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_weights(path: Path) -> Unwrapped:
    """The tensors of a .safetensors or PyTorch file; the file's code, if it has any, is never run.

    Containers (`model`, `state_dict`, `teacher`, ...) are opened and wrapper prefixes (`module.`, `backbone.`, ...)
    taken off. Raises WeightsError if the file is missing, damaged, no weights at all, or asks to run code.
    """
    _check_plausible(path)
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    return unwrap(content, path)


def unwrap(content: Any, path: Path) -> Unwrapped:
    """The state dict inside what a file held; `path` is for the messages."""
    container = ""
    if isinstance(content, dict) and not any(isinstance(value, Tensor) for value in content.values()):
        container = next((key for key in _CONTAINERS if isinstance(content.get(key), dict)), "")
        content = content.get(container)
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds no state dict", hint=f"looked for {', '.join(_CONTAINERS)}")
    state = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if not state:
        raise WeightsError(f"{path} holds no tensors" + (f" under {container}" if container else ""))
    state, prefix = _without_prefixes(state, path)
    if container or prefix:
        logger.info(
            "%s: weights taken from %s", path, ", ".join(filter(None, [container, prefix and prefix + "*"]))
        )
    return Unwrapped(state, container, prefix)


def load_whole(
    network: nn.Module,
    state: State,
    *,
    adapt: Callable[[State], State],
    rules: Iterable[Rule],
    source: str,
    hint: str = "",
) -> None:
    """Copies a state dict into a network: every tensor of the network from the file, every tensor of the file used
    or named by a rule.

    adapt: the library's own conversion (key names, position embedding to the network's grid).
    source, hint: name the file, and the remedy, in messages.
    Raises WeightsError with the first differing keys and their shapes, or the name of a tensor that is not finite.
    """
    own = network.state_dict()
    _check_patch_size(own, state, source=source, hint=hint)
    try:
        fitted = adapt(dict(state))
    except Exception as error:
        _check_keys(network, drop(state, own, rules, source=source), source=source, hint=hint)
        raise WeightsError(f"{source} does not fit the model: {error}", hint=hint) from error
    fitted = drop(fitted, own, rules, source=source)
    _check_keys(network, fitted, source=source, hint=hint)
    check_finite(fitted, source=source)
    if (was := state.get("pos_embed")) is not None and was.shape != fitted.get("pos_embed", was).shape:
        logger.info(
            "%s: position embedding %s resampled to %s",
            source,
            tuple(was.shape),
            tuple(fitted["pos_embed"].shape),
        )
    network.load_state_dict(fitted, strict=True)


def drop(state: State, own: Iterable[str], rules: Iterable[Rule], *, source: str) -> State:
    """The state without the keys that are not the network's `own` and that a rule names; each rule used is logged."""
    kept = dict(state)
    dropped: dict[str, list[str]] = {}
    for key in state.keys() - set(own):
        rule = next((rule for rule in rules if re.match(rule.pattern, key)), None)
        if rule:
            del kept[key]
            dropped.setdefault(rule.what, []).append(key)
    for what, keys in dropped.items():
        logger.info("%s: left out %d tensors (%s), such as %s", source, len(keys), what, min(keys))
    return kept


def image_tower(state: State, *, source: str) -> State:
    """A CLIP state without its text tower, which shares names with the image tower's; any other state unchanged.

    Raises WeightsError for keys that belong to neither tower.
    """
    if not any(key.startswith("visual.") for key in state):
        return state
    kept = drop(state, (), CLIP_RULES, source=source)
    if others := sorted(key for key in kept if not key.startswith("visual.")):
        raise WeightsError(
            f"{source} holds a CLIP model and {len(others)} unknown tensors: {', '.join(others[:5])}"
        )
    return kept


def check_finite(state: State, *, source: str) -> None:
    """Raises WeightsError naming the first tensor that holds NaN or infinity."""
    for key, value in state.items():
        if value.is_floating_point() and not value.isfinite().all():
            count = int((~value.isfinite()).sum())
            raise WeightsError(
                f"{source}: {key} holds {count} values that are not finite, of {value.numel()}",
                hint="the weights are damaged or their training diverged: get them again",
            )


def _check_keys(network: nn.Module, state: State, *, source: str, hint: str) -> None:
    try:
        check_state(network, state, source=source)
    except WeightsError as error:
        raise WeightsError(error.message, hint=hint) from None


def _check_patch_size(own: State, state: State, *, source: str, hint: str) -> None:
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


def _without_prefixes(state: State, path: Path) -> tuple[State, str]:
    """The state with wrapper prefixes taken off, outermost first; keys outside the prefix stay as they are."""
    taken, count = "", len(state)
    while prefix := next((p for p in _PREFIXES if any(key.startswith(p) for key in state)), None):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
        taken += prefix
    if len(state) < count:
        raise WeightsError(
            f"{path} holds the same names with and without the prefix {taken}: which model is meant?"
        )
    return state, taken


def _check_plausible(path: Path) -> None:
    """Refuses what is plainly no weight file, with the reason in plain words."""
    if not path.is_file():
        raise WeightsError(f"there is no file {path}")
    with path.open("rb") as file:
        start = file.read(64)
    if path.stat().st_size == 0:
        raise WeightsError(
            f"{path} is empty (0 bytes)", hint="the download or copy was cut: get the file again"
        )
    for sign, what in _ALIEN:
        if re.match(sign, start, re.IGNORECASE):
            raise WeightsError(
                f"{path} is not a file of weights but {what}", hint="download the weights themselves"
            )


def _damaged(path: Path, error: BaseException) -> WeightsError:
    return WeightsError(
        f"{path} ({path.stat().st_size} bytes) is damaged or cut short, or not a file of weights "
        f"({type(error).__name__})",
        hint="get the file again and compare its size or SHA-256 with the source's",
    )


def _read_safetensors(path: Path) -> State:
    import safetensors.torch

    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, error) from error


def _read_torch(path: Path) -> Any:
    """The content of a PyTorch file: tensors, containers and numbers; of classes, only argparse's Namespace, in
    which many published files keep the options of their training.
    """
    is_zip = zipfile.is_zipfile(path)
    if is_zip and _is_torchscript(path):
        raise WeightsError(
            f"{path} is a TorchScript program, not a file of weights, and is not run",
            hint="for OpenAI's CLIP use the catalog names clip_vitb, clip_vitl, ...; else save the state dict alone",
        )
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        asked = _classes_asked_for(path, is_zip=is_zip)
        if not asked:
            raise _damaged(path, error) from None
        raise WeightsError(
            f"{path} is refused: it asks to run code ({', '.join(asked[:5])}) and holds more than tensors",
            hint="use a .safetensors file, or have the file's author save the state dict alone",
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, IndexError) as error:
        raise _damaged(path, error) from error


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except zipfile.BadZipFile as error:
        raise _damaged(path, error) from error


def _classes_asked_for(path: Path, *, is_zip: bool) -> list[str]:
    """What a refused pickle wanted to import, beyond tensors; its instructions are listed, not followed."""
    if is_zip:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    asked, strings = set(), [""]
    with path.open("rb") as file, contextlib.suppress(ValueError):  # ends where no further pickle follows
        while True:
            for opcode, argument, _ in pickletools.genops(file):
                if opcode.name == "GLOBAL":
                    asked.add(str(argument).replace(" ", "."))
                elif opcode.name == "STACK_GLOBAL":
                    asked.add(".".join(strings[-2:]))
                elif isinstance(argument, str):
                    strings.append(argument)
    return sorted(name for name in asked if not name.startswith(("torch.", "collections.OrderedDict")))
