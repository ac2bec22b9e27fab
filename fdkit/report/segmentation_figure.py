"""Images beside the classes their pixels have and the classes predicted for them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fdkit.analysis._figure import WIDE, in_style, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Both are made to be told apart with any colour vision, the second for more classes, in steps of a rainbow.
# Sources: Okabe and Ito 2008, "Color Universal Design"; Tol 2021, "Colour schemes", figure 22.
FEW_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#555555")
MANY_COLOURS = (
    "#d9cce3", "#caaccb", "#ba8db4", "#aa6f9e", "#994f88", "#882e72", "#1965b0", "#437dbf", "#6195cf", "#7bafde",
    "#4eb265", "#90c987", "#cae0ab", "#f7f056", "#f7cb45", "#f4a736", "#ee8026", "#e65518", "#dc050c", "#a5170e",
    "#72190e", "#42150a",
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
        figure.suptitle(title, fontsize=10.5, fontweight="bold", x=0.01, ha="left")
    _add_legend(figure, names, columns)
    return figure


def class_colours(shown: Sequence[int]) -> dict[int, str]:
    """A colour for each class, in the order of importance; those past the colours there are share OTHER."""
    if len(shown) <= len(FEW_COLOURS):
        return dict(zip(shown, FEW_COLOURS, strict=False))
    count = min(len(shown), len(MANY_COLOURS))
    places = np.linspace(0, len(MANY_COLOURS) - 1, count).round().astype(int)
    # Frequent classes often lie side by side, so they get colours far apart: every other place, from both halves.
    order = [
        place for pair in zip(places[: count // 2], places[count // 2 :], strict=False) for place in pair
    ]
    order += [place for place in places if place not in order]
    colours = {number: MANY_COLOURS[place] for number, place in zip(shown, order, strict=False)}
    return colours | dict.fromkeys(shown[count:], OTHER)


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
