"""Images a second that one core turns into two training views, against MoCo v3's pipeline of Pillow images.

Both start from the same JPEG files, in one process with one thread, taking turns. The peer is the published
augmentation of MoCo v3 (BYOL's) written with torchvision: the whole of it runs in the loader's workers, twice an
image, on Pillow images. fdkit's workers read and decode once, cut and resize two uint8 crops, draw the colour
parameters and collate; colour, blur and solarisation are the device's, as batched operations. Rows of their own show
that part on the CPU, and both together: what a run without an accelerator pays.

    python benchmarks/two_view_path.py --data PHOTOS --output benchmarks/results/two_view_path.json
"""

import argparse
import json
import random
import statistics
import tempfile
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from data_path import environment, link_photos, make_photos, take_turns
from PIL import Image, ImageFilter, ImageOps
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from fdkit.data.decode import decode
from fdkit.data.loader import Batch, LoaderConfig, training_batches
from fdkit.data.sources import FolderSource
from fdkit.data.views import TwoViews, TwoViewsConfig

SIZE = 224
BATCH = 32
GOAL = 5.0
PEER = "MoCo v3 with Pillow"
BOTH = "both parts on the CPU, with Pillow"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, help="folder of JPEG files, measured besides the photos made here"
    )
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    report = {"question": __doc__.splitlines()[0], "goal": GOAL, "photos": {}}
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "made"
        make_photos(made / "images", arguments.images)
        report["photos"]["made"] = measure(made, arguments.repeats)
        if arguments.data:
            linked = Path(folder) / "linked"
            link_photos(arguments.data, linked / "images", arguments.images)
            report["photos"]["/".join(arguments.data.parts[-2:])] = measure(linked, arguments.repeats)
    report |= {"repeats": arguments.repeats, "batch_size": BATCH, "image_size": SIZE, "threads": 1}
    report["environment"] = environment()
    text = json.dumps(report, indent=2)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")


def measure(root: Path, repeats: int) -> dict:
    """Every candidate on the images of one folder: medians over the rounds, and ratios within a round."""
    source = FolderSource(root)
    paths = [source.describe(index) for index in range(len(source))]
    views = TwoViews(TwoViewsConfig(image_size=SIZE))
    steps = len(source) // BATCH
    batches = list(worker_batches(source, views, steps))

    def work() -> None:
        for _ in worker_batches(source, views, steps):
            pass

    def finish() -> None:
        for batch in batches:
            views.finish(batch.crops, batch.colour)

    def work_and_finish() -> None:
        for batch in worker_batches(source, views, steps):
            views.finish(batch.crops, batch.colour)

    candidates: dict[str, Callable[[], None]] = {
        PEER: mocov3_epoch(root),
        "fdkit's workers with Pillow": with_decoder(None, work),
        **{
            f"fdkit's workers with {name}": with_decoder(fast, work) for name, fast in fast_decoders().items()
        },
        "the device's part, on the CPU": finish,
        BOTH: with_decoder(None, work_and_finish),
        "decoding only, Pillow": lambda: [decode(path) for path in paths] and None,
    }
    cpu, _ = take_turns(candidates, repeats)
    num_images = {name: len(paths) if name.startswith("decoding") else steps * BATCH for name in candidates}
    return {
        "images": len(paths),
        "mean_bytes": round(statistics.mean(Path(path).stat().st_size for path in paths)),
        "median_size": np.median([Image.open(path).size for path in paths], axis=0).tolist(),
        "speedup": {name: speedup(cpu, name) for name in candidates if name.startswith("fdkit")},
        "speedup_without_a_device": speedup(cpu, BOTH)["per_cpu_second"],
        "images_per_cpu_second": {
            name: round(num_images[name] / statistics.median(times), 1) for name, times in cpu.items()
        },
        "cpu_seconds": {name: [round(value, 4) for value in times] for name, times in cpu.items()},
    }


def fast_decoders() -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """TorchCodec's JPEG decoder; where it is not installed, torchvision's, which it supersedes, to stand in for it."""
    if find_spec("torchcodec"):
        return {"TorchCodec": import_module("torchcodec.decoders").decode_jpeg}
    if hasattr(torch.ops.image, "decode_jpeg"):
        return {"torchvision's JPEG decoder": lambda data: torch.ops.image.decode_jpeg(data, 3, False)}
    return {}


def with_decoder(decoder: Callable | None, run: Callable[[], None]) -> Callable[[], None]:
    """The run with this decoder of JPEG files; None for Pillow."""

    def decoded() -> None:
        with patch("fdkit.data.decode._torchcodec", lambda: decoder):
            run()

    return decoded


def speedup(cpu: dict[str, list[float]], name: str) -> dict:
    """Images a CPU second against the peer's in the same round: the median over the rounds, lowest and highest."""
    ratios = [peer / own for peer, own in zip(cpu[PEER], cpu[name], strict=True)]
    return {
        "per_cpu_second": round(statistics.median(ratios), 3),
        "lowest_highest": [round(min(ratios), 3), round(max(ratios), 3)],
        "goal_reached": statistics.median(ratios) >= GOAL,
    }


def worker_batches(source: FolderSource, views: TwoViews, steps: int) -> Iterator[Batch]:
    loader = LoaderConfig(workers=0)
    return training_batches(source, views, loader, batch_size=BATCH, seed=0, start_step=0, num_steps=steps)


def pillow_blur(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))


def mocov3_view(*, blur: float, solarize: float) -> Callable:
    """Source: facebookresearch/moco-v3@c349e6e main_moco.py, augmentations 1 and 2."""
    steps = [
        transforms.RandomResizedCrop(SIZE, scale=(0.08, 1.0)),
        transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
        transforms.RandomGrayscale(p=0.2),
        transforms.RandomApply([pillow_blur], p=blur),
    ]
    if solarize:
        steps.append(transforms.RandomApply([ImageOps.solarize], p=solarize))
    steps += [
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
    return transforms.Compose(steps)


def mocov3_epoch(root: Path) -> Callable[[], None]:
    first, second = mocov3_view(blur=1.0, solarize=0.0), mocov3_view(blur=0.1, solarize=0.2)
    images = ImageFolder(root, lambda image: [first(image), second(image)])
    loader = DataLoader(images, batch_size=BATCH, drop_last=True)
    return lambda: [None for _ in loader] and None


if __name__ == "__main__":
    main()
