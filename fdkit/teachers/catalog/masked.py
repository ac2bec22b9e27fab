"""Teachers trained on images by predicting what was masked: pixels, features, tokens of another model."""

from functools import partial

from fdkit.teachers.catalog._entry import CLIP_MEAN, CLIP_STD, Entry, Official

_META = "https://dl.fbaipublicfiles.com"
_GITHUB = "https://github.com"


def _mae_file(size: str, architecture: str, md5: str) -> Official:
    url = f"{_META}/mae/pretrain/mae_pretrain_vit_{size}.pth"
    return Official("mae", architecture, url, md5=md5, page=f"{_GITHUB}/facebookresearch/mae")


def _fcmae_file(size: str) -> Official:
    """Pretrained weights alone, without the norm behind the last stage."""
    url = f"{_META}/convnext/convnextv2/pt_only/convnextv2_{size}_1k_224_fcmae.pt"
    page = f"{_GITHUB}/facebookresearch/ConvNeXt-V2"
    return Official("fcmae", f"convnextv2_{size}", url, {"final_norm": False}, page=page)


def _tuned_convnextv2_file(size: str) -> Official:
    url = f"{_META}/convnext/convnextv2/im22k/convnextv2_{size}_22k_224_ema.pt"
    return Official("convnextv2", f"convnextv2_{size}", url, page=f"{_GITHUB}/facebookresearch/ConvNeXt-V2")


def _beit2_file(size: str) -> Official:
    name = f"beitv2_{size}_patch16_224"
    url = f"https://github.com/addf400/files/releases/download/BEiT-v2/{name}_pt1k_ft21k.pth"
    return Official(
        "beit_finetuned", name, url, page=f"{_GITHUB}/microsoft/unilm/blob/master/beit2/README.md"
    )


_mae = partial(
    Entry,
    family="mae",
    license="cc-by-nc-4.0",
    paper="2111.06377",
    published_source="facebookresearch/mae FINETUNE.md",
)
_ijepa = partial(Entry, family="ijepa", license="cc-by-nc-4.0", paper="2301.08243", num_prefix_tokens=0)
_beit2 = partial(
    Entry,
    family="beit2",
    license="apache-2.0",
    paper="2208.06366",
    published_source="microsoft/unilm beit2/README.md",
    note="pretrained on ImageNet-1K, then fine-tuned on ImageNet-22K",
)
_eva02 = partial(
    Entry,
    family="eva02",
    license="mit",
    paper="2303.11331",
    mean=CLIP_MEAN,
    std=CLIP_STD,
    published_source="baaivision/EVA EVA-02/asuka/README.md",
    note="the figure is of fine-tuning at 448 pixels (336 for T and S)",
)
_convnextv2 = partial(
    Entry,
    family="convnextv2",
    patch_size=32,
    license="cc-by-nc-4.0",
    paper="2301.00808",
    num_prefix_tokens=0,
    published_source="facebookresearch/ConvNeXt-V2 README.md",
)
_fcmae = partial(_convnextv2, note="pretrained alone: its last stage has no norm behind it")
_tuned = partial(_convnextv2, note="fine-tuned on ImageNet-22K, then on ImageNet-1K")

MASKED = (
    _mae(
        "mae_vitb", "ViT-B/16", "timm:vit_base_patch16_224.mae", 16, 768,
        published={"linear": 0.678, "finetune": 0.83664},
        official=_mae_file("base", "vit_base_patch16_224", "8cad7c"),
    ),
    _mae(
        "mae_vitl", "ViT-L/16", "timm:vit_large_patch16_224.mae", 16, 1024,
        published={"linear": 0.760, "finetune": 0.85952},
        official=_mae_file("large", "vit_large_patch16_224", "b8b06e"),
    ),
    _mae(
        "mae_vith", "ViT-H/14", "timm:vit_huge_patch14_224.mae", 14, 1280,
        published={"linear": 0.772, "finetune": 0.86928},
        official=_mae_file("huge", "vit_huge_patch14_224", "9bdbb0"),
    ),
    Entry(
        "supmae_vitb", "ViT-B/16", "", 16, 768,
        family="supmae", license="cc-by-nc-4.0", paper="2205.14540",
        published={"finetune": 0.83572}, published_source="enyac-group/supmae FINETUNE.md",
        official=Official(
            "supmae", "vit_base_patch16_224", md5="d83c8a", page=f"{_GITHUB}/enyac-group/supmae"
        ),
        note="trained with labels beside the masking",
    ),
    Entry(
        "cmae_vitb", "ViT-B/16", "", 16, 768,
        family="cmae", license="unstated", paper="2207.13532",
        published={"finetune": 0.847}, published_source="ZhichengHuang/CMAE README.md",
        official=Official(
            "cmae",
            "vit_base_patch16_224",
            "https://cmae.s3.us-west-1.amazonaws.com/weight/cmae_vit-base-p16_32xb128-coslr-1600e_in1k.pth",
            page=f"{_GITHUB}/ZhichengHuang/CMAE",
        ),
        note="pretrained for 1600 epochs",
    ),
    Entry(
        "maskfeat_vitb", "ViT-B/16", "", 16, 768,
        family="maskfeat", license="apache-2.0", paper="2112.09133",
        published={"finetune": 0.840}, published_source="facebookresearch/SlowFast projects/maskfeat/README.md",
        official=Official(
            "maskfeat",
            "vit_base_patch16_224",
            f"{_META}/pyslowfast/masked_models/in1k_VIT_B_MaskFeat_PT_epoch_01600.pyth",
            {"final_norm": False},
            page=f"{_GITHUB}/facebookresearch/SlowFast/blob/main/projects/maskfeat/README.md",
        ),
        note="its encoder ends without a norm",
    ),
    Entry(
        "maskfeat_vitl", "ViT-L/16", "", 16, 1024,
        family="maskfeat", license="apache-2.0", paper="2112.09133",
        published={"finetune": 0.857}, published_source="facebookresearch/SlowFast projects/maskfeat/README.md",
        official=Official(
            "maskfeat",
            "vit_large_patch16_224",
            f"{_META}/pyslowfast/masked_models/in1k_VIT_L_MaskFeat_PT_epoch_01600.pyth",
            {"final_norm": False},
            page=f"{_GITHUB}/facebookresearch/SlowFast/blob/main/projects/maskfeat/README.md",
        ),
        note="its encoder ends without a norm",
    ),
    Entry(
        "extrema_vitb", "ViT-B/16", "", 16, 768,
        family="extrema", license="mit", paper="2206.04667", num_prefix_tokens=0,
        published={"finetune": 0.837}, published_source="microsoft/ExtreMA README.md",
        official=Official(
            "extrema",
            "vit_base_patch16_224",
            "https://frontiers.blob.core.windows.net/pretraining/checkpoints/extrema/extrema_mask08x5_color_1k_300ep.pth",
            {"class_token": False, "global_pool": "avg", "fc_norm": False},
            page=f"{_GITHUB}/microsoft/ExtreMA",
        ),
        note="row 80%x5 with colour augmentation of the README's table; its class token is read off the patches by "
        "further blocks, which are left out, and so is no prefix token",
    ),
    _ijepa("ijepa_vith", "ViT-H/14", "timm:vit_huge_patch14_gap_224.in1k_ijepa", 14, 1280),
    _beit2(
        "beit2_vitb", "ViT-B/16", "timm:beitv2_base_patch16_224.in1k_ft_in22k", 16, 768,
        published={"finetune": 0.865}, official=_beit2_file("base"),
    ),
    _beit2(
        "beit2_vitl", "ViT-L/16", "timm:beitv2_large_patch16_224.in1k_ft_in22k", 16, 1024,
        published={"finetune": 0.884}, official=_beit2_file("large"),
    ),
    _eva02(
        "eva02_vitt", "EVA-02-T/14", "timm:eva02_tiny_patch14_224.mim_in22k", 14, 192,
        published={"finetune": 0.807},
    ),
    _eva02(
        "eva02_vits", "EVA-02-S/14", "timm:eva02_small_patch14_224.mim_in22k", 14, 384,
        published={"finetune": 0.858},
    ),
    _eva02(
        "eva02_vitb", "EVA-02-B/14", "timm:eva02_base_patch14_224.mim_in22k", 14, 768,
        published={"finetune": 0.883},
    ),
    _eva02(
        "eva02_vitl", "EVA-02-L/14", "timm:eva02_large_patch14_224.mim_in22k", 14, 1024,
        published={"finetune": 0.896},
    ),
    _eva02(
        "eva02_vitl_m38m", "EVA-02-L/14", "timm:eva02_large_patch14_224.mim_m38m", 14, 1024,
        published={"finetune": 0.896},
    ),
    _fcmae(
        "convnextv2_atto", "ConvNeXt V2-A", "timm:convnextv2_atto.fcmae", embed_dim=320,
        published={"finetune": 0.767}, official=_fcmae_file("atto"),
    ),
    _fcmae(
        "convnextv2_femto", "ConvNeXt V2-F", "timm:convnextv2_femto.fcmae", embed_dim=384,
        published={"finetune": 0.785}, official=_fcmae_file("femto"),
    ),
    _fcmae(
        "convnextv2_pico", "ConvNeXt V2-P", "timm:convnextv2_pico.fcmae", embed_dim=512,
        published={"finetune": 0.803}, official=_fcmae_file("pico"),
    ),
    _fcmae(
        "convnextv2_nano", "ConvNeXt V2-N", "timm:convnextv2_nano.fcmae", embed_dim=640,
        published={"finetune": 0.819}, official=_fcmae_file("nano"),
    ),
    _fcmae(
        "convnextv2_tiny", "ConvNeXt V2-T", "timm:convnextv2_tiny.fcmae", embed_dim=768,
        published={"finetune": 0.830}, official=_fcmae_file("tiny"),
    ),
    _fcmae(
        "convnextv2_base", "ConvNeXt V2-B", "timm:convnextv2_base.fcmae", embed_dim=1024,
        published={"finetune": 0.849}, official=_fcmae_file("base"),
    ),
    _fcmae(
        "convnextv2_large", "ConvNeXt V2-L", "timm:convnextv2_large.fcmae", embed_dim=1536,
        published={"finetune": 0.858}, official=_fcmae_file("large"),
    ),
    _fcmae(
        "convnextv2_huge", "ConvNeXt V2-H", "timm:convnextv2_huge.fcmae", embed_dim=2816,
        published={"finetune": 0.863}, official=_fcmae_file("huge"),
    ),
    _tuned(
        "convnextv2_nano_ft", "ConvNeXt V2-N", "timm:convnextv2_nano.fcmae_ft_in22k_in1k", embed_dim=640,
        published={"supervised": 0.821}, official=_tuned_convnextv2_file("nano"),
    ),
    _tuned(
        "convnextv2_tiny_ft", "ConvNeXt V2-T", "timm:convnextv2_tiny.fcmae_ft_in22k_in1k", embed_dim=768,
        published={"supervised": 0.839}, official=_tuned_convnextv2_file("tiny"),
    ),
    _tuned(
        "convnextv2_base_ft", "ConvNeXt V2-B", "timm:convnextv2_base.fcmae_ft_in22k_in1k", embed_dim=1024,
        published={"supervised": 0.868}, official=_tuned_convnextv2_file("base"),
    ),
    _tuned(
        "convnextv2_large_ft", "ConvNeXt V2-L", "timm:convnextv2_large.fcmae_ft_in22k_in1k", embed_dim=1536,
        published={"supervised": 0.873}, official=_tuned_convnextv2_file("large"),
    ),
)  # fmt: skip
