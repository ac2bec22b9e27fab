"""One guarded way from a file or its bytes to 8-bit RGB pixels; the files come from anywhere."""

import io
import struct
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.Image import Transpose

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""What Pillow may open; its other readers (EPS, PSD, ...) never see the file."""
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
MAX_PIXELS = 89_478_485
"""The largest image decoded: 256 MiB of RGB; Pillow itself warns from here and refuses from twice this."""

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {  # EXIF orientation -> what turns the picture upright
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}


class BadImage(Exception):  # noqa: N818 - a fact about one file, not a failure of the run
    """One unreadable image; path: what messages call it; reason: why it was refused."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path} ({self.reason})"


def decode(file: bytes | str | Path, name: str = "") -> Image.Image:
    """The RGB image in a file, upright: the first frame, alpha dropped, 16-bit grey scaled to 8 bit.

    Alpha is dropped rather than composited, as torchvision's ImageFolder does. 16-bit colour keeps its high bytes.
    name: what `BadImage.path` says; the path itself when empty.
    Raises BadImage whatever is wrong: an unknown format, more than MAX_PIXELS, truncated or damaged data.
    """
    try:
        return _decode(file)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers raise a dozen kinds on damaged files
        shown = name or ("bytes" if isinstance(file, bytes) else printable(str(file)))
        raise BadImage(shown, _reason(error)) from error


def printable(text: str) -> str:
    """The text with control characters and undecodable bytes escaped, safe in logs and terminals."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _decode(file: bytes | str | Path) -> Image.Image:
    with warnings.catch_warnings():
        # Damaged metadata leaves the pixels whole; too many pixels are refused here, before they are decoded.
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ValueError(f"{width}x{height} pixels are more than {MAX_PIXELS}")
            image.load()
            turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION_TAG, 1))
            rgb = _to_rgb(image)
    return rgb if turn is None else rgb.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image.copy() if image.readonly else image
    if image.mode.startswith("I"):
        return _from_16_bit(image).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no fixed range")
    return image.convert("RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    """65535 becomes 255; Pillow's own conversion clips everything above 255 to white."""
    values = np.asarray(image).astype(np.int64)
    if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
        raise ValueError("32-bit pixels have no fixed range")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"not a readable image of the formats {', '.join(FORMATS)}"
    if isinstance(error, Image.DecompressionBombWarning | Image.DecompressionBombError):
        return f"more than {MAX_PIXELS} pixels"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, struct.error | KeyError | IndexError | TypeError):
        return f"damaged file: {type(error).__name__}: {error}"
    return str(error) or type(error).__name__
