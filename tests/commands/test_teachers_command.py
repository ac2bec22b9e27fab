import json
import shlex
import subprocess
import sys

import pytest

import fdkit
from fdkit.cli import main
from fdkit.commands._flags import parse_flags
from fdkit.commands.distill import DistillConfig
from fdkit.commands.teachers import command_for
from fdkit.teachers.catalog import CATALOG


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(("teachers", *arguments))
    return int(stop.value.code or 0)


def names(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert run("--json", *arguments) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return [row["name"] for row in json.loads(captured.out)["teachers"]]


def test_json_is_one_document_of_every_teacher(capsys: pytest.CaptureFixture[str]) -> None:
    assert names(capsys) == list(CATALOG) == [entry.name for entry in fdkit.list_teachers()]
    assert names(capsys, "mocov3_vits") == ["mocov3_vits"]
    assert run("mocov3_vits", "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)["teachers"]
    assert row["official"]["model_args"] == {"num_heads": 12}
    assert row["published"] == {"linear": 0.732, "finetune": 0.814}
    assert (row["license"], row["is_noncommercial"]) == ("cc-by-nc-4.0", True)
    assert row["command"] == "fdkit distill --teacher mocov3_vits --data PATH"


def test_filters_leave_what_was_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert names(capsys, "--family", "mae") == ["mae_vitb", "mae_vitl", "mae_vith"]
    permissive = names(capsys, "--license", "permissive")
    assert {"clip_vitb", "dino_vitb", "esvit_swinb"} <= set(permissive)
    assert not {"mae_vitb", "mocov3_vitb", "dinov3_vitb", "aimv2_vitl", "fastmoco_r50"} & set(permissive)
    noncommercial = names(capsys, "--license", "noncommercial")
    assert {"mae_vitb", "mocov3_vitb", "convnextv2_tiny"} <= set(noncommercial)
    assert not set(permissive) & set(noncommercial)
    assert set(names(capsys, "--search", "R50")) >= {"mocov3_r50", "swav_r50", "dino_r50"}
    assert names(capsys, "--search", "quickgelu_336") == ["clip_vitl336"]
    assert names(capsys, "--search", "no such thing") == []


@pytest.mark.parametrize("width", [80, 120])
def test_the_list_fits_the_terminal_and_names_nothing_by_halves(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    assert run() == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines) <= width
    rows = {line.split()[0]: line for line in lines[1 : 1 + len(CATALOG)]}
    assert rows.keys() == CATALOG.keys()
    for name, row in rows.items():
        assert CATALOG[name].architecture in row
        assert row.split()[-1] == ("timm" if CATALOG[name].model else "file")
    assert {"73.2", "cc-by-nc-4.0"} <= set(rows["mocov3_vits"].split())
    assert ("81.4" in rows["mocov3_vits"]) == (width == 120)
    assert ("…" in "".join(lines)) == (width == 80)


def test_an_empty_list_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--family", "mae", "--license", "permissive") == 0
    assert "no teacher is like that" in capsys.readouterr().out


def shown(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert run(name) == 0
    return capsys.readouterr().out


def test_one_teacher_is_shown_whole(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    printed = shown("clip_vitl", capsys)
    sha256 = "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"
    address = f"https://openaipublic.azureedge.net/clip/models/{sha256}/ViT-L-14.pt"
    for part in (
        "timm:vit_large_patch14_clip_quickgelu_224.openai",
        address,
        "https://arxiv.org/abs/2103.00020",
    ):
        assert part in printed.split()
    assert f"SHA-256        {sha256}\n" in printed
    assert "0.481455, 0.457827, 0.408211" in printed
    assert "16 x 16, 14 pixels apart and 1024 wide, after 1 prefix token\n" in printed
    assert "75.5 % top-1 on ImageNet-1K" in printed
    assert "non-commercial" not in printed
    assert "  fdkit distill --teacher clip_vitl --data PATH\n" in printed


def test_a_teacher_no_library_hosts_says_how_to_get_its_file(capsys: pytest.CaptureFixture[str]) -> None:
    printed = shown("mocov3_vits", capsys)
    assert "cc-by-nc-4.0, for non-commercial use alone" in printed
    assert "num_heads=12" in printed
    assert (
        "curl -L -C - -O https://dl.fbaipublicfiles.com/moco-v3/vit-s-300ep/vit-s-300ep.pth.tar\n" in printed
    )
    assert "--teacher vit-s-300ep.pth.tar --architecture mocov3_vits --data PATH" in printed
    printed = shown("esvit_swinb", capsys)
    assert "  https://github.com/microsoft/esvit#pretrained-models\n" in printed
    assert "query string" in printed
    assert "  fdkit distill --teacher FILE --architecture esvit_swinb --data PATH\n" in printed
    assert "starts with b251726a" in shown("mocov1_r50", capsys)
    assert "starts with 73cec8be" in shown("dinov3_vitb", capsys)


@pytest.mark.parametrize("name", ["clip_vitb", "mocov3_vits", "esvit_swinb"])
def test_the_command_given_is_one_that_distill_takes(name: str) -> None:
    program, command, *arguments = shlex.split(command_for(CATALOG[name]))
    values = parse_flags(DistillConfig, arguments, {}, "fdkit distill")
    assert (program, command, values["data"]) == ("fdkit", "distill", "PATH")
    assert name in (values["teacher"], values["architecture"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["clip_vit_l"], "did you mean clip_vitl"),
        (["dino"], "fdkit teachers --family dino"),
        (["--family", "din"], "did you mean dino"),
        (["clip_vitb", "--family", "clip"], "--family filters the list"),
        (["clip_vitb", "--search", "clip"], "--search filters the list"),
        (["--license", "free"], "permissive"),
    ],
)
def test_a_mistake_is_a_usage_error(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err


def test_listing_needs_no_torch() -> None:
    code = (
        "import sys\n"
        "from fdkit.cli import main\n"
        "try: main(['teachers', '--json'])\n"
        "except SystemExit as stop: assert not stop.code\n"
        "print([name for name in ('torch', 'timm', 'open_clip', 'numpy') if name in sys.modules], file=sys.stderr)"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr
    assert printed.splitlines()[-1] == "[]"
