"""Segmentation without training: every patch of a test image asks the most similar patches of the training images.

The memory holds patch features of the training images, each with the classes of its pixels. A test patch's k most
similar ones vote for their classes with weight exp(cosine similarity / temperature); the votes are resized to the mask
and the highest wins. Images are read in squares of the size the network sees; in testing they overlap and votes are
averaged. Features are those of all patch tokens, and are not cached.
Source: the retrieval of Balažević et al. 2023 (arXiv 2306.01667), section 3, with the vote of Wu et al. 2018.
"""

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from fdkit.data.loader import evaluation_batches
from fdkit.data.segmentation import IGNORED, MaskConfig, SegmentationSource, open_segmentation
from fdkit.data.segmentation_views import WholeImage, cut_windows, sliding_scores, window_starts
from fdkit.errors import ConfigError, DataError, NumericsError
from fdkit.evaluation._metrics import Metrics
from fdkit.evaluation._segmentation import measure as measure_split
from fdkit.evaluation._segmentation import scores_of
from fdkit.evaluation._subject import Subject
from fdkit.evaluation.knn import nearest
from fdkit.models.backbone import Tokens
from fdkit.models.segmentation_heads import has_stages, resize, token_map

STRIDE_RATIO = 2 / 3
BLOCK_CPU, BLOCK_GPU = 4096, 65536
QUERIES = 1024
"""Patches searched together."""


class PatchKNNConfig(MaskConfig):
    """The vote, and the memory it is held in."""

    k: int = Field(default=30, ge=1)
    """Number of voting patches."""
    temperature: float = Field(default=0.07, gt=0)
    """Divides cosine similarity before the exponential, so low values favour the nearest."""
    labels: Literal["majority", "soft"] = "majority"
    """A patch of the memory votes for the class of most of its pixels, or for every class by its share of them."""
    memory_size: int = Field(default=100_000, ge=1)
    """Patches in the memory at most; of more, random ones are kept."""
    memory_seed: int = 0
    """Seed of which ones."""
    short_side: int | None = Field(default=None, ge=1)
    """Pixels of the shorter side that images are resized to; none means as many as the network sees."""
    stride: int | None = Field(default=None, ge=1)
    """Pixels between two squares in testing; none means two thirds of a square."""


class Memory(NamedTuple):
    """Patches of the training images."""

    values: Tensor
    """(M, D) float32 features of length 1."""
    shares: Tensor
    """(M, K) float32: what a patch votes for, rows sum to 1."""
    num_patches: int
    """How many there were to choose from."""


def measure(subject: Subject, config: PatchKNNConfig) -> Metrics:
    """The mIoU of a vote among the patches of the training images, on the split of the subject.

    Returns what `scores_of` says, and {"evaluator", "k", "temperature", "labels", "memory": {"size", "patches"},
    "settings", "model", "data"}. Raises ConfigError for options without effect here or a k above the memory's size,
    DataError for folders, masks or values that do not fit.
    """
    if subject.extraction.pooling != "auto":
        raise ConfigError(
            f"pooling {subject.extraction.pooling} has no effect on patch-knn, which reads every patch token",
            "leave it out",
        )
    size = subject.teacher.image_size
    short_side, stride = config.short_side or size, config.stride or max(1, round(size * STRIDE_RATIO))
    window_starts(size, size, stride)  # refuses a stride that leaves gaps, before features are made
    training, tested = open_segmentation(subject.data, ("train", subject.split), config)
    memory = fill_memory(subject, training, config, short_side=short_side)

    def score(image: Tensor) -> Tensor:
        return sliding_scores(
            image,
            lambda windows: vote(token_map(encode(subject, windows)), memory, config),
            size=size,
            stride=stride,
            batch_size=subject.batch_size,
        )

    found = measure_split(score, tested, short_side=short_side, loader=subject.loader, device=subject.device)
    if found.num_images == 0:
        raise DataError(
            f"no image of the split {subject.split} of {subject.data} could be read",
            "each is named above with its reason",
        )
    return {
        "evaluator": "patch-knn",
        "k": config.k,
        "temperature": config.temperature,
        "labels": config.labels,
        **scores_of(found.confusion, tested.classes),
        "memory": {"size": len(memory.values), "patches": memory.num_patches, "seed": config.memory_seed},
        "settings": {"crop_size": size, "stride": stride, "short_side": short_side},
        "model": subject.teacher.identity(),
        "data": _data_facts(subject, training, tested)
        | {"num_images": found.num_images, "skipped": found.skipped},
    }


def encode(subject: Subject, windows: Tensor) -> Tokens:
    """Patch tokens of windows (b, 3, S, S): of the last layer, or those of the last few side by side."""
    count = subject.extraction.layers
    teacher, kind = subject.teacher, subject.device.type
    with torch.autocast(kind, torch.bfloat16, enabled=subject.extraction.precision == "bf16"):
        if count == 1:
            return teacher.encode(windows)
        # A final norm fits the last stage alone.
        norm = not has_stages(teacher.backbone.network)
        several = teacher.encode(windows, layer=list(range(-count, 0)), norm=norm)
    grid = several[0].grid
    maps = torch.cat([resize(token_map(one).float(), grid) for one in several], dim=1)
    return Tokens(several[-1].prefix[:, :0], maps.flatten(2).transpose(1, 2), grid)


def fill_memory(
    subject: Subject, source: SegmentationSource, config: PatchKNNConfig, *, short_side: int
) -> Memory:
    """Random patches of the images, each with at least one pixel that counts.

    Every patch draws a number from a generator seeded with memory_seed, and those with the lowest numbers stay, so
    which they are hangs neither on the batch size nor on the device.
    Raises ConfigError if k exceeds the memory, DataError if no patch counts, NumericsError for features that are not
    finite.
    """
    generator = torch.Generator().manual_seed(config.memory_seed)
    pool = _Pool(config.memory_size)
    views = WholeImage(short_side)
    for batch in evaluation_batches(source, views, subject.loader, batch_size=1):
        images, masks = views.finish([crop.to(subject.device) for crop in batch.crops], [])
        values, shares = labelled_patches(subject, images[0], masks[0], len(source.classes))
        if not values.isfinite().all():
            name = source.describe(int(batch.indices[0]))
            raise NumericsError(f"the features of {name} are not finite", "the weights may be damaged")
        pool.add(values, shares, torch.rand(len(values), generator=generator))
    if pool.num_patches == 0:
        raise DataError(f"no patch of the training images of {source.name} has a class")
    values, shares = pool.chosen()
    if config.k > len(values):
        raise ConfigError(
            f"k is {config.k}, but there are only {len(values)} patches to be neighbours",
            f"ask for --k {len(values)} or less",
        )
    if config.labels == "majority":
        winners = (shares == shares.amax(dim=1, keepdim=True)).int().argmax(dim=1)
        shares = F.one_hot(winners, shares.shape[1]).to(shares.dtype)
    return Memory(values, shares, pool.num_patches)


class _Pool:
    """The patches with the lowest numbers among those added; holds twice as many at most between two choices."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.num_patches = 0
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []
        self._held = 0

    def add(self, values: Tensor, shares: Tensor, draws: Tensor) -> None:
        """Patches (n, D), their classes (n, K) and their numbers (n,)."""
        self._parts.append((values, shares, draws))
        self.num_patches += len(draws)
        self._held += len(draws)
        if self._held > 2 * self.size:
            self.chosen()

    def chosen(self) -> tuple[Tensor, Tensor]:
        """The chosen patches (M, D) and their classes (M, K), in the order they were added."""
        values, shares, draws = (torch.cat(parts) for parts in zip(*self._parts, strict=True))
        if len(draws) > self.size:
            kept = draws.argsort(stable=True)[: self.size].sort().values
            values, shares = (rows[kept.to(rows.device)] for rows in (values, shares))
            draws = draws[kept]
        self._parts, self._held = [(values, shares, draws)], len(draws)
        return values, shares


def labelled_patches(
    subject: Subject, image: Tensor, mask: Tensor, num_classes: int
) -> tuple[Tensor, Tensor]:
    """The patches of an image (3, h, w) with a pixel that counts: features (n, D) of length 1, and shares (n, K).

    mask: (H, W) int64, of which the pixel nearest to each one of the image is taken. The shares are those of the
    classes among the pixels of a patch that count.
    """
    size = subject.teacher.image_size
    nearest_mask = F.interpolate(mask[None, None].to(torch.uint8), image.shape[-2:], mode="nearest-exact")[0]
    windows = cut_windows(image, size, size)
    masks = cut_windows(nearest_mask, size, size, fill=IGNORED)[:, 0]
    values, shares = [], []
    for start in range(0, len(windows), subject.batch_size):
        part = slice(start, start + subject.batch_size)
        tokens = encode(subject, windows[part])
        values.append(F.normalize(tokens.patches.float(), dim=-1).flatten(0, 1))
        shares.append(class_shares(masks[part], tokens.grid, num_classes).flatten(0, 1))
    found, counted = torch.cat(values), torch.cat(shares)
    is_labelled = counted.sum(dim=1) > 0
    return found[is_labelled], counted[is_labelled]


def class_shares(masks: Tensor, grid: tuple[int, int], num_classes: int) -> Tensor:
    """The share of every class among the pixels of each patch that count, (b, h * w, K); zeros where none counts.

    masks: (b, H, W) uint8 of classes or IGNORED; grid: (h, w) patches, row by row. A pixel belongs to the patch its
    place falls into: row floor(y * h / H).
    """
    num_images, height, width = masks.shape
    rows = torch.arange(height, device=masks.device) * grid[0] // height
    columns = torch.arange(width, device=masks.device) * grid[1] // width
    patch = rows[:, None] * grid[1] + columns
    num_patches = grid[0] * grid[1]
    image = torch.arange(num_images, device=masks.device)[:, None, None]
    counts = masks != IGNORED
    cells = ((image * num_patches + patch) * num_classes + masks.long())[counts]
    found = torch.bincount(cells, minlength=num_images * num_patches * num_classes).float()
    found = found.view(num_images, num_patches, num_classes)
    return found / found.sum(dim=2, keepdim=True).clamp_min(1)


def vote(maps: Tensor, memory: Memory, config: PatchKNNConfig) -> Tensor:
    """Votes (b, K, h, w), in [0, 1] and summing to 1, of patches in maps (b, D, h, w) of any length."""
    num_images, _, height, width = maps.shape
    queries = maps.float().permute(0, 2, 3, 1).flatten(0, 2)  # the search compares by cosine
    block = BLOCK_CPU if queries.device.type == "cpu" else BLOCK_GPU
    votes = []
    for some in queries.split(QUERIES):
        similarity, rows = nearest(some, memory.values, config.k, block=block)
        weights = (similarity / config.temperature).softmax(dim=1).to(memory.shares.dtype)
        votes.append(torch.einsum("qk,qkc->qc", weights, memory.shares[rows]))
    return torch.cat(votes).view(num_images, height, width, -1).permute(0, 3, 1, 2)


def _data_facts(subject: Subject, training: SegmentationSource, tested: SegmentationSource) -> dict[str, Any]:
    return {
        "name": subject.data,
        "split": subject.split,
        "fingerprint": tested.fingerprint,
        "training_fingerprint": training.fingerprint,
        "num_training_images": len(training),
    }
