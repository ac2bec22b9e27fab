"""A teacher: an image model that is read and never changed."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from fdkit.models.backbone import Backbone, Tokens


class Teacher(nn.Module):
    """A frozen Backbone: always in eval, without gradients, in no state dict, no optimiser and no gradient sync.

    The backbone is held outside the module tree, so a method that holds a teacher has only its own parameters;
    `.to()`, `.cuda()` and `.half()` move it all the same.
    name: what the user called it; source: its long form; license: of its weights; sha256: of the weight file,
    None for random weights.
    """

    backbone: Backbone

    def __init__(
        self,
        backbone: Backbone,
        *,
        name: str,
        source: str = "",
        license: str = "unstated",
        sha256: str | None = None,
    ) -> None:
        super().__init__()
        self.__dict__["backbone"] = backbone.eval().requires_grad_(False)
        self.name = name
        self.source = source or name
        self.license = license
        self.sha256 = sha256
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

    @torch.no_grad()  # not inference_mode: targets are saved for the student's backward
    def encode(self, images: Tensor) -> Tokens:
        """Final tokens, after the teacher's own norm, of images (B, 3, H, W), RGB in [0, 1]; no gradient."""
        tokens: Tokens = self.backbone(images.to(self.backbone.mean.dtype))
        return tokens

    def forward(self, images: Tensor) -> Tokens:
        """The same as `encode`."""
        return self.encode(images)

    def identity(self) -> dict[str, Any]:
        """Plain data that says which teacher this is: kept with every run and every feature cache."""
        return {
            "name": self.name,
            "source": self.source,
            "license": self.license,
            "sha256": self.sha256,
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
