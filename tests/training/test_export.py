from pathlib import Path
from typing import Any

import pytest
from training_toys import CONFIG_YAML, ToyMethod

from fdkit.training.export import export_student, model_card, save_heads
from fdkit.training.run import Run

FREE: dict[str, Any] = {
    "name": "dino_vitb",
    "license": "apache-2.0",
    "is_noncommercial": False,
    "recipe": {"a": 1},
}
BOUND: dict[str, Any] = {
    "name": "mae_vitb",
    "license": "cc-by-nc-4.0",
    "is_noncommercial": True,
    "sha256": "ab",
}


def _card(folder: Path, **facts: Any) -> str:
    with Run.create(folder, CONFIG_YAML, command=[]) as run:
        run.update(**facts)
        return model_card(ToyMethod(), run)


def test_one_teacher_and_its_licence_stand_on_the_card(tmp_path: Path) -> None:
    card = _card(tmp_path, teacher=FREE, data={"name": "photos", "fingerprint": "0123456789abcdef"})
    assert "## Teacher\n" in card
    assert "| name | dino_vitb |" in card
    assert "the teacher's licence (apache-2.0) may bind its use" in card
    assert "Non-commercial" not in card
    assert "| Images | photos (fingerprint 0123456789ab) |" in card


def test_several_teachers_stand_on_the_card_and_the_strictest_counts(tmp_path: Path) -> None:
    card = _card(tmp_path, teachers=[FREE, BOUND])
    assert "## Teachers\n" in card
    assert "| name | dino_vitb |" in card
    assert "| name | mae_vitb |" in card
    assert "the teachers' licences (apache-2.0 AND cc-by-nc-4.0) may bind its use" in card
    assert (
        "**Non-commercial**: the weights of mae_vitb (cc-by-nc-4.0) are for non-commercial use only." in card
    )


@pytest.mark.parametrize("facts", [{}, {"teacher": {}}])
def test_a_run_without_a_teacher_has_no_such_section(facts: dict[str, Any], tmp_path: Path) -> None:
    assert "## Teacher" not in _card(tmp_path, **facts)


def test_the_student_and_its_card_are_written(tmp_path: Path) -> None:
    with Run.create(tmp_path, CONFIG_YAML, command=[]) as run:
        run.update(teacher=BOUND)
        export_student(ToyMethod(), run)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"student.safetensors", "student.json", "MODEL_CARD.md"} <= names
    assert "cc-by-nc-4.0" in (tmp_path / "MODEL_CARD.md").read_text()


def test_what_else_was_learned_is_kept_under_the_methods_names(tmp_path: Path) -> None:
    import safetensors.torch

    method = ToyMethod()
    save_heads(method, tmp_path / "heads.safetensors")
    heads = safetensors.torch.load_file(tmp_path / "heads.safetensors")
    assert sorted(heads) == ["slow", "target"]
    assert heads["target"].equal(method.target)
