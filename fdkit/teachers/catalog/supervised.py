"""Teachers trained on labelled images, and the students of the Feature Distillation paper."""

from functools import partial

from fdkit.teachers.catalog._entry import HALF, Entry, Official

_META = "https://dl.fbaipublicfiles.com"
_GITHUB = "https://github.com"


def _deit_file(name: str, sha256: str) -> Official:
    """The first digits of the SHA-256 are part of the file's name."""
    layout = "deit_distilled" if "distilled" in name else "deit"
    page = f"{_GITHUB}/facebookresearch/deit/blob/main/README_deit.md"
    return Official(layout, name, f"{_META}/deit/{name}-{sha256}.pth", sha256=sha256, page=page)


def _deit3_file(size: str, architecture: str) -> Official:
    page = f"{_GITHUB}/facebookresearch/deit/blob/main/README_revenge.md"
    return Official("deit3", architecture, f"{_META}/deit/deit_3_{size}_224_1k.pth", page=page)


def _swin_file(layout: str, architecture: str, release: str) -> Official:
    url = f"{_GITHUB}/SwinTransformer/storage/releases/download/{release}"
    return Official(layout, architecture, url, page=f"{_GITHUB}/microsoft/Swin-Transformer")


def _fd_file(layout: str, architecture: str, model_args: dict[str, object]) -> Official:
    page = f"{_GITHUB}/SwinTransformer/Feature-Distillation#main-results-on-imagenet"
    return Official(layout, architecture, model_args=model_args, page=page)


_deit = partial(
    Entry,
    family="deit",
    license="apache-2.0",
    paper="2012.12877",
    published_source="facebookresearch/deit README_deit.md",
)
_deit_distilled = partial(
    _deit, num_prefix_tokens=2, note="its second prefix token is the distillation token"
)
_deit3 = partial(
    Entry,
    family="deit3",
    license="apache-2.0",
    paper="2204.07118",
    published_source="facebookresearch/deit README_revenge.md",
)
_augreg = partial(
    Entry,
    family="augreg",
    license="apache-2.0",
    paper="2106.10270",
    mean=HALF,
    std=HALF,
    note="trained on ImageNet-21K",
)
_swin = partial(
    Entry,
    family="swin",
    patch_size=32,
    license="mit",
    paper="2103.14030",
    num_prefix_tokens=0,
    published_source="microsoft/Swin-Transformer README.md",
    note="trained on ImageNet-22K",
)
_swinv2 = partial(
    Entry,
    family="swinv2",
    patch_size=32,
    license="mit",
    paper="2111.09883",
    num_prefix_tokens=0,
    published_source="microsoft/Swin-Transformer README.md",
)
_fd = partial(
    Entry,
    family="fd",
    license="mit",
    paper="2205.14141",
    model="",
    published_source="SwinTransformer/Feature-Distillation README.md",
)
_SHARED_BIAS = {
    "use_abs_pos_emb": False,
    "use_rel_pos_bias": False,
    "use_shared_rel_pos_bias": True,
    "init_values": 0.1,
    "global_pool": "token",
    "layer_norm_eps": 1e-6,
}

SUPERVISED = (
    _deit(
        "deit_vitt", "ViT-T/16", "timm:deit_tiny_patch16_224.fb_in1k", 16, 192,
        published={"supervised": 0.722}, official=_deit_file("deit_tiny_patch16_224", "a1311bcf"),
    ),
    _deit(
        "deit_vits", "ViT-S/16", "timm:deit_small_patch16_224.fb_in1k", 16, 384,
        published={"supervised": 0.799}, official=_deit_file("deit_small_patch16_224", "cd65a155"),
    ),
    _deit(
        "deit_vitb", "ViT-B/16", "timm:deit_base_patch16_224.fb_in1k", 16, 768,
        published={"supervised": 0.818}, official=_deit_file("deit_base_patch16_224", "b5f2ef4d"),
    ),
    _deit_distilled(
        "deit_vitt_distilled", "ViT-T/16", "timm:deit_tiny_distilled_patch16_224.fb_in1k", 16, 192,
        published={"supervised": 0.745}, official=_deit_file("deit_tiny_distilled_patch16_224", "b40b3cf7"),
    ),
    _deit_distilled(
        "deit_vits_distilled", "ViT-S/16", "timm:deit_small_distilled_patch16_224.fb_in1k", 16, 384,
        published={"supervised": 0.812}, official=_deit_file("deit_small_distilled_patch16_224", "649709d9"),
    ),
    _deit_distilled(
        "deit_vitb_distilled", "ViT-B/16", "timm:deit_base_distilled_patch16_224.fb_in1k", 16, 768,
        published={"supervised": 0.834}, official=_deit_file("deit_base_distilled_patch16_224", "df68dfff"),
    ),
    _deit3(
        "deit3_vits", "ViT-S/16", "timm:deit3_small_patch16_224.fb_in1k", 16, 384,
        published={"supervised": 0.814}, official=_deit3_file("small", "deit3_small_patch16_224"),
    ),
    _deit3(
        "deit3_vitm", "ViT-M/16", "timm:deit3_medium_patch16_224.fb_in1k", 16, 512,
        published={"supervised": 0.830}, official=_deit3_file("medium", "deit3_medium_patch16_224"),
    ),
    _deit3(
        "deit3_vitb", "ViT-B/16", "timm:deit3_base_patch16_224.fb_in1k", 16, 768,
        published={"supervised": 0.838}, official=_deit3_file("base", "deit3_base_patch16_224"),
    ),
    _deit3(
        "deit3_vitl", "ViT-L/16", "timm:deit3_large_patch16_224.fb_in1k", 16, 1024,
        published={"supervised": 0.849}, official=_deit3_file("large", "deit3_large_patch16_224"),
    ),
    _deit3(
        "deit3_vith", "ViT-H/14", "timm:deit3_huge_patch14_224.fb_in1k", 14, 1280,
        published={"supervised": 0.852}, official=_deit3_file("huge", "deit3_huge_patch14_224"),
    ),
    _augreg("augreg_vitt", "ViT-T/16", "timm:vit_tiny_patch16_224.augreg_in21k", 16, 192),
    _augreg("augreg_vits", "ViT-S/16", "timm:vit_small_patch16_224.augreg_in21k", 16, 384),
    _augreg("augreg_vitb", "ViT-B/16", "timm:vit_base_patch16_224.augreg_in21k", 16, 768),
    _augreg("augreg_vitl", "ViT-L/16", "timm:vit_large_patch16_224.augreg_in21k", 16, 1024),
    _swin(
        "swin_t", "Swin-T W7", "timm:swin_tiny_patch4_window7_224.ms_in22k", embed_dim=768,
        published={"finetune": 0.809},
        official=_swin_file(
            "swin", "swin_tiny_patch4_window7_224", "v1.0.8/swin_tiny_patch4_window7_224_22k.pth"
        ),
    ),
    _swin(
        "swin_s", "Swin-S W7", "timm:swin_small_patch4_window7_224.ms_in22k", embed_dim=768,
        published={"finetune": 0.832},
        official=_swin_file(
            "swin", "swin_small_patch4_window7_224", "v1.0.8/swin_small_patch4_window7_224_22k.pth"
        ),
    ),
    _swin(
        "swin_b", "Swin-B W7", "timm:swin_base_patch4_window7_224.ms_in22k", embed_dim=1024,
        published={"finetune": 0.852},
        official=_swin_file(
            "swin", "swin_base_patch4_window7_224", "v1.0.0/swin_base_patch4_window7_224_22k.pth"
        ),
    ),
    _swin(
        "swin_l", "Swin-L W7", "timm:swin_large_patch4_window7_224.ms_in22k", embed_dim=1536,
        published={"finetune": 0.863},
        official=_swin_file(
            "swin", "swin_large_patch4_window7_224", "v1.0.0/swin_large_patch4_window7_224_22k.pth"
        ),
    ),
    _swinv2(
        "swinv2_t", "Swin V2-T W8", "timm:swinv2_tiny_window8_256.ms_in1k", embed_dim=768,
        image_size=256, published={"supervised": 0.818},
        official=_swin_file(
            "swinv2", "swinv2_tiny_window8_256", "v2.0.0/swinv2_tiny_patch4_window8_256.pth"
        ),
    ),
    _swinv2(
        "swinv2_s", "Swin V2-S W8", "timm:swinv2_small_window8_256.ms_in1k", embed_dim=768,
        image_size=256, published={"supervised": 0.837},
        official=_swin_file(
            "swinv2", "swinv2_small_window8_256", "v2.0.0/swinv2_small_patch4_window8_256.pth"
        ),
    ),
    _swinv2(
        "swinv2_b", "Swin V2-B W12", "timm:swinv2_base_window12_192.ms_in22k", embed_dim=1024,
        image_size=192, published={"finetune": 0.862},
        official=_swin_file(
            "swinv2", "swinv2_base_window12_192", "v2.0.0/swinv2_base_patch4_window12_192_22k.pth"
        ),
        note="trained on ImageNet-22K; the figure is of fine-tuning at 256 pixels",
    ),
    _swinv2(
        "swinv2_l", "Swin V2-L W12", "timm:swinv2_large_window12_192.ms_in22k", embed_dim=1536,
        image_size=192, published={"finetune": 0.869},
        official=_swin_file(
            "swinv2", "swinv2_large_window12_192", "v2.0.0/swinv2_large_patch4_window12_192_22k.pth"
        ),
        note="trained on ImageNet-22K; the figure is of fine-tuning at 256 pixels",
    ),
    _fd(
        "fd_clip_vitb", "ViT-B/16", patch_size=16, embed_dim=768,
        published={"finetune": 0.849}, official=_fd_file("fd_vit", "beit_base_patch16_224", _SHARED_BIAS),
        note="distilled from clip_vitb for 300 epochs",
    ),
    _fd(
        "fd_clip_vitl", "ViT-L/14", patch_size=14, embed_dim=1024,
        published={"finetune": 0.877},
        official=_fd_file("fd_vit", "beit_large_patch16_224", {**_SHARED_BIAS, "patch_size": 14}),
        note="distilled from clip_vitl for 300 epochs",
    ),
    _fd(
        "fd_dino_vitb", "ViT-B/16", patch_size=16, embed_dim=768,
        published={"finetune": 0.838}, official=_fd_file("fd_vit", "beit_base_patch16_224", _SHARED_BIAS),
        note="distilled from dino_vitb for 300 epochs",
    ),
    _fd(
        "fd_deit_vitb", "ViT-B/16", patch_size=16, embed_dim=768,
        published={"finetune": 0.830}, official=_fd_file("fd_vit", "beit_base_patch16_224", _SHARED_BIAS),
        note="distilled from deit_vitb for 300 epochs",
    ),
    _fd(
        "fd_esvit_swinb", "Swin V2-B W14", patch_size=32, embed_dim=1024,
        num_prefix_tokens=0, published={"finetune": 0.851},
        official=_fd_file("fd_swin", "swinv2_base_window8_256", {"img_size": 224, "window_size": 14}),
        note="distilled from esvit_swinb for 300 epochs",
    ),
)  # fmt: skip
