import os

import pytest
import torch

from fdkit.analysis._figure import new_figure
from fdkit.report import drawing
from fdkit.report.drawing import draw_all, with_pictures
from fdkit.report.page import Drawing, Section, picture, render_page


def lines(width: float, height: float = 1.0):
    figure = new_figure(width, height)
    figure.subplots().plot([0, 1], [0, height])
    return figure


def failing(width: float):
    raise KeyError("distance")


def drawings() -> list[Drawing]:
    return [
        Drawing(lambda width, own=number: lines(width, 1 + own), f"figure {number}") for number in range(4)
    ]


@pytest.mark.parametrize("cores", [1, 2, 8])
def test_pictures_are_the_same_on_any_number_of_cores(monkeypatch, cores):
    monkeypatch.setattr(drawing, "_cores", lambda: cores)
    monkeypatch.setattr(drawing, "_may_fork", lambda: True)
    expected = [picture(one.draw, one.alt) for one in drawings()]
    assert draw_all(drawings()) == expected


def test_several_processes_draw_where_that_is_safe(monkeypatch):
    monkeypatch.setattr(drawing, "_cores", lambda: 2)
    seen = Drawing(lambda width: lines(width, 1 + os.getpid() % 7 / 10), "pid")
    own = picture(seen.draw, "pid")
    monkeypatch.setattr(drawing, "_may_fork", lambda: False)
    assert draw_all([seen, seen]) == [own, own]


def resized(width: float):
    torch.nn.functional.interpolate(torch.rand(1, 3, 300, 300), size=600, mode="bicubic", antialias=True)
    return lines(width)


@pytest.mark.timeout(60)
def test_drawings_that_compute_do_not_wait_for_threads_that_a_fork_has_lost(monkeypatch):
    monkeypatch.setattr(drawing, "_cores", lambda: 2)
    monkeypatch.setattr(drawing, "_may_fork", lambda: True)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        resized(7.2)  # starts the pool of threads in this process
        found = draw_all([Drawing(resized, "a"), Drawing(resized, "b")])
    finally:
        torch.set_num_threads(before)
    assert [one.alt for one in found] == ["a", "b"]


def test_a_drawing_that_fails_costs_its_section_alone():
    good, bad = Drawing(lines, "good"), Drawing(failing, "bad")
    sections = [Section("a", pictures=[good]), Section("b", pictures=[good, bad]), Section("c")]
    first, second, third = with_pictures(sections)
    assert isinstance(first, Section)
    assert first.pictures[0] == picture(lines, "good")
    assert isinstance(second, KeyError)
    assert third == sections[2]._replace(pictures=[])


def test_a_page_takes_no_drawing():
    with pytest.raises(ValueError, match="a section still holds a drawing"):
        render_page("t", lead="", sections=[Section("a", pictures=[Drawing(lines, "x")])])
