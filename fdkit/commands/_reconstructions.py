"""Pictures of what a masked autoencoder reconstructs while it trains."""

from pathlib import Path

import numpy as np
import torch

from fdkit.analysis._figure import figure_bytes
from fdkit.analysis.reconstruction import SCALED, draw_pictures, panels_of, psnr
from fdkit.data.loader import LoaderConfig, evaluation_batches
from fdkit.data.sources import ImageSource
from fdkit.data.subset import Subset
from fdkit.evaluation.features import evaluation_crop
from fdkit.methods._method import Method
from fdkit.methods.mae import MAE

NUM_IMAGES = 6


class Reconstructions:
    """A monitor for the training loop: the same few images, under the same masks, as the method fills them in now.

    source: the images trained on, of which a few spread over all are taken; folder: the run's, which gets
    figures/reconstruction-STEP.png; every_steps: steps between two pictures; seed: of the masks.
    """

    name = "reconstruction"

    def __init__(
        self, source: ImageSource, folder: Path, *, every_steps: int, loader: LoaderConfig, seed: int = 0
    ) -> None:
        self.every_steps = every_steps
        self._source = Subset(source, np.unique(np.linspace(0, len(source) - 1, NUM_IMAGES).round()))
        self._folder = folder / "figures"
        self._loader = loader
        self._seed = seed

    def __call__(self, method: Method, step: int) -> dict[str, float]:
        """Draw once; reconstruction_psnr is of the hidden pixels, in dB. The method is left in eval."""
        assert isinstance(method, MAE), f"{type(method).__name__} reconstructs nothing"
        method.eval()
        views = evaluation_crop(method.student.preprocessing)
        (batch,) = evaluation_batches(self._source, views, self._loader, batch_size=NUM_IMAGES)
        images = views.finish(batch.crops, batch.colour)[0].to(method.student.mean.device)
        made = method.reconstruct(images, torch.Generator().manual_seed(self._seed))
        error = made.hidden_errors()[0].mean().item()
        title = f"step {step}: {100 * method.config.mask_ratio:.0f} % hidden, {psnr(error):.1f} dB"
        title += SCALED if made.is_scaled else ""
        rows = [panels_of(made, index) for index in range(len(images))]
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"reconstruction-{step}.png"
        path.write_bytes(figure_bytes(draw_pictures([rows], [title]), "png"))
        return {"reconstruction_psnr": psnr(error)}


def build_reconstructions(
    method: Method, source: ImageSource, folder: Path, *, every_steps: int, loader: LoaderConfig
) -> list[Reconstructions]:
    """The monitor of a method that reconstructs images; none for another method."""
    if not isinstance(method, MAE):
        return []
    return [Reconstructions(source, folder, every_steps=every_steps, loader=loader)]
