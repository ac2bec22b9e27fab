"""One guarded way from a file or its bytes to 8-bit RGB pixels; the files come from anywhere."""

import contextlib
import io
import logging
import os
import stat
import struct
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from PIL.Image import Transpose
from torch import Tensor

from fdkit.data.patience import LostData, read_patiently
from fdkit.data.text import printable
from fdkit.errors import ConfigError

log = logging.getLogger("fdkit")

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""What Pillow may open; its other readers (EPS, PSD, ...) never see the file."""
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
MAX_PIXELS = 89_478_485
"""The largest image decoded: 256 MiB of RGB; Pillow itself warns from here and refuses from twice this."""
MAX_FILE_BYTES = 2**29
"""The largest file read: twice the bytes of the largest image's pixels, which no sound file of these formats has."""

Decoder = Literal["auto", "pillow", "torchcodec"]

_asked: ContextVar[Decoder] = ContextVar("decoder", default="auto")

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
    Raises BadImage whatever is wrong: an unknown format, more than MAX_PIXELS, truncated or damaged data; LostData if
    the file's folder went away and did not come back.
    """
    try:
        return _decode(file if isinstance(file, bytes) else bytes_of(file))
    except (MemoryError, LostData):
        raise
    except Exception as error:  # Pillow's readers raise a dozen kinds on damaged files
        shown = name or ("bytes" if isinstance(file, bytes) else printable(str(file)))
        raise BadImage(shown, _reason(error)) from error


def read_pixels(file: bytes | str | Path, name: str = "") -> Tensor:
    """uint8 (H, W, 3): the pixels of `decode`, for JPEG from TorchCodec where that is installed.

    It gives the same pixels, to the bit, in three quarters of the time. Whatever it refuses goes to Pillow, so which
    files are readable does not depend on it. name, and BadImage: as in `decode`.
    """
    decode_jpeg = None if _asked.get() == "pillow" else _torchcodec()
    if decode_jpeg is not None:
        with contextlib.suppress(OSError, RuntimeError):
            if not isinstance(file, bytes):
                name, file = name or printable(str(file)), bytes_of(file)
            # A bytearray, because PyTorch wants memory that could be written to.
            data = np.frombuffer(bytearray(file), np.uint8)
            if 0 < _jpeg_area(data) <= MAX_PIXELS:
                return decode_jpeg(torch.from_numpy(data)).permute(1, 2, 0)
    return torch.from_numpy(np.array(decode(file, name)))


def bytes_of(path: str | Path) -> bytes:
    """The content of a regular file, read patiently.

    A pipe would be waited for, and a device may do anything when it is opened, so what is there is asked first.
    Raises OSError for a folder, pipe, device or socket, for more than MAX_FILE_BYTES, and where it cannot be read;
    LostData if its folder went away.
    """
    return read_patiently(_bytes_now, Path(path))


def _bytes_now(path: Path) -> bytes:
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, socket or device"
        raise OSError(f"{kind}, not a file")
    with open(path, "rb", opener=_open_at_once) as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise OSError(f"{status.st_size:,} bytes are more than {MAX_FILE_BYTES:,}")
    return data


def _open_at_once(path: str, flags: int) -> int:
    """Opened without waiting, should the file have become a pipe since it was asked for."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def has_torchcodec() -> bool:
    """Whether TorchCodec is installed and can be loaded."""
    return _torchcodec() is not None


def decoder_for(asked: Decoder) -> Literal["pillow", "torchcodec"]:
    """What decodes JPEG files if this is asked for. Raises ConfigError if it is not there."""
    if asked == "auto":
        return "torchcodec" if has_torchcodec() else "pillow"
    if asked == "torchcodec" and not has_torchcodec():
        raise ConfigError(
            "--loader.decoder torchcodec: TorchCodec is not installed or cannot be loaded",
            "pip install torchcodec, or use --loader.decoder auto",
        )
    return asked


@contextlib.contextmanager
def decoding_with(asked: Decoder) -> Iterator[None]:
    """Inside, `read_pixels` decodes JPEG files with this."""
    before = _asked.set(asked)
    try:
        yield
    finally:
        _asked.reset(before)


def _decode(data: bytes) -> Image.Image:
    with warnings.catch_warnings():
        # Damaged metadata leaves the pixels whole; too many pixels are refused here, before they are decoded.
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
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


def _jpeg_area(data: np.ndarray) -> int:
    """Height times width by the frame header of a JPEG file; 0 if it is no JPEG or laid out in an unusual way."""
    head = data[:65536].tobytes()  # the header comes after metadata, most often within the first kilobytes
    if not head.startswith(b"\xff\xd8"):
        return 0
    start = 2
    while start + 9 <= len(head) and head[start] == 0xFF:
        marker = head[start + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", head, start + 5)
            return int(height * width)
        start += 2 + int.from_bytes(head[start + 2 : start + 4])
    return 0


@cache
def _torchcodec() -> Callable[[Tensor], Tensor] | None:
    """TorchCodec's JPEG decoder; None where it is not installed or cannot be loaded."""
    if find_spec("torchcodec") is None:
        return None
    try:
        decode_jpeg: Callable[[Tensor], Tensor] = import_module("torchcodec.decoders").decode_jpeg
    except (ImportError, OSError, RuntimeError) as error:
        log.warning("TorchCodec cannot be loaded, so Pillow decodes JPEG files, more slowly: %s", error)
        return None
    return decode_jpeg
