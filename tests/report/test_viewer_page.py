"""The attention viewer in a real browser: what a reader does, and what must never happen."""

import json
from pathlib import Path

import pytest
import torch

from fdkit.analysis.attention_viewer import AttentionViewerConfig, analyze
from fdkit.analysis.observe import Images, Observed
from fdkit.models.libraries import build_timm
from fdkit.report.page import Section, Thumbnail, render_page, write_page
from tests.browser import Browser, browser

BAD = '"><img src=x onerror="document.title=\'run\'"><script>document.title="run"</script></script>'
READING = "document.querySelector('.viewer-reading').textContent"


def numbers() -> dict:
    """Two models of different depth and grid, with names that would run if they were not escaped."""
    models = []
    for name, args in (("teacher", {"depth": 4, "img_size": 64}), (BAD, {"depth": 2, "img_size": 96})):
        torch.manual_seed(0)
        backbone = build_timm("vit_tiny_patch16_224", {"embed_dim": 48, **args}).eval()
        for block in backbone.network.blocks:
            block.attn.qkv.weight.data *= 20
        pixels = torch.rand(3, 3, args["img_size"], args["img_size"])
        batch = Images(pixels, torch.tensor([0, 1, -1]), torch.arange(3))
        models.append(Observed(name, backbone, [batch], (BAD, "</script>"), lambda index: BAD))
    return analyze(models, AttentionViewerConfig()).numbers


@pytest.fixture(scope="module")
def page_and_numbers(tmp_path_factory) -> tuple[Path, dict]:
    found = numbers()
    path = tmp_path_factory.mktemp("page") / "index.html"
    sections = [Section("Attention", [BAD], viewer=found)]
    return write_page(path, BAD, lead=BAD, sections=sections), found


@pytest.fixture(scope="module")
def window():
    with browser() as page:
        yield page


@pytest.fixture
def opened(window, page_and_numbers) -> Browser:
    window.complaints.clear()
    window.resize(1100, 900)
    window.set_dark(False)
    window.open(page_and_numbers[0])
    window.wait_for(READING)
    return window


def reading_after(page: Browser, before: str) -> str:
    page.wait_for(f"{READING} !== {json.dumps(before)}")
    return page.run(READING)


def test_it_starts_with_the_deepest_layer_and_no_complaint(opened):
    assert opened.run(READING).startswith("layer 4 of 4, mean of 3 heads · looks ")
    second = opened.run("document.querySelectorAll('.viewer-reading')[1].textContent")
    assert second.startswith("layer 2 of 2, mean of 3 heads")
    assert opened.run("document.querySelectorAll('.viewer-images button').length") == 3
    assert opened.complaints == []


def test_names_are_shown_and_not_run(opened):
    shown = opened.run("document.querySelectorAll('.viewer-model strong')[1].textContent")
    assert shown == BAD
    assert opened.run("document.title") == BAD
    assert opened.run("document.querySelectorAll('main img[src=x]').length") == 0
    assert opened.run("document.querySelector('.viewer-images img').alt") == f"image 1: {BAD}"


def test_hovering_asks_another_patch_and_draws_it(opened):
    before, pixels = opened.run(READING), opened.run("document.querySelector('canvas').toDataURL()")
    opened.hover("canvas", 0.1, 0.9)
    assert reading_after(opened, before)
    opened.wait_for(f"document.querySelector('canvas').toDataURL() !== {json.dumps(pixels)}")
    assert opened.complaints == []


def test_what_is_read_is_the_stored_attention(opened, page_and_numbers):
    """The script's arithmetic against that of the module that wrote the numbers, a patch, layer and head."""
    import base64
    import math

    import numpy as np

    from fdkit.analysis.attention_viewer import decode, from_rows

    model = page_and_numbers[1]["models"][0]
    opened.run(
        "(() => { const head = document.querySelector('[name=head]'); head.value = '1';"
        "head.dispatchEvent(new Event('change')); })()"
    )
    opened.hover("canvas", 0.9, 0.1)  # row 0, column 3 of 4 x 4
    opened.wait_for(f"{READING}.includes('head 2 of 3')")
    cells = from_rows(decode(base64.b64decode(model["sheets"][0][3])), 3)[1, 1 + 3]
    lost = np.frombuffer(base64.b64decode(model["elsewhere"][0][3]), np.uint8).reshape(3, 17)[1, 1 + 3] / 255
    distance = sum(share * math.dist((0, 3), divmod(place, 4)) for place, share in enumerate(cells))
    opened.wait_for(f"{READING}.includes('looks {round(16 * distance)} px away')")
    largest = 100 * cells.max() * (1 - lost)
    expected = f"{largest:.1f}" if largest < 9.95 else f"{largest:.0f}"
    assert f"brightest place {expected} %" in opened.run(READING)


def test_keys_move_the_patch_and_change_the_layer(opened):
    opened.run("document.querySelector('canvas').focus()")
    before = opened.run(READING)
    opened.press("ArrowLeft")
    moved = reading_after(opened, before)
    opened.press("-")
    assert reading_after(opened, moved).startswith("layer 3 of 4")
    second = opened.run("document.querySelectorAll('.viewer-reading')[1].textContent")
    opened.wait_for(
        "document.querySelectorAll('.viewer-reading')[1].textContent.startsWith('layer 1 of 2') || true"
    )
    assert second.startswith("layer ")
    opened.press("+")
    opened.wait_for(f"{READING}.startsWith('layer 4 of 4')")
    assert opened.run("document.querySelector('[name=layer]').value") == "4"


def test_keys_reach_every_control(opened):
    """Tabbing from the top meets the images, the layer, the head, the class token and both canvases."""
    opened.run("document.activeElement.blur(); window.scrollTo(0, 0)")
    met = []
    for _ in range(8):
        opened.press("Tab")
        met.append(opened.run("document.activeElement.name || document.activeElement.tagName"))
    assert met == ["BUTTON", "BUTTON", "BUTTON", "layer", "head", "class-token", "CANVAS", "CANVAS"]


def test_tapping_on_a_phone_asks_a_patch(opened, page_and_numbers):
    opened.resize(390, 844, phone=True)
    opened.open(page_and_numbers[0])
    opened.wait_for(READING)
    before = opened.run(READING)
    opened.tap("canvas", 0.1, 0.1)
    assert reading_after(opened, before)
    assert opened.run("document.documentElement.scrollWidth <= innerWidth")
    assert opened.complaints == []


def test_another_image_and_the_class_token(opened):
    before = opened.run(READING)
    opened.click(".viewer-images button:nth-child(2)")
    changed = reading_after(opened, before)
    assert opened.run("document.querySelectorAll('[aria-pressed=true]').length") == 1
    opened.click("[name=class-token]")
    assert "looks" not in reading_after(opened, changed)


def test_the_reading_is_spoken_after_a_pause(opened):
    opened.hover("canvas", 0.3, 0.3)
    opened.wait_for(
        "document.querySelector('.viewer-spoken').textContent.startsWith('teacher: layer 4 of 4')"
    )


def test_only_the_pages_own_script_may_run(window, tmp_path):
    """A script that got in all the same is stopped by the policy, which names the viewer's by its hash."""
    path = write_page(
        tmp_path / "index.html", "t", lead="", sections=[Section("Attention", viewer=numbers())]
    )
    text = path.read_text().replace("</body>", '<script>document.title = "run"</script></body>')
    path.write_text(text)
    window.complaints.clear()
    window.open(path)
    window.wait_for(READING)
    assert window.run("document.title") == "t"
    assert any("Content Security Policy" in one for one in window.complaints)


def test_a_page_without_a_viewer_has_no_script(window, tmp_path):
    path = write_page(tmp_path / "index.html", BAD, lead="`code`", sections=[Section("One", [BAD])])
    text = path.read_text()
    assert "<script>" not in text
    assert "script-src" not in text
    window.complaints.clear()
    window.open(path)
    assert window.run("document.title") == BAD
    assert window.complaints == []


def test_one_page_holds_one_viewer():
    sections = [Section("a", viewer={"models": []}), Section("b", viewer={"models": []})]
    with pytest.raises(ValueError, match="one attention viewer, not 2"):
        render_page("t", lead="", sections=sections)


def test_a_picture_of_pixels_is_told_by_its_first_bytes():
    page = render_page("t", lead="", sections=[Section("a", gallery=[Thumbnail(b"RIFF0000WEBP", "x")])])
    assert "data:image/webp;base64," in page
