"""Catalog names whose weights are the authors' own files, and sizes other than the native one, end to end."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from fdkit.errors import ConfigError, WeightsError
from fdkit.models.vit import sincos_position
from fdkit.teachers import model
from fdkit.teachers.catalog import CATALOG, list_teachers
from fdkit.teachers.checkpoint_file import _refuse_other_args
from fdkit.teachers.loading import load_teacher
from fdkit.teachers.official import Network, Reading
from fdkit.teachers.official._layout import state_in
from fdkit.teachers.official.mocov3 import LAYOUTS as MOCOV3
from fdkit.teachers.origin import Fetched
from tests.official_files import filled

IMAGES = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(5))


def normalised(images: Tensor) -> Tensor:
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (images - mean.view(3, 1, 1)) / std.view(3, 1, 1)


@pytest.fixture(scope="module")
def mocov3_state() -> dict[str, Tensor]:
    """ViT-S of real size, seeded, in timm's names."""
    with torch.device("meta"):
        shapes = timm.create_model("vit_small_patch16_224", num_classes=0).state_dict()
    return filled({name: tuple(value.shape) for name, value in shapes.items()})


@pytest.fixture
def cached_mocov3(mocov3_state: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The official file of MoCo v3's ViT-S where torch's hub would have put it."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    state = {f"module.base_encoder.{key}": value for key, value in mocov3_state.items()}
    state |= filled({"module.base_encoder.head.0.weight": (8, 384), "module.predictor.0.weight": (8, 8)})
    state |= {f"module.momentum_encoder.{key}": value + 1 for key, value in mocov3_state.items()}
    path = tmp_path / "hub/checkpoints/vit-s-300ep.pth.tar"
    path.parent.mkdir(parents=True)
    torch.save({"epoch": 300, "arch": "vit_small", "state_dict": state}, path)
    return path


@pytest.mark.slow
def test_a_cached_official_file_is_loaded_by_its_short_name(
    cached_mocov3: Path, mocov3_state: dict[str, Tensor]
) -> None:
    teacher = load_teacher("mocov3_vits")
    assert teacher.source == CATALOG["mocov3_vits"].official.url  # type: ignore[union-attr]
    assert teacher.license == "cc-by-nc-4.0"
    assert teacher.is_noncommercial
    found = teacher.encode(IMAGES).all()
    for heads, is_right in ((12, True), (6, False)):
        network = timm.create_model("vit_small_patch16_224", num_heads=heads, num_classes=0).eval()
        network.load_state_dict(mocov3_state)
        with torch.no_grad():
            expected = network.forward_features(normalised(IMAGES))
        assert ((found - expected).abs().max() < 2e-4) == is_right
    momentum = load_teacher(str(cached_mocov3), checkpoint_key="momentum_encoder")
    assert torch.equal(momentum.backbone.network.norm.bias, mocov3_state["norm.bias"] + 1)


def test_rows_without_an_address_say_where_the_file_is() -> None:
    rows = [row for row in list_teachers() if not row.model and row.official and not row.official.url]
    assert "esvit_swinb" in {row.name for row in rows}
    for row in rows:
        with pytest.raises(WeightsError, match="no address that can be fetched") as raised:
            load_teacher(row.name)
        assert row.official is not None
        assert row.official.page in raised.value.hint
        assert f"--arch {row.name}" in raised.value.hint


def test_offline_and_uncached_says_what_to_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(WeightsError, match="HF_HUB_OFFLINE is set") as raised:
        load_teacher("mocov3_vitb")
    assert "vit-b-300ep.pth.tar" in raised.value.hint


def test_random_weights_have_the_statistics_of_their_row() -> None:
    teacher = load_teacher("swav_r50", pretrained=False)
    assert teacher.backbone.preprocessing.std == (0.228, 0.224, 0.225)
    assert not teacher.is_noncommercial


def dino_positions(table: Tensor, side: int) -> Tensor:
    """DINO's reading: the class row as it is, patches bicubic by the factor (new + 0.1) / old."""
    old = int((table.shape[1] - 1) ** 0.5)
    grid = table[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    factor = (side + 0.1) / old
    grid = F.interpolate(grid, scale_factor=(factor, factor), mode="bicubic")
    return torch.cat([table[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def mae_positions(table: Tensor, side: int) -> Tensor:
    old = int((table.shape[1] - 1) ** 0.5)
    grid = table[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "resample"), [("dino_vits", dino_positions), ("deit_vits", mae_positions)])
def test_hosted_weights_are_resampled_as_their_authors_do(
    name: str,
    resample: object,
    mocov3_state: dict[str, Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(mocov3_state, path)
    monkeypatch.setattr(model, "fetch_timm", lambda name, revision: Fetched(path, "somewhere"))
    network = load_teacher(name, image_size=288).backbone.network
    expected = resample(mocov3_state["pos_embed"], 18)  # type: ignore[operator]
    assert torch.allclose(network.pos_embed, expected, atol=1e-6)
    native = load_teacher(name).backbone.network
    assert torch.equal(native.pos_embed, mocov3_state["pos_embed"])
    timms = timm.layers.resample_abs_pos_embed(mocov3_state["pos_embed"], [18, 18])
    assert not torch.allclose(network.pos_embed, timms, atol=1e-3)
    with pytest.raises(ConfigError, match="does not divide into patches of 16"):
        load_teacher(name, image_size=290)


def folder_of(path: Path, config: dict, state: dict[str, Tensor], card: str = "") -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(state, path / "model.safetensors")
    if card:
        (path / "README.md").write_text(card)
    return path


def test_a_folder_of_timm_is_a_teacher_with_its_own_statistics(tmp_path: Path) -> None:
    args = {"depth": 1, "embed_dim": 48, "num_heads": 3, "img_size": 32, "num_classes": 0}
    network = timm.create_model("vit_tiny_patch16_224", **args).eval()
    stated = {
        "mean": [0.1, 0.2, 0.3],
        "std": [0.5, 0.6, 0.7],
        "fixed_input_size": True,
        "input_size": [3, 32, 32],
    }
    config = {"architecture": "vit_tiny_patch16_224", "model_args": args, "pretrained_cfg": stated}
    card = "---\nlicense: cc-by-nc-4.0\n---\n# A model\n"
    teacher = load_teacher(str(folder_of(tmp_path / "folder", config, network.state_dict(), card)))
    assert teacher.license == "cc-by-nc-4.0"
    assert teacher.is_noncommercial
    images = torch.rand(2, 3, 32, 32)
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([0.5, 0.6, 0.7]).view(3, 1, 1)
    with torch.no_grad():
        expected = network.forward_features((images - mean) / std)
    assert torch.allclose(teacher.encode(images).all(), expected, atol=1e-5)


def test_hub_names_reach_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = {"depth": 1, "embed_dim": 48, "num_heads": 3, "img_size": 32, "num_classes": 0}
    state = timm.create_model("vit_tiny_patch16_224", **args).state_dict()
    config = {"architecture": "vit_tiny_patch16_224", "model_args": args}
    folder = folder_of(tmp_path / "folder", config, state)
    asked: list[tuple[str, str]] = []

    def fetch(repo: str, revision: str) -> Fetched:
        asked.append((repo, revision))
        return Fetched(folder, f"hf:{repo}@{revision}")

    monkeypatch.setattr(model, "fetch_repo", fetch)
    teacher = load_teacher("hf:someone/model@v2")
    load_teacher("hf:someone/model")
    assert asked == [("someone/model", "v2"), ("someone/model", "main")]
    assert teacher.source == "hf:someone/model@v2"
    with pytest.raises(ConfigError, match="states its own"):
        load_teacher("hf:someone/model", architecture="vit_tiny_patch16_224")


def test_a_bare_mocov3_encoder_keeps_its_heads(mocov3_state: dict[str, Tensor]) -> None:
    """What counts as MoCo v3 without its prefix is the fixed row-first table; a seeded one is not it."""
    assert all(layout.prefix_in(state_in(mocov3_state, source="x"), None) is None for layout in MOCOV3)


@pytest.mark.slow
def test_a_resnet_alone_and_in_its_training_checkpoint_is_the_same_teacher(tmp_path: Path) -> None:
    with torch.device("meta"):
        shapes = timm.create_model("resnet50", num_classes=0).state_dict()
    state = filled({name: tuple(value.shape) for name, value in shapes.items()})
    full = {"teacher": {f"backbone.{key}": value for key, value in state.items()}, "epoch": 3}
    for content in (state, full):
        torch.save(content, tmp_path / "x.pth")
        teacher = load_teacher(str(tmp_path / "x.pth"), architecture="dino_r50")
        assert torch.equal(teacher.backbone.network.conv1.weight, state["conv1.weight"])


@pytest.mark.parametrize(
    ("name", "shown", "words"),
    [
        ("esvit_swinb", {"window_size": 7}, "is not esvit_swinb: it shows window_size 7, not 14"),
        ("mocov3_vits", {"num_heads": 6}, "is not mocov3_vits: it shows num_heads 6, not 12"),
        ("esvit_swinb", {"window_size": 14}, ""),
    ],
)
def test_a_file_that_shows_another_window_or_heads_is_not_the_teacher(
    name: str, shown: dict[str, int], words: str
) -> None:
    reading = Reading("x", "X", Network("swin_base_patch4_window7_224", shown), {}, ())
    if not words:
        _refuse_other_args(reading, CATALOG[name], source="x.pth")
        return
    with pytest.raises(WeightsError, match=words):
        _refuse_other_args(reading, CATALOG[name], source="x.pth")


@pytest.mark.slow
@pytest.mark.parametrize("keep_head", [False, True])
def test_a_kept_classifier_changes_nothing_else(
    keep_head: bool, mocov3_state: dict[str, Tensor], tmp_path: Path
) -> None:
    """Fixed row-first positions mean MoCo v3, hence 12 heads, with the classifier or without."""
    patches = sincos_position((14, 14), 384, first="row")
    state = mocov3_state | {"pos_embed": torch.cat([torch.zeros(1, 384), patches]).unsqueeze(0)}
    path = tmp_path / "x.pth"
    torch.save(state | filled({"head.weight": (1000, 384), "head.bias": (1000,)}), path)
    teacher = load_teacher(str(path), architecture="vit_small_patch16_224", keep_head=keep_head)
    assert teacher.backbone.network.blocks[0].attn.num_heads == 12
    assert (teacher.backbone.logits_of is not None) == keep_head
    with pytest.raises(WeightsError, match="is not dinov2_vits"):
        load_teacher(str(path), architecture="dinov2_vits", keep_head=keep_head)
