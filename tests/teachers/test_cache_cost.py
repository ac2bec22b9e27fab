import pytest

from fdkit.teachers.cache_cost import (
    break_even_read_rate,
    cache_bytes,
    record_bytes,
    share_read,
    speed_up_bound,
    views_filled,
)

IMAGENET = 1_281_167
BASE, LARGE = (197, 768), (257, 1024)
BASE_SECONDS, LARGE_SECONDS = 59e-6, 273e-6
"""What these teachers take for an image at 593 TFLOP/s: 35.1 and 162 GFLOP."""


@pytest.mark.parametrize(
    ("shape", "dtype", "pca", "gigabytes"),
    [
        (BASE, "fp16", None, 388), (LARGE, "fp16", None, 674),
        (BASE, "int8", None, 194), (LARGE, "int8", None, 337),
        (BASE, "int8", 256, 65), (LARGE, "int8", 256, 84),
    ],
)  # fmt: skip
def test_bytes_of_imagenet_are_those_of_the_tokens_and_two_percent(
    shape: tuple[int, int], dtype: str, pca: int | None, gigabytes: float
) -> None:
    size = cache_bytes(IMAGENET, 1, *shape, dtype, pca) / 1e9  # type: ignore[arg-type]
    assert gigabytes == pytest.approx(size, rel=0.02)
    assert cache_bytes(IMAGENET, 10, *shape, dtype, pca) == pytest.approx(10e9 * size)  # type: ignore[arg-type]


def test_a_record_is_its_header_its_numbers_and_a_scale_for_each_int8_vector() -> None:
    assert record_bytes(3, 5, "fp16") == 16 + 3 * 5 * 2
    assert record_bytes(3, 5, "int8") == 16 + 3 * (5 + 4)
    assert record_bytes(3, 5, "int8", pca=2) == 16 + 3 * (2 + 4)
    assert record_bytes(3, 5, "fp16", pca=2) == 16 + 3 * 2 * 2


@pytest.mark.parametrize(
    ("shape", "dtype", "pca", "seconds", "gigabytes_a_second"),
    [
        (BASE, "fp16", None, BASE_SECONDS, 5.1), (BASE, "int8", None, BASE_SECONDS, 2.6),
        (BASE, "int8", 256, BASE_SECONDS, 0.85), (LARGE, "fp16", None, LARGE_SECONDS, 1.9),
        (LARGE, "int8", None, LARGE_SECONDS, 1.0), (LARGE, "int8", 256, LARGE_SECONDS, 0.24),
    ],
)  # fmt: skip
def test_the_disk_must_keep_up_with_the_teacher(
    shape: tuple[int, int], dtype: str, pca: int | None, seconds: float, gigabytes_a_second: float
) -> None:
    rate = break_even_read_rate(record_bytes(*shape, dtype, pca), seconds) / 1e9  # type: ignore[arg-type]
    assert rate == pytest.approx(gigabytes_a_second, rel=0.04)


def test_the_largest_speed_up_is_the_teachers_share_left_out() -> None:
    assert speed_up_bound(300, 1, 0.25, is_complete=True) == pytest.approx(4 / 3)
    assert speed_up_bound(300, 1, 0.162 / 0.302, is_complete=True) == pytest.approx(2.157, abs=1e-3)


def test_the_first_epochs_of_an_empty_cache_save_nothing() -> None:
    assert speed_up_bound(10, 10, 0.5) == 1
    assert speed_up_bound(5, 10, 0.5) == 1
    assert speed_up_bound(20, 10, 0.5) == pytest.approx(20 / (10 + 10 * 0.5))
    assert speed_up_bound(5, 10, 0.5, is_complete=True) == 2
    assert share_read(2.5, 1) == pytest.approx(0.6)
    assert [views_filled(epochs, 10) for epochs in (0.2, 2.5, 10, 300)] == [1, 3, 10, 10]


def test_impossible_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"teacher_share 1\.0 is not in \[0, 1\)"):
        speed_up_bound(10, 1, 1.0)
    with pytest.raises(ValueError, match="teacher_seconds_per_image 0"):
        break_even_read_rate(100, 0)
