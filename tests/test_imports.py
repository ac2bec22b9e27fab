"""Imports point down only, plug-ins never import each other, and the overview needs nothing heavy."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "fdkit"
LAYERS = [
    {"errors"},
    {"config"},
    {"data"},
    {"models"},
    {"teachers"},
    {"methods", "evaluation", "analysis"},
    {"training"},
    {"report"},
    {"commands"},
    {"cli"},
]
RANK = {part: rank for rank, layer in enumerate(LAYERS) for part in layer}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem in RANK)


def imported(path: Path) -> Iterator[str]:
    """Modules of fdkit a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        yield from (name for name in names if name.startswith("fdkit."))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for name in imported(path):
        other = name.split(".")[1]
        assert RANK[other] <= RANK[own], f"{path.name} imports {name}, which stands above it"
        if other != own:
            assert RANK[other] < RANK[own], f"{path.name} imports {name}, which stands beside it"


@pytest.mark.parametrize("folder", ["methods", "analysis"])
def test_plug_ins_do_not_import_each_other(folder: str) -> None:
    plugins = {path.stem for path in (PACKAGE / folder).glob("[a-z]*.py")} - {"observe"}
    for path in (PACKAGE / folder).glob("[a-z]*.py"):
        others = {name.split(".")[2] for name in imported(path) if name.startswith(f"fdkit.{folder}.")}
        assert not others & plugins, f"{path.name} imports another plug-in"


def test_the_overview_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from fdkit.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "print([name for name in ('torch', 'timm', 'open_clip', 'sklearn', 'matplotlib', 'tyro', 'rich')"
        " if name in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.splitlines()[-1] == "[]"
