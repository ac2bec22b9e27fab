"""Pictures that a training run draws of what it reconstructs."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from fdkit.commands._reconstructions import NUM_IMAGES, Reconstructions, build_reconstructions
from fdkit.config import with_defaults
from fdkit.data.loader import LoaderConfig
from fdkit.data.sources import open_source
from fdkit.data.views import CropConfig
from fdkit.methods._network import NetworkConfig
from fdkit.methods.mae import DEFAULTS, MAE, MAEConfig, build

TINY = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}


def method() -> MAE:
    config = MAEConfig(decoder_width=16, decoder_depth=1, decoder_heads=2)
    settings: Any = with_defaults(NetworkConfig, DEFAULTS["network"])
    network = settings(architecture="vit_tiny_patch16_224", model_args=TINY, crop_ratio=1)
    return build(config, CropConfig(image_size=32), network, seed=0)


def monitor(folder: Path) -> Reconstructions:
    (made,) = build_reconstructions(
        method(), open_source("demo", "train"), folder, every_steps=5, loader=LoaderConfig(workers=0)
    )
    return made


def test_every_picture_shows_the_same_images_under_the_same_masks(tmp_path: Path) -> None:
    made, model = monitor(tmp_path), method()
    found = [made(model, step) for step in (5, 10)]
    pictures = sorted((tmp_path / "figures").iterdir())
    assert [path.name for path in pictures] == ["reconstruction-10.png", "reconstruction-5.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
    assert found[0] == found[1]
    assert 0 < found[0]["reconstruction_psnr"] < 60
    with torch.no_grad():
        model.decoder.pred.bias.add_(1)
    assert made(model, 15) != found[0]


def test_a_few_images_spread_over_all_are_shown() -> None:
    source = open_source("demo", "train")
    made = Reconstructions(source, Path("unused"), every_steps=5, loader=LoaderConfig(workers=0))
    assert made.every_steps == 5
    shown = made._source.indices.tolist()
    assert (len(shown), shown[0], shown[-1]) == (NUM_IMAGES, 0, len(source) - 1)


def test_the_method_keeps_its_weights_and_the_global_generator(tmp_path: Path) -> None:
    model = method()
    before, state = {key: value.clone() for key, value in model.state_dict().items()}, torch.get_rng_state()
    monitor(tmp_path)(model, 1)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_other_methods_have_nothing_to_show(tmp_path: Path) -> None:
    other: Any = SimpleNamespace()
    source = open_source("demo", "train")
    assert build_reconstructions(other, source, tmp_path, every_steps=5, loader=LoaderConfig()) == []
