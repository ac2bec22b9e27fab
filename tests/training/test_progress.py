import logging

import pytest

import fdkit.training.progress as module
from fdkit.training.progress import Clock, Progress, duration, health_line

METRICS = {"loss": 0.3123, "lr": 1.2e-3, "images_per_second": 812.3, "data_wait_ratio": 0.031}


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (59.7, "1 m 0 s"), (725, "12 m 5 s"), (33125, "9 h 12 m"), (273_600, "3 d 4 h")],
)
def test_durations_read_well(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_the_line_says_how_training_goes() -> None:
    line = health_line(1200, 125_000, METRICS | {"explained_variance": 0.412}, eta_seconds=33125)
    assert line == (
        "step 1200/125000  loss 0.312  explains 41 % of the target's variance  "
        "lr 1.2e-3  812 img/s  data wait 3 %  eta 9 h 12 m"
    )
    assert "explains" not in health_line(1, 2, METRICS, eta_seconds=1)


FOUND = {"knn_top1": 0.4521, "channel_std_ratio": 0.934, "effective_rank": 141.2, "alignment": 0.3}


def test_the_line_shows_what_monitors_found_and_stays_short() -> None:
    metrics = METRICS | {"explained_variance": 0.412}
    line = health_line(12_000, 125_000, metrics, eta_seconds=33125, found=FOUND)
    assert line == (
        "step 12000/125000  loss 0.312  explains 41 %  kNN 45.2 %  std 0.93  rank 141  "
        "lr 1.2e-3  812 img/s  eta 9 h 12 m"
    )
    assert len(line) < 115
    alone = health_line(1, 2, METRICS, eta_seconds=1, found={"knn_top1": 0.4521})
    assert "kNN 45.2 %" in alone
    assert "std" not in alone


def test_waiting_that_costs_speed_keeps_its_place_in_the_line() -> None:
    waits = health_line(1, 2, METRICS | {"data_wait_ratio": 0.2}, eta_seconds=1, found=FOUND)
    assert "data wait 20 %" in waits


class Ticks:
    now = 100.0

    def perf_counter(self) -> float:
        return self.now

    monotonic = perf_counter


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> Ticks:
    ticks = Ticks()
    monkeypatch.setattr(module, "time", ticks)
    return ticks


def test_the_clock_measures_speed_and_waiting_and_leaves_out_what_it_is_told(ticks: Ticks) -> None:
    clock = Clock(batch_size=8)
    for _ in range(5):
        clock.waited(0.5)
        ticks.now += 2
        clock.finished_step()
    ticks.now += 50
    clock.exclude(50)
    assert clock.read() == pytest.approx({"images_per_second": 4, "data_wait_ratio": 0.25, "seconds": 10})
    assert clock.eta_seconds(10) == pytest.approx(20)


def test_waiting_for_images_is_said_once(ticks: Ticks, caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock(batch_size=8, advise=lambda ratio, rate: f"waits {ratio:.3f}, could take {rate:.4f}")
    for _ in range(4):
        clock.waited(5)
        ticks.now += 40
        clock.finished_step()
        clock.read()
    assert [record.message for record in caplog.records] == [
        "waits 0.125, could take 0.2286"  # 16 images in 80 s, 10 of them waited
    ]


def test_without_a_terminal_a_line_comes_every_half_minute(
    ticks: Ticks, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fdkit")
    progress = Progress(100, 0, visible=True)
    for step in range(10, 101, 10):
        progress.show(step, METRICS, eta_seconds=1)
        ticks.now += 12
    progress.close()
    assert [record.message.split()[1] for record in caplog.records] == [
        "10/100",
        "40/100",
        "70/100",
        "100/100",
    ]


def test_findings_stay_in_the_line_until_newer_ones(ticks: Ticks, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fdkit")
    progress = Progress(100, 0, visible=True)
    progress.remember({"knn_top1": 0.1})
    progress.remember(FOUND | {"knn_top1": 0.3})
    progress.remember({"knn_top1": 0.4})
    progress.show(10, METRICS, eta_seconds=1)
    progress.close()
    assert "kNN 40.0 %  std 0.93  rank 141" in caplog.records[0].message
