"""fdkit: distil pretrained vision models into better students, and see what got better and why.

Every command is a function here with the same fields: `fdkit.distill(teacher="clip_vitb", data="photos/")`.
Importing the package imports none of its heavy dependencies; the first call does.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_LAZY = {
    "distill": "fdkit.commands.distill",
    "pack": "fdkit.commands.pack",
    "pretrain": "fdkit.commands.pretrain",
    "finetune": "fdkit.commands.finetune",
    "segment": "fdkit.commands.segment",
    "evaluate": "fdkit.commands.evaluate",
    "analyze": "fdkit.commands.analyze",
    "compare": "fdkit.commands.compare",
    "make_report": "fdkit.commands.report",
    "demo": "fdkit.commands.demo",
    "doctor": "fdkit.commands.doctor",
    "load_teacher": "fdkit.teachers.loading",
    "list_teachers": "fdkit.teachers.catalog",
    "FdkitError": "fdkit.errors",
}

if TYPE_CHECKING:
    from fdkit.commands.analyze import analyze as analyze
    from fdkit.commands.compare import compare as compare
    from fdkit.commands.demo import demo as demo
    from fdkit.commands.distill import distill as distill
    from fdkit.commands.doctor import doctor as doctor
    from fdkit.commands.evaluate import evaluate as evaluate
    from fdkit.commands.finetune import finetune as finetune
    from fdkit.commands.pack import pack as pack
    from fdkit.commands.pretrain import pretrain as pretrain
    from fdkit.commands.report import make_report as make_report
    from fdkit.commands.segment import segment as segment
    from fdkit.errors import FdkitError as FdkitError
    from fdkit.teachers.catalog import list_teachers as list_teachers
    from fdkit.teachers.loading import load_teacher as load_teacher

__all__ = [
    "FdkitError",
    "__version__",
    "analyze",
    "compare",
    "demo",
    "distill",
    "doctor",
    "evaluate",
    "finetune",
    "list_teachers",
    "load_teacher",
    "make_report",
    "pack",
    "pretrain",
    "segment",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'fdkit' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
