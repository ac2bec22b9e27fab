"""A folder of damaged and hostile image files, made anew from a seed, and what each is.

Small pictures of every format and colour mode that is read are saved and then cut, flipped, overwritten, enlarged in
their headers, or put under a wrong name; beside them stand things that are no files and names that are no names.
"""

import io
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

Random = np.random.Generator
EXTENSION = {
    "JPEG": "jpg",
    "PNG": "png",
    "WEBP": "webp",
    "BMP": "bmp",
    "GIF": "gif",
    "TIFF": "tif",
    "PPM": "ppm",
}


class Specimen(NamedTuple):
    """One file of the collection."""

    kind: str
    """What was done to it, such as "cut"."""
    name: bytes
    """Its name inside the folder: any bytes but a slash."""


def whole_files(random: Random) -> dict[str, bytes]:
    """Sound files of every format and mode that is read, by a name such as "PNG of mode LA"."""
    rgb = Image.fromarray(random.integers(0, 256, (23, 31, 3), dtype=np.uint8))
    smooth = rgb.resize((67, 45), Image.Resampling.BICUBIC)
    files = {}
    for kind, picture, mode, options in [
        ("JPEG", smooth, "RGB", {"quality": 90}),
        ("JPEG", smooth, "L", {}),
        ("JPEG", smooth, "CMYK", {}),
        ("PNG", smooth, "RGB", {}),
        ("PNG", smooth, "LA", {}),
        ("PNG", smooth, "RGBA", {}),
        ("PNG", smooth, "P", {"transparency": 3}),
        ("PNG", smooth, "1", {}),
        ("WEBP", smooth, "RGB", {}),
        ("WEBP", smooth, "RGBA", {"lossless": True}),
        ("BMP", rgb, "RGB", {}),
        ("GIF", rgb, "P", {}),
        ("TIFF", rgb, "RGB", {"compression": "tiff_lzw"}),
        ("TIFF", rgb, "CMYK", {}),
        ("PPM", rgb, "RGB", {}),
    ]:
        files[f"{kind} of mode {mode}"] = saved(picture.convert(mode), kind, **options)
    deep = Image.fromarray(random.integers(0, 65536, (19, 21)).astype(np.uint16))
    files["PNG of 16 bit"] = saved(deep, "PNG")
    files["TIFF of 16 bit"] = saved(deep, "TIFF")
    files["progressive JPEG"] = saved(smooth, "JPEG", progressive=True)
    turned = Image.Exif()
    turned[0x0112] = 6
    files["JPEG turned by EXIF"] = saved(smooth, "JPEG", exif=turned)
    moving = {"save_all": True, "append_images": [rgb.rotate(90), rgb.rotate(180)]}
    files["animated GIF"] = saved(rgb, "GIF", **moving)
    files["animated WEBP"] = saved(rgb, "WEBP", **moving)
    files["PNG of one pixel"] = saved(rgb.resize((1, 1)), "PNG")
    files["JPEG 65,000 wide"] = saved(Image.new("RGB", (65000, 2), (9, 99, 200)), "JPEG")
    return files


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    """An image as the bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def extension(name: str) -> str:
    """The file extension of a whole file by its name."""
    return next(ending for kind, ending in EXTENSION.items() if kind in name)


# -- what is done to a file's bytes


def cut(data: bytes, random: Random) -> bytes:
    return data[: int(random.integers(0, len(data)))]


def flip_bits(data: bytes, random: Random) -> bytes:
    array = np.frombuffer(data, np.uint8).copy()
    places = random.integers(0, len(array), int(random.integers(1, 40)))
    array[places] ^= (1 << random.integers(0, 8, len(places))).astype(np.uint8)
    return array.tobytes()


def flip_header(data: bytes, random: Random) -> bytes:
    head = min(64, len(data))
    return flip_bits(data[:head], random) + data[head:]


def overwrite(data: bytes, random: Random) -> bytes:
    start, size = int(random.integers(0, len(data))), int(random.integers(1, 200))
    return data[:start] + random.bytes(min(size, len(data) - start)) + data[start + size :]


def insert(data: bytes, random: Random) -> bytes:
    start = int(random.integers(0, len(data)))
    return data[:start] + random.bytes(int(random.integers(1, 300))) + data[start:]


def repeat(data: bytes, random: Random) -> bytes:
    start = int(random.integers(0, len(data)))
    return (
        data[:start]
        + data[start:][: int(random.integers(1, 500))] * int(random.integers(2, 20))
        + data[start:]
    )


def zero(data: bytes, random: Random) -> bytes:
    start = int(random.integers(0, len(data)))
    return data[:start] + bytes(len(data) - start)


def lie_about_numbers(data: bytes, random: Random) -> bytes:
    """One whole word of the header made huge, as sizes and offsets are."""
    start = int(random.integers(0, max(1, min(200, len(data) - 4))))
    word = random.choice(
        np.array([0xFFFFFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFF0000, 0x00010000, 0], dtype=np.uint32)
    )
    return data[:start] + struct.pack(random.choice(["<I", ">I"]), int(word)) + data[start + 4 :]


MUTATIONS: dict[str, Callable[[bytes, Random], bytes]] = {
    "cut": cut,
    "bits flipped": flip_bits,
    "header flipped": flip_header,
    "overwritten": overwrite,
    "bytes inserted": insert,
    "part repeated": repeat,
    "rest zeroed": zero,
    "lying header": lie_about_numbers,
}


# -- files that were never images, or are more than they say


def png_bomb(width: int, height: int) -> bytes:
    """A PNG whose header promises width x height pixels, and whose data are a few rows of zeros."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(1 + 3 * min(width, 100_000)) * 4)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def real_png_bomb() -> bytes:
    """A PNG of 20,000 x 10,000 black pixels: 200 kB that unpack to 200 MB."""
    packed = zlib.compressobj(9)
    body = b"".join(packed.compress(bytes(20_001)) for _ in range(10_000)) + packed.flush()
    header = struct.pack(">IIBBBBB", 20_000, 10_000, 8, 0, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", body), (b"IEND", b"")]
    chunks = [struct.pack(">I", len(b)) + n + b + struct.pack(">I", zlib.crc32(n + b)) for n, b in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def text_bomb() -> bytes:
    """A PNG with a compressed text chunk that unpacks to 100 MB."""
    body = b"Comment\x00\x00" + zlib.compress(bytes(100_000_000), 9)
    chunk = struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))
    whole = saved(Image.new("RGB", (4, 4)), "PNG")
    return whole[:33] + chunk + whole[33:]


def hostile_files() -> dict[str, tuple[str, bytes]]:
    """Kind -> (extension, bytes) of files made to harm a reader."""
    gif = bytearray(saved(Image.new("P", (4, 4)), "GIF"))
    gif[6:10] = struct.pack("<HH", 65535, 65535)
    bmp = bytearray(saved(Image.new("RGB", (4, 4)), "BMP"))
    bmp[18:26] = struct.pack("<ii", 2**31 - 1, 2**31 - 1)
    return {
        "empty": ("jpg", b""),
        "one byte": ("png", b"\xff"),
        "web page": ("jpg", b"<!doctype html><html><script>alert(1)</script>404 Not Found</html>"),
        "script": ("png", b"#!/bin/sh\ntouch /tmp/owned\n"),
        "SVG": ("png", b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>"),
        "PostScript": (
            "jpg",
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(touch /tmp/owned) system\n",
        ),
        "PDF": ("jpg", b"%PDF-1.7\n1 0 obj<</Type/Catalog>>endobj\n"),
        "pickle": ("png", b"\x80\x04\x95\x20\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x8c\x06system\x93."),
        "bomb of 2 gigapixels": ("png", png_bomb(50_000, 40_000)),
        "bomb under Pillow's own limit": ("png", png_bomb(13_000, 13_000)),
        "bomb of real pixels": ("png", real_png_bomb()),
        "bomb of text": ("png", text_bomb()),
        "GIF with a huge screen": ("gif", bytes(gif)),
        "BMP with huge sides": ("bmp", bytes(bmp)),
        "width without height": ("png", png_bomb(2**31 - 1, 1)),
        "PPM that promises everything": ("ppm", b"P6 99999 99999 255\n" + bytes(100)),
    }


STRANGE_NAMES = (
    b"new\nline.jpg",
    b"<img src=x onerror=alert(1)>.jpg",
    b"\xff\xfe not utf-8.jpg",
    b"\x1b[31mred\x1b[0m.jpg",
    b"{{ 7 * 7 }}.jpg",
    b"quote\"'`$(id).jpg",
    b"..jpg.jpg",
    b" .jpg",
    b"-rf.jpg",
    b"\xe2\x80\xaegnp.jpg",
    b"long" + b"g" * 240 + b".jpg",
)


def things_that_are_no_files(folder: Path) -> Iterator[Specimen]:
    """Directories, links, devices and pipes under the names of images."""
    makers: dict[str, Callable[[Path], object]] = {
        "directory": Path.mkdir,
        "dangling link": lambda path: path.symlink_to("nowhere.jpg"),
        "link to itself": lambda path: path.symlink_to(path.name),
        "link to a device": lambda path: path.symlink_to("/dev/zero"),
        "link to a folder above": lambda path: path.symlink_to(".."),
        "pipe": os.mkfifo,
        "link to a pipe": lambda path: path.symlink_to("a-pipe.jpg"),
    }
    for kind, make in makers.items():
        name = "a-" + kind.replace(" ", "-") + ".jpg"
        make(folder / name)
        yield Specimen(kind, os.fsencode(name))


def make_collection(folder: Path, count: int, seed: int) -> list[Specimen]:
    """Fill a folder with at least `count` specimens, all drawn from the seed."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    whole = whole_files(random)
    specimens = list(things_that_are_no_files(folder))

    def put(kind: str, name: bytes, data: bytes) -> None:
        with open(os.path.join(os.fsencode(folder), name), "wb") as file:
            file.write(data)
        specimens.append(Specimen(kind, name))

    for number, (kind, (ending, data)) in enumerate(hostile_files().items()):
        put(kind, f"hostile-{number:02}.{ending}".encode(), data)
    for kind, data in whole.items():
        put("whole", kind.replace(" ", "-").encode() + b"." + extension(kind).encode(), data)
        other = "png" if extension(kind) != "png" else "jpg"
        put("wrong extension", kind.replace(" ", "-").encode() + b"-as." + other.encode(), data)
    for name in STRANGE_NAMES:
        put("strange name", name, whole["JPEG of mode RGB"])
        put("strange name of a cut file", b"x" + name[-200:], whole["JPEG of mode RGB"][:100])
    names, ways = list(whole), list(MUTATIONS)
    number = 0
    while len(specimens) < count:
        name, way = names[number % len(names)], ways[(number // len(names)) % len(ways)]
        put(
            way,
            f"{number:05}-{way.replace(' ', '-')}.{extension(name)}".encode(),
            MUTATIONS[way](whole[name], random),
        )
        number += 1
    return specimens


# -- the trial

NO_IMAGES = {
    "directory", "dangling link", "link to itself", "link to a device", "link to a folder above", "pipe",
    "link to a pipe", "empty", "one byte", "web page", "script", "SVG", "PostScript", "PDF", "pickle",
    "bomb of 2 gigapixels", "bomb under Pillow's own limit", "bomb of real pixels", "width without height",
    "PPM that promises everything", "BMP with huge sides", "strange name of a cut file",
}  # fmt: skip
"""Kinds of which no specimen can be read."""
IMAGES = {"whole", "wrong extension", "strange name"}
"""Kinds of which each can."""


def try_images(folder: Path, *, amount: int, seed: int) -> dict[str, Any]:
    """At least `amount` broken files listed and read: each an image or refused in words, none left out or taken for
    another; "kinds" counts them by what was done to them."""
    from faults.limits import try_all

    from fdkit.data.decode import BadImage
    from fdkit.data.sources import FolderSource

    specimens = make_collection(folder / "images", amount + 2, seed)  # of which two are hidden by a dot
    source = FolderSource(folder / "images")
    kinds = {one.name: one.kind for one in specimens if not one.name.startswith(b".")}
    listed = {os.fsencode(source._names[index]): index for index in range(len(source))}
    failures = [f"{kinds[name]}: {name!r} is not listed" for name in kinds.keys() - listed.keys()]
    failures += [f"{name!r} is listed and was not made" for name in listed.keys() - kinds.keys()]

    def read(case: tuple[str, int]) -> None:
        kind, index = case
        try:
            image = source.read(index)
        except BadImage as error:
            if kind in IMAGES or not error.path.isprintable() or not error.reason:
                raise AssertionError(f"refused: {error}") from error
            raise
        assert image.mode == "RGB"
        assert kind not in NO_IMAGES, "read as an image"

    inputs = [(f"{kinds[name]}: {name!r}", (kinds[name], index)) for name, index in listed.items()]
    trial = try_all(read, inputs, refusals=(BadImage,), seconds=10, megabytes=700)
    counts: dict[str, int] = {}
    for one in specimens:
        counts[one.kind] = counts.get(one.kind, 0) + 1
    return {
        "tried": trial.tried,
        "read": trial.read,
        "refused": trial.refused,
        "kinds": dict(sorted(counts.items())),
        "failures": failures + trial.failures,
    }
