"""`fdkit report` as one types it: runs, models and folders of results, whole or with parts missing."""

import json
import re
import shutil
import time
from pathlib import Path

import pytest

import fdkit
from fdkit.cli import main
from fdkit.errors import ConfigError, OutputError
from fdkit.models.libraries import build_timm, save_backbone
from fdkit.report.page import MAX_PAGE_MEGABYTES
from tests.browser import browser

QUICK = ("attention-viewer", "attention-distance", "cka", "spectrum")
SMALL = {"num_images": 8, "batch_size": 8, "device": "cpu", "analyses": QUICK, "evaluators": ("knn",)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A finished distillation of a few steps, with its checkpoints."""
    root = tmp_path_factory.mktemp("runs")
    fdkit.distill(
        "demo",
        "demo",
        output=root / "student",
        device="cpu",
        train={
            "epochs": 0.25,
            "batch_size": 128,
            "log_every_steps": 2,
            "save_every_steps": 4,
            "keep_checkpoints": 5,
        },
        optim={"warmup_epochs": 0.1},
    )
    return root


@pytest.fixture(scope="module")
def whole(runs, tmp_path_factory) -> tuple[Path, dict]:
    """A report of that run with everything measured."""
    folder = tmp_path_factory.mktemp("report")
    return folder, fdkit.make_report(runs / "student", "demo", output=folder, **SMALL)


def headings(page: Path) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", page.read_text())


def test_a_run_stands_beside_its_teacher_with_everything_on_the_page(whole):
    folder, numbers = whole
    page = Path(numbers["page"])
    assert page == folder / "index.html"
    assert headings(page) == [
        "What was run",
        "Training",
        "Accuracy",
        "Attention viewer",
        "Attention distance",
        "CKA",
        "Spectrum",
        "Make it again",
    ]
    assert numbers["left_out"] == []
    assert numbers["evaluations"] == 2
    one = json.loads((folder / "results" / "knn-student.json").read_text())
    assert one["command_line"].startswith("fdkit evaluate knn ")
    assert "--batch-size 8" in one["command_line"]
    found = json.loads((folder / "results" / "attention-distance.json").read_text())
    assert [model["name"] for model in found["models"]] == ["teacher", "student"]
    assert found["command"]["split"] == "test"
    text = page.read_text()
    assert "Apache-2.0" in text
    assert "on the same test images, resampled together" in text
    for suffix in ("svg", "png", "csv", "json"):
        assert (folder / "results" / f"cka.{suffix}").is_file()


def test_the_commands_on_the_page_give_the_same_numbers(whole, tmp_path):
    folder, _ = whole
    for name in ("attention-distance", "spectrum"):
        found = json.loads((folder / "results" / f"{name}.json").read_text())
        line = found["command_line"]
        import shlex

        words = shlex.split(line)
        assert words[:3] == ["fdkit", "analyze", name]
        with pytest.raises(SystemExit) as ended:
            main([*words[1:], "--output", str(tmp_path), "--device", "cpu"])
        assert not ended.value.code
        again = json.loads((tmp_path / f"{name}.json").read_text())
        assert again["models"] == found["models"]


def test_what_was_measured_is_shown_again_without_measuring(whole, runs, tmp_path):
    folder, _ = whole
    started = time.perf_counter()
    numbers = fdkit.make_report([runs / "student", folder], output=tmp_path)
    assert time.perf_counter() - started < 60  # the benchmark says how long it takes on a quiet machine
    assert numbers["analyses"] == sorted(QUICK)
    assert numbers["evaluations"] == 2
    first, second = (headings(path / "index.html") for path in (folder, tmp_path))
    assert first == second


def test_the_page_opens_without_complaint_and_fits_a_phone(whole):
    page = Path(whole[1]["page"])
    assert page.stat().st_size < MAX_PAGE_MEGABYTES * 1e6
    with browser() as window:
        for width, is_phone in ((1100, False), (390, True)):
            window.resize(width, 844, phone=is_phone)
            window.open(page)
            window.wait_for("document.querySelector('.viewer-reading').textContent")
            assert window.run("document.documentElement.scrollWidth <= innerWidth")
            assert window.run("[...document.images].every((one) => one.complete && one.naturalWidth > 0)")
        assert window.complaints == []


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("run.json", "what was run and how it ended"),
        ("metrics.jsonl", "the training curves"),
        ("config.yaml", "the configuration"),
        ("student.safetensors", "the student&#39;s weights"),
    ],
)
def test_a_folder_with_missing_parts_shows_what_is_there_and_says_what_is_not(runs, tmp_path, file, words):
    run = shutil.copytree(runs / "student", tmp_path / "run")
    (run / file).unlink()
    numbers = fdkit.make_report(run, output=tmp_path / "report")
    page = Path(numbers["page"])
    text = page.read_text()
    assert "What is missing" in headings(page)
    assert words in text
    assert "What was run" in headings(page)


def test_an_unfinished_run_is_shown_by_its_newest_checkpoint(runs, tmp_path):
    run = shutil.copytree(runs / "student", tmp_path / "run")
    (run / "student.safetensors").unlink()
    fields = SMALL | {"analyses": ("spectrum",), "evaluators": ()}
    fdkit.make_report(run, "demo", output=tmp_path / "report", teacher=False, **fields)
    found = json.loads((tmp_path / "report" / "results" / "spectrum.json").read_text())
    assert [model["name"] for model in found["models"]] == ["run"]
    assert "checkpoints/step-" in found["command_line"]


def test_a_damaged_result_is_told_and_keeps_nothing_else_away(whole, tmp_path):
    folder = shutil.copytree(whole[0], tmp_path / "results")
    (folder / "results" / "cka.json").write_text('{"analysis": "cka", "models": [{}]}')
    (folder / "results" / "spectrum.json").write_text("{")
    numbers = fdkit.make_report(folder, output=tmp_path / "report")
    page = Path(numbers["page"])
    assert headings(page)[:3] == ["Accuracy", "Attention viewer", "Attention distance"]
    assert "CKA: its numbers cannot be shown" in page.read_text()
    assert "spectrum.json: cannot be read" in page.read_text()


def test_a_model_whose_attention_cannot_be_read_is_left_out_by_name(tmp_path):
    fields = SMALL | {"analyses": ("attention-distance", "spectrum"), "evaluators": (), "pretrained": False}
    models = ["timm:resnet18", "timm:vit_tiny_patch16_224"]
    numbers = fdkit.make_report(
        models, "demo", output=tmp_path, names=("cnn", "vit"), image_size=64, **fields
    )
    assert numbers["analyses"] == ["attention-distance", "spectrum"]
    assert len(numbers["left_out"]) == 1
    assert numbers["left_out"][0].startswith("attention-distance of cnn: ResNet has no attention to observe")
    found = json.loads((tmp_path / "results" / "attention-distance.json").read_text())
    assert [model["name"] for model in found["models"]] == ["vit"]
    assert "ResNet has no attention" in Path(numbers["page"]).read_text()


def test_a_saved_model_is_a_model_and_no_folder_of_results(runs, tmp_path):
    for file in ("student.safetensors", "student.json"):
        (tmp_path / "saved").mkdir(exist_ok=True)
        shutil.copy(runs / "student" / file, tmp_path / "saved")
    fields = SMALL | {"analyses": ("spectrum", "distillation-residual"), "evaluators": ()}
    numbers = fdkit.make_report(["demo", tmp_path / "saved"], "demo", output=tmp_path / "report", **fields)
    assert numbers["analyses"] == ["distillation-residual", "spectrum"]
    found = json.loads((tmp_path / "report" / "results" / "distillation-residual.json").read_text())
    assert found["command_line"].startswith("fdkit analyze distillation-residual demo ")  # its teacher, too
    text = Path(numbers["page"]).read_text()
    assert "<title>demo and saved</title>" in text
    # everything was measured by one command, and that is what the page says
    assert [text.count(f"fdkit</span> <span>{word}</span>") for word in ("report", "analyze")] == [1, 0]


def test_models_of_different_input_sizes_stand_in_percent_of_the_image(tmp_path):
    (tmp_path / "larger").mkdir()
    save_backbone(build_timm("vit_tiny_patch16_224", {"depth": 2, "img_size": 64}), tmp_path / "larger")
    fields = SMALL | {"analyses": ("attention-distance",), "evaluators": ()}
    numbers = fdkit.make_report(["demo", tmp_path / "larger"], "demo", output=tmp_path / "report", **fields)
    assert numbers["left_out"] == []
    found = json.loads((tmp_path / "report" / "results" / "attention-distance.json").read_text())
    assert (found["shown_unit"], len(found["models"])) == ("image", 2)


def test_labels_with_html_are_shown_and_not_run(tmp_path):
    from PIL import Image

    for number, label in enumerate(("<img src=x onerror=alert(1)>", "<b>dog")):
        for place in range(6):
            path = tmp_path / "photos" / label / f"{place}<script>.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 40), (120 * number, 10 * place, 60)).save(path)
    fields = SMALL | {
        "analyses": ("attention-viewer", "layer-knn"),
        "evaluators": (),
        "num_images": 12,
        "split": "all",
    }
    numbers = fdkit.make_report("demo", tmp_path / "photos", output=tmp_path / "report", **fields)
    text = Path(numbers["page"]).read_text()
    assert "<img src=x" not in text
    assert "<b>dog" not in text
    with browser() as window:
        window.open(Path(numbers["page"]))
        window.wait_for("document.querySelector('.viewer-images img')")
        shown = window.run(
            "[...document.querySelectorAll('.viewer-images img')].map((one) => one.alt).join()"
        )
        assert ": <b>dog" in shown
        assert "<img src=x onerror=alert(1)>" in shown
        assert window.complaints == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "nothing is named"),
        (("demo",), "no run folder and no folder of results"),
        (("demo", "--data", "demo", "--analyses", "attention-distanc"), "did you mean attention-distance"),
        (("demo", "--data", "demo", "--evaluators", "knnn"), "did you mean knn"),
        (("demo", "--data", "demo", "--names", "a", "b"), "2 names for 1 models"),
        (("demo", "demo", "--data", "demo"), "two models are called demo"),
        (("run", "--analyses", "cka"), "analyses tells how models are measured, and without images none is"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_loaded(words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["report", *words])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_an_empty_folder_has_nothing_to_report(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "other.json").write_text("{}")
    with pytest.raises(ConfigError, match="there is nothing to report"):
        fdkit.make_report(tmp_path / "run", output=tmp_path / "out")


def test_a_page_that_is_there_is_kept(whole):
    with pytest.raises(OutputError, match=r"index\.html: is there already"):
        fdkit.make_report(whole[0], output=whole[0])


def test_what_is_followed_along_a_run_is_on_its_page(runs, tmp_path):
    run = shutil.copytree(runs / "student", tmp_path / "run")
    fields = {"num_images": 8, "batch_size": 8, "device": "cpu", "output": run / "results"}
    numbers = fdkit.analyze("trajectory", run, "demo", of=("attention-distance", "spectrum"), **fields)
    assert list(numbers) == ["trajectory-attention-distance", "trajectory-spectrum"]
    steps = numbers["trajectory-spectrum"]["models"][0]["steps"]
    assert len(steps) >= 2
    assert steps == sorted(steps)
    page = Path(fdkit.make_report(run, output=tmp_path / "report")["page"])
    assert {"Along training: attention distance", "Along training: spectrum"} <= set(headings(page))
    with pytest.raises(ConfigError, match="of: spectrun is no analysis"):
        fdkit.analyze("trajectory", run, "demo", of=("spectrun",), **fields)
