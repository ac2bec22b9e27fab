"""The teachers known by a short name: a row each, data and no code."""

from typing import NamedTuple


class Entry(NamedTuple):
    """One teacher: adding it is adding a row; a name once given never changes its model."""

    name: str
    model: str
    """The model in long form, `timm:NAME`."""
    license: str
    """Of the weights: an SPDX name where there is one."""
    paper: str
    """arXiv number."""
    image_size: int | None = None
    """Height and width in pixels the teacher is fed by default; None is the size its weights were made for."""


def list_teachers() -> list[Entry]:
    """Every teacher with a short name, in the order of the catalog."""
    return list(CATALOG.values())


def _vits(prefix: str, sizes: dict[str, str], pattern: str, **fields: str | int) -> list[Entry]:
    """Rows of one family: short names `prefix` + key, models `pattern` with the size's name filled in."""
    return [
        Entry(f"{prefix}_{short}", f"timm:{pattern.format(size)}", **fields)  # type: ignore[arg-type]
        for short, size in sizes.items()
    ]


_SBLG = {"vits": "small", "vitb": "base", "vitl": "large", "vitg": "giant"}
_DINOV3 = {
    "vits": "small",
    "vitsplus": "small_plus",
    "vitb": "base",
    "vitl": "large",
    "vithplus": "huge_plus",
    "vit7b": "7b",
}
_CLIP = {
    "vitb": "base_patch16_clip_quickgelu_224",
    "vitb32": "base_patch32_clip_quickgelu_224",
    "vitl": "large_patch14_clip_quickgelu_224",
    "vitl336": "large_patch14_clip_quickgelu_336",
}
_SIGLIP2 = {
    "vitb": "base_patch16_siglip_224",
    "vitl": "large_patch16_siglip_256",
    "so400m": "so400m_patch14_siglip_224",
    "giant": "giantopt_patch16_siglip_256",
}

_ROWS = [
    *_vits("clip", _CLIP, "vit_{}.openai", license="MIT", paper="2103.00020"),
    Entry("openclip_vitb", "timm:vit_base_patch16_clip_224.datacompxl", "apache-2.0", "2304.14108"),
    Entry("openclip_vitl", "timm:vit_large_patch14_clip_224.datacompxl", "apache-2.0", "2304.14108"),
    *_vits("siglip2", _SIGLIP2, "vit_{}.v2_webli", license="apache-2.0", paper="2502.14786"),
    Entry("dino_vits", "timm:vit_small_patch16_224.dino", "apache-2.0", "2104.14294"),
    Entry("dino_vits8", "timm:vit_small_patch8_224.dino", "apache-2.0", "2104.14294"),
    Entry("dino_vitb", "timm:vit_base_patch16_224.dino", "apache-2.0", "2104.14294"),
    Entry("dino_vitb8", "timm:vit_base_patch8_224.dino", "apache-2.0", "2104.14294"),
    *_vits(
        "dinov2",
        _SBLG,
        "vit_{}_patch14_dinov2.lvd142m",
        license="apache-2.0",
        paper="2304.07193",
        image_size=224,
    ),
    *_vits(
        "dinov2reg",
        _SBLG,
        "vit_{}_patch14_reg4_dinov2.lvd142m",
        license="apache-2.0",
        paper="2309.16588",
        image_size=224,
    ),
    *_vits("dinov3", _DINOV3, "vit_{}_patch16_dinov3.lvd1689m", license="dinov3-license", paper="2508.10104"),
    Entry("dinov3sat_vitl", "timm:vit_large_patch16_dinov3.sat493m", "dinov3-license", "2508.10104"),
    Entry("mae_vitb", "timm:vit_base_patch16_224.mae", "cc-by-nc-4.0", "2111.06377"),
    Entry("mae_vitl", "timm:vit_large_patch16_224.mae", "cc-by-nc-4.0", "2111.06377"),
    Entry("mae_vith", "timm:vit_huge_patch14_224.mae", "cc-by-nc-4.0", "2111.06377"),
    Entry("ijepa_vith", "timm:vit_huge_patch14_gap_224.in1k_ijepa", "cc-by-nc-4.0", "2301.08243"),
    Entry("deit_vits", "timm:deit_small_patch16_224.fb_in1k", "apache-2.0", "2012.12877"),
    Entry("deit_vitb", "timm:deit_base_patch16_224.fb_in1k", "apache-2.0", "2012.12877"),
    Entry("deit_vitb_distilled", "timm:deit_base_distilled_patch16_224.fb_in1k", "apache-2.0", "2012.12877"),
    Entry("deit3_vitb", "timm:deit3_base_patch16_224.fb_in1k", "apache-2.0", "2204.07118"),
    Entry("augreg_vitb", "timm:vit_base_patch16_224.augreg_in21k", "apache-2.0", "2106.10270"),
    Entry("augreg_vitl", "timm:vit_large_patch16_224.augreg_in21k", "apache-2.0", "2106.10270"),
    Entry("beit2_vitb", "timm:beitv2_base_patch16_224.in1k_ft_in22k", "apache-2.0", "2208.06366"),
    Entry("aimv2_vitl", "timm:aimv2_large_patch14_224.apple_pt", "apple-ascl", "2411.14402"),
    Entry("pe_vitb", "timm:vit_pe_core_base_patch16_224.fb", "apache-2.0", "2504.13181"),
    Entry("pe_vitl", "timm:vit_pe_core_large_patch14_336.fb", "apache-2.0", "2504.13181"),
    Entry("swin_b", "timm:swin_base_patch4_window7_224.ms_in22k", "mit", "2103.14030"),
]

CATALOG: dict[str, Entry] = {row.name: row for row in _ROWS}
