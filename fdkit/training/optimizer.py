"""Optimisers and which parameters they decay."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer

from fdkit.config import Config

DecayRule = Literal["none", "1d", "1d+tokens"]

TOKEN_NAMES = ("pos_embed", "cls_token")
SWIN_POSITION_NAMES = ("cpb_mlp", "rpe_mlp", "logit_scale", "relative_position_bias_table")


class OptimizerConfig(Config):
    """The optimiser and its learning-rate schedule (linear warm-up, then half a cosine, an update at a time)."""

    name: Literal["adamw", "lars", "lamb"] = "adamw"
    """AdamW; LARS as in MoCo v3 (vectors neither decayed nor rescaled); or timm's LAMB."""
    lr: float = Field(3e-4, gt=0)
    """Peak learning rate for a global batch of lr_reference_batch images."""
    lr_reference_batch: int | None = Field(512, gt=0)
    """lr, warmup_lr and min_lr are given for this batch size and scale with the real one; null: used as given."""
    weight_decay: float = Field(0.05, ge=0)
    """Decay of the parameters that decay_exempt leaves in; decoupled from the gradient in AdamW."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of AdamW's and LAMB's two moments."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of LARS."""
    decay_exempt: DecayRule = "1d+tokens"
    """Not decayed: nothing; vectors and biases; or also position embeddings, class token, Swin's position terms."""
    clip_grad: float | None = Field(3.0, gt=0)
    """Largest global gradient norm; longer gradients are scaled down to it; null: off."""
    warmup_epochs: float = Field(10, ge=0)
    """Epochs of linear warm-up from warmup_lr to lr."""
    warmup_lr: float = Field(5e-7, ge=0)
    """Learning rate of the first update, before scaling by the batch size."""
    min_lr: float = Field(5e-6, ge=0)
    """Learning rate the cosine ends at, before scaling by the batch size."""


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


def decay_groups(model: nn.Module, rule: DecayRule, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups of what the model trains: the decayed, then the exempt; empty groups are left out.

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

    groups: tuple[dict[str, Any], ...] = (
        {"params": [], "weight_decay": weight_decay},
        {"params": [], "weight_decay": 0.0},
    )
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[exempt(name, parameter)]["params"].append(parameter)
    return [group for group in groups if group["params"]]


def trained_parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    """Every parameter the optimiser moves."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """The configured optimiser over what the model trains; the loop sets its learning rate at every step."""
    groups = decay_groups(model, config.decay_exempt, config.weight_decay)
    assert groups, "a method trains at least one parameter"
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
    if config.name == "lars":
        return Lars(groups, lr=config.lr, weight_decay=config.weight_decay, momentum=config.momentum)
    from timm.optim.lamb import Lamb

    # Clipping is the loop's: timm's LAMB would clip a second time, at norm 1.
    return Lamb(groups, lr=config.lr, betas=config.betas, max_grad_norm=None)


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
