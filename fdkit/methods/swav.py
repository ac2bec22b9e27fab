"""SwAV: predict from one crop of an image which prototypes another crop of it belongs to.

Features are compared with learned prototypes. The codes of the two large crops are their soft assignments to
prototypes, balanced over all ranks' batches (Sinkhorn-Knopp) so that every prototype gets an equal share: that
prevents collapse without negatives or momentum. Every other crop, the small ones too, must predict these codes.
Source: Caron et al. 2020 (arXiv 2006.09882); what the paper leaves open follows facebookresearch/swav at 06b1b7c,
main_swav.py and src/resnet50.py.
"""

from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from fdkit.config import Config
from fdkit.data.views import MultiCrop, MultiCropConfig, Views
from fdkit.errors import ConfigError
from fdkit.methods._batch_norm import check_batch_norm
from fdkit.methods._method import Duration, Method
from fdkit.methods._network import NetworkConfig, build_network
from fdkit.methods._queue import Queue, check_queue
from fdkit.methods._resnet import with_full_residuals
from fdkit.models.backbone import Backbone, Pooling
from fdkit.models.collectives import gather_rows, rank, sum_over_ranks, world_size
from fdkit.models.heads import mlp_head
from fdkit.models.representation import channel_std, unit_rows

DEFAULTS: dict[str, dict[str, Any]] = {
    "network": {"architecture": "resnet50", "pooling": "patches", "std": (0.228, 0.224, 0.225)},
    "views": {
        "min_scale": 0.14,
        "num_local": 6,
        "local_size": 96,
        "local_scale": (0.05, 0.14),
        "brightness": 0.8,
        "contrast": 0.8,
        "saturation": 0.8,
        "hue": 0.2,
        "blur_probability": (0.5, 0.5),
        "local_blur_probability": 0.5,
        "solarize_probability": (0.0, 0.0),
    },
}

NUM_CODED = 2
"""Crops whose codes the others predict: the first two, which are the large ones."""


class SwAVConfig(Config):
    """SwAV; the defaults are those of a ResNet-50 in batches of 4096."""

    hidden_dim: int = Field(default=2048, ge=1)
    """Width of the projector's hidden layer."""
    output_dim: int = Field(default=128, ge=2)
    """Width of the projector's output and of the prototypes."""
    head_norm: bool = True
    """Batch norm behind the projector's hidden layer; the MoCo v3 paper leaves it out with vision transformers."""
    num_prototypes: int = Field(default=3000, ge=2)
    """Prototypes; far more than there are kinds of images, and it matters little how many."""
    temperature: float = Field(default=0.1, gt=0)
    """Divides the cosines with the prototypes before the softmax of the predictions."""
    epsilon: float = Field(default=0.05, ge=0.03)
    """Divides the cosines before the codes are balanced; larger makes codes softer, below 0.03 float32 underflows."""
    num_sinkhorn_iterations: int = Field(default=3, ge=1)
    """Times that prototypes, then samples, are scaled to equal shares."""
    freeze_prototypes_steps: int = Field(default=313, ge=0)
    """First steps during which prototypes stay as drawn: 313 with batches of 4096, 5005 with 256 (an epoch)."""
    queue_size: int = Field(default=0, ge=0)
    """Earlier images whose features take part in balancing, for batches that are small beside the prototypes: 3840
    with batches of 256; a multiple of the batch size, 0 for none."""
    queue_start_epoch: int = Field(default=15, ge=0)
    """Epochs before the queue begins to fill; it is used once it is full."""


class SwAV(Method):
    """Swapped prediction of balanced codes between two large crops, and from the small ones to both.

    seed: of projector and prototypes, which are drawn without touching the global generator.
    Batch norms are synchronised already, whether or not a process group runs: do not convert them again.

    Prototypes are scaled to length 1 in place before every forward pass of training, so their gradient is that of
    plain parameters, not of a normalisation. With gradient accumulation the codes of a part are balanced over that part
    alone, and the queue takes the features of all parts after the step.
    """

    def __init__(
        self, student: Backbone, views: Views, config: SwAVConfig, *, pooling: Pooling = "patches", seed: int
    ) -> None:
        super().__init__()
        if views.num_views < NUM_CODED:
            raise ConfigError(
                f"SwAV swaps codes between 2 views of an image; the views make {views.num_views}"
            )
        self.student = student
        self.views = views
        self.config = config
        self.pooling: Pooling = pooling
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.projector = mlp_head(
                [student.embed_dim, config.hidden_dim, config.output_dim],
                hidden_bias=True,
                last_bias=True,
                hidden_norm=config.head_norm,
            )
            self.prototypes = nn.Linear(config.output_dim, config.num_prototypes, bias=False)
        self.queue = Queue(torch.zeros(config.queue_size, NUM_CODED, config.output_dim))

    def begin(self, duration: Duration) -> None:
        """Raises ConfigError for a queue that the batch does not divide, and a batch too small for a batch norm."""
        super().begin(duration)
        check_batch_norm(self, duration)
        check_queue(self.config.queue_size, duration.batch_size, section="swav")

    def forward(self, views: list[Tensor], progress: float) -> dict[str, Tensor]:
        """The loss, and scalars that tell whether training is healthy, over this rank's B images.

        views: V tensors (B, 3, H, W) in [0, 1], the two large crops first; progress: decides when the queue fills.
        loss: mean over the two coded crops of the mean over all other crops of the cross-entropy between code and
        prediction (Caron et al. 2020, equations 1, 2 and 6).
        top1: share of large crops whose nearest prototype is that of the other's code. prototype_usage: in (0, 1],
        the perplexity of the mean prediction over the number of prototypes; feature_std: of the large crops' features.
        """
        is_learning = self.training and torch.is_grad_enabled()
        num_large = NUM_CODED * len(views[0])
        features = self._features(views)
        rows = unit_rows(self.projector(features))  # (V * B, d)
        with torch.autocast(rows.device.type, enabled=False):
            prototypes = self._unit_prototypes(in_place=is_learning)
            scores = (rows @ prototypes.T).unflatten(0, (len(views), -1))  # (V, B, K)
            codes = self._codes(scores[:NUM_CODED].detach(), prototypes.detach())
            loss = swapped_loss(scores, codes, temperature=self.config.temperature)
        if is_learning and self._fills_queue(progress):
            large = rows[:num_large].detach().unflatten(0, (NUM_CODED, -1))
            self.queue.hold(gather_rows(large.transpose(0, 1)))
        large_scores = scores[:NUM_CODED].detach()
        return {
            "loss": loss,
            "top1": (large_scores.flip(0).argmax(dim=-1) == codes.argmax(dim=-1)).float().mean(),
            "prototype_usage": prototype_usage(large_scores / self.config.temperature),
            "feature_std": channel_std(features[:num_large]),
        }

    def before_step(self, progress: float) -> None:
        """Keep the prototypes as drawn during the first steps."""
        if self.step(progress) < self.config.freeze_prototypes_steps:
            self.prototypes.weight.grad = None

    def after_step(self, progress: float) -> None:
        """Queue the features of the step."""
        self.queue.push_held()

    def _features(self, views: list[Tensor]) -> Tensor:
        """(V * B, C) of V views; those of one size go through the network, and its batch norms, together."""
        batches = [list(same) for _, same in groupby(views, key=lambda view: view.shape[-1])]
        return torch.cat([self.student.pooled(torch.cat(batch), self.pooling) for batch in batches])

    def _unit_prototypes(self, *, in_place: bool) -> Tensor:
        """(K, d), each of length 1; in place, the parameter itself."""
        weight: Tensor = self.prototypes.weight
        if not in_place:
            return unit_rows(weight)
        with torch.no_grad():
            weight.copy_(unit_rows(weight))
        return weight

    @torch.no_grad()
    def _codes(self, scores: Tensor, prototypes: Tensor) -> Tensor:
        """Codes (2, B, K) of scores (2, B, K), balanced with those of the queue once it is full."""
        batch = scores.shape[1]
        if self.config.queue_size and self.queue.is_full():
            mine = self.queue.rows.chunk(world_size())[rank()]  # each rank scores its share
            scores = torch.cat([mine.transpose(0, 1) @ prototypes.T, scores], dim=1)
        codes = [
            balanced_codes(
                one, epsilon=self.config.epsilon, num_iterations=self.config.num_sinkhorn_iterations
            )
            for one in scores
        ]
        return torch.stack(codes)[:, -batch:]

    def _fills_queue(self, progress: float) -> bool:
        return self.config.queue_size > 0 and self.epoch(progress) >= self.config.queue_start_epoch


def swapped_loss(scores: Tensor, codes: Tensor, *, temperature: float) -> Tensor:
    """Mean cross-entropy between the codes (A, B, K) of the first A views and the other views' predictions; a scalar.

    scores: (V, B, K), cosines of the views with the prototypes. A view does not predict its own code.
    Source: Caron et al. 2020, equation 6; facebookresearch/swav at 06b1b7c, main_swav.py.
    """
    log_shares = F.log_softmax(scores / temperature, dim=-1)
    losses = []
    for coded, code in enumerate(codes):
        others = [view for view in range(len(scores)) if view != coded]
        losses.append(-(code * log_shares[others]).sum(dim=-1).mean())
    return torch.stack(losses).mean()


@torch.no_grad()
def balanced_codes(scores: Tensor, *, epsilon: float, num_iterations: int) -> Tensor:
    """Codes (B, K), in [0, 1] with rows that sum to 1, of scores (B, K); every rank gives and gets its own B rows.

    exp(scores / epsilon) is scaled in turn so that each prototype has 1 / K of the whole and each sample of all ranks
    its equal share; the last scaling is that of the samples. The entries are not lowered by their maximum, as in the
    official code: cosines over an epsilon of 0.03 or more stay within float32.
    Source: Caron et al. 2020, equation 3 and section 3.1; Cuturi 2013.
    """
    num_prototypes = scores.shape[1]
    shares = torch.exp(scores / epsilon)
    shares /= sum_over_ranks(shares.sum())
    for _ in range(num_iterations):
        shares /= sum_over_ranks(shares.sum(dim=0)) * num_prototypes
        shares /= shares.sum(dim=1, keepdim=True) * (len(scores) * world_size())
    return shares * (len(scores) * world_size())


@torch.no_grad()
def prototype_usage(logits: Tensor) -> Tensor:
    """How evenly predictions (..., K), given by their logits, use the prototypes on average; a scalar in (0, 1].

    The perplexity of the mean prediction over K: 1 if all are used alike, 1 / K if all rows choose the same one.
    """
    mean = logits.softmax(dim=-1).flatten(0, -2).mean(dim=0)
    return torch.special.entr(mean).sum().exp() / len(mean)


def build(config: SwAVConfig, views: MultiCropConfig, network: NetworkConfig, *, seed: int) -> SwAV:
    """SwAV on two large crops and num_local small ones of each image; a ResNet's residuals start in full."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = build_network(
            with_full_residuals(network),
            image_size=views.image_size,
            sizes=(views.local_size,) if views.num_local else (),
        )
    return SwAV(student, MultiCrop(views), config, pooling=network.pooling, seed=seed)
