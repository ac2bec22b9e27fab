"""`fdkit doctor TEACHER`: whether a teacher is to be trusted."""

from pathlib import Path
from typing import Any

import torch
import tyro
from pydantic import Field
from rich.console import Console
from rich.table import Table

from fdkit.commands._command import Command, ModelOptions, refuse_folder, write_result
from fdkit.commands._outcome import Outcome
from fdkit.config import Config, validate
from fdkit.data.json_file import read_object
from fdkit.errors import ConfigError, WeightsError
from fdkit.teachers.diagnosis import Check, audit_summary, diagnose, golden_feature
from fdkit.teachers.loading import load_audited
from fdkit.teachers.request import Loaded, Request
from fdkit.teachers.teacher import Teacher
from fdkit.training.distributed import local_device

GOLDEN_FILE = Path(__file__).parents[1] / "teachers" / "golden.json"
MARKS = {"ok": "ok", "note": "note", "wrong": "WRONG"}


class DoctorConfig(ModelOptions, Command):
    """Load a teacher, account for every tensor of its file, and look at its features. Exit code 4: do not trust it.

    Example: fdkit doctor clip_vitb
    """

    teacher: tyro.conf.Positional[str]
    """A catalog name, timm:NAME, open_clip:ARCH/TAG, hf:ORG/REPO, a checkpoint file, a run folder, or demo."""
    keys: bool = False
    """List every tensor of the file and what became of it, not only the counts."""
    golden: Path | None = Field(default=None, exclude=True)
    """Also compare with the features stored in this file."""
    record: Path | None = Field(default=None, exclude=True)
    """Add this teacher's features on four built-in patterns to this file, for later comparison."""


def config_class() -> type[Config]:
    """The configuration of the command."""
    return DoctorConfig


def run(config: DoctorConfig) -> Outcome:
    """Diagnose; the outcome's exit code is 4 if anything is wrong."""
    refuse_folder(config.record, "--record")
    device = local_device(config.device)
    loaded, teacher = load_audited(Request(config.teacher, **config.loading(), seed=config.seed))
    golden = _stored(GOLDEN_FILE) | (_stored(config.golden) if config.golden else {})
    checks = diagnose(loaded, teacher, golden=golden, device=device)
    if config.record and loaded.sha256:
        known = _stored(config.record) if config.record.is_file() else {}
        write_result(config.record, known | {loaded.sha256: golden_feature(teacher, device)})
    numbers = _numbers(config, loaded, teacher, checks)
    exit_code = 0 if numbers["trusted"] else WeightsError.exit_code
    return Outcome(numbers, lambda: _show(numbers), exit_code)


def doctor(teacher: str | Path, **fields: Any) -> dict[str, Any]:
    """The numbers of `fdkit doctor`; fields are those of its configuration.

    Example: fdkit.doctor("dino_vitb")["trusted"]
    """
    return run(validate(DoctorConfig, {"teacher": str(teacher), **fields}, "fdkit.doctor")).numbers


def _stored(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} holds no stored features: {error}", "--record FILE writes one") from error


def _numbers(config: DoctorConfig, loaded: Loaded, teacher: Teacher, checks: list[Check]) -> dict[str, Any]:
    backbone = teacher.backbone
    return {
        "teacher": config.teacher,
        "source": loaded.source,
        "sha256": loaded.sha256,
        "read_as": loaded.layout,
        "license": loaded.license,
        "noncommercial": loaded.is_noncommercial,
        "parameters": sum(parameter.numel() for parameter in backbone.network.parameters()),
        "embed_dim": backbone.embed_dim,
        "patch_size": backbone.patch_size,
        "prefix_tokens": backbone.num_prefix_tokens,
        "preprocessing": backbone.preprocessing.to_json(),
        "audit": audit_summary(loaded)
        | ({"tensors": [change._asdict() for change in loaded.audit]} if config.keys else {}),
        "checks": [check._asdict() for check in checks],
        "trusted": all(check.status != "wrong" for check in checks),
        "versions": {"torch": torch.__version__},
    }


def _show(numbers: dict[str, Any]) -> None:
    """What it is, what became of its tensors, each check, and the verdict."""
    console = Console(markup=False, highlight=False)
    _show_identity(console, numbers)
    _show_audit(console, numbers["audit"])
    table = Table(title="checks", title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column()
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in numbers["checks"]:
        detail = check["detail"] + (f"\n-> {check['remedy']}" if check["remedy"] else "")
        table.add_row(MARKS[check["status"]], check["name"], detail)
    console.print(table)
    wrong = [check["name"] for check in numbers["checks"] if check["status"] == "wrong"]
    verdict = f"NOT to be trusted: {', '.join(wrong)}" if wrong else "nothing found that speaks against it"
    console.print(f"\n{numbers['teacher']}: {verdict}")


def _show_identity(console: Console, numbers: dict[str, Any]) -> None:
    stated = numbers["preprocessing"]
    rows = {
        "source": numbers["source"],
        "read as": numbers["read_as"]
        or ("fdkit's own format" if numbers["sha256"] else "nothing: random weights"),
        "licence": numbers["license"] + (" (non-commercial)" if numbers["noncommercial"] else ""),
        "parameters": f"{numbers['parameters'] / 1e6:.1f} M",
        "tokens": f"{numbers['prefix_tokens']} prefix, then a patch every {numbers['patch_size']} px; "
        f"width {numbers['embed_dim']}",
        "input": f"{stated['image_size']} px, mean {_three(stated['mean'])}, std {_three(stated['std'])}, "
        f"{stated['interpolation']}",
    }
    table = Table(title=numbers["teacher"], title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    console.print()


def _show_audit(console: Console, audit: dict[str, Any]) -> None:
    table = Table(
        title="tensors of the file", title_justify="left", show_header=False, box=None, pad_edge=False
    )
    table.add_column(justify="right")
    if audit["used"]:
        table.add_row(str(audit["used"]), "used as they stand")
    for reason, count in audit["changed"].items():
        table.add_row(str(count), f"used: {reason}")
    for reason, count in audit["left_out"].items():
        table.add_row(str(count), f"left out: {reason}")
    if table.row_count:
        console.print(table)
        console.print()
    for change in audit.get("tensors", []):
        became = change["became"] or "left out"
        console.print(
            f"  {change['key']} -> {became}" + (f"  ({change['reason']})" if change["reason"] else "")
        )


def _three(values: list[float]) -> str:
    return " ".join(f"{value:.3f}" for value in values)
