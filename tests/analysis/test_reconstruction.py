"""What a run or an official file of MAE makes of hidden patches: the numbers and the figure."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fdkit.analysis.observe import Images, Observed
from fdkit.analysis.reconstruction import (
    COLUMNS,
    ReconstructionConfig,
    analyze,
    draw,
    panels_of,
    psnr,
    summary,
)
from fdkit.errors import ConfigError, DataError
from fdkit.models.masking import split_patches
from fdkit.models.patches import patchify
from fdkit.teachers.loading import load_teacher
from fdkit.teachers.teacher import Teacher
from tests.saved_mae import SIZE, method, official_file, saved_run


def images(count: int = 5) -> Tensor:
    return torch.rand(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3))


def observed(model: Teacher, count: int = 5, name: str = "one") -> Observed:
    return Observed(name, model, [Images(part) for part in images(count).split(2)])


# --- the numbers


def test_numbers_are_those_of_the_method_itself(tmp_path: Path) -> None:
    made = saved_run(tmp_path, norm_pixels=False)
    config = ReconstructionConfig(num_images=4, num_shown=3, batch_size=2, mask_seed=7)
    numbers = analyze([observed(load_teacher(str(tmp_path)))], config).numbers["models"][0]
    generators = [torch.Generator().manual_seed(7) for _ in range(2)]
    losses, errors = [], []
    for part in images()[:4].split(2):
        noise = torch.rand(2, 16, generator=generators[0])
        losses.append(made.predict(part, noise)["loss"].item())
        guess = made.reconstruct(part, generators[1]).prediction
        for image, split in enumerate(split_patches(noise, 4).hidden):
            difference = patchify((guess - part)[image : image + 1], 16)[0, split]
            errors.append(difference.square().mean().item())
    assert numbers["loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)
    assert numbers["psnr"] == pytest.approx(-10 * math.log10(sum(errors) / 4), rel=1e-5)
    assert (numbers["num_images"], len(numbers["pictures"])) == (4, 3)
    assert (numbers["mask_ratio"], numbers["sampling"], numbers["norm_pixels"]) == (0.75, "random", False)


def test_a_run_and_its_official_file_have_the_same_numbers(tmp_path: Path) -> None:
    made = saved_run(tmp_path)
    path = official_file(tmp_path / "checkpoint-799.pth", made)
    models = [observed(load_teacher(str(tmp_path))), observed(load_teacher(str(path)), name="two")]
    first, second = analyze(models, ReconstructionConfig(targets="normalised")).numbers["models"]
    for own in ("name", "pictures"):
        assert (first.pop(own) == second.pop(own)) == (own == "pictures")
    assert first == pytest.approx(second)


def test_the_mask_is_the_trained_one_unless_another_is_asked_for(tmp_path: Path) -> None:
    saved_run(tmp_path, mask_ratio=0.5, sampling="block")
    teacher = load_teacher(str(tmp_path))
    own = analyze([observed(teacher)], ReconstructionConfig()).numbers["models"][0]
    other = ReconstructionConfig(mask_ratio=0.75, sampling="grid")
    asked = analyze([observed(teacher)], other).numbers["models"][0]
    assert (own["mask_ratio"], own["sampling"]) == (0.5, "block")
    assert (asked["mask_ratio"], asked["sampling"]) == (0.75, "grid")
    with pytest.raises(ConfigError, match=r"a mask ratio of 0\.99 leaves none visible"):
        analyze([observed(teacher)], ReconstructionConfig(mask_ratio=0.99))


def test_a_file_that_does_not_tell_its_targets_is_refused_until_told(tmp_path: Path) -> None:
    teacher = load_teacher(str(official_file(tmp_path / "mae.pth", method())))
    with pytest.raises(ConfigError, match="does not tell whether its decoder predicts normalised pixels"):
        analyze([observed(teacher)], ReconstructionConfig())
    losses = {
        name: analyze([observed(teacher)], ReconstructionConfig(targets=name)).numbers["models"][0]["loss"]  # type: ignore[arg-type]
        for name in ("normalised", "plain")
    }
    assert abs(losses["normalised"] - losses["plain"]) > 1e-3


def test_psnr_by_hand() -> None:
    assert psnr(0.01) == pytest.approx(20)
    assert psnr(1.0) == 0
    assert psnr(0.0) == 100


def test_without_models_or_images_there_is_nothing_to_show(tmp_path: Path) -> None:
    saved_run(tmp_path)
    with pytest.raises(ConfigError, match="needs a model"):
        analyze([], ReconstructionConfig())
    teacher = load_teacher(str(tmp_path))
    with pytest.raises(DataError, match="no images to observe one on"):
        analyze([Observed("one", teacher, [])], ReconstructionConfig())
    with pytest.raises(ConfigError, match="one is an encoder alone"):
        analyze([Observed("one", teacher.backbone, [Images(images())])], ReconstructionConfig())


# --- the figure


def test_panels_hide_fill_in_and_show() -> None:
    made = method(norm_pixels=False)
    result = made.reconstruct(images(2), torch.Generator().manual_seed(0))
    masked, filled, original = panels_of(result, 1)
    hidden = result.is_hidden[1, 0].numpy()
    assert (masked[hidden] == 128).all()
    assert np.array_equal(masked[~hidden], original[~hidden])
    assert np.array_equal(filled[~hidden], original[~hidden])
    assert not np.array_equal(filled[hidden], original[hidden])
    assert np.array_equal(original, (255 * images(2)[1]).round().byte().permute(1, 2, 0).numpy())


def test_the_figure_is_drawn_again_from_the_saved_numbers(tmp_path: Path) -> None:
    saved_run(tmp_path)
    teacher = load_teacher(str(tmp_path))
    analysis = analyze([observed(teacher), observed(teacher, name="two")], ReconstructionConfig())
    numbers = json.loads(json.dumps(analysis.numbers))
    wide, narrow = draw(numbers), draw(numbers, width=3.7)
    assert [len(figure.axes) for figure in (wide, narrow)] == [2, 2]
    for figure, across in ((wide, 2), (narrow, 1)):
        labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
        assert labels == [*COLUMNS] * across
        assert figure.axes[1].get_title(loc="left").replace("\n", " ").startswith("two: 75 % hidden, ")
        assert "true mean and deviation" in figure._supxlabel.get_text().replace("\n", " ")
    shown = wide.axes[0].images[0].get_array()
    assert np.abs(shown[:SIZE, :SIZE].astype(int) - _from_text_again(numbers)).max() == 0


def _from_text_again(numbers: dict[str, Any]) -> np.ndarray:
    import base64
    import io

    from PIL import Image

    text = numbers["models"][0]["pictures"][0]["masked"]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))).astype(int)


def test_a_figure_of_plain_pixels_needs_no_note(tmp_path: Path) -> None:
    saved_run(tmp_path, norm_pixels=False)
    figure = analyze([observed(load_teacher(str(tmp_path)))], ReconstructionConfig()).figure()
    assert figure._supxlabel is None


def test_the_summary_has_a_row_a_model(tmp_path: Path) -> None:
    saved_run(tmp_path)
    title, rows = summary(analyze([observed(load_teacher(str(tmp_path)))], ReconstructionConfig()).numbers)
    assert "PSNR in dB" in title
    assert [len(row) for row in rows] == [5, 5]
    assert rows[1][:2] == ["one", "75 % random"]
