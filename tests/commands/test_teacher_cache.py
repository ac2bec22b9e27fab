import json
import logging
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fdkit.commands import _teacher_cache
from fdkit.commands._flags import parse_flags
from fdkit.commands.distill import DistillConfig, distill
from fdkit.config import parse_yaml, to_yaml, validate
from fdkit.errors import ConfigError, DataError, FdkitError, OutputError, ResourceError
from fdkit.models.libraries import build_timm, save_backbone
from fdkit.teachers.teacher import Teacher
from tests.training.training_toys import exit_codes, final_weights, same_bits, start, start_ranks

NUM_IMAGES = 13


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirteen pictures of random pixels."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(NUM_IMAGES):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
    return folder


def _save_teacher(folder: Path, width: int, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    args = {"embed_dim": width, "depth": 2, "num_heads": 3, "img_size": 32, "patch_size": 8}
    save_backbone(build_timm("vit_tiny_patch16_224", args), folder)
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder that holds a tiny network."""
    return _save_teacher(tmp_path_factory.mktemp("teachers") / "first", 24)


def _run(teacher: Any, photos: Path, output: Path, cache: Any, **changes: Any) -> Path:
    """Four epochs of three steps, with two crops an image: the first six steps fill most of the cache."""
    values: dict[str, Any] = {
        "views": {"image_size": 32},
        "train": {"batch_size": 4, "epochs": 4, "log_every_steps": 1, "save_every_steps": 2,
                  "precision": "fp32", "keep_checkpoints": 20},
        "optim": {"warmup_epochs": 1},
        "loader": {"workers": 0},
        "monitor": {"collapse_every_epochs": 0},
    }  # fmt: skip
    for name, change in changes.items():
        values[name] = values.get(name, {}) | change if isinstance(change, dict) else change
    if isinstance(cache, Path):
        cache = {"folder": str(cache), "views": 2}
    return distill(teacher, photos, output=output, teacher_cache=cache, **values)


def _metrics(run: Path, name: str) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if "loss" in row]


@pytest.fixture(scope="module")
def filled(teacher: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run, and of the cache it filled."""
    folder = tmp_path_factory.mktemp("filled")
    _run(teacher, photos, folder / "run", folder / "cache", monitor={"collapse_every_epochs": 1})
    return folder


def test_a_run_that_reads_equals_the_one_that_filled_and_never_runs_the_teacher(
    teacher: Path, photos: Path, filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    encode = Teacher.encode

    def counting(self: Teacher, images: torch.Tensor, **options: Any) -> Any:
        asked.append(len(images))
        return encode(self, images, **options)

    monkeypatch.setattr(Teacher, "encode", counting)
    again = _run(teacher, photos, tmp_path / "run", filled / "cache")
    assert asked == []
    assert same_bits(final_weights(again), final_weights(filled / "run"))
    assert _metrics(again, "loss") == _metrics(filled / "run", "loss")
    assert _metrics(again, "teacher_cache_read") == [1.0] * 12
    assert _metrics(filled / "run", "teacher_cache_read")[:6] == [0.0] * 6
    assert min(_metrics(filled / "run", "teacher_cache_read")[6:]) >= 0.5


def test_it_differs_from_a_run_without_a_cache_only_once_crops_come_again(
    teacher: Path, photos: Path, filled: Path, tmp_path: Path
) -> None:
    plain = _run(teacher, photos, tmp_path / "run", {})
    losses, cached = _metrics(plain, "loss"), _metrics(filled / "run", "loss")
    assert cached[:6] == pytest.approx(losses[:6], rel=1e-3)
    assert cached[:6] != losses[:6]
    assert cached[6:] != pytest.approx(losses[6:], rel=1e-3)
    assert "teacher_cache" not in json.loads((plain / "run.json").read_text())


def test_the_record_says_where_how_and_how_exact(filled: Path) -> None:
    (facts,) = json.loads((filled / "run" / "run.json").read_text())["teacher_cache"]
    assert facts["folder"] == str(filled / "cache")
    assert facts["variety"] == "2 crops an image over 4 epochs"
    assert facts["gigabytes"] == pytest.approx(NUM_IMAGES * 2 * (16 + 17 * (24 + 4)) / 1e9)
    assert facts["stored"]["cosine"] > 0.9999
    assert 0.001 < facts["stored"]["relative"] < 0.01
    assert facts["stored"]["measured_on_images"] == NUM_IMAGES
    assert "views: 2" in (filled / "run" / "MODEL_CARD.md").read_text()


def test_other_students_and_more_views_share_the_cache(
    teacher: Path, photos: Path, filled: Path, tmp_path: Path
) -> None:
    shutil.copytree(filled / "cache", tmp_path / "cache")
    cache = {"folder": str(tmp_path / "cache"), "views": 3}
    run = _run(teacher, photos, tmp_path / "run", cache, student={"depth": 1, "position": "absolute"})
    read = _metrics(run, "teacher_cache_read")
    assert read[:6] == [1.0] * 6
    assert read[6:9] == [0.0] * 3
    assert min(read[9:]) >= 0.5


def _run_and_die(*arguments: Any, writes: int) -> None:
    left, write = [writes], os.pwrite

    def dying(*call: Any) -> int:
        left[0] -= 1
        if left[0] < 0:
            os._exit(42)
        return write(*call)

    os.pwrite = dying  # type: ignore[assignment]
    _run(*arguments)


@pytest.mark.parametrize(
    "writes", [29, 37]
)  # inside the contents, and inside the headers, of the fourth or fifth batch
def test_a_run_killed_while_it_writes_goes_on_to_the_same_bits(
    writes: int, teacher: Path, photos: Path, filled: Path, tmp_path: Path
) -> None:
    arguments = (teacher, photos, tmp_path / "run", tmp_path / "cache")
    process = start(lambda: _run_and_die(*arguments, writes=writes))
    assert exit_codes([process]) == [42]
    assert (tmp_path / "run" / "checkpoints").is_dir()
    run = _run(*arguments, resume=True)
    assert same_bits(final_weights(run), final_weights(filled / "run"))
    again = _run(teacher, photos, tmp_path / "again", tmp_path / "cache")
    assert same_bits(final_weights(again), final_weights(filled / "run"))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"seed": 1}, ConfigError, "crops.seed: 0 in the cache, 1 in this run"),
        ({"views": {"min_scale": 0.3}}, ConfigError, r"crops.min_scale: 0.08 in the cache, 0.3 in this run"),
        ({"views": {"image_size": 48}}, ConfigError, "crops.image_size: 32 in the cache, 48 in this run"),
        ({"distillation": {"target": "pooled"}}, ConfigError, "target: feature_map in the cache, pooled in"),
        ({"distillation": {"whitening": "l2"}}, ConfigError, "whitening: layernorm in the cache, l2 in this"),
        ({"distillation": {"layer": 0}}, ConfigError, "distillation.layer: None in the cache, 0 in this run"),
        ({"teacher_precision": "bf16"}, ConfigError, "teacher.precision: float32 in the cache, bfloat16 in"),
        ({"train": {"precision": "bf16"}}, ConfigError, "teacher.autocast: none in the cache, bf16 in this"),
        ({"image_size": 64}, ConfigError, r"teacher.image_size: 32 in the cache, 64 in this run"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_a_cache_of_something_else_is_refused_naming_both_values(
    changes: dict[str, Any],
    error: type[FdkitError],
    message: str,
    teacher: Path,
    photos: Path,
    filled: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=message) as caught:
        _run(teacher, photos, tmp_path / "run", filled / "cache", **changes)
    assert "--teacher-cache auto" in caught.value.hint


def test_a_cache_of_another_teacher_or_of_other_images_is_refused(
    teacher: Path, photos: Path, filled: Path, tmp_path: Path
) -> None:
    other = _save_teacher(tmp_path / "other", 24, seed=1)
    with pytest.raises(
        ConfigError, match=rf"teacher.weights: {teacher} \(\w+\) in the cache, {other} \(\w+\) in"
    ):
        _run(other, photos, tmp_path / "run", filled / "cache")
    fewer = tmp_path / "fewer"
    shutil.copytree(photos, fewer)
    (fewer / "12.png").unlink()
    with pytest.raises(
        DataError, match=r"(?s)images.content: .*images.number: 13 in the cache, 12 in this run"
    ):
        _run(teacher, fewer, tmp_path / "run2", filled / "cache")
    for dtype, pca in (("fp16", None), ("int8", 5)):
        cache = {"folder": str(filled / "cache"), "views": 2, "dtype": dtype, "pca": pca}
        with pytest.raises(
            ConfigError, match="dtype: int8 in" if dtype == "fp16" else "pca: None in the cache, 5"
        ):
            _run(teacher, photos, tmp_path / f"{dtype}", cache)


def test_the_same_weights_under_another_name_are_the_same_teacher(
    teacher: Path, photos: Path, filled: Path, tmp_path: Path
) -> None:
    renamed = tmp_path / "renamed"
    shutil.copytree(teacher, renamed)
    run = _run(renamed, photos, tmp_path / "run", filled / "cache")
    assert _metrics(run, "teacher_cache_read") == [1.0] * 12


def test_auto_finds_the_cache_that_fits(
    teacher: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FDKIT_CACHE", str(tmp_path / "kept"))
    cache = {"folder": "auto", "views": 2}
    shares = [
        _metrics(_run(teacher, photos, tmp_path / str(number), cache, seed=seed), "teacher_cache_read")[0]
        for number, seed in enumerate((0, 0, 1))
    ]
    assert shares == [0.0, 1.0, 0.0]
    assert len(list((tmp_path / "kept" / "teacher-features").iterdir())) == 2


def test_components_are_fitted_once_and_their_loss_is_stated(
    teacher: Path, photos: Path, filled: Path, tmp_path: Path
) -> None:
    cache = {"folder": str(tmp_path / "cache"), "views": 2, "pca": 8}
    runs = [_run(teacher, photos, tmp_path / name, cache) for name in "ab"]
    assert same_bits(*(final_weights(run) for run in runs))
    (facts,) = json.loads((runs[1] / "run.json").read_text())["teacher_cache"]
    (whole,) = json.loads((filled / "run" / "run.json").read_text())["teacher_cache"]
    assert 0.3 < facts["stored"]["explained_variance"] < 1
    assert whole["stored"]["cosine"] > facts["stored"]["cosine"] > 0.5
    # what is lost is what the components leave out: the rest of the variance
    assert facts["stored"]["relative"] ** 2 == pytest.approx(
        1 - facts["stored"]["explained_variance"], rel=0.2
    )
    assert facts["gigabytes"] < 0.5 * whole["gigabytes"]
    path = tmp_path / "cache" / "pca.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"pca\.safetensors: is damaged"):
        _run(teacher, photos, tmp_path / "c", cache)


def test_several_teachers_have_a_folder_each(teacher: Path, photos: Path, tmp_path: Path) -> None:
    second = _save_teacher(tmp_path / "second", 36)
    runs = [
        _run([str(teacher), str(second)], photos, tmp_path / name, tmp_path / "cache") for name in ("a", "b")
    ]
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"first", "second"}
    assert same_bits(*(final_weights(run) for run in runs))
    assert _metrics(runs[1], "teacher_cache_read") == [1.0] * 12
    assert len(json.loads((runs[1] / "run.json").read_text())["teacher_cache"]) == 2


def _set_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    disk = SimpleNamespace(disk_usage=lambda path: SimpleNamespace(free=free))
    monkeypatch.setattr(_teacher_cache, "shutil", disk)


def test_what_the_disk_or_the_limit_cannot_hold_is_refused_before_training(
    teacher: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = {"folder": str(tmp_path / "cache"), "views": 2, "max_gigabytes": 1e-6}
    with pytest.raises(
        ConfigError, match=r"13 images x 2 crops are 1.28e-05 GB, more than .*max_gigabytes 1e-06"
    ):
        _run(teacher, photos, tmp_path / "a", cache)
    _set_free(monkeypatch, 5000)
    with pytest.raises(ResourceError, match=r"1.28e-05 GB are still to be written and 5e-06 GB are free"):
        _run(teacher, photos, tmp_path / "b", tmp_path / "cache")
    _set_free(monkeypatch, 12_800)
    _run(teacher, photos, tmp_path / "c", tmp_path / "cache")


def test_options_without_effect_and_wrong_folders_are_refused(
    teacher: Path, photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ConfigError, match=r"teacher_cache\.views has no effect without a cache"):
        _run(teacher, photos, tmp_path / "a", {"views": 3})
    with pytest.raises(ConfigError, match=r"teacher_drop_path 0\.1 makes another target each time"):
        _run(teacher, photos, tmp_path / "b", tmp_path / "cache", distillation={"teacher_drop_path": 0.1})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("x")
    with pytest.raises(OutputError, match=r"holds letter\.txt, and no manifest"):
        _run(teacher, photos, tmp_path / "c", tmp_path / "mine")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "manifest.json").write_text("[]")
    with pytest.raises(DataError, match=r"manifest\.json: is no manifest of a teacher cache"):
        _run(teacher, photos, tmp_path / "d", tmp_path / "bad")
    caplog.set_level(logging.INFO, logger="fdkit")
    _run(teacher, photos, tmp_path / "e", {"folder": str(tmp_path / "cache")}, train={"epochs": 1})
    assert any("no crop comes twice in this run" in record.getMessage() for record in caplog.records)


def test_flags_and_recipes_name_the_folder_or_all_fields(tmp_path: Path) -> None:
    arguments = ["--teacher", "demo", "--data", "digits", "--teacher-cache", "auto", "--teacher-cache.views",
                 "4", "--teacher-cache.pca", "64", "--teacher-cache.dtype", "fp16"]  # fmt: skip
    config = validate(DistillConfig, parse_flags(DistillConfig, arguments, {}, "fdkit distill"), "flags")
    cache = config.teacher_cache
    assert (cache.folder, cache.views, cache.pca, cache.dtype) == ("auto", 4, 64, "fp16")
    assert validate(DistillConfig, parse_yaml(to_yaml(config), "config.yaml"), "config.yaml") == config
    short = DistillConfig(teacher="demo", data="digits", teacher_cache=tmp_path)  # type: ignore[arg-type]
    assert short.teacher_cache.folder == str(tmp_path)


@pytest.mark.slow
def test_two_processes_fill_one_cache_and_two_read_it(teacher: Path, photos: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        codes = exit_codes(start_ranks(2, _run, teacher, photos, tmp_path / name, tmp_path / "cache"), 100)
        assert codes == [0, 0]
    assert same_bits(final_weights(tmp_path / "a"), final_weights(tmp_path / "b"))
    assert _metrics(tmp_path / "b", "teacher_cache_read") == [1.0] * 12
    assert _metrics(tmp_path / "a", "teacher_cache_read")[:6] == [0.0] * 6
