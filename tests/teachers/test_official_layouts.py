"""The engine that matches a file's content to a layout; the layouts themselves are tested file by file."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fdkit.errors import WeightsError
from fdkit.teachers.official._layout import Change, Conversion, Layout, Network, nearest, state_in
from tests.official_files import read


def tensors(*names: str) -> dict[str, Tensor]:
    return {name: torch.full((2,), float(number)) for number, name in enumerate(names)}


def convert_toy(conversion: Conversion) -> Network:
    conversion.drop(r"head\..*", "classifier")
    conversion.rename(r"^layers\.", "blocks.")
    return Network("toy", {})


TOY = Layout(
    "toy",
    "Toy (test)",
    requires=(r"patch\.weight", r"layers\.0\.weight"),
    forbids=(r"other\..*",),
    convert=convert_toy,
    prefixes=("", "backbone.", "ema."),
    outside=((r"(queue|head\..*)", "queue and head beside the network"), (r"(ema|backbone)\..*", "the twin")),
)
BARE = ("patch.weight", "layers.0.weight", "head.weight")


@pytest.mark.parametrize(
    ("content", "origin"),
    [
        (tensors(*BARE), ""),
        ({"model": tensors(*BARE), "epoch": 3}, ""),
        ({"state_dict": tensors(*(f"module.{name}" for name in BARE)), "optimizer": {}}, ""),
        (
            {"student": tensors("patch.weight"), "teacher": tensors(*(f"backbone.{n}" for n in BARE))},
            "backbone.",
        ),
    ],
)
def test_wrappers_come_off_and_every_tensor_is_accounted_for(content: dict[str, Any], origin: str) -> None:
    reading = read(content, [TOY], source="x.pth")
    assert reading is not None
    assert reading.layout == "toy"
    assert set(reading.state) == {"patch.weight", "blocks.0.weight"}
    taken_off = f"prefix {origin} taken off" if origin else ""
    assert set(reading.audit) == {
        Change(f"{origin}head.weight", None, "classifier"),
        Change(f"{origin}layers.0.weight", "blocks.0.weight", "renamed"),
        Change(f"{origin}patch.weight", "patch.weight", taken_off),
    }


def test_a_checkpoint_key_names_a_container_or_a_prefix() -> None:
    student, teacher = tensors("patch.weight", "layers.0.weight"), tensors("patch.weight", "layers.0.weight")
    student["patch.weight"] += 5
    two = {"student": student, "teacher": teacher}
    default, asked = (read(two, [TOY], source="x", checkpoint_key=key) for key in (None, "student"))
    assert default is not None
    assert asked is not None
    assert torch.equal(default.state["patch.weight"], teacher["patch.weight"])
    assert torch.equal(asked.state["patch.weight"], student["patch.weight"])
    both = tensors(*(f"{twin}.{name}" for twin in ("ema", "backbone") for name in BARE)) | tensors("queue")
    reading = read(both, [TOY], source="x", checkpoint_key="ema")
    assert reading is not None
    assert torch.equal(reading.state["patch.weight"], both["ema.patch.weight"])
    assert Change("backbone.patch.weight", None, "the twin") in reading.audit
    assert Change("queue", None, "queue and head beside the network") in reading.audit
    with pytest.raises(WeightsError, match="x holds no momentum") as raised:
        read(both, [TOY], source="x", checkpoint_key="momentum")
    assert "backbone, ema" in raised.value.hint


def test_what_no_rule_names_stays_for_the_loader_to_refuse() -> None:
    reading = read(tensors(*BARE, "surprise"), [TOY], source="x")
    assert reading is not None
    assert "surprise" in reading.state


def test_forbidden_and_missing_tensors_and_a_further_look_keep_a_layout_away() -> None:
    assert read(tensors(*BARE, "other.weight"), [TOY], source="x") is None
    assert read(tensors("patch.weight"), [TOY], source="x") is None
    big = TOY._replace(shows=lambda state: state["patch.weight"].numel() > 2)
    assert read(tensors(*BARE), [big], source="x") is None
    assert read(tensors(*BARE) | {"patch.weight": torch.ones(3)}, [big], source="x") is not None


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"optimizer": {"state": {}, "param_groups": []}, "epoch": 3}, "state of an optimiser alone"),
        ({"state": {0: {}}, "param_groups": [{"params": [0]}]}, "state of an optimiser alone"),
        ([1, 2], "it is a list"),
        ({"note": "hello", 3: 4}, "its keys are note, 3"),
        ({"state_dict": tensors("module.linear.weight", "module.linear.bias")}, "no backbone"),
        (tensors(*BARE, "head.0.running_mean", "head.1.weight"), "file of a linear probe"),
        (
            {"state_dict": tensors(*BARE), "optimizer": {"param_groups": [{"params": [0, 1]}]}},
            "of a linear probe",
        ),
    ],
)
def test_files_that_hold_no_backbone_say_what_they_are(content: Any, words: str) -> None:
    with pytest.raises(WeightsError, match=words):
        read(content, [TOY], source="x.pth")


def test_a_trained_network_with_its_optimiser_is_no_linear_probe() -> None:
    content = {"state_dict": tensors(*BARE), "optimizer": {"param_groups": [{"params": [0, 1, 2]}]}}
    assert read(content, [TOY], source="x") is not None


def test_the_nearest_layout_says_what_is_lacking() -> None:
    assert nearest(tensors("patch.weight", "foo"), [TOY]) == "Toy (test), but without layers.0.weight"
    assert nearest(tensors("foo"), [TOY]) == "none"


def test_merges_and_splits_are_in_the_audit_and_name_clashes_are_refused() -> None:
    conversion = Conversion(tensors("q", "k", "v", "both", "a.x", "b.x"))
    conversion.merge(["q", "k", "v"], "qkv", torch.cat, "merged")
    conversion.split("both", {"left": torch.zeros(1), "right": torch.ones(1)}, "split")
    conversion.convert("qkv", lambda value: value.unsqueeze(0), "turned")
    assert conversion.state["qkv"].tolist() == [[0, 0, 1, 1, 2, 2]]
    audit = set(conversion.audit())
    assert {Change("q", "qkv", "turned"), Change("k", "qkv", "merged"), Change("v", "qkv", "merged")} <= audit
    assert {Change("both", "left", "split"), Change("both", "right", "split")} <= audit
    with pytest.raises(WeightsError, match="same name"):
        conversion.rename(r"^[ab]\.", "")


def test_no_container_is_no_error_for_flat_files() -> None:
    assert set(state_in(tensors("a", "b"), source="x")) == {"a", "b"}
