import errno
import json
import math
import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from training_toys import (
    CONFIG_YAML,
    Pictures,
    ToyMethod,
    exit_codes,
    final_weights,
    same_bits,
    settings,
    start,
    start_ranks,
    train_toy,
    untimed_metrics,
)

from fdkit.data.loader import BadImages, training_batches
from fdkit.errors import ConfigError, NumericsError, ResourceError, WeightsError
from fdkit.methods._method import Method
from fdkit.teachers.run_checkpoint import step_of
from fdkit.training.activations import checkpoint_activations
from fdkit.training.checkpoint import list_steps
from fdkit.training.distributed import World
from fdkit.training.loop import Trainer, train
from fdkit.training.plan import choose_precision, make_plan
from fdkit.training.run import Run
from fdkit.training.votes import Votes

CPU = torch.device("cpu")
ALONE = World(0, 1, 0)
NUM_STEPS = 24


def test_equals_a_naive_loop(tmp_path: Path) -> None:
    train_toy(tmp_path / "run", optim_clip_grad=0.5, optim_weight_decay=0.3)
    method, chosen = ToyMethod(), settings(optim_clip_grad=0.5, optim_weight_decay=0.3)
    matrices = [p for p in method.parameters() if p.ndim > 1]
    vectors = [p for p in method.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0}]
    )
    batches = training_batches(
        Pictures(), method.views, chosen["loader"], batch_size=8, seed=5, start_step=0, num_steps=NUM_STEPS
    )
    losses = []
    for step, batch in enumerate(batches):
        warm = step / 3 * (1e-2 - 5e-7) + 5e-7
        cosine = 1e-4 + (1e-2 - 1e-4) * 0.5 * (1 + math.cos(math.pi * (step - 3) / 21))
        for group in optimizer.param_groups:
            group["lr"] = warm if step < 3 else cosine
        loss = method(method.views.finish(batch.crops, batch.colour), step / NUM_STEPS)["loss"]
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(method.parameters(), 0.5)
        optimizer.step()
        method.after_step(step / NUM_STEPS)
    saved = final_weights(tmp_path / "run")
    for name, value in method.state_dict().items():
        torch.testing.assert_close(saved[f"model.{name}"], value, rtol=1e-6, atol=1e-7)
    lines = untimed_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [5, 10, 15, 20, 24]
    for line, (first, last) in zip(lines, [(0, 5), (5, 10), (10, 15), (15, 20), (20, 24)], strict=True):
        assert line["loss"] == pytest.approx(sum(losses[first:last]) / (last - first), rel=1e-5)
        assert line["epoch"] == pytest.approx(line["step"] / 3)
    assert losses[-1] < losses[0]


def test_a_finished_run_holds_what_it_promises(tmp_path: Path) -> None:
    run = train_toy(tmp_path / "run")
    names = {path.name for path in run.folder.iterdir()}
    assert {"config.yaml", "run.json", "metrics.jsonl", "log.txt", "checkpoints", "MODEL_CARD.md"} <= names
    assert {"student.safetensors", "student.json"} <= names
    facts = json.loads((run.folder / "run.json").read_text())
    assert (facts["state"], facts["exit_code"]) == ("done", 0)
    assert facts["derived"]["num_steps"] == NUM_STEPS
    assert facts["derived"]["precision"] == "fp32"
    assert facts["derived"]["schedule"]["peak_lr"] == 1e-2
    assert facts["data"]["name"] == "pictures"
    card = (run.folder / "MODEL_CARD.md").read_text()
    assert "toy" in card
    assert "| loss |" in card
    assert len(list((run.folder / "checkpoints").iterdir())) == 2


def test_the_global_generator_is_left_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    torch.manual_seed(0)
    torch.set_rng_state(before)
    with Run.create(tmp_path / "run", CONFIG_YAML, command=[]) as run:
        method = ToyMethod(dropout=0.3)
        state = torch.get_rng_state()
        train(method, Pictures(), run, **settings())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulating_equals_the_whole_batch(parts: int, tmp_path: Path) -> None:
    train_toy(tmp_path / "whole", train_epochs=2)
    train_toy(tmp_path / "parts", train_epochs=2, train_accumulate=parts)
    one, other = final_weights(tmp_path / "whole"), final_weights(tmp_path / "parts")
    for name in one:
        if name.startswith("model."):
            torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-6)
    for line, same in zip(
        untimed_metrics(tmp_path / "whole"), untimed_metrics(tmp_path / "parts"), strict=True
    ):
        assert line["loss"] == pytest.approx(same["loss"], rel=1e-5)
        assert line["grad_norm"] == pytest.approx(same["grad_norm"], rel=1e-5)


def test_a_batch_that_does_not_divide_names_those_that_do(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"8 does not divide by 1 processes x train.accumulate 3\n.* 6 or 9"
    ):
        train_toy(tmp_path / "run", train_accumulate=3)


def test_too_few_images_are_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="batch size 32 is more than the 26 images of pictures"):
        train_toy(tmp_path / "run", train_batch_size=32)


def test_a_warm_up_longer_than_the_run_is_said(caplog: pytest.LogCaptureFixture) -> None:
    chosen = settings(optim_warmup_epochs=20)
    plan = make_plan(Pictures(), train=chosen["train"], optim=chosen["optim"], world=ALONE, device=CPU)
    assert "optim.warmup_epochs 20 is not below train.epochs 8" in caplog.text
    assert plan.schedule(plan.num_steps - 1) < plan.schedule.peak_lr


def test_bf16_is_chosen_only_where_the_hardware_computes_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for has in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=has: has)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        assert choose_precision("auto", CPU) == ("bf16" if has else "fp32")
    assert choose_precision("bf16", CPU) == "bf16"


def test_bf16_keeps_the_weights_in_fp32(tmp_path: Path) -> None:
    train_toy(tmp_path / "run", train_precision="bf16", train_epochs=2)
    weights = final_weights(tmp_path / "run")
    assert weights["model.student.network.out.weight"].dtype == torch.float32
    assert json.loads((tmp_path / "run" / "run.json").read_text())["derived"]["precision"] == "bf16"


# Stopping and going on


def test_resuming_changes_no_bit_even_between_two_lines_of_metrics(tmp_path: Path) -> None:
    chatty = {"dropout": 0.3}
    train_toy(tmp_path / "straight", method=chatty)
    with pytest.raises(KeyboardInterrupt):
        train_toy(tmp_path / "cut", method=chatty, monitors=[RaiseAt(18)])
    assert json.loads((tmp_path / "cut" / "run.json").read_text())["exit_code"] == 130
    train_toy(tmp_path / "cut", method=chatty)
    assert same_bits(final_weights(tmp_path / "straight"), final_weights(tmp_path / "cut"))
    assert untimed_metrics(tmp_path / "straight") == untimed_metrics(tmp_path / "cut")


class RaiseAt:
    every_steps = 1

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, method: Method, step: int) -> dict[str, float]:
        if step == self.step:
            raise KeyboardInterrupt
        return {}


class Noisy:
    """A monitor as careless as can be."""

    every_steps = 7

    def __call__(self, method: Method, step: int) -> dict[str, float]:
        torch.rand(step)
        method.eval()
        return {"steps": float(step)}


def test_monitors_are_logged_and_disturb_nothing(tmp_path: Path) -> None:
    train_toy(tmp_path / "plain", method={"dropout": 0.3})
    train_toy(tmp_path / "monitored", method={"dropout": 0.3}, monitors=[Noisy()])
    assert same_bits(final_weights(tmp_path / "plain"), final_weights(tmp_path / "monitored"))
    found = [line for line in untimed_metrics(tmp_path / "monitored") if "monitor/steps" in line]
    assert found == [
        {"step": step, "epoch": step / 3, "monitor/steps": float(step)} for step in (0, 7, 14, 21, 24)
    ]


def test_resuming_a_finished_run_does_nothing_more(tmp_path: Path) -> None:
    train_toy(tmp_path / "run")
    before = untimed_metrics(tmp_path / "run")
    (tmp_path / "run" / "student.safetensors").unlink()
    train_toy(tmp_path / "run")
    assert untimed_metrics(tmp_path / "run") == before
    assert (tmp_path / "run" / "student.safetensors").exists()


def test_a_damaged_newest_checkpoint_costs_only_the_steps_since_the_one_before(tmp_path: Path) -> None:
    train_toy(tmp_path / "straight", method={"dropout": 0.3})
    with pytest.raises(KeyboardInterrupt):
        train_toy(tmp_path / "cut", method={"dropout": 0.3}, monitors=[RaiseAt(18)])
    newest = tmp_path / "cut" / "checkpoints" / "step-00000016" / "optimizer.safetensors"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 4
    newest.write_bytes(data)
    train_toy(tmp_path / "cut", method={"dropout": 0.3})
    assert same_bits(final_weights(tmp_path / "straight"), final_weights(tmp_path / "cut"))
    assert untimed_metrics(tmp_path / "straight") == untimed_metrics(tmp_path / "cut")
    assert "step-00000016 is damaged" in (tmp_path / "cut" / "log.txt").read_text()


def test_a_checkpoint_of_another_method_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train_toy(tmp_path / "run", monitors=[RaiseAt(9)])
    with pytest.raises(ConfigError, match="another seed"):
        train_toy(tmp_path / "run", seed=6)
    other = ToyMethod()
    other.student.network.more = nn.Linear(2, 2)
    with (
        pytest.raises(WeightsError, match="does not fit this method"),
        Run.create(tmp_path / "run", CONFIG_YAML, resume=True) as run,
    ):
        train(other, Pictures(), run, **settings())


def wait_for_lines(folder: Path, count: int) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        path = folder / "metrics.jsonl"
        if path.exists() and path.read_text().count("\n") >= count:
            return
        time.sleep(0.01)
    raise AssertionError("the run wrote no metrics")


def killable(folder: Path, workers: int) -> None:
    train_toy(
        folder, method={"dropout": 0.3, "pause_seconds": 0.03}, workers=workers, train_epochs=16,
        train_log_every_steps=3, handle_signals=True,
    )  # fmt: skip


def wait_for_checkpoint(folder: Path, *, after: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if any(step_of(path) > after for path in list_steps(folder / "checkpoints")):
            return
        time.sleep(0.005)
    raise AssertionError("the run saved nothing")


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_at_any_moment_it_ends_in_the_same_bits(workers: int, tmp_path: Path) -> None:
    clock, hits = random.Random(workers), 0
    killable(tmp_path / "straight", 0)
    for kill in range(6):
        process = start(killable, tmp_path / "killed", workers)
        wait_for_checkpoint(tmp_path / "killed", after=4 * kill)
        time.sleep(clock.uniform(0, 0.15))
        with suppress(ProcessLookupError):  # on a busy machine a run may be over before its kill
            os.killpg(process.pid, signal.SIGKILL)
            hits += 1
        process.join()
    assert hits >= 4
    assert exit_codes([start(killable, tmp_path / "killed", workers)]) == [0]
    assert same_bits(final_weights(tmp_path / "straight"), final_weights(tmp_path / "killed"))
    assert untimed_metrics(tmp_path / "straight") == untimed_metrics(tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_saves_and_asks_to_be_run_again(name: str, tmp_path: Path) -> None:
    killable(tmp_path / "straight", 0)
    process = start(killable, tmp_path / "run", 1)
    wait_for_lines(tmp_path / "run", 2)
    os.kill(process.pid, getattr(signal, name))
    assert exit_codes([process]) == [75]
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (facts["state"], facts["exit_code"]) == ("preempted", 75)
    assert f"stopped by {name} at step" in facts["reason"]
    killable(tmp_path / "run", 0)
    assert same_bits(final_weights(tmp_path / "straight"), final_weights(tmp_path / "run"))
    assert untimed_metrics(tmp_path / "straight") == untimed_metrics(tmp_path / "run")


def test_without_asking_no_signal_is_handled(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    train_toy(tmp_path / "run", train_epochs=1, monitors=[SameHandler(before)])
    assert signal.getsignal(signal.SIGTERM) is before


class SameHandler:
    every_steps = 1

    def __init__(self, handler: Any) -> None:
        self.handler = handler

    def __call__(self, method: Method, step: int) -> dict[str, float]:
        assert signal.getsignal(signal.SIGTERM) is self.handler
        return {}


# What goes wrong


def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path: Path) -> None:
    with pytest.raises(NumericsError, match=r"not finite at step 13 of 24.*the update was not made"):
        train_toy(tmp_path / "run", method={"breaks_at": 13 / 24}, train_max_bad_steps=0)
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (facts["state"], facts["exit_code"]) == ("failed", 7)
    [report] = (tmp_path / "run" / "errors").glob("*not-finite.json")
    found = json.loads(report.read_text())
    assert found["step"] == 13
    batches = training_batches(
        Pictures(), ToyMethod().views, settings()["loader"], batch_size=8, seed=5, start_step=13, num_steps=14
    )
    expected = next(batches).indices.tolist()
    assert found["indices"] == [expected]
    assert found["batch"]["rank 0"] == [f"pictures[{index}]" for index in expected]
    assert all(value.isfinite().all() for value in final_weights(tmp_path / "run").values())
    train_toy(tmp_path / "run")
    train_toy(tmp_path / "straight")
    assert same_bits(final_weights(tmp_path / "straight"), final_weights(tmp_path / "run"))


def test_reading_flags_a_step_late_still_makes_no_bad_update(tmp_path: Path) -> None:
    chosen = settings(train_max_bad_steps=0)
    method = ToyMethod(breaks_at=4 / 24)
    with Run.create(tmp_path / "run", CONFIG_YAML) as run:
        plan = make_plan(Pictures(), train=chosen["train"], optim=chosen["optim"], world=ALONE, device=CPU)
        trainer = Trainer(
            method, Pictures(), run, plan=plan, train=chosen["train"], optim=chosen["optim"], seed=5, world=ALONE,
            device=CPU,
        )  # fmt: skip
        trainer.votes = Votes(ALONE, CPU, lag=1)
        batches = trainer.batches(chosen["loader"], BadImages(Pictures(), 0.5))
        for _ in range(4):
            trainer.update(next(batches))
        before = {name: value.clone() for name, value in method.student.state_dict().items()}
        assert trainer.update(next(batches))[0].step == 3
        assert all(torch.equal(value, before[name]) for name, value in method.student.state_dict().items())
        with pytest.raises(NumericsError, match="not finite at step 4 of 24"):
            trainer.save()
        trainer.update(next(batches))
        with pytest.raises(NumericsError, match="not finite at step 5 of 24"):
            trainer.update(next(batches))


class Hungry(ToyMethod):
    def forward(self, views: list[Tensor], progress: float) -> dict[str, Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_running_out_of_memory_names_what_keeps_the_batch(tmp_path: Path) -> None:
    with (
        pytest.raises(
            ResourceError, match=r"with 4 images at a time\n.*the batch stays 8 with --train.accumulate 4"
        ),
        Run.create(tmp_path / "run", CONFIG_YAML) as run,
    ):
        train(Hungry(), Pictures(), run, **settings(train_accumulate=2))


class Failing(ToyMethod):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def forward(self, views: list[Tensor], progress: float) -> dict[str, Tensor]:
        raise self.error


@pytest.mark.parametrize(
    ("error", "changes", "kind", "words"),
    [
        (RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"), {},
         ResourceError, "cpu: out of memory with 8 images"),
        (MemoryError(), {}, ResourceError, "cpu: out of memory with 8 images"),
        (RuntimeError("scatter_cuda does not have a deterministic implementation. You can turn it off"),
         {"train_deterministic": True}, ConfigError,
         r"train.deterministic: scatter_cuda does not have a deterministic implementation\n"),
        (RuntimeError("scatter_cuda does not have a deterministic implementation"), {}, RuntimeError, "scatter"),
        (RuntimeError("anything else"), {}, RuntimeError, "anything else"),
    ],
)  # fmt: skip
def test_failures_are_explained_or_left_alone(
    error: Exception, changes: dict[str, Any], kind: type[Exception], words: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=words), Run.create(tmp_path / "run", CONFIG_YAML) as run:
        train(Failing(error), Pictures(), run, **settings(**changes))


def test_deterministic_kernels_are_asked_for_while_it_trains_and_no_longer(tmp_path: Path) -> None:
    seen: list[bool] = []

    class Looking(ToyMethod):
        def forward(self, views: list[Tensor], progress: float) -> dict[str, Tensor]:
            seen.append(torch.are_deterministic_algorithms_enabled())
            return super().forward(views, progress)

    for wanted in (True, False):
        with Run.create(tmp_path / str(wanted), CONFIG_YAML) as run:
            train(Looking(), Pictures(), run, **settings(train_deterministic=wanted))
        assert set(seen) == {wanted}
        seen.clear()
        assert not torch.are_deterministic_algorithms_enabled()
    assert same_bits(final_weights(tmp_path / "True"), final_weights(tmp_path / "False"))


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")

    monkeypatch.setattr(Run, "log_metrics", full)
    with pytest.raises(ResourceError, match=r"no room left on the disk.*metrics.jsonl"):
        train_toy(tmp_path / "run")


class Checkpointing(ToyMethod):
    asked = False

    def __init__(self) -> None:
        super().__init__()
        self.student.network.set_grad_checkpointing = self.ask

    def ask(self, enable: bool) -> None:
        self.asked = enable


def test_activation_checkpointing_is_asked_of_the_network_or_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="activation_checkpointing: ToyNetwork does not offer it"):
        train_toy(tmp_path / "run", train_activation_checkpointing=True)
    method = Checkpointing()
    checkpoint_activations(method)
    assert method.asked


def test_what_compiling_cannot_do_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class BrokenError(Exception):
        pass

    BrokenError.__module__ = "torch._dynamo.exc"

    def fail(*args: Any, **kwargs: Any) -> None:
        raise BrokenError("cannot trace\nlong story")

    monkeypatch.setattr(torch, "compile", fail)
    with (
        pytest.raises(ConfigError, match=r"train.compile: torch.compile failed: cannot trace\n"),
        Run.create(tmp_path / "run", CONFIG_YAML) as run,
    ):
        train(ToyMethod(), Pictures(), run, **settings(train_compile=True))


# Several processes


def ranked(folder: Path, changes: dict[str, Any]) -> None:
    train_toy(folder, **changes)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_equal_one_and_go_on_alone(tmp_path: Path) -> None:
    ranked(tmp_path / "one", {})
    assert exit_codes(start_ranks(2, ranked, tmp_path / "two", {"train_accumulate": 2})) == [0, 0]
    one, two = final_weights(tmp_path / "one"), final_weights(tmp_path / "two")
    for name in one:
        if name.startswith("model."):
            torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-6)
    for line, same in zip(untimed_metrics(tmp_path / "one"), untimed_metrics(tmp_path / "two"), strict=True):
        assert line["loss"] == pytest.approx(same["loss"], rel=1e-5)
    with pytest.raises(KeyboardInterrupt):
        ranked(tmp_path / "cut", {"monitors": [RaiseAt(9)]})
    assert exit_codes(start_ranks(2, ranked, tmp_path / "cut", {})) == [0, 0]
    assert "saved by 1 processes, resumed by 2" in (tmp_path / "cut" / "log.txt").read_text()
    for name, value in final_weights(tmp_path / "cut").items():
        if name.startswith("model."):
            torch.testing.assert_close(one[name], value, rtol=1e-5, atol=1e-6)


def ranked_breaking(folder: Path) -> None:
    breaks = 10 / 24 if os.environ["RANK"] == "1" else 2.0
    train_toy(folder, method={"breaks_at": breaks}, train_max_bad_steps=0)


def ranked_stopped(folder: Path) -> None:
    train_toy(folder, method={"pause_seconds": 0.01, "dropout": 0.3}, train_epochs=20, handle_signals=True)


@pytest.mark.slow
@pytest.mark.distributed
def test_all_processes_stop_together(tmp_path: Path) -> None:
    assert exit_codes(start_ranks(2, ranked_breaking, tmp_path / "broken")) == [7, 7]
    [report] = (tmp_path / "broken" / "errors").glob("*not-finite.json")
    assert [len(rows) for rows in json.loads(report.read_text())["indices"]] == [4, 4]

    processes = start_ranks(2, ranked_stopped, tmp_path / "stopped")
    wait_for_lines(tmp_path / "stopped", 2)
    os.kill(processes[1].pid, signal.SIGTERM)
    assert exit_codes(processes) == [75, 75]
    assert exit_codes(start_ranks(2, ranked_stopped, tmp_path / "stopped")) == [0, 0]
    assert exit_codes(start_ranks(2, ranked_stopped, tmp_path / "straight")) == [0, 0]
    assert same_bits(final_weights(tmp_path / "straight"), final_weights(tmp_path / "stopped"))
    assert untimed_metrics(tmp_path / "straight") == untimed_metrics(tmp_path / "stopped")


@pytest.mark.slow
@pytest.mark.distributed
def test_a_lost_process_ends_the_others(tmp_path: Path) -> None:
    processes = start_ranks(2, ranked_stopped, tmp_path / "run")
    wait_for_lines(tmp_path / "run", 2)
    os.killpg(processes[1].pid, signal.SIGKILL)
    assert exit_codes(processes)[0] == 8, "the one that is left ends by itself"
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (facts["state"], facts["exit_code"]) == ("failed", 8)


class Shades(Pictures):
    """Pictures of one grey each, which is their label."""

    def __init__(self) -> None:
        super().__init__()
        self.labels: Any = np.arange(len(self)) * 3
        self.pixels[:] = self.labels[:, None, None, None]


class Labelled(ToyMethod):
    """Learns more from images of higher labels; remembers whether each label was its image's."""

    needs_labels = True
    seen: list[int]

    def forward(
        self, views: list[Tensor], progress: float, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        assert labels is not None
        assert torch.equal((views[0].mean(dim=(1, 2, 3)) * 255).round().long(), labels)
        self.seen = [*getattr(self, "seen", []), *labels.tolist()]
        patches = self.student(views[0]).patches
        return {"loss": (patches.square().mean(dim=(1, 2)) * labels).mean()}


@pytest.mark.parametrize("parts", [1, 2])
def test_labels_come_with_their_images_part_by_part(parts: int, tmp_path: Path) -> None:
    chosen = settings(train_accumulate=parts, train_epochs=2, optim_warmup_epochs=0.1)
    method = Labelled()
    with Run.create(tmp_path / "run", CONFIG_YAML) as run:
        train(method, Shades(), run, **chosen)
    batches = training_batches(
        Shades(), method.views, chosen["loader"], batch_size=8, seed=5, start_step=0, num_steps=6
    )
    assert method.seen == [label for batch in batches for label in batch.labels.tolist()]
    whole = Labelled()
    with Run.create(tmp_path / "whole", CONFIG_YAML) as run:
        train(whole, Shades(), run, **settings(train_epochs=2, optim_warmup_epochs=0.1))
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(method.state_dict()[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_every_group_learns_at_its_share_of_the_schedule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = ToyMethod()
    scales = {"student.network.norm.weight": 0.5, "student.network.patches.weight": 0.25}
    monkeypatch.setattr("fdkit.training.optimizer.layer_scales", lambda model, decay: scales)
    chosen = settings(optim_layer_decay=0.5)
    with Run.create(tmp_path / "run", CONFIG_YAML) as run:
        plan = make_plan(Pictures(), train=chosen["train"], optim=chosen["optim"], world=ALONE, device=CPU)
        trainer = Trainer(
            method, Pictures(), run, plan=plan, train=chosen["train"], optim=chosen["optim"], seed=5, world=ALONE,
            device=CPU,
        )  # fmt: skip
        for trainer.step in (0, 2, 13):
            trainer.set_rates(trainer.step / plan.num_steps)
            rates = {id(p): group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
            for name, parameter in method.named_parameters():
                assert rates[id(parameter)] == scales.get(name, 1.0) * plan.schedule(trainer.step), name


def ranked_labelled(folder: Path, changes: dict[str, Any]) -> None:
    with Run.create(folder, CONFIG_YAML) as run:
        train(Labelled(), Shades(), run, **settings(train_epochs=2, optim_warmup_epochs=0.1, **changes))


@pytest.mark.slow
@pytest.mark.distributed
def test_every_process_gets_the_labels_of_its_own_images(tmp_path: Path) -> None:
    ranked_labelled(tmp_path / "one", {})
    assert exit_codes(start_ranks(2, ranked_labelled, tmp_path / "two", {"train_accumulate": 2})) == [0, 0]
    one, two = final_weights(tmp_path / "one"), final_weights(tmp_path / "two")
    for name in one:
        if name.startswith("model."):
            torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-6)
