"""Text towers of open_clip models, with the tokenizer and the scale their images are compared at."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdkit.errors import ConfigError, WeightsError, did_you_mean

SCALE_KEY = "logit_scale"


class TextTower(nn.Module):
    """Texts as vectors of the space that the images of the same model are projected into."""

    def __init__(self, text: nn.Module, tokenize: Callable[[Sequence[str]], Tensor], *, width: int) -> None:
        super().__init__()
        self.text = text
        self.tokenize = tokenize
        self.width = width
        """Of the joint space."""
        self.logit_scale = nn.Parameter(torch.tensor(0.07).reciprocal().log())
        """Logarithm of what cosines are multiplied by before the softmax."""

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        """Vectors (B, width) of tokens (B, L), as open_clip's models give them; normalize: of length 1."""
        found = self.text(tokens)
        return F.normalize(found, dim=-1) if normalize else found


def build_text(arch: str, *, quick_gelu: bool | None = None) -> TextTower:
    """The text tower of an open_clip architecture, with random weights.

    quick_gelu: replaces the architecture's own value. Raises ConfigError for an unknown architecture, one without a
    text tower of its own, and one whose tower or tokenizer needs a package or file that is not here.
    """
    import open_clip
    from open_clip.model import _build_text_tower  # the public constructors also build the image tower

    config = open_clip.get_model_config(arch)
    if config is None:
        raise ConfigError(
            f"unknown open_clip architecture {arch}", did_you_mean(arch, open_clip.list_models())
        )
    if "multimodal_cfg" in config:
        raise ConfigError(f"open_clip model {arch} writes captions: its text tower is not read here")
    settings = {**config["text_cfg"], "hf_model_pretrained": False}
    has_quick_gelu = config.get("quick_gelu", False) if quick_gelu is None else quick_gelu
    try:
        text = _build_text_tower(config["embed_dim"], settings, has_quick_gelu)
        tokenize = _quietly(open_clip.get_tokenizer, arch)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()
        raise ConfigError(
            f"the text tower or tokenizer of open_clip model {arch} cannot be made: {reason[0] if reason else error}",
            "it needs the package transformers, and its tokenizer's files once from the network",
        ) from error
    return TextTower(text, tokenize, width=config["embed_dim"])


def text_state(state: dict[str, Tensor], *, source: str) -> dict[str, Tensor]:
    """The tensors of a whole CLIP file that belong to a `TextTower`, under its names.

    Raises WeightsError if the file holds no text tower.
    """
    from open_clip.model import convert_to_custom_text_state_dict

    named = convert_to_custom_text_state_dict(dict(state))
    kept = {
        key: value.reshape(()) if key == SCALE_KEY else value
        for key, value in named.items()
        if key == SCALE_KEY or key.startswith("text.")
    }
    kept.pop("text.attn_mask", None)
    if not any(key.startswith("text.") for key in kept):
        raise WeightsError(
            f"{source} holds no text tower: it is an image tower alone",
            "give the whole model, such as open_clip:ViT-B-16-quickgelu/openai",
        )
    return kept


def _quietly(make: Callable[..., Any], *arguments: Any) -> Any:
    """What a library makes, without the lines it logs on the way."""
    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.WARNING)
    try:
        return make(*arguments)
    finally:
        root.setLevel(before)
