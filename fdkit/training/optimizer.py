"""Optimisers and which parameters they decay."""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.optim import Optimizer

from fdkit.config import Config
from fdkit.errors import ConfigError
from fdkit.models.depth import layer_ids

DecayRule = Literal["none", "1d", "1d+tokens"]
Shape = Literal["cosine", "steps", "constant"]

TOKEN_NAMES = ("pos_embed", "cls_token")
SWIN_POSITION_NAMES = ("cpb_mlp", "rpe_mlp", "logit_scale", "relative_position_bias_table")


class OptimizerConfig(Config):
    """The optimiser and its learning-rate schedule (linear warm-up, then half a cosine, an update at a time)."""

    name: Literal["adamw", "sgd", "lars", "larc", "lamb"] = "adamw"
    """AdamW; SGD with momentum; LARS as in MoCo v3 (vectors neither decayed nor rescaled); LARC as in SwAV (every
    tensor rescaled); or timm's LAMB."""
    lr: float = Field(3e-4, gt=0)
    """Peak learning rate for a global batch of lr_reference_batch images."""
    lr_reference_batch: int | None = Field(512, gt=0)
    """lr, warmup_lr and min_lr are given for this batch size and scale with the real one; null: used as given."""
    scale_min_lr: bool = True
    """Whether min_lr scales with the batch too; false in DINO."""
    lr_schedule: Shape = "cosine"
    """After the warm-up: half a cosine to min_lr, a tenth at each of lr_steps, or constant."""
    lr_steps: tuple[float, ...] = ()
    """Epochs at which the schedule "steps" takes a tenth of the learning rate."""
    lr_update: Literal["step", "epoch"] = "step"
    """How often the learning rate changes after the warm-up; once an epoch in SimSiam and MoCo v1 and v2."""
    constant_lr: tuple[str, ...] = ()
    """Parts of the method that keep the peak learning rate, by the beginning of their parameters' names: predictor."""
    layer_decay: float | None = Field(None, gt=0, le=1)
    """Each layer of the student learns at this times the rate of the layer behind it; what is outside the student, and
    a classifier, learns at the full rate; null: all do."""
    weight_decay: float = Field(0.05, ge=0)
    """Decay of the parameters that decay_exempt leaves in; decoupled from the gradient in AdamW."""
    weight_decay_end: float | None = Field(None, ge=0)
    """Weight decay at the end, reached along half a cosine without warm-up, as in DINO; null: constant."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Decay rates of AdamW's and LAMB's two moments."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of SGD, LARS and LARC."""
    decay_exempt: DecayRule = "1d+tokens"
    """Not decayed: nothing; vectors and biases; or also position embeddings, class token, Swin's position terms."""
    clip_grad: float | None = Field(3.0, gt=0)
    """Largest global gradient norm; longer gradients are scaled down to it; null: off."""
    clip_each_parameter: bool = False
    """Clip each parameter's gradient by its own norm, as DINO does, rather than all by the global one."""
    warmup_epochs: float = Field(10, ge=0)
    """Epochs of linear warm-up from warmup_lr to lr."""
    warmup_reaches_peak: bool = False
    """Reach lr at the last step of the warm-up, as DINO and SwAV do, rather than at the step after it."""
    warmup_lr: float = Field(5e-7, ge=0)
    """Learning rate of the first update, before scaling by the batch size."""
    min_lr: float = Field(5e-6, ge=0)
    """Learning rate the cosine ends at, before scaling by the batch size."""

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        if (self.lr_schedule == "steps") != bool(self.lr_steps):
            raise ConfigError(
                f"optim.lr_schedule {self.lr_schedule} and optim.lr_steps {list(self.lr_steps)} do not go together",
                "name the epochs with --optim.lr-steps for the schedule steps, and for no other",
            )
        if self.clip_each_parameter and self.clip_grad is None:
            raise ConfigError(
                "optim.clip_each_parameter has no effect without optim.clip_grad", "use --optim.clip-grad 3"
            )
        return self


class Lars(Optimizer):
    """SGD with momentum whose matrices move by a fixed share of their own norm.

    Tensors of two or more dimensions: g <- g + weight_decay * w, then g <- g * trust * |w| / |g| (1 if either
    norm is 0). Vectors take plain momentum SGD, without decay. Source: You et al. 2017, equation 6, as used by
    MoCo v3. timm's Lars divides by |g| + weight_decay * |w| instead, which is another update.
    """

    def __init__(
        self, params: Any, *, lr: float, weight_decay: float, momentum: float = 0.9, trust: float = 1e-3
    ) -> None:
        super().__init__(
            params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "trust": trust}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        assert closure is None, "the training loop computes gradients itself"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group)

    def _move(self, parameter: Tensor, group: dict[str, Any]) -> None:
        gradient = parameter.grad
        assert gradient is not None
        if parameter.ndim > 1:
            gradient = gradient.add(parameter, alpha=group["weight_decay"])
            size, slope = parameter.norm(), gradient.norm()
            ratio = torch.where(
                (size > 0) & (slope > 0), group["trust"] * size / slope, torch.ones_like(size)
            )
            gradient = gradient * ratio
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        velocity = state["momentum_buffer"].mul_(group["momentum"]).add_(gradient)
        parameter.add_(velocity, alpha=-group["lr"])


def _swin_prefixes(model: nn.Module) -> tuple[str, ...]:
    """Name prefixes of the Swin networks (V1 or V2) inside a model."""
    modules = ("timm.models.swin_transformer", "timm.models.swin_transformer_v2")
    found = [name for name, module in model.named_modules() if type(module).__module__ in modules]
    roots = [
        name for name in found if not any(name.startswith(f"{other}.") for other in found if other != name)
    ]
    return tuple(f"{name}." if name else "" for name in roots)


def parameter_groups(
    model: nn.Module,
    rule: DecayRule,
    weight_decay: float,
    *,
    constant_lr: Sequence[str] = (),
    lr_scales: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups of what the model trains: the decayed, then the exempt; empty groups are left out.

    constant_lr: beginnings of names of parameters that form groups of their own, marked "constant_lr".
    lr_scales: what the learning rate of a parameter, by its name, is multiplied by, where that is not 1; parameters of
    one scale form groups of their own, which hold it as "lr_scale", smaller ones first.
    Raises ConfigError if no trained parameter begins with one of them.

    A ViT's relative position bias table is a matrix and is decayed, also where timm's `no_weight_decay` lists
    it. Source: Feature Distillation's optimiser code.
    """
    swin = _swin_prefixes(model)

    def exempt(name: str, parameter: nn.Parameter) -> bool:
        if rule == "none":
            return False
        if parameter.ndim <= 1 or name.endswith(".bias"):
            return True
        if rule == "1d":
            return False
        in_swin = any(name.startswith(prefix) for prefix in swin)
        return name.endswith(TOKEN_NAMES) or (in_swin and any(part in name for part in SWIN_POSITION_NAMES))

    scales = lr_scales or {}
    groups: dict[tuple[bool, bool, float], list[nn.Parameter]] = {
        (keeps, is_exempt, scale): []
        for keeps in (False, True)
        for is_exempt in (False, True)
        for scale in sorted({*scales.values(), 1.0})
    }
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for prefix in constant_lr:
        if not any(name.startswith(prefix) for name in trained):
            parts = sorted({name.partition(".")[0] for name in trained})
            raise ConfigError(
                f"optim.constant_lr {prefix}: no trained parameter begins so", f"known: {', '.join(parts)}"
            )
    for name, parameter in trained.items():
        keeps, scale = name.startswith(tuple(constant_lr)), scales.get(name, 1.0)
        groups[keeps, exempt(name, parameter), scale].append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": 0.0 if is_exempt else weight_decay,
            "is_decayed": not is_exempt,
            "constant_lr": keeps,
            "lr_scale": scale,
        }
        for (keeps, is_exempt, scale), parameters in groups.items()
        if parameters
    ]


def layer_scales(model: nn.Module, decay: float) -> dict[str, float]:
    """By the parameters' names in the model, decay ** (last layer - layer) for each of its student's parameters.

    Raises ConfigError for a student whose layers are not known. Source: Clark et al. 2020 (ELECTRA), as in BEiT.
    """
    network = model.get_submodule("student.network")
    ids, last = layer_ids(network)
    return {f"student.network.{name}": decay ** (last - layer) for name, layer in ids.items()}


def trained_parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    """Every parameter the optimiser moves."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """The configured optimiser over what the model trains; the loop sets its learning rate at every step."""
    groups = parameter_groups(
        model,
        config.decay_exempt,
        config.weight_decay,
        constant_lr=config.constant_lr,
        lr_scales=None if config.layer_decay is None else layer_scales(model, config.layer_decay),
    )
    assert groups, "a method trains at least one parameter"
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
    if config.name == "sgd":
        return _sgd(groups, config)
    if config.name == "lars":
        return Lars(groups, lr=config.lr, weight_decay=config.weight_decay, momentum=config.momentum)
    if config.name == "larc":
        from timm.optim.lars import Lars as Larc  # which divides by |g| + weight_decay * |w|, as LARC does

        return Larc(groups, lr=config.lr, momentum=config.momentum, trust_coeff=1e-3, always_adapt=True)
    from timm.optim.lamb import Lamb

    # Clipping is the loop's: timm's LAMB would clip a second time, at norm 1.
    return Lamb(groups, lr=config.lr, betas=config.betas, max_grad_norm=None)


def _sgd(groups: list[dict[str, Any]], config: OptimizerConfig) -> Optimizer:
    """Fused SGD, ready for parameters that get their first gradient late: it takes all momentum buffers or none."""
    optimizer = torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=True)
    if config.momentum:
        for parameter in trained_parameters(optimizer):
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as named tensors: "state.<parameter>.<key>" and "group.<group>.<key>"."""
    saved = optimizer.state_dict()
    tensors = {
        f"state.{index}.{key}": value
        for index, values in saved["state"].items()
        for key, value in values.items()
        if value is not None
    }
    tensors |= {
        f"group.{index}.{key}": value
        for index, group in enumerate(saved["param_groups"])
        for key, value in group.items()
        if isinstance(value, Tensor)
    }
    return tensors


def load_optimizer_tensors(optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave, into an optimiser built from the same model and configuration."""
    loaded = optimizer.state_dict()
    loaded["state"] = {}
    for name, value in tensors.items():
        kind, index, key = name.split(".", 2)
        if kind == "group":
            loaded["param_groups"][int(index)][key] = value
        else:
            loaded["state"].setdefault(int(index), {})[key] = value
    optimizer.load_state_dict(loaded)
