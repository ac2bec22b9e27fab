import pytest
import torch

from fdkit.errors import ConfigError
from fdkit.evaluation._columns import resolve_inputs, width_of
from fdkit.evaluation._reading import Part

# Layer by layer, of unequal widths, as stages of a Swin are.
PARTS, VALUES = [], torch.arange(2 * 21).view(2, 21)
for _layer, _token, _width in [(-2, "cls", 2), (-2, "patches", 3), (-1, "cls", 7), (-1, "patches", 9)]:
    _start = PARTS[-1].stop if PARTS else 0
    PARTS.append(Part(_layer, _token, _start, _start + _width))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("all", range(21)),
        ("cls", range(5, 12)),
        ("patches", range(12, 21)),
        ("cls+patches", range(5, 21)),
        ("cls:2", [0, 1, *range(5, 12)]),
        ("cls:2+patches", [0, 1, *range(5, 21)]),
        ("patches:2", [2, 3, 4, *range(12, 21)]),
        ("patches+cls", [*range(12, 21), *range(5, 12)]),
        ("cls:2+patches:2", [0, 1, *range(5, 12), 2, 3, 4, *range(12, 21)]),
    ],
)
def test_a_name_means_these_columns(name, expected):
    (columns,) = resolve_inputs([name], PARTS, VALUES).values()
    assert VALUES[0, columns].tolist() == list(expected)
    assert width_of(columns, VALUES) == len(list(expected))


def test_the_grid_is_that_of_dinov2_over_the_layers_read():
    assert list(resolve_inputs(["grid"], PARTS, VALUES)) == ["cls", "cls:2", "cls+patches", "cls:2+patches"]
    last = [part._replace(start=part.start - 5, stop=part.stop - 5) for part in PARTS if part.layer == -1]
    assert list(resolve_inputs(["patches", "grid"], last, VALUES)) == ["patches", "cls", "cls+patches"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["registers"],
            "inputs registers reads registers of layer -1, which was not extracted; there is cls of layer",
        ),
        (["cls:3"], "inputs cls:3 reads cls of layer -3, which was not extracted"),
        (["cls+registers:2"], r"inputs cls\+registers:2 reads registers of layer -2"),
        (["cls,patches"], "inputs cls,patches: 'cls,patches' is no input"),
        (["cls:0"], "inputs cls:0: 'cls:0' is no input"),
        (["cls:"], "inputs cls:: 'cls:' is no input"),
        (["cls:two"], "'cls:two' is no input"),
        (["cls+"], r"inputs cls\+: '' is no input"),
        (["cls+cls:2"], r"inputs cls\+cls:2 reads cls twice"),
        (["cls", "patches", "cls"], "inputs cls, patches, cls name an input twice"),
        (["cls", "grid"], "inputs cls, grid name an input twice"),
    ],
)
def test_names_of_nothing_are_refused(names, message):
    with pytest.raises(ConfigError, match=message):
        resolve_inputs(names, PARTS, VALUES)


def test_features_of_no_network_have_one_input():
    assert resolve_inputs(["all"], (), VALUES) == {"all": slice(None)}
    with pytest.raises(
        ConfigError, match=r"inputs cls reads cls of layer -1, .* there is one vector an image"
    ):
        resolve_inputs(["grid"], (), VALUES)
