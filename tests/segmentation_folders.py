"""Folders of toy images and masks: coloured rectangles whose class is their colour, with noise."""

from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200]], dtype=np.uint8)
IGNORE = 255


def scene(seed: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """An image (H, W, 3) of class 0 with rectangles of classes 1 and 2, and its mask (H, W); a column is ignored."""
    random = np.random.default_rng(seed)
    mask = np.zeros((height, width), dtype=np.uint8)
    for number in (1, 2):
        top, left = random.integers(0, height // 2), random.integers(0, width // 2)
        mask[top : top + height // 2, left : left + width // 2] = number
    noise = random.integers(-20, 21, (height, width, 3))
    image = np.clip(COLOURS[mask].astype(int) + noise, 0, 255).astype(np.uint8)
    mask[:, -1] = IGNORE
    return image, mask


def write_pair(images: Path, masks: Path, stem: str, image: np.ndarray, mask: Image.Image) -> None:
    for folder in (images, masks):
        (folder / stem).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(images / f"{stem}.png")
    mask.save(masks / f"{stem}.png")


def write_scenes(
    root: Path, *, counts: dict[str, int] | None = None, height: int = 24, width: int = 40
) -> Path:
    """images/SPLIT and masks/SPLIT with this many scenes each, of slightly different widths."""
    for number, (split, count) in enumerate((counts or {"train": 8, "test": 3}).items()):
        for index in range(count):
            image, mask = scene(100 * number + index, height, width + index % 2)
            write_pair(
                root / "images" / split, root / "masks" / split, f"{index:03}", image, Image.fromarray(mask)
            )
    return root
