"""Training crops a second that one core makes, against torchvision's ImageFolder.

Both make batches of one randomly resized, flipped 224-pixel crop from the same JPEG files, in one process with one
thread, taking turns: ImageFolder decodes and resizes with Pillow and normalises floats; fdkit's loader sends uint8,
decoded by Pillow or, where it is installed, TorchCodec (the same pixels).
The other rows time the ways to make a crop that were weighed for fdkit, with the boxes of one draw.

    python benchmarks/data_path.py --output benchmarks/results/data_path.json
"""

import argparse
import io
import json
import platform
import statistics
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import resized_crop

from fdkit.data.decode import decode, read_pixels
from fdkit.data.loader import LoaderConfig, training_batches
from fdkit.data.sources import FolderSource, ImageSource, open_source
from fdkit.data.views import CropConfig, Pixels, RandomCrop, draw_box

SIZE = 224
BATCH = 32
GOAL = 1.75


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, help="folder of JPEG files; by default 500 x 375 photos are made"
    )
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if arguments.data:
            link_photos(arguments.data, root / "images", arguments.images)
        else:
            make_photos(root / "images", arguments.images)
        report = measure(root, arguments.repeats)
    report["data"] |= {
        "made": arguments.data is None,
        "name": arguments.data.name if arguments.data else "synthetic",
    }
    text = json.dumps(report, indent=2)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")


def make_photos(folder: Path, count: int) -> None:
    """Random regions of scikit-learn's two photos with grain, 500 x 375, quality 90: about 90 kB, as in ImageNet."""
    from sklearn.datasets import load_sample_images

    folder.mkdir(parents=True)
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]  # 427 x 640
    random = np.random.default_rng(0)
    for index in range(count):
        photo = photos[index % 2]
        height = photo.height * random.uniform(0.6, 0.98)
        width = height * 500 / 375
        left, top = random.uniform(0, photo.width - width), random.uniform(0, photo.height - height)
        region = photo.resize(
            (500, 375), Image.Resampling.BICUBIC, box=(left, top, left + width, top + height)
        )
        grain = random.normal(0, 9, (375, 500, 1))
        pixels = (np.asarray(region) + grain).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:04d}.jpg", quality=90)


def link_photos(data: Path, folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    source = FolderSource(data)
    for index in np.linspace(0, len(source) - 1, min(count, len(source))).astype(int):
        path = Path(source.describe(int(index))).resolve()
        (folder / f"{index:08d}{path.suffix}").symlink_to(path)


def measure(root: Path, repeats: int) -> dict:
    source = FolderSource(root)
    paths = [source.describe(index) for index in range(len(source))]
    boxes = [
        draw_box(*decode(path).size, np.random.default_rng(i), min_scale=0.08) for i, path in enumerate(paths)
    ]
    has_torchcodec = find_spec("torchcodec") is not None
    candidates = {
        "ImageFolder": image_folder_epoch(root),
        "fdkit with Pillow": with_pillow(fdkit_epoch(source)),
        "fdkit with Pillow, from a tar": with_pillow(fdkit_epoch(as_tar(root, paths))),
    }
    if has_torchcodec:
        candidates["fdkit with TorchCodec"] = fdkit_epoch(source)
    own = [name for name in candidates if name.startswith("fdkit")]
    candidates |= {
        "decoding only, Pillow": lambda: [decode(path) for path in paths] and None,
        "crop: Pillow decode, torch resize": lambda: each(pillow_torch, paths, boxes),
        "crop: Pillow decode, Pillow resize": lambda: each(pillow_only, paths, boxes),
        "crop: Pillow YCbCr decode and resize, RGB last": lambda: each(pillow_ycbcr, paths, boxes),
    }
    if has_torchcodec:
        candidates["decoding only, TorchCodec"] = lambda: [read_pixels(path) for path in paths] and None
    cpu, wall = take_turns(candidates, repeats)
    return {
        "question": __doc__.splitlines()[0],
        "speedup": {name: speedup(cpu, wall, name) for name in own},
        "goal": GOAL,
        "images_per_cpu_second": {
            name: round(len(paths) / statistics.median(times)) for name, times in cpu.items()
        },
        "cpu_seconds": {name: [round(value, 4) for value in times] for name, times in cpu.items()},
        "mean_difference_of_255_to_pillow": {
            "fdkit with Pillow": round(fidelity(paths, boxes, decode), 4),
            **(
                {"fdkit with TorchCodec": round(fidelity(paths, boxes, read_pixels), 4)}
                if has_torchcodec
                else {}
            ),
        },
        "data": {
            "images": len(paths),
            "mean_bytes": round(statistics.mean(Path(path).stat().st_size for path in paths)),
        },
        "repeats": repeats,
        "batch_size": BATCH,
        "threads": 1,
        "environment": environment(),
    }


def speedup(cpu: dict, wall: dict, name: str) -> dict:
    """Images a second against ImageFolder's in the same round: the median over the rounds, lowest and highest."""
    ratios = [peer / own for peer, own in zip(cpu["ImageFolder"], cpu[name], strict=True)]
    elapsed = [peer / own for peer, own in zip(wall["ImageFolder"], wall[name], strict=True)]
    return {
        "per_cpu_second": round(statistics.median(ratios), 3),
        "lowest_highest": [round(min(ratios), 3), round(max(ratios), 3)],
        "per_second": round(statistics.median(elapsed), 3),
        "goal_reached": statistics.median(ratios) >= GOAL,
    }


def with_pillow(run: Callable[[], None]) -> Callable[[], None]:
    def without_torchcodec() -> None:
        with patch("fdkit.data.decode._torchcodec", lambda: None):
            run()

    return without_torchcodec


def as_tar(root: Path, paths: list[str]) -> ImageSource:
    """The same files as one archive, beside their folder."""
    with tarfile.open(root / "images.tar", "w", dereference=True) as archive:
        for path in paths:
            archive.add(path, Path(path).name)
    return open_source(str(root / "images.tar"))


def image_folder_epoch(root: Path) -> Callable[[], None]:
    steps = [
        transforms.RandomResizedCrop(SIZE),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
    loader = DataLoader(ImageFolder(root, transforms.Compose(steps)), batch_size=BATCH, drop_last=True)
    return lambda: [None for _ in loader] and None


def fdkit_epoch(source: ImageSource) -> Callable[[], None]:
    views = RandomCrop(CropConfig(image_size=SIZE))
    steps = len(source) // BATCH

    def epoch() -> None:
        batches = training_batches(
            source, views, LoaderConfig(workers=0), batch_size=BATCH, seed=0, start_step=0, num_steps=steps
        )
        for _ in batches:
            pass

    return epoch


def take_turns(candidates: dict[str, Callable[[], None]], repeats: int) -> tuple[dict, dict]:
    """CPU and wall seconds of each candidate's passes; all take one untimed pass, then one in every round."""
    cpu: dict[str, list[float]] = {name: [] for name in candidates}
    wall: dict[str, list[float]] = {name: [] for name in candidates}
    for repeat in range(-1, repeats):
        for name, run in candidates.items():
            start, start_cpu = time.perf_counter(), time.process_time()
            run()
            if repeat >= 0:
                cpu[name].append(time.process_time() - start_cpu)
                wall[name].append(time.perf_counter() - start)
    return cpu, wall


def each(crop: Callable, paths: list[str], boxes: list) -> None:
    for path, box in zip(paths, boxes, strict=True):
        crop(path, box)


def pillow_torch(path: str, box: tuple) -> torch.Tensor:
    pixels = torch.from_numpy(np.array(decode(path).crop(box))).permute(2, 0, 1)
    return F.interpolate(pixels[None], (SIZE, SIZE), mode="bilinear", antialias=True)[0]


def pillow_only(path: str, box: tuple) -> torch.Tensor:
    image = decode(path).resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=box)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def pillow_ycbcr(path: str, box: tuple) -> torch.Tensor:
    with Image.open(io.BytesIO(Path(path).read_bytes()), formats=("JPEG",)) as image:
        image.draft("YCbCr", image.size)
        image = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=box).convert("RGB")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def fidelity(paths: list[str], boxes: list, read: Callable[[str], Pixels]) -> float:
    """Mean absolute difference, of 255, between fdkit's crops and Pillow's of the same boxes."""
    views = RandomCrop(CropConfig(image_size=SIZE, flip=False))
    differences = []
    for index, (path, (left, top, right, bottom)) in enumerate(zip(paths, boxes, strict=True)):
        own = views(read(path), np.random.default_rng(index)).crops[0].permute(1, 2, 0).numpy().astype(int)
        peer = resized_crop(decode(path), top, left, bottom - top, right - left, [SIZE, SIZE])
        differences.append(np.abs(own - np.asarray(peer)).mean())
    return float(np.mean(differences))


def environment() -> dict:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown"
    )
    packages = ["torch", "torchvision", "pillow", "numpy", "fdkit"] + ["torchcodec"] * bool(
        find_spec("torchcodec")
    )
    installed = {}
    for package in packages:
        try:
            installed[package] = version(package)
        except ModuleNotFoundError:
            installed[package] = "source tree"
    return {"cpu": model, "platform": platform.platform(), "python": platform.python_version()} | {
        "versions": installed,
        "commit": git("rev-parse", "HEAD"),
        "modified_files": bool(git("status", "--porcelain", "--", "fdkit", "benchmarks")),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def git(*arguments: str) -> str:
    root = Path(__file__).parents[1]
    return subprocess.run(
        ["git", *arguments], cwd=root, capture_output=True, text=True, check=False
    ).stdout.strip()


if __name__ == "__main__":
    main()
