"""What DINO and EsViT share: a teacher that follows its student, and targets that are centred and sharpened.

Scores say how near a feature is to each of K prototypes. The teacher's, minus their running mean and divided by a low
temperature, become distributions, which the student's must predict from another crop of the image. Centring alone tends
to the uniform distribution, sharpening alone to a single prototype; together they keep both away.
Source: Caron et al. 2021 (arXiv 2104.14294), section 3.1; facebookresearch/dino at 7c446df, main_dino.py.
"""

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from pydantic import Field
from timm.layers import DropPath
from torch import Tensor

from fdkit.config import Config
from fdkit.data.views import MultiCrop
from fdkit.errors import ConfigError
from fdkit.methods._method import Holding
from fdkit.methods._network import NetworkConfig, build_network
from fdkit.methods._resnet import with_full_residuals
from fdkit.models.backbone import Backbone
from fdkit.models.collectives import sum_over_ranks, world_size
from fdkit.models.heads import DINOHead
from fdkit.models.momentum import Module, momentum_copy

NUM_GLOBAL = 2
"""Views that the teacher sees: the first two."""


class SelfDistillationConfig(Config):
    """Heads, temperatures and momenta; the defaults are those of DINO's code."""

    output_dim: int = Field(default=65536, ge=2)
    """How many prototypes there are, K: the width of the scores."""
    hidden_dim: int = Field(default=2048, ge=1)
    """Width of the hidden layers of the head."""
    bottleneck_dim: int = Field(default=256, ge=1)
    """Width of the head before the prototypes, where its output is scaled to length 1."""
    num_head_layers: int = Field(default=3, ge=1)
    """Layers of the head before the prototypes."""
    head_norm: bool = False
    """Batch norms after the hidden layers of the head."""
    norm_last_layer: bool = True
    """Keep all prototypes at length 1; false learns the length of each, which is better and less stable."""
    student_temperature: float = Field(default=0.1, gt=0)
    """Divides the student's scores before the softmax."""
    teacher_temperature: float = Field(default=0.04, gt=0)
    """Divides the teacher's centred scores after the warm-up; above 0.07 most runs are unstable."""
    warmup_teacher_temperature: float = Field(default=0.04, gt=0)
    """Divides the teacher's centred scores in the first epoch of the warm-up."""
    warmup_teacher_temperature_epochs: int = Field(default=0, ge=0)
    """Epochs in which the teacher's temperature goes linearly from one to the other, an epoch at a time."""
    centre_momentum: float = Field(default=0.9, ge=0, lt=1)
    """Share of itself the centre keeps at an optimiser step."""
    momentum: float = Field(default=0.996, ge=0, le=1)
    """Share of itself the teacher keeps at the first optimiser step; it rises to 1 along half a cosine."""
    freeze_last_layer_epochs: int = Field(default=1, ge=0)
    """Epochs at the beginning in which the prototypes stay as they were drawn."""


def build_head(in_dim: int, config: SelfDistillationConfig) -> DINOHead:
    """The configured head on features of in_dim channels, drawn from the global generator."""
    return DINOHead(
        in_dim,
        config.output_dim,
        hidden_dim=config.hidden_dim,
        bottleneck_dim=config.bottleneck_dim,
        num_layers=config.num_head_layers,
        norm=config.head_norm,
        learn_gain=not config.norm_last_layer,
    )


def refuse_resizing(student: Backbone, views: MultiCrop) -> None:
    """Raises ConfigError for a network that would not take all views as they are."""
    if resized := sorted(set(views.sizes) - {student.image_size, *student.sizes}):
        raise ConfigError(
            f"the network would resize views of {resized[0]} pixels; build it to take them as they are"
        )


def teacher_of(student: Module) -> Module:
    """An equal copy that takes no gradient and drops no branches; its batch norms live by its own batches."""
    teacher = momentum_copy(student)
    for part in teacher.modules():
        if isinstance(part, DropPath):
            part.drop_prob = 0.0
    return teacher


def teacher_temperature(config: SelfDistillationConfig, epoch: int) -> float:
    """The teacher's temperature in an epoch, counted from 0; the last epoch of the warm-up has the final one."""
    start, end = config.warmup_teacher_temperature, config.teacher_temperature
    num_epochs = config.warmup_teacher_temperature_epochs
    if epoch >= num_epochs:
        return end
    return start + (end - start) * epoch / max(1, num_epochs - 1)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # its value changes with the epoch
def temperature_for(centre: "Centre", config: SelfDistillationConfig, epoch: float) -> Tensor:
    """`teacher_temperature` as a scalar of the centre's kind, so that a compiled graph serves every epoch."""
    value = teacher_temperature(config, int(epoch))
    return torch.full((), value, dtype=centre.value.dtype, device=centre.value.device)


def build_multi_size(network: NetworkConfig, views: MultiCrop, *, seed: int) -> Backbone:
    """The configured network, which takes all views as they are; a ResNet starts as torchvision's does."""
    sizes = tuple(sorted(set(views.sizes) - {views.image_size}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_network(with_full_residuals(network), image_size=views.image_size, sizes=sizes)


def keep_prototypes(heads: Iterable[DINOHead]) -> None:
    """Take away the gradients of the last layers: without one, weight decay does not move a parameter either."""
    for head in heads:
        for parameter in head.prototypes.parameters():
            parameter.grad = None


def batches_by_size(views: Sequence[Tensor]) -> list[Tensor]:
    """Neighbouring views (B, 3, S, S) of one size as one batch, view by view; a batch norm sees them together."""
    return [torch.cat(list(group)) for _, group in groupby(views, key=lambda view: view.shape[-1])]


class Centre(Holding):
    """The running mean of the teacher's scores over all ranks: c <- m c + (1 - m) * mean, once an optimiser step.

    `value` (1, K) starts at 0. Scores that were added wait until `update`, which belongs after the optimiser's step:
    all parts of a batch are centred alike, and by what was known before it.
    """

    value: Tensor

    def __init__(self, num_prototypes: int, *, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("value", torch.zeros(1, num_prototypes))
        self._sums: list[Tensor] = []
        self._count = 0

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a compiled graph cannot keep sums for later
    @torch.no_grad()
    def add(self, scores: Tensor) -> None:
        """Note a teacher's scores (R, K), before centring and temperature."""
        self._sums.append(scores.sum(dim=0, keepdim=True, dtype=self.value.dtype))
        self._count += len(scores)

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the mean of the scores added on all ranks since the last time; stay where there are none."""
        if not self._sums:
            return
        mean = sum_over_ranks(torch.stack(self._sums).sum(dim=0)) / (self._count * world_size())
        self.value.lerp_(mean, 1 - self.momentum)
        self.forget_held()

    def forget_held(self) -> None:
        """Drop the scores added since the last step."""
        self._sums, self._count = [], 0


def centred_targets(teacher_scores: Tensor, centre: Tensor, temperature: float | Tensor) -> Tensor:
    """Distributions softmax((scores - centre) / temperature), (R, K) of (R, K), in float32 or finer.

    centre: (1, K), of the scores themselves, so it is subtracted before they are divided. Detached.
    """
    scores = _widened(teacher_scores.detach())
    return ((scores - centre) / temperature).softmax(dim=-1)


class Targets(NamedTuple):
    """What some rows of scores are to predict."""

    rows: Tensor
    """(R, K): each is the sum of `number` distributions."""
    number: int


def cross_entropy_of_pairs(scores: Tensor, targets: Tensor, *, num_views: int, temperature: float) -> Tensor:
    """Mean over pairs of a teacher's view i and a student's view j != i of -sum_k p_t log softmax(scores / T)_k.

    scores: (V * B, K) of the student, view by view; targets: (2 * B, K), distributions of the first two views. These
    are 2 * (V - 1) pairs, each a mean over the B images. In float32 or finer.
    Source: Caron et al. 2021, equation 3. As the logarithm does not know i, targets are summed over i first.
    """
    assert len(scores) * NUM_GLOBAL == len(targets) * num_views, (scores.shape, targets.shape, num_views)
    first, second = targets.chunk(NUM_GLOBAL)
    both = Targets(first + second, 2)
    parts = [Targets(second, 1), Targets(first, 1), *[both] * (num_views - NUM_GLOBAL)]
    total = summed_cross_entropy(scores, parts, temperature=temperature)
    return total / (NUM_GLOBAL * (num_views - 1) * len(first))


def summed_cross_entropy(scores: Tensor, targets: Iterable[Targets], *, temperature: float) -> Tensor:
    """Sum over rows of -sum_k target_k log softmax(scores / temperature)_k, a scalar in float32 or finer.

    scores: (R, K); targets: of its rows, part by part. They are asked for one at a time and not kept, and the gradient
    is all that is kept of the scores.
    """
    total: Tensor = _SummedCrossEntropy.apply(scores, targets, temperature)
    return total


class _SummedCrossEntropy(torch.autograd.Function):
    """The gradient (number * softmax(scores / T) - targets) / T is made on the way, where the softmax is at hand."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, targets: Iterable[Targets], temperature: float) -> Tensor:
        gradient = torch.empty_like(scores) if ctx.needs_input_grad[0] else None
        total, start = scores.new_zeros((), dtype=_wide(scores.dtype)), 0
        for rows, number in targets:
            part = slice(start, start + len(rows))
            log_shares = (_widened(scores[part]) / temperature).log_softmax(dim=-1)
            total -= (rows * log_shares).sum()
            if gradient is not None:
                gradient[part] = log_shares.exp_().mul_(number).sub_(rows).div_(temperature)
            start += len(rows)
        assert start == len(scores), f"targets for {start} of {len(scores)} rows"
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad).to(gradient.dtype), None, None


class TargetStatistics(NamedTuple):
    """What tells the two collapses from health; detached scalars."""

    entropy: Tensor
    """Mean entropy of a target: ln K where all are uniform, 0 where each is a single prototype."""
    prototypes_used: Tensor
    """exp of the entropy of the mean target: 1 where all images share one prototype, K where all are used alike."""


@torch.no_grad()
def target_statistics(targets: Tensor) -> TargetStatistics:
    """Statistics of distributions (R, K)."""
    entropy = torch.special.entr(targets).sum(dim=-1).mean()
    return TargetStatistics(entropy, torch.special.entr(targets.mean(dim=0)).sum().exp())


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _widened(values: Tensor) -> Tensor:
    return values.to(_wide(values.dtype))
