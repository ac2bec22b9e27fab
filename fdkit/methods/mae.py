"""MAE: hide most patches of an image, and predict their pixels from the few that stay visible.

The encoder, a plain vision transformer, sees the visible patches alone. A light decoder gets its tokens, and a mask
token for every hidden patch, all with their positions, and predicts each hidden patch's pixels, scaled to mean 0 and
variance 1 within the patch. The loss is the squared error on hidden patches. The decoder is dropped afterwards.
Source: He et al. 2021 (arXiv 2111.06377); what the paper leaves open follows facebookresearch/mae at efb2a80.
"""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from fdkit.config import Config
from fdkit.data.views import CropConfig, RandomCrop, Views
from fdkit.errors import ConfigError
from fdkit.methods._method import Method
from fdkit.methods._network import NetworkConfig, build_network
from fdkit.models.backbone import Backbone, Pooling
from fdkit.models.masking import Sampling, check_mask, draw_noise, num_visible, split_patches
from fdkit.models.patches import encode_visible, patch_grid, patchify, require_maskable, take_rows
from fdkit.models.pixel_decoder import (
    PixelDecoder,
    Reconstruction,
    pixel_targets,
    reconstruct,
)
from fdkit.models.representation import channel_std

DEFAULTS: dict[str, dict[str, Any]] = {
    "network": {
        "architecture": "vit_base_patch16_224",
        "position": "sincos",
        "sincos_first": "column",
        "initialisation": "mae",
        "interpolation": "bicubic",
    },
    "views": {"min_scale": 0.2, "interpolation": "bicubic"},
}


class MAEConfig(Config):
    """MAE; the defaults are those of the documented pretraining of every size."""

    mask_ratio: float = Field(default=0.75, gt=0, lt=1)
    """Share of the patches that is hidden; the number that stays visible is rounded down."""
    sampling: Sampling = "random"
    """Which patches are hidden: at random, in BEiT's large blocks, or all but one of every 2 x 2 (mask_ratio 0.75)."""
    norm_pixels: bool = True
    """Scale the pixels of each patch to mean 0 and variance 1 before they are predicted; better features, but a
    prediction that shows no brightness or colour of its own."""
    decoder_width: int = Field(default=512, ge=4)
    """Width of the decoder's tokens; a multiple of 4 and of decoder_heads."""
    decoder_depth: int = Field(default=8, ge=1)
    """Blocks of the decoder."""
    decoder_heads: int = Field(default=16, ge=1)
    """Attention heads of the decoder."""


class MAE(Method):
    """A vision transformer and a decoder that reconstruct hidden patches.

    pooling: the feature whose spread is logged, of images as the encoder sees them in training.
    seed: of the decoder's initial weights, drawn without touching the global generator. Masks come from torch's
    generator, so each process draws its own.
    Raises ConfigError for a network that cannot leave out patches, and a mask that hides none or all of them.
    """

    compares_images = False

    def __init__(
        self, student: Backbone, views: Views, config: MAEConfig, *, pooling: Pooling = "cls", seed: int
    ) -> None:
        super().__init__()
        if views.num_views != 1:
            raise ConfigError(f"MAE hides patches of 1 view of an image; the views make {views.num_views}")
        require_maskable(student)
        self.grid = patch_grid(student)
        check_mask(self.grid, config.sampling, config.mask_ratio)
        self.num_visible = num_visible(self.grid[0] * self.grid[1], config.mask_ratio)
        self.student = student
        self.views = views
        self.config = config
        self.pooling = pooling
        network: Any = student.network
        self.num_prefix_tokens: int = network.num_prefix_tokens
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.decoder = PixelDecoder(
                student.embed_dim,
                self.grid,
                patch_size=student.patch_size,
                num_prefix_tokens=self.num_prefix_tokens,
                width=config.decoder_width,
                depth=config.decoder_depth,
                num_heads=config.decoder_heads,
            )

    def forward(self, views: list[Tensor], progress: float) -> dict[str, Tensor]:
        """What `predict` gives for masks drawn now; views: one (B, 3, H, W) tensor in [0, 1]; progress is not used."""
        (images,) = views
        return self.predict(images, self.draw_noise(images))

    def draw_noise(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """(B, L): a number for each patch of images (B, 3, H, W), the smallest of which stay visible."""
        return draw_noise(
            len(images),
            self.grid,
            sampling=self.config.sampling,
            mask_ratio=self.config.mask_ratio,
            device=images.device,
            generator=generator,
        )

    def predict(self, images: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """The loss, and scalars that tell whether training is healthy, of images (B, 3, H, W) and noise (B, L).

        loss: squared error, averaged over the numbers of each hidden patch and over hidden patches; float32 or finer.
        explained_variance: share of the variance of these numbers that is predicted, at most 1; 0 for their mean.
        feature_std: of the encoder's pooled tokens. Source: He et al. 2021, section 3, "Reconstruction target".
        """
        split = split_patches(noise, self.num_visible)
        pixels = self.student.normalise(images)
        tokens = encode_visible(self.student, pixels, split.visible)
        prediction = self.decoder(tokens, split)
        with torch.autocast(images.device.type, enabled=False):
            hidden = take_rows(patchify(pixels, self.student.patch_size), split.hidden)
            target = pixel_targets(hidden, norm_pixels=self.config.norm_pixels)
            loss = (prediction.to(target.dtype) - target).square().mean()
        return {
            "loss": loss,
            "explained_variance": 1 - loss.detach() / target.var(correction=0),
            "feature_std": channel_std(self._pooled(tokens)),
        }

    def reconstruct(self, images: Tensor, generator: torch.Generator | None = None) -> Reconstruction:
        """Images (B, 3, H, W), in [0, 1], with hidden patches as predicted now; no gradient."""
        split = split_patches(self.draw_noise(images, generator), self.num_visible)
        return reconstruct(self.student, self.decoder, images, split, norm_pixels=self.config.norm_pixels)

    def _pooled(self, tokens: Tensor) -> Tensor:
        return tokens[:, 0] if self.pooling == "cls" else tokens[:, self.num_prefix_tokens :].mean(dim=1)


def build(config: MAEConfig, views: CropConfig, network: NetworkConfig, *, seed: int) -> MAE:
    """MAE on one crop of each image, without colour changes."""
    if not network.architecture.startswith("vit_"):
        raise ConfigError(
            f"network.architecture {network.architecture} cannot leave out patches: MAE needs a vision transformer",
            "use --network.architecture vit_base_patch16_224, or another vit_ of timm's",
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = build_network(network, image_size=views.image_size)
        require_maskable(student)
        decoder_seed = int(torch.randint(2**62, ()))
    return MAE(student, RandomCrop(views), config, pooling=network.pooling, seed=decoder_seed)
