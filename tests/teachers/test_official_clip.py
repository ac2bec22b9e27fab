import copy
import warnings
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, resize_pos_embed
from open_clip.modified_resnet import ModifiedResNet
from torch import Tensor, nn

from fdkit.errors import WeightsError
from fdkit.models.backbone import Backbone
from fdkit.models.libraries import build_timm
from fdkit.teachers.catalog import CATALOG
from fdkit.teachers.files import read_file
from fdkit.teachers.loading import load_teacher
from fdkit.teachers.official import LAYOUTS, Reading
from tests.official_files import read

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
TEXT = {"context_length": 6, "vocab_size": 11, "width": 64, "heads": 1, "layers": 1}


def randomised(network: nn.Module) -> nn.Module:
    """Weights near 0, but norms' near 1 and variances between 1 and 2."""
    generator = torch.Generator().manual_seed(3)
    for name, value in network.state_dict().items():
        if value.is_floating_point():
            noise = torch.randn(value.shape, generator=generator)
            is_scale = value.ndim == 1 and name.endswith("weight")
            value.copy_(1 + noise.sigmoid() if name.endswith("var") else is_scale + 0.08 * noise)
    return network.eval()


def whole_clip(*, quick_gelu: bool = True, **vision: Any) -> CLIP:
    """open_clip's own CLIP, two layers deep; its names are OpenAI's."""
    config = {"image_size": 40, "patch_size": 8, "width": 128, "layers": 2, "head_width": 64, **vision}
    return randomised(CLIP(32, CLIPVisionCfg(**config), CLIPTextCfg(**TEXT), quick_gelu=quick_gelu))


def scalars(image_size: int = 40) -> dict[str, Tensor]:
    numbers = {"input_resolution": image_size, "context_length": 6, "vocab_size": 11}
    return {key: torch.tensor(value) for key, value in numbers.items()}


def normalised(images: Tensor, mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD) -> Tensor:
    return (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


@torch.no_grad()
def tower_tokens(model: CLIP, images: Tensor, *, without_class_token: bool = False) -> Tensor:
    """ln_post on every token, where CLIP itself keeps the class token alone."""
    visual = model.visual
    tokens = visual._embeds(images)
    return visual.ln_post(visual.transformer(tokens[:, 1:] if without_class_token else tokens))


def recognised(state: dict[str, Tensor], **options: Any) -> Reading:
    reading = read(state, LAYOUTS, source="x.pt", **options)
    assert reading is not None
    return reading


def built(reading: Reading, **args: Any) -> Backbone:
    network = reading.network
    backbone = build_timm(network.architecture, {**network.assumed_args, **network.model_args, **args})
    backbone.network.load_state_dict(reading.state, strict=True)
    return backbone.eval()


@torch.no_grad()
def tokens_of(backbone: Backbone, images: Tensor) -> Tensor:
    return backbone.network.forward_features(images)


@pytest.fixture(scope="module")
def clip() -> CLIP:
    return whole_clip()


@pytest.fixture
def official(clip: CLIP) -> dict[str, Tensor]:
    return {**clip.state_dict(), **scalars()}


def test_tokens_are_those_of_open_clips_quick_gelu_tower(clip: CLIP, official: dict) -> None:
    reading = recognised(official)
    assert (reading.layout, reading.network.mean, reading.network.std) == ("clip", MEAN, STD)
    assert "quickgelu" in reading.network.architecture
    assert reading.network.model_args["num_heads"] == 2
    assert not reading.network.assumed_args
    images = torch.randn(2, 3, 40, 40)
    expected = tower_tokens(clip, images)
    assert torch.allclose(tokens_of(built(reading), images), expected, atol=1e-5)
    pooled = expected[:, 0] @ clip.visual.proj
    assert torch.allclose(pooled, clip.visual(images), atol=1e-5)


def test_plausible_wrong_versions_differ(clip: CLIP, official: dict) -> None:
    images = torch.rand(2, 3, 40, 40)
    expected = tower_tokens(clip, normalised(images))
    backbone = built(recognised(official))
    right = tokens_of(backbone, normalised(images))
    assert torch.allclose(right, expected, atol=1e-5)

    def distance(tokens: Tensor) -> float:
        return float((tokens - expected[:, -tokens.shape[1] :]).abs().max())

    plain = recognised(clip.state_dict(), architecture="vit_base_patch16_clip_224")
    assert distance(tokens_of(built(plain), normalised(images))) > 1e-3
    other_heads = built(recognised(official), num_heads=4)
    assert distance(tokens_of(other_heads, normalised(images))) > 1e-3
    imagenet = normalised(images, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert distance(tokens_of(backbone, imagenet)) > 1e-3
    assert distance(tower_tokens(clip, normalised(images), without_class_token=True)) > 1e-3
    without_first_norm = copy.deepcopy(backbone)
    without_first_norm.network.norm_pre = nn.Identity()
    assert distance(tokens_of(without_first_norm, normalised(images))) > 1e-3
    transposed = copy.deepcopy(backbone)
    table = transposed.network.pos_embed.data[:, 1:].reshape(5, 5, -1)
    transposed.network.pos_embed.data[:, 1:] = table.transpose(0, 1).reshape(1, 25, -1)
    assert distance(tokens_of(transposed, normalised(images))) > 1e-3


def test_openais_archive_is_refused_under_an_architecture_with_gelu(official: dict) -> None:
    for name in ("vit_base_patch16_clip_224", "vit_base_patch16_clip_224.datacompxl"):
        with pytest.raises(
            WeightsError, match="trained with QuickGELU, and vit_base_patch16_clip_224"
        ) as raised:
            read(official, LAYOUTS, source="x.pt", architecture=name)
        assert "--arch vit_base_patch16_clip_quickgelu_224" in raised.value.hint
    recognised(official, architecture="vit_base_patch16_clip_quickgelu_224.openai")


def test_every_tensor_is_accounted_for(official: dict) -> None:
    reading = recognised(official)
    assert {change.key for change in reading.audit} == official.keys()
    dropped = {change.key: change.reason for change in reading.audit if change.became is None}
    assert "tokens do not go through" in dropped["visual.proj"]
    assert "number of the archive" in dropped["input_resolution"]
    assert dropped["transformer.resblocks.0.ln_1.weight"] == "text tower"
    became = {change.key: change.became for change in reading.audit}
    assert became["visual.transformer.resblocks.1.attn.in_proj_bias"] == "blocks.1.attn.qkv.bias"
    unknown = recognised({**official, "visual.extra.weight": torch.zeros(1), "other": torch.zeros(1)})
    assert {"extra.weight", "other"} <= unknown.state.keys()  # left over, so that loading refuses the file


def archive(model: CLIP, path: Path) -> Path:
    """A traced archive in half precision, as OpenAI's are."""
    model = copy.deepcopy(model)
    for name, value in scalars().items():
        model.__dict__.pop(name, None)
        model.register_buffer(name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inputs = (torch.rand(1, 3, 40, 40), torch.ones(1, 6, dtype=torch.long))
        traced = torch.jit.trace(model, inputs, check_trace=False)
        for name, parameter in traced.named_parameters():
            if "ln_" not in name:
                parameter.data = parameter.data.half()
        traced.save(str(path))
    return path


def test_a_traced_archive_in_half_precision_is_a_teacher(clip: CLIP, tmp_path: Path) -> None:
    path = archive(clip, tmp_path / "ViT-B-16-tiny.pt")
    content = read_file(path)
    assert content["visual.conv1.weight"].dtype == torch.float16
    rounded = copy.deepcopy(clip)
    rounded.load_state_dict({key: content[key] for key in clip.state_dict()})
    teacher = load_teacher(str(path))
    images = torch.rand(2, 3, 40, 40)
    assert teacher.encode(images).prefix.shape == (2, 1, 128)
    assert torch.allclose(teacher.encode(images).all(), tower_tokens(rounded, normalised(images)), atol=1e-5)
    assert all(value.dtype == torch.float32 for value in teacher.backbone.network.state_dict().values())


@pytest.mark.parametrize(
    ("sizes", "names"),
    [
        (
            {"width": 768, "patch_size": 32, "image_size": 224},
            ("clip_vitb32", "timm:vit_base_patch32_clip_224"),
        ),
        ({"width": 768, "patch_size": 16, "image_size": 224}, ("clip_vitb", "openclip_vitb")),
        ({"width": 1024, "patch_size": 14, "image_size": 224}, ("clip_vitl", "openclip_vitl")),
        (
            {"width": 1024, "patch_size": 14, "image_size": 336},
            ("clip_vitl336", "timm:vit_large_patch14_clip_336"),
        ),
    ],
)
def test_without_the_archives_numbers_the_activation_has_to_be_named(
    sizes: dict, names: tuple[str, str]
) -> None:
    with torch.device("meta"):
        state = CLIP(32, CLIPVisionCfg(layers=1, **sizes), CLIPTextCfg(**TEXT)).state_dict()
    with pytest.raises(WeightsError, match="QuickGELU or GELU") as raised:
        read(state, LAYOUTS, source="x.pt")
    for name in names:
        assert f"--arch {name.removeprefix('timm:')} (" in raised.value.hint
        assert name in CATALOG or timm.is_model(name.removeprefix("timm:"))
    with pytest.raises(WeightsError, match="QuickGELU or GELU"):
        read(
            {key.removeprefix("visual."): value for key, value in state.items() if "visual." in key},
            LAYOUTS,
            source="",
        )


@pytest.mark.parametrize("quick_gelu", [True, False])
@pytest.mark.parametrize("alone", [True, False])
def test_with_the_activation_named_it_is_that_tower(quick_gelu: bool, alone: bool) -> None:
    model = whole_clip(quick_gelu=quick_gelu)
    state = model.visual.state_dict() if alone else model.state_dict()
    name = f"vit_base_patch16_clip{'_quickgelu' if quick_gelu else ''}_224.openai"
    reading = recognised(state, architecture=name)
    assert "2 heads" in reading.network.assumption
    images = torch.randn(1, 3, 40, 40)
    assert torch.allclose(tokens_of(built(reading), images), tower_tokens(model, images), atol=1e-5)


@pytest.mark.parametrize("size", [24, 56, 40])
def test_other_sizes_are_those_of_open_clip(clip: CLIP, official: dict, size: int) -> None:
    grid = (size // 8, size // 8)
    reading = recognised(official)
    table = reading.state["pos_embed"]
    resample = reading.network.resample_positions
    assert resample is not None
    mine = torch.cat([table[:, :1], resample(table[:, 1:], (5, 5), grid)], dim=1)
    state = clip.state_dict()
    resize_pos_embed(state, whole_clip(image_size=size))
    expected = state["visual.positional_embedding"]
    assert torch.allclose(mine[0], expected, atol=1e-6)
    if size == 40:
        assert torch.equal(mine[0], expected)
    else:
        plain = nn.functional.interpolate(
            table[:, 1:].reshape(1, 5, 5, -1).permute(0, 3, 1, 2), size=grid, mode="bicubic"
        )
        assert (plain.flatten(2).transpose(1, 2) - expected[1:]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["ViT-B-32-quickgelu", "ViT-B-16-quickgelu", "ViT-L-14-336-quickgelu"])
def test_real_sizes_fit_timms_model_to_the_last_tensor(name: str) -> None:
    config = open_clip.get_model_config(name)
    with torch.device("meta"):
        model = CLIP(
            config["embed_dim"],
            CLIPVisionCfg(**config["vision_cfg"]),
            CLIPTextCfg(**config["text_cfg"]),
            quick_gelu=True,
        )
        reading = recognised({**model.state_dict(), **scalars()})
        own = timm.create_model(reading.network.architecture, num_classes=0).state_dict()
        fitted = build_timm(reading.network.architecture, reading.network.model_args).network.state_dict()
    shapes = {key: value.shape for key, value in reading.state.items()}
    assert (
        shapes
        == {key: value.shape for key, value in own.items()}
        == {key: value.shape for key, value in fitted.items()}
    )
    heads = {768: 12, 1024: 16}[config["vision_cfg"]["width"]]
    assert reading.network.model_args["num_heads"] == heads
    assert str(config["vision_cfg"].get("image_size", 224)) in reading.network.architecture


def test_layer_norms_have_clips_epsilon(official: dict) -> None:
    norms = [
        module for module in built(recognised(official)).network.modules() if isinstance(module, nn.LayerNorm)
    ]
    assert len(norms) == 6
    assert {norm.eps for norm in norms} == {1e-5}


def test_resnet_maps_are_those_of_open_clips_tower() -> None:
    tower = randomised(ModifiedResNet((3, 4, 6, 3), 32, 4, image_size=64, width=64))
    state = {f"visual.{key}": value for key, value in tower.state_dict().items()}
    state |= scalars() | {"logit_scale": torch.tensor(4.6), "ln_final.weight": torch.zeros(3)}
    reading = recognised(state)
    assert (reading.layout, reading.network.architecture) == ("clip_resnet", "resnet50_clip_gap")
    assert reading.network.model_args == {"img_size": 64}
    backbone = built(reading)
    images = torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        features = tower.stem(images)
        for stage in (tower.layer1, tower.layer2, tower.layer3, tower.layer4):
            features = stage(features)
        tokens = backbone.tokens_of(backbone.network, images)
    assert tokens.grid == (3, 2)
    assert tokens.prefix.shape[1] == 0
    assert torch.allclose(tokens.patches, features.flatten(2).transpose(1, 2), atol=1e-4)


@pytest.mark.parametrize("name", ["RN50", "RN101", "RN50x4", "RN50x16", "RN50x64"])
def test_real_resnets_fit_timms_to_the_last_tensor(name: str) -> None:
    config = CLIPVisionCfg(**open_clip.get_model_config(name)["vision_cfg"])
    with torch.device("meta"):
        heads = config.width * 32 // config.head_width
        tower = ModifiedResNet(config.layers, 64, heads, image_size=config.image_size, width=config.width)
        reading = recognised({f"visual.{key}": value for key, value in tower.state_dict().items()})
        own = timm.create_model(reading.network.architecture, num_classes=0).state_dict()
    assert {key: value.shape for key, value in reading.state.items()} == {
        key: value.shape for key, value in own.items()
    }
    assert reading.network.model_args["img_size"] == config.image_size


def test_a_file_around_a_timm_model_has_to_be_named() -> None:
    trunk = timm.create_model(
        "vit_base_patch16_siglip_224", img_size=32, depth=1, embed_dim=64, num_heads=1, num_classes=0
    )
    state = {f"visual.trunk.{key}": value for key, value in trunk.state_dict().items()}
    state |= {
        "text.positional_embedding": torch.zeros(2),
        "logit_scale": torch.zeros(1),
        "logit_bias": torch.zeros(1),
    }
    state["visual.head.proj.weight"] = torch.zeros(2, 2)
    with pytest.raises(WeightsError, match="around a timm model") as raised:
        read(state, LAYOUTS, source="x.pt")
    assert "open_clip:ARCH/TAG" in raised.value.hint
    reading = recognised(state, architecture="vit_base_patch16_siglip_224")
    assert reading.layout == "openclip_trunk"
    trunk.load_state_dict(reading.state, strict=True)


def test_one_layout_recognises_each(official: dict, clip: CLIP) -> None:
    tower = ModifiedResNet((3, 4, 6, 3), 32, 4, image_size=64, width=64)
    files = (official, clip.state_dict(), clip.visual.state_dict())
    files += ({f"visual.{key}": value for key, value in tower.state_dict().items()},)
    for state in files:
        assert len([layout for layout in LAYOUTS if layout.prefix_in(state, None) is not None]) == 1
