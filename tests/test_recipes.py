"""Every shipped recipe is valid, states where it comes from, and holds the published numbers."""

from typing import Any

import pytest

from fdkit.commands import distill, finetune, pretrain, segment
from fdkit.config import Config, check_recipe, find_recipe, read_yaml, recipe_names, validate


def config_of(name: str) -> type[Config]:
    if name.startswith("distill/"):
        return distill.config_class()
    if name.startswith("segment/"):
        return segment.config_class()
    if name.startswith("finetune/"):
        return finetune.config_class()
    return pretrain.config_class(str(read_yaml(find_recipe(name, ""))["method"]))


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_is_valid_and_says_where_it_comes_from(name: str) -> None:
    path = find_recipe(name, "")
    check_recipe(config_of(name), read_yaml(path), name)
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    for word in ("Source:", "Command:", "Cost:", "Result:"):
        assert any(word in line for line in header), f"{name} does not state its {word}"


@pytest.mark.parametrize(
    ("name", "epochs", "min_scale", "drop_path", "peak_lr"),
    [
        ("clip_vitb_100ep", 100, 0.67, 0.1, 1.2e-3),
        ("clip_vitb", 300, 0.08, 0.2, 1.2e-3),
        ("clip_vitl", 300, 0.08, 0.3, 1.2e-3),
        ("dino_vitb", 300, 0.08, 0.3, 1.2e-3),
        ("deit_vitb", 300, 0.08, 0.3, 1.2e-3),
        ("esvit_swinb", 300, 0.08, 0.3, 0.8e-3),
    ],
)
def test_the_official_distillations_hold_the_official_numbers(
    name: str, epochs: int, min_scale: float, drop_path: float, peak_lr: float
) -> None:
    from fdkit.training.schedule import build_schedule

    values = {"teacher": "x", "data": "x", **read_yaml(find_recipe(name, "distill"))}
    config: Any = validate(distill.DistillConfig, values, name)
    assert (config.train.epochs, config.views.min_scale, config.student.drop_path) == (
        epochs,
        min_scale,
        drop_path,
    )
    assert (config.train.batch_size, config.optim.weight_decay, config.optim.clip_grad) == (2048, 0.05, 3.0)
    assert (config.distillation.beta, config.distillation.whitening) == (2.0, "layernorm")
    assert config.distillation.teacher_drop_path == 0
    schedule = build_schedule(config.optim, batch_size=2048, steps_per_epoch=625, num_steps=625 * epochs)
    assert schedule.peak_lr == pytest.approx(peak_lr)
    assert schedule.warmup_steps == 6250
    assert config.optim.decay_exempt == "1d+tokens"


def pretraining(name: str) -> Any:
    values = {"data": "x", **read_yaml(find_recipe(name, "pretrain"))}
    return validate(config_of(f"pretrain/{name}"), values, name)


@pytest.mark.parametrize(
    ("name", "optimiser", "epochs", "batch_size", "peak_lr", "weight_decay", "warmup_epochs"),
    [
        ("mocov3_vits", "adamw", 300, 4096, 1.5e-4 * 16, 0.1, 40),
        ("mocov3_vitb", "adamw", 300, 4096, 1.5e-4 * 16, 0.1, 40),
        ("mocov3_vitl", "adamw", 300, 4096, 1.5e-4 * 16, 0.1, 40),
        ("mocov3_r50", "lars", 100, 4096, 0.6 * 16, 1e-6, 10),
        ("mocov3_r50_300ep", "lars", 300, 4096, 0.3 * 16, 1e-6, 10),
        ("mocov3_r50_1000ep", "lars", 1000, 4096, 0.3 * 16, 1.5e-6, 10),
        ("fast-moco", "sgd", 100, 512, 0.1, 1e-4, 1),
        ("mae_vitb", "adamw", 1600, 4096, 1.5e-4 * 16, 0.05, 40),
        ("mae_vitl", "adamw", 1600, 4096, 1.5e-4 * 16, 0.05, 40),
        ("dino", "adamw", 100, 512, 5e-4 * 2, 0.04, 10),
        ("esvit", "adamw", 300, 512, 5e-4 * 2, 0.04, 10),
        ("simsiam", "sgd", 100, 512, 0.05 * 2, 1e-4, 0),
        ("mocov1", "sgd", 200, 256, 0.03, 1e-4, 0),
        ("mocov2", "sgd", 200, 256, 0.03, 1e-4, 0),
        ("mocov2_800ep", "sgd", 800, 256, 0.03, 1e-4, 0),
        ("byol", "lars", 300, 4096, 0.3 * 16, 1e-6, 10),
        ("byol_1000ep", "lars", 1000, 4096, 0.2 * 16, 1.5e-6, 10),
        ("simclr_vitb", "adamw", 100, 4096, 2e-4 * 16, 0.1, 40),
        ("byol_vitb", "adamw", 100, 4096, 1e-4 * 16, 0.03, 40),
        ("swav", "larc", 100, 4096, 4.8, 1e-6, 10),
        ("swav_256", "larc", 400, 256, 0.6, 1e-6, 0),
    ],
)
def test_the_official_pretrainings_hold_the_official_numbers(
    name: str,
    optimiser: str,
    epochs: int,
    batch_size: int,
    peak_lr: float,
    weight_decay: float,
    warmup_epochs: int,
) -> None:
    from fdkit.training.schedule import build_schedule

    config = pretraining(name)
    assert (config.optim.name, config.train.epochs, config.train.batch_size) == (
        optimiser,
        epochs,
        batch_size,
    )
    assert config.optim.weight_decay == weight_decay
    schedule = build_schedule(
        config.optim, batch_size=batch_size, steps_per_epoch=100, num_steps=100 * epochs
    )
    assert schedule.peak_lr == pytest.approx(peak_lr)
    assert schedule.warmup_steps == 100 * warmup_epochs


@pytest.mark.parametrize("name", ["simclr", "byol", "swav"])
def test_the_comparison_with_a_frozen_projection_differs_in_that_alone(name: str) -> None:
    free, frozen = (pretraining(f"{name}_vitb{kind}").model_dump() for kind in ("", "_frozen"))
    assert (
        free["network"].pop("freeze_patch_projection"),
        frozen["network"].pop("freeze_patch_projection"),
    ) == (
        False,
        True,
    )
    assert free == frozen


def test_dinos_rates_are_those_of_its_schedulers() -> None:
    optim = pretraining("dino").optim
    assert (optim.min_lr, optim.scale_min_lr, optim.warmup_reaches_peak) == (1e-6, False, True)
    assert (optim.weight_decay_end, optim.clip_grad, optim.clip_each_parameter) == (0.4, 3.0, True)


@pytest.mark.parametrize(
    ("name", "epochs", "batch_size", "peak_lr", "layer_decay", "drop_path", "warmup_epochs", "last_lr"),
    [
        ("fd_clip_vitb_100ep", 100, 2048, 5e-3, 0.65, 0.1, 20, 1e-6),
        ("fd_clip_vitb", 100, 2048, 5e-3, 0.6, 0.3, 20, 1e-6),
        ("fd_dino_vitb", 100, 2048, 6e-3, 0.6, 0.2, 20, 1e-6),
        ("fd_deit_vitb", 100, 2048, 5e-3, 0.65, 0.3, 20, 1e-6),
        ("fd_clip_vitl", 50, 2048, 1e-3, 0.75, 0.4, 5, 2e-6),
        ("fd_esvit_swinb", 100, 1024, 2.5e-3, 0.8, 0.4, 20, 5e-7),
        ("mae_vitb", 100, 1024, 2e-3, 0.65, 0.1, 5, 1e-6),
        ("mae_vitl", 50, 1024, 4e-3, 0.75, 0.2, 5, 1e-6),
        ("mae_vith", 50, 1024, 4e-3, 0.75, 0.3, 5, 1e-6),
        ("mocov3_vits", 50, 344, 1e-3, None, 0.1, 1.67, 1e-5),
        ("mocov3_vitb", 50, 344, 1e-3, None, 0.1, 1.67, 1e-5),
        ("ft_clip_vitb", 50, 2048, 6e-4, 0.6, 0.0, 10, 1e-6),
        ("ft_clip_vitl", 30, 2048, 4e-4, 0.65, 0.0, 5, 1e-6),
    ],
)
def test_the_official_fine_tunings_hold_the_official_numbers(
    name: str,
    epochs: int,
    batch_size: int,
    peak_lr: float,
    layer_decay: float | None,
    drop_path: float,
    warmup_epochs: float,
    last_lr: float,
) -> None:
    from fdkit.training.schedule import build_schedule

    values = {"model": "x", "data": "x", **read_yaml(find_recipe(name, "finetune"))}
    config: Any = validate(finetune.FinetuneConfig, values, name)
    assert (config.train.epochs, config.train.batch_size) == (epochs, batch_size)
    assert (config.optim.layer_decay, config.supervised.drop_path) == (layer_decay, drop_path)
    assert (config.optim.weight_decay, config.optim.decay_exempt) == (0.05, "1d+tokens")
    schedule = build_schedule(
        config.optim, batch_size=batch_size, steps_per_epoch=100, num_steps=100 * epochs
    )
    assert schedule.peak_lr == pytest.approx(peak_lr)
    assert schedule.warmup_steps == pytest.approx(100 * warmup_epochs)
    assert schedule.min_lr == pytest.approx(last_lr)
    mixes = not name.startswith("ft_clip")
    assert (config.supervised.mixup, config.supervised.cutmix) == ((0.8, 1.0) if mixes else (0, 0))
    assert (config.supervised.label_smoothing, config.supervised.erase_probability) == (0.1, 0.25)
    assert (config.views.randaugment, config.views.interpolation) == ("rand-m9-mstd0.5-inc1", "bicubic")
    assert config.supervised.ema_decay == (None if mixes else 0.9998)
    assert config.supervised.pooling == ("cls" if name.startswith("mocov3") else "patches")
    assert config.validate_every_epochs == 0
