"""Final tokens as feature distillation reads them: which ones are compared, on which grid, and how they are whitened.

Source: Wei et al. 2022 (arXiv 2205.14141), section 3. The class token comes first where there is one; registers take no
part.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fdkit.analysis.observe import Observed, observe_tokens
from fdkit.errors import NumericsError
from fdkit.models.backbone import Tokens

Whitening = Literal["layernorm", "l2", "none"]
EPS = 1e-5
"""Added to variances before they divide."""
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


def paired_tokens(student: Tokens, teacher: Tokens) -> tuple[Tensor, Tensor]:
    """The tokens of both that stand for the same thing, (B, N, C_s) and (B, N, C_t).

    The class token comes first if both have one; then the teacher's grid, to which the student's map is resampled
    (bilinear, antialiased), so that the target stays what the teacher said.
    """
    patches = student.patches
    if student.grid != teacher.grid:
        maps = patches.transpose(1, 2).unflatten(2, student.grid)
        maps = F.interpolate(maps, size=teacher.grid, mode="bilinear", antialias=True)
        patches = maps.flatten(2).transpose(1, 2)
    count = min(student.prefix.shape[1], teacher.prefix.shape[1], 1)
    resampled = Tokens(student.prefix[:, :count], patches, teacher.grid)
    return resampled.all(), Tokens(teacher.prefix[:, :count], teacher.patches, teacher.grid).all()


def whiten(vectors: Tensor, whitening: Whitening) -> Tensor:
    """Vectors (..., C), each on the scale that distillation works in; nothing here is learned.

    layernorm: mean 0 and biased variance 1 over its channels (eps 1e-5); l2: length 1; none: as it is.
    """
    if whitening == "layernorm":
        return F.layer_norm(vectors, vectors.shape[-1:], eps=EPS)
    return F.normalize(vectors, dim=-1) if whitening == "l2" else vectors
