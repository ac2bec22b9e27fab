"""Protocols by name: every setting a published number was measured with, pinned and versioned.

A protocol is data. Its fields are those of the command that runs it; a flag that would change one is refused, since the
number would no longer be what its name says. Where ours cannot be the official script, `departures` says how.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from fdkit.errors import ConfigError, did_you_mean

CHOICE = (
    "test is read once, after the last epoch, by a classifier chosen on a tenth of train and trained again on all of "
    "it; the official script reports the best epoch or candidate by test"
)
FIXED_RATE = (
    "test is read once, after the last epoch; the official script reports the best epoch, and its authors chose the "
    "learning rate by test"
)
WHOLE_BATCHES = "an epoch is whole batches, and what remains waits for the next one's order"


class Protocol(NamedTuple):
    """How a number is measured."""

    name: str
    command: Literal["evaluate", "finetune"]
    choice: str
    """The evaluator, or the recipe of a fine-tuning."""
    fields: Mapping[str, Any]
    """Pinned fields of the command's configuration; of a fine-tuning, its recipe, which pins the rest."""
    source: str
    """Where the settings are published."""
    published: str
    """Which of a catalog row's published figures it is measured against: knn, linear or finetune."""
    models: tuple[str, ...]
    """Beginnings of the catalog names whose authors published that figure by this protocol."""
    departures: tuple[str, ...] = ()
    """What differs from the official script, for people."""
    version: int = 1
    """Counted up when the same name would give another number."""


def find_protocol(name: str) -> Protocol:
    """The protocol of that name. Raises ConfigError naming the nearest ones if there is none."""
    if name in PROTOCOLS:
        return PROTOCOLS[name]
    raise ConfigError(
        f"no protocol is called {name}",
        did_you_mean(name, PROTOCOLS) or f"protocols: {', '.join(PROTOCOLS)}",
    )


def refuse_changes(protocol: Protocol, values: Mapping[str, Any]) -> None:
    """Raises ConfigError if a value differs from what the protocol pins."""
    for field, pinned in protocol.fields.items():
        value = values[field]
        if (list(value) if isinstance(value, tuple) else value) != pinned:
            flag = f"--{field.replace('_', '-')}"
            raise ConfigError(
                f"protocol {protocol.name} measures with {field} {pinned}, and {value} is given",
                f"leave out {flag}, or leave out --protocol and the number goes without its name",
            )


_FORWARD = {"image_size": None, "precision": "fp32"}
_SGD = {"optimizer": "sgd", "momentum": 0.9, "nesterov": False, "weight_decay": [0.0], "init": "normal"}
_CROPS = {"augment": "crop", "crop_scale": [0.08, 1.0]}
_LINEAR = {
    **_FORWARD,
    **_SGD,
    **_CROPS,
    "inputs": ["all"],
    "normalization": "none",
    "lr_schedule": "cosine",
    "lr_steps": [],
    "clip_grad": None,
    "validation_ratio": 0.1,
    "refit": True,
}
_DINO = {
    **_LINEAR,
    "lr": [0.001],
    "lr_reference_batch": 256,
    "train_batch_size": 1024,
    "epochs": 100,
    "lr_update": "epoch",
    "warmup_epochs": 0.0,
    "crop_boxes": "redrawn",
    "crop_interpolation": "bilinear",
}
_MAE = {
    **_LINEAR,
    "optimizer": "lars",
    "normalization": "batch_norm",
    "lr": [0.1],
    "lr_reference_batch": 256,
    "train_batch_size": 16384,
    "epochs": 90,
    "lr_update": "step",
    "warmup_epochs": 10.0,
    "crop_boxes": "clipped",
    "crop_interpolation": "bicubic",
    "pooling": "cls",
    "layers": 1,
}
_DINOV2_RATES = [1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1]
_KNN = {**_FORWARD, "k": [20, 10, 100, 200], "temperature": [0.07], "pooling": "cls", "layers": 1}
_ONE_BATCH_NORM = "batch statistics are those of the whole batch, the official ones of each GPU's 512 images"
_UNPUBLISHED = "no configuration is released: rate, batch, epochs and warm-up are those of MAE's protocol"

_EVALUATIONS = (
    Protocol(
        "dino-knn",
        "evaluate",
        "knn",
        _KNN,
        "Caron et al. 2021, appendix F; facebookresearch/dino@7c446df eval_knn.py",
        "knn",
        ("dino_", "dinov2_", "esvit_"),
        ("the headline is k = 20, the best of the authors' four; the others stand beside it",),
    ),
    Protocol(
        "mocov3-linear",
        "evaluate",
        "linear",
        {
            **_LINEAR,
            "lr": [3.0],
            "lr_reference_batch": 256,
            "train_batch_size": 1024,
            "epochs": 90,
            "lr_update": "epoch",
            "warmup_epochs": 0.0,
            "crop_boxes": "redrawn",
            "crop_interpolation": "bilinear",
            "pooling": "cls",
            "layers": 1,
        },
        "Chen et al. 2021; facebookresearch/moco-v3@c349e6e main_lincls.py and CONFIG.md (ViT-S and ViT-B)",
        "linear",
        ("mocov3_vit",),
        (FIXED_RATE, WHOLE_BATCHES),
    ),
    Protocol(
        "mae-linear",
        "evaluate",
        "linear",
        _MAE,
        "He et al. 2022, appendix A.1; facebookresearch/mae@efb2a80 main_linprobe.py",
        "linear",
        ("mae_",),
        (FIXED_RATE, _ONE_BATCH_NORM),
    ),
    Protocol(
        "fd-linear",
        "evaluate",
        "linear",
        {**_MAE, "lr_reference_batch": 512, "clip_grad": 5.0},
        "Wei et al. 2022, released code, main_linear.py",
        "linear",
        (),
        (FIXED_RATE, _ONE_BATCH_NORM, _UNPUBLISHED, "images are normalised by the network's own statistics"),
    ),
    Protocol(
        "dino-linear",
        "evaluate",
        "linear",
        {**_DINO, "pooling": "cls", "layers": 4},
        "Caron et al. 2021, appendix F; facebookresearch/dino@7c446df eval_linear.py, ViT-S",
        "linear",
        ("dino_vits",),
        (FIXED_RATE, WHOLE_BATCHES),
    ),
    Protocol(
        "dino-linear-vitb",
        "evaluate",
        "linear",
        {**_DINO, "pooling": "cls+patches", "layers": 1},
        "Caron et al. 2021, appendix F; facebookresearch/dino@7c446df eval_linear.py, ViT-B",
        "linear",
        ("dino_vitb",),
        (FIXED_RATE, WHOLE_BATCHES),
    ),
    Protocol(
        "dinov2-linear",
        "evaluate",
        "linear",
        {
            **_LINEAR,
            "lr": _DINOV2_RATES,
            "inputs": ["grid"],
            "lr_reference_batch": 256,
            "train_batch_size": 1024,
            "epochs": 10,
            "lr_update": "step",
            "warmup_epochs": 0.0,
            "crop_boxes": "redrawn",
            "crop_interpolation": "bicubic",
            "pooling": "cls+patches",
            "layers": 4,
        },
        "Oquab et al. 2023, appendix B.3; facebookresearch/dinov2 eval/linear.py",
        "linear",
        ("dinov2_",),
        (CHOICE, WHOLE_BATCHES),
    ),
    Protocol(
        "simsiam-linear",
        "evaluate",
        "linear",
        {
            **_LINEAR,
            "optimizer": "larc",
            "lr": [0.1],
            "lr_reference_batch": 256,
            "train_batch_size": 4096,
            "epochs": 90,
            "lr_update": "epoch",
            "warmup_epochs": 0.0,
            "crop_boxes": "redrawn",
            "crop_interpolation": "bilinear",
            "pooling": "patches",
            "layers": 1,
        },
        "Chen and He 2021; facebookresearch/simsiam@a7bc177 main_lincls.py and its README",
        "linear",
        ("simsiam_",),
        (FIXED_RATE, WHOLE_BATCHES),
    ),
    Protocol(
        "mocov2-linear",
        "evaluate",
        "linear",
        {
            **_LINEAR,
            "lr": [30.0],
            "lr_reference_batch": None,
            "train_batch_size": 256,
            "epochs": 100,
            "lr_schedule": "steps",
            "lr_steps": [60.0, 80.0],
            "lr_update": "epoch",
            "warmup_epochs": 0.0,
            "crop_boxes": "redrawn",
            "crop_interpolation": "bilinear",
            "pooling": "patches",
            "layers": 1,
        },
        "He et al. 2020; facebookresearch/moco@132aea9 main_lincls.py",
        "linear",
        ("mocov1_", "mocov2_"),
        (FIXED_RATE, WHOLE_BATCHES),
    ),
)


def _finetuning(name: str, recipe: str, models: tuple[str, ...], source: str) -> Protocol:
    last = "test is read once, after the last epoch; the official script reports the best epoch"
    fields = {"recipe": recipe}
    return Protocol(name, "finetune", recipe, fields, source, "finetune", models, (last,))


_FD = "Wei et al. 2022, released configuration"
_FINETUNINGS = (
    _finetuning("mae-finetune", "mae_vitb", ("mae_vitb",), "He et al. 2022, table 9, ViT-B"),
    _finetuning("mae-finetune-vitl", "mae_vitl", ("mae_vitl",), "He et al. 2022, table 9, ViT-L"),
    _finetuning("mae-finetune-vith", "mae_vith", ("mae_vith",), "He et al. 2022, table 9, ViT-H"),
    _finetuning("mocov3-finetune", "mocov3_vitb", ("mocov3_vitb",), "Chen et al. 2021, DeiT's recipe, ViT-B"),
    _finetuning("mocov3-finetune-vits", "mocov3_vits", ("mocov3_vits",), "Chen et al. 2021, DeiT's recipe"),
    _finetuning("fd-finetune", "fd_clip_vitb", ("fd_clip_vitb",), f"{_FD}, CLIP ViT-B/16"),
    _finetuning("fd-finetune-dino", "fd_dino_vitb", ("fd_dino_vitb",), f"{_FD}, DINO ViT-B/16"),
    _finetuning("fd-finetune-deit", "fd_deit_vitb", ("fd_deit_vitb",), f"{_FD}, DeiT ViT-B/16"),
    _finetuning("fd-finetune-vitl", "fd_clip_vitl", ("fd_clip_vitl",), f"{_FD}, CLIP ViT-L/14"),
    _finetuning("fd-finetune-swinb", "fd_esvit_swinb", ("fd_esvit_swinb",), f"{_FD}, EsViT Swin-B"),
)

PROTOCOLS: dict[str, Protocol] = {protocol.name: protocol for protocol in (*_EVALUATIONS, *_FINETUNINGS)}
