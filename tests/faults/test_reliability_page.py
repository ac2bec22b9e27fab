"""The page of figures: its tests exist, and its figures are those of the committed counts."""

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reliability.md"
COUNTS = ROOT / "benchmarks" / "results" / "reliability.json"


@pytest.fixture(scope="module")
def script() -> object:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import reliability
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    return reliability


def test_the_tests_it_names_are_there() -> None:
    named = set(re.findall(r"\]\((\.\./[\w./-]+)\)", PAGE.read_text()))
    assert len(named) > 20
    assert [name for name in sorted(named) if not (PAGE.parent / name).exists()] == []


def test_all_thirty_faults_have_a_row() -> None:
    numbers = re.findall(r"^\| (\d+) \|.*\]\(\.\./tests/", PAGE.read_text(), re.MULTILINE)
    assert [int(number) for number in numbers] == list(range(1, 31))


def test_its_figures_are_the_committed_counts(script: object) -> None:
    report = json.loads(COUNTS.read_text())
    page = PAGE.read_text()
    assert script.with_figures(page, script.figures(report)) == page


def test_every_trial_was_run_and_none_failed(script: object) -> None:
    trials = json.loads(COUNTS.read_text())["trials"]
    assert trials.keys() == script.TRIALS.keys()
    assert {name: trial["failures"] for name, trial in trials.items() if trial["failures"]} == {}


def test_a_failure_would_stand_on_the_page(script: object) -> None:
    report = json.loads(COUNTS.read_text())
    report["trials"]["kills"]["failures"] = ["distill: weights differ"]
    text = script.figures(report)
    assert "What failed" in text
    assert "distill: weights differ" in text


def test_a_trial_that_breaks_down_is_a_failure(script: object, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = script.TRIALS["hub"]._replace(function="nowhere.nothing")
    monkeypatch.setitem(script.TRIALS, "hub", broken)
    monkeypatch.setattr(script, "__file__", str(ROOT / "benchmarks" / "no_such_script.py"))
    assert "ended with code" in script.run("hub", 1.0, 0)["failures"][0]
