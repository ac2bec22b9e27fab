"""Steps whose loss or gradient is not finite are left out, counted and borne for a few in a row."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from training_toys import (
    CONFIG_YAML,
    Pictures,
    Stumbling,
    ToyMethod,
    exit_codes,
    final_weights,
    same_bits,
    settings,
    start_ranks,
    train_stumbling,
    untimed_metrics,
)

from fdkit.data.loader import BadImages, training_batches
from fdkit.errors import NumericsError
from fdkit.training.bad_steps import BadSteps, BufferGuard, first_damage
from fdkit.training.distributed import World
from fdkit.training.loop import Trainer, train
from fdkit.training.plan import make_plan
from fdkit.training.run import Run
from fdkit.training.state import TrainingState
from fdkit.training.votes import Votes, Window

ALONE = World(0, 1, 0)
CPU = torch.device("cpu")


def test_left_out_steps_are_said_counted_and_listed_and_change_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The run equals a naive loop that goes over the same batches and makes no update at those steps."""
    train_stumbling(
        tmp_path / "run", (5, 6, 17), optim_warmup_epochs=0, optim_min_lr=1e-2, optim_clip_grad=None
    )
    method, chosen = ToyMethod(), settings()
    matrices = [p for p in method.parameters() if p.ndim > 1]
    vectors = [p for p in method.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    batches = training_batches(
        __import__("training_toys").Pictures(), method.views, chosen["loader"], batch_size=8, seed=5, start_step=0,
        num_steps=24,
    )  # fmt: skip
    for step, batch in enumerate(batches):
        if step in (5, 6, 17):
            continue
        optimizer.zero_grad()
        method(method.views.finish(batch.crops, batch.colour), 0.0)["loss"].backward()
        optimizer.step()
        method.after_step(0.0)
    found = final_weights(tmp_path / "run")
    for name, value in method.state_dict().items():
        torch.testing.assert_close(found[f"model.{name}"], value, rtol=1e-4, atol=1e-6, msg=name)
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (facts["state"], facts["bad_steps"]) == ("done", 3)
    reports = sorted((tmp_path / "run" / "errors").glob("*not-finite.json"))
    assert [json.loads(path.read_text())["step"] for path in reports] == [5, 6, 17]
    said = [message for message in caplog.messages if "max_bad_steps bears" in message]
    assert [("1 in a row" in message, "2 in a row" in message) for message in said] == [
        (True, False), (False, True), (True, False)
    ]  # fmt: skip


def test_logged_means_are_those_of_the_good_steps(tmp_path: Path) -> None:
    train_stumbling(tmp_path / "run", (5, 6), train_log_every_steps=4)
    rows = [row for row in untimed_metrics(tmp_path / "run") if "loss" in row]
    assert [row.get("bad_steps", 0) for row in rows] == [0, 2, 0, 0, 0, 0]
    assert all(math.isfinite(value) for row in rows for value in row.values())


def test_a_line_of_bad_steps_alone_says_so_and_nothing_else(tmp_path: Path) -> None:
    train_stumbling(tmp_path / "run", (4, 5), train_log_every_steps=2)
    [line] = [row for row in untimed_metrics(tmp_path / "run") if row["step"] == 6]
    assert line.keys() == {"step", "epoch", "bad_steps", "lr"}


def test_one_too_many_in_a_row_stops_the_run_with_its_last_good_state(tmp_path: Path) -> None:
    bad = tuple(range(10, 24))
    with pytest.raises(NumericsError, match="not finite at step 12 of 24"):
        train_stumbling(tmp_path / "run", bad, train_max_bad_steps=2)
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (facts["exit_code"], facts["bad_steps"]) == (7, 2)
    kept = final_weights(tmp_path / "run")
    assert all(value.isfinite().all() for value in kept.values())
    train_stumbling(tmp_path / "run", (), train_max_bad_steps=2)
    train_stumbling(
        tmp_path / "straight", (10, 11), train_max_bad_steps=2
    )  # saved at step 12, without these two
    assert same_bits(final_weights(tmp_path / "straight"), final_weights(tmp_path / "run"))


def test_a_run_killed_between_bad_steps_counts_on(tmp_path: Path) -> None:
    with pytest.raises(NumericsError, match="step 8"):
        train_stumbling(tmp_path / "run", (6, 7, 8), train_max_bad_steps=2, train_save_every_steps=1)
    with pytest.raises(
        NumericsError, match="step 8"
    ):  # steps 6 and 7 were counted before the checkpoint of step 8
        train_stumbling(tmp_path / "run", (8,), train_max_bad_steps=2, train_save_every_steps=1)


def test_what_a_bad_step_leaves_behind_is_found(tmp_path: Path) -> None:
    with pytest.raises(
        NumericsError, match=r"step 7 of 24.*but student.network.norm.weight is no longer finite"
    ):
        train_stumbling(tmp_path / "run", (7,), spoils="weights")


def test_what_a_bad_step_made_of_running_averages_is_undone(tmp_path: Path) -> None:
    """Also where two come in a row and where a step's verdict is read during the next one, as on a GPU."""
    chosen = {"train_max_bad_steps": 2, "optim_lr": 1e-2}
    train_stumbling(tmp_path / "spoilt", (5, 6, 17), spoils="average", **chosen)
    train_stumbling(tmp_path / "unspoilt", (5, 6, 17), **chosen)
    assert same_bits(final_weights(tmp_path / "unspoilt"), final_weights(tmp_path / "spoilt"))


def test_a_verdict_read_late_undoes_as_much(tmp_path: Path) -> None:
    chosen = settings(train_max_bad_steps=2)
    plan = make_plan(Pictures(), train=chosen["train"], optim=chosen["optim"], world=ALONE, device=CPU)
    with Run.create(tmp_path / "run", CONFIG_YAML) as run:
        trainer = Trainer(
            Stumbling((4, 5), spoils="average"), Pictures(), run, plan=plan, train=chosen["train"],
            optim=chosen["optim"], seed=5, world=ALONE, device=CPU,
        )  # fmt: skip
        trainer.votes = Votes(ALONE, CPU, lag=1)
        batches = trainer.batches(chosen["loader"], BadImages(Pictures(), 0.5))
        slow = []
        for _ in range(8):
            trainer.update(next(batches))
            slow.append(trainer.method.slow.clone())
    assert torch.equal(slow[3], slow[4])
    assert torch.equal(slow[4], slow[5])
    assert not torch.equal(slow[5], slow[6])
    assert slow[7].isfinite().all()
    assert trainer.bad_steps.total == 2


def test_buffers_of_every_type_are_put_back_only_after_a_bad_step() -> None:
    method = ToyMethod()
    method.add_module("norm", nn.BatchNorm1d(3))
    guard = BufferGuard(method)
    before = {name: value.clone() for name, value in method.named_buffers()}
    for bad in (0.0, 1.0):
        guard.keep()
        method.norm(torch.tensor([[1.0, 2.0, math.nan], [3.0, 4.0, 5.0]]))
        method.slow += 1
        changed = {name: value.clone() for name, value in method.named_buffers()}
        guard.put_back(torch.tensor(bad))
        wanted = before if bad else changed
        for name, value in method.named_buffers():
            torch.testing.assert_close(value, wanted[name], rtol=0, atol=0, equal_nan=True, msg=name)
        method.load_state_dict({**method.state_dict(), **before}, strict=False)
    assert int(changed["norm.num_batches_tracked"]) == 1


class Overflowing(ToyMethod):
    """The toy that keeps an infinite average from some step on, which no loss shows."""

    def after_step(self, progress: float) -> None:
        super().after_step(progress)
        if progress >= 0.4:
            self.slow[2, 3] = math.inf


def test_what_no_loss_shows_is_not_saved(tmp_path: Path) -> None:
    with (
        pytest.raises(NumericsError, match="slow is no longer finite at step 12 of 24") as caught,
        Run.create(tmp_path / "run", CONFIG_YAML, resume=False, command=["toy"]) as run,
    ):
        train(Overflowing(), Pictures(), run, **settings())
    assert "step-00000008" in caught.value.hint
    assert all(value.isfinite().all() for value in final_weights(tmp_path / "run").values())
    assert json.loads((tmp_path / "run" / "run.json").read_text())["step"] == 8


def test_the_optimisers_own_numbers_are_looked_at(tmp_path: Path) -> None:
    method = ToyMethod()
    optimizer = torch.optim.AdamW(method.parameters())
    method(method.views.finish([torch.zeros(2, 3, 4, 4)], []), 0.0)["loss"].backward()
    optimizer.step()
    state = TrainingState(method, optimizer, None, ALONE, CPU)
    assert state.damage() == ""
    optimizer.state[method.student.network.out.bias]["exp_avg_sq"][1] = math.inf
    assert state.damage() == "the optimiser's exp_avg_sq of student.network.out.bias"


def test_counts_in_a_row_begin_anew_after_a_good_step() -> None:
    steps = BadSteps(2)
    for step, too_many in [(3, False), (4, False), (6, False), (7, False), (8, True)]:
        steps.add(step)
        assert steps.are_too_many is too_many
    other = BadSteps(2)
    other.load(json.loads(json.dumps(steps.state())))
    assert (other.total, other.in_a_row) == (5, 3)
    other.add(9)
    assert other.in_a_row == 4
    assert BadSteps(0).most_in_a_row == 0


def test_damage_is_named() -> None:
    norm = nn.BatchNorm1d(2)
    assert first_damage(norm.state_dict(), ALONE, CPU) == ""
    norm.running_var[1] = math.nan
    assert first_damage(norm.state_dict(), ALONE, CPU) == "running_var"
    assert first_damage({}, ALONE, CPU) == ""
    assert first_damage({"steps": torch.tensor(3), "none": torch.zeros(0)}, ALONE, CPU) == ""


def test_a_window_of_both_kinds() -> None:
    window = Window()
    for loss, bad in [(1.0, 0.0), (math.nan, 1.0), (3.0, 0.0)]:
        window.add({"loss": torch.tensor(loss), "norm_max": torch.tensor(loss)}, torch.tensor(bad))
    saved: Any = json.loads(json.dumps(window.numbers()))
    again = Window()
    again.load(saved, CPU)
    for one in (window, again):
        assert one.read(ALONE) == {"loss": 2.0, "norm_max": 3.0, "bad_steps": 1.0}
    assert window.read(ALONE) == {}


def ranked(folder: Path) -> None:
    import os

    bad = (4,) if os.environ["RANK"] == "1" else ()
    logging.getLogger("fdkit").setLevel(logging.WARNING)
    train_stumbling(folder, bad, train_max_bad_steps=1)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_bad_loss_of_one_process_leaves_the_step_out_for_all(tmp_path: Path) -> None:
    assert exit_codes(start_ranks(2, ranked, tmp_path / "run")) == [0, 0]
    train_stumbling(tmp_path / "alone", (4,), train_max_bad_steps=1)
    found, wanted = final_weights(tmp_path / "run"), final_weights(tmp_path / "alone")
    for name, value in wanted.items():
        if name.startswith("model."):
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)
