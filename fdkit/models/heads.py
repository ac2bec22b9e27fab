"""Heads: small networks on top of a backbone's feature, used in pretraining and dropped afterwards."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdkit.models.batch_norm import BatchNorm

LastNorm = Literal["none", "plain", "scale", "affine"]
Activation = Literal["relu", "gelu"]


def mlp_head(
    widths: Sequence[int],
    *,
    hidden_bias: bool = False,
    last_bias: bool = False,
    hidden_norm: bool = True,
    last_norm: LastNorm = "none",
    activation: Activation = "relu",
) -> nn.Sequential:
    """An MLP of linear layers; (B, widths[0]) to (B, widths[-1]).

    widths: of the input, the hidden layers and the output. Each hidden layer is followed by a batch norm, unless
    hidden_norm is false, and the activation; the last by its own batch norm: none, "plain" (neither scale nor shift),
    "scale" (a scale alone is learned) or "affine". Batch norms are synchronised across ranks.
    """
    if len(widths) < 2:
        raise ValueError(f"widths {tuple(widths)}: a head has at least an input and an output")
    layers: list[nn.Module] = []
    *hidden, (in_dim, out_dim) = pairwise(widths)
    for width, next_width in hidden:
        layers.append(nn.Linear(width, next_width, bias=hidden_bias))
        if hidden_norm:
            layers.append(BatchNorm(next_width))
        layers.append(nn.ReLU(inplace=True) if activation == "relu" else nn.GELU())
    layers.append(nn.Linear(in_dim, out_dim, bias=last_bias))
    if last_norm != "none":
        layers.append(_last_norm(out_dim, last_norm))
    return nn.Sequential(*layers)


def _last_norm(width: int, kind: LastNorm) -> nn.Module:
    norm = BatchNorm(width, affine=kind != "plain")
    if kind == "scale":
        norm.bias.requires_grad_(False)
    return norm


class Prototypes(nn.Module):
    """Scores of vectors against K prototypes of length 1, which a linear layer without bias holds.

    learn_gain: each score is also multiplied by a learned factor, 1 at first (weight normalisation, Salimans and
    Kingma 2016); else the factor stays 1, and scores of unit vectors are cosines.
    """

    def __init__(self, in_dim: int, num_prototypes: int, *, learn_gain: bool = False) -> None:
        super().__init__()
        self.learn_gain = learn_gain
        self.weight = nn.Parameter(nn.Linear(in_dim, num_prototypes, bias=False).weight.detach())
        self.gain = nn.Parameter(torch.ones(num_prototypes, 1), requires_grad=learn_gain)

    def forward(self, rows: Tensor) -> Tensor:
        """(B, K) of rows (B, C)."""
        if self.gain.requires_grad or torch.is_autocast_enabled(rows.device.type):
            return F.linear(rows, torch._weight_norm(self.weight, self.gain, 0))
        scores: Tensor = _Cosines.apply(rows, self.weight)
        return scores * self.gain.T if self.learn_gain else scores


class _Cosines(torch.autograd.Function):
    """Rows times vectors over their lengths: the scores are divided, not the vectors, of which there are far more."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:
        inverse = torch.linalg.vector_norm(weight, dim=1).reciprocal_()
        scores = (rows @ weight.T).mul_(inverse)
        ctx.save_for_backward(rows, weight, inverse, scores)
        return scores

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        rows, weight, inverse, scores = ctx.saved_tensors
        scaled = grad * inverse
        along = torch.linalg.vecdot(scaled, scores, dim=0) * inverse
        return scaled @ weight, (scaled.T @ rows).addcmul_(weight, along[:, None], value=-1)


class DINOHead(nn.Module):
    """DINO's head: an MLP with GELU, its output scaled to length 1, against prototypes of length 1.

    Matrices start from a normal distribution of std 0.02 cut at +-2, biases from 0.
    Source: Caron et al. 2021 (DINO), appendix C; facebookresearch/dino at 7c446df, vision_transformer.py.
    """

    def __init__(
        self,
        in_dim: int,
        num_prototypes: int,
        *,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        num_layers: int = 3,
        norm: bool = False,
        learn_gain: bool = False,
    ) -> None:
        """norm: a batch norm after each hidden layer; learn_gain: as for `Prototypes`."""
        super().__init__()
        widths = [in_dim, *[hidden_dim] * (num_layers - 1), bottleneck_dim]
        self.mlp = mlp_head(widths, hidden_bias=True, last_bias=True, hidden_norm=norm, activation="gelu")
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.prototypes = Prototypes(bottleneck_dim, num_prototypes, learn_gain=learn_gain)

    def forward(self, features: Tensor) -> Tensor:
        """Scores (B, K) of features (B, C), each in [-1, 1] while the gain is 1."""
        scores: Tensor = self.prototypes(F.normalize(self.mlp(features), dim=1))
        return scores
