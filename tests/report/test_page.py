import base64
import io
import re
from functools import partial
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from fdkit.errors import OutputError
from fdkit.report.figures import accuracy_bars
from fdkit.report.page import (
    Column,
    Details,
    Picture,
    Section,
    Table,
    picture,
    render_page,
    thumbnail,
    write_page,
)

BAD = "<script>alert('x')</script> & \"quoted\""


class Elements(HTMLParser):
    """Every start tag with its attributes, the text, and what was opened and not closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in {"meta", "img", "source", "br"}:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def table() -> Table:
    columns = [
        Column("model"),
        Column("top-1", ".1%", "max"),
        Column("seconds", ".1f", "min"),
        Column("images", ",d"),
    ]
    return Table(
        columns, [["teacher", 0.8843, 12.3, 3068], ["student", 0.5, 4.06, None], [BAD, 0.8843, 5, 12]], BAD
    )


def full_page() -> str:
    sections = [
        Section(
            f"Heading {BAD}",
            [f"Run `fdkit {BAD}` now."],
            table=table(),
            pictures=[picture(partial(accuracy_bars, ["a"], {"kNN": [0.5]}), alt=BAD, caption=BAD)],
            gallery=[thumbnail(Image.new("RGB", (300, 200)), BAD)],
            code=f"fdkit demo \\\n  --output {BAD}",
            details=[Details(BAD, text=BAD, table=table())],
        ),
        Section("Nothing else"),
    ]
    return render_page(BAD, lead=BAD, sections=sections, facts=[(BAD, BAD)])


def test_no_text_becomes_markup():
    page = Elements(full_page())
    assert page.open == []
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object", "base"})
    # title, h1, lead, fact (2), heading, code in prose, row and caption of two tables, picture's caption, thumbnail,
    # summary, details and command
    assert "".join(page.text).count(BAD) == 16
    assert page.named("img")[0]["alt"] == BAD


def test_nothing_is_loaded_from_elsewhere():
    text = full_page()
    page = Elements(text)
    policy = page.named("meta")[1]
    assert policy["http-equiv"] == "Content-Security-Policy"
    assert policy["content"] == (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    )
    for attributes in page.named("img"):
        assert attributes["src"].startswith("data:image/")
    for attributes in page.named("source"):
        assert attributes["srcset"].startswith("data:image/")
    assert not re.search(r"url\(|@import|https?://", text)


def test_numbers_are_formatted_aligned_and_the_best_marked():
    text = render_page("t", lead="l", sections=[Section("s", table=table())])
    cells = re.findall(r'<td class="(number[^"]*)">([^<]*)</td>', text)
    assert cells == [
        ("number best", "88.4%"), ("number", "12.3"), ("number", "3,068"),
        ("number", "50.0%"), ("number best", "4.1"), ("number", "–"),
        ("number best", "88.4%"), ("number", "5.0"), ("number", "12"),
    ]  # fmt: skip
    assert re.findall(r'<th scope="col"([^>]*)>', text) == [
        "",
        ' class="number"',
        ' class="number"',
        ' class="number"',
    ]


def test_a_column_aligns_by_any_of_its_numbers_and_a_lone_number_is_not_best():
    columns = [Column("model"), Column("top-1", ".1%", "max")]
    text = render_page(
        "t", lead="l", sections=[Section("s", table=Table(columns, [["a", None], ["b", 0.25]]))]
    )
    assert '<th scope="col" class="number">top-1</th>' in text
    assert "best" not in text[text.index("<main>") :]


def test_an_uneven_table_is_refused():
    uneven = Table([Column("a"), Column("b")], [["x"]])
    with pytest.raises(ValueError, match="a table of 2 columns has the row"):
        render_page("t", lead="l", sections=[Section("s", table=uneven)])


def test_a_picture_must_be_an_image():
    with pytest.raises(ValueError, match="SVG, PNG, JPEG or WebP"):
        render_page("t", lead="l", sections=[Section("s", pictures=[Picture(b"GIF89a", "alt")])])


def test_a_drawing_has_a_version_for_the_phone():
    drawn = picture(partial(accuracy_bars, ["a", "b"], {"kNN": [0.5, 0.25]}), alt="accuracies")
    widths = [float(re.search(rb'width="([\d.]+)pt"', image)[1]) for image in (drawn.image, drawn.narrow)]
    assert widths == pytest.approx([7.2 * 72, 3.7 * 72])


def test_a_tiny_image_keeps_its_pixels_and_a_large_one_shrinks():
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    small = thumbnail(Image.fromarray(pixels), "digit")
    assert small.is_pixelated
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(small.image))), pixels)
    large = thumbnail(Image.new("L", (600, 300)), "photo")
    assert Image.open(io.BytesIO(large.image)).size == (192, 96)
    text = render_page("t", lead="l", sections=[Section("s", gallery=[small, large])])
    sources = re.findall(r'<img src="data:image/(\w+);base64,([^"]+)" alt=""( class="pixelated")?>', text)
    assert [(kind, bool(pixelated)) for kind, _, pixelated in sources] == [("png", True), ("jpeg", False)]
    assert base64.b64decode(sources[0][1]) == small.image


def test_the_page_appears_whole_and_replaces_an_earlier_one(tmp_path):
    path = tmp_path / "report.html"
    write_page(path, "first", lead="l", sections=[])
    assert write_page(path, "second", lead="größer", sections=[]) == path
    assert "<title>second</title>" in path.read_text(encoding="utf-8")
    assert [one.name for one in tmp_path.iterdir()] == ["report.html"]


def test_an_unwritable_page_says_where(tmp_path):
    with pytest.raises(OutputError, match=r"cannot write the page .*missing"):
        write_page(tmp_path / "missing" / "report.html", "t", lead="l", sections=[])


def test_a_command_keeps_its_words_and_lines():
    text = render_page("t", lead="l", sections=[Section("s", code="fdkit demo \\\n  --seed 3")])
    page = Elements(text)
    assert "fdkit demo \\\n  --seed 3" in "".join(page.text)


@pytest.mark.parametrize("count", [8, 9])
def test_a_long_page_begins_with_links_to_its_sections(count):
    page = Elements(render_page("t", lead="", sections=[Section(f"part {n} {BAD}") for n in range(count)]))
    targets = [str(link["href"]).removeprefix("#") for link in page.named("a")]
    sections = [section["id"] for section in page.named("section")]
    assert targets == (sections if count > 8 else [])
    assert not page.open
