"""The command line: finds the command, merges recipe and flags, and maps errors to exit codes.

Nothing heavy is imported before a command is known, so that `fdkit --help` answers at once.
"""

import ast
import errno
import json
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

from fdkit import __version__
from fdkit.config import Config, Values, check_recipe, find_recipe, read_yaml, recipe_names, validate
from fdkit.data.terminal import PlainFormatter, escaped, guard_streams
from fdkit.errors import ConfigError, FdkitError, PreemptedError, did_you_mean, memory_failure, write_failure


class CommandEntry(NamedTuple):
    """A line of the overview; the module is imported when the command is used."""

    summary: str
    usage: str
    choices: str = ""
    """The package whose files are the command's choices, such as fdkit.evaluation."""


COMMANDS = {
    "demo": CommandEntry("The whole story on built-in images, on a CPU, in minutes.", "fdkit demo"),
    "distill": CommandEntry(
        "Make a better student from a pretrained teacher.", "fdkit distill --teacher clip_vitb --data PATH"
    ),
    "pretrain": CommandEntry(
        "Make your own teacher from unlabelled images.",
        "fdkit pretrain mocov3 --data PATH",
        "methods",
    ),
    "finetune": CommandEntry(
        "Train a model to name the classes of labelled images.", "fdkit finetune MODEL --data PATH"
    ),
    "segment": CommandEntry(
        "Measure what a model says about every pixel: a head for classes, by mIoU.",
        "fdkit segment MODEL --data PATH",
    ),
    "evaluate": CommandEntry(
        "Measure a frozen model: kNN, probes, few labels, retrieval and more.",
        "fdkit evaluate knn MODEL --data PATH",
        "evaluation",
    ),
    "analyze": CommandEntry(
        "See what differs between models, or what one has learnt.",
        "fdkit analyze attention-distance MODEL [MODEL ...] --data PATH",
        "analysis",
    ),
    "compare": CommandEntry(
        "Whether a distillation was worth it, beside its controls.", "fdkit compare RUN --data PATH"
    ),
    "report": CommandEntry(
        "Everything known of runs and models on one page.", "fdkit report RUN [RUN ...] [--data PATH]"
    ),
    "plan": CommandEntry(
        "What a training takes on which GPU: memory, hours, disk; nothing is trained.",
        "fdkit plan distill --teacher clip_vitl --data PATH",
    ),
    "profile": CommandEntry(
        "Where the time of a training step goes, and the one thing to change.",
        "fdkit profile distill --teacher clip_vitl --data PATH",
    ),
    "pack": CommandEntry(
        "Write images into shards that read faster, large ones made smaller.", "fdkit pack PATH --output DIR"
    ),
    "teachers": CommandEntry(
        "List the known teachers, or show one whole.", "fdkit teachers [NAME] [--family dinov2]"
    ),
    "doctor": CommandEntry("Whether a teacher is to be trusted, tensor by tensor.", "fdkit doctor TEACHER"),
}

EPILOGUE = """\
MODEL  a name in `fdkit teachers` (clip_vitb), timm:NAME, open_clip:ARCH/TAG, hf:ORG/REPO, a checkpoint file,
       a run folder, or demo
PATH   a folder of images (sub-folders are classes; train/ and test/ or val/ are splits), a .tar of one, a folder
       of .tar shards, wds:train-{000..123}.tar, digits, demo, or torchvision:CIFAR10

fdkit COMMAND --help shows every option. Exit codes: 0 done, 2 usage, 3 data, 4 weights, 5 output folder,
6 resources, 7 not finite, 8 a rank died, 75 interrupted and saved."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command line and leave with its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    _replace_closed_streams()
    guard_streams()
    _log_to_stderr()
    try:
        code = _dispatch([argument for argument in arguments if argument != "--debug"])
        sys.stdout.flush()
    except FdkitError as error:
        code = error.exit_code
        _report(error, debug)
    except BrokenPipeError:  # the reader of our output left, as `head` does; nothing of ours failed
        _drop_output()
        code = 0
    except SystemExit as end:
        if not isinstance(end.__context__, BrokenPipeError):  # as rich leaves then, with code 1
            raise
        code = 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except Exception as error:
        explained = _explained(error)
        if explained is None:
            raise
        _drop_output()  # or what is still to be printed would fail again, without words
        code = explained.exit_code
        _report(explained, debug)
    sys.exit(code)


def _explained(error: Exception) -> FdkitError | None:
    """What an error of the system means for the user, wherever it was met; None for a bug."""
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        name = str(error.filename)[:60]
        return ConfigError(f"{name}...: a name too long for this disk", "choose a shorter one")
    return write_failure(error) or memory_failure(error)


def _replace_closed_streams() -> None:
    """Have nobody read what is printed where standard output or error was closed before the start.

    Left closed, their numbers would go to the first files opened, and what libraries print would end there.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115


def _drop_output() -> None:
    """Have nobody read what is still to be printed, if nobody can."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in {"-h", "--help", "help"}:
        print(_overview())
        return 0
    if arguments[0] in {"-V", "--version"}:
        print(f"fdkit {__version__}")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        raise ConfigError(
            f"fdkit {name}: no such command",
            did_you_mean(name, COMMANDS) or f"commands: {', '.join(COMMANDS)}",
        )
    module = import_module(f"fdkit.commands.{name}")
    if hasattr(module, "COMMANDS"):
        config, outcome = _about_another(name, module, rest)
    else:
        kind, choice, rest = _kind_of(name, rest)
        config = _parse(kind, rest, name, choice)
        outcome = module.run(config)
    if os.environ.get("RANK", "0") == "0":  # of several processes under torchrun, one speaks
        if getattr(config, "json_output", False):
            print(json.dumps(outcome.numbers, indent=2))
        else:
            outcome.show()
    return int(outcome.exit_code)


def _kind_of(name: str, rest: list[str]) -> tuple[type[Config], str, list[str]]:
    """A command's configuration, its choice if it has any, and the arguments behind that."""
    entry, module = COMMANDS[name], import_module(f"fdkit.commands.{name}")
    rest = _with_implied_choice(module, rest)
    choice = _choice(name, entry, rest) if entry.choices else ""
    kind: type[Config] = module.config_class(choice) if choice else module.config_class()
    return kind, choice, rest[1:] if choice else rest


def _about_another(name: str, module: Any, rest: list[str]) -> tuple[Config, Any]:
    """Run a command that is about another one, as in `fdkit plan distill ...`, and takes its options and recipes."""
    about: tuple[str, ...] = module.COMMANDS
    if not rest or rest[0] in {"-h", "--help"}:
        entry = COMMANDS[name]
        print(f"{entry.summary}\n\nusage: {entry.usage}\n\ncommands: {', '.join(about)}")
        print(f"\nfdkit {name} {about[0]} --help shows every option.")
        sys.exit(0 if rest else 2)
    if rest[0] not in about:
        hint = did_you_mean(rest[0], about) or f"commands: {', '.join(about)}"
        raise ConfigError(f"fdkit {name} {rest[0]}: no such command", hint)
    kind, choice, words = _kind_of(rest[0], rest[1:])
    config = _parse(module.config_class(kind), words, rest[0], choice, program=f"{name} {rest[0]}")
    return config, module.run(rest[0], config)


def _with_implied_choice(module: Any, rest: list[str]) -> list[str]:
    """The arguments with the plug-in in front that a named protocol implies, where it is left out."""
    protocol = _value_of("--protocol", rest)
    if protocol is None or not hasattr(module, "implied_choice") or rest[0] in module.choices():
        return rest
    return [module.implied_choice(protocol), *rest]


def _choice(name: str, entry: CommandEntry, rest: list[str]) -> str:
    """The plug-in asked for, such as knn; its file name is its name."""
    choices = import_module(f"fdkit.commands.{name}").choices()
    if not rest or rest[0] in {"-h", "--help"}:
        print(f"{entry.summary}\n\nusage: {entry.usage}\n\n{_described(name, entry.choices, choices)}")
        if recipes := [
            recipe.partition("/")[2] for recipe in recipe_names() if recipe.startswith(f"{name}/")
        ]:
            print(
                "\n"
                + fill(
                    f"recipes (--recipe NAME): {', '.join(recipes)}",
                    width=100,
                    subsequent_indent="  ",
                    break_on_hyphens=False,
                )
            )
        if protocols := [key for key, one in _protocols().items() if one.command == name]:
            print(
                "\n"
                + fill(
                    f"protocols (--protocol NAME): {', '.join(protocols)}",
                    width=100,
                    subsequent_indent="  ",
                    break_on_hyphens=False,
                )
            )
        print(f"\nfdkit {name} {choices[0]} --help shows every option.")
        sys.exit(0 if rest else 2)
    if rest[0] not in choices:
        hint = did_you_mean(rest[0], choices) or f"choices: {', '.join(choices)}"
        raise ConfigError(f"fdkit {name} {rest[0]}: no such choice", hint)
    return rest[0]


def _described(command: str, package: str, choices: Sequence[str]) -> str:
    """A line for every plug-in: its name and the first sentence of its file, which is read but not run."""
    folder = Path(__file__).parent / package
    others: dict[str, str] = getattr(import_module(f"fdkit.commands.{command}"), "DESCRIPTIONS", {})
    width = max(len(choice) for choice in choices)
    lines = []
    for choice in choices:
        words = others.get(choice) or _first_line(folder / f"{choice.replace('-', '_')}.py")
        lines.append(f"  {choice:<{width}}  {words}")
    return "\n".join(lines)


def _first_line(path: Path) -> str:
    return (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]


def _parse(kind: type[Config], arguments: list[str], name: str, choice: str, *, program: str = "") -> Config:
    """The configuration from recipe and flags; a flag wins over the recipe, the recipe over the default.

    program: what the help calls the command; its name where left out.
    """
    from fdkit.commands._flags import parse_flags

    recipe = _recipe_file(kind, arguments, name, choice)
    values: Values = _pinned(kind, arguments)
    if recipe is not None:
        values = read_yaml(recipe)
        check_recipe(kind, values, str(recipe))
        if not {"-h", "--help"} & set(arguments):
            logging.getLogger("fdkit").info("recipe %s", recipe)
    called = f"fdkit {program or name} {choice}".strip()
    return validate(kind, parse_flags(kind, arguments, values, called), "flags")


def _pinned(kind: type[Config], arguments: list[str]) -> Values:
    """The fields that a protocol named with --protocol pins, as defaults of the flags."""
    protocol = _value_of("--protocol", arguments) if "protocol" in kind.model_fields else None
    if protocol is None:
        return {}
    find_protocol = import_module("fdkit.evaluation._protocols").find_protocol
    return {field: value for field, value in find_protocol(protocol).fields.items() if field != "recipe"}


def _recipe_file(kind: type[Config], arguments: list[str], name: str, choice: str) -> Path | None:
    """The recipe asked for with --recipe, or the one named after the teacher or method, if there is one."""
    if "recipe" not in kind.model_fields:
        return None
    asked = _value_of("--recipe", arguments) or _recipe_of_protocol(kind, arguments)
    if asked is not None:
        return find_recipe(asked, name)
    named = f"{name}/{choice or _value_of('--teacher', arguments)}"
    return find_recipe(named, name) if named in recipe_names() else None


def _recipe_of_protocol(kind: type[Config], arguments: list[str]) -> str | None:
    protocol = _value_of("--protocol", arguments) if "protocol" in kind.model_fields else None
    if protocol is None:
        return None
    found = import_module("fdkit.evaluation._protocols").find_protocol(protocol)
    return found.choice if "recipe" in found.fields else None


def _protocols() -> dict[str, Any]:
    """The named protocols, which cost no import of torch."""
    protocols: dict[str, Any] = import_module("fdkit.evaluation._protocols").PROTOCOLS
    return protocols


def _value_of(flag: str, arguments: list[str]) -> str | None:
    for position, argument in enumerate(arguments):
        if argument.startswith(f"{flag}="):
            return argument.partition("=")[2]
        if argument == flag and position + 1 < len(arguments):
            return arguments[position + 1]
    return None


def _overview() -> str:
    width = max(len(entry.usage) for entry in COMMANDS.values())
    lines = [f"  {entry.usage:<{width}}  {entry.summary}" for entry in COMMANDS.values()]
    head = f"fdkit {__version__}: better vision backbones by feature distillation, and proof of it"
    return "\n".join([head, "", *lines, "", EPILOGUE])


def _report(error: FdkitError, debug: bool) -> None:
    if debug:
        traceback.print_exception(error, file=sys.stderr)
    label = "stopped" if isinstance(error, PreemptedError) else "error"
    with suppress(BrokenPipeError):  # nobody listens: the exit code tells it
        print(f"{label}: {escaped(str(error))}", file=sys.stderr)


class _Prefix(PlainFormatter):
    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return f"{record.levelname.lower()}: {text}" if record.levelno >= logging.WARNING else text


class _ToStderr(logging.StreamHandler):
    """Writes to what standard error is at the moment: another call in this process may have replaced it."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def _log_to_stderr() -> None:
    logger = logging.getLogger("fdkit")
    if any(isinstance(handler, _ToStderr) for handler in logger.handlers):
        return  # an earlier call in this process; handlers of others stay beside it
    handler = _ToStderr()
    handler.setLevel(logging.INFO)  # a run's log file takes more
    handler.setFormatter(_Prefix("%(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
