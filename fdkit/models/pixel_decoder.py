"""MAE's decoder: a light transformer that says what the pixels of hidden patches are."""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fdkit.errors import ConfigError
from fdkit.models.backbone import Backbone
from fdkit.models.masking import Split
from fdkit.models.partial_block import block_rows, block_shared
from fdkit.models.patches import encode_visible, patchify, take_rows, unpatchify
from fdkit.models.vit import MAE_TOKEN_STD, sincos_position, xavier_linear_layers

MLP_RATIO = 4
VARIANCE_FLOOR = 1e-6
_LayerNorm = partial(nn.LayerNorm, eps=1e-6)


class PixelDecoder(nn.Module):
    """Predicts patches of pixels from the tokens of the visible ones, and a mask token for each that is hidden.

    in_dim: C of the encoder's tokens; grid: (h, w) patches; num_prefix_tokens: class and register tokens, which take
    part. Positions are fixed, 2-D sine-cosine, the column first. With `decoder_` before each name but `mask_token`,
    tensors have the names of the official files (positions: `pos_embed`).
    Raises ConfigError for a width that is not a multiple of 4 and of num_heads.
    Source: He et al. 2021, section 3 and appendix A.1; facebookresearch/mae at efb2a80, models_mae.py.
    """

    def __init__(
        self,
        in_dim: int,
        grid: tuple[int, int],
        *,
        patch_size: int,
        num_prefix_tokens: int = 1,
        width: int = 512,
        depth: int = 8,
        num_heads: int = 16,
    ) -> None:
        super().__init__()
        from timm.models.vision_transformer import Block

        if width % 4 or width % num_heads:
            raise ConfigError(
                f"a decoder {width} wide needs a width that is a multiple of 4 and of its {num_heads} heads",
                "the published one is 512 wide and has 16 heads",
            )
        self.num_prefix_tokens = num_prefix_tokens
        self.embed = nn.Linear(in_dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        table = torch.cat(
            [torch.zeros(num_prefix_tokens, width), sincos_position(grid, width, first="column")]
        )
        self.pos_embed = nn.Parameter(table[None], requires_grad=False)
        self.blocks = nn.ModuleList(
            Block(width, num_heads, MLP_RATIO, qkv_bias=True, norm_layer=_LayerNorm) for _ in range(depth)
        )
        self.norm = _LayerNorm(width)
        self.pred = nn.Linear(width, patch_size**2 * 3)
        nn.init.normal_(self.mask_token, std=MAE_TOKEN_STD)
        xavier_linear_layers(self)

    def forward(self, tokens: Tensor, split: Split) -> Tensor:
        """Predictions (B, H, P*P*3) for the hidden patches, in the order of `split.hidden`.

        tokens: (B, num_prefix_tokens + V, C), the encoder's, of the prefix and of `split.visible`.
        """
        *blocks, last = self.blocks
        if blocks and tokens.device.type == "cpu":
            # Hidden patches enter alike in every image. A GPU may lose by the gather what it saves: not measured.
            first, *blocks = blocks
            tokens = block_shared(first, self._known(tokens, split), self._unknown(), split.hidden)
        else:
            tokens = self._sequence(tokens, split)
        for block in blocks:
            tokens = block(tokens)
        # The loss reads hidden patches alone: the last block's queries and MLP are not needed elsewhere.
        tokens = block_rows(last, tokens, slice(-split.hidden.shape[1], None))
        prediction: Tensor = self.pred(self.norm(tokens))
        return prediction

    def predict_all(self, tokens: Tensor, split: Split) -> Tensor:
        """Predictions (B, h*w, P*P*3) for every patch, the visible ones too, row by row; tokens as for `forward`."""
        tokens = self._sequence(tokens, split)
        for block in self.blocks:
            tokens = block(tokens)
        predictions = self.pred(self.norm(tokens[:, self.num_prefix_tokens :]))
        return take_rows(predictions, split.restoring())

    def _sequence(self, tokens: Tensor, split: Split) -> Tensor:
        """Prefix, visible and hidden patches (B, P + V + H, width), each with its position.

        Attention knows no order, so the patches stay sorted by what they are, not by place.
        """
        return torch.cat([self._known(tokens, split), self._unknown()[split.hidden]], dim=1)

    def _known(self, tokens: Tensor, split: Split) -> Tensor:
        """(B, P + V, width): the encoder's tokens, each with its position."""
        prefix_rows, rows = self.pos_embed[0].tensor_split([self.num_prefix_tokens])
        prefix, visible = self.embed(tokens).tensor_split([self.num_prefix_tokens], dim=1)
        return torch.cat([prefix + prefix_rows, visible + rows[split.visible]], dim=1)

    def _unknown(self) -> Tensor:
        """(h * w, width): what stands for each patch where it is hidden, the same in every image."""
        return self.mask_token[0] + self.pos_embed[0, self.num_prefix_tokens :]


class PatchStatistics(NamedTuple):
    """Mean and standard deviation of each patch's own numbers, channels together; (B, K, 1)."""

    mean: Tensor
    std: Tensor


def patch_statistics(patches: Tensor) -> PatchStatistics:
    """Of patches (B, K, D): the variance divides by D - 1, and 1e-6 is added to it. Source: as for `PixelDecoder`."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return PatchStatistics(mean, (variance + VARIANCE_FLOOR).sqrt())


def pixel_targets(patches: Tensor, *, norm_pixels: bool) -> Tensor:
    """What is to be predicted of patches (B, K, D) of normalised images: they, or each whitened by its statistics."""
    if not norm_pixels:
        return patches
    mean, std = patch_statistics(patches)
    return (patches - mean) / std


class Reconstruction(NamedTuple):
    """B images as a decoder fills them in; RGB in [0, 1], at the size the network sees."""

    original: Tensor
    """(B, 3, H, W)."""
    prediction: Tensor
    """(B, 3, H, W): every patch as predicted, the visible ones too."""
    reference: Tensor
    """(B, 3, H, W): a guess without detail. Each patch's own mean where the prediction is scaled by the patch's own
    statistics, else the mean of the visible patches."""
    is_hidden: Tensor
    """(B, 1, H, W) bool."""
    error: Tensor
    """(B,): squared error of the targets, averaged over the hidden patches; the loss of each image."""
    is_scaled: bool
    """Whether predictions have been given the true mean and deviation of their patches."""

    def hidden_errors(self) -> Tensor:
        """(2, B): squared error of the hidden pixels in [0, 1], of the prediction and of the reference."""
        hidden = self.is_hidden.expand_as(self.original)
        guesses = torch.stack([self.prediction, self.reference])  # (2, B, 3, H, W)
        errors = (guesses - self.original).square() * hidden
        return errors.sum(dim=(2, 3, 4)) / hidden.sum(dim=(1, 2, 3))


@torch.no_grad()
def reconstruct(
    backbone: Backbone, decoder: PixelDecoder, images: Tensor, split: Split, *, norm_pixels: bool
) -> Reconstruction:
    """The images (B, 3, H, W), in [0, 1], with the patches of split.hidden predicted from the others.

    norm_pixels: what the decoder was trained on; its predictions then get the true mean and deviation of each patch.
    """
    pixels = backbone.normalise(images)
    grid = (pixels.shape[-2] // backbone.patch_size, pixels.shape[-1] // backbone.patch_size)
    patches = patchify(pixels, backbone.patch_size)
    tokens = encode_visible(backbone, pixels, split.visible)
    prediction = decoder.predict_all(tokens, split).to(patches.dtype)
    error = (prediction - pixel_targets(patches, norm_pixels=norm_pixels)).square().mean(dim=-1)
    if norm_pixels:
        mean, std = patch_statistics(patches)
        prediction, reference = prediction * std + mean, mean.expand_as(patches)
    else:
        colours = take_rows(patches, split.visible).unflatten(-1, (-1, 3)).mean(dim=(1, 2))  # (B, 3)
        reference = colours.repeat(1, patches.shape[-1] // 3)[:, None].expand_as(patches)
    is_hidden = split.is_hidden()

    def shown(patches: Tensor) -> Tensor:
        return (unpatchify(patches, grid) * backbone.std + backbone.mean).clamp(0, 1)

    return Reconstruction(
        original=shown(patches),
        prediction=shown(prediction),
        reference=shown(reference),
        is_hidden=unpatchify(is_hidden[..., None].expand_as(patches), grid)[:, :1],
        error=(error * is_hidden).sum(dim=1) / is_hidden.sum(dim=1),
        is_scaled=norm_pixels,
    )
