"""Names that would run, lead away or break something, if whoever writes them took them for more than text."""

import re
from pathlib import Path

import pytest
from faults.pages import (
    CORPUS,
    PLAIN,
    _finished,
    make_run,
    open_pages,
    wrong_in_card,
    wrong_in_page,
    wrong_in_svg,
)
from matplotlib.figure import Figure

from fdkit.analysis._figure import figure_bytes, in_style
from fdkit.report.page import Column, Details, Picture, Section, Table, render_page, write_page
from fdkit.training.export import model_card
from tests.browser import browser

NAMES = (
    "<img src=x onerror=document.title='run'>",
    "{{ 7*7 }} $a$ `b` [c](javascript:d)",
    "\x1b[31m|*_&amp;_*",
)
"""Of folders, which can hold no slash."""


def page_of(text: str) -> str:
    pictures = [Picture(b"RIFF", text, text, narrow=b"RIFF")]
    table = Table([Column(text), Column("number", ".1f")], [[text, 1.0], ["plain", 2.0]], text)
    sections = [
        Section(text, [text], facts=[(text, text)], table=table, pictures=pictures, code=text),
        Section("Attention", [text], details=[Details(text, text=text, table=table)]),
    ]
    return render_page(text, lead=text, sections=sections, facts=[(text, text)])


def card_of(text: str) -> str:
    teacher = {
        "name": text,
        "source": text,
        "license": f"cc-by-nc-4.0 {text}",
        "is_noncommercial": True,
        "sha256": "ab",
    }
    facts = {
        "data": {"name": text, "fingerprint": "ab"},
        "teacher": teacher,
        "versions": {"fdkit": text},
        "commit": text,
    }
    return model_card(*_finished(facts, text))


def test_texts_are_shown_in_pages_and_cards_and_do_nothing() -> None:
    plain, card = page_of(PLAIN), card_of(PLAIN)
    for text in CORPUS:
        assert wrong_in_page(page_of(text), plain) == [], text
        assert wrong_in_card(card_of(text), card) == [], text


def test_the_search_finds_what_it_is_to_find() -> None:
    plain = "<p>a</p>"
    for page in (
        "<p>a<img src='data:image/png;base64,'></p>",
        "<p onclick='x'>a</p>",
        "<p><a href='javascript:x'>a</a></p>",
    ):
        assert wrong_in_page(page, plain)
    assert wrong_in_svg(b"<svg><script>x()</script></svg>")
    assert wrong_in_svg(b"<svg><a href='javascript:x'/></svg>")
    assert wrong_in_svg(b"<svg onload='x()'/>")
    assert wrong_in_svg(b"<svg>")
    for card in ("a [b](c)", "a <b>", "a\x1b"):
        assert wrong_in_card(card, "a")


@in_style
def drawing(text: str) -> Figure:
    figure = Figure(figsize=(3, 2), layout="constrained")
    axes = figure.subplots()
    axes.barh([0, 1], [10.0, 1000.0], label=text)
    axes.set_yticks([0, 1], labels=[text, "other"])
    axes.set_xscale("log")
    axes.set_title(text)
    axes.legend()
    return figure


def test_a_name_in_a_drawing_is_no_mathematics_and_a_logarithm_is(recwarn: pytest.WarningsRecorder) -> None:
    for text in ("a$\\frac{$", "$x^2$", "\x1b[31m", "\udcff", "--><script>x()</script>"):
        image = figure_bytes(drawing(text))
        assert wrong_in_svg(image) == []
        assert b"\\mathdefault" not in re.sub(rb"<!--.*?-->", b"", image)
    assert not [one for one in recwarn if "missing from font" in str(one.message)]


def test_a_page_of_undecodable_names_is_written(tmp_path: Path) -> None:
    path = write_page(tmp_path / "index.html", "photos \udcff", lead="x", sections=[Section("x")])
    assert "photos \\udcff" in path.read_text(encoding="utf-8")


@pytest.mark.long
def test_reports_of_hostile_records_have_no_element_of_theirs(tmp_path: Path) -> None:
    found = open_pages(tmp_path, amount=4, seed=0)
    assert found["failures"] == []
    assert found["tried"] == 4


@pytest.mark.long
def test_hostile_folders_go_through_every_command_and_a_browser(tmp_path: Path) -> None:
    failures = make_run(tmp_path, name=NAMES[0] + NAMES[1], classes=[NAMES[1], NAMES[2]], file=NAMES[0])
    assert failures == []
    said = (tmp_path / "log").read_text(errors="replace")
    assert "\x1b" not in said.replace("\x1b[0m", ""), "no name reaches the terminal as a command to it"
    for drawing in tmp_path.rglob("*.svg"):
        assert wrong_in_svg(drawing.read_bytes()) == [], drawing
    pages = list(tmp_path.rglob("*.html"))
    assert pages
    for page in pages:
        assert wrong_in_page(page.read_text()) == []
    card = next(tmp_path.rglob("MODEL_CARD.md")).read_text()
    assert "<img" not in re.sub(r"```+yaml.*?\n```+", "", card, flags=re.DOTALL)
    with browser() as window:
        for page in pages:
            window.open(page)
            assert window.run("document.title") not in ("run", "1")
            assert window.complaints == []
        for drawing in list(tmp_path.rglob("*.svg"))[:4]:
            window.open(drawing)
            assert window.run("document.documentElement.tagName") == "svg"
            assert window.complaints == []
