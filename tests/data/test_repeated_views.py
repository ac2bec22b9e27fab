import numpy as np
import pytest
import torch
from PIL import Image

from fdkit.data.loader import LoaderConfig, training_batches
from fdkit.data.repeated_views import RepeatedViews
from fdkit.data.views import CropConfig, RandomCrop, Views


class _Noise:
    """Thirteen images of random pixels."""

    name, labels, classes, fingerprint = "noise", None, (), "n" * 64

    def __len__(self) -> int:
        return 13

    def read(self, index: int) -> Image.Image:
        pixels = np.random.default_rng(index).integers(0, 256, (17, 23, 3), dtype=np.uint8)
        return Image.fromarray(pixels)

    def describe(self, index: int) -> str:
        return str(index)


def _epochs(views: Views, workers: int, start: int = 0) -> list[dict[int, torch.Tensor]]:
    """The crops of each image in five epochs, in the order they came."""
    found: list[dict[int, torch.Tensor]] = [{} for _ in range(5)]
    batches = training_batches(
        _Noise(), views, LoaderConfig(workers=workers), batch_size=4, seed=3, start_step=start, num_steps=15
    )
    for step, batch in enumerate(batches, start):
        found[step // 3] |= dict(zip(batch.indices.tolist(), batch.crops[0], strict=True))
    return found


@pytest.mark.parametrize("workers", [0, 1])
def test_crops_come_again_after_some_epochs_and_the_order_does_not(workers: int) -> None:
    views = RandomCrop(CropConfig(image_size=8))
    plain, repeated = _epochs(views, 0), _epochs(RepeatedViews(views, 2), workers)
    for epoch, crops in enumerate(repeated):
        assert list(crops) == list(plain[epoch])
        for index, crop in crops.items():
            if index in plain[epoch % 2]:
                assert crop.equal(plain[epoch % 2][index])
            if epoch >= 2 and index in plain[epoch]:
                assert not crop.equal(plain[epoch][index])
    assert list(repeated[0]) != list(repeated[2])


def test_as_many_views_as_epochs_change_nothing() -> None:
    views = RandomCrop(CropConfig(image_size=8))
    for one, other in zip(_epochs(views, 0), _epochs(RepeatedViews(views, 5), 0), strict=True):
        assert all(crop.equal(other[index]) for index, crop in one.items())


def test_another_generator_is_refused() -> None:
    views = RepeatedViews(RandomCrop(CropConfig(image_size=8)), 2)
    with pytest.raises(ValueError, match="not PCG64"):
        views(_Noise().read(0), np.random.default_rng(0))
