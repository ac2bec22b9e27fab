"""`fdkit evaluate` as typed: every evaluator of vectors, protocols by name, the cache, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import fdkit
from fdkit.cli import main

VECTORS = ("knn", "linear", "logistic", "low-shot", "prototype", "retrieval")
SMALL: dict[str, tuple[str, ...]] = {
    "knn": ("--k", "3,5"),
    "linear": ("--epochs", "5"),
    "logistic": ("--c", "0.01,0.1"),
    "low-shot": ("--shots", "2", "--fraction", "0.5", "--repeats", "2"),
    "retrieval": ("--k", "1,3"),
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 4)):
        for number, name in enumerate(("ant", "bee", "cat")):
            (folder / split / name).mkdir(parents=True)
            for image in range(count):
                pixels = random.integers(128, size=(32, 32, 3), dtype=np.uint8)
                pixels[..., number] += 100
                Image.fromarray(pixels).save(folder / split / name / f"{image}.png")
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FDKIT_CACHE", str(tmp_path / "cache"))


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", *arguments])
    return int(stop.value.code or 0)


def numbers(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert run(*arguments, "--json") == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("name", VECTORS)
def test_an_evaluator_says_its_numbers_twice_alike(
    name: str, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (name, "demo", "--data", str(photos), "--device", "cpu", *SMALL.get(name, ()))
    first = numbers(capsys, *arguments)
    again = numbers(capsys, *arguments, "--cache", "none")
    assert [first.pop(key) != again.pop(key) for key in ("command", "command_line")] == [True, True]
    assert first == again
    assert run(*arguments) == 0
    table = capsys.readouterr().out
    headline = first.get("top1", first.get("map"))
    assert f"{100 * headline:.2f} %" in table


def test_a_protocol_names_its_evaluator_and_stands_with_the_result(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("demo", "--data", str(photos), "--device", "cpu", "--protocol", "dino-knn")
    assert run(*arguments) == 2, "k 200 is more than there are images, and a protocol does not bend"
    assert "only 24 training images" in capsys.readouterr().err
    assert run("linear", *arguments) == 2
    assert "protocol dino-knn is of the evaluator knn, not linear" in capsys.readouterr().err
    assert run("knn", *arguments, "--k", "3") == 2
    assert "protocol dino-knn measures with k [20, 10, 100, 200], and [3] is given" in capsys.readouterr().err


def test_a_protocol_is_printed_with_its_departures(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("demo", "--data", "digits", "--device", "cpu", "--protocol", "dino-knn") == 0
    printed = capsys.readouterr().out
    assert "protocol dino-knn, version 1: Caron et al. 2021" in printed
    assert "differs: the headline is k = 20" in printed
    found = fdkit.evaluate("knn", "demo", "digits", protocol="dino-knn", device="cpu")
    assert found["named_protocol"]["fields"]["k"] == [20, 10, 100, 200]
    assert [row["k"] for row in found["results"]] == [20, 10, 100, 200]
    assert (found["named_protocol"]["published"], found["named_protocol"]["difference"]) == (None, None)
    assert found["command"]["protocol"] == "dino-knn"


def test_tokens_and_layers_are_read_as_asked(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("knn", "demo", "--data", str(photos), "--device", "cpu", "--k", "3")
    found = numbers(capsys, *arguments, "--pooling", "cls+patches", "--layers", "2")
    assert (found["test"]["pooling"], found["test"]["layers"]) == ("cls+patches", 2)
    assert run(*arguments, "--pooling", "clss") == 2
    assert "'clss' is no kind of token" in capsys.readouterr().err
    assert run(*arguments, "--layers", "99") == 2
    assert "the last 99 layers are asked for" in capsys.readouterr().err


def test_the_result_of_a_run_folder_is_kept_in_it(photos: Path, tmp_path: Path) -> None:
    run_folder = fdkit.distill(
        "demo",
        photos,
        output=tmp_path / "run",
        device="cpu",
        train={"epochs": 1, "batch_size": 12},
        optim={"warmup_epochs": 0},
        loader={"workers": 0},
    )
    found = fdkit.evaluate("prototype", run_folder, photos, device="cpu")
    kept = json.loads((tmp_path / "run/results/prototype-test.json").read_text())
    assert kept["top1"] == found["top1"]


def test_one_class_is_nothing_to_tell_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "test"):
        (tmp_path / "one" / split / "ant").mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (32, 32), (number, 0, 0)).save(
                tmp_path / "one" / split / "ant" / f"{number}.png"
            )
    for name in ("linear", "logistic", "prototype"):
        assert run(name, "demo", "--data", str(tmp_path / "one"), "--device", "cpu") == 3
        said = capsys.readouterr().err
        assert "of one class" in said or "are of class ant" in said
