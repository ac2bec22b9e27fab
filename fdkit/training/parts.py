"""The parts of a step that costs are told apart by: frozen networks, the student, its heads, and what is left."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

from torch import nn

from fdkit.methods._method import Method
from fdkit.models.backbone import Backbone
from fdkit.teachers.teacher import Teacher

Part = Literal["teacher", "momentum", "student", "heads", "loss"]
PARTS: tuple[Part, ...] = ("teacher", "momentum", "student", "heads", "loss")
"""Of a forward pass: teachers that are read, copies that follow the student, the student, small networks behind a
backbone, and everything else."""
ENTRANCES = ("forward", "pooled", "logits", "encode_layers")
"""Ways into a Backbone."""


def teachers_of(method: Method) -> list[Teacher]:
    """The teachers a method reads; also those that it keeps outside its module tree."""
    own: Any = getattr(method, "teachers", ())
    return [one for one in own if isinstance(one, Teacher)]


def backbones_of(method: Method) -> list[tuple[Part, Backbone]]:
    """Every backbone with the part it is."""
    found: list[tuple[Part, Backbone]] = [("teacher", teacher.backbone) for teacher in teachers_of(method)]
    own = [module for module in method.modules() if isinstance(module, Backbone)]
    return found + [("student" if module is method.student else "momentum", module) for module in own]


def heads_of(method: Method) -> list[nn.Module]:
    """The small networks of a method: children that hold weights and no backbone."""
    return [
        child
        for child in method.children()
        if not isinstance(child, Teacher)
        and any(True for _ in child.parameters())
        and not any(isinstance(part, Backbone) for part in child.modules())
    ]


@contextmanager
def watched(method: Method, enter: Callable[[Part], None], leave: Callable[[Part], None]) -> Iterator[None]:
    """Have `enter` and `leave` called around every part of the method's forward pass, the outermost part alone."""
    depth = 0

    def around(part: Part, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            depth += 1
            if depth == 1:
                enter(part)
            try:
                return function(*args, **kwargs)
            finally:
                depth -= 1
                if depth == 0:
                    leave(part)

        return run

    with ExitStack() as stack:
        for part, backbone in backbones_of(method):
            for name in ENTRANCES:
                stack.enter_context(_replaced(backbone, name, around(part, getattr(backbone, name))))
        for head in heads_of(method):
            stack.enter_context(_replaced(head, "forward", around("heads", head.forward)))
        yield


@contextmanager
def _replaced(module: nn.Module, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """A method of one module alone, for a while."""
    module.__dict__[name] = function
    try:
        yield
    finally:
        del module.__dict__[name]
