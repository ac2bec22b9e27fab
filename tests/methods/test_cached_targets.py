from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from fdkit.data.loader import Batch, LoaderConfig, training_batches
from fdkit.data.views import CropConfig, RandomCrop
from fdkit.errors import ConfigError
from fdkit.methods._teacher_cache import CachedTarget, CachedTargets, CachedViews, Form, Places, rows_of
from fdkit.methods.feature_distillation import (
    FeatureDistillation,
    FeatureDistillationConfig,
    compared,
    teacher_says,
)
from fdkit.models.backbone import Backbone
from fdkit.models.libraries import build_timm
from fdkit.models.student import StudentConfig, build_student
from fdkit.teachers.feature_cache import FeatureCache, Layout
from fdkit.teachers.teacher import Teacher

NUM_IMAGES, BATCH = 11, 4
VIEWS = RandomCrop(CropConfig(image_size=32))


class _Pictures:
    """Eleven images of random pixels."""

    name, labels, classes, fingerprint = "pictures", None, (), "p" * 64

    def __len__(self) -> int:
        return NUM_IMAGES

    def read(self, index: int) -> Image.Image:
        pixels = torch.randint(0, 256, (40, 50, 3), generator=torch.Generator().manual_seed(index))
        return Image.fromarray(pixels.to(torch.uint8).numpy())

    def describe(self, index: int) -> str:
        return str(index)


class _Counting(Teacher):
    """A teacher that counts the images it is asked about."""

    num_images = 0

    def encode(self, images: Tensor, **options: Any) -> Any:  # type: ignore[override]
        self.num_images += len(images)
        return super().encode(images, **options)


def _teacher(width: int = 24, **args: Any) -> _Counting:
    torch.manual_seed(width)
    values = {"embed_dim": width, "depth": 2, "num_heads": 3, "img_size": 32, "patch_size": 8}
    backbone = build_timm("vit_tiny_patch16_224", values | args)
    return _Counting(backbone, name=f"tiny{width}")


def _student(teacher: Teacher) -> Backbone:
    return build_student(StudentConfig(drop_path=0), teacher.backbone, image_size=32, seed=1)


def _caches(folder: Path, teachers: list[_Counting], config: FeatureDistillationConfig) -> CachedTargets:
    targets = []
    for number, teacher in enumerate(teachers):
        said = compared(teacher_says(teacher, torch.zeros(1, 3, 32, 32), config), config)
        form = rows_of(said, config.whitening)[1]
        teacher.num_images = 0
        place = folder / str(number)
        place.mkdir(parents=True, exist_ok=True)
        cache = FeatureCache(place, Layout(NUM_IMAGES, form.num_tokens, form.width, "int8"))
        targets.append(CachedTarget(cache, form, config.whitening, None))
    return CachedTargets(targets)


def _cached_method(
    folder: Path, teachers: list[_Counting], num_crops: int = 1, **config: Any
) -> FeatureDistillation:
    fields = FeatureDistillationConfig(**config)
    cached = _caches(folder, teachers, fields)
    views = CachedViews(VIEWS, num_crops, [one.cache for one in cached.each])
    return FeatureDistillation(teachers, _student(teachers[0]), views, fields, cached=cached).train()


def _batches(method: FeatureDistillation, epochs: int = 3, workers: int = 0) -> list[Batch]:
    return list(
        training_batches(
            _Pictures(), method.views, LoaderConfig(workers=workers),
            batch_size=BATCH, seed=3, start_step=0, num_steps=2 * epochs,
        )
    )  # fmt: skip


def _losses(method: FeatureDistillation, batches: list[Batch]) -> list[float]:
    return [method(method.views.finish(b.crops, b.colour), 0.0)["loss"].item() for b in batches]


CHOICES = [
    {}, {"target": "pooled"}, {"layer": 0}, {"layer": 0, "norm": False, "target": "pooled"},
    {"whitening": "batch"}, {"whitening": "l2"}, {"whitening": "none"},
]  # fmt: skip


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_a_cached_loss_is_the_uncached_one_on_the_same_crops_up_to_rounding(
    choice: dict[str, Any], tmp_path: Path
) -> None:
    teacher = _teacher()
    cached = _cached_method(tmp_path, [teacher], **choice)
    plain = FeatureDistillation(
        teacher, _student(teacher), VIEWS, FeatureDistillationConfig(**choice)
    ).train()
    batches = _batches(cached)
    filled = _losses(cached, batches)
    teacher.num_images = 0
    read = _losses(cached, _batches(cached))
    assert teacher.num_images == 0
    assert read == filled
    expected = [plain(VIEWS.finish(b.crops, []), 0.0)["loss"].item() for b in batches]
    torch.testing.assert_close(torch.tensor(filled), torch.tensor(expected), rtol=2e-3, atol=1e-5)
    assert filled != expected  # the student is given what is stored


def test_logits_are_cached_too(tmp_path: Path) -> None:
    teacher = _teacher(num_classes=7)
    method = _cached_method(tmp_path, [teacher], target="logits")
    assert method.cached is not None
    assert method.cached.each[0].form == Form(1, 7, has_class_token=False, grid=None)
    assert _losses(method, _batches(method)) == _losses(method, _batches(method))


def test_the_teacher_is_run_once_for_each_crop(tmp_path: Path) -> None:
    teacher = _teacher()
    method = _cached_method(tmp_path, [teacher], num_crops=2)
    views, seen, counts = method.views, set(), []
    batches = training_batches(
        _Pictures(), views, LoaderConfig(workers=0), batch_size=BATCH, seed=3, start_step=0, num_steps=20
    )
    for step, batch in enumerate(batches):
        keys = {(step // 2 % 2, index) for index in batch.indices.tolist()}
        before = teacher.num_images
        share = float(method(views.finish(batch.crops, batch.colour), 0.0)["teacher_cache_read"])
        assert teacher.num_images - before == len(keys - seen)
        assert share == pytest.approx(1 - len(keys - seen) / BATCH)
        counts.append(len(keys - seen))
        seen |= keys
    assert counts[:4] == [BATCH] * 4
    assert 0 < sum(counts[4:]) <= 2 * NUM_IMAGES - 16


def test_several_teachers_have_a_cache_each(tmp_path: Path) -> None:
    teachers = [_teacher(24), _teacher(36)]
    method = _cached_method(tmp_path, teachers, teacher_weights=(2, 1))
    plain = FeatureDistillation(
        teachers, _student(teachers[0]), VIEWS, FeatureDistillationConfig(teacher_weights=(2, 1))
    )
    batch = _batches(method)[0]
    for _ in range(2):
        found = method(method.views.finish(batch.crops, batch.colour), 0.0)
        expected = plain.train()(VIEWS.finish(batch.crops, []), 0.0)
        for name in ("loss", "loss/tiny24", "loss/tiny36"):
            assert found[name].item() == pytest.approx(expected[name].item(), rel=2e-3)
        batch = _batches(method)[0]
    assert float(found["teacher_cache_read"]) == 1


def test_parts_of_a_batch_and_records_that_came_since_make_no_difference(tmp_path: Path) -> None:
    """As with accumulation, and workers that read ahead of what is being filled."""
    teacher = _teacher()
    method = _cached_method(tmp_path, [teacher])
    batch = _batches(method)[0]
    whole = method.views.finish(batch.crops, batch.colour)
    parts = list(zip(*(view.chunk(2) for view in whole), strict=True))
    losses = [method(list(part), 0.0)["loss"].item() for part in parts]
    assert teacher.num_images == BATCH
    loss = method(whole, 0.0)["loss"].item()  # the batch still says that nothing was found
    assert teacher.num_images == BATCH
    assert loss == pytest.approx(sum(losses) / 2, rel=1e-6)


def test_workers_read_what_this_process_wrote(tmp_path: Path) -> None:
    teacher = _teacher()
    method = _cached_method(tmp_path, [teacher])
    filled = _losses(method, _batches(method))
    teacher.num_images = 0
    assert _losses(method, _batches(method, workers=1)) == filled
    assert teacher.num_images == 0


def test_a_damaged_record_is_computed_again_and_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    teacher = _teacher()
    method = _cached_method(tmp_path, [teacher])
    filled = _losses(method, _batches(method))
    path = next(tmp_path.glob("*/records-*"))
    content = bytearray(path.read_bytes())
    for image in range(NUM_IMAGES):
        content[image * len(content) // NUM_IMAGES + 100] ^= 4
    path.write_bytes(content)
    caplog.clear()
    teacher.num_images = 0
    again = _losses(method, _batches(method))
    assert 1 < teacher.num_images <= NUM_IMAGES
    assert again == pytest.approx(filled, rel=1e-5)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1
    assert "is damaged; computed again" in lines[0]


def test_a_record_of_other_pixels_is_not_believed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as those of another decoder, or of an image that was changed in place."""
    teacher = _teacher()
    method = _cached_method(tmp_path, [teacher])
    _losses(method, _batches(method))
    read: Callable[[Any, int], Image.Image] = _Pictures.read
    monkeypatch.setattr(_Pictures, "read", lambda self, index: read(self, index).rotate(180))
    teacher.num_images = 0
    batches = _batches(method)
    losses = _losses(method, batches)
    plain = FeatureDistillation(teacher, _student(teacher), VIEWS, FeatureDistillationConfig()).train()
    expected = [plain(VIEWS.finish(b.crops, []), 0.0)["loss"].item() for b in batches]
    assert losses == pytest.approx(expected, rel=2e-3)
    assert sum("is of other pixels" in record.getMessage() for record in caplog.records) == 1


def test_a_student_without_a_class_token_reads_the_same_cache(tmp_path: Path) -> None:
    teacher = _teacher()
    batches = _batches(first := _cached_method(tmp_path, [teacher]))
    _losses(first, batches)
    torch.manual_seed(0)
    args = {"embed_dim": 12, "depth": 1, "num_heads": 3, "img_size": 32, "patch_size": 16}
    bare = build_timm("vit_tiny_patch16_224", {**args, "class_token": False, "global_pool": "avg"})
    method = _cached_method(tmp_path, [teacher])
    config = FeatureDistillationConfig()
    method = FeatureDistillation([teacher], bare, method.views, config, cached=method.cached).train()
    plain = FeatureDistillation(teacher, bare, VIEWS, config).train()
    batch = _batches(method)[0]
    found = method(method.views.finish(batch.crops, batch.colour), 0.0)["loss"].item()
    assert teacher.num_images == 0
    assert found == pytest.approx(plain(VIEWS.finish(batch.crops, []), 0.0)["loss"].item(), rel=2e-3)


def test_teachers_stay_where_they_are_until_they_are_needed(tmp_path: Path) -> None:
    teacher = _teacher()
    method = _cached_method(tmp_path, [teacher]).to("meta")
    assert next(method.student.parameters()).device.type == "meta"
    assert next(teacher.backbone.parameters()).device.type == "cpu"
    assert method.teachers == (teacher,)


def test_a_target_that_is_drawn_anew_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"teacher_drop_path 0\.1 makes another target each time"):
        _cached_method(tmp_path, [_teacher()], teacher_drop_path=0.1)


def test_places_go_in_the_parts_that_tensors_go_in() -> None:
    rows = torch.arange(20).view(5, 4)
    for parts in (1, 2, 3):
        assert all(
            place.rows.equal(part)
            for place, part in zip(Places(rows).chunk(parts), rows.chunk(parts), strict=True)
        )
    assert Places(rows).crops()[1] == (4, 5, 6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="looks for waits of the host for a GPU")
def test_reading_makes_the_host_wait_for_nothing(tmp_path: Path) -> None:
    teacher = _teacher()
    method = _cached_method(tmp_path, [teacher]).to("cuda")
    for number in range(2):
        batch = _batches(method)[0]
        crops = [crop.pin_memory().to("cuda", non_blocking=True) for crop in batch.crops]
        colour = [
            drawn if drawn.dtype == torch.int64 else drawn.pin_memory().to("cuda", non_blocking=True)
            for drawn in batch.colour
        ]
        torch.cuda.set_sync_debug_mode("error" if number else "default")
        try:
            found = method(method.views.finish(crops, colour), 0.0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert found["teacher_cache_read"].item() == 1
