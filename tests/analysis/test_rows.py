import csv
import io

from fdkit.analysis._rows import HEADER, numbers_to_csv

NUMBERS = {
    "analysis": "attention-distance",
    "renormalised": True,
    "step": 3,
    "command": {"seed": 1},
    "models": [
        {"name": 'a, "b"', "distance": [[1.5, 2.0], [3.0, 4.0]], "mean": [1.75, 3.5], "num_images": 2},
        {"name": "c", "deep": [[[1.0]]], "nested": {"rank": 2}, "missing": None, "picture": "text"},
    ],
}


def rows() -> list[list[str]]:
    return list(csv.reader(io.StringIO(numbers_to_csv(NUMBERS))))


def test_every_number_has_a_row_with_its_positions():
    assert tuple(rows()[0]) == HEADER
    assert ['a, "b"', "distance", "1", "0", "3.0"] in rows()
    assert ['a, "b"', "mean", "1", "", "3.5"] in rows()
    assert ['a, "b"', "num_images", "", "", "2"] in rows()
    assert ["c", "nested.rank", "", "", "2"] in rows()
    assert ["", "step", "", "", "3"] in rows()


def test_what_is_no_number_or_too_deep_is_left_to_the_json():
    quantities = {row[1] for row in rows()}
    assert not quantities & {"deep", "missing", "picture", "name", "renormalised", "command", "seed"}
    assert len(rows()) == 1 + 1 + 4 + 2 + 1 + 1
