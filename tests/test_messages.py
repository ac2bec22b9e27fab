"""What messages, helps and documents tell people to type exists."""

import ast
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import tyro

from fdkit.cli import COMMANDS
from fdkit.commands._flags import nested_config
from fdkit.config import Config

ROOT = Path(__file__).parents[1]
FLAG = re.compile(r"(?<![\w-])--([a-z][\w.-]*[\w])")
OF_OTHERS = {
    "debug", "help", "json", "no-json", "version",  # of every command
    "max-restarts", "nnodes", "nproc-per-node", "rdzv-endpoint", "rdzv-id", "rdzv-backend", "standalone",
    "master-port",  # all of torchrun
    "no-python", "shutdown-timeout",  # torchrun, too
    "aug-plus", "cos", "fix-pred-lr", "mlp", "moco-t", "use_dense_prediction",  # official scripts, cited
    "porcelain", "flag",  # git; any flag
}  # fmt: skip


def flags(kind: type[Config], prefix: str = "") -> Iterator[str]:
    for name, field in kind.model_fields.items():
        flag = f"{prefix}{name.replace('_', '-')}"
        if inner := nested_config(field.annotation):
            yield from flags(inner, f"{flag}.")
        if any(mark is tyro.conf.Positional for mark in field.metadata):
            continue
        yield flag
        yield f"{prefix}no-{name.replace('_', '-')}"
    for base in kind.__mro__:
        yield from (alias.removeprefix("--") for alias in vars(base).get("ALIASES", {}))


def kinds() -> Iterator[type[Config]]:
    """The configuration of every command and choice."""
    for name, entry in COMMANDS.items():
        module = import_module(f"fdkit.commands.{name}")
        if about := getattr(module, "COMMANDS", ()):
            for other in about:
                inner = import_module(f"fdkit.commands.{other}")
                choices = inner.choices() if COMMANDS[other].choices else [None]
                yield from (module.config_class(inner.config_class(*filter(None, [one]))) for one in choices)
        elif entry.choices:
            yield from (module.config_class(choice) for choice in module.choices())
        else:
            yield module.config_class()


@pytest.fixture(scope="module")
def known() -> set[str]:
    return {flag for kind in kinds() for flag in flags(kind)} | OF_OTHERS


def told(path: Path) -> Iterator[tuple[int, str]]:
    """Flags that a file's texts name, by line; of Python files its strings, docstrings among them."""
    if path.suffix != ".py":
        for number, line in enumerate(path.read_text().splitlines(), 1):
            yield from ((number, flag) for flag in FLAG.findall(line))
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from ((node.lineno, flag) for flag in FLAG.findall(node.value))


TEXTS = sorted((ROOT / "fdkit").rglob("*.py"))


def test_every_flag_that_is_told_exists(known: set[str]) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: --{flag}"
        for path in TEXTS
        for line, flag in told(path)
        if flag not in known and not any(one.startswith(f"{flag}.") for one in known)
    ]
    assert wrong == []


def test_documents_name_flags_that_exist(known: set[str]) -> None:
    benchmarks = {flag for path in (ROOT / "benchmarks").glob("*.py") for _, flag in told(path)}
    wrong = [
        f"{path.name}:{line}: --{flag}"
        for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
        for line, flag in told(path)
        if flag not in known | benchmarks and not any(one.startswith(f"{flag}.") for one in known)
    ]
    assert wrong == []
