"""How deep in a network a parameter stands, for learning rates that decay with depth, and which blocks it has."""

from typing import Any

from torch import nn

from fdkit.errors import ConfigError


def layer_ids(network: nn.Module) -> tuple[dict[str, int], int]:
    """The layer of every parameter by its name, and the largest there can be, which is the head's.

    Transformers of one width: patch embedding, positions, tokens and the norm in front of the blocks 0; block i is
    i + 1; everything else, a bias table shared by all blocks among it, depth + 1. Swin: blocks count on across
    stages, and a layer that merges patches belongs to the last block before it. Others, such as ResNet and ConvNeXt:
    the stages timm groups them by.
    Source: Bao et al. 2022 (BEiT), released code; Wei et al. 2022 (arXiv 2205.14141), released code, optimizer.py.
    Raises ConfigError for a network whose layers are not known.
    """
    names = [name for name, _ in network.named_parameters()]
    if _is_swin(network):
        depths = [len(stage.blocks) for stage in _stages(network)]
        return {name: _swin_layer(name, depths) for name in names}, sum(depths) + 1
    if _is_plain(network):
        depth = len(list_blocks(network))
        return {name: _plain_layer(name, depth) for name in names}, depth + 1
    return _timm_layers(network)


def list_blocks(network: nn.Module) -> list[Any]:
    """The blocks of a transformer, first to last; those of all stages of a Swin.

    Raises ConfigError for a network that is none.
    """
    if _is_swin(network):
        return [block for stage in _stages(network) for block in stage.blocks]
    if _is_plain(network):
        return list(network.blocks)  # type: ignore[arg-type]
    raise ConfigError(
        f"{type(network).__name__} has no transformer blocks to count",
        "leave --supervised.trained-blocks out, or use 0 for the head alone",
    )


def _stages(network: Any) -> list[Any]:
    return list(network.layers)


def _is_swin(network: nn.Module) -> bool:
    from timm.models.swin_transformer import SwinTransformer
    from timm.models.swin_transformer_v2 import SwinTransformerV2

    return isinstance(network, (SwinTransformer, SwinTransformerV2))


def _is_plain(network: nn.Module) -> bool:
    """Whether a network is a transformer of one width with its blocks in one list."""
    from timm.models.beit import Beit
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    return isinstance(network, (VisionTransformer, Beit, Eva))


def _plain_layer(name: str, depth: int) -> int:
    part, *rest = name.split(".")
    if part == "blocks":
        return int(rest[0]) + 1
    is_embedding = part in ("patch_embed", "norm_pre") or part.endswith(("_token", "pos_embed"))
    return 0 if is_embedding else depth + 1


def _swin_layer(name: str, depths: list[int]) -> int:
    part, *rest = name.split(".")
    if part in ("patch_embed", "absolute_pos_embed"):
        return 0
    if part != "layers":
        return sum(depths) + 1
    before = sum(depths[: int(rest[0])])
    return before + int(rest[2]) + 1 if rest[1] == "blocks" else before


def _timm_layers(network: nn.Module) -> tuple[dict[str, int], int]:
    from timm.models import group_parameters

    matcher: Any = getattr(network, "group_matcher", None)
    ids: dict[str, int] = {}
    if matcher is not None:
        ids = group_parameters(network, matcher(coarse=True), reverse=True)
    if len(set(ids.values())) < 2:
        raise ConfigError(
            f"optim.layer_decay: the layers of {type(network).__name__} are not known",
            "use --optim.layer-decay None, one learning rate for all layers",
        )
    return ids, max(ids.values())
