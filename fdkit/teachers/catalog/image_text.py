"""Teachers trained on images with their texts, and those distilled from several such models."""

from functools import partial

from fdkit.teachers.catalog._entry import CLIP_MEAN, CLIP_STD, HALF, Entry, Official


def _openai_file(name: str, architecture: str, sha256: str) -> Official:
    """OpenAI's archive; its SHA-256 is part of its address."""
    url = f"https://openaipublic.azureedge.net/clip/models/{sha256}/{name}.pt"
    page = "https://github.com/openai/CLIP/blob/main/clip/clip.py"
    return Official("clip", architecture, url, sha256=sha256, page=page)


_OPEN_CLIP_TABLE = "mlfoundations/open_clip docs/openclip_results.csv"

_clip = partial(
    Entry,
    family="clip",
    license="mit",
    paper="2103.00020",
    mean=CLIP_MEAN,
    std=CLIP_STD,
    published_source=f"{_OPEN_CLIP_TABLE}; fine-tuned: LightDXY/FT-CLIP README.md",
    note="QuickGELU; under plain GELU the same weights give other features",
)
_openclip = partial(
    Entry,
    family="openclip",
    license="apache-2.0",
    mean=CLIP_MEAN,
    std=CLIP_STD,
    published_source=_OPEN_CLIP_TABLE,
)
_siglip2 = partial(
    Entry,
    family="siglip2",
    license="apache-2.0",
    paper="2502.14786",
    num_prefix_tokens=0,
    mean=HALF,
    std=HALF,
    published_source="google-research/big_vision README_siglip2.md",
)
_eva02clip = partial(
    Entry,
    family="eva02clip",
    license="mit",
    paper="2303.15389",
    mean=CLIP_MEAN,
    std=CLIP_STD,
    published_source="baaivision/EVA EVA-CLIP/README.md",
)
_pe = partial(
    Entry,
    family="pe",
    license="apache-2.0",
    paper="2504.13181",
    mean=HALF,
    std=HALF,
    published_source="facebookresearch/perception_models README.md",
)
_pe_spatial = partial(
    Entry, family="pe", license="apache-2.0", paper="2504.13181", image_size=512, mean=HALF, std=HALF
)
_aimv2 = partial(
    Entry,
    family="aimv2",
    license="apple-ascl",
    paper="2411.14402",
    num_prefix_tokens=0,
    mean=CLIP_MEAN,
    std=CLIP_STD,
)
_tipsv2 = partial(
    Entry,
    family="tipsv2",
    license="apache-2.0",
    paper="2604.12012",
    image_size=448,
    num_prefix_tokens=2,
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
    note="takes RGB in [0, 1] as it is; one register token",
)
_cradio = partial(
    Entry, family="cradio", license="nvidia-open-model-license", image_size=512, mean=CLIP_MEAN, std=CLIP_STD
)
_cradio3 = partial(_cradio, paper="2412.07679", num_prefix_tokens=8)
_cradio4 = partial(_cradio, paper="2601.17237", num_prefix_tokens=10)

IMAGE_TEXT = (
    _clip(
        "clip_vitb", "ViT-B/16", "timm:vit_base_patch16_clip_quickgelu_224.openai", 16, 768,
        published={"zeroshot": 0.6834, "finetune": 0.857},
        official=_openai_file(
            "ViT-B-16",
            "vit_base_patch16_clip_quickgelu_224",
            "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
        ),
    ),
    _clip(
        "clip_vitb32", "ViT-B/32", "timm:vit_base_patch32_clip_quickgelu_224.openai", 32, 768,
        published={"zeroshot": 0.6332},
        official=_openai_file(
            "ViT-B-32",
            "vit_base_patch32_clip_quickgelu_224",
            "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
        ),
    ),
    _clip(
        "clip_vitl", "ViT-L/14", "timm:vit_large_patch14_clip_quickgelu_224.openai", 14, 1024,
        published={"zeroshot": 0.7554, "finetune": 0.880},
        official=_openai_file(
            "ViT-L-14",
            "vit_large_patch14_clip_quickgelu_224",
            "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
        ),
    ),
    _clip(
        "clip_vitl336", "ViT-L/14", "timm:vit_large_patch14_clip_quickgelu_336.openai", 14, 1024,
        image_size=336,
        published={"zeroshot": 0.7656, "finetune": 0.883},
        official=_openai_file(
            "ViT-L-14-336px",
            "vit_large_patch14_clip_quickgelu_336",
            "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
        ),
    ),
    _openclip(
        "openclip_vitb", "ViT-B/16", "timm:vit_base_patch16_clip_224.datacompxl", 16, 768,
        paper="2304.14108", published={"zeroshot": 0.7349},
    ),
    _openclip(
        "openclip_vitl", "ViT-L/14", "timm:vit_large_patch14_clip_224.datacompxl", 14, 1024,
        paper="2304.14108", published={"zeroshot": 0.7921},
    ),
    _openclip(
        "openclip_vitb_laion2b", "ViT-B/16", "timm:vit_base_patch16_clip_224.laion2b", 16, 768,
        paper="2212.07143", published={"zeroshot": 0.7023},
    ),
    _openclip(
        "openclip_vitl_laion2b", "ViT-L/14", "timm:vit_large_patch14_clip_224.laion2b", 14, 1024,
        paper="2212.07143", published={"zeroshot": 0.7525}, mean=HALF, std=HALF,
        note="trained with mean and std 0.5, where every other CLIP here has CLIP's own",
    ),
    _openclip(
        "openclip_vith_laion2b", "ViT-H/14", "timm:vit_huge_patch14_clip_224.laion2b", 14, 1280,
        paper="2212.07143", published={"zeroshot": 0.7796},
    ),
    _siglip2(
        "siglip2_vitb", "ViT-B/16", "timm:vit_base_patch16_siglip_224.v2_webli", 16, 768,
        published={"zeroshot": 0.782},
    ),
    _siglip2(
        "siglip2_vitl", "ViT-L/16", "timm:vit_large_patch16_siglip_256.v2_webli", 16, 1024,
        image_size=256, published={"zeroshot": 0.825},
    ),
    _siglip2(
        "siglip2_so400m", "ViT-so400m/14", "timm:vit_so400m_patch14_siglip_224.v2_webli", 14, 1152,
        published={"zeroshot": 0.832},
    ),
    _siglip2(
        "siglip2_giant", "ViT-g-opt/16", "timm:vit_giantopt_patch16_siglip_256.v2_webli", 16, 1536,
        image_size=256, published={"zeroshot": 0.845},
    ),
    _eva02clip(
        "eva02clip_vitb", "EVA-02-B/16", "timm:eva02_base_patch16_clip_224.merged2b", 16, 768,
        published={"zeroshot": 0.747},
    ),
    _eva02clip(
        "eva02clip_vitl", "EVA-02-L/14", "timm:eva02_large_patch14_clip_224.merged2b", 14, 1024,
        published={"zeroshot": 0.798},
    ),
    _eva02clip(
        "eva02clip_vitl336", "EVA-02-L/14", "timm:eva02_large_patch14_clip_336.merged2b", 14, 1024,
        image_size=336, published={"zeroshot": 0.804},
    ),
    _pe(
        "pe_vitt", "ViT-T/16", "timm:vit_pe_core_tiny_patch16_384.fb", 16, 192,
        image_size=384, published={"zeroshot": 0.621},
    ),
    _pe(
        "pe_vits", "ViT-S/16", "timm:vit_pe_core_small_patch16_384.fb", 16, 384,
        image_size=384, published={"zeroshot": 0.727},
    ),
    _pe("pe_vitb", "ViT-B/16", "timm:vit_pe_core_base_patch16_224.fb", 16, 768, published={"zeroshot": 0.784}),
    _pe(
        "pe_vitl", "ViT-L/14", "timm:vit_pe_core_large_patch14_336.fb", 14, 1024,
        image_size=336, published={"zeroshot": 0.835},
    ),
    _pe(
        "pe_vitg", "ViT-G/14", "timm:vit_pe_core_gigantic_patch14_448.fb", 14, 1536,
        image_size=448, num_prefix_tokens=0, published={"zeroshot": 0.854},
    ),
    _pe_spatial("pe_spatial_vitt", "ViT-T/16", "timm:vit_pe_spatial_tiny_patch16_512.fb", 16, 192),
    _pe_spatial("pe_spatial_vits", "ViT-S/16", "timm:vit_pe_spatial_small_patch16_512.fb", 16, 384),
    _pe_spatial("pe_spatial_vitb", "ViT-B/16", "timm:vit_pe_spatial_base_patch16_512.fb", 16, 768),
    _pe_spatial(
        "pe_spatial_vitl", "ViT-L/14", "timm:vit_pe_spatial_large_patch14_448.fb", 14, 1024, image_size=448
    ),
    _aimv2("aimv2_vitl", "ViT-L/14", "timm:aimv2_large_patch14_224.apple_pt", 14, 1024),
    _aimv2("aimv2_vitl_distilled", "ViT-L/14", "timm:aimv2_large_patch14_224.apple_pt_dist", 14, 1024),
    _aimv2("aimv2_vith", "ViT-H/14", "timm:aimv2_huge_patch14_224.apple_pt", 14, 1536),
    _tipsv2("tipsv2_vitb", "ViT-B/14", "timm:vit_base_patch14_reg1_tipsv2.webli", 14, 768),
    _tipsv2("tipsv2_vitl", "ViT-L/14", "timm:vit_large_patch14_reg1_tipsv2.webli", 14, 1024),
    _cradio3("cradio3_vitb", "ViT-B/16", "timm:vit_base_patch16_radio_v3.c_radio", 16, 768),
    _cradio3("cradio3_vitl", "ViT-L/16", "timm:vit_large_patch16_radio_v3.c_radio", 16, 1024),
    _cradio3("cradio3_vith", "ViT-H/16", "timm:vit_huge_patch16_radio_v3.c_radio", 16, 1280),
    _cradio3("cradio3_vitg", "ViT-g/16", "timm:vit_giant_patch16_radio_v3.c_radio", 16, 1536),
    _cradio4("cradio4_so400m", "ViT-so400m/16", "timm:vit_so400m_patch16_radio_v4.c_radio", 16, 1152),
    _cradio4("cradio4_vith", "ViT-H/16", "timm:vit_huge_patch16_radio_v4.c_radio", 16, 1280),
)  # fmt: skip
