"""Every shipped recipe is valid, states where it comes from, and holds the published numbers."""

from typing import Any

import pytest

from fdkit.commands import distill, pretrain
from fdkit.config import Config, check_recipe, find_recipe, read_yaml, recipe_names, validate


def config_of(name: str) -> type[Config]:
    if name.startswith("distill/"):
        return distill.config_class()
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
