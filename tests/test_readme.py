"""What the README counts is what there is."""

import re
from pathlib import Path

import pytest

from fdkit.commands import pretrain
from fdkit.commands._analyses import analyses
from fdkit.teachers.catalog import families, list_teachers
from fdkit.teachers.official import LAYOUTS

README = (Path(__file__).parents[1] / "README.md").read_text()


@pytest.mark.parametrize(
    ("words", "count"),
    [
        (r"lists (\d+) teachers", len(list_teachers())),
        (r"teachers in (\d+) families", len(families())),
        (r"timm hosts (\d+)", sum(row.model.startswith("timm:") for row in list_teachers())),
        (r"not by its name: (\d+) layouts", len(LAYOUTS)),
        (r"by one of (\d+) methods", len(pretrain.choices())),
        (r"by (\d+) analyses", len(analyses())),
    ],
)
def test_counts(words: str, count: int) -> None:
    found = re.search(words, README)
    assert found is not None
    assert int(found[1]) == count


def test_every_analysis_is_named() -> None:
    assert [name for name in analyses() if f"`{name}`" not in README] == []
