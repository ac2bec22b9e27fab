"""What every analysis keeps to, found by itself: a new file is tested the day it appears."""

import json
import re
from types import ModuleType

import pytest
import torch

from fdkit.analysis.observe import Observed
from fdkit.commands._analyses import analyses, own_config
from fdkit.commands._command import observe_on, plugin
from fdkit.data.loader import LoaderConfig
from fdkit.data.sources import open_source
from fdkit.models.backbone import Backbone
from fdkit.teachers.loading import load_teacher
from fdkit.teachers.teacher import Teacher

NEEDS_A_DECODER = {"reconstruction"}
NUM_IMAGES = 24
OTHERS = {"loss-landscape": {"num_images": 48, "readout": "probe", "resolution": 5}}
"""Settings of those for which NUM_IMAGES are too few."""


def models() -> dict[str, Teacher | Backbone]:
    """The embedded teacher, and the same network with other weights."""
    torch.manual_seed(0)
    other = load_teacher("demo", keep_head=True)
    for parameter in other.backbone.network.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return {"teacher": load_teacher("demo", keep_head=True), "student <b>": other}


def observed() -> list[Observed]:
    source, loader = open_source("demo", "test"), LoaderConfig(workers=0)
    return [observe_on(name, model, source, loader, batch_size=8) for name, model in models().items()]


def make(name: str) -> tuple[ModuleType, dict]:
    module = plugin("analysis", name)
    return module, module.analyze(observed(), own_config(name, fields_of(name))).numbers


def fields_of(name: str) -> dict:
    return {"num_images": NUM_IMAGES, "batch_size": 8} | OTHERS.get(name, {})


@pytest.fixture(scope="module", params=[name for name in analyses() if name not in NEEDS_A_DECODER])
def made(request) -> tuple[str, ModuleType, dict]:
    return request.param, *make(request.param)


def test_numbers_are_plain_and_name_their_models(made):
    name, _, numbers = made
    assert json.loads(json.dumps(numbers, allow_nan=False)) == numbers
    assert numbers["analysis"] == name
    assert {model["name"] for model in numbers["models"]} <= {"teacher", "student <b>"}
    assert all(model["num_images"] > 0 for model in numbers["models"])


@pytest.mark.parametrize("width", [7.2, 3.7])
def test_saved_numbers_are_enough_for_the_figure(made, width):
    _, module, numbers = made
    figure = module.draw(json.loads(json.dumps(numbers)), width)
    assert figure.get_figwidth() == pytest.approx(width)
    assert figure.axes
    figure.canvas.draw()


def test_the_table_has_equal_rows_and_the_scalars_are_numbers(made):
    _, module, numbers = made
    title, rows = module.summary(numbers)
    assert title
    assert len(rows) > 1
    assert len({len(row) for row in rows}) == 1
    assert all(isinstance(cell, str) for row in rows for cell in row)
    for model in numbers["models"]:
        for label, value in module.scalars(model).items():
            assert label
            assert isinstance(value, float), label


def test_one_sentence_says_how_to_read_it(made):
    _, module, _ = made
    assert module.READING[0].isupper()
    assert module.READING.endswith(".")
    assert 40 < len(module.READING) < 500


def test_the_same_images_give_the_same_numbers_and_the_models_stay_as_they_were(made):
    name, module, numbers = made
    fresh = observed()
    before = [
        {key: value.clone() for key, value in one.model.backbone.network.state_dict().items()}
        for one in fresh
    ]
    torch.manual_seed(123)
    drawn = torch.rand(1)
    torch.manual_seed(123)
    again = module.analyze(fresh, own_config(name, fields_of(name))).numbers
    assert torch.equal(torch.rand(1), drawn), "the global random numbers were touched"
    assert json.dumps(again) == json.dumps(numbers)
    for one, state in zip(fresh, before, strict=True):
        network = one.model.backbone.network
        assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
        assert not any(parameter.requires_grad for parameter in one.model.parameters())


def test_no_model_is_refused_in_words(made):
    name, module, _ = made
    with pytest.raises(Exception, match=re.compile("model|teacher|student", re.IGNORECASE)) as raised:
        module.analyze([], own_config(name, {}))
    assert type(raised.value).__name__ == "ConfigError"
