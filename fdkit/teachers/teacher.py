"""A teacher: an image model that is read and never changed."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self, overload

import torch
from torch import Tensor, nn

from fdkit.models.backbone import Backbone, Tokens
from fdkit.models.layers import layer_positions, list_layers
from fdkit.teachers.origin import Origin


def short_names(names: Sequence[str]) -> list[str]:
    """What figures and logs call models: the last part of a path, whole names where that is not unique."""
    short = [Path(name).name or name for name in names]
    return [part if short.count(part) == 1 else name for part, name in zip(short, names, strict=True)]


class Teacher(nn.Module):
    """A frozen Backbone: always in eval, without gradients, in no state dict, no optimiser and no gradient sync.

    The backbone is held outside the module tree, so a method that holds a teacher has only its own parameters;
    `.to()`, `.cuda()` and `.half()` move it all the same.
    name: what the user called it; source: its long form; license: of its weights; is_noncommercial: whether that
    licence forbids commercial use; sha256: of the weight file, None for random weights; origin: where published weights
    came from, None for those of this machine.
    """

    backbone: Backbone

    def __init__(
        self,
        backbone: Backbone,
        *,
        name: str,
        source: str = "",
        license: str = "unstated",
        is_noncommercial: bool = False,
        sha256: str | None = None,
        origin: Origin | None = None,
    ) -> None:
        super().__init__()
        self.__dict__["backbone"] = backbone.eval().requires_grad_(False)
        self.name = name
        self.source = source or name
        self.license = license
        self.is_noncommercial = is_noncommercial
        self.sha256 = sha256
        self.origin = origin
        self.training = False

    @property
    def embed_dim(self) -> int:
        """Width C of the tokens."""
        return self.backbone.embed_dim

    @property
    def patch_size(self) -> int:
        """Input pixels between neighbouring tokens."""
        return self.backbone.patch_size

    @property
    def num_prefix_tokens(self) -> int:
        """Class and register tokens before the patches."""
        return self.backbone.num_prefix_tokens

    @property
    def image_size(self) -> int:
        """Height and width, in pixels, the teacher sees; images of another size are resized."""
        return self.backbone.image_size

    @property
    def num_layers(self) -> int:
        """Blocks of a transformer, or stages of a network whose grid changes; ConfigError if they are not known."""
        return len(list_layers(self.backbone.network))

    def layer_dim(self, layer: int | None, *, norm: bool = True) -> int:
        """Width C of the tokens that `encode` gives for a layer; raises ConfigError where `encode` does."""
        if layer is None and norm:
            return self.embed_dim
        network = self.backbone.network
        (place,) = layer_positions(network, [-1 if layer is None else layer], norm=norm)
        return list_layers(network)[place].width

    @overload
    def encode(self, images: Tensor, *, layer: int | None = None, norm: bool = True) -> Tokens: ...

    @overload
    def encode(self, images: Tensor, *, layer: Sequence[int], norm: bool = True) -> tuple[Tokens, ...]: ...

    @torch.no_grad()  # not inference_mode: targets are saved for the student's backward
    def encode(
        self, images: Tensor, *, layer: int | Sequence[int] | None = None, norm: bool = True
    ) -> Tokens | tuple[Tokens, ...]:
        """Tokens of images (B, 3, H, W), RGB in [0, 1]; no gradient.

        layer: None is the end of the network; a number a block, or a stage of Swin, ConvNeXt and ResNet, where negative
            ones count from the end; several numbers give several Tokens in that order, from one pass.
        norm: through the network's own final norm, if it has one; False gives them as the layer leaves them.
        Raises ConfigError for a layer that is not there, and for the norm at a stage whose width it does not fit.
        """
        if layer is None and norm:
            final: Tokens = self.backbone(images)
            return final
        last = -1 if layer is None else layer
        layers = [last] if isinstance(last, int) else last
        tokens = self.backbone.encode_layers(images, layers, norm=norm)
        return tokens[0] if isinstance(last, int) else tokens

    def forward(self, images: Tensor) -> Tokens:
        """The final tokens, as `encode` gives them."""
        return self.encode(images)

    def identity(self) -> dict[str, Any]:
        """Plain data that says which teacher this is: kept with every run and every feature cache."""
        return {
            "name": self.name,
            "source": self.source,
            "license": self.license,
            "is_noncommercial": self.is_noncommercial,
            "sha256": self.sha256,
            "origin": None if self.origin is None else self.origin._asdict(),
            "recipe": self.backbone.recipe,
        }

    def train(self, mode: bool = True) -> Self:
        """Stays in eval, whatever the mode of the model around it."""
        return super().train(False)

    def extra_repr(self) -> str:
        """What `print` shows in place of a module tree."""
        return f"{self.name}, {self.embed_dim} wide, patch {self.patch_size}, {self.image_size} px"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.backbone._apply(fn, recurse)
        return self
