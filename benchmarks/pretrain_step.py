"""The cost of one pretraining step of MoCo v3, DINO and MAE, against plain readings of the official ones.

Both sides start from the same weights and see the same views and the same random numbers; the losses of two steps, the
second after an update, must agree before anything is timed. The sides take turns in one process; the median of the
ratios within turns is compared: CPU-seconds at one thread, or CUDA events. The plain side is what the published code
does, written down from its description: every token through the last block, attention written out, all patches embedded
and all of them decoded, a softmax for every pair of views, keys gathered view by view, the momentum encoder, the
optimiser and clipping parameter by parameter, and the loss read at every step.

    python benchmarks/pretrain_step.py --output benchmarks/results/pretrain_step_cpu.json
"""

import argparse
import copy
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from distill_step import environment, timed
from torch import Tensor, nn

from fdkit.commands import pretrain
from fdkit.config import validate
from fdkit.methods._method import Duration, Method
from fdkit.models.momentum import momentum_at
from fdkit.training.gradients import clip_each
from fdkit.training.optimizer import OptimizerConfig, build_optimizer, parameter_groups

DURATION = Duration(num_steps=100, steps_per_epoch=10)
PROGRESS = 0.25
"""Of the timed steps: the third of ten epochs, in which DINO's prototypes train."""
MAX_NORM = 3.0
TOLERANCES = {"fp32": 5e-4, "bf16": 2e-2}
"""Relative differences of losses allowed; batch norms over few images amplify rounding."""
IMAGE_SIZE, LOCAL_SIZE = 224, 96
WIDTHS = {"small": "vit_small_patch16_224", "base": "vit_base_patch16_224"}

Step = Callable[[list[Tensor]], Any]


class Case(NamedTuple):
    """One comparison."""

    method: str
    model: str
    precision: str
    batch_size: int
    device: torch.device


# --- the plain sides


class PlainAttention(nn.Module):
    """Attention written out, as in the timm of that time and in DINO: the scores are scaled behind their product."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.num_heads, self.scale = attention.num_heads, attention.scale
        self.qkv, self.proj = attention.qkv, attention.proj

    def forward(self, tokens: Tensor, attn_mask: None = None, is_causal: bool = False) -> Tensor:
        """Attended tokens (B, N, D)."""
        batch, length, width = tokens.shape
        qkv = self.qkv(tokens).reshape(batch, length, 3, self.num_heads, width // self.num_heads)
        queries, keys, values = qkv.permute(2, 0, 3, 1, 4)
        shares = ((queries @ keys.transpose(-2, -1)) * self.scale).softmax(dim=-1)
        attended: Tensor = self.proj((shares @ values).transpose(1, 2).reshape(batch, length, width))
        return attended


def plain_copy(module: Any) -> Any:
    """A copy of a network or decoder of timm's blocks, with plain attention."""
    module = copy.deepcopy(module)
    for block in module.blocks:
        block.attn = PlainAttention(block.attn)
    return module


class PlainViT(nn.Module):
    """A vision transformer that walks through timm's blocks one by one, all tokens through each."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network: Any = plain_copy(network)

    def embed(self, images: Tensor) -> Tensor:
        """(B, L, D): tokens of all patches, without positions."""
        patches: Tensor = self.network.patch_embed.proj(images).flatten(2).transpose(1, 2)
        return patches

    def encode(self, tokens: Tensor) -> Tensor:
        """Tokens (B, N, D) behind the last block and the norm."""
        for block in self.network.blocks:
            tokens = block(tokens)
        final: Tensor = self.network.norm(tokens)
        return final

    def positions(self, num_patches: int) -> Tensor:
        """(1, 1 + L, D), resampled where there are fewer patches than the table has."""
        table = self.network.pos_embed
        own, side = round((table.shape[1] - 1) ** 0.5), round(num_patches**0.5)
        if own == side:
            return table
        grid = table[:, 1:].unflatten(1, (own, own)).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, scale_factor=(side + 0.1) / own, mode="bicubic")
        return torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)

    def forward(self, images: Tensor) -> Tensor:
        """The class token (B, D)."""
        patches = self.embed(images)
        tokens = torch.cat([self.network.cls_token.expand(len(images), -1, -1), patches], dim=1)
        return self.encode(tokens + self.positions(patches.shape[1]))[:, 0]


@torch.no_grad()
def follow_one_by_one(target: nn.Module, source: nn.Module, momentum: float) -> None:
    """The momentum update, a parameter at a time."""
    for old, new in zip(target.parameters(), source.parameters(), strict=True):
        old.data = old.data * momentum + new.data * (1 - momentum)


class PlainMethod(nn.Module):
    """A method as first written; what most of them do not do between gradient and next step stands here."""

    def before_step(self) -> None:
        """What is done to the gradients."""

    def after_step(self) -> None:
        """What follows the optimiser."""


class PlainMoCoV3(PlainMethod):
    """Chen et al. 2021, algorithm 1, in the order of facebookresearch/moco-v3."""

    def __init__(self, method: Any) -> None:
        super().__init__()
        self.temperature = method.config.temperature
        self.momentum = momentum_at(PROGRESS, method.config.momentum, method.config.momentum_schedule)
        self.encoder = nn.Sequential(PlainViT(method.student.network), copy.deepcopy(method.projector))
        self.predictor = copy.deepcopy(method.predictor)
        self.momentum_encoder = copy.deepcopy(self.encoder).requires_grad_(False)

    def forward(self, views: list[Tensor]) -> Tensor:
        """The loss of two normalised views."""
        queries = [self.predictor(self.encoder(view)) for view in views]
        with torch.no_grad():
            follow_one_by_one(self.momentum_encoder, self.encoder, self.momentum)
            keys = [self.momentum_encoder(view) for view in views]
        return self.contrast(queries[0], keys[1]) + self.contrast(queries[1], keys[0])

    def contrast(self, queries: Tensor, keys: Tensor) -> Tensor:
        """One direction; the gather of one process is a copy."""
        queries, keys = F.normalize(queries, dim=1), torch.cat([F.normalize(keys, dim=1)])
        logits = queries @ keys.T / self.temperature
        labels = torch.arange(len(logits), device=logits.device)
        return F.cross_entropy(logits, labels) * (2 * self.temperature)


class PlainDINO(PlainMethod):
    """Caron et al. 2021, algorithm 1 with multi-crop, as in facebookresearch/dino."""

    def __init__(self, method: Any) -> None:
        super().__init__()
        config = method.config
        self.temperatures = (config.student_temperature, config.teacher_temperature)
        self.momentum = momentum_at(PROGRESS, config.momentum, "cosine")
        self.student = nn.Sequential(PlainViT(method.student.network), PlainDINOHead(method.head))
        self.teacher = nn.Sequential(PlainViT(method.teacher.network), PlainDINOHead(method.teacher_head))
        self.teacher.requires_grad_(False)
        self.register_buffer("centre", torch.zeros(1, config.output_dim))

    def forward(self, views: list[Tensor]) -> Tensor:
        """The loss of two large views and the small ones, normalised."""
        with torch.no_grad():
            teacher_scores = self.teacher(torch.cat(views[:2]))
        features = [self.student[0](torch.cat(views[:2])), self.student[0](torch.cat(views[2:]))]
        scores = (self.student[1](torch.cat(features)) / self.temperatures[0]).chunk(len(views))
        targets = F.softmax((teacher_scores - self.centre) / self.temperatures[1], dim=-1).detach().chunk(2)
        terms = [
            torch.sum(-target * F.log_softmax(score, dim=-1), dim=-1).mean()
            for i, target in enumerate(targets)
            for j, score in enumerate(scores)
            if i != j
        ]
        self.centre = self.centre * 0.9 + teacher_scores.mean(dim=0, keepdim=True) * 0.1
        return sum(terms) / len(terms)  # type: ignore[return-value]

    def before_step(self) -> None:
        """Clip each parameter's gradient by its own norm."""
        for parameter in self.parameters():
            if parameter.grad is not None:
                factor = MAX_NORM / (parameter.grad.norm() + 1e-6)
                if factor < 1:
                    parameter.grad.mul_(factor)

    def after_step(self) -> None:
        """Move the teacher."""
        follow_one_by_one(self.teacher, self.student, self.momentum)


class PlainDINOHead(nn.Module):
    """An MLP, rows of length 1, and a weight-normalised layer whose gain does not train."""

    def __init__(self, head: Any) -> None:
        super().__init__()
        self.mlp = copy.deepcopy(head.mlp)
        num_prototypes, width = head.prototypes.weight.shape
        self.last = nn.utils.parametrizations.weight_norm(nn.Linear(width, num_prototypes, bias=False))
        weights = self.last.parametrizations.weight
        weights.original0.data.fill_(1.0)
        weights.original0.requires_grad_(False)
        weights.original1.data.copy_(head.prototypes.weight.data)

    def forward(self, features: Tensor) -> Tensor:
        """Scores (R, K) of features (R, C)."""
        scores: Tensor = self.last(F.normalize(self.mlp(features), dim=-1))
        return scores


class PlainMAE(PlainMethod):
    """He et al. 2021, as in facebookresearch/mae: all patches are embedded, and all are decoded."""

    def __init__(self, method: Any) -> None:
        super().__init__()
        self.encoder = PlainViT(method.student.network)
        self.decoder: Any = plain_copy(method.decoder)
        self.num_visible = method.num_visible

    def forward(self, views: list[Tensor]) -> Tensor:
        """The loss of one normalised view."""
        images, network = views[0], self.encoder.network
        patches = self.encoder.embed(images) + network.pos_embed[:, 1:]
        noise = torch.rand(patches.shape[:2], device=images.device)
        order = noise.argsort(dim=1)
        restore = order.argsort(dim=1)
        visible = gather_tokens(patches, order[:, : self.num_visible])
        first = (network.cls_token + network.pos_embed[:, :1]).expand(len(images), -1, -1)
        tokens = self.decoder.embed(self.encoder.encode(torch.cat([first, visible], dim=1)))
        num_hidden = patches.shape[1] - self.num_visible
        masks = self.decoder.mask_token.repeat(len(images), num_hidden, 1)
        sequence = gather_tokens(torch.cat([tokens[:, 1:], masks], dim=1), restore)
        tokens = torch.cat([tokens[:, :1], sequence], dim=1) + self.decoder.pos_embed
        for block in self.decoder.blocks:
            tokens = block(tokens)
        prediction = self.decoder.pred(self.decoder.norm(tokens))[:, 1:]
        is_hidden = (restore >= self.num_visible).to(prediction.dtype)
        errors = ((prediction - pixel_targets(images)) ** 2).mean(dim=-1)
        return (errors * is_hidden).sum() / is_hidden.sum()

    def before_step(self) -> None:
        """The norm of the gradient, which is only logged."""
        norms = [parameter.grad.norm() for parameter in self.parameters() if parameter.grad is not None]
        torch.stack(norms).norm()


def gather_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """tokens[b, index[b, k]], (B, K, D)."""
    return torch.gather(tokens, 1, index[..., None].repeat(1, 1, tokens.shape[-1]))


def pixel_targets(images: Tensor, patch_size: int = 16) -> Tensor:
    """(B, L, P * P * 3): each patch of pixels, scaled by its own mean and variance."""
    side = images.shape[-1] // patch_size
    parts = images.reshape(len(images), 3, side, patch_size, side, patch_size)
    patches = torch.einsum("nchpwq->nhwpqc", parts).reshape(len(images), side * side, -1)
    mean, variance = patches.mean(dim=-1, keepdim=True), patches.var(dim=-1, keepdim=True)
    return (patches - mean) / (variance + 1e-6) ** 0.5


# --- the cases


class Setting(NamedTuple):
    """What a method is measured as; the values are those of the official configuration."""

    plain: Callable[[Method], Any]
    optim: OptimizerConfig
    model: str
    batch_size: int
    drop_path: float = 0.0
    num_local: int = 0


MOCOV3_OPTIM = OptimizerConfig(lr=2e-5, weight_decay=0.1, decay_exempt="none", clip_grad=None)
DINO_OPTIM = OptimizerConfig(lr=2e-5, weight_decay=0.04, decay_exempt="1d", clip_grad=MAX_NORM)
MAE_OPTIM = OptimizerConfig(lr=2e-5, weight_decay=0.05, decay_exempt="1d", betas=(0.9, 0.95), clip_grad=None)
SETTINGS = {
    "mocov3": Setting(PlainMoCoV3, MOCOV3_OPTIM, "small", 4),
    "dino": Setting(PlainDINO, DINO_OPTIM, "small", 2, drop_path=0.1, num_local=8),
    "mae": Setting(PlainMAE, MAE_OPTIM, "base", 4),
}


def build_method(case: Case) -> Method:
    """The method in its published form, of the case's network."""
    setting = SETTINGS[case.method]
    network = {"architecture": WIDTHS[case.model], "drop_path": setting.drop_path}
    values: dict[str, Any] = {"data": "demo", "network": network}
    if setting.num_local:
        values["views"] = {"num_local": setting.num_local, "local_size": LOCAL_SIZE}
    return pretrain.build_method(validate(pretrain.config_class(case.method), values, "benchmark"))


def make_views(case: Case) -> list[Tensor]:
    """Random views in [0, 1], as many and as large as the method takes."""
    generator = torch.Generator().manual_seed(2)
    num_large = 1 if case.method == "mae" else 2
    sizes = [IMAGE_SIZE] * num_large + [LOCAL_SIZE] * SETTINGS[case.method].num_local
    return [torch.rand(case.batch_size, 3, size, size, generator=generator).to(case.device) for size in sizes]


def fdkit_step(method: Method, case: Case) -> Step:
    """A step as fdkit's loop makes it; gives the loss as a tensor."""
    optim = SETTINGS[case.method].optim
    optimizer = build_optimizer(method, optim)
    parameters = [parameter for parameter in method.parameters() if parameter.requires_grad]

    def step(views: list[Tensor]) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(case.device.type, torch.bfloat16, enabled=case.precision == "bf16"):
            loss = method(views, PROGRESS)["loss"]
        loss.backward()
        method.before_step(PROGRESS)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        nn.utils.get_total_norm(gradients)  # which the loop logs
        if optim.clip_grad is not None:
            clip_each(gradients, optim.clip_grad)
        optimizer.step()
        method.after_step(PROGRESS)
        return loss.detach()

    return step


def plain_step(method: Method, case: Case) -> Step:
    """A step of the plain side; gives the loss as a number."""
    setting: Any = SETTINGS[case.method]
    model = setting.plain(method).to(case.device).train()
    groups = parameter_groups(model, setting.optim.decay_exempt, setting.optim.weight_decay)
    optimizer = torch.optim.AdamW(
        groups, lr=setting.optim.lr, betas=setting.optim.betas, foreach=False, fused=False
    )
    statistics: Any = method.student.statistics

    def step(views: list[Tensor]) -> float:
        with torch.autocast(case.device.type, torch.bfloat16, enabled=case.precision == "bf16"):
            loss = model([statistics(view) for view in views])
        optimizer.zero_grad()
        loss.backward()
        model.before_step()
        optimizer.step()
        model.after_step()
        return loss.item()

    return step


def build_sides(case: Case) -> dict[str, Step]:
    """Both sides, from the same random weights."""
    method = build_method(case).to(case.device).train()
    method.begin(DURATION._replace(batch_size=case.batch_size, part_size=case.batch_size))
    return {"plain": plain_step(method, case), "fdkit": fdkit_step(method, case)}


# --- measuring


def compare(case: Case, *, repeats: int) -> dict[str, Any]:
    """Median seconds of both sides, taking turns, after losses of two steps agreed (the second after an update)."""
    sides, views = build_sides(case), make_views(case)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    losses: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(2 + repeats):
        for name in sorted(sides, reverse=turn % 2 == 1):
            torch.manual_seed(100 + turn)  # so that both drop the same paths and hide the same patches
            elapsed, loss = timed(lambda _, side=sides[name]: side(views), views[0])
            losses[name].append(loss)
            if turn >= 2:
                seconds[name].append(elapsed)
        if turn == 1:
            assert_parity(losses, case)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = [plain / ours for plain, ours in zip(seconds["plain"], seconds["fdkit"], strict=True)]
    return {
        **case._asdict(),
        "device": case.device.type,
        "losses": losses,
        "seconds": seconds,
        "median_seconds": medians,
        "speedup": statistics.median(ratios),
        "speedup_quartiles": statistics.quantiles(ratios, n=4, method="inclusive"),
    }


def assert_parity(losses: dict[str, list[float]], case: Case) -> None:
    """Both sides have computed the same losses so far, to the precision at hand."""
    for ours, plain in zip(losses["fdkit"], losses["plain"], strict=True):
        assert abs(ours - plain) <= TOLERANCES[case.precision] * abs(plain), f"losses differ: {losses}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument(
        "--model", choices=WIDTHS, help="small for MoCo v3 and DINO, base for MAE if left out"
    )
    parser.add_argument("--precision", nargs="+", choices=TOLERANCES, default=["fp32"])
    parser.add_argument("--batch-size", type=int, help="4 for MoCo v3 and MAE, 2 for DINO if left out")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    cases = [
        Case(
            method,
            args.model or SETTINGS[method].model,
            precision,
            args.batch_size or SETTINGS[method].batch_size,
            args.device,
        )
        for method in args.method
        for precision in args.precision
    ]
    results = [compare(case, repeats=args.repeats) for case in cases]
    document = json.dumps({"environment": environment(args.device), "results": results}, indent=2)
    if args.output:
        args.output.write_text(document + "\n")
    print(document)


if __name__ == "__main__":
    main()
