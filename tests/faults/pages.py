"""Names that are code to whoever reads them carelessly, through every page, picture, card and line that is written."""

import base64
import json
import random
import re
import shutil
from collections import Counter
from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

from faults.jobs import STUDENT
from faults.kills import finish, last_words, preload
from faults.processes import QUICK, photos

CORPUS = (
    "<script>document.title='run'</script>", "</svg><script>document.title='run'</script>",
    "</script></style></title>", "<img src=x onerror=\"document.title='run'\">",
    "' onmouseover='document.title=1' x='", '" autofocus onfocus="x()', "{{ 7*7 }}", "{% raw %}", "${7*7}",
    "javascript:document.title='run'", "[click](javascript:alert(1))", "![](https://example.invalid/x.png)",
    "<https://example.invalid>", "```\n# heading\n```", "\n\n## heading\n\n| a | b |\n|---|---|\n",
    "--><script>x()</script><!--", "]]><script>x()</script>", "&lt;b&gt;&#60;i&#62;", "\x1b[31mred\x1b[0m\x07",
    "\u202eevil", "$\\frac{$", "$x^2$ and $y$", "%s %(name)s {0}", "a|b|c", "**bold** _it_ ~~no~~",
    "`code` ``more``", "\\", "\r\nSet-Cookie: x", "[bold red]rich[/bold red]", "\x00\x01", "\udcff",
)  # fmt: skip
PLAIN = "plain words"
STRUCTURAL = {
    "analysis", "evaluator", "attention", "state", "query", "fill", "picture", "pictures", "image", "heads", "values",
    "sheets", "elsewhere", "shown_unit", "unit", "whitening", "shown_whitening", "pooling", "of", "fingerprint",
}  # fmt: skip
"""Keys whose texts are no free texts: a choice of few words, or data."""
ANALYSES = ("attention-viewer", "cka")
SVG_TAGS = {
    "svg", "g", "path", "defs", "use", "rect", "clipPath", "style", "image", "metadata", "RDF", "Work", "title", "type",
    "format", "creator", "Agent", "date", "pattern", "linearGradient", "stop", "filter", "text", "tspan",
}  # fmt: skip


class _Elements(HTMLParser):
    """Counts elements by name and attributes' names, and keeps what they point to."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: Counter[tuple[str, ...]] = Counter()
        self.targets: list[str] = []
        self.handlers: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in {
            "code",
            "span",
        }:  # what stands between backticks is set as code, a command's words as spans
            self.found[(tag, *sorted(name for name, _ in attributes))] += 1
        for name, value in attributes:
            if name in {"href", "src", "srcset", "action", "formaction", "data"}:
                self.targets.append(value or "")
            if name.startswith("on"):
                self.handlers.append(f"<{tag} {name}>")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)


def wrong_in_page(page: str, plain: str | None = None) -> list[str]:
    """What a text made of a page; plain: the same page with harmless texts."""
    elements = _Elements(page)
    wrong = [f"{handler} is there" for handler in elements.handlers]
    wrong += [
        f"points to {target[:60]}" for target in elements.targets if not re.match(r"#|data:image/", target)
    ]
    if plain is not None:
        expected = _Elements(plain).found
        wrong += [f"{count}x {key} are too many" for key, count in (elements.found - expected).items()]
        wrong += [f"{count}x {key} are missing" for key, count in (expected - elements.found).items()]
    for target in elements.targets:
        if target.startswith("data:image/svg+xml"):
            wrong += wrong_in_svg(base64.b64decode(target.partition(",")[2]))
    return wrong


def wrong_in_svg(image: bytes) -> list[str]:
    """What would run, load or lead away in a drawing that is opened by itself."""
    try:
        root = ElementTree.fromstring(image)  # of our own making
    except ElementTree.ParseError as error:
        return [f"no XML: {error}"]
    wrong = []
    for element in root.iter():
        tag = element.tag.rpartition("}")[2]
        if tag not in SVG_TAGS:
            wrong.append(f"<{tag}> in an SVG")
        for name, value in element.attrib.items():
            short = name.rpartition("}")[2]
            is_local = re.match(
                r"#|data:image/png|http://(purl|www\.w3)\.org|https?://matplotlib\.org", value
            )
            if short.startswith("on") or (short == "href" and not is_local):
                wrong.append(f'<{tag} {short}="{value[:60]}"> in an SVG')
    return wrong


def wrong_in_card(card: str, plain: str) -> list[str]:
    """What a text made of a model card in Markdown."""
    from markdown_it import MarkdownIt

    def tokens(text: str) -> Counter[str]:
        parsed = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text)
        flat = [part for token in parsed for part in [token, *(token.children or [])]]
        return Counter(part.type for part in flat if part.type not in {"text", "softbreak", "text_special"})

    found, expected = tokens(card), tokens(plain)
    wrong = [f"{count}x {name} in the card are too many" for name, count in (found - expected).items()]
    wrong += [f"{count}x {name} in the card are missing" for name, count in (expected - found).items()]
    return wrong + ["the card has control characters"] * bool(re.search(r"[\x00-\x08\x0b-\x1f\x7f]", card))


def infected(value: Any, text: str, key: str = "") -> Any:
    """Plain JSON with the text before every free text in it."""
    if isinstance(value, dict):
        return {name: infected(one, text, name) for name, one in value.items()}
    if isinstance(value, list):
        return [infected(one, text, key) for one in value]
    return f"{text} {value}" if isinstance(value, str) and key not in STRUCTURAL else value


def make_run(
    folder: Path, *, name: str = "run", classes: Iterable[str] = ("cats", "dogs"), file: str = ""
) -> list[str]:
    """A distilled student, measured and reported on, below a folder; what was not as it should be.

    name: of the run folder; file: stands before the names of the images.
    """
    preload()
    data = folder / f"photos {name}"
    for split in ("train", "test"):
        for number, one in enumerate(classes):
            photos(data / split / one, count=10, seed=number + 10 * (split == "test"))
            for path in sorted((data / split / one).iterdir()) if file else ():
                path.rename(path.with_name(f"{file}{path.name}"))
    run, page = str(folder / name), str(folder / f"page {name}")
    small = ["--device", "cpu", "--loader.workers", "0"]
    commands = [
        ["distill", "--teacher", "demo", "--data", str(data), *STUDENT, *QUICK, "--output", run],
        ["evaluate", "knn", run, "--data", str(data), "--k", "2", "--cache", "none", *small,
         "--output", f"{run}/results/knn-test.json"],
        ["report", run, "--data", str(data), "--num-images", "4", "--analyses", *ANALYSES, "--evaluators", "prototype",
         *small, "--output", page],
    ]  # fmt: skip
    log = folder / "log"
    code = finish(commands, log)
    return [f"exit code {code}: {last_words(log)}"] if code else []


def _report(source: Path, place: Path, text: str) -> tuple[str, str]:
    """The page and the model card of a run all of whose texts begin with this one."""
    from fdkit.commands.report import make_report
    from fdkit.training.export import model_card

    name = re.sub(r"[/\x00\ud800]", "", text)[:80].strip() or "x"
    run = place / name
    (run / "results").mkdir(parents=True)
    for file in ("config.yaml", "metrics.jsonl"):
        shutil.copy(source / "run" / file, run / file)
    files = [
        source / "run" / "run.json",
        *(source / "run/results").glob("*.json"),
        *(source / "page run/results").glob("*.json"),
    ]
    for file in files:
        where = run if file.name == "run.json" else run / "results"
        (where / file.name).write_text(json.dumps(infected(json.loads(file.read_text()), text)))
    page = make_report([run], output=place / "page", overwrite=True)["page"]
    facts = json.loads((run / "run.json").read_text())
    return Path(page).read_text(), model_card(*_finished(facts, text))


def _finished(facts: dict[str, Any], text: str) -> tuple[Any, Any]:
    """What the model card is made from."""
    import yaml
    from torch import nn

    student = SimpleNamespace(
        recipe={"architecture": f"{text} vit"}, network=nn.Linear(1, 1), image_size=16, patch_size=4, embed_dim=8,
        num_prefix_tokens=1, preprocessing=SimpleNamespace(mean=(0.5,), std=(0.5,)),
    )  # fmt: skip
    config = yaml.safe_dump({"data": f"{text} photos", "output": text}, allow_unicode=True)
    run = SimpleNamespace(facts=facts, metrics=lambda: [{"step": 1, "loss": 0.5}], config_yaml=config)
    return SimpleNamespace(exported=student), run


def open_pages(folder: Path, *, amount: int, seed: int) -> dict[str, Any]:
    """Write the report and the card of a run `amount` times, each time with another hostile text before all that is
    recorded: parsed, they have the elements and attributes that harmless texts give, and nothing else."""
    draw = random.Random(seed)
    if failures := make_run(folder / "made"):
        return {"tried": 0, "failures": failures}
    plain_page, plain_card = _report(folder / "made", folder / "plain", PLAIN)
    for number in range(amount):
        text = CORPUS[number] if number < len(CORPUS) else "".join(draw.sample(CORPUS, 3))
        place = folder / str(number)
        try:
            page, card = _report(folder / "made", place, text)
            wrong = wrong_in_page(page, plain_page) + wrong_in_card(card, plain_card)
        except Exception as error:
            wrong = [f"{type(error).__name__}: {error}"]
        failures += [f"{text!r}: {sentence}" for sentence in wrong[:3]]
        shutil.rmtree(place, ignore_errors=True)
    return {"tried": amount, "failures": failures}
