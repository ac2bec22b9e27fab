import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import safetensors.torch
import torch

from fdkit.errors import WeightsError
from fdkit.models.libraries import build_open_clip, build_timm
from fdkit.teachers.huggingface_folder import (
    is_model_folder,
    library_of,
    read_folder,
    read_transformers,
)

WIDTH = 64


def folder_of(path: Path, files: dict[str, Any]) -> Path:
    """A folder of JSON files (from dictionaries), texts, and empty files of weights."""
    path.mkdir(exist_ok=True)
    for name, content in files.items():
        (path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return path


TIMM = {
    "architecture": "vit_tiny_patch16_224",
    "num_classes": 5,
    "model_args": {"depth": 2, "embed_dim": 48},
    "pretrained_cfg": {
        "tag": "x",
        "input_size": [3, 96, 96],
        "fixed_input_size": True,
        "interpolation": "bicubic",
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.2, 0.1],
        "license": "apache-2.0",
    },
}


def test_timms_folder(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {"config.json": TIMM, "model.safetensors": "", "open_clip_config.json": {}})
    model = read_folder(folder)
    assert (model.library, model.architecture) == ("timm", "vit_tiny_patch16_224")
    assert model.model_args == {"depth": 2, "embed_dim": 48, "img_size": 96}
    assert (model.mean, model.std, model.interpolation) == ((0.5, 0.4, 0.3), (0.2, 0.2, 0.1), "bicubic")
    assert (model.license, model.weights) == ("apache-2.0", folder / "model.safetensors")
    assert build_timm(model.architecture, model.model_args).image_size == 96


def test_timms_older_folder_keeps_the_preprocessing_beside_the_architecture(tmp_path: Path) -> None:
    config = {
        "architecture": "resnet18",
        "mean": [0.1, 0.2, 0.3],
        "std": [1, 1, 1],
        "input_size": [3, 224, 224],
    }
    model = read_folder(folder_of(tmp_path, {"config.json": config, "pytorch_model.bin": ""}))
    assert (model.mean, model.std, model.model_args) == ((0.1, 0.2, 0.3), (1.0, 1.0, 1.0), {})
    assert model.license == "unstated"


def test_an_architecture_timm_has_not_is_refused_with_the_nearest(tmp_path: Path) -> None:
    folder_of(tmp_path, {"config.json": {"architecture": "vit_tiny_patch16_225"}, "model.safetensors": ""})
    with pytest.raises(WeightsError, match="timm has no model vit_tiny_patch16_225") as raised:
        read_folder(tmp_path)
    assert "did you mean vit_tiny_patch16_224" in raised.value.hint


def open_clip_config(name: str, **changes: Any) -> dict[str, Any]:
    model = {**open_clip.get_model_config(name), **changes}
    return {
        "model_cfg": model,
        "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bicubic"},
    }


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_open_clips_folder_states_the_activation(tmp_path: Path, quick_gelu: bool) -> None:
    config = open_clip_config("ViT-B-32", quick_gelu=quick_gelu)
    folder_of(
        tmp_path,
        {"open_clip_config.json": config, "open_clip_model.safetensors": "", "model.safetensors": ""},
    )
    model = read_folder(tmp_path)
    assert (model.library, model.architecture) == ("open_clip", "ViT-B-32")
    assert model.model_args == {"quick_gelu": quick_gelu, "image_size": 224}
    assert model.weights.name == "open_clip_model.safetensors"
    assert (model.mean, model.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    with torch.device("meta"):
        backbone = build_open_clip(model.architecture, model.model_args)
    kinds = {type(module).__name__ for module in backbone.network.modules()}
    assert ("QuickGELU" in kinds) == quick_gelu


def test_open_clips_folder_of_another_image_size_or_timm_tower(tmp_path: Path) -> None:
    config = open_clip_config("ViT-B-16")
    config["model_cfg"]["vision_cfg"]["image_size"] = 320
    folder_of(tmp_path, {"open_clip_config.json": config, "open_clip_pytorch_model.bin": ""})
    model = read_folder(tmp_path)
    assert (model.architecture, model.model_args["image_size"]) == ("ViT-B-16", 320)
    config = open_clip_config("ViT-B-16-SigLIP2")
    folder_of(tmp_path, {"open_clip_config.json": config})
    assert read_folder(tmp_path).architecture.startswith("ViT-B-16-SigLIP")


def test_a_tower_open_clip_has_not_is_refused(tmp_path: Path) -> None:
    config = open_clip_config("ViT-B-16")
    config["model_cfg"]["vision_cfg"]["layers"] = 13
    folder_of(tmp_path, {"open_clip_config.json": config, "open_clip_model.safetensors": ""})
    with pytest.raises(WeightsError, match="no architecture of open_clip"):
        read_folder(tmp_path)


def vit_state() -> dict[str, torch.Tensor]:
    shapes = {
        "embeddings.cls_token": (1, 1, WIDTH),
        "embeddings.position_embeddings": (1, 5, WIDTH),
        "embeddings.patch_embeddings.projection.weight": (WIDTH, 3, 4, 4),
        "embeddings.patch_embeddings.projection.bias": (WIDTH,),
        "layernorm.weight": (WIDTH,),
        "layernorm.bias": (WIDTH,),
    }
    for part in ("attention.attention.query", "attention.attention.key", "attention.attention.value"):
        shapes |= {f"encoder.layer.0.{part}.weight": (WIDTH, WIDTH), f"encoder.layer.0.{part}.bias": (WIDTH,)}
    for part in ("attention.output.dense", "intermediate.dense", "output.dense"):
        shapes |= {f"encoder.layer.0.{part}.weight": (WIDTH, WIDTH), f"encoder.layer.0.{part}.bias": (WIDTH,)}
    for part in ("layernorm_before", "layernorm_after"):
        shapes |= {f"encoder.layer.0.{part}.weight": (WIDTH,), f"encoder.layer.0.{part}.bias": (WIDTH,)}
    return {key: torch.randn(shape) for key, shape in shapes.items()}


VIT = {
    "model_type": "vit",
    "num_attention_heads": 4,
    "num_hidden_layers": 1,
    "image_size": 8,
    "patch_size": 4,
}
CARD = "---\nlibrary_name: transformers\nlicense: cc-by-nc-4.0\ntags:\n- license: no\n---\n# Model\nlicense: mit\n"


def test_transformers_folder_states_heads_and_statistics(tmp_path: Path) -> None:
    stated = {
        "image_mean": [0.5, 0.5, 0.4],
        "image_std": [0.3, 0.2, 0.1],
        "resample": 3,
        "do_normalize": True,
    }
    folder_of(tmp_path, {"config.json": VIT, "preprocessor_config.json": stated, "README.md": CARD})
    safetensors.torch.save_file(vit_state(), tmp_path / "model.safetensors")
    model = read_folder(tmp_path)
    assert (model.library, model.architecture, model.license) == ("transformers", "vit", "cc-by-nc-4.0")
    assert model.config == VIT
    network = read_transformers(model).network
    assert network.model_args["num_heads"] == 4
    assert (network.mean, network.std) == ((0.5, 0.5, 0.4), (0.3, 0.2, 0.1))
    assert network.interpolation == "bicubic"
    build_timm(network.architecture, network.model_args).network.load_state_dict(
        read_transformers(model).state
    )


def test_transformers_folder_without_statistics_has_its_familys(tmp_path: Path) -> None:
    folder_of(tmp_path, {"config.json": VIT})
    safetensors.torch.save_file(vit_state(), tmp_path / "model.safetensors")
    model = read_folder(tmp_path)
    assert (model.mean, model.std, model.license) == (None, None, "unstated")
    assert read_transformers(model).network.mean == (0.485, 0.456, 0.406)


def test_statistics_that_are_not_applied_as_ours_are_refused(tmp_path: Path) -> None:
    for stated in ({"do_normalize": False}, {"do_rescale": False}):
        folder_of(tmp_path, {"config.json": VIT, "preprocessor_config.json": stated, "model.safetensors": ""})
        with pytest.raises(WeightsError, match="does not normalise"):
            read_folder(tmp_path)
    for values in ([0.5, 0.5], 0.5, ["a", 1, 2]):
        folder_of(tmp_path, {"preprocessor_config.json": {"image_mean": values}})
        with pytest.raises(WeightsError, match="mean and std are three numbers"):
            read_folder(tmp_path)


@pytest.mark.parametrize(
    ("card", "license"),
    [
        ("---\nlicense: other\nlicense_name: dinov3-license\n---\n", "dinov3-license"),
        ("---\nlicense: 'apache-2.0'\n---\n", "apache-2.0"),
        ("---\ntags: x\n---\nlicense: mit", "apache-2.0"),
        ("license: mit", "apache-2.0"),
        ("", "apache-2.0"),
    ],
)
def test_the_licence_is_that_of_the_cards_front_matter(tmp_path: Path, card: str, license: str) -> None:
    folder_of(tmp_path, {"config.json": TIMM, "model.safetensors": "", "README.md": card})
    assert read_folder(tmp_path).license == license


def test_folders_that_say_too_little_are_refused(tmp_path: Path) -> None:
    assert not is_model_folder(tmp_path)
    with pytest.raises(WeightsError, match="does not say what model it holds"):
        library_of(tmp_path)
    folder_of(tmp_path, {"config.json": {"hidden_size": 3}})
    assert is_model_folder(tmp_path)
    with pytest.raises(WeightsError, match="neither `architecture`"):
        read_folder(tmp_path)
    folder_of(tmp_path, {"config.json": VIT})
    with pytest.raises(WeightsError, match=r"no file of weights: neither model.safetensors nor"):
        read_folder(tmp_path)
    folder_of(tmp_path, {"model.safetensors.index.json": {}})
    with pytest.raises(WeightsError, match="in several files"):
        read_folder(tmp_path)
    for content, words in (("{", "cannot read"), ("[1]", "holds a list")):
        folder_of(tmp_path, {"config.json": content})
        with pytest.raises(WeightsError, match=words):
            read_folder(tmp_path)
