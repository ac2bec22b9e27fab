"""A toy training as torchrun starts it: elastic_toy.py FOLDER HOW; a rank kills itself once where DIES_AT says so.

HOW: "overwrite", "resume" or "new", what is typed. DIES_AT: "RANK:STEP:FILE", where FILE says that it happened; "-" for
every time.
"""

import os
import signal
import sys
from pathlib import Path

import torch
from torch import Tensor
from training_toys import CONFIG_YAML, Pictures, ToyMethod, settings

from fdkit.errors import FdkitError
from fdkit.training import watch
from fdkit.training.distributed import current_world, process_group
from fdkit.training.loop import train
from fdkit.training.run import Run


class Dying(ToyMethod):
    """A toy that kills its process, as kill -9 would, at a step of the first attempt."""

    def forward(self, views: list[Tensor], progress: float) -> dict[str, Tensor]:
        rank, step, marker = os.environ.get("DIES_AT", "-1:0:none").split(":", 2)
        if (
            current_world().rank == int(rank)
            and self.step(progress) == int(step)
            and not (marker != "-" and Path(marker).exists())
        ):
            if marker != "-":
                Path(marker).write_text("died")
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(views, progress)


def main(folder: Path, how: str) -> None:
    """Train to the end, as a command would."""
    torch.set_num_threads(1)
    watch.PULSE_SECONDS, watch.SILENT_SECONDS = 0.3, 10.0
    resume, overwrite = how == "resume", how == "overwrite"
    pause = float(os.environ.get("PAUSE_SECONDS", "0"))
    with (
        process_group(torch.device("cpu"), 60),
        Run.create(folder, CONFIG_YAML, resume=resume, overwrite=overwrite) as run,
    ):
        train(Dying(dropout=0.3, pause_seconds=pause), Pictures(), run, **settings(handle_signals=True))


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), sys.argv[2])
    except FdkitError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
