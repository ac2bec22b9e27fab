"""What comes from elsewhere: weights of a hub or an address, and the packages this one stands on."""

import ast
import hashlib
import json
import re
import shutil
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from faults.jobs import STUDENT
from faults.kills import wait
from faults.processes import QUICK, photos, start_rank
from faults.supply import FAULTS, REPO, hub_here, tamper, timm_files

import fdkit.config
from fdkit.errors import ConfigError, WeightsError
from fdkit.teachers.hub import fetch_open_clip, fetch_repo, fetch_timm
from fdkit.teachers.loading import load_teacher
from fdkit.teachers.origin import pinned

ROOT = Path(__file__).parents[2]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_nothing_but_the_bytes_of_a_commit_is_taken(tmp_path: Path) -> None:
    found = tamper(tmp_path, amount=2 * len(FAULTS), seed=0)
    assert found["failures"] == []
    assert found["refused"] == 2 * (len(FAULTS) - 1), "all but those of a branch that moved"


def test_what_the_hub_says_it_has_not_is_known_to_be_missing(tmp_path: Path) -> None:
    """The client's error for that is an OSError, as those of a hub that does not answer are."""
    with hub_here(tmp_path) as hub:
        commit = hub.publish({"config.json": b'{"model_type": "vit"}', "model.safetensors": b"x"})
        assert fetch_repo(REPO).revision == commit
        hub.asked.clear()
        assert fetch_repo(REPO).revision == commit
        assert hub.asked == [], "the cache knows, too"


def test_a_download_tells_nothing_of_who_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
    with hub_here(tmp_path) as hub:
        hub.publish({"config.json": b'{"architecture": "x"}', "model.safetensors": b"x"})
        fetch_repo(REPO)
        assert hub.told
        assert not [text for text in hub.told if "torch" in text or "agent/" in text]


def distilled(folder: Path, teacher: str, *further: str) -> tuple[int | None, str]:
    """Exit code of a distillation, and what it said."""
    log, images = folder.with_name("log"), folder.with_name("photos")
    if not images.exists():
        photos(images)
    words = ["distill", "--teacher", teacher, "--data", str(images), *STUDENT, *QUICK]
    code = wait(start_rank([*words, "--output", str(folder), *further], folder.parent, log, {}), 60)
    return code, log.read_text()


@pytest.mark.slow
def test_a_run_keeps_the_commit_of_its_teacher(tmp_path: Path) -> None:
    run, cache = tmp_path / "run", tmp_path / "cache"
    first, second = timm_files(1), timm_files(2)
    with hub_here(cache) as hub:
        commit = hub.publish(first)
        code, said = distilled(run, f"hf:{REPO}")
        assert code == 0, said
        origin = json.loads((run / "run.json").read_text())["teacher"]["origin"]
        assert (origin["address"], origin["revision"]) == (f"hf:{REPO}@main", commit)
        assert origin["files"] == {name: sha256(data) for name, data in first.items()}

        newer = hub.publish(second)
        shutil.rmtree(cache)
        hub.asked.clear()
        code, said = distilled(run, f"hf:{REPO}", "--resume")
        assert code == 0, said
        assert json.loads((run / "run.json").read_text())["teacher"]["origin"] == origin
        assert any(commit in line for line in hub.asked)
        assert not any("/main/" in line for line in hub.asked)

        code, said = distilled(tmp_path / "other", f"hf:{REPO}")
        assert (
            json.loads((tmp_path / "other" / "run.json").read_text())["teacher"]["origin"]["revision"]
            == newer
        )

        del hub.commits[commit]
        shutil.rmtree(cache)
        code, said = distilled(run, f"hf:{REPO}", "--resume")
        assert code == 4, "its own commit is gone, and no other is taken for it"
        assert commit in said
        assert "no such revision" in said


@pytest.mark.slow
def test_a_run_is_not_resumed_with_other_weights_in_its_teachers_place(tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    first, second = timm_files(1), timm_files(2)
    for name, data in first.items():
        (teacher / name).write_bytes(data)
    code, said = distilled(tmp_path / "run", str(teacher))
    assert code == 0, said
    (teacher / "model.safetensors").write_bytes(second["model.safetensors"])
    code, said = distilled(tmp_path / "run", str(teacher), "--resume")
    assert code == 4, said
    assert f"SHA-256 {sha256(second['model.safetensors'])}, was SHA-256 " in said
    assert sha256(first["model.safetensors"]) in said
    (teacher / "model.safetensors").write_bytes(first["model.safetensors"])
    assert distilled(tmp_path / "run", str(teacher), "--resume")[0] == 0


def test_names_of_libraries_take_a_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import open_clip
    import timm

    files = timm_files(1)
    cfg = timm.get_pretrained_cfg("vit_tiny_patch16_224")
    monkeypatch.setattr(cfg, "hf_hub_id", REPO)
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda name: cfg)
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda arch, tag: {"hf_hub": f"{REPO}/"})
    with hub_here(tmp_path) as hub:
        old = hub.publish(
            {"model.safetensors": files["model.safetensors"], "open_clip_model.safetensors": b"old"}
        )
        new = hub.publish({"model.safetensors": b"new", "open_clip_model.safetensors": b"newer"})
        hub.branches["v1"] = old
        for name, fetch in (("timm", fetch_timm), ("open_clip", fetch_open_clip)):
            words = ["vit_tiny_patch16_224"] if name == "timm" else ["ViT-B-16", "tag"]
            assert fetch(*words).revision == new
            assert fetch(*words, revision="v1")[1:] == (f"hf:{REPO}@v1", old)
            with pinned({f"hf:{REPO}@main": old}):
                assert fetch(*words)[1:] == (f"hf:{REPO}@main", old)
            with pytest.raises(WeightsError, match="no such revision"):
                fetch(*words, revision="v3")
        before = len(hub.asked)
        assert fetch_timm("vit_tiny_patch16_224", old).revision == old
        assert len(hub.asked) == before, "a commit that is cached is not asked for"
        asked: list[tuple[str, str | None]] = []

        def fetch(name: str, revision: str | None) -> Any:
            asked.append((name, revision))
            return fetch_timm(name, revision)

        monkeypatch.setattr("fdkit.teachers.model.fetch_timm", fetch)
        with pytest.raises(WeightsError):
            load_teacher(f"timm:vit_tiny_patch16_224.augreg_in21k_ft_in1k@{old}", image_size=32)
        assert asked == [("vit_tiny_patch16_224.augreg_in21k_ft_in1k", old)]
    with pytest.raises(ConfigError, match="names no revision"):
        load_teacher("timm:vit_tiny_patch16_224@")


def test_a_plain_address_has_no_revisions() -> None:
    with pytest.raises(ConfigError, match=r"@v1: its weights lie at https://.* which has no revisions"):
        load_teacher("timm:vit_huge_patch14_gap_224.in1k_ijepa@v1")


@cache
def requirements() -> dict[str, str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    parted = [re.fullmatch(r"([A-Za-z0-9-]+)(.*)", line) for line in project["dependencies"]]
    return {match[1].lower(): match[2] for match in parted if match}


FLOORS = {"torch": (2, 10), "pillow": (12, 2), "jinja2": (3, 1, 6)}
"""Below which there are holes that files or texts from anywhere reach."""
TRACKERS = {
    "wandb",
    "mlflow",
    "comet-ml",
    "neptune",
    "clearml",
    "tensorboard",
    "sentry-sdk",
    "posthog",
    "segment",
}


def test_dependencies_are_few_bounded_and_above_their_holes() -> None:
    stated = requirements()
    assert len(stated) <= 16, (
        "a new dependency is a decision: say why in pyproject.toml, then raise this number"
    )
    for name, bounds in stated.items():
        floor = re.search(r">=([\d.]+)", bounds)
        assert floor, f"{name} has no lower bound"
        found = tuple(int(part) for part in floor[1].split("."))
        assert found >= FLOORS.get(name, (0,)), f"{name} may be older than its last known hole"
    assert not TRACKERS & stated.keys()


@cache
def modules() -> list[tuple[str, ast.Module]]:
    paths = sorted((ROOT / "fdkit").rglob("*.py"))
    return [(str(path.relative_to(ROOT)), ast.parse(path.read_text())) for path in paths]


OPTIONAL = {"torchcodec", "torchao"}
"""Extras, imported where they are there."""
OWN_NAMES = {
    "pil": "pillow", "yaml": "pyyaml", "sklearn": "scikit-learn", "open_clip": "open-clip-torch",
    "huggingface_hub": "huggingface-hub", "pydantic_core": "pydantic", "markupsafe": "jinja2", "triton": "torch",
}  # fmt: skip
"""What is called otherwise than the package it is of, or of a package that the named one always brings."""


def test_nothing_is_imported_that_is_not_declared() -> None:
    undeclared = {}
    for name, tree in modules():
        for node in ast.walk(tree):
            imported = [one.name for one in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported = [node.module]
            for top in (
                {module.partition(".")[0] for module in imported} - sys.stdlib_module_names - {"fdkit"}
            ):
                if OWN_NAMES.get(top.lower(), top) not in {*OPTIONAL, *requirements()}:
                    undeclared[top] = name
    assert undeclared == {}


FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__", "extractall", "extract", "yaml.load", "yaml.unsafe_load", "os.system",
    "os.popen", "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads", "joblib.load", "dill.load",
    "torch.jit.load", "tempfile.mktemp",
}  # fmt: skip
FORBIDDEN_ARGUMENTS = {
    ("weights_only", False), ("shell", True), ("allow_pickle", True), ("trust_remote_code", True), ("trust_repo", True),
    ("verify", False),
}  # fmt: skip
REASONED = {("fdkit/config.py", "yaml.load"): "its loader is a SafeLoader that refuses yet more"}
"""(file, what) allowed for the reason given."""


def dangers(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            short = called.rpartition(".")[2]
            is_method = short in {"eval", "compile", "exec"} and "." in called  # Module.eval, re.compile
            if called in FORBIDDEN_CALLS or (short in FORBIDDEN_CALLS and not is_method):
                yield called
            if called == "torch.load" and not any(word.arg == "weights_only" for word in node.keywords):
                yield "torch.load without weights_only"
            for word in node.keywords:
                if (
                    isinstance(word.value, ast.Constant)
                    and (word.arg, word.value.value) in FORBIDDEN_ARGUMENTS
                ):
                    yield f"{word.arg}={word.value.value}"


def test_no_call_runs_what_a_file_says() -> None:
    found = {(name, danger) for name, tree in modules() for danger in dangers(tree)}
    assert found == REASONED.keys()
    assert issubclass(fdkit.config._StrictLoader, yaml.SafeLoader)


def test_the_scan_sees_what_it_is_to_see() -> None:
    code = "import torch, yaml, subprocess\neval('1')\ntorch.load(f)\ntorch.load(f, weights_only=False)\n"
    code += "yaml.load(f)\nsubprocess.run(c, shell=True)\nnp.load(f, allow_pickle=True)\ntar.extractall()\n"
    code += "model.eval()\nre.compile('x')\npickle.load(f)\n"
    assert sorted(dangers(ast.parse(code))) == [
        "allow_pickle=True", "eval", "pickle.load", "shell=True", "tar.extractall", "torch.load without weights_only",
        "weights_only=False", "yaml.load",
    ]  # fmt: skip
