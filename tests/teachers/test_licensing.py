import json
from pathlib import Path
from typing import Any

import pytest

from fdkit.errors import WeightsError
from fdkit.teachers.licensing import Terms, combined_terms, forbids_commerce, terms_of_run

NC = {"name": "mae_vitb", "license": "cc-by-nc-4.0", "is_noncommercial": True}
FREE = {"name": "dino_vitb", "license": "apache-2.0", "is_noncommercial": False}
UNKNOWN = {"name": "file.pth", "license": "unstated", "is_noncommercial": False}


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"teacher": NC}, Terms("cc-by-nc-4.0", True)),
        ({"teacher": FREE}, Terms("apache-2.0", False)),
        ({"teachers": [FREE, NC]}, Terms("apache-2.0 AND cc-by-nc-4.0", True)),
        ({"teachers": [FREE, FREE | {"name": "dino_vits"}]}, Terms("apache-2.0", False)),
        ({"teachers": [UNKNOWN, FREE]}, Terms("unstated AND apache-2.0", False)),
        ({"teacher": {"license": "cc-by-nc-4.0"}}, Terms("cc-by-nc-4.0", True)),
        ({"teacher": {"license": "own terms", "is_noncommercial": True}}, Terms("own terms", True)),
        ({"teacher": {"license": None}}, Terms("unstated", False)),
        ({"method": "mocov3"}, Terms("unstated", False)),
    ],
)
def test_a_student_inherits_the_terms_of_its_teachers(
    facts: dict[str, Any], expected: Terms, tmp_path: Path
) -> None:
    (tmp_path / "run.json").write_text(json.dumps(facts))
    assert terms_of_run(tmp_path) == expected


def test_the_chain_goes_on_and_says_each_licence_once() -> None:
    grandchild = combined_terms([Terms("mit AND cc-by-nc-4.0", True), Terms("mit", False)])
    assert grandchild == Terms("mit AND cc-by-nc-4.0", True)


def test_a_folder_that_is_no_run_states_nothing(tmp_path: Path) -> None:
    assert terms_of_run(tmp_path) == Terms("unstated", False)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"teacher": "mae_vitb"}', '{"teachers": 3}', '{"teachers": ["a"]}']
)
def test_a_run_file_that_cannot_be_read_loses_no_licence(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(WeightsError, match=r"run.json: cannot read the teacher's licence"):
        terms_of_run(tmp_path)


@pytest.mark.parametrize(
    ("license", "is_forbidden"),
    [
        ("cc-by-nc-4.0", True),
        ("CC-BY-NC-SA-4.0", True),
        ("fair-noncommercial-research-license", True),
        ("non-commercial", True),
        ("apple-amlr", True),
        ("apache-2.0", False),
        ("mit", False),
        ("dinov3-license", False),
        ("ncsa", False),
        ("unstated", False),
    ],
)
def test_a_licences_name_may_forbid_commerce(license: str, is_forbidden: bool) -> None:
    assert forbids_commerce(license) is is_forbidden
