import contextlib
import io
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from fdkit.data import decode as module
from fdkit.data.decode import MAX_PIXELS, BadImage, decode, read_pixels
from fdkit.data.text import printable


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def photo(height: int = 12, width: int = 20, channels: int = 3) -> np.ndarray:
    rows, columns, channel = np.mgrid[:height, :width, :channels]
    return (rows * 9 + columns * 5 + channel * 60).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("format", ["PNG", "WEBP", "BMP", "TIFF", "PPM"])
def test_lossless_formats_come_back_to_the_pixel(format: str) -> None:
    options = {"lossless": True} if format == "WEBP" else {}
    image = decode(encoded(Image.fromarray(photo()), format, **options))
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), photo())


def test_jpeg_equals_pillow() -> None:
    data = encoded(Image.fromarray(photo()), "JPEG", quality=90)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(np.asarray(decode(data)), expected)


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    values = np.array([[0, 128, 129, 257], [32896, 65280, 65406, 65535]], dtype=np.uint16)
    expected = np.array([[0, 0, 1, 1], [128, 254, 254, 255]], dtype=np.uint8)  # values / 257, rounded
    for format in ("PNG", "TIFF"):
        pixels = np.asarray(decode(encoded(Image.fromarray(values), format)))
        np.testing.assert_array_equal(pixels, np.repeat(expected[..., None], 3, axis=2))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_other_modes_become_rgb(mode: str) -> None:
    source = Image.fromarray(photo()).convert(mode)
    image = decode(encoded(source, "TIFF"))
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), np.asarray(source.convert("RGB")))


def test_alpha_is_dropped_not_composited() -> None:
    rgba = np.dstack([photo(), np.zeros((12, 20), np.uint8)])
    np.testing.assert_array_equal(np.asarray(decode(encoded(Image.fromarray(rgba), "PNG"))), photo())


def test_palette_with_transparency_gives_no_warning(recwarn: pytest.WarningsRecorder) -> None:
    source = Image.fromarray(photo()).quantize(8)
    image = decode(encoded(source, "PNG", transparency=bytes([0, 128, 255])))
    np.testing.assert_array_equal(np.asarray(image), np.asarray(source.convert("RGB")))
    assert not recwarn.list


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied(orientation: int, format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(photo()), format, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert expected.size == ((12, 20) if orientation >= 5 else (20, 12))
    np.testing.assert_array_equal(np.asarray(decode(data)), np.asarray(expected))


def test_first_frame_of_an_animation() -> None:
    frames = [Image.fromarray(np.full((5, 7, 3), value, np.uint8)) for value in (200, 10)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.asarray(decode(data)).min() == 200


def test_one_pixel() -> None:
    assert decode(encoded(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG")).getpixel((0, 0)) == (1, 2, 3)


def png_header(width: int, height: int) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"\0")
    chunks = [
        struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in (body, data)
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize("size", [(20000, 10000), (MAX_PIXELS + 1, 1), (10000, 9000)])
def test_decompression_bombs_are_refused_before_decoding(size: tuple[int, int]) -> None:
    with pytest.raises(BadImage, match=f"more than {MAX_PIXELS} pixels"):
        decode(png_header(*size))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
def test_truncated_files_are_refused(format: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), format)
    for length in (0, 5, len(data) // 2):
        with pytest.raises(BadImage):
            decode(data[:length])


def test_random_damage_gives_an_image_or_bad_image() -> None:
    random = np.random.default_rng(0)
    for format in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"):
        data = np.frombuffer(encoded(Image.fromarray(photo()), format), np.uint8)
        for _ in range(60):
            damaged = data.copy()
            damaged[random.integers(0, len(data), 4)] = random.integers(0, 256, 4)
            with contextlib.suppress(BadImage):
                assert decode(damaged.tobytes()).mode == "RGB"


@pytest.mark.parametrize(
    "data", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"8BPS\0\1", b"<svg/>", b"hello", b""]
)
def test_other_formats_are_not_opened(data: bytes) -> None:
    with pytest.raises(BadImage, match="not a readable image of the formats JPEG, PNG"):
        decode(data)


def test_float_pixels_are_refused() -> None:
    with pytest.raises(BadImage, match="floating-point pixels have no fixed range"):
        decode(encoded(Image.fromarray(np.ones((2, 3), np.float32)), "TIFF"))


def test_missing_file_and_folder_name_the_path(tmp_path) -> None:
    with pytest.raises(BadImage, match=r"gone\.jpg \(No such file"):
        decode(tmp_path / "gone.jpg")
    with pytest.raises(BadImage, match="a folder, not a file"):
        decode(tmp_path)


def test_bad_image_carries_path_and_reason() -> None:
    with pytest.raises(BadImage) as caught:
        decode(b"", "a/b.jpg")
    assert caught.value.path == "a/b.jpg"
    assert str(caught.value).startswith("a/b.jpg (not a readable image")


def test_printable_escapes_what_a_terminal_would_obey() -> None:
    assert printable("a\x1b[31mb\n") == "a\\x1b[31mb\\n"
    assert printable(os.fsdecode(b"\xff.jpg")) == "\\udcff.jpg"
    assert printable("müll.jpg") == "müll.jpg"


@pytest.fixture
def no_torchcodec(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_torchcodec", lambda: None)


@pytest.mark.usefixtures("no_torchcodec")
def test_read_pixels_are_those_of_decode(tmp_path) -> None:
    Image.fromarray(photo()).save(tmp_path / "x.jpg")
    assert read_pixels(tmp_path / "x.jpg").tolist() == np.asarray(decode(tmp_path / "x.jpg")).tolist()
    with pytest.raises(BadImage, match="No such file"):
        read_pixels(tmp_path / "gone.jpg")


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 1, "quality": 30}]
)
def test_torchcodec_gives_pillows_pixels(tmp_path, mode: str, options: dict) -> None:
    pytest.importorskip("torchcodec")
    noise = (
        np.random.default_rng(0)
        .integers(0, 256, (6, 8, 3), dtype=np.uint8)
        .repeat(8, 0)
        .repeat(8, 1)[:45, :61]
    )
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(noise).convert(mode).save(tmp_path / "x.jpg", exif=exif, **options)
        np.testing.assert_array_equal(
            read_pixels(tmp_path / "x.jpg").numpy(), np.asarray(decode(tmp_path / "x.jpg"))
        )


def test_torchcodec_and_pillow_refuse_the_same_damaged_files(tmp_path) -> None:
    pytest.importorskip("torchcodec")
    random = np.random.default_rng(0)
    data = np.frombuffer(encoded(Image.fromarray(photo(40, 60)), "JPEG"), np.uint8)
    path = tmp_path / "x.jpg"
    for length in random.integers(0, len(data), 40):
        path.write_bytes(data[:length].tobytes())
        with pytest.raises(BadImage):
            read_pixels(path)


def test_what_reaches_torchcodec(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def refuse(data: torch.Tensor) -> torch.Tensor:
        seen.append(len(data))
        raise RuntimeError("refused")

    monkeypatch.setattr(module, "_torchcodec", lambda: refuse)
    jpeg = encoded(Image.fromarray(photo()), "JPEG")
    path = tmp_path / "x.jpg"
    path.write_bytes(jpeg)
    assert read_pixels(path).tolist() == np.asarray(decode(path)).tolist()  # Pillow has the last word
    assert seen == [len(jpeg)]
    frame = jpeg.index(b"\xff\xc0")
    bomb = jpeg[: frame + 5] + struct.pack(">HH", 20000, 10000) + jpeg[frame + 9 :]
    for other in (
        bomb,
        encoded(Image.fromarray(photo()), "PNG"),
        b"",
        b"\xff\xd8",
        b"\xff\xd8\xff\xe0\0\0" * 9,
    ):
        path.write_bytes(other)
        with contextlib.suppress(BadImage):
            read_pixels(path)
    assert seen == [len(jpeg)]
    path.write_bytes(bomb)
    with pytest.raises(BadImage, match=f"more than {MAX_PIXELS} pixels"):
        read_pixels(path)
