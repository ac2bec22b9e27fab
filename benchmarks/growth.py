"""How start-up, memory and the time of an image grow with the number of images, from a thousand to a million.

Every size is a folder of a thousand class folders and a set of tar shards, both of hard links to a few real JPEG files,
so that a million images need no more disk than a few. Each is opened in a process of its own: the listing, the
fingerprint (every file's size is asked), the growth of resident memory, and the time of an image through the loader.
A second opening finds the shards' index in the cache. Time of an image: rounds over all sizes in turns, CPU seconds.

    python benchmarks/growth.py --output benchmarks/results/growth.json
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from itertools import islice
from pathlib import Path

import torch
from data_path import environment, make_photos

from fdkit.data.loader import LoaderConfig, _TrainingSlots, training_batches
from fdkit.data.sources import open_source
from fdkit.data.views import CropConfig, RandomCrop

PHOTOS = 50
CLASSES = 1000
IMAGES_PER_SHARD = 1000
BATCH = 32
GOAL_SECONDS = 10.0
GOAL_FLATNESS = 1.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, default=192, help="images a round and size")
    parser.add_argument("--folder", type=Path, help="where the links are made; by default a temporary folder")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.open:
        print(json.dumps(opened(arguments.open)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        os.environ["FDKIT_CACHE"] = str(Path(folder) / "cache")
        report = measure(Path(folder), arguments.sizes, arguments.rounds, arguments.images)
    text = json.dumps(report | {"environment": environment()}, indent=2)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")


def measure(root: Path, sizes: list[int], rounds: int, images: int) -> dict:
    make_photos(root / "photos", PHOTOS)
    photos = sorted((root / "photos").iterdir())
    shard = make_shard(root / "shard.tar", photos)
    folders, shards = {}, {}
    opening: dict[str, dict] = {"folder": {}, "shards": {}, "shards, index cached": {}}
    for size in sizes:
        folders[size] = link_images(root / f"folder-{size}", photos, size)
        shards[size] = link_shards(root / f"shards-{size}", shard, size)
        opening["folder"][size] = in_own_process(folders[size])
        opening["shards"][size] = in_own_process(shards[size])
        opening["shards, index cached"][size] = in_own_process(shards[size])
    milliseconds = {
        kind: time_of_an_image(places, rounds, images)
        for kind, places in {"folder": folders, "shards": shards}.items()
    }
    for size in sizes:  # a million links are gone sooner so than one by one at the end
        shutil.rmtree(folders[size])
    largest = max(sizes)
    return {
        "question": __doc__.splitlines()[0],
        "opening": opening,
        "milliseconds_of_an_image": milliseconds,
        "rounds": rounds,
        "images_per_round": images,
        "goals": {
            "start_up_seconds": GOAL_SECONDS,
            "start_up_reached": {
                kind: opening[kind][largest]["list_seconds"] + opening[kind][largest]["fingerprint_seconds"]
                < GOAL_SECONDS
                for kind in ("folder", "shards, index cached")
            },
            "flat_within": GOAL_FLATNESS,
            "flat_reached": {
                kind: max(times["against_the_smallest_in_the_same_round"].values()) <= GOAL_FLATNESS
                for kind, times in milliseconds.items()
            },
        },
    }


def link_images(folder: Path, photos: list[Path], count: int) -> Path:
    classes = min(CLASSES, count)
    for number in range(classes):
        (folder / f"n{number:08d}").mkdir(parents=True)
    for index in range(count):
        name = f"n{index % classes:08d}/n{index % classes:08d}_{index}.jpg"
        os.link(photos[index % len(photos)], folder / name)
    return folder


def make_shard(path: Path, photos: list[Path]) -> Path:
    with tarfile.open(path, "w") as archive:
        for index in range(IMAGES_PER_SHARD):
            archive.add(photos[index % len(photos)], f"n{index % 10:08d}/{index:08d}.jpg")
    return path


def link_shards(folder: Path, shard: Path, count: int) -> Path:
    folder.mkdir()
    for number in range(-(-count // IMAGES_PER_SHARD)):
        os.link(shard, folder / f"shard-{number:05d}.tar")
    return folder


def in_own_process(place: Path) -> dict:
    command = [sys.executable, __file__, "--open", str(place)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def opened(place: Path) -> dict:
    """What opening takes in this process, once everything is imported."""
    before = memory("VmRSS")
    start = time.perf_counter()
    source = open_source(str(place))
    listed = time.perf_counter()
    _ = source.fingerprint
    stamped = time.perf_counter()
    slots = iter(_TrainingSlots(len(source), BATCH, 0, range(1), slice(None)))
    next(slots)
    ordered = time.perf_counter()
    del slots
    return {
        "images": len(source),
        "list_seconds": round(listed - start, 3),
        "fingerprint_seconds": round(stamped - listed, 3),
        "order_of_an_epoch_seconds": round(ordered - stamped, 4),
        "resident_mb_more": round(memory("VmRSS") - before, 1),
        "peak_mb_more": round(memory("VmHWM") - before, 1),
    }


def memory(field: str) -> float:
    """Of this process, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def time_of_an_image(places: dict[int, Path], rounds: int, images: int) -> dict:
    """CPU milliseconds of an image read, decoded and cropped, at each size; all sizes take turns in a round."""
    views = RandomCrop(CropConfig())
    loader = LoaderConfig(workers=0)
    steps = images // BATCH
    sources = {size: open_source(str(place)) for size, place in places.items()}
    batches = {
        size: training_batches(
            source,
            views,
            loader,
            batch_size=BATCH,
            seed=0,
            start_step=0,
            num_steps=(rounds + 1) * steps,
        )
        for size, source in sources.items()
    }
    times: dict[int, list[float]] = {size: [] for size in places}
    for round_number in range(rounds + 1):
        for size in places:
            start = time.process_time()
            for _ in islice(batches[size], steps):
                pass
            if round_number:  # the first draws the epoch's order and warms the caches
                times[size].append(1000 * (time.process_time() - start) / (steps * BATCH))
    smallest = times[min(places)]
    ratios = {
        size: statistics.median(own / first for own, first in zip(values, smallest, strict=True))
        for size, values in times.items()
    }
    return {
        "median": {size: round(statistics.median(values), 4) for size, values in times.items()},
        "against_the_smallest_in_the_same_round": {size: round(ratio, 4) for size, ratio in ratios.items()},
        "all": {size: [round(value, 4) for value in values] for size, values in times.items()},
    }


if __name__ == "__main__":
    main()
