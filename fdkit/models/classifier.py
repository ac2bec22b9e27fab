"""A backbone with a new classifier in place of its head: what fine-tuning starts from.

The network stays one of timm's, built with other arguments, so that what is trained loads into timm as it is.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fdkit.errors import ConfigError
from fdkit.models.backbone import Backbone, Pooling
from fdkit.models.libraries import build_timm

log = logging.getLogger("fdkit")

SHARED_TABLE = "rel_pos_bias.relative_position_bias_table"
"""The bias table all blocks of a Beit share."""
LEFT_OUT = ("norm.", "attn_pool.", "head.", "head_dist.", "fc.", "classifier.")
"""Beginnings of the names of tensors that a network with a new head may be without: its old end."""


def build_classifier(
    backbone: Backbone,
    classes: Sequence[str],
    *,
    pooling: Pooling = "patches",
    drop_path: float = 0.0,
    per_block_bias: bool = True,
    head_std: float = 0.02,
    head_scale: float = 1.0,
    keep_weights: bool = True,
    seed: int = 0,
) -> Backbone:
    """The same network ending in logits of these classes, (B, K), with the weights of `backbone` up to its old end.

    backbone: a timm network; its own tensors stay as they are.
    classes: names, kept in the recipe under "classes".
    pooling: of a ViT, BEiT or EVA: "patches", the mean of the patch tokens through a LayerNorm of its own, which begins
        anew (the final norm is left out, and said to be); "cls", the class token behind the pretrained final norm.
        Other networks pool as timm's own classifier of theirs does, behind the pretrained norm.
    drop_path: stochastic depth of the last block, growing linearly from 0 at the first.
    per_block_bias: a bias table shared by all blocks becomes one for each, equal to it, which changes no token.
    head_std, head_scale: the classifier's weights are normal of this deviation, times this factor; its bias is 0.
    keep_weights: False begins with timm's random weights throughout.
    seed: of all random weights; the global generator is left alone.
    Raises ConfigError for another library's network, "cls" without a class token, a network without a linear
    classifier, and stochastic depth in one that has none.
    Source: He et al. 2021 (MAE), appendix A.1; Wei et al. 2022 (arXiv 2205.14141), released code.
    """
    args = _arguments(backbone, len(classes), pooling, drop_path, per_block_bias=per_block_bias)
    name = backbone.recipe["architecture"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = _build(backbone, args)
        _initialise_head(classifier.network, head_std, head_scale)
    if keep_weights:
        _take_weights(classifier.network, backbone.network.state_dict(), name)
    classifier.recipe["classes"] = list(classes)
    return classifier


def _arguments(
    backbone: Backbone, num_classes: int, pooling: Pooling, drop_path: float, *, per_block_bias: bool
) -> dict[str, Any]:
    """The arguments that make timm build the network with the wanted end."""
    recipe, network = backbone.recipe, backbone.network
    if recipe["library"] != "timm":
        raise ConfigError(
            f"{recipe['architecture']} is a network of {recipe['library']}, not of timm",
            "name timm's model of the same weights: timm:NAME",
        )
    args = {key: value for key, value in recipe["model_args"].items() if key != "final_norm"}
    args |= {"num_classes": num_classes, **_end(backbone, pooling)}
    if drop_path:
        args["drop_path_rate"] = drop_path
    else:
        args.pop("drop_path_rate", None)
    if per_block_bias and SHARED_TABLE in network.state_dict():
        args |= {"use_shared_rel_pos_bias": False, "use_rel_pos_bias": True}
    return args


def _end(backbone: Backbone, pooling: Pooling) -> dict[str, Any]:
    """What makes timm pool so, and put the final norm behind or in front of the pooling."""
    from timm.models.beit import Beit
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    name_of_norm = {VisionTransformer: "fc_norm", Beit: "use_fc_norm", Eva: "use_fc_norm"}
    kind = next((kind for kind in name_of_norm if isinstance(backbone.network, kind)), None)
    if pooling == "cls" and backbone.num_prefix_tokens == 0:
        raise ConfigError(
            f"supervised.pooling cls: {backbone.recipe['architecture']} has no class token",
            "use --supervised.pooling patches",
        )
    if kind is None:
        return {}
    is_mean = pooling == "patches"
    if is_mean and hasattr(backbone.network, "head_dist"):
        raise ConfigError(
            f"supervised.pooling patches: {backbone.recipe['architecture']} has heads on its class and distillation "
            "tokens",
            "use --supervised.pooling cls",
        )
    return {"global_pool": "avg" if is_mean else "token", name_of_norm[kind]: is_mean}


def _build(backbone: Backbone, args: dict[str, Any]) -> Backbone:
    name = backbone.recipe["architecture"]
    try:
        return build_timm(name, args, preprocessing=backbone.preprocessing)
    except ConfigError as error:
        if "drop_path_rate" in error.message:
            hint = "a model without stochastic depth needs --supervised.drop-path 0"
            raise ConfigError(error.message, hint) from error
        raise


def head_of(network: nn.Module) -> list[nn.Linear]:
    """The linear layers that give a timm network's class logits; two where it has one for distillation.

    Raises ConfigError for a network with another kind of classifier.
    """
    get: Any = getattr(network, "get_classifier", None)
    found = get() if get is not None else ()
    layers = list(found) if isinstance(found, (tuple, list)) else [found]
    if not layers or not all(isinstance(layer, nn.Linear) for layer in layers):
        raise ConfigError(f"{type(network).__name__} has no linear classifier to train", "use another model")
    return layers


def _initialise_head(network: nn.Module, std: float, scale: float) -> None:
    for layer in head_of(network):
        nn.init.trunc_normal_(layer.weight, std=std)
        with torch.no_grad():
            layer.weight.mul_(scale)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def _take_weights(network: nn.Module, state: dict[str, Tensor], name: str) -> None:
    """Load what both have; only the old end may be left out, and only the new one begin anew."""
    own = network.state_dict()
    head = {id(tensor) for layer in head_of(network) for tensor in layer.parameters()}
    fresh = {key for key, tensor in network.state_dict(keep_vars=True).items() if id(tensor) in head}
    state = {key: tensor for key, tensor in state.items() if key not in fresh}
    if SHARED_TABLE in state and SHARED_TABLE not in own:
        table = state.pop(SHARED_TABLE)
        state |= {key: table.clone() for key in own if key.endswith("attn.relative_position_bias_table")}
    old_end = [key for key in state if key not in own]
    new_end = [key for key in own if key not in state]
    assert all(key.startswith(LEFT_OUT) for key in old_end), f"{name}: {old_end} would be lost"
    assert all(key in fresh or "norm." in key for key in new_end), f"{name}: {new_end} would be random"
    network.load_state_dict({key: tensor for key, tensor in state.items() if key in own}, strict=False)
    norms = sorted({key.rpartition(".")[0] for key in new_end if key not in fresh})
    if norms:
        left_out = sorted({key.rpartition(".")[0] for key in old_end if key.startswith("norm.")})
        log.info(
            "%s: the classifier's %s begins anew%s",
            name,
            " and ".join(norms),
            f"; the pretrained final {left_out[0]} is left out" if left_out else "",
        )
