"""Breaks fdkit on purpose and counts: commands killed, disks filled, files forged, numbers poisoned, processes lost.

Every trial is a function of the test suite (tests/faults), which runs it small; here it runs large, in a process of its
own. The counts go into a JSON file and from there into the figures of docs/reliability.md. A trial that fails anywhere
ends this script with code 1, and its failures stand on the page.

    python benchmarks/reliability.py --output benchmarks/results/reliability.json --page docs/reliability.md
    python benchmarks/reliability.py --share 0.02                    # a few minutes, to see that it runs
    python benchmarks/reliability.py --only kills images             # some trials alone; the others' counts stay
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from data_path import environment, git

TESTS = Path(__file__).parents[1] / "tests"
MOST_SHOWN = 9
NOT_COUNTS = {"tried", "failures", "seed", "seconds", "unit", "commit"}
BEGIN, END = "<!-- figures: made by benchmarks/reliability.py -->", "<!-- end of figures -->"


class Trial(NamedTuple):
    """One way to break it."""

    title: str
    function: str
    """MODULE.FUNCTION in tests/faults, called with a folder, an amount and a seed."""
    amount: int
    """How much of it."""
    unit: str
    """What the amount counts."""


TRIALS = {
    "kills": Trial("commands killed at random moments and started again", "kills.kill_jobs", 130, "kills"),
    "changes": Trial(
        "a distillation killed at one change to the disk after the other",
        "kills.kill_at_every_change",
        40,
        "kills",
    ),
    "checkpoints": Trial("checkpoints damaged", "checkpoint_damage.damage_checkpoints", 3000, "damages"),
    "run files": Trial("other files of a run damaged", "checkpoint_damage.damage_run_files", 400, "damages"),
    "disks": Trial("disks too small for what a command writes", "disks.fill_disks", 24, "disks"),
    "images": Trial("broken and hostile image files", "broken_images.try_images", 2500, "files"),
    "weights": Trial("hostile and damaged files of weights", "weight_files.try_weights", 4000, "files"),
    "archives": Trial("hostile archives", "archives.try_archives", 600, "archives"),
    "readers": Trial("damaged files given to every reader", "readers.fuzz_readers", 12000, "executions"),
    "configurations": Trial(
        "recipes and command lines drawn at random", "configs.try_configs", 200, "commands"
    ),
    "recipes": Trial(
        "shipped recipes, two real steps of each", "recipe_steps.two_steps_of_every_recipe", 1000, "recipes"
    ),
    "numbers": Trial(
        "NaN, infinity and missing memory injected", "numeric_faults.inject_numbers", 36, "faults"
    ),
    "precisions": Trial("runs in bf16 beside fp32", "agreement.precisions_agree", 14, "ways of training"),
    "seeds": Trial("the same command twice", "agreement.seeds_repeat", 14, "ways of training"),
    "processes": Trial("ranks killed or stopped under torchrun", "processes.lose_processes", 6, "ranks"),
    "unequal ranks": Trial(
        "ranks that differ in images, configuration, code or teacher", "processes.set_apart", 7, "pairs"
    ),
    "names": Trial("commands shown hostile names", "hostile_names.try_names", 99, "commands"),
    "network": Trial("commands without a network", "network.speak_to_no_one", 4, "commands"),
    "hub": Trial("files of a hub damaged, cut, changed or moved", "supply.tamper", 70, "files"),
    "pages": Trial("reports and cards of hostile names", "pages.open_pages", 20, "pages"),
    "soak": Trial("steps in a row", "soak.soak", 10000, "steps"),
    "million": Trial("image files in one folder", "soak.million_files", 1_000_000, "files"),
}
"""By the name that --only takes; amounts that together take some 80 minutes of one core."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=list(TRIALS), help="none: the page alone")
    parser.add_argument("--share", type=float, default=1.0, help="of the full amounts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="trials at a time, each of one core")
    parser.add_argument("--output", type=Path, help="JSON; counts of trials that are not run again stay")
    parser.add_argument("--page", type=Path, help="a page between whose marks the figures are put")
    parser.add_argument("--run", choices=TRIALS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if unknown := set(arguments.only) - TRIALS.keys():
        parser.error(f"--only {' '.join(sorted(unknown))}: there are {', '.join(TRIALS)}")
    if arguments.run:
        print(json.dumps(run_here(TRIALS[arguments.run], arguments.share, arguments.seed)))
        return
    report = read(arguments.output)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        runs = {pool.submit(run, name, arguments.share, arguments.seed): name for name in arguments.only}
        for done in as_completed(runs):
            name, result = runs[done], done.result()
            print(f"{name}: {sentence(result)}", flush=True)
            report["trials"][name] = result
            report["environment"] = environment()
            if arguments.output:
                arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    if not report["trials"]:
        parser.error("no trial was run, and --output has none")
    text = figures(report)
    if arguments.page:
        page = arguments.page.read_text()
        arguments.page.write_text(with_figures(page, text))
    print(text)
    sys.exit(int(any(result["failures"] for result in report["trials"].values())))


def read(path: Path | None) -> dict[str, Any]:
    """The report so far, empty where there is none."""
    if path is not None and path.exists():
        report: dict[str, Any] = json.loads(path.read_text())
        return report
    return {"trials": {}}


def run(name: str, share: float, seed: int) -> dict[str, Any]:
    """Run a trial in a process of its own; its counts, or the end of the process as a failure."""
    command = [sys.executable, __file__, "--run", name, "--share", str(share), "--seed", str(seed)]
    started, commit = time.perf_counter(), git("rev-parse", "HEAD")[:7]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = round(time.perf_counter() - started, 1)
    try:
        result = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        words = (done.stderr.strip().splitlines() or ["nothing said"])[-1]
        result = {"tried": 0, "failures": [f"the trial itself ended with code {done.returncode}: {words}"]}
    known = {
        "unit": TRIALS[name].unit,
        "seed": seed,
        "seconds": seconds,
        "commit": commit,
    }
    return result | known


def run_here(trial: Trial, share: float, seed: int) -> dict[str, Any]:
    """Run a trial in this process, in a folder of its own."""
    sys.path.insert(0, str(TESTS))
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    torch.set_num_threads(1)  # sums, and so bits, depend on the number of threads
    module, function = trial.function.split(".")
    call = getattr(import_module(f"faults.{module}"), function)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FDKIT_CACHE"] = str(Path(folder) / "cache")
        scratch = Path(folder) / "trial"
        scratch.mkdir()
        result: dict[str, Any] = call(scratch, amount=max(1, round(trial.amount * share)), seed=seed)
    return result


def sentence(result: dict[str, Any]) -> str:
    """A trial's counts in a line."""
    failed = len(result["failures"])
    counts = ", ".join(
        f"{name.replace('_', ' ')} {value}"
        for name, value in result.items()
        if isinstance(value, (int, float)) and name not in NOT_COUNTS
    )
    said = f"{result['tried']:,} {result['unit']}, {failed} failed ({result['seconds']:.0f} s)"
    return f"{said}: {counts}" if counts else said


def figures(report: dict[str, Any]) -> str:
    """The table of all trials, and what failed, in Markdown."""
    where, trials = report["environment"], report["trials"]
    lines = ["| | tried | failed | what was counted |", "|---|---|---|---|"]
    for name, trial in TRIALS.items():
        if name in trials:
            result = trials[name]
            tried = f"{result['tried']:,} {result['unit']}"
            lines.append(f"| {trial.title} | {tried} | {len(result['failures'])} | {counted(result)} |")
    total = sum(result["seconds"] for result in trials.values())
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    lines += ["", f"{where['cpu']}, one core a trial, {total / 60:.0f} minutes in all; seed "
              f"{', '.join(sorted({str(result['seed']) for result in trials.values()}))}; {versions}; "
              f"commit {', '.join(sorted({result['commit'] for result in trials.values()}))}."]  # fmt: skip
    failures = [
        f"- {TRIALS[name].title}: {failure}" for name in trials for failure in trials[name]["failures"][:20]
    ]
    return "\n".join([*lines, *(["", "What failed:", "", *failures] if failures else [])])


def counted(result: dict[str, Any]) -> str:
    """The counts beside the number of trials, in words; long lists of them stand in the JSON file alone."""
    parts = []
    for name, value in result.items():
        if name in NOT_COUNTS or isinstance(value, list):
            continue
        if isinstance(value, dict) and (
            len(value) > MOST_SHOWN or isinstance(min(value.values(), key=str), dict)
        ):
            shown = f"{len(value)}, one by one in the JSON file"
        elif isinstance(value, dict):
            shown = ", ".join(f"{key} {plain(one)}" for key, one in value.items())
        else:
            shown = plain(value)
        parts.append(f"{name.replace('_', ' ')}: {shown}")
    return "; ".join(parts).replace("|", "\\|")


def plain(value: Any) -> str:
    """A number as people read it."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def with_figures(page: str, text: str) -> str:
    """The page with the figures between its marks."""
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    assert pattern.search(page), f"the page has no marks {BEGIN}"
    return pattern.sub(lambda _: f"{BEGIN}\n\n{text}\n\n{END}", page)


if __name__ == "__main__":
    main()
