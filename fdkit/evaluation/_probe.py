"""Linear heads trained at the same time on the same batches, each exactly as it would be alone.

The K heads that read the same columns of the features are one (K * C, D) weight: the gradient of the sum of their
losses is each head's own gradient, and it has a closed form, so a step is two matrix products whatever K is. Norms,
rates and decays are a head's own. What the classifiers see is normalised batch by batch; the features themselves may
be a file and are never copied whole.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple, Protocol, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fdkit.config import Config
from fdkit.errors import ConfigError
from fdkit.evaluation._columns import Columns, width_of

Normalization = Literal["standardize", "batch_norm", "none"]
Batch = tuple[Tensor, Tensor]
"""Features (B, D) and labels (B,) int64."""

# Smallest variance a channel is divided by, as in MAE's probe: a constant channel stays near zero.
VARIANCE_FLOOR = 1e-6
BATCH_NORM_MOMENTUM = 0.1
# LARS and LARC move a tensor by this share of its own norm, times the learning rate.
TRUST = 1e-3
LARC_EPSILON = 1e-8
INIT_STD = 0.01
READ_AT_ONCE = 16384


class ProbeConfig(Config):
    """How a linear head is trained."""

    epochs: int = Field(100, ge=1)
    """Passes over the training features."""
    train_batch_size: int = Field(256, ge=1)
    """Features a step, of all processes together."""
    lr_reference_batch: int | None = Field(None, gt=0)
    """The learning rates are given for this batch size and scale with train_batch_size; null: used as they are."""
    lr_schedule: Literal["cosine", "steps", "constant"] = "cosine"
    """After the warm-up: half a cosine to zero, a tenth at each of lr_steps, or constant."""
    lr_steps: tuple[float, ...] = ()
    """Epochs at which the schedule "steps" takes a tenth of the learning rate."""
    lr_update: Literal["step", "epoch"] = "step"
    """How often the learning rate changes after the warm-up."""
    warmup_epochs: float = Field(0, ge=0)
    """Epochs in which the learning rate grows from zero, step by step."""
    optimizer: Literal["sgd", "lars", "larc"] = "sgd"
    """SGD with momentum; LARS as in MAE's probe (weights move by a share of their norm, biases as in SGD); or LARC as
    in SimSiam's (biases too)."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of every optimizer."""
    nesterov: bool = False
    """Whether SGD looks ahead along its momentum."""
    clip_grad: float | None = Field(None, gt=0)
    """Largest gradient norm of a head, weight and bias together; null: off."""
    normalization: Normalization = "standardize"
    """In front of the heads: standardize, by mean and variance over the training images; batch_norm, without scale and
    offset, by those of the batch in training and by running ones afterwards; or none."""
    init: Literal["zero", "normal"] = "zero"
    """Weights at the start: zero, so that the seed matters less; or normal with standard deviation 0.01, which MAE's
    truncated normal is too: it is cut 200 standard deviations away. Biases are zero."""
    seed: int = Field(0, ge=0)
    """Seed of the validation split, the order of batches, the random views and the initial weights."""

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        if self.warmup_epochs >= self.epochs and self.warmup_epochs > 0:
            raise ConfigError(
                f"warmup_epochs is {self.warmup_epochs:g}, and the probe trains for {self.epochs} epochs in all",
                "use a shorter --warmup-epochs or more --epochs",
            )
        if (self.lr_schedule == "steps") != bool(self.lr_steps):
            raise ConfigError(
                f"lr_schedule {self.lr_schedule} and lr_steps {list(self.lr_steps)} do not go together",
                "name the epochs with --lr-steps for the schedule steps, and for no other",
            )
        if self.nesterov and (self.optimizer != "sgd" or self.momentum == 0):
            raise ConfigError(
                f"nesterov is SGD's with momentum, but optimizer is {self.optimizer} with momentum {self.momentum:g}",
                "leave out --nesterov, or use --optimizer sgd --momentum 0.9",
            )
        return self


class Candidate(NamedTuple):
    """One setting of the sweep."""

    lr: float
    weight_decay: float = 0.0
    inputs: str = "all"
    """A name that the columns of the features are looked up by."""


class Probe(NamedTuple):
    """K linear classifiers of the same columns of features as they were extracted; normalisation is folded in."""

    candidates: tuple[Candidate, ...]
    """The K settings they were trained with."""
    columns: Columns
    """The W columns they read."""
    weight: Tensor
    """(K, C, W)."""
    bias: Tensor
    """(K, C)."""

    def scores(self, values: Tensor) -> Tensor:
        """Scores of every classifier for features (N, D): (N, K, C)."""
        flat = torch.addmm(self.bias.flatten(), values[:, self.columns], self.weight.flatten(0, 1).T)
        return flat.view(len(values), *self.bias.shape)

    def only(self, candidate: Candidate) -> "Probe":
        """The classifier of one of the candidates alone."""
        k = self.candidates.index(candidate)
        return Probe((candidate,), self.columns, self.weight[k : k + 1], self.bias[k : k + 1])

    def to(self, device: torch.device | str) -> "Probe":
        """The same classifiers on another device."""
        columns = self.columns if isinstance(self.columns, slice) else self.columns.to(device)
        return Probe(self.candidates, columns, self.weight.to(device), self.bias.to(device))


class Normalizer(Protocol):
    """What stands between features and heads."""

    def __call__(self, batch: Tensor) -> Tensor:
        """A training batch (B, D), normalised."""

    def folded(self) -> tuple[Tensor, Tensor] | None:
        """Mean and scale (D,) of (features - mean) * scale, which the finished heads are given; None for neither."""


class Unchanged:
    """Features as they are."""

    def __call__(self, batch: Tensor) -> Tensor:
        """The batch itself."""
        return batch

    def folded(self) -> None:
        """Neither shifts nor scales."""


class Standardizer:
    """Features with mean 0 and variance 1 over the images whose statistics are given."""

    def __init__(self, mean: Tensor, variance: Tensor) -> None:
        self.mean, self.scale = mean, (variance + VARIANCE_FLOOR).rsqrt()

    def __call__(self, batch: Tensor) -> Tensor:
        """The batch, standardised."""
        return (batch - self.mean) * self.scale

    def folded(self) -> tuple[Tensor, Tensor]:
        """The statistics given."""
        return self.mean, self.scale


class RunningNorm:
    """Batch norm without scale and offset, of all columns at once: `nn.BatchNorm1d(D, affine=False, eps=1e-6)`."""

    def __init__(self, like: Tensor) -> None:
        self.mean, self.variance = like.new_zeros(like.shape[1]), like.new_ones(like.shape[1])

    def __call__(self, batch: Tensor) -> Tensor:
        """The batch by its own statistics, which the running ones move towards."""
        variance, mean = torch.var_mean(batch, dim=0, correction=0)
        self.mean.lerp_(mean, BATCH_NORM_MOMENTUM)
        # Running variances are unbiased, those that normalise are not: torch's batch norm, and so MAE's.
        self.variance.lerp_(variance * (len(batch) / (len(batch) - 1)), BATCH_NORM_MOMENTUM)
        return (batch - mean) * (variance + VARIANCE_FLOOR).rsqrt()

    def folded(self) -> tuple[Tensor, Tensor]:
        """The running statistics."""
        return self.mean, (self.variance + VARIANCE_FLOOR).rsqrt()


def statistics(values: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (D,) of the columns over some rows of features (N, D), read once, in blocks.

    Accumulated in float64 and given in the type of values. Source: Chan et al. 1983, equation 2.1.
    """
    mean = torch.zeros(values.shape[1], dtype=torch.float64, device=values.device)
    squares, count = torch.zeros_like(mean), 0
    for block in rows.split(READ_AT_ONCE):
        variance, own = torch.var_mean(values[block].double(), dim=0, correction=0)
        total = count + len(block)
        gap = own - mean
        squares += variance * len(block) + gap.square() * (count * len(block) / total)
        mean += gap * (len(block) / total)
        count = total
    return mean.to(values.dtype), (squares / count).to(values.dtype)


def lr_factor(step: int, steps_per_epoch: int, config: ProbeConfig) -> float:
    """What the peak learning rate is multiplied by at a step counted from 0.

    Source: warm-up from zero and half a cosine, facebookresearch/mae@efb2a80 util/lr_sched.py; once an epoch,
    facebookresearch/moco-v3@c349e6e main_lincls.py; steps, facebookresearch/moco@132aea9 main_lincls.py.
    """
    epoch = step / steps_per_epoch
    if epoch < config.warmup_epochs:
        return epoch / config.warmup_epochs
    if config.lr_update == "epoch":
        epoch = step // steps_per_epoch
    if config.lr_schedule == "constant":
        return 1.0
    if config.lr_schedule == "steps":
        return 0.1 ** sum(epoch >= drop for drop in config.lr_steps)
    progress = (epoch - config.warmup_epochs) / (config.epochs - config.warmup_epochs)
    return 0.5 * (1 + math.cos(math.pi * max(0.0, progress)))


def train_heads(
    batches: Iterable[Batch],
    candidates: Sequence[Candidate],
    *,
    columns: Mapping[str, Columns],
    num_classes: int,
    normalizer: Normalizer,
    steps_per_epoch: int,
    like: Tensor,
    config: ProbeConfig,
) -> list[Probe]:
    """A classifier of num_classes for every candidate, one Probe for those of the same inputs.

    columns: the columns of each input by name; like: features (any, D) of the type and device of the batches.
    A head that diverges leaves the others alone and ends with values that are not finite.
    """
    names = dict.fromkeys(candidate.inputs for candidate in candidates)
    groups = [
        _Heads([one for one in candidates if one.inputs == name], columns[name], num_classes, like, config)
        for name in names
    ]
    for step, (values, labels) in enumerate(batches):
        inputs, factor = normalizer(values), lr_factor(step, steps_per_epoch, config)
        for heads in groups:
            heads.step(inputs, labels, factor)
    return [heads.finished(normalizer) for heads in groups]


class _Heads:
    """The K heads of one input and what their optimiser remembers."""

    def __init__(
        self,
        candidates: Sequence[Candidate],
        columns: Columns,
        num_classes: int,
        like: Tensor,
        config: ProbeConfig,
    ) -> None:
        self.candidates, self.columns, self.config = tuple(candidates), columns, config
        start = _initial_weight(num_classes, width_of(columns, like), config).to(like)
        self.weight = start.repeat(len(candidates), 1, 1)  # (K, C, W)
        self.bias = like.new_zeros(self.weight.shape[:2])  # (K, C)
        self.velocity = torch.zeros_like(self.weight), torch.zeros_like(self.bias)
        self.gradient = torch.empty_like(self.weight)
        reference = config.lr_reference_batch
        scale = 1.0 if reference is None else config.train_batch_size / reference
        self.lr = like.new_tensor([candidate.lr * scale for candidate in candidates])
        self.decay = like.new_tensor([candidate.weight_decay for candidate in candidates])
        self.has_decay = any(candidate.weight_decay > 0 for candidate in candidates)
        self.softmax_along_images = _softmax_along_images(like.device)

    def step(self, inputs: Tensor, labels: Tensor, factor: float) -> None:
        """One step on a batch of normalised features (B, D), at `factor` times the peak learning rates."""
        gradients = self._gradients(inputs[:, self.columns], labels)
        if self.config.clip_grad is not None:
            _clip(gradients, self.config.clip_grad)
        for parameter, gradient, velocity in zip(
            (self.weight, self.bias), gradients, self.velocity, strict=True
        ):
            self._decay_and_rescale(parameter, gradient)
            velocity.mul_(self.config.momentum).add_(gradient)
            if self.config.nesterov:
                velocity = gradient.add_(velocity, alpha=self.config.momentum)
            parameter.addcmul_(velocity, _per_head(self.lr, parameter), value=-factor)

    def finished(self, normalizer: Normalizer) -> Probe:
        """The classifiers of features as they come."""
        folded = normalizer.folded()
        if folded is None:
            return Probe(self.candidates, self.columns, self.weight, self.bias)
        mean, scale = (vector[self.columns] for vector in folded)
        weight = self.weight * scale
        return Probe(self.candidates, self.columns, weight, self.bias - (weight * mean).sum(dim=-1))

    def _gradients(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Of each head's mean cross-entropy, (K, C, W) and (K, C): (softmax - one-hot) inputs / B.

        inputs: (B, W); labels: (B,).
        """
        heads, num_classes, width = self.weight.shape
        error = self._errors(inputs, labels)  # (K * C, B)
        share, by_weight = 1 / len(labels), self.gradient.view(-1, width)
        by_weight.addmm_(error, inputs, beta=0, alpha=share)
        return self.gradient, error.sum(dim=1).mul_(share).view(heads, num_classes)

    def _errors(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """What the scores of (B, W) are wrong by, softmax - one-hot, (K * C, B)."""
        heads, num_classes, width = self.weight.shape
        flat, bias, minus = self.weight.view(-1, width), self.bias.flatten(), self.weight.new_full((), -1.0)
        if self.softmax_along_images:
            scores = torch.addmm(bias[:, None], flat, inputs.T).view(heads, num_classes, -1)
            error = scores.softmax(dim=1)
            error.scatter_add_(1, labels.expand(heads, 1, -1), minus.expand(heads, 1, len(labels)))
            return error.flatten(0, 1)
        scores = torch.addmm(bias, inputs, flat.T).view(-1, heads, num_classes)
        error = scores.softmax(dim=2)
        error.scatter_add_(2, labels[:, None, None].expand(-1, heads, 1), minus.expand(len(labels), heads, 1))
        return error.flatten(1).T

    def _decay_and_rescale(self, parameter: Tensor, gradient: Tensor) -> None:
        """Weight decay, of weights alone, and what LARS and LARC make of the gradient; in place.

        Source: You et al. 2017, equation 6; with decay inside the norm (LARS), facebookresearch/mae@efb2a80
        util/lars.py, or beside it (LARC), the wrapper facebookresearch/simsiam@a7bc177 takes from apex.
        """
        is_weight, optimizer = parameter is self.weight, self.config.optimizer
        slope = _norms(gradient) if optimizer == "larc" else None
        if is_weight and self.has_decay:
            gradient.add_(_per_head(self.decay, parameter) * parameter)
        if optimizer == "sgd" or (optimizer == "lars" and not is_weight):
            return
        size = _norms(parameter)
        if slope is None:
            slope = length = _norms(gradient)
        else:
            length = slope + size * (self.decay if is_weight else 0.0) + LARC_EPSILON
        gradient.mul_(_per_head(_trust(size, slope, length), parameter))


def _softmax_along_images(device: torch.device) -> bool:
    """Whether images lie side by side in memory where the softmax is taken, rather than classes.

    A CPU's vector instructions then take many images at a time: 16 times as fast for 10 classes.
    """
    return device.type == "cpu"


def _initial_weight(num_classes: int, width: int, config: ProbeConfig) -> Tensor:
    """(C, W) of every head, float32 on the CPU; it depends on the seed and the shape alone."""
    weight = torch.zeros(num_classes, width)
    random = torch.Generator().manual_seed(config.seed)
    if config.init == "normal":
        weight.normal_(std=INIT_STD, generator=random)
    return weight


def _clip(gradients: tuple[Tensor, Tensor], largest: float) -> None:
    """Scale each head's gradients to a joint norm of `largest` at most, as `clip_grad_norm_` does; in place."""
    weight, bias = gradients
    norm = torch.hypot(_norms(weight), _norms(bias))
    ratio = (largest / (norm + 1e-6)).clamp_max(1.0)
    for gradient in gradients:
        gradient.mul_(_per_head(ratio, gradient))


def _norms(tensor: Tensor) -> Tensor:
    """Euclidean norm of each head's part of (K, ...), (K,)."""
    return torch.linalg.vector_norm(tensor.flatten(1), dim=1)


def _trust(size: Tensor, slope: Tensor, length: Tensor) -> Tensor:
    """TRUST * size / length; 1 for a head whose parameter or gradient is zero."""
    return torch.where((size > 0) & (slope > 0), TRUST * size / length, torch.ones_like(size))


def _per_head(vector: Tensor, parameter: Tensor) -> Tensor:
    """(K,) as (K, 1, ...), to multiply the parameters of each head."""
    return vector.view(-1, *[1] * (parameter.ndim - 1))
