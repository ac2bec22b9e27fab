"""An image model that reads [0, 1] images and returns its final tokens, whatever library it comes from."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fdkit.errors import ConfigError
from fdkit.models.folding import Statistics, fold, folded_statistics

Pooling = Literal["cls", "patches"]
T = TypeVar("T")


class Tokens(NamedTuple):
    """What an image model says about a batch of B images, after its own final norm."""

    prefix: Tensor
    """(B, P, C): the class token, then registers; P is 0 for a model without a class token."""
    patches: Tensor
    """(B, h*w, C): one token a patch, row-major."""
    grid: tuple[int, int]
    """(h, w): rows and columns of patches."""

    def all(self) -> Tensor:
        """(B, P + h*w, C): prefix tokens, then patches."""
        return torch.cat([self.prefix, self.patches], dim=1)


def pool(tokens: Tokens, pooling: Pooling) -> Tensor:
    """One vector an image, (B, C): the class token, or the mean of the patch tokens.

    Raises ConfigError for "cls" when the model has no class token.
    """
    if pooling == "patches":
        return tokens.patches.mean(dim=1)
    if tokens.prefix.shape[1] == 0:
        raise ConfigError("pooling cls: this model has no class token", hint="use pooling patches")
    return tokens.prefix[:, 0]


class Preprocessing(NamedTuple):
    """How a model wants its images: statistics of [0, 1] RGB, and the evaluation crop."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    image_size: int
    """Height and width in pixels."""
    crop_ratio: float = 0.875
    """image_size / short side after resizing, when evaluating."""
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"

    def to_json(self) -> dict[str, Any]:
        """The same as plain data."""
        return {**self._asdict(), "mean": list(self.mean), "std": list(self.std)}


IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Backbone(nn.Module):
    """A network with its own preprocessing and a uniform way to its final tokens.

    network: the timm or open_clip module itself; its state dict keeps that library's names.
    tokens_of: maps (network, its input) to Tokens; the input is made of images in one place, `_network_input`.
    embed_dim: C; patch_size: input pixels between neighbouring tokens; num_prefix_tokens: P.
    recipe: plain data (library, architecture, model_args; the preprocessing is added here) from which
        `build_backbone` makes the same network again without weights.
    logits_of: maps (network, its input) to (B, K), the output of the model's own head: class logits, or CLIP's
        projected embedding; None if the model was built without one.
    The network may be of any dtype: images are resized and normalised in float32 and cast last.
    """

    def __init__(
        self,
        network: nn.Module,
        tokens_of: Callable[[nn.Module, Tensor], Tokens],
        *,
        embed_dim: int,
        patch_size: int,
        num_prefix_tokens: int,
        preprocessing: Preprocessing,
        recipe: dict[str, Any],
        logits_of: Callable[[nn.Module, Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.tokens_of = tokens_of
        self.logits_of = logits_of
        self.embed_dim = embed_dim
        self.patch_size = patch_size
        self.num_prefix_tokens = num_prefix_tokens
        self.preprocessing = preprocessing
        self.recipe = {**recipe, "preprocessing": preprocessing.to_json()}
        self.statistics = Statistics(preprocessing.mean, preprocessing.std)
        self.sizes: tuple[int, ...] = ()
        """Further image sizes that the network takes as they are."""
        self.num_parts = 1
        """Parts a batch goes through the network in; more cost a second forward pass and save its memory."""

    @property
    def image_size(self) -> int:
        """Height and width, in pixels, of the images the network takes."""
        return self.preprocessing.image_size

    @property
    def mean(self) -> Tensor:
        """(3, 1, 1): of RGB in [0, 1], float32 or wider."""
        return self.statistics.mean

    @property
    def std(self) -> Tensor:
        """(3, 1, 1): of RGB in [0, 1], float32 or wider."""
        return self.statistics.std

    @property
    def dtype(self) -> torch.dtype:
        """Of the network's weights, and so of its tokens."""
        return next((weight.dtype for weight in self.network.parameters()), self.mean.dtype)

    def fold_statistics(self) -> bool:
        """Folds mean and std into the network's first convolution where that is exact; True if they are folded now.

        Tokens stay the same to float32 rounding, and images need no pass of their own; the state dict stays as it is.
        From then on the network itself reads images in [0, 1]; `normalise` is for networks without this.
        """
        folded = folded_statistics(self.network)
        return folded == self.statistics.stated if folded else fold(self.network, self.statistics)

    def normalise(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), RGB in [0, 1] and of any float dtype, resized if needed, minus mean over std.

        Images of another size than `image_size`, or one of `sizes`, are resized (bicubic, antialiased). Float32 or
        wider.
        """
        normalised: Tensor = self.statistics(self._resized(images))
        return normalised

    def _resized(self, images: Tensor) -> Tensor:
        images = images.to(self.mean.dtype)
        size = (self.image_size, self.image_size)
        if tuple(images.shape[-2:]) in {size, *((other, other) for other in self.sizes)}:
            return images
        return F.interpolate(images, size=size, mode="bicubic", antialias=True).clamp(0, 1)

    def _network_input(self, images: Tensor) -> Tensor:
        """What the network reads, of images in [0, 1]: the one place that knows whether it normalises them itself."""
        folded = folded_statistics(self.network)
        if folded is None:
            return self.normalise(images).to(self.dtype)
        if folded != self.statistics.stated:
            raise ConfigError(
                f"the network's input statistics are folded as {folded}, this backbone states {self.statistics.stated}",
                hint="change the preprocessing before fold_statistics, not after",
            )
        return self._resized(images)

    def forward(self, images: Tensor) -> Tokens:
        """Final tokens of images (B, 3, H, W), RGB in [0, 1]."""
        parts = self._in_parts(self._tokens, images)
        if len(parts) == 1:
            return parts[0]
        prefixes, patches, grids = zip(*parts, strict=True)
        return Tokens(torch.cat(prefixes), torch.cat(patches), grids[0])

    def pooled(self, images: Tensor, pooling: Pooling) -> Tensor:
        """What `pool` makes of the final tokens, (B, C), of images (B, 3, H, W), RGB in [0, 1]."""
        return torch.cat(self._in_parts(lambda part: self._pooled(part, pooling), images))

    def _pooled(self, images: Tensor, pooling: Pooling) -> Tensor:
        from fdkit.models.class_token import class_token, has_fast_class_token  # which know Tokens from here
        from fdkit.models.tokens import timm_tokens

        if pooling == "cls" and self.tokens_of is timm_tokens and has_fast_class_token(self.network):
            return class_token(self.network, self._network_input(images))
        return pool(self._tokens(images), pooling)

    def _tokens(self, images: Tensor) -> Tokens:
        return self.tokens_of(self.network, self._network_input(images))

    def _in_parts(self, compute: Callable[[Tensor], T], images: Tensor) -> list[T]:
        """What `compute` makes of each part of a batch; activations of one part at a time live, and are made twice."""
        if self.num_parts == 1:
            return [compute(images)]
        if not torch.is_grad_enabled():
            return [compute(part) for part in images.chunk(self.num_parts)]
        return [checkpoint(compute, part, use_reentrant=False) for part in images.chunk(self.num_parts)]

    def encode_layers(
        self, images: Tensor, layers: Sequence[int], *, norm: bool | Sequence[bool]
    ) -> tuple[Tokens, ...]:
        """Tokens of any layers, for images (B, 3, H, W), RGB in [0, 1]; the rest is as for `layers.layer_tokens`."""
        from fdkit.models.layers import layer_tokens  # which knows Tokens from here

        return layer_tokens(self.network, self._network_input(images), layers, norm=norm)

    def logits(self, images: Tensor) -> Tensor:
        """The model's own head on images (B, 3, H, W) in [0, 1]: (B, K) class logits or projected embedding.

        Raises ConfigError if the model was built without its head.
        """
        if self.logits_of is None:
            name = self.recipe.get("architecture", "this model")
            raise ConfigError(
                f"{name} has no classifier or projection, so it has no logits",
                hint="use the feature map or the pooled features, or weights that come with a head",
            )
        return self.logits_of(self.network, self._network_input(images))
