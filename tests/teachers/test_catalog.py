import json
import re
import subprocess
import sys

import pytest
import timm
import torch

from fdkit.errors import ConfigError
from fdkit.models.backbone import Backbone
from fdkit.models.libraries import build_timm
from fdkit.teachers.catalog import CATALOG, Entry, families, find, list_teachers
from fdkit.teachers.official import LAYOUTS

ROWS = [pytest.param(entry, id=entry.name) for entry in list_teachers()]
HOSTED = [pytest.param(entry, id=entry.name) for entry in list_teachers() if entry.model]
WITH_FILE = [pytest.param(entry, id=entry.name) for entry in list_teachers() if entry.official]

GIVEN = {
    "clip_vitb": "vit_base_patch16_clip_quickgelu_224.openai",
    "clip_vitb32": "vit_base_patch32_clip_quickgelu_224.openai",
    "clip_vitl": "vit_large_patch14_clip_quickgelu_224.openai",
    "clip_vitl336": "vit_large_patch14_clip_quickgelu_336.openai",
    "openclip_vitb": "vit_base_patch16_clip_224.datacompxl",
    "openclip_vitl": "vit_large_patch14_clip_224.datacompxl",
    "siglip2_vitb": "vit_base_patch16_siglip_224.v2_webli",
    "siglip2_vitl": "vit_large_patch16_siglip_256.v2_webli",
    "siglip2_so400m": "vit_so400m_patch14_siglip_224.v2_webli",
    "siglip2_giant": "vit_giantopt_patch16_siglip_256.v2_webli",
    "dino_vits": "vit_small_patch16_224.dino",
    "dino_vits8": "vit_small_patch8_224.dino",
    "dino_vitb": "vit_base_patch16_224.dino",
    "dino_vitb8": "vit_base_patch8_224.dino",
    "dinov2_vits": "vit_small_patch14_dinov2.lvd142m",
    "dinov2_vitb": "vit_base_patch14_dinov2.lvd142m",
    "dinov2_vitl": "vit_large_patch14_dinov2.lvd142m",
    "dinov2_vitg": "vit_giant_patch14_dinov2.lvd142m",
    "dinov2reg_vits": "vit_small_patch14_reg4_dinov2.lvd142m",
    "dinov2reg_vitb": "vit_base_patch14_reg4_dinov2.lvd142m",
    "dinov2reg_vitl": "vit_large_patch14_reg4_dinov2.lvd142m",
    "dinov2reg_vitg": "vit_giant_patch14_reg4_dinov2.lvd142m",
    "dinov3_vits": "vit_small_patch16_dinov3.lvd1689m",
    "dinov3_vitsplus": "vit_small_plus_patch16_dinov3.lvd1689m",
    "dinov3_vitb": "vit_base_patch16_dinov3.lvd1689m",
    "dinov3_vitl": "vit_large_patch16_dinov3.lvd1689m",
    "dinov3_vithplus": "vit_huge_plus_patch16_dinov3.lvd1689m",
    "dinov3_vit7b": "vit_7b_patch16_dinov3.lvd1689m",
    "dinov3sat_vitl": "vit_large_patch16_dinov3.sat493m",
    "mae_vitb": "vit_base_patch16_224.mae",
    "mae_vitl": "vit_large_patch16_224.mae",
    "mae_vith": "vit_huge_patch14_224.mae",
    "ijepa_vith": "vit_huge_patch14_gap_224.in1k_ijepa",
    "deit_vits": "deit_small_patch16_224.fb_in1k",
    "deit_vitb": "deit_base_patch16_224.fb_in1k",
    "deit_vitb_distilled": "deit_base_distilled_patch16_224.fb_in1k",
    "deit3_vitb": "deit3_base_patch16_224.fb_in1k",
    "augreg_vitb": "vit_base_patch16_224.augreg_in21k",
    "augreg_vitl": "vit_large_patch16_224.augreg_in21k",
    "beit2_vitb": "beitv2_base_patch16_224.in1k_ft_in22k",
    "aimv2_vitl": "aimv2_large_patch14_224.apple_pt",
    "pe_vitb": "vit_pe_core_base_patch16_224.fb",
    "pe_vitl": "vit_pe_core_large_patch14_336.fb",
    "swin_b": "swin_base_patch4_window7_224.ms_in22k",
}
"""The names of version 0.1.0; scripts rely on them."""

WANTED_FILES = """dino_r50 mocov3_vits mocov3_vitb mocov3_r50 esvit_r50 esvit_swint esvit_swint_w7 esvit_swins
    esvit_swins_w7 esvit_swinb esvit_swinb_w7 simsiam_r50 mocov1_r50 mocov2_r50 swav_r50"""
"""Teachers no library hosts."""

PUBLISHED = {
    "dino_vits": {"knn": 74.5, "linear": 77.0},
    "dino_vitb": {"knn": 76.1, "linear": 78.2},
    "esvit_swint": {"knn": 77.0, "linear": 78.7},
    "esvit_swins": {"knn": 79.1, "linear": 80.8},
    "esvit_swinb": {"knn": 79.3, "linear": 81.3},
    "mocov3_vits": {"linear": 73.2, "finetune": 81.4},
    "mocov3_vitb": {"linear": 76.7, "finetune": 83.2},
    "mae_vitb": {"linear": 67.8, "finetune": 83.7},
    "mae_vitl": {"linear": 76.0, "finetune": 86.0},
    "mae_vith": {"linear": 77.2, "finetune": 86.9},
    "deit_vitb": {"supervised": 81.8},
    "fd_clip_vitb": {"finetune": 84.9},
    "fd_clip_vitl": {"finetune": 87.7},
    "dinov2_vits": {"knn": 79.0, "linear": 81.1},
    "dinov2_vitg": {"knn": 83.5, "linear": 86.5},
    "dinov3_vitb": {"linear_real": 89.3},
    "swav_r50": {"linear": 75.3},
    "simsiam_r50": {"linear": 68.1},
    "mocov2_r50": {"linear": 71.1},
}
"""In percent, as the authors' pages have them."""


def timm_cfg(entry: Entry) -> timm.models.PretrainedCfg:
    return timm.get_pretrained_cfg(entry.model.removeprefix("timm:"))


def built(entry: Entry) -> Backbone:
    """The teacher's network at the row's image size, without memory for its weights and, if a ViT, with one block:
    what a row says does not depend on their number.
    """
    official = entry.official
    if entry.model:
        name, args = entry.model.removeprefix("timm:"), {}
    else:
        assert official is not None
        name, args = official.architecture, dict(official.model_args)
    if not name.startswith(("swin", "convnext", "resnet")):
        args["depth"] = 1
    with torch.device("meta"):
        return build_timm(name, {**args, "img_size": entry.image_size})


@pytest.mark.parametrize("entry", HOSTED)
def test_a_hosted_row_says_what_timm_says(entry: Entry) -> None:
    cfg = timm_cfg(entry)
    assert cfg.hf_hub_id or cfg.url
    assert (entry.mean, entry.std) == (tuple(cfg.mean), tuple(cfg.std))
    # timm's cards say apache-2.0 of OpenAI's weights, whose repository is under the MIT licence.
    assert entry.license == ("mit" if entry.family == "clip" else cfg.license)
    native = cfg.input_size[1]
    assert cfg.input_size == (3, native, native)
    assert entry.image_size == (224 if entry.family in {"dinov2", "dinov2reg"} else native)
    if entry.official and entry.official.url and cfg.url:
        assert entry.official.url == cfg.url


@pytest.mark.slow
@pytest.mark.parametrize("entry", ROWS)
def test_the_network_of_a_row_is_as_the_row_says_and_has_a_token_map(entry: Entry) -> None:
    backbone = built(entry)
    stated = (entry.patch_size, entry.embed_dim, entry.num_prefix_tokens, entry.image_size)
    assert stated == (
        backbone.patch_size,
        backbone.embed_dim,
        backbone.num_prefix_tokens,
        backbone.image_size,
    )
    if type(backbone.network).__name__ == "Beit":  # its fast attention does not run without memory
        return
    images = torch.zeros(1, 3, entry.image_size, entry.image_size, device="meta")
    with torch.device("meta"), torch.no_grad():
        tokens = backbone.tokens_of(backbone.network, images)
    side = entry.image_size // entry.patch_size
    assert tokens.grid == (side, side)
    assert tokens.patches.shape == (1, side * side, entry.embed_dim)
    assert tokens.prefix.shape == (1, entry.num_prefix_tokens, entry.embed_dim)


@pytest.mark.parametrize("entry", ROWS)
def test_a_row_is_complete(entry: Entry) -> None:
    assert re.fullmatch(r"[a-z0-9]+", entry.family)
    assert re.fullmatch(r"[a-z0-9_]+", entry.name)
    assert entry.name.startswith(entry.family) or entry.family == "moco" or "dinov3" in entry.name
    assert re.fullmatch(r"\d{4}\.\d{5}", entry.paper)
    assert entry.image_size % entry.patch_size == 0
    known = {"linear", "linear_real", "knn", "finetune", "supervised", "zeroshot"}
    assert entry.published.keys() <= known
    assert all(0.5 < figure < 1 for figure in entry.published.values())
    assert entry.published_source or not entry.published
    assert entry.model.startswith(("timm:", "open_clip:")) or (not entry.model and entry.official)
    assert not (entry.is_permissive and entry.is_noncommercial)


@pytest.mark.parametrize("entry", WITH_FILE)
def test_an_official_file_is_documented(entry: Entry) -> None:
    official = entry.official
    assert official is not None
    assert timm.is_model(official.architecture)
    assert entry.model.partition(".")[0] in ("", f"timm:{official.architecture}")
    assert official.page.startswith("https://github.com/")
    assert official.layout in {layout.name for layout in LAYOUTS}
    assert re.fullmatch(r"(https://\S+\.(pth|pt|tar|pyth))?", official.url)
    # OpenAI, DeiT and DINOv3 write the hash, or the start of it, into the address itself.
    assert official.sha256 is None or re.fullmatch(r"[0-9a-f]{8}|[0-9a-f]{64}", official.sha256)
    assert official.sha256 is None or official.sha256 in official.url
    assert official.md5 is None or re.fullmatch(r"[0-9a-f]{6,32}", official.md5)


def test_files_that_share_an_address_are_the_same_teacher() -> None:
    addresses = [entry.official.url for entry in list_teachers() if entry.official and entry.official.url]
    assert len(addresses) == len(set(addresses))


def test_names_given_once_never_change_their_model() -> None:
    assert {name: CATALOG[name].model for name in GIVEN} == {n: f"timm:{m}" for n, m in GIVEN.items()}
    assert len({entry.model for entry in list_teachers() if entry.model}) == len(HOSTED)
    assert all("quickgelu" in e.model for e in list_teachers() if e.model.endswith(".openai"))


def test_teachers_no_library_hosts_are_known_by_their_files() -> None:
    rows = [CATALOG[name] for name in WANTED_FILES.split()]
    assert all(not row.model and row.official for row in rows)
    assert CATALOG["mocov3_vits"].official.model_args == {"num_heads": 12}  # type: ignore[union-attr]
    assert CATALOG["mocov3_vitb"].official.model_args == {}  # type: ignore[union-attr]
    windows = {
        name: row.official.model_args.get("window_size") for name, row in CATALOG.items() if row.official
    }
    assert (windows["esvit_swinb"], windows["esvit_swinb_w7"]) == (14, 7)
    assert CATALOG["swav_r50"].std == (0.228, 0.224, 0.225)


@pytest.mark.parametrize("name", PUBLISHED)
def test_figures_are_the_published_ones(name: str) -> None:
    percent = {kind: round(100 * value, 1) for kind, value in CATALOG[name].published.items()}
    assert percent == PUBLISHED[name]


def test_lists_are_filtered_by_family_and_licence() -> None:
    assert [entry.name for entry in list_teachers(family="mae")] == ["mae_vitb", "mae_vitl", "mae_vith"]
    permissive = {entry.license for entry in list_teachers(license="permissive")}
    assert permissive == {"apache-2.0", "mit"}
    assert {entry.license for entry in list_teachers(license="noncommercial")} == {"cc-by-nc-4.0"}
    own_terms = {entry.license for entry in list_teachers()} - permissive - {"cc-by-nc-4.0"}
    assert own_terms == {"dinov3-license", "apple-ascl", "nvidia-open-model-license", "unstated"}
    assert list_teachers(family="mae", license="permissive") == []
    assert [entry.family for entry in list_teachers(family="moco", license="permissive")] == ["moco", "moco"]
    assert len(list_teachers()) == len(CATALOG)


def test_a_licence_for_research_alone_is_noncommercial() -> None:
    row = CATALOG["dinov3_vitb"]._replace(license="fair-noncommercial-research-license")
    assert row.is_noncommercial
    assert not row.is_permissive


def test_an_unknown_family_licence_or_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean esvit"):
        list_teachers(family="esvitt")
    with pytest.raises(ConfigError, match="families: clip, openclip"):
        list_teachers(family="zzz")
    with pytest.raises(ConfigError, match="permissive, noncommercial"):
        list_teachers(license="free")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="did you mean mocov3_vits"):
        find("mocov3_vit_s")
    with pytest.raises(ConfigError, match="--family esvit"):
        find("esvit")
    assert find("esvit_swinb") is CATALOG["esvit_swinb"]
    assert families()[0] == "clip"
    assert len(families()) == len(set(families()))


@pytest.mark.parametrize("entry", ROWS)
def test_a_row_survives_json(entry: Entry) -> None:
    values = json.loads(json.dumps(entry.to_json()))
    assert values.pop("is_noncommercial") is entry.is_noncommercial
    assert values["published"] == dict(entry.published)
    assert (values["official"] is None) == (entry.official is None)
    assert values.keys() == set(Entry._fields)


def test_the_catalog_is_read_without_torch() -> None:
    code = "import sys; import fdkit.teachers.catalog; print({'torch', 'timm', 'numpy'} & set(sys.modules))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "set()"
