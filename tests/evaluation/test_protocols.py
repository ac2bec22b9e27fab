"""Named protocols: every one can be run, pins what it says, and is refused where a flag changes it."""

from typing import Any

import pytest

from fdkit.commands import evaluate
from fdkit.commands._published import against_published
from fdkit.config import recipe_names, validate
from fdkit.errors import ConfigError
from fdkit.evaluation._protocols import PROTOCOLS, find_protocol, refuse_changes
from fdkit.teachers.catalog import CATALOG

EVALUATIONS = [name for name, protocol in PROTOCOLS.items() if protocol.command == "evaluate"]
FINETUNINGS = [name for name, protocol in PROTOCOLS.items() if protocol.command == "finetune"]


def configuration(name: str, **changes: Any) -> Any:
    protocol = find_protocol(name)
    values = {"model": "demo", "data": "demo", "protocol": name, **protocol.fields, **changes}
    return validate(evaluate.config_class(protocol.choice), values, "test")


@pytest.mark.parametrize("name", EVALUATIONS)
def test_every_field_of_a_protocol_is_one_of_its_evaluator(name: str) -> None:
    config = configuration(name)
    refuse_changes(find_protocol(name), config.model_dump(mode="json"))


@pytest.mark.parametrize("name", [name for name in EVALUATIONS if PROTOCOLS[name].choice == "linear"])
def test_a_linear_protocol_leaves_no_setting_of_training_open(name: str) -> None:
    left_open = {"seed"}
    kind = evaluate.config_of(evaluate.plugin("evaluation", "linear").evaluate)
    unpinned = set(kind.model_fields) - set(PROTOCOLS[name].fields) - left_open
    assert not unpinned


@pytest.mark.parametrize("name", FINETUNINGS)
def test_a_fine_tuning_protocol_is_a_shipped_recipe(name: str) -> None:
    assert f"finetune/{PROTOCOLS[name].choice}" in recipe_names()


def test_models_of_a_protocol_have_the_published_figure_it_is_set_beside() -> None:
    for protocol in PROTOCOLS.values():
        for beginning in protocol.models:
            rows = [row for row in CATALOG.values() if row.name.startswith(beginning)]
            assert any(protocol.published in row.published for row in rows), (protocol.name, beginning)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("temperature", (0.1,), r"temperature \[0\.07\], and \[0\.1\] is given"),
        ("k", (20,), r"k \[20, 10, 100, 200\], and \[20\]"),
        ("pooling", "patches", "pooling cls, and patches"),
        ("image_size", 448, "image_size None, and 448"),
        ("precision", "bf16", "precision fp32, and bf16"),
    ],
)
def test_a_changed_setting_loses_the_name(field: str, value: Any, message: str) -> None:
    config = configuration("dino-knn", **{field: value})
    with pytest.raises(ConfigError, match=message):
        refuse_changes(find_protocol("dino-knn"), config.model_dump(mode="json"))


def test_an_unknown_protocol_has_near_names() -> None:
    with pytest.raises(ConfigError, match=r"(?s)no protocol is called mae_linear.*mae-linear"):
        find_protocol("mae_linear")


def numbers(num_classes: int, num_images: int) -> dict[str, Any]:
    return {"top1": 0.75, "test": {"num_classes": num_classes, "num_images": num_images}}


def test_the_difference_to_the_published_figure_is_of_imagenet_alone() -> None:
    protocol = find_protocol("dino-knn")
    known = against_published(protocol, "dino_vits", numbers(1000, 50_000))
    assert known["published"] == pytest.approx(0.745)
    assert known["difference"] == pytest.approx(0.005)
    assert against_published(protocol, "dino_vits", numbers(10, 372))["difference"] is None
    assert against_published(protocol, "runs/mine", numbers(1000, 50_000))["published"] is None
    assert against_published(protocol, "mae_vitb", numbers(1000, 50_000))["published"] is None


def test_a_protocol_only_claims_models_measured_by_it() -> None:
    of_base = against_published(find_protocol("dino-linear"), "dino_vitb", numbers(1000, 50_000))
    assert of_base["published"] is None, "the authors measured ViT-B by dino-linear-vitb"
