"""Where every patch looks, in every layer and head, for a few images, to explore on the page of `fdkit report`.

All of it would be large: 12 layers of 12 heads with 196 patches are 44 million numbers for 8 images. Each row of
attention is therefore scaled to its largest value, its square root kept in 8 bits, and a layer's rows stored as one
picture in WebP, whose quality is lowered until all models fit the size asked for; what that costs is measured and told.
"""

import base64
import io
from bisect import bisect_right
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from fdkit.analysis._analysis import Analysis
from fdkit.analysis._attention import AttentionConfig, measure
from fdkit.analysis._figure import NARROW, WIDE, in_style, new_figure, wrapped
from fdkit.analysis._pictures import image_from_text, image_to_text, to_pixels
from fdkit.analysis.observe import Attention, Images, Observed, backbone_of
from fdkit.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

READING = (
    "Pick an image, then a patch: bright places are those that the patch attends to, in each model, layer and head; a "
    "bright spot that follows the patch is a head that looks beside itself, one that stays is a head that looks at the "
    "same thing whoever asks."
)
KEEPS_COLOURS = True
BEST_QUALITY = 90
"""Of WebP, which goes down to 0; the best that fits is taken."""
SAMPLE = 6
"""Every so many sheets one is encoded to choose the quality."""
BASE64 = 4 / 3
MAX_PICTURE = 224
"""Side of a shown image in pixels."""


class AttentionViewerConfig(AttentionConfig):
    """What the viewer holds."""

    num_images: int = Field(default=8, ge=1)
    """Images to look at, drawn from the data with the seed."""
    max_cells: int = Field(default=16, ge=1)
    """Finest grid stored, cells a side; finer ones, such as 37x37 patches, are pooled to it: attention summed over the
    patches of a looked-at cell, averaged over those of a looking one."""
    max_megabytes: float = Field(default=10, gt=0)
    """Size of all attention in the page, of all models together; the quality of its storage follows from it."""


class Sheet(NamedTuple):
    """The attention of one layer for one image."""

    rows: np.ndarray
    """(Q, H*n) uint8: for each query, the class token first if there is one, the n cells that each head sees:
    255 * sqrt(attention / the row's largest)."""
    elsewhere: np.ndarray
    """(H, Q) uint8: 255 * attention to tokens without a place in the image: class token, registers, padding."""


class ViewerStatistic:
    """Gathers the sheets of one model; its memory grows with the few images shown."""

    def __init__(self, config: AttentionViewerConfig, observed: Observed) -> None:
        self.config = config
        self.observed = observed
        self.sheets: list[list[Sheet]] = []
        """An image, then a layer."""
        self.layers: list[dict[str, Any]] = []
        self.pictures: list[str] = []
        self.names: list[str] = []
        self.has_class_token = backbone_of(observed.model).num_prefix_tokens > 0
        self._first = 0

    def begin(self, images: Images) -> None:
        """A batch begins: keep what its images look like."""
        self._first = len(self.pictures)
        self.pictures += [_thumbnail(one) for one in images.pixels]
        self.names += _names(images, self.observed, self._first)
        self.sheets += [[] for _ in images.pixels]

    def add(self, layer: int, attention: Attention) -> None:
        """Keep a layer's attention, pooled and in 8 bits."""
        grid = tuple(min(side, self.config.max_cells) for side in attention.grid)
        queries, elsewhere = cell_attention(attention, (grid[0], grid[1]), class_token=self.has_class_token)
        if layer == len(self.layers):
            self.layers.append({"grid": list(grid), "num_heads": attention.num_heads})
        for number, (rows, lost) in enumerate(zip(queries, elsewhere, strict=True)):
            self.sheets[self._first + number].append(to_sheet(rows, lost))

    def numbers(self) -> dict[str, Any]:
        """All but the encoded sheets, whose quality hangs on all models; "_sheets" holds them as they are."""
        return {
            "layers": self.layers,
            "has_class_token": self.has_class_token,
            "pictures": self.pictures,
            "image_names": self.names,
            "_sheets": self.sheets,
        }


def cell_attention(
    attention: Attention, grid: tuple[int, int], *, class_token: bool
) -> tuple[Tensor, Tensor]:
    """(B, H, Q, n): what each query gives each of the n cells; and (B, H, Q): what it gives tokens without a place.

    grid: (h, w) of the n = h * w cells, at most the attention's own; a cell's patches are summed as keys and averaged
    as queries. class_token: the first query is the first token, which then must be global attention's class token.
    """
    weights, places = attention.weights.float(), attention.places
    membership = _membership(places, attention.grid, grid).to(weights.device)  # (W, N, n)
    share = membership / membership.sum((0, 1)).clamp_min(1)
    given = torch.einsum("bwhqk,wkn->bwhqn", weights, membership)
    rows = torch.einsum("bwhqn,wqc->bhcn", given, share)
    lost_at = (places < 0).to(weights.dtype)
    lost = torch.einsum("bwhqk,wk->bwhq", weights, lost_at)
    elsewhere = torch.einsum("bwhq,wqc->bhc", lost, share)
    if class_token:
        rows = torch.cat([given[:, 0, :, :1], rows], dim=2)
        elsewhere = torch.cat([lost[:, 0, :, :1], elsewhere], dim=2)
    return rows, elsewhere


def _membership(places: Tensor, own: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """(W, N, n) of 0 and 1: which cell a token belongs to; a token without a place belongs to none."""
    rows = places.div(own[1], rounding_mode="floor") * grid[0] // own[0]
    columns = places % own[1] * grid[1] // own[1]
    cell = (rows * grid[1] + columns).clamp_min(0)
    one_hot = torch.nn.functional.one_hot(cell, grid[0] * grid[1]).float()
    return one_hot * (places >= 0).float()[..., None]


def to_sheet(rows: Tensor, elsewhere: Tensor) -> Sheet:
    """The sheet of one image: rows (H, Q, n) and elsewhere (H, Q)."""
    scaled = (rows / rows.amax(-1, keepdim=True).clamp_min(1e-30)).sqrt()
    picture = (255 * scaled).round().byte().transpose(0, 1).flatten(1)
    return Sheet(picture.cpu().numpy(), (255 * elsewhere).round().clamp(0, 255).byte().cpu().numpy())


def from_rows(picture: np.ndarray, num_heads: int) -> np.ndarray:
    """(H, Q, n) float64: of each query's attention among cells, the share that each cell has; rows sum to 1."""
    values = (picture.reshape(len(picture), num_heads, -1).astype(np.float64) / 255) ** 2
    sums = values.sum(-1, keepdims=True)
    return (values / np.where(sums > 0, sums, 1)).transpose(1, 0, 2)


def encode(picture: np.ndarray, quality: int) -> bytes:
    """A sheet's rows as WebP."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="WEBP", quality=quality, method=4)
    return buffer.getvalue()


def decode(content: bytes) -> np.ndarray:
    """The rows that `encode` wrote, as near as the quality let them."""
    return np.asarray(Image.open(io.BytesIO(content)).convert("L"))


def statistic(observed: Observed, config: AttentionViewerConfig) -> ViewerStatistic:
    """What gathers a model's attention to look at."""
    return ViewerStatistic(config, observed)


def analyze(observed: Sequence[Observed], config: AttentionViewerConfig) -> Analysis:
    """The attention of every patch, layer and head of each model on the first images, for the viewer of a page.

    The numbers hold, for each model, "layers" ({"grid", "num_heads"}), "has_class_token", "pictures" (JPEG in base64)
    and "image_names", "sheets" (for each image and layer WebP in base64, see `Sheet`), "elsewhere" (likewise, raw
    bytes); and "quality" with "error": the mean total variation between stored and true attention among cells, in
    [0, 1].
    Raises ConfigError if a model's attention cannot be read, DataError if there are no images.
    """
    if not observed:
        raise ConfigError("the attention viewer needs a model")
    return collect([measure(one, [statistic(one, config)], config)[0] for one in observed], config)


def collect(models: Sequence[dict[str, Any]], config: AttentionViewerConfig) -> Analysis:
    """The analysis made of one table a model."""
    sheets = [sheet for model in models for image in model["_sheets"] for sheet in image]
    quality = _quality(sheets, config.max_megabytes * 1e6 / BASE64)
    numbers = {
        "analysis": "attention-viewer",
        "quality": quality,
        "models": [_encoded(model, quality) for model in models],
    }
    return Analysis(numbers, partial(draw, numbers))


def _quality(sheets: Sequence[Sheet], max_bytes: float) -> int:
    """The best quality at which all sheets fit, estimated from some of them."""
    sample = sheets[::SAMPLE] or sheets
    room = 0.97 * (max_bytes - sum(sheet.elsewhere.nbytes for sheet in sheets))

    def excess(quality: int) -> int:
        """How many bytes too large all of them are; grows with the quality."""
        return round(
            sum(len(encode(sheet.rows, quality)) for sheet in sample) * len(sheets) / len(sample) - room
        )

    if excess(BEST_QUALITY) <= 0:
        return BEST_QUALITY
    fitting = bisect_right(range(BEST_QUALITY), 0, key=excess)
    if fitting == 0:
        raise ConfigError(
            f"the attention of {len(sheets)} layers and images does not fit {max_bytes * BASE64 / 1e6:.1f} MB",
            "show fewer images (--num-images), pool more (--max-cells 8), or allow more (--max-megabytes)",
        )
    return fitting - 1


def _encoded(model: dict[str, Any], quality: int) -> dict[str, Any]:
    kept = {key: value for key, value in model.items() if key != "_sheets"}
    errors: list[float] = []
    sheets: list[list[str]] = []
    for image in model["_sheets"]:
        sheets.append([])
        for sheet, layer in zip(image, model["layers"], strict=True):
            content = encode(sheet.rows, quality)
            stored, true = (from_rows(one, layer["num_heads"]) for one in (decode(content), sheet.rows))
            errors.append(float(0.5 * np.abs(stored - true).sum(-1).mean()))
            sheets[-1].append(base64.b64encode(content).decode("ascii"))
    elsewhere = [
        [base64.b64encode(sheet.elsewhere.tobytes()).decode("ascii") for sheet in image]
        for image in model["_sheets"]
    ]
    return kept | {"sheets": sheets, "elsewhere": elsewhere, "error": sum(errors) / len(errors)}


def _thumbnail(image: Tensor) -> str:
    side = image.shape[-1]
    if side > MAX_PICTURE:
        size = [MAX_PICTURE, MAX_PICTURE]
        image = torch.nn.functional.interpolate(image[None], size=size, mode="bicubic", antialias=True)[
            0
        ].clamp(0, 1)
    return image_to_text(to_pixels(image), quality=85)


def _names(images: Images, observed: Observed, first: int) -> list[str]:
    """What each image is called: its class, if it has one, else the last part of its path."""
    names = []
    for number in range(len(images.pixels)):
        label = -1 if images.labels is None else int(images.labels[number])
        index = first + number if images.indices is None else int(images.indices[number])
        is_named = 0 <= label < len(observed.classes)
        names.append(observed.classes[label] if is_named else observed.describe(index).rpartition("/")[2])
    return names


def scalars(model: dict[str, Any]) -> dict[str, float]:
    """None: it is for looking."""
    return {}


def summary(numbers: dict[str, Any]) -> tuple[str, list[list[str]]]:
    """A table for people: its title, and its rows, the header first."""
    rows = [
        [
            model["name"],
            str(len(model["sheets"])),
            f"{len(model['layers'])} x {model['layers'][-1]['num_heads']}",
            "x".join(str(side) for side in model["layers"][-1]["grid"]),
            f"{100 * model['error']:.1f} %",
        ]
        for model in numbers["models"]
    ]
    title = f"attention to look at with fdkit report, stored at quality {numbers['quality']}"
    return title, [["model", "images", "layers x heads", "cells", "of attention misplaced by storing"], *rows]


@in_style
def draw(numbers: dict[str, Any], width: float = WIDE) -> "Figure":
    """Where the patch in the middle of the first image looks, mean of heads: a row a model, a column a depth.

    numbers: as `analyze` gives them; width: inches.
    """
    models = numbers["models"]
    columns = 4 if width > NARROW else 2
    figure = new_figure(width, (width / columns + 0.35) * len(models))
    places = figure.subplots(len(models), columns, squeeze=False)
    for row, model in zip(places, models, strict=True):
        picture = image_from_text(model["pictures"][0])
        shown = _spread(len(model["layers"]), columns - 1)
        _bare(row[0], picture)
        row[0].set_title(wrapped(model["name"], figure))
        for place in row[1 + len(shown) :]:
            place.set_axis_off()
        for place, layer in zip(row[1:], shown, strict=False):
            _draw_layer(place, picture, model, layer)
            place.set_title(f"layer {layer + 1}", fontweight="normal")
    return figure


def _spread(num_layers: int, count: int) -> list[int]:
    """At most `count` layers from the first to the last."""
    return sorted({round(place) for place in np.linspace(0, num_layers - 1, min(count, num_layers))})


def _draw_layer(axes: "Axes", picture: np.ndarray, model: dict[str, Any], layer: int) -> None:
    from matplotlib.patches import Rectangle

    rows, columns = model["layers"][layer]["grid"]
    content = base64.b64decode(model["sheets"][0][layer])
    heads = from_rows(decode(content), model["layers"][layer]["num_heads"])
    query = (rows // 2, columns // 2)
    offset = int(model["has_class_token"])
    seen = heads[:, offset + query[0] * columns + query[1]].mean(0).reshape(rows, columns)
    height, width = picture.shape[:2]
    _bare(axes, np.repeat(picture.mean(-1, keepdims=True).astype(np.uint8), 3, axis=-1))
    axes.imshow(
        seen, cmap="viridis", alpha=0.7, extent=(0, width, height, 0), interpolation="bilinear", vmin=0
    )
    corner = (query[1] * width / columns, query[0] * height / rows)
    size = (width / columns, height / rows)
    axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor="white", linewidth=1.5))


def _bare(axes: "Axes", picture: np.ndarray) -> None:
    height, width = picture.shape[:2]
    axes.imshow(
        picture, extent=(0, width, height, 0), interpolation="nearest" if width < 100 else "antialiased"
    )
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
