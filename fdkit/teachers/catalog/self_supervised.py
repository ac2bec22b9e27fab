"""Teachers trained on images alone by telling them apart: contrast, self-distillation, clusters."""

from functools import partial

from fdkit.teachers.catalog._entry import IMAGENET_STD, Entry, Official

_META = "https://dl.fbaipublicfiles.com"
_GITHUB = "https://github.com"


def _dinov2_file(size: str, architecture: str, *, registers: bool = False) -> Official:
    kind = "reg4_pretrain" if registers else "pretrain"
    url = f"{_META}/dinov2/dinov2_{size}14/dinov2_{size}14_{kind}.pth"
    return Official("dinov2", architecture, url, page=f"{_GITHUB}/facebookresearch/dinov2")


def _dinov3_file(size: str, architecture: str, sha256: str, *, data: str = "lvd1689m") -> Official:
    """The address the official code builds; the first digits of the SHA-256 are part of it."""
    url = f"{_META}/dinov3/dinov3_{size}/dinov3_{size}_pretrain_{data}-{sha256}.pth"
    layout = "dinov3_convnext" if size.startswith("convnext") else "dinov3"
    return Official(layout, architecture, url, sha256=sha256, page=f"{_GITHUB}/facebookresearch/dinov3")


def _dino_file(run: str, architecture: str, *, layout: str = "dino") -> Official:
    url = f"{_META}/dino/dino_{run}_pretrain/dino_{run}_pretrain.pth"
    return Official(layout, architecture, url, page=f"{_GITHUB}/facebookresearch/dino")


def _mocov3_file(run: str, layout: str, architecture: str, *, num_heads: int | None = None) -> Official:
    url = f"{_META}/moco-v3/{run}/{run}.pth.tar"
    page = f"{_GITHUB}/facebookresearch/moco-v3/blob/main/CONFIG.md"
    return Official(layout, architecture, url, {"num_heads": num_heads} if num_heads else {}, page=page)


def _esvit_file(architecture: str, window_size: int) -> Official:
    """The README's links work only with a query string printed beside them, so the README is the address."""
    args = {"window_size": window_size, "layer_norm_eps": 1e-6}
    page = f"{_GITHUB}/microsoft/esvit#pretrained-models"
    return Official("esvit", architecture, model_args=args, checkpoint_key="teacher", page=page)


_dino = partial(
    Entry,
    family="dino",
    license="apache-2.0",
    paper="2104.14294",
    published_source="facebookresearch/dino README.md",
)
_dinov2 = partial(
    Entry,
    family="dinov2",
    license="apache-2.0",
    paper="2304.07193",
    published_source="facebookresearch/dinov2 README.md",
    note="made for 518 pixels, fed 224 here; --image-size sets another",
)
_dinov2reg = partial(_dinov2, family="dinov2reg", paper="2309.16588", num_prefix_tokens=5)
_dinov3 = partial(
    Entry,
    family="dinov3",
    license="dinov3-license",
    paper="2508.10104",
    image_size=256,
    num_prefix_tokens=5,
    published_source="facebookresearch/dinov3 MODEL_CARD.md",
    note="the authors give their own files to those who ask for access",
)
_dinov3sat = partial(
    _dinov3,
    mean=(0.430, 0.411, 0.296),
    std=(0.213, 0.156, 0.143),
    published_source="",
    note="trained on satellite images; the authors give their own files to those who ask for access",
)
_mocov3 = partial(
    Entry,
    family="mocov3",
    license="cc-by-nc-4.0",
    paper="2104.02057",
    published_source="facebookresearch/moco-v3 README.md",
)
_esvit = partial(
    Entry,
    family="esvit",
    model="",
    patch_size=32,
    license="mit",
    paper="2106.09785",
    num_prefix_tokens=0,
    published_source="microsoft/esvit README.md",
)
_resnet50 = partial(
    Entry, architecture="ResNet-50", model="", patch_size=32, embed_dim=2048, num_prefix_tokens=0
)

SELF_SUPERVISED = (
    _dino(
        "dino_vits", "ViT-S/16", "timm:vit_small_patch16_224.dino", 16, 384,
        published={"linear": 0.770, "knn": 0.745},
        official=_dino_file("deitsmall16", "vit_small_patch16_224"),
    ),
    _dino(
        "dino_vits8", "ViT-S/8", "timm:vit_small_patch8_224.dino", 8, 384,
        published={"linear": 0.797, "knn": 0.783},
        official=_dino_file("deitsmall8", "vit_small_patch8_224"),
    ),
    _dino(
        "dino_vitb", "ViT-B/16", "timm:vit_base_patch16_224.dino", 16, 768,
        published={"linear": 0.782, "knn": 0.761},
        official=_dino_file("vitbase16", "vit_base_patch16_224"),
    ),
    _dino(
        "dino_vitb8", "ViT-B/8", "timm:vit_base_patch8_224.dino", 8, 768,
        published={"linear": 0.801, "knn": 0.774},
        official=_dino_file("vitbase8", "vit_base_patch8_224"),
    ),
    _dino(
        "dino_r50", "ResNet-50", "", 32, 2048,
        num_prefix_tokens=0,
        published={"linear": 0.753, "knn": 0.675},
        official=_dino_file("resnet50", "resnet50", layout="resnet"),
    ),
    _dinov2(
        "dinov2_vits", "ViT-S/14", "timm:vit_small_patch14_dinov2.lvd142m", 14, 384,
        published={"linear": 0.811, "knn": 0.790},
        official=_dinov2_file("vits", "vit_small_patch14_dinov2"),
    ),
    _dinov2(
        "dinov2_vitb", "ViT-B/14", "timm:vit_base_patch14_dinov2.lvd142m", 14, 768,
        published={"linear": 0.845, "knn": 0.821},
        official=_dinov2_file("vitb", "vit_base_patch14_dinov2"),
    ),
    _dinov2(
        "dinov2_vitl", "ViT-L/14", "timm:vit_large_patch14_dinov2.lvd142m", 14, 1024,
        published={"linear": 0.863, "knn": 0.835},
        official=_dinov2_file("vitl", "vit_large_patch14_dinov2"),
    ),
    _dinov2(
        "dinov2_vitg", "ViT-g/14", "timm:vit_giant_patch14_dinov2.lvd142m", 14, 1536,
        published={"linear": 0.865, "knn": 0.835},
        official=_dinov2_file("vitg", "vit_giant_patch14_dinov2"),
    ),
    _dinov2reg(
        "dinov2reg_vits", "ViT-S/14", "timm:vit_small_patch14_reg4_dinov2.lvd142m", 14, 384,
        published={"linear": 0.809, "knn": 0.791},
        official=_dinov2_file("vits", "vit_small_patch14_reg4_dinov2", registers=True),
    ),
    _dinov2reg(
        "dinov2reg_vitb", "ViT-B/14", "timm:vit_base_patch14_reg4_dinov2.lvd142m", 14, 768,
        published={"linear": 0.846, "knn": 0.820},
        official=_dinov2_file("vitb", "vit_base_patch14_reg4_dinov2", registers=True),
    ),
    _dinov2reg(
        "dinov2reg_vitl", "ViT-L/14", "timm:vit_large_patch14_reg4_dinov2.lvd142m", 14, 1024,
        published={"linear": 0.867, "knn": 0.838},
        official=_dinov2_file("vitl", "vit_large_patch14_reg4_dinov2", registers=True),
    ),
    _dinov2reg(
        "dinov2reg_vitg", "ViT-g/14", "timm:vit_giant_patch14_reg4_dinov2.lvd142m", 14, 1536,
        published={"linear": 0.871, "knn": 0.837},
        official=_dinov2_file("vitg", "vit_giant_patch14_reg4_dinov2", registers=True),
    ),
    _dinov3(
        "dinov3_vits", "ViT-S/16", "timm:vit_small_patch16_dinov3.lvd1689m", 16, 384,
        published={"linear_real": 0.870},
        official=_dinov3_file("vits16", "vit_small_patch16_dinov3", "08c60483"),
    ),
    _dinov3(
        "dinov3_vitsplus", "ViT-S+/16", "timm:vit_small_plus_patch16_dinov3.lvd1689m", 16, 384,
        published={"linear_real": 0.880},
        official=_dinov3_file("vits16plus", "vit_small_plus_patch16_dinov3", "4057cbaa"),
    ),
    _dinov3(
        "dinov3_vitb", "ViT-B/16", "timm:vit_base_patch16_dinov3.lvd1689m", 16, 768,
        published={"linear_real": 0.893},
        official=_dinov3_file("vitb16", "vit_base_patch16_dinov3", "73cec8be"),
    ),
    _dinov3(
        "dinov3_vitl", "ViT-L/16", "timm:vit_large_patch16_dinov3.lvd1689m", 16, 1024,
        published={"linear_real": 0.902},
        official=_dinov3_file("vitl16", "vit_large_patch16_dinov3", "8aa4cbdd"),
    ),
    _dinov3(
        "dinov3_vithplus", "ViT-H+/16", "timm:vit_huge_plus_patch16_dinov3.lvd1689m", 16, 1280,
        published={"linear_real": 0.903},
        official=_dinov3_file("vith16plus", "vit_huge_plus_patch16_dinov3", "7c1da9a5"),
    ),
    _dinov3(
        "dinov3_vit7b", "ViT-7B/16", "timm:vit_7b_patch16_dinov3.lvd1689m", 16, 4096,
        published={"linear_real": 0.904},
        official=_dinov3_file("vit7b16", "vit_7b_patch16_dinov3", "a955f4ea"),
    ),
    _dinov3(
        "dinov3_convnext_tiny", "ConvNeXt-T", "timm:convnext_tiny.dinov3_lvd1689m", 32, 768,
        image_size=224, num_prefix_tokens=0,
        published={"linear_real": 0.866},
        official=_dinov3_file("convnext_tiny", "convnext_tiny", "21b726bb"),
    ),
    _dinov3(
        "dinov3_convnext_small", "ConvNeXt-S", "timm:convnext_small.dinov3_lvd1689m", 32, 768,
        image_size=224, num_prefix_tokens=0,
        published={"linear_real": 0.879},
        official=_dinov3_file("convnext_small", "convnext_small", "296db49d"),
    ),
    _dinov3(
        "dinov3_convnext_base", "ConvNeXt-B", "timm:convnext_base.dinov3_lvd1689m", 32, 1024,
        image_size=224, num_prefix_tokens=0,
        published={"linear_real": 0.885},
        official=_dinov3_file("convnext_base", "convnext_base", "801f2ba9"),
    ),
    _dinov3(
        "dinov3_convnext_large", "ConvNeXt-L", "timm:convnext_large.dinov3_lvd1689m", 32, 1536,
        image_size=224, num_prefix_tokens=0,
        published={"linear_real": 0.889},
        official=_dinov3_file("convnext_large", "convnext_large", "61fa432d"),
    ),
    _dinov3sat(
        "dinov3sat_vitl", "ViT-L/16", "timm:vit_large_patch16_dinov3.sat493m", 16, 1024,
        official=_dinov3_file("vitl16", "vit_large_patch16_dinov3", "eadcf0ff", data="sat493m"),
    ),
    _dinov3sat(
        "dinov3sat_vit7b", "ViT-7B/16", "timm:vit_7b_patch16_dinov3.sat493m", 16, 4096,
        official=_dinov3_file("vit7b16", "vit_7b_patch16_dinov3", "a6675841", data="sat493m"),
    ),
    _mocov3(
        "mocov3_vits", "ViT-S/16", "", 16, 384,
        published={"linear": 0.732, "finetune": 0.814},
        official=_mocov3_file("vit-s-300ep", "mocov3", "vit_small_patch16_224", num_heads=12),
        note="12 heads, where every other ViT-S has 6",
    ),
    _mocov3(
        "mocov3_vitb", "ViT-B/16", "", 16, 768,
        published={"linear": 0.767, "finetune": 0.832},
        official=_mocov3_file("vit-b-300ep", "mocov3", "vit_base_patch16_224"),
    ),
    _mocov3(
        "mocov3_r50", "ResNet-50", "", 32, 2048,
        num_prefix_tokens=0,
        published={"linear": 0.746},
        official=_mocov3_file("r-50-1000ep", "mocov3_resnet", "resnet50"),
        note="pretrained for 1000 epochs",
    ),
    _esvit(
        "esvit_swint", "Swin-T W14", embed_dim=768,
        published={"linear": 0.787, "knn": 0.770},
        official=_esvit_file("swin_tiny_patch4_window7_224", 14),
        note="row EsViT (Swin-T, W=14) of the README's table, whose links need the query string printed above it",
    ),
    _esvit(
        "esvit_swint_w7", "Swin-T W7", embed_dim=768,
        published={"linear": 0.780, "knn": 0.757},
        official=_esvit_file("swin_tiny_patch4_window7_224", 7),
        note="row EsViT (Swin-T, W=7) of the README's table, whose links need the query string printed above it",
    ),
    _esvit(
        "esvit_swins", "Swin-S W14", embed_dim=768,
        published={"linear": 0.808, "knn": 0.791},
        official=_esvit_file("swin_small_patch4_window7_224", 14),
        note="row EsViT (Swin-S, W=14) of the README's table, whose links need the query string printed above it",
    ),
    _esvit(
        "esvit_swins_w7", "Swin-S W7", embed_dim=768,
        published={"linear": 0.795, "knn": 0.777},
        official=_esvit_file("swin_small_patch4_window7_224", 7),
        note="row EsViT (Swin-S, W=7) of the README's table, whose links need the query string printed above it",
    ),
    _esvit(
        "esvit_swinb", "Swin-B W14", embed_dim=1024,
        published={"linear": 0.813, "knn": 0.793},
        official=_esvit_file("swin_base_patch4_window7_224", 14),
        note="row EsViT (Swin-B, W=14) of the README's table, whose links need the query string printed above it",
    ),
    _esvit(
        "esvit_swinb_w7", "Swin-B W7", embed_dim=1024,
        published={"linear": 0.804, "knn": 0.789},
        official=_esvit_file("swin_base_patch4_window7_224", 7),
        note="row EsViT (Swin-B, W=7) of the README's table, whose links need the query string printed above it",
    ),
    _esvit(
        "esvit_r50", "ResNet-50", embed_dim=2048,
        published={"linear": 0.757, "knn": 0.713},
        official=Official(
            "dino_resnet", "resnet50", checkpoint_key="teacher", page=f"{_GITHUB}/microsoft/esvit#pretrained-models"
        ),
        note="row ResNet-50 of the README's table, whose links need the query string printed above it",
    ),
    _resnet50(
        "simsiam_r50", family="simsiam", license="cc-by-nc-4.0", paper="2011.10566",
        published={"linear": 0.681}, published_source="facebookresearch/simsiam README.md",
        official=Official(
            "simsiam",
            "resnet50",
            f"{_META}/simsiam/models/100ep/pretrain/checkpoint_0099.pth.tar",
            page=f"{_GITHUB}/facebookresearch/simsiam",
        ),
        note="pretrained for 100 epochs",
    ),
    _resnet50(
        "mocov1_r50", family="moco", license="mit", paper="1911.05722",
        published={"linear": 0.606}, published_source="facebookresearch/moco README.md",
        official=Official(
            "moco",
            "resnet50",
            f"{_META}/moco/moco_checkpoints/moco_v1_200ep/moco_v1_200ep_pretrain.pth.tar",
            md5="b251726a",
            page=f"{_GITHUB}/facebookresearch/moco",
        ),
        note="the repository was put under MIT; its README still says CC-BY-NC 4.0",
    ),
    _resnet50(
        "mocov2_r50", family="moco", license="mit", paper="2003.04297",
        published={"linear": 0.711}, published_source="facebookresearch/moco README.md",
        official=Official(
            "moco",
            "resnet50",
            f"{_META}/moco/moco_checkpoints/moco_v2_800ep/moco_v2_800ep_pretrain.pth.tar",
            md5="a04e12f8",
            page=f"{_GITHUB}/facebookresearch/moco",
        ),
        note="pretrained for 800 epochs; the repository was put under MIT, its README still says CC-BY-NC 4.0",
    ),
    _resnet50(
        "swav_r50", family="swav", license="cc-by-nc-4.0", paper="2006.09882",
        std=(0.228, *IMAGENET_STD[1:]),
        published={"linear": 0.753}, published_source="facebookresearch/swav README.md",
        official=Official(
            "swav",
            "resnet50",
            f"{_META}/deepcluster/swav_800ep_pretrain.pth.tar",
            page=f"{_GITHUB}/facebookresearch/swav",
        ),
        note="pretrained for 800 epochs; its code normalises red with a deviation of 0.228",
    ),
    _resnet50(
        "fastmoco_r50", family="fastmoco", license="unstated", paper="2207.08220",
        published={"linear": 0.755}, published_source="orashi/Fast-MoCo README.md",
        official=Official(
            "fastmoco",
            "resnet50",
            md5="79ae2aff26c6cb762feaf9155b137d4a",
            page=f"{_GITHUB}/orashi/Fast-MoCo#pretrained-models",
        ),
        note="pretrained for 400 epochs",
    ),
)  # fmt: skip
