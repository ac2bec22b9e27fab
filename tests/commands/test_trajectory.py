"""An analysis along the checkpoints of a run."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fdkit.analysis import _trajectory as shown
from fdkit.analysis import attention_distance
from fdkit.analysis._analysis import Analysis
from fdkit.analysis._trajectory import draw, scalars, summary
from fdkit.analysis.attention_distance import AttentionDistanceConfig
from fdkit.analysis.observe import Images, Observed
from fdkit.commands._trajectory import along_checkpoints
from fdkit.config import Config
from fdkit.errors import ConfigError, DataError, NumericsError
from fdkit.models.backbone import Backbone
from fdkit.models.libraries import build_timm, save_backbone
from fdkit.teachers.loading import load_teacher
from fdkit.training.checkpoint import Checkpoint, save_checkpoint

ARGS = {"depth": 2, "img_size": 16, "patch_size": 8, "embed_dim": 24, "num_heads": 3}


def network(mark: float) -> Backbone:
    """A network whose class token begins with a number that tells it from others."""
    torch.manual_seed(0)
    backbone = build_timm("vit_tiny_patch16_224", ARGS)
    with torch.no_grad():
        backbone.network.cls_token[0, 0, 0] = mark
    return backbone


def save_step(run: Path, step: int, mark: float) -> Path:
    state = {f"student.{name}": value for name, value in network(mark).state_dict().items()}
    return save_checkpoint(run / "checkpoints", step, Checkpoint({"model": state}, {}), keep=99)


def made_run(folder: Path, marks: dict[int, float], *, final: float | None = None, step: int = 0) -> Path:
    """A run folder with checkpoints; final: what it handed on, at that step."""
    for number, mark in marks.items():
        save_step(folder, number, mark)
    save_backbone(network(0 if final is None else final), folder)
    if final is None:
        (folder / "student.safetensors").unlink()
    (folder / "run.json").write_text(json.dumps({"step": step}))
    return folder


def images() -> list[Images]:
    return [Images(torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(2)))]


def observe(model: str, name: str) -> Observed:
    return Observed(name, load_teacher(model), images())


class Marks:
    """An analysis that reads the mark, and keeps account of what it was asked."""

    def __init__(self, **own: Any) -> None:
        self.asked: list[str] = []
        self.own = own

    def analyze(self, observed: list[Observed], config: Config) -> Analysis:
        (one,) = observed
        mark = float(one.model.backbone.network.cls_token[0, 0, 0])
        self.asked.append(Path(one.model.source).name)
        if mark in self.own.get("fails_at", ()):
            raise NumericsError(f"features of mark {mark} are not finite")
        return Analysis({"analysis": "mark", "models": [{"name": one.name, "mark": mark}]}, print)

    def scalars(self, model: dict[str, Any]) -> dict[str, float]:
        found = {"mark (units)": model["mark"], "twice (units)": 2 * model["mark"]}
        return (
            {}
            if self.own.get("is_picture")
            else found
            if model["mark"] > 0
            else {"mark (units)": model["mark"]}
        )


def along(*runs: Path, analysis: Any = None, **options: Any) -> dict[str, Any]:
    numbers = along_checkpoints(analysis or Marks(), runs, observe, Config(), **options).numbers
    assert json.loads(json.dumps(numbers, allow_nan=False)) == numbers
    return numbers


def test_steps_ascend_and_the_last_checkpoint_is_what_was_handed_on(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", {30: 3.0, 4: 0.5, 100: -2.0}, final=-2.0, step=100)
    analysis = Marks()
    numbers = along(run, analysis=analysis)
    assert (numbers["analysis"], numbers["of"]) == ("trajectory", "mark")
    assert numbers["models"] == [
        {
            "name": "run",
            "steps": [4, 30, 100],
            "scalars": {"mark (units)": [0.5, 3.0, -2.0], "twice (units)": [1.0, 6.0, None]},
            "exported": None,
            "left_out": {},
        }
    ]
    assert analysis.asked == ["step-00000004", "step-00000030", "step-00000100"]
    assert scalars(numbers["models"][0]) == {"mark (units)": -2.0, "twice (units)": 6.0}


def test_a_run_that_is_not_done_has_its_checkpoints_alone(tmp_path: Path) -> None:
    numbers = along(made_run(tmp_path / "run", {1: 1.0, 2: 2.0}, step=7))
    assert numbers["models"][0]["steps"] == [1, 2]
    assert numbers["models"][0]["exported"] is None


def test_what_was_handed_on_is_the_last_point_where_no_checkpoint_is(tmp_path: Path) -> None:
    (model,) = along(made_run(tmp_path / "run", {1: 1.0, 2: 2.0}, final=5.0, step=9))["models"]
    assert model["steps"] == [1, 2, 9]
    assert model["scalars"]["mark (units)"] == [1.0, 2.0, 5.0]
    assert model["exported"] is None


def test_the_best_of_a_fine_tuning_stands_beside_its_last_step(tmp_path: Path) -> None:
    numbers = along(made_run(tmp_path / "run", {1: 1.0, 2: 2.0}, final=1.5, step=2))
    (model,) = numbers["models"]
    assert model["steps"] == [1, 2]
    assert model["exported"] == {"mark (units)": 1.5, "twice (units)": 3.0}
    assert summary(numbers)[1][-1] == ["run", "handed on", "1.5", "3"]
    figure = draw(numbers)
    assert [line.get_marker() for line in figure.axes[0].lines] == ["o", "*"]


def test_damaged_and_diverged_checkpoints_are_left_out_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = made_run(tmp_path / "run", {1: 1.0, 2: 2.0, 3: 3.0, 4: math.nan, 5: 5.0}, step=5)
    (run / "checkpoints" / "step-00000002" / "manifest.json").unlink()
    numbers = along(run, analysis=Marks(fails_at=(3.0,)))
    (model,) = numbers["models"]
    assert model["steps"] == [1, 5]
    assert list(model["left_out"]) == ["step-00000002", "step-00000003", "step-00000004"]
    assert "manifest.json" in model["left_out"]["step-00000002"]
    assert model["left_out"]["step-00000003"] == "features of mark 3.0 are not finite"
    assert "cls_token holds 1 values that are not finite" in model["left_out"]["step-00000004"]
    assert "run: step-00000003 is left out: features of mark 3.0" in caplog.text
    assert "3 checkpoints left out" in summary(numbers)[0]
    with pytest.raises(
        DataError, match=r"has 1 checkpoint to follow.*step-00000004 is left out: .*cls_token"
    ):
        along(run, analysis=Marks(fails_at=(3.0, 5.0)))


def test_a_run_that_handed_on_what_diverged_says_so(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", {1: 1.0, 2: 2.0}, final=math.nan, step=9)
    (model,) = along(run)["models"]
    assert (model["steps"], model["exported"]) == ([1, 2], None)
    assert list(model["left_out"]) == ["student.safetensors"]


@pytest.mark.parametrize("marks", [{}, {5: 1.0}])
def test_a_run_with_fewer_than_two_checkpoints_is_refused(marks: dict[int, float], tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", marks, final=1.0, step=5)
    with pytest.raises(
        DataError, match=f"run has {len(marks)} checkpoints? to follow, and two are needed"
    ) as caught:
        along(run)
    assert "--train.keep-checkpoints" in caught.value.hint
    assert "--train.save-every-steps" in caught.value.hint


def test_what_cannot_be_followed_is_refused(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", {1: 1.0, 2: 2.0})
    with pytest.raises(ConfigError, match="mark sums no model up in numbers"):
        along(run, analysis=Marks(is_picture=True))
    with pytest.raises(ConfigError, match="no run given"):
        along()
    with pytest.raises(DataError, match="there is no run folder"):
        along(tmp_path / "nowhere")
    (run / "student.json").unlink()
    with pytest.raises(DataError, match=r"step-00000001 is left out: .*has no student\.json yet"):
        along(run)


def test_several_runs_of_other_lengths_are_lines_of_one_figure(tmp_path: Path) -> None:
    first = made_run(tmp_path / "a" / "run", {1: 1.0, 2: 2.0, 3: 4.0})
    second = made_run(tmp_path / "b" / "run", {2: -3.0, 8: -4.0})
    numbers = along(first, second)
    assert [model["name"] for model in numbers["models"]] == [str(first), str(second)]
    numbers = along(first, second, names=["one", "other"])
    title, rows = summary(numbers)
    assert title == "mark along 2 runs"
    assert rows[0] == ["run", "step", "mark (units)", "twice (units)"]
    assert rows[1] == ["one", "1", "1", "2"]
    assert rows[-1] == ["other", "8", "-4", ""]
    figure = draw(numbers)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["mark (units)", "twice (units)"]
    assert [list(line.get_xdata()) for line in figure.axes[0].lines] == [[1, 2, 3], [2, 8]]
    assert [list(line.get_ydata()) for line in figure.axes[0].lines] == [[1, 2, 4], [-3, -4]]
    assert len(figure.axes[1].lines) == 1  # the other run never had this number
    narrow = draw(numbers, width=3.7)
    assert narrow.axes[0].get_position().y0 > narrow.axes[1].get_position().y0
    assert shown.READING


def test_a_real_analysis_gives_at_each_step_what_it_gives_of_that_model(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", {1: 1.0, 2: 5.0}, final=5.0, step=2)
    config = AttentionDistanceConfig()
    numbers = along_checkpoints(attention_distance, [run], observe, config).numbers
    assert numbers["of"] == "attention-distance"
    for place, name in enumerate(("checkpoints/step-00000001", ".")):
        alone = attention_distance.analyze([observe(str(run / name), "m")], config).numbers["models"][0]
        expected = attention_distance.scalars(alone)
        got = {label: values[place] for label, values in numbers["models"][0]["scalars"].items()}
        assert got == expected
    values: list[Tensor] = numbers["models"][0]["scalars"]["mean distance (pixels)"]
    assert values[0] != values[1]


def test_a_copy_of_a_run_in_another_place_is_followed_alike(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", {1: 1.0, 2: 2.0}, final=2.0, step=2)
    shutil.copytree(run, tmp_path / "copy")
    analysis = SimpleNamespace(analyze=Marks().analyze, scalars=Marks().scalars)
    first, second = (along(folder, analysis=analysis)["models"][0] for folder in (run, tmp_path / "copy"))
    assert {**first, "name": "copy"} == second
