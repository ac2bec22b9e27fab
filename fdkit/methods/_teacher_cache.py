"""What teachers say about crops that come again, said once: computed, stored, and from then on read.

The views add to each batch what the cache holds for its crops, read by the loader's workers. Where a crop's record is
missing, the teacher is run on that crop and the record written; the student is given what was stored, never what was
computed, so that a run that fills a cache and one that reads it are the same to the bit.
"""

import logging
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from fdkit.data.repeated_views import RepeatedViews
from fdkit.data.views import Pixels, Sample, Views
from fdkit.models.backbone import Tokens
from fdkit.models.distillation_target import Whitening, whiten
from fdkit.teachers.feature_cache import Crop, FeatureCache, State
from fdkit.teachers.quantised import Reduction, Stored, quantise, restore, stored_of

log = logging.getLogger("fdkit")

Target = Tokens | Tensor
"""What a teacher says of B images: tokens, or one vector (B, C) an image."""

VIEW, INDEX, CHECKSUM = range(3)
"""Columns of a batch's places; one more for each cache says whether its record was found."""


class Places:
    """Which crops a batch holds, kept on the host: no tensor, so that nothing moves it to a device and waits for it."""

    def __init__(self, rows: Tensor) -> None:
        """rows: (B, 3 + number of caches) int64."""
        self.rows = rows

    def chunk(self, num_parts: int) -> list["Places"]:
        """Parts of the batch, as `Tensor.chunk` makes them."""
        return [Places(rows) for rows in self.rows.chunk(num_parts)]

    def crops(self) -> list[Crop]:
        """One an image."""
        return [Crop(*row[:3]) for row in self.rows.tolist()]


class CachedViews:
    """One view of each image, of V that repeat, and what each cache holds for it."""

    def __init__(self, views: Views, num_crops: int, caches: Sequence[FeatureCache]) -> None:
        assert views.num_views == 1, views.num_views
        self.views = views
        self.num_views = 1
        self.image_size = views.image_size
        self.repeated = RepeatedViews(views, num_crops)
        self.caches = list(caches)

    def __call__(self, image: Pixels, random: np.random.Generator) -> Sample:
        """The crop, its colour parameters, its place (int64), and values and scales from each cache."""
        view, index = self.repeated.rewind(random)
        sample = self.views(image, random)
        pixels = sample.crops[0].permute(1, 2, 0).contiguous().numpy()
        crop = Crop(view, index, zlib.crc32(pixels.data))
        found: list[int] = []
        stored: list[Tensor] = []
        for cache in self.caches:
            content, state = cache.read(crop)
            layout = cache.layout
            found.append(int(state == "sound"))
            stored += stored_of(content or None, layout.num_tokens, layout.width, layout.dtype)
        return Sample(sample.crops, [*sample.colour, torch.tensor([*crop, *found]), *stored])

    def finish(self, crops: list[Tensor], colour: list[Tensor]) -> list[Tensor]:
        """Images (B, 3, H, W) in [0, 1], their places, then values and scales from each cache."""
        own = len(colour) - 1 - 2 * len(self.caches)
        images = self.views.finish(crops, colour[:own])
        return [*images, Places(colour[own].cpu()), *colour[own + 1 :]]  # type: ignore[list-item]


class Form(NamedTuple):
    """The shape of what one teacher says, as rows: the class token if there is one, then the patches; or one vector."""

    num_tokens: int
    width: int
    has_class_token: bool
    grid: tuple[int, int] | None
    """(h, w) of the patches; None for one vector an image."""


def rows_of(target: Target, whitening: Whitening) -> tuple[Tensor, Form]:
    """Float32 vectors (B, N, C) as the loss sees them, and their form. Registers take no part.

    Whitening over a batch waits until the batch is known, so such vectors are stored as the teacher gives them.
    """
    if isinstance(target, Tokens):
        rows = torch.cat([target.prefix[:, :1], target.patches.to(target.prefix.dtype)], dim=1)
        form = Form(rows.shape[1], rows.shape[2], target.prefix.shape[1] > 0, target.grid)
    else:
        rows = target[:, None]
        form = Form(1, rows.shape[2], False, None)
    return whiten(rows.float(), stored_whitening(whitening)), form


def stored_whitening(whitening: Whitening) -> Whitening:
    """The whitening of what is stored: that of the loss, if it looks at one vector alone."""
    return "none" if whitening == "batch" else whitening


def target_of(rows: Tensor, form: Form) -> Target:
    """The target again, of rows (B, N, C)."""
    if form.grid is None:
        return rows[:, 0]
    first = int(form.has_class_token)
    return Tokens(rows[:, :first], rows[:, first:], form.grid)


class CachedTarget:
    """One teacher's targets, through its cache."""

    def __init__(self, cache: FeatureCache, form: Form, whitening: Whitening, reduction: Reduction | None):
        self.cache = cache
        self.form = form
        self.whitening = whitening
        self.reduction = reduction
        self._said: Counter[State] = Counter()

    def __call__(
        self,
        images: Tensor,
        crops: list[Crop],
        found: Tensor,
        stored: Stored,
        say: Callable[[Tensor], Target],
    ) -> tuple[Target, int]:
        """The target of images (B, 3, H, W), and of how many the teacher was run.

        found: (B,) bool on the host: whose vectors `stored` holds; say: runs the teacher.
        """
        missing = (~found).nonzero()[:, 0].tolist()
        computed = 0
        if missing:
            stored, computed = self._complete(images, crops, missing, stored, say)
        with torch.autocast(images.device.type, enabled=False):
            return target_of(self.expand(restore(stored)), self.form), computed

    def stored_form(self, rows: Tensor) -> Stored:
        """Vectors (B, N, C) float32 as they are stored."""
        with torch.autocast(rows.device.type, enabled=False):
            reduction = self._reduction_on(rows.device)
            return quantise(reduction.reduce(rows) if reduction else rows, self.cache.layout.dtype)

    def expand(self, vectors: Tensor) -> Tensor:
        """Stored numbers (B, N, K) as vectors (B, N, C)."""
        reduction = self._reduction_on(vectors.device)
        return reduction.expand(vectors) if reduction else vectors

    def _complete(
        self,
        images: Tensor,
        crops: list[Crop],
        missing: list[int],
        stored: Stored,
        say: Callable[[Tensor], Target],
    ) -> tuple[Stored, int]:
        """What is stored with the missing rows in place: read again, as they may have come since, or computed."""
        layout = self.cache.layout
        contents = dict.fromkeys(missing, b"")
        for number in missing:
            contents[number], state = self.cache.read(crops[number])
            self._report(crops[number], state)
        absent = [number for number in missing if not contents[number]]
        if absent:
            chosen = (
                images if len(absent) == len(crops) else images[torch.tensor(absent, device=images.device)]
            )
            target = say(chosen)
            with torch.autocast(images.device.type, enabled=False):
                rows, form = rows_of(target, self.whitening)
            assert form == self.form, (form, self.form)
            fresh = self.stored_form(rows).to_bytes()
            standing = self.cache.fill([crops[number] for number in absent], fresh)
            contents |= zip(absent, standing, strict=True)
        loaded = [stored_of(contents[n], layout.num_tokens, layout.width, layout.dtype) for n in missing]
        places = torch.tensor(missing, device=images.device)
        parts = []
        for old, new in zip(stored, zip(*loaded, strict=True), strict=True):
            parts.append(old.index_copy(0, places, torch.stack(new).to(old.device)))
        return Stored(*parts), len(absent)

    def _report(self, crop: Crop, state: State) -> None:
        """Say once of each kind what is wrong with a record that is there; count the others."""
        if state in ("sound", "missing"):
            return
        self._said[state] += 1
        if self._said[state] == 1:
            reason = (
                "is damaged"
                if state == "damaged"
                else "is of other pixels (another decoder, or a mended image)"
            )
            log.warning(
                "%s: the record of crop %d of image %d %s; computed again, as are others like it",
                self.cache.folder,
                crop.view,
                crop.image,
                reason,
            )

    def _reduction_on(self, device: torch.device) -> Reduction | None:
        if self.reduction is not None and self.reduction.mean.device != device:
            self.reduction = Reduction(*(part.to(device) for part in self.reduction))
        return self.reduction


class CachedTargets:
    """The targets of several teachers, each through a cache of its own."""

    def __init__(self, targets: Sequence[CachedTarget]) -> None:
        self.each = list(targets)

    def __call__(
        self, views: Sequence[Tensor], say: Sequence[Callable[[Tensor], Target]]
    ) -> tuple[list[Target], float]:
        """Every teacher's target of a batch that `CachedViews` made, and the share of it that was read.

        say: runs each of the teachers.
        """
        images, *parts = views
        places = cast(Places, parts.pop(0))
        crops = places.crops()
        targets, computed = [], 0
        for number, (one, run) in enumerate(zip(self.each, say, strict=True)):
            found = places.rows[:, CHECKSUM + 1 + number].bool()
            target, count = one(images, crops, found, Stored(*parts[2 * number : 2 * number + 2]), run)
            targets.append(target)
            computed += count
        return targets, 1 - computed / (len(crops) * len(targets))
