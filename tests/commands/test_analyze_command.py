"""`fdkit analyze` as one types it, and the command line that a result remembers."""

import json

import pytest

import fdkit
from fdkit.analysis import observe
from fdkit.cli import main
from fdkit.commands._analyses import ATTENTION, SUFFIXES, analyses, own_config, perform
from fdkit.commands._command import resolve
from fdkit.commands._flags import command_line, parse_flags
from fdkit.commands.analyze import config_class, members
from fdkit.config import validate
from fdkit.errors import ConfigError, OutputError
from fdkit.teachers.files import sha256_of
from fdkit.teachers.model import DEMO_FOLDER

SMALL = {"num_images": 6, "batch_size": 3, "device": "cpu"}


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main([*words])
    return int(ended.value.code or 0)


def test_a_group_makes_every_member_from_one_pass(tmp_path, monkeypatch):
    passes = []
    own = observe.observe_attention

    def counted(model, images, visit):
        passes.append(len(images))
        return own(model, images, visit)

    monkeypatch.setattr("fdkit.analysis._attention.observe_attention", counted)
    numbers = fdkit.analyze("attention", "demo", data="demo", output=tmp_path, **SMALL)
    assert passes == [3, 3]  # two batches, once, for all four
    assert list(numbers) == list(ATTENTION)
    for name in ATTENTION:
        assert all((tmp_path / f"{name}.{suffix}").stat().st_size > 0 for suffix in SUFFIXES)
        alone = fdkit.analyze(name, "demo", data="demo", output=tmp_path / "alone", overwrite=True, **SMALL)
        kept = {"analysis", "models", "unit"}
        assert {key: alone[key] for key in kept & alone.keys()} == {
            key: numbers[name][key] for key in kept & alone.keys()
        }


def test_names_are_what_figures_call_the_models(tmp_path):
    numbers = fdkit.analyze(
        "attention-distance",
        ["demo", "demo"],
        data="demo",
        output=tmp_path,
        names=("teacher", "same"),
        **SMALL,
    )
    assert [model["name"] for model in numbers["models"]] == ["teacher", "same"]
    with pytest.raises(ConfigError, match="1 names for 2 models: one"):
        fdkit.analyze("attention-distance", ["demo", "demo"], data="demo", names=("one",), **SMALL)


def test_what_is_there_is_not_replaced_unasked(tmp_path):
    (tmp_path / "attention-distance.csv").write_text("mine")
    with pytest.raises(OutputError, match=r"attention-distance\.csv: is there already"):
        fdkit.analyze("attention-distance", "demo", data="demo", output=tmp_path, **SMALL)
    assert (tmp_path / "attention-distance.csv").read_text() == "mine"


def test_the_overview_tells_every_analysis_in_a_line(capsys):
    assert run("analyze", "--help") == 0
    said = capsys.readouterr().out
    for name in [*analyses(), "attention", "trajectory"]:
        (line,) = [line for line in said.splitlines() if line.startswith(f"  {name} ")]
        assert 20 < len(line) <= 140, line


@pytest.mark.parametrize("name", [*analyses(), "attention", "trajectory"])
def test_the_command_line_gives_the_configuration_again(name):
    kind = config_class(name)
    fields = {"model": ("a b", "c"), "data": "my photos", "num_images": 7, "seed": 3, "split": "test"}
    fields |= {"names": ("x", "y"), "loader": {"workers": 0}, "mean": (0.1, 0.2, 0.3), "pretrained": False}
    config = resolve(kind, fields, "analyze", name)
    words = command_line(config, "analyze", name).split()
    assert words[:4] == ["fdkit", "analyze", name, "'a"]
    import shlex

    arguments = shlex.split(command_line(config, "analyze", name))[3:]
    again = validate(kind, parse_flags(kind, arguments, {}, "fdkit analyze"), "flags")
    assert again == config


def test_a_result_remembers_what_made_it(tmp_path):
    fdkit.analyze("attention-distance", "demo", data="demo", output=tmp_path, unit="patches", **SMALL)
    numbers = json.loads((tmp_path / "attention-distance.json").read_text())
    assert numbers["command"]["unit"] == "patches"
    assert numbers["command_line"].startswith("fdkit analyze attention-distance demo ")
    assert "--unit patches" in numbers["command_line"]
    assert "--output" not in numbers["command_line"]


def test_a_result_names_the_weights_that_were_loaded_by_their_checksums(tmp_path):
    models, file = ["demo", "demo"], tmp_path / "attention-distance.json"
    fdkit.analyze("attention-distance", models, data="demo", output=tmp_path, names=("one", "two"), **SMALL)
    (loaded,) = json.loads(file.read_text())["identities"]
    assert loaded["sha256"] == sha256_of(DEMO_FOLDER / "student.safetensors")
    assert (loaded["source"], loaded["license"]) == ("demo", "Apache-2.0")


def test_an_analysis_gets_those_fields_that_it_has():
    config = own_config("attention-distance", {"num_images": 5, "seed": 3, "no_such_field": 1})
    assert config.num_images == 5
    with pytest.raises(ConfigError, match="needs a model"):
        perform(["attention-distance"], [], lambda name: config)
    assert members("attention-distance") == ("attention-distance",)


def test_a_convnet_has_no_attention(tmp_path, capsys):
    code = run(
        *("analyze", "attention-distance", "timm:resnet18", "--pretrained", "false", "--data", "demo"),
        *("--num-images", "2", "--output", str(tmp_path / "out")),
    )
    assert code == 2
    assert "ResNet has no attention to observe" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
