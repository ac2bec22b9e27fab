"""Pictures inside plain numbers: JPEG in base64."""

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


def image_from_text(text: str) -> np.ndarray:
    """The picture (H, W, 3) uint8 that `image_to_text` wrote."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB"))


def to_pixels(image: Tensor) -> np.ndarray:
    """(H, W, 3) uint8 of an image (3, H, W) in [0, 1]."""
    pixels: np.ndarray = (255 * image).round().byte().permute(1, 2, 0).cpu().numpy()
    return pixels
