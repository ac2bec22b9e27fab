"""Final tokens as feature distillation reads them: the class token, where there is one, and the patches."""

import torch
from torch import Tensor

from fdkit.analysis.observe import Observed, observe_tokens
from fdkit.errors import NumericsError
from fdkit.models.backbone import Tokens

WHITENING_WORDS: dict[str, str] = {
    "layernorm": "whitened per token",
    "batch": "whitened per channel",
    "l2": "scaled to length 1",
    "none": "as given",
}


def final_tokens(observed: Observed, images: Tensor) -> Tokens:
    """What the model says of images (B, 3, H, W) at its end, its final norm included, in float32.

    Raises NumericsError if a value is not finite.
    """
    tokens = observe_tokens(observed.model, images)
    if not (tokens.prefix.isfinite().all() and tokens.patches.isfinite().all()):
        raise NumericsError(
            f"the final tokens of {observed.name} are not finite",
            "the weights may be damaged, or training has diverged",
        )
    return Tokens(tokens.prefix.float(), tokens.patches.float(), tokens.grid)


def target_tokens(tokens: Tokens) -> Tensor:
    """(B, N, C): the class token, where there is one, then the patches."""
    return torch.cat([tokens.prefix[:, :1], tokens.patches], dim=1)
