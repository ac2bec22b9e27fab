"""A small masked autoencoder, saved as a run leaves it and under the names of the official code."""

from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from fdkit.config import Config, to_yaml, with_defaults
from fdkit.data.views import CropConfig
from fdkit.methods._network import NetworkConfig
from fdkit.methods.mae import DEFAULTS, MAE, MAEConfig, build
from fdkit.models.libraries import save_backbone

TINY = {"patch_size": 16, "embed_dim": 192, "depth": 1, "num_heads": 3}
SIZE = 64
Network = with_defaults(NetworkConfig, DEFAULTS["network"])


class Saved(Config):
    """The part of a run's configuration that is read."""

    mae: MAEConfig


def method(**fields: Any) -> MAE:
    config = MAEConfig(**{"decoder_width": 64, "decoder_depth": 2, "decoder_heads": 2, **fields})
    network = Network(architecture="vit_tiny_patch16_224", model_args=TINY)
    made = build(config, CropConfig(image_size=SIZE), network, seed=0).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return made


def saved_run(folder: Path, **fields: Any) -> MAE:
    """What `fdkit pretrain mae` leaves of a method."""
    made = method(**fields)
    save_backbone(made.student, folder)
    heads = {key: value for key, value in made.state_dict().items() if not key.startswith("student.")}
    safetensors.torch.save_file(heads, folder / "heads.safetensors")
    (folder / "config.yaml").write_text(to_yaml(Saved(mae=made.config)))
    return made


def official_file(path: Path, made: MAE, **content: Any) -> Path:
    """The same model under the names of the official code."""
    network: Any = made.student.network
    decoder = made.decoder.state_dict()
    own = {key if key == "mask_token" else f"decoder_{key}": value for key, value in decoder.items()}
    torch.save({"model": {**network.state_dict(), **own}, **content}, path)
    return path
