"""Images beside the classes their pixels have and the classes predicted for them."""

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fdkit.analysis._figure import WIDE, in_style, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Of the colours of Okabe and Ito 2008 ("Color Universal Design") and Tol 2021 ("Colour schemes"), each is the one whose
# nearest colour before it is farthest away for people with normal, protan, deutan and tritan vision (in OKLab, with the
# matrices of Machado et al. 2009): the first few are far apart, and no two are alike.
COLOURS = (
    "#0072b2", "#f0e442", "#42150a", "#cc3311", "#66ccee", "#332288", "#aaaa00", "#44aa99",
    "#aa3377", "#663333", "#90c987", "#cae0ab", "#222255", "#bbcc33", "#117733", "#ee6677",
)  # fmt: skip
OTHER, IGNORED_COLOUR, BORDER = "#bbbbbb", "#ffffff", 0.55
COLUMNS = ("image", "truth", "prediction")


class SegmentedImage(NamedTuple):
    """One image with its masks, all of one height and width."""

    pixels: np.ndarray
    """(H, W, 3) uint8, RGB."""
    truth: np.ndarray
    """(H, W) int: classes; anything outside 0 .. K - 1 counts nowhere."""
    predicted: np.ndarray
    """(H, W) int: classes."""


@in_style
def segmentation_figure(
    images: Sequence[SegmentedImage], classes: Sequence[str], title: str = "", *, width: float = WIDE
) -> "Figure":
    """A row an image: the image, its true classes and the predicted ones, with a legend of the classes shown.

    Classes are told apart by colour and by thin dark borders. Where more are shown than there are colours, the rarest
    share a grey. classes: the names; width: inches. Raises ValueError without images.
    """
    if not images:
        raise ValueError("there are no images to show")
    shown = _by_frequency(images, len(classes))
    colours = class_colours(shown)
    heights = [one.pixels.shape[0] / one.pixels.shape[1] for one in images]
    names = _legend(
        shown, colours, classes, has_ignored=any(_is_ignored(one, len(classes)) for one in images)
    )
    columns = max(1, min(6, int(width // 1.2)))
    figure = new_figure(width, width / 3 * sum(heights) + 0.5 + 0.22 * -(-len(names) // columns))
    axes = figure.subplots(len(images), 3, squeeze=False, height_ratios=heights)
    for row, image in zip(axes, images, strict=True):
        for place, pixels in zip(row, _panels(image, colours), strict=True):
            _show(place, pixels)
    for place, name in zip(axes[0], COLUMNS, strict=True):
        place.set_title(name, fontsize=9.5, fontweight="normal", loc="center")
    if title:
        title = textwrap.fill(title, width=round(9.5 * width))
        figure.suptitle(title, fontsize=10.5, fontweight="bold", x=0.01, ha="left")
    _add_legend(figure, names, columns)
    return figure


def class_colours(shown: Sequence[int]) -> dict[int, str]:
    """A colour for each class, in the order of importance; those past the colours there are share OTHER."""
    colours = dict(zip(shown, COLOURS, strict=False))
    return colours | dict.fromkeys(shown[len(COLOURS) :], OTHER)


def _by_frequency(images: Sequence[SegmentedImage], num_classes: int) -> list[int]:
    """The classes in the images and their predictions, the most frequent first."""
    counts = np.zeros(num_classes, dtype=np.int64)
    for image in images:
        for mask in (image.truth, image.predicted):
            counts += np.bincount(mask[(mask >= 0) & (mask < num_classes)], minlength=num_classes)
    return [int(number) for number in np.argsort(-counts, kind="stable") if counts[number] > 0]


def _is_ignored(image: SegmentedImage, num_classes: int) -> bool:
    return bool(((image.truth < 0) | (image.truth >= num_classes)).any())


def _panels(image: SegmentedImage, colours: dict[int, str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return image.pixels, _painted(image.truth, colours), _painted(image.predicted, colours)


def _painted(mask: np.ndarray, colours: dict[int, str]) -> np.ndarray:
    """(H, W, 3) uint8: the colour of every class, darker along the borders between classes."""
    from matplotlib.colors import to_rgb

    painted = np.empty((*mask.shape, 3), dtype=np.float64)
    painted[:] = to_rgb(IGNORED_COLOUR)
    for number, colour in colours.items():
        painted[mask == number] = to_rgb(colour)
    is_border = np.zeros(mask.shape, dtype=bool)
    is_border[:, :-1] |= mask[:, :-1] != mask[:, 1:]
    is_border[:-1] |= mask[:-1] != mask[1:]
    painted[is_border] *= BORDER
    return (255 * painted).round().astype(np.uint8)


def _legend(
    shown: Sequence[int], colours: dict[int, str], classes: Sequence[str], *, has_ignored: bool
) -> list[tuple[str, str]]:
    """Names and colours, in the order of the classes."""
    names = [(classes[number], colours[number]) for number in sorted(shown) if colours[number] != OTHER]
    if OTHER in colours.values():
        names.append(("other", OTHER))
    return [*names, ("ignored", IGNORED_COLOUR)] if has_ignored else names


def _show(axes: "Axes", pixels: np.ndarray) -> None:
    axes.imshow(pixels, interpolation="nearest" if pixels.shape[1] < 200 else "antialiased", aspect="equal")
    axes.grid(visible=False)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _add_legend(figure: "Figure", names: Sequence[tuple[str, str]], columns: int) -> None:
    from matplotlib.patches import Patch

    patches = [
        Patch(facecolor=colour, edgecolor="#767676", linewidth=0.6, label=name) for name, colour in names
    ]
    figure.legend(
        handles=patches, loc="outside lower left", ncols=columns, handlelength=1.2, handleheight=1.0
    )
