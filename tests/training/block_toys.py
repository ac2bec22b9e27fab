"""A method with blocks to cut, small enough to train in milliseconds."""

from typing import Any

import torch
from torch import Tensor, nn
from training_toys import ToyMethod, ToyNetwork

from fdkit.models.backbone import Tokens
from fdkit.models.momentum import follow, momentum_copy


class Block(nn.Module):
    """Five rows in one matrix, which no number of processes above one divides, and one that lies on one alone."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.widen = nn.Linear(6, 5)
        self.gate = nn.Parameter(torch.ones(1, 5))
        self.narrow = nn.Linear(5, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens + self.narrow(torch.tanh(self.gate * self.widen(self.norm(tokens))))


class BlockNetwork(ToyNetwork):
    def __init__(self) -> None:
        super().__init__(dropout=0.0)
        self.blocks = nn.Sequential(*(Block() for _ in range(3)))

    def forward(self, images: Tensor) -> Tokens:
        tokens = self.blocks(self.patches(images).flatten(2).mT)
        return Tokens(tokens[:, :0], self.out(self.norm(tokens)), (2, 2))


class PlainBlockMethod(ToyMethod):
    """The toy with blocks."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        torch.manual_seed(2)
        self.student.network = BlockNetwork()


class BlockMethod(PlainBlockMethod):
    """The toy with blocks, which calls its student twice, and a momentum copy that counts in the loss."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.momentum_student = momentum_copy(self.student)

    def forward(self, views: list[Tensor], progress: float) -> dict[str, Tensor]:
        scalars = super().forward(views, progress)
        with torch.no_grad():
            slow = self.momentum_student(views[0]).patches
        distance = (self.student(views[0]).patches - slow).square().mean()
        return scalars | {"loss": scalars["loss"] + 0.1 * distance, "distance": distance.detach()}

    def after_step(self, progress: float) -> None:
        super().after_step(progress)
        follow(self.momentum_student, self.student, 0.9)
