"""Whether a teacher is to be trusted: what its file held, what its features look like, and what they once were.

A wrong teacher is rarely loud: a random network, a lost norm or another activation gives finite features too. What can
be seen from outside is checked here, each check with what to do about it; exactness itself is the loader's promise.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fdkit.errors import ConfigError
from fdkit.models.backbone import Tokens, pool
from fdkit.teachers.request import Loaded
from fdkit.teachers.teacher import Teacher

MIN_SPREAD = 1e-3
"""Features of different images, or of different patches, that differ by less of their length say nothing."""
MAX_FIRST_DIRECTION = 0.9999
"""Share of the tokens' variance along one direction from which on the features are a single number."""
GOLDEN_TOLERANCE = 1e-3
"""Of the features' length; devices and library versions differ by about 1e-5, wrong networks by 1e-2 or more."""
GOLDEN_NUMBERS = 16


class Check(NamedTuple):
    """One question about a teacher and its answer."""

    name: str
    status: Literal["ok", "note", "wrong"]
    """note: true and worth knowing; wrong: the teacher is not to be trusted."""
    detail: str
    remedy: str = ""


def built_in_images(size: int) -> Tensor:
    """Six images in [0, 1], (6, 3, size, size): four patterns by formula and crops of two photos of scikit-learn's."""
    from sklearn.datasets import load_sample_images

    photos = [torch.from_numpy(photo[:420, 100:520].copy()) for photo in load_sample_images().images]
    photo_batch = torch.stack(photos).permute(0, 3, 1, 2).float() / 255
    resized = nn.functional.interpolate(photo_batch, size=(size, size), mode="bilinear", antialias=True)
    return torch.cat([formula_images(size), resized.clamp(0, 1)])


def formula_images(size: int) -> Tensor:
    """Four coloured wave patterns in [0, 1], (4, 3, size, size): the same numbers on every machine."""
    y, x = np.meshgrid(*(np.linspace(0, 1, size),) * 2, indexing="ij")
    images = []
    for number in range(4):
        waves = [
            np.sin(2 * np.pi * ((1 + number) * x + (channel + 1) * (0.5 + number) * y * x) + number + channel)
            for channel in range(3)
        ]
        images.append(0.5 + 0.5 * np.stack(waves))
    return torch.from_numpy(np.stack(images)).float()


def diagnose(
    loaded: Loaded, teacher: Teacher, *, golden: Mapping[str, Any], device: torch.device
) -> list[Check]:
    """Every check of a loaded teacher, in reading order.

    golden: stored features by SHA-256 of the weight file, as `golden_feature` makes them.
    """
    tokens = teacher.to(device).encode(built_in_images(teacher.image_size).to(device))
    tokens = Tokens(tokens.prefix.float().cpu(), tokens.patches.float().cpu(), tokens.grid)
    checks = [
        _check_weights(loaded),
        _check_audit(loaded),
        *_check_assumption(loaded),
        _check_training(teacher.backbone.network),
        _check_finite(tokens),
    ]
    if checks[-1].status == "ok":
        checks += [*_check_spread(tokens), _check_golden(loaded, teacher, golden, device)]
    return [*checks, _check_license(loaded)]


def golden_feature(teacher: Teacher, device: torch.device) -> dict[str, Any]:
    """What a teacher says of the formula images, short enough to store: plain data for `diagnose`.

    The first numbers of the class token (the mean patch token where there is none) and of the mean patch token of each
    image, in float32.
    """
    tokens = teacher.to(device).encode(formula_images(teacher.image_size).to(device))
    first = pool(tokens, "cls" if tokens.prefix.shape[1] else "patches")
    rows = {"class": first, "patches": pool(tokens, "patches")}
    return {
        "name": teacher.name,
        "image_size": teacher.image_size,
        **{
            key: [[round(number, 5) for number in row] for row in value[:, :GOLDEN_NUMBERS].tolist()]
            for key, value in rows.items()
        },
    }


def audit_summary(loaded: Loaded) -> dict[str, Any]:
    """The key audit in numbers: tensors used as they stand, renamed or converted, and left out, by reason."""
    used = [change for change in loaded.audit if change.became is not None and not change.reason]
    changed = [change for change in loaded.audit if change.became is not None and change.reason]
    dropped = [change for change in loaded.audit if change.became is None]
    return {
        "used": len(used),
        "changed": dict(Counter(change.reason for change in changed)),
        "left_out": dict(Counter(change.reason for change in dropped)),
    }


def _check_weights(loaded: Loaded) -> Check:
    if loaded.sha256 is None:
        return Check(
            "weights",
            "wrong",
            "random weights: nothing was loaded",
            "leave out --pretrained false",
        )
    return Check("weights", "ok", f"SHA-256 {loaded.sha256}")


def _check_audit(loaded: Loaded) -> Check:
    if not loaded.audit:
        detail = "every tensor of the network, under its own name" if loaded.sha256 else "none was read"
        return Check("tensors", "ok" if loaded.sha256 else "wrong", detail)
    numbers = audit_summary(loaded)
    changed, dropped = sum(numbers["changed"].values()), sum(numbers["left_out"].values())
    detail = f"{numbers['used']} used as they stand, {changed} renamed or converted, {dropped} left out"
    return Check("tensors", "ok", f"{detail}; the network has no other")


def _check_assumption(loaded: Loaded) -> list[Check]:
    if not loaded.assumption:
        return []
    remedy = "name the network with --arch if it is another"
    return [Check("assumed", "note", loaded.assumption, remedy)]


def _check_training(network: nn.Module) -> Check:
    """Training moves the scales and offsets of norms away from one and zero, whatever the method."""
    norms = [module for name, module in network.named_modules() if _is_norm(module)]
    if norms and all(bool((norm.weight == 1).all()) and not bool(norm.bias.any()) for norm in norms):
        return Check(
            "training",
            "wrong",
            f"all {len(norms)} norms have scale 1 and offset 0: these are initial weights",
            "get the trained weights",
        )
    return Check("training", "ok", "the norms have left their initial values")


def _is_norm(module: Any) -> bool:
    return isinstance(getattr(module, "weight", None), Tensor) and (
        isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)) and module.bias is not None
    )


def _check_finite(tokens: Tokens) -> Check:
    every = tokens.all()
    if every.isfinite().all():
        return Check("finite", "ok", f"all {every.numel()} numbers of the features of 6 built-in images")
    bad = int((~every.isfinite()).sum())
    return Check(
        "finite", "wrong", f"{bad} of {every.numel()} features are NaN or infinite", "get the weights again"
    )


def _check_spread(tokens: Tokens) -> list[Check]:
    """Features must tell images and patches apart, along more than one direction."""
    vectors = {"images": pool(tokens, "patches")}
    if tokens.prefix.shape[1]:
        vectors["images (class token)"] = pool(tokens, "cls")
    checks = []
    for name, rows in vectors.items():
        spread = _spread(rows)
        status: Literal["ok", "wrong"] = "ok" if spread > MIN_SPREAD else "wrong"
        remedy = (
            "" if status == "ok" else "the features hardly depend on the image: the weights are not its own"
        )
        checks.append(Check(f"tells {name} apart", status, f"spread {spread:.2g} of the length", remedy))
    patches = tokens.patches.flatten(0, 1)
    centred = patches - patches.mean(dim=0)
    first = float(torch.linalg.svdvals(centred)[0].square() / centred.square().sum().clamp_min(1e-30))
    is_flat = _spread(patches) <= MIN_SPREAD or first > MAX_FIRST_DIRECTION
    remedy = "the feature map is nearly one number: a norm may be lost" if is_flat else ""
    detail = f"spread {_spread(patches):.2g}; the first direction holds {100 * first:.1f} % of the variance"
    return [*checks, Check("tells patches apart", "wrong" if is_flat else "ok", detail, remedy)]


def _spread(rows: Tensor) -> float:
    """Mean distance of rows (N, C) from their mean, over their mean length."""
    distance = (rows - rows.mean(dim=0)).norm(dim=1).mean()
    return float(distance / rows.norm(dim=1).mean().clamp_min(1e-30))


def _check_golden(loaded: Loaded, teacher: Teacher, golden: Mapping[str, Any], device: torch.device) -> Check:
    stored = golden.get(loaded.sha256 or "")
    if stored is not None and not isinstance(stored, dict):
        raise _no_features(loaded, f"they are {type(stored).__name__}, no object")
    if stored is None or stored.get("image_size") != teacher.image_size:
        detail = "no stored feature for these weights" + (" at this image size" if stored else "")
        return Check(
            "golden feature", "note", detail, "--record FILE stores one, --golden FILE compares with it"
        )
    found = golden_feature(teacher, device)
    try:
        before = {key: torch.tensor(stored[key], dtype=torch.float64) for key in ("class", "patches")}
        now = {key: torch.tensor(found[key], dtype=torch.float64) for key in before}
        worst = max(float((now[key] - before[key]).norm() / before[key].norm()) for key in before)
    except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise _no_features(loaded, f"{type(error).__name__}: {error}") from error
    if worst < GOLDEN_TOLERANCE:
        return Check("golden feature", "ok", f"relative difference {worst:.1g}")
    return Check(
        "golden feature",
        "wrong",
        f"the features differ from the stored ones by {100 * worst:.2g} % of their length",
        "compare preprocessing, precision and the versions of timm and open_clip with those that stored it",
    )


def _no_features(loaded: Loaded, problem: str) -> ConfigError:
    return ConfigError(
        f"the features stored for the weights {(loaded.sha256 or '')[:12]} cannot be compared with: {problem}",
        "store them again with --record FILE",
    )


def _check_license(loaded: Loaded) -> Check:
    if loaded.is_noncommercial:
        return Check(
            "licence", "note", f"{loaded.license}: non-commercial, and so is what is distilled from it"
        )
    if loaded.license == "unstated":
        return Check("licence", "note", "unstated: find out before you publish what is distilled from it")
    return Check("licence", "ok", loaded.license)
