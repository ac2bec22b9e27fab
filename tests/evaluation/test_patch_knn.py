import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fdkit
from fdkit.data.loader import LoaderConfig
from fdkit.data.segmentation import IGNORED, open_segmentation
from fdkit.errors import ConfigError, DataError
from fdkit.evaluation._segmentation import confusion_matrix
from fdkit.evaluation._subject import Extraction, Subject
from fdkit.evaluation.patch_knn import (
    Memory,
    PatchKNNConfig,
    class_shares,
    encode,
    fill_memory,
    measure,
    vote,
)
from fdkit.teachers.loading import load_teacher
from tests.segmentation_folders import write_scenes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes a little larger than the 32 pixels that the demo teacher sees, of patches of 8."""
    return write_scenes(
        tmp_path_factory.mktemp("scenes"), counts={"train": 6, "test": 3}, height=40, width=56
    )


def subject(data: Path, **fields: Any) -> Subject:
    extraction = Extraction(torch.device("cpu"), loader=LoaderConfig(workers=0), **fields)
    return Subject(load_teacher("demo"), str(data), "test", extraction)


def test_shares_are_counted_pixel_by_pixel() -> None:
    masks = torch.randint(0, 3, (2, 7, 11), dtype=torch.uint8)
    masks[torch.rand(2, 7, 11) < 0.3] = IGNORED
    masks[0, :3, :3] = IGNORED
    grid = (3, 4)
    counts = torch.zeros(2, 12, 3)
    for image in range(2):
        for row in range(7):
            for column in range(11):
                label = int(masks[image, row, column])
                if label != IGNORED:
                    counts[image, (row * 3 // 7) * 4 + column * 4 // 11, label] += 1
    expected = counts / counts.sum(dim=2, keepdim=True).clamp_min(1)
    found = class_shares(masks, grid, 3)
    torch.testing.assert_close(found, expected)
    assert found[0, 0].sum() == 0, "a patch without a pixel that counts has no class"


def memory(num_classes: int, *, soft: bool) -> Memory:
    values = torch.nn.functional.normalize(torch.randn(20, 6), dim=1)
    shares = torch.rand(20, num_classes).softmax(dim=1)
    if not soft:
        shares = torch.nn.functional.one_hot(shares.argmax(dim=1), num_classes).float()
    return Memory(values, shares, 20)


@pytest.mark.parametrize("soft", [False, True])
def test_the_vote_is_that_of_a_loop_over_neighbours(soft: bool) -> None:
    held, config = memory(4, soft=soft), PatchKNNConfig(k=5, temperature=0.3)
    maps = 10 * torch.randn(2, 6, 3, 5)  # of any length
    found = vote(maps, held, config)
    assert found.shape == (2, 4, 3, 5)
    for image in range(2):
        for row in range(3):
            for column in range(5):
                query = maps[image, :, row, column].double()
                cosines = [float(query @ one.double() / query.norm()) for one in held.values]
                order = sorted(range(20), key=lambda i: -cosines[i])[:5]
                votes, total = [0.0] * 4, 0.0
                for i in order:
                    weight = math.exp(cosines[i] / 0.3)
                    total += weight
                    for label in range(4):
                        votes[label] += weight * float(held.shares[i, label])
                expected = torch.tensor([one / total for one in votes], dtype=torch.float32)
                torch.testing.assert_close(found[image, :, row, column], expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(2, 3, 5))


def test_a_low_temperature_follows_the_nearest_alone() -> None:
    held = memory(4, soft=False)
    maps = held.values[7][None, :, None, None] * 3
    found = vote(maps, held, PatchKNNConfig(k=20, temperature=1e-4))[0, :, 0, 0]
    torch.testing.assert_close(found, held.shares[7])


def test_the_memory_holds_every_patch_with_a_pixel_that_counts(folder: Path) -> None:
    one, (source,) = subject(folder), open_segmentation(folder, ("train",))
    held = fill_memory(one, source, PatchKNNConfig(k=1), short_side=40)
    # 40 x 56 (or 57) pixels in squares of 32: 2 x 2 squares of 16 patches an image.
    assert len(held.values) == held.num_patches == 6 * 4 * 16
    torch.testing.assert_close(held.values.norm(dim=1), torch.ones(len(held.values)))
    assert set(held.shares.unique().tolist()) == {0.0, 1.0}
    assert (held.shares.sum(dim=1) == 1).all()
    soft = fill_memory(one, source, PatchKNNConfig(k=1, labels="soft"), short_side=40)
    assert torch.equal(soft.shares.argmax(dim=1), held.shares.argmax(dim=1))
    assert ((soft.shares > 0) & (soft.shares < 1)).any()


def test_patches_and_classes_lie_at_the_same_place(folder: Path) -> None:
    """The first square of the first image: its own tokens, and the majority of its own mask."""
    one, (source,) = subject(folder), open_segmentation(folder, ("train",))
    held = fill_memory(one, source, PatchKNNConfig(k=1), short_side=40)
    pixels = source.read_pixels(0)
    square = pixels[:32, :32]
    tokens = encode(one, square[..., :3].permute(2, 0, 1)[None].float() / 255).patches[0]
    torch.testing.assert_close(held.values[:16], torch.nn.functional.normalize(tokens, dim=1))
    for patch in range(16):
        top, left = 8 * (patch // 4), 8 * (patch % 4)
        labels = square[top : top + 8, left : left + 8, 3].flatten()
        counts = torch.bincount(labels[labels != IGNORED], minlength=3)
        assert int(held.shares[patch].argmax()) == int(counts.argmax())


def test_a_small_memory_is_a_random_part_of_the_whole_and_a_function_of_the_seed(folder: Path) -> None:
    one, (source,) = subject(folder), open_segmentation(folder, ("train",))
    whole = fill_memory(one, source, PatchKNNConfig(k=1), short_side=40).values

    def part(**fields: Any) -> tuple[Tensor, list[int]]:
        few = fill_memory(one, source, PatchKNNConfig(k=1, memory_size=50, **fields), short_side=40)
        assert (len(few.values), few.num_patches) == (50, 384)
        return few.values, [int((whole - row).abs().sum(dim=1).argmin()) for row in few.values]

    values, places = part()
    assert torch.equal(values, whole[places])
    assert len({place // 64 for place in places}) == 6, "every image has some"
    again, other = part()[0], part(memory_seed=1)[0]
    assert torch.equal(values, again)
    assert not torch.equal(values, other)


def test_colours_are_found_again(folder: Path) -> None:
    found = measure(subject(folder), PatchKNNConfig(k=5))
    assert found["miou"] > 0.6
    assert found["pixel_accuracy"] > 0.8
    assert found["memory"] == {"size": 192, "patches": 192, "seed": 0}
    assert found["settings"] == {"crop_size": 32, "stride": 21, "short_side": 32}
    assert found["data"]["num_images"] == 3
    assert found["data"]["fingerprint"] != found["data"]["training_fingerprint"]


def test_tested_on_its_own_memory_each_patch_finds_itself(folder: Path) -> None:
    """Squares without overlap but at the ends, and one neighbour: the truth itself, at the resolution of patches."""
    one, (source,) = subject(folder), open_segmentation(folder, ("train",))
    one.split = "train"
    found = measure(one, PatchKNNConfig(k=1, stride=32, short_side=40))
    confusion = torch.zeros(found_classes := len(found["per_class"]), found_classes, dtype=torch.int64)
    for index in range(len(source)):
        mask = source.read_pixels(index)[..., 3].long()
        height, width = mask.shape
        total = torch.zeros(found_classes, height, width)
        for top in (0, height - 32):
            for left in (0, width - 32):
                square = mask[None, top : top + 32, left : left + 32].to(torch.uint8)
                counts = torch.stack([(square == label).float() for label in range(found_classes)], dim=1)
                shares = torch.nn.functional.avg_pool2d(counts, 8)
                winner = torch.nn.functional.one_hot(shares.argmax(dim=1), found_classes).permute(0, 3, 1, 2)
                large = torch.nn.functional.interpolate(winner.float(), size=(32, 32), mode="bilinear")[0]
                total[:, top : top + 32, left : left + 32] += large
        count = torch.zeros(height, width)
        for top in (0, height - 32):
            for left in (0, width - 32):
                count[top : top + 32, left : left + 32] += 1
        confusion += confusion_matrix((total / count).argmax(dim=0), mask, found_classes)
    assert found["confusion"] == confusion.tolist()


def test_several_layers_stand_side_by_side(folder: Path) -> None:
    images = torch.rand(2, 3, 32, 32)
    one = subject(folder, layers=2)
    tokens = one.teacher.encode(images, layer=[-2, -1])
    expected = torch.cat([each.patches for each in tokens], dim=2)
    torch.testing.assert_close(encode(one, images).patches, expected)
    assert encode(subject(folder), images).patches.shape == (2, 16, 64)


def test_from_the_command_line(folder: Path) -> None:
    numbers = fdkit.evaluate("patch-knn", "demo", folder, k=3, labels="soft", device="cpu", memory_size=100)
    assert numbers["evaluator"] == "patch-knn"
    assert 0.3 < numbers["miou"] <= 1
    assert numbers["command"]["labels"] == "soft"
    half = fdkit.evaluate("patch-knn", "demo", folder, k=3, device="cpu", precision="bf16")
    assert half["miou"] > 0.5


def test_what_has_no_effect_or_cannot_be_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pooling cls has no effect on patch-knn"):
        measure(subject(folder, pooling="cls"), PatchKNNConfig())
    with pytest.raises(ConfigError, match="k is 51, but there are only 50 patches"):
        measure(subject(folder), PatchKNNConfig(k=51, memory_size=50))
    with pytest.raises(ConfigError, match="stride 33"):
        measure(subject(folder), PatchKNNConfig(stride=33))
    with pytest.raises(DataError, match="no folder images/"):
        measure(subject(tmp_path), PatchKNNConfig())
