"""What a finished run hands on: the student, and a card that says where it comes from."""

import html
import re
from pathlib import Path
from typing import Any

from fdkit.data.text import printable
from fdkit.methods._method import Method
from fdkit.models.libraries import HEADS_FILE, RECIPE_FILE, WEIGHTS_FILE, save_backbone, save_tensors
from fdkit.teachers.licensing import combined_terms, recorded_teachers, terms_of_identity
from fdkit.teachers.run_checkpoint import sha256_now
from fdkit.teachers.run_folder import EXPORTED
from fdkit.training.checkpoint import write_whole
from fdkit.training.run import Run


def export_student(method: Method, run: Run) -> None:
    """Write student.safetensors, student.json, MODEL_CARD.md and what else was learned into the run folder.

    The last, heads.safetensors, holds the method's tensors outside the exported network under the method's own names,
    such as a decoder; there is none if nothing is left. run.json has the SHA-256 of each.
    """
    if run.writes:
        if run.facts.get(EXPORTED):
            run.update(**{EXPORTED: {}})  # what is written now is not that
        save_backbone(method.exported, run.folder)
        save_heads(method, run.folder / HEADS_FILE)
        names = [name for name in (WEIGHTS_FILE, RECIPE_FILE, HEADS_FILE) if (run.folder / name).exists()]
        run.update(**{EXPORTED: {name: sha256_now(run.folder / name) for name in names}})
        write_whole(run.folder / "MODEL_CARD.md", model_card(method, run))


def save_heads(method: Method, path: Path) -> None:
    """Write every tensor of a method that is no part of the exported network."""
    exported = {id(tensor) for tensor in method.exported.state_dict(keep_vars=True).values()}
    tensors = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in method.state_dict(keep_vars=True).items()
        if id(tensor) not in exported
    }
    if tensors:
        save_tensors(path, tensors)


def model_card(method: Method, run: Run) -> str:
    """The card in Markdown: what the student is, its teachers and their licences, images, recipe and last metrics."""
    facts, student = run.facts, method.exported
    architecture = student.recipe.get("architecture", type(student.network).__name__)
    num_parameters = sum(parameter.numel() for parameter in student.network.parameters())
    teachers = recorded_teachers(facts)
    data: dict[str, Any] = facts.get("data") or {}
    last: dict[str, Any] = next((line for line in reversed(run.metrics()) if "loss" in line), {})
    sections = [
        f"# {_plain(architecture)} trained with {type(method).__name__}",
        _table(
            {
                "Architecture": f"{architecture} ({num_parameters / 1e6:.1f} M parameters)",
                "Input": f"{student.image_size} x {student.image_size} RGB, mean {student.preprocessing.mean}, "
                f"std {student.preprocessing.std}",
                "Tokens": f"{student.num_prefix_tokens} prefix, then patches every {student.patch_size} pixels; "
                f"width {student.embed_dim}",
                "Images": f"{data.get('name', 'unknown')} (fingerprint {data.get('fingerprint', '')[:12]})",
                "Steps": last.get("step"),
                "fdkit": f"{facts.get('versions', {}).get('fdkit', '')} {facts.get('commit') or ''}".strip(),
            }
        ),
    ]
    if teachers:
        sections += _teacher_sections(teachers)
    if last:
        sections += ["## Last logged metrics", _table(last)]
    sections += [
        "## Use",
        '```python\nimport fdkit\n\nmodel = fdkit.load_teacher("PATH/TO/THIS/FOLDER")\n```',
        "`student.safetensors` holds the weights under the model library's own names, `student.json` what builds it.",
        "## Recipe",
        _fenced(run.config_yaml.strip(), "yaml"),
    ]
    return "\n\n".join(sections) + "\n"


def _teacher_sections(teachers: list[dict[str, Any]]) -> list[str]:
    """Who taught the student, and what their licences may mean for it."""
    terms = combined_terms(terms_of_identity(teacher) for teacher in teachers)
    whose = "the teacher's licence" if len(teachers) == 1 else "the teachers' licences"
    notes = [f"What it knows comes from these weights: {whose} ({_plain(terms.license)}) may bind its use."]
    if terms.is_noncommercial:
        forbidding = [teacher for teacher in teachers if terms_of_identity(teacher).is_noncommercial]
        names = ", ".join(
            _plain(f"{teacher.get('name')} ({teacher.get('license')})") for teacher in forbidding
        )
        notes.append(f"**Non-commercial**: the weights of {names} are for non-commercial use only.")
    heading = "## Teacher" if len(teachers) == 1 else "## Teachers"
    return [heading, *(_table(teacher | _origin(teacher)) for teacher in teachers), *notes]


def _origin(teacher: dict[str, Any]) -> dict[str, Any]:
    """Where published weights came from, as rows of a table."""
    origin = teacher.get("origin") or {}
    return {"origin": origin.get("address"), "revision": origin.get("revision")}


def _table(rows: dict[str, Any]) -> str:
    lines = [
        f"| {_cell(name)} | {_cell(value)} |"
        for name, value in rows.items()
        if value not in (None, "") and not isinstance(value, dict)
    ]
    return "\n".join(["| | |", "|---|---|", *lines])


def _cell(value: object) -> str:
    return _plain(f"{value:.6g}" if isinstance(value, float) else str(value))


def _plain(text: str) -> str:
    """The text as Markdown that shows it as it is: no name makes a link, a heading or an element of HTML."""
    marked = re.sub(r"[\\`*\[\]|~]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\\g<0>", printable(text))
    return html.escape(marked, quote=False)


def _fenced(text: str, language: str) -> str:
    """A block of code that no line of the text can end."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    lines = [printable(line) for line in text.split("\n")]
    return "\n".join([f"{fence}{language}", *lines, fence])
