import json
from pathlib import Path

import pytest

from fdkit.report.drawing import with_pictures
from fdkit.report.page import render_page
from fdkit.report.run_sections import MAX_ROWS, facts_of, read_run, run_sections, training_seconds

FACTS = {
    "state": "done",
    "command": ["/usr/bin/fdkit", "distill", "--teacher", "demo", "--data", "my photos"],
    "method": "feature_distillation",
    "teacher": {
        "source": "demo <b>",
        "license": "cc-by-nc-4.0",
        "is_noncommercial": True,
        "sha256": "a" * 64,
    },
    "data": {"name": "my photos", "fingerprint": "f" * 64},
    "derived": {"num_steps": 2000, "batch_size": 64, "precision": "bf16"},
    "step": 2000,
    "started": "2026-11-26T19:52:58+00:00",
    "resumes": 2,
    "seed": 0,
    "hardware": {"cpu": "EPYC", "cpus": 2, "cuda": ["H200"]},
    "commit": "abc123",
    "versions": {"torch": "2.14"},
    "device": "cuda",
}


def rows(count: int) -> list[dict]:
    return [
        {
            "step": step,
            "epoch": step / 10,
            "loss": 1 / (1 + step),
            "explained_variance": 0.4,
            "seconds": 1.5 * step,
        }
        for step in range(1, count + 1)
    ]


def run_folder(path: Path, *, leave_out: str = "", count: int = 100) -> Path:
    files = {
        "config.yaml": "data: my photos\n",
        "run.json": json.dumps(FACTS),
        "metrics.jsonl": "".join(json.dumps(row) + "\n" for row in rows(count)) + '{"step": 101, "lo',
        "student.safetensors": "",
        "student.json": "{}",
    }
    path.mkdir(exist_ok=True)
    for name, text in files.items():
        if name != leave_out:
            (path / name).write_text(text)
    return path


def test_a_whole_run_lacks_nothing_and_says_what_it_was(tmp_path):
    run = read_run("student", run_folder(tmp_path))
    assert run.missing == []
    assert run.command == "fdkit distill --teacher demo --data 'my photos'"
    assert len(run.rows) == 100  # the line that was cut short is left out
    facts = dict(facts_of(run))
    assert facts["teacher"] == "demo <b> · aaaaaaaaaaaa"
    assert facts["teacher's licence"] == "cc-by-nc-4.0: it forbids commercial use, of the student too"
    assert facts["images"] == "my photos · ffffffffffff"
    assert facts["steps"] == "2,000 of 2,000"
    assert facts["time"].startswith("2 m 30 s of training, from 2026-11-26 19:52 UTC")
    assert facts["hardware"] == "H200, EPYC, 2 CPUs, on cuda"
    assert facts["resumed"] == "2 times"


@pytest.mark.parametrize(
    ("leave_out", "words"),
    [
        ("config.yaml", "config.yaml: the configuration"),
        ("run.json", "run.json: what was run and how it ended"),
        ("metrics.jsonl", "metrics.jsonl: the training curves"),
        ("student.safetensors", "student.safetensors: the student's weights"),
    ],
)
def test_a_folder_with_missing_parts_shows_the_rest(tmp_path, leave_out, words):
    run = read_run("student", run_folder(tmp_path, leave_out=leave_out))
    assert [one.rpartition("/")[2] for one in run.missing] == [words]
    page = render_page("t", lead="", sections=with_pictures(run_sections([run])))
    assert "What was run" in page
    assert ("Training curves of student" in page) == (leave_out != "metrics.jsonl")


def test_a_damaged_record_is_told(tmp_path):
    run_folder(tmp_path)
    (tmp_path / "run.json").write_text('{"state": ')
    run = read_run("student", tmp_path)
    assert "cannot be read" in run.missing[0]
    assert "does not tell what was run" in run_sections([run])[0].paragraphs[0]


def test_how_a_run_failed_is_said_in_its_own_words(tmp_path):
    run_folder(tmp_path)
    facts = FACTS | {"state": "failed", "reason": "training has collapsed\n  try a lower rate"}
    (tmp_path / "run.json").write_text(json.dumps(facts))
    assert dict(facts_of(read_run("s", tmp_path)))["state"] == "failed: training has collapsed"


def test_the_table_of_metrics_is_short_and_ends_with_the_last_step(tmp_path):
    section = run_sections([read_run("s", run_folder(tmp_path, count=1000))])[1]
    table = section.details[0].table
    assert MAX_ROWS / 2 < len(table.rows) <= MAX_ROWS + 1
    assert table.rows[-1][0] == 1000
    assert "gradient norm" not in [column.header for column in table.columns]
    assert "explains 40% of the variance" in section.paragraphs[0]


def test_two_runs_have_their_names_in_the_headings(tmp_path):
    runs = [read_run(name, run_folder(tmp_path / name)) for name in ("a", "b")]
    assert [section.heading for section in run_sections(runs)] == [
        "What was run: a",
        "Training: a",
        "What was run: b",
        "Training: b",
    ]


def test_the_time_of_a_run_is_that_of_all_its_parts() -> None:
    assert training_seconds([]) == 0
    assert training_seconds([{"step": 0}, {"seconds": 2.0}, {"seconds": 5.0}]) == 5
    resumed = [{"seconds": 2.0}, {"seconds": 5.0}, {"seconds": 1.5}, {"seconds": None}, {"seconds": 4.0}]
    assert training_seconds(resumed) == 9
