"""Heads trained together, held against heads trained apart by autograd and the optimisers of torch, timm and MAE."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.optim.lars import Lars
from torch import Tensor, nn

from fdkit.errors import ConfigError
from fdkit.evaluation._probe import (
    Candidate,
    Probe,
    ProbeConfig,
    RunningNorm,
    Standardizer,
    Unchanged,
    lr_factor,
    statistics,
    train_heads,
)

CLASSES = 5
CANDIDATES = [Candidate(lr, decay) for decay in (0.0, 0.02) for lr in (1e-3, 2e-2, 0.3)]


def data(num_images: int = 53, width: int = 6) -> tuple[Tensor, Tensor]:
    """Overlapping classes; channels of very different means and scales, in float64."""
    random = torch.Generator().manual_seed(4)
    labels = torch.randint(CLASSES, (num_images,), generator=random)
    centres = torch.randn(CLASSES, width, generator=random, dtype=torch.float64)
    values = centres[labels] + torch.randn(num_images, width, generator=random, dtype=torch.float64)
    return values * torch.logspace(-0.5, 0.5, width) + torch.linspace(-1, 2, width), labels


def cut(values: Tensor, labels: Tensor, config: ProbeConfig) -> list[tuple[Tensor, Tensor]]:
    random = torch.Generator().manual_seed(1)
    orders = [torch.randperm(len(labels), generator=random) for _ in range(config.epochs)]
    return [(values[r], labels[r]) for order in orders for r in order.split(config.train_batch_size)]


def normalizer_of(config: ProbeConfig, values: Tensor) -> Any:
    every = torch.arange(len(values))
    return {
        "standardize": lambda: Standardizer(*statistics(values, every)),
        "batch_norm": lambda: RunningNorm(values),
        "none": Unchanged,
    }[config.normalization]()


def together(
    candidates: list[Candidate],
    values: Tensor,
    labels: Tensor,
    config: ProbeConfig,
    batches: list[tuple[Tensor, Tensor]] | None = None,
) -> Probe:
    (probe,) = train_heads(
        cut(values, labels, config) if batches is None else batches,
        candidates,
        columns={"all": slice(None)},
        num_classes=CLASSES,
        normalizer=normalizer_of(config, values),
        steps_per_epoch=math.ceil(len(values) / config.train_batch_size),
        like=values,
        config=config,
    )
    return probe


class NaiveLars(torch.optim.SGD):
    """MAE's: the gradient of a matrix, decayed, takes 0.001 times the matrix' norm; SGD with momentum afterwards."""

    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim > 1:
                    g = p.grad + group["decay"] * p.detach()
                    ratio = 0.001 * p.detach().norm() / g.norm() if p.norm() > 0 and g.norm() > 0 else 1.0
                    p.grad = g * ratio
        super().step()


def optimizer_of(head: nn.Linear, candidate: Candidate, lr: float, config: ProbeConfig) -> Any:
    decay = candidate.weight_decay
    if config.optimizer == "lars":
        groups = [{"params": [head.weight], "decay": decay}, {"params": [head.bias], "decay": 0.0}]
        return NaiveLars(groups, lr=lr, momentum=config.momentum)
    groups = [{"params": [head.weight], "weight_decay": decay}, {"params": [head.bias], "weight_decay": 0.0}]
    if config.optimizer == "larc":
        return Lars(groups, lr=lr, momentum=config.momentum, trust_coeff=1e-3, always_adapt=True)
    return torch.optim.SGD(groups, lr=lr, momentum=config.momentum, nesterov=config.nesterov)


def naive_scores(candidate: Candidate, values: Tensor, labels: Tensor, config: ProbeConfig) -> Tensor:
    """Scores of the training features by one head trained with autograd, alone."""
    norm: nn.Module = nn.Identity()
    if config.normalization == "batch_norm":
        norm = nn.BatchNorm1d(values.shape[1], eps=1e-6, momentum=0.1, affine=False).double()
    raw = values
    if config.normalization == "standardize":
        raw = (values - values.mean(0)) / (values.var(0, correction=0) + 1e-6).sqrt()
    start = together([candidate], values, labels, config.model_copy(update={"normalization": "none"}), [])
    head = nn.Linear(values.shape[1], CLASSES).double()
    head.weight.data, head.bias.data = start.weight[0].clone(), start.bias[0].clone()
    scale = config.train_batch_size / (config.lr_reference_batch or config.train_batch_size)
    optimizer = optimizer_of(head, candidate, candidate.lr * scale, config)
    batches = cut(raw, labels, config)
    for step, (inputs, targets) in enumerate(batches):
        for group in optimizer.param_groups:
            # Half a cosine from the first step to one behind the last.
            group["lr"] = candidate.lr * scale * math.cos(math.pi * step / len(batches) / 2) ** 2
        optimizer.zero_grad()
        F.cross_entropy(head(norm(inputs)), targets).backward()
        if config.clip_grad is not None:
            nn.utils.clip_grad_norm_(head.parameters(), config.clip_grad)
        optimizer.step()
    return head(norm.eval()(raw)).detach()


@pytest.mark.parametrize(
    "fields",
    [
        {"normalization": "none"},
        {"normalization": "standardize"},
        {"normalization": "batch_norm"},
        {"nesterov": True},
        {"momentum": 0.0},
        {"init": "normal"},
        {"init": "normal", "optimizer": "lars"},
        {"init": "normal", "optimizer": "lars", "normalization": "batch_norm", "clip_grad": 0.5},
        {"optimizer": "lars"},
        {"init": "normal", "optimizer": "larc"},
        {"clip_grad": 0.3},
        {"lr_reference_batch": 64},
    ],
    ids=lambda fields: "-".join(f"{key}={value}" for key, value in fields.items()),
)
def test_heads_together_are_heads_alone_by_autograd(fields):
    values, labels = data()
    config = ProbeConfig(epochs=4, train_batch_size=16, seed=3, **fields)
    found = together(CANDIDATES, values, labels, config)
    scores = found.scores(values)
    for k, candidate in enumerate(CANDIDATES):
        expected = naive_scores(candidate, values, labels, config)
        torch.testing.assert_close(scores[:, k], expected, rtol=1e-9, atol=1e-9)
        alone = together([candidate], values, labels, config)
        torch.testing.assert_close(alone.weight[0], found.weight[k], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(found.only(candidate).scores(values)[:, 0], scores[:, k])
    assert not torch.allclose(scores[:, 0], scores[:, 1], rtol=1e-3)  # the rates do something
    assert not torch.allclose(scores[:, 2], scores[:, 5], rtol=1e-6)  # and the decay


def test_both_layouts_of_the_scores_give_the_same_heads(monkeypatch):
    values, labels = data()
    config = ProbeConfig(epochs=3, train_batch_size=16)
    along_images = together(CANDIDATES, values, labels, config)
    monkeypatch.setattr("fdkit.evaluation._probe._softmax_along_images", lambda device: False)
    along_classes = together(CANDIDATES, values, labels, config)
    torch.testing.assert_close(along_images.weight, along_classes.weight, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(along_images.bias, along_classes.bias, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"nesterov": True}, {}),
        ({"clip_grad": 0.3}, {}),
        ({"normalization": "batch_norm"}, {"normalization": "standardize"}),
        ({"optimizer": "lars", "init": "normal"}, {"optimizer": "larc", "init": "normal"}),
        ({"lr_update": "epoch"}, {}),
        ({"warmup_epochs": 1.5}, {}),
        ({"lr_reference_batch": 256}, {}),
        ({"lr_schedule": "constant"}, {}),
        ({"lr_schedule": "steps", "lr_steps": (2, 3)}, {"lr_schedule": "constant"}),
        ({"init": "normal"}, {"init": "zero"}),
        ({"init": "normal", "seed": 1}, {"init": "normal", "seed": 2}),
    ],
)
def test_every_setting_changes_the_heads(one, other):
    values, labels = data()
    probes = [
        together(CANDIDATES, values, labels, ProbeConfig(epochs=4, train_batch_size=16, **fields))
        for fields in (one, other)
    ]
    assert not torch.allclose(probes[0].weight, probes[1].weight, rtol=1e-4)


def test_a_head_that_diverges_leaves_the_others_alone():
    values, labels = data()
    config = ProbeConfig(epochs=3, train_batch_size=16, normalization="none", clip_grad=None)
    wild, calm = Candidate(1e308), Candidate(1e-3)
    found, alone = (together(ones, values, labels, config) for ones in ([wild, calm], [calm]))
    assert not found.weight[0].isfinite().all()
    torch.testing.assert_close(found.weight[1], alone.weight[0])


def test_heads_of_several_inputs_read_their_columns_alone():
    values, labels = data()
    config = ProbeConfig(epochs=3, train_batch_size=16, normalization="batch_norm", init="normal")
    columns = {"wide": slice(0, 6), "two": slice(3, 5), "apart": torch.tensor([0, 4, 5])}
    candidates = [Candidate(lr, 0.0, name) for lr in (0.01, 0.1) for name in columns]
    probes = train_heads(
        cut(values, labels, config),
        candidates,
        columns=columns,
        num_classes=CLASSES,
        normalizer=RunningNorm(values),
        steps_per_epoch=4,
        like=values,
        config=config,
    )
    assert [probe.weight.shape for probe in probes] == [(2, CLASSES, width) for width in (6, 2, 3)]
    for probe, (name, which) in zip(probes, columns.items(), strict=True):
        assert {one.inputs for one in probe.candidates} == {name}
        part = values[:, which]
        expected = together([Candidate(0.01), Candidate(0.1)], part, labels, config)
        torch.testing.assert_close(probe.scores(values), expected.scores(part))


@pytest.mark.parametrize("update", ["step", "epoch"])
def test_cosine_is_that_of_torch(update):
    config = ProbeConfig(epochs=7, lr_update=update)
    head = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([head], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 7 * 3 if update == "step" else 7)
    for step in range(21):
        assert lr_factor(step, 3, config) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if update == "step" or step % 3 == 2:
            scheduler.step()


def test_steps_are_those_of_torch():
    config = ProbeConfig(epochs=10, lr_schedule="steps", lr_steps=(6, 8), lr_update="epoch")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [6, 8])
    for step in range(20):
        assert lr_factor(step, 2, config) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step % 2:
            scheduler.step()


def test_warm_up_grows_from_zero_and_the_cosine_begins_where_it_ends():
    config = ProbeConfig(epochs=90, warmup_epochs=10)
    assert [lr_factor(step, 4, config) for step in (0, 1, 20, 39)] == [0.0, 0.025, 0.5, 0.975]
    assert lr_factor(40, 4, config) == 1.0
    assert lr_factor(4 * 50, 4, config) == pytest.approx(0.5)  # half way between epochs 10 and 90
    assert 0 < lr_factor(4 * 90 - 1, 4, config) < 1e-4


def test_starts_are_drawn_from_the_seed_alone():
    values, labels = data(width=400)
    config = ProbeConfig(init="normal", normalization="none", seed=7)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    start = together(CANDIDATES, values, labels, config, [])
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again = together(CANDIDATES[:1], values, labels, config, [])
    assert torch.equal(start.weight[0], again.weight[0])
    assert torch.equal(start.weight[0], start.weight[-1])
    assert start.weight[0].std() == pytest.approx(0.01, rel=0.05)
    assert start.weight[0].mean().abs() < 1e-3
    assert not start.bias.any()
    # MAE's truncated normal is no other distribution, as long as its bounds are timm's.
    assert trunc_normal_(torch.empty(10**5), std=0.01).abs().max() < 0.06
    assert not together(CANDIDATES, values, labels, ProbeConfig(normalization="none"), []).weight.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_statistics_in_blocks_are_those_of_the_rows(dtype, monkeypatch):
    monkeypatch.setattr("fdkit.evaluation._probe.READ_AT_ONCE", 5)
    values = data(53)[0].to(dtype) + 1000
    rows = torch.randperm(53)[:37]
    mean, variance = statistics(values, rows)
    assert mean.dtype == variance.dtype == dtype
    torch.testing.assert_close(mean, values[rows].double().mean(0).to(dtype), rtol=1e-7, atol=0)
    torch.testing.assert_close(
        variance, values[rows].double().var(0, correction=0).to(dtype), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"warmup_epochs": 5, "epochs": 5}, "warmup_epochs is 5, and the probe trains for 5 epochs in all"),
        ({"lr_schedule": "steps"}, r"lr_schedule steps and lr_steps \[\] do not go together"),
        ({"lr_steps": (3,)}, r"lr_schedule cosine and lr_steps \[3.0\] do not go together"),
        ({"nesterov": True, "optimizer": "lars"}, "nesterov is SGD's with momentum, but optimizer is lars"),
        ({"nesterov": True, "momentum": 0}, "optimizer is sgd with momentum 0"),
    ],
)
def test_settings_without_sense_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        ProbeConfig(**fields)
