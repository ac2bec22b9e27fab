"""Pictures inside plain numbers: JPEG, or PNG for maps of few pixels, in base64."""

import base64
import io

import numpy as np
from PIL import Image
from torch import Tensor


def image_to_text(image: np.ndarray, *, quality: int = 95) -> str:
    """A picture (H, W, 3) uint8 as base64 of a JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=quality, subsampling=0)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def exact_to_text(image: np.ndarray) -> str:
    """A picture (H, W, 3) uint8 as base64 of a PNG, which keeps every pixel."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def image_from_text(text: str) -> np.ndarray:
    """The picture (H, W, 3) uint8 that `image_to_text` or `exact_to_text` wrote."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB"))


def to_pixels(image: Tensor) -> np.ndarray:
    """(H, W, 3) uint8 of an image (3, H, W) in [0, 1]."""
    pixels: np.ndarray = (255 * image).round().byte().permute(1, 2, 0).cpu().numpy()
    return pixels


def map_to_text(values: np.ndarray) -> str:
    """A table of numbers as base64 of little-endian float16, row-major: 3 digits of each, 2.7 characters."""
    return base64.b64encode(values.astype("<f2").tobytes()).decode("ascii")


def map_from_text(text: str, shape: tuple[int, ...]) -> np.ndarray:
    """The table (float32) of this shape that `map_to_text` wrote."""
    return np.frombuffer(base64.b64decode(text), dtype="<f2").astype(np.float32).reshape(shape)
