"""Momentum contrast with a queue, with the numbers of MoCo v2; what v1 and v2 say themselves is in their own tests."""

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fdkit.errors import ConfigError
from fdkit.methods._method import Duration
from fdkit.methods._momentum_contrast import MomentumContrast, queue_contrast
from fdkit.methods._network import NetworkConfig, build_network
from fdkit.methods.mocov2 import MoCoV2Config

VIT = {
    "architecture": "vit_tiny_patch16_224",
    "model_args": {"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2},
}
RESNET = {
    "architecture": "resnet18",
    "model_args": {"layers": [1, 1, 1, 1], "channels": [8, 8, 12, 16], "zero_init_last": False},
    "pooling": "patches",
}
SIZES = {"output_dim": 6, "queue_size": 24}
VIEWS = SimpleNamespace(num_views=2, image_size=16)


def tiny(net: dict[str, Any] = RESNET, *, seed: int = 0, **fields: Any) -> MomentumContrast:
    config = NetworkConfig(**net)
    torch.manual_seed(seed)
    student = build_network(config, image_size=16, synchronise=False)
    own = MoCoV2Config(**{**SIZES, "num_splits": 2, **fields})
    return MomentumContrast(student, VIEWS, own, pooling=config.pooling, seed=seed)


def trained_apart(*args: Any, **fields: Any) -> MomentumContrast:
    """A method whose student has left its momentum copy behind, as after some steps; double precision."""
    method = tiny(*args, **fields).double()
    generator = torch.Generator().manual_seed(2)
    for parameter in [*method.student.parameters(), *method.projector.parameters()]:
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return method


def two_views(batch: int = 8, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(batch, 3, 16, 16, generator=generator, dtype=torch.float64) for _ in range(2)]


def grads(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def train_step(method: MomentumContrast, number: int = 0, batch: int = 8) -> Tensor:
    """One optimiser step; images and permutation hang on its number."""
    torch.manual_seed(number)
    optimiser = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.03)
    optimiser.zero_grad()
    loss: Tensor = method(two_views(batch, seed=number), 0.0)["loss"]
    loss.backward()
    optimiser.step()
    method.after_step(0.0)
    return loss.detach()


# --- the loss


def contrast_by_loops(queries: Tensor, keys: Tensor, queue: Tensor, temperature: float) -> float:
    """Mean over queries of -log of the share of their own key among it and the queue's."""
    total = 0.0
    for query, key in zip(queries, keys, strict=True):
        scores = [float(query @ other / query.norm() / other.norm()) for other in (key, *queue)]
        exponentials = [math.exp(score / temperature) for score in scores]
        total -= math.log(exponentials[0] / sum(exponentials))
    return total / len(queries)


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("temperature", [0.07, 0.2])
def test_the_contrast_matches_naive_loops(temperature: float) -> None:
    queries, keys, queue = rows(4, 6), rows(4, 6, seed=1), F.normalize(rows(9, 6, seed=2), dim=1)
    result = queue_contrast(queries, keys, queue, temperature=temperature)
    expected = contrast_by_loops(queries, keys, queue, temperature)
    assert result.loss.item() == pytest.approx(expected, rel=1e-12)
    longer = queue_contrast(7 * queries, 0.1 * keys, queue, temperature=temperature)
    assert longer.loss.item() == pytest.approx(expected, rel=1e-12)


def test_keys_of_the_batch_are_no_negatives_of_other_queries() -> None:
    queries, keys, queue = rows(4, 6), rows(4, 6, seed=1), F.normalize(rows(9, 6, seed=2), dim=1)
    alone = [
        queue_contrast(queries[i : i + 1], keys[i : i + 1], queue, temperature=0.2).loss for i in range(4)
    ]
    whole = queue_contrast(queries, keys, queue, temperature=0.2).loss
    torch.testing.assert_close(torch.stack(alone).mean(), whole)


def test_the_loss_starts_where_a_random_queue_of_the_published_size_puts_it() -> None:
    queue = F.normalize(torch.randn(65536, 128, generator=torch.Generator().manual_seed(0)), dim=1)
    queries = F.normalize(rows(64, 128).float(), dim=1)
    keys = rows(64, 128, seed=1).float()
    keys -= (keys * queries).sum(dim=1, keepdim=True) * queries  # positives of cosine 0
    loss = queue_contrast(queries, keys, queue, temperature=0.2).loss.item()
    assert loss == pytest.approx(math.log(65537) + 1 / (2 * 128 * 0.2**2), abs=0.005)  # 11.19


def test_scalars_tell_how_many_queries_find_their_key() -> None:
    queries, queue = torch.eye(4, 6), torch.eye(6)[4:]
    found = queue_contrast(queries, queries, queue, temperature=0.2)
    assert (found.positive_similarity.item(), found.top1.item()) == (1.0, 1.0)
    assert queue_contrast(queries, -queries, queue, temperature=0.2).top1.item() == 0.0


# --- a training step


def encode_groups(backbone: nn.Module, projector: nn.Module, images: Tensor, num_splits: int) -> Tensor:
    """What the encoder with plain batch norms makes of each group of images alone."""
    plain = copy.deepcopy(backbone)
    for part in plain.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.__class__ = nn.BatchNorm2d
    return torch.cat([projector(plain.pooled(group, "patches")) for group in images.chunk(num_splits)])


def step_by_hand(
    method: MomentumContrast,
    views: list[Tensor],
    *,
    order: Tensor,
    momentum: float | None = None,
    splits: int = 2,
) -> Tensor:
    """The loss of one step, from copies of the method's parts and torch's own batch norms."""
    student, projector, old_student, old_projector = (
        copy.deepcopy(part)
        for part in (method.student, method.projector, method.momentum_student, method.momentum_projector)
    )
    momentum = method.config.momentum if momentum is None else momentum
    queries = encode_groups(student, projector, views[0], splits)
    for old, new in ((old_student, student), (old_projector, projector)):
        for old_parameter, parameter in zip(old.parameters(), new.parameters(), strict=True):
            old_parameter.data = momentum * old_parameter.data + (1 - momentum) * parameter.data
    shuffled = encode_groups(old_student, old_projector, views[1][order], splits)
    keys = torch.empty_like(shuffled)
    for place, image in enumerate(order):
        keys[image] = shuffled[place]
    queue = method.queue.rows
    return torch.tensor(
        contrast_by_loops(queries, keys, queue, method.config.temperature), dtype=torch.float64
    )


def shuffled_order(seed: int, count: int = 8) -> Tensor:
    torch.manual_seed(seed)
    return torch.randperm(count)


def test_a_step_is_queries_then_momentum_then_shuffled_keys_against_the_old_queue() -> None:
    method, views = trained_apart(momentum=0.3), two_views()
    order = shuffled_order(5)
    with torch.no_grad():
        expected = step_by_hand(method, views, order=order)
        wrong = {
            "keys before the momentum update": step_by_hand(method, views, order=order, momentum=1.0),
            "keys not shuffled": step_by_hand(method, views, order=torch.arange(8)),
            "one batch norm over all": step_by_hand(method, views, order=order, splits=1),
            "keys in the shuffled order": step_by_hand(method, [views[0], views[1][order]], order=order),
        }
    torch.manual_seed(5)
    loss = method(views, 0.0)["loss"].detach()
    torch.testing.assert_close(loss, expected, rtol=1e-7, atol=1e-7)  # the queue was drawn in float32
    for name, value in wrong.items():
        assert abs(value - expected) > 1e-3, name


def test_keys_join_the_queue_after_the_step_and_replace_all_of_it_in_time() -> None:
    method = tiny(num_splits=2).double()
    start = method.queue.rows.clone()
    method(two_views(), 0.0)["loss"].backward()
    assert torch.equal(method.queue.rows, start)
    method.after_step(0.0)
    assert not torch.isclose(method.queue.rows[:8], start[:8]).all(dim=1).any()
    assert torch.equal(method.queue.rows[8:], start[8:])
    for number in range(1, 3):
        train_step(method, number)
    assert not torch.isclose(method.queue.rows, start).all(dim=1).any()
    torch.testing.assert_close(method.queue.rows.norm(dim=1), torch.ones(24, dtype=torch.float64))
    second = method.queue.rows.clone()
    train_step(method, 3)  # the place has wrapped
    assert torch.equal(method.queue.rows[8:], second[8:])
    assert not torch.equal(method.queue.rows[:8], second[:8])


def test_the_queue_takes_the_keys_in_the_order_of_the_images() -> None:
    method = trained_apart(VIT)
    views = two_views(4)
    method(views, 0.0)
    method.after_step(0.0)
    with torch.no_grad():
        keys = F.normalize(method.momentum_projector(method.momentum_student.pooled(views[1], "cls")), dim=1)
    torch.testing.assert_close(method.queue.rows[:4], keys)


def test_the_first_queue_is_made_of_random_directions() -> None:
    queue = tiny(queue_size=64, output_dim=32).queue.rows
    torch.testing.assert_close(queue.norm(dim=1), torch.ones(64))
    assert (queue @ queue.T - torch.eye(64)).abs().max() < 0.8
    assert torch.equal(queue, tiny(queue_size=64, output_dim=32).queue.rows)
    assert not torch.equal(queue, tiny(queue_size=64, output_dim=32, seed=1).queue.rows)


@pytest.mark.parametrize("net", [VIT, RESNET])
def test_gradients_reach_everything_that_trains_and_nothing_else(net: dict[str, Any]) -> None:
    method = tiny(net).double()
    method(two_views(), 0.0)["loss"].backward()
    trainable = {name for name, parameter in method.named_parameters() if parameter.requires_grad}
    assert grads(method).keys() == trainable
    assert {name.partition(".")[0] for name in trainable} == {"student", "projector"}
    assert not method.queue.rows.requires_grad


def weight(method: MomentumContrast) -> Tensor:
    return method.momentum_projector[-1].weight.clone()


def test_the_momentum_encoder_moves_by_a_constant_share_once_a_step() -> None:
    method = trained_apart(momentum=0.9)
    old, new = weight(method), method.projector[-1].weight.detach().clone()
    method(two_views(), 0.0)
    torch.testing.assert_close(weight(method), 0.9 * old + 0.1 * new)
    moved = weight(method)
    method(two_views(), 0.0)  # the second part of the same step
    assert torch.equal(weight(method), moved)
    method.after_step(0.0)
    method(two_views(), 0.9)
    torch.testing.assert_close(weight(method), 0.9 * moved + 0.1 * new)


@pytest.mark.parametrize("how", ["eval", "no_grad"])
def test_looking_at_the_loss_leaves_momentum_encoder_and_queue_alone(how: str) -> None:
    method = trained_apart().train(how != "eval")
    start, queue = weight(method), method.queue.rows.clone()
    with torch.set_grad_enabled(how != "no_grad"):
        assert method(two_views(), 0.0)["loss"].isfinite()
    method.after_step(0.0)
    assert torch.equal(weight(method), start)
    assert torch.equal(method.queue.rows, queue)


def test_batch_norms_of_the_momentum_encoder_live_by_their_own_batches() -> None:
    method = trained_apart(momentum=0.5)
    before = method.momentum_student.network.bn1.running_mean.clone()
    method(two_views(), 0.0)
    mine, theirs = method.student.network.bn1, method.momentum_student.network.bn1
    assert mine.num_batches_tracked.item() == theirs.num_batches_tracked.item() == 1
    assert not torch.allclose(theirs.running_mean, before)
    assert not torch.allclose(mine.running_mean, theirs.running_mean)


def test_parts_of_a_batch_without_batch_norm_give_the_gradient_of_the_whole() -> None:
    whole, parts = trained_apart(VIT), trained_apart(VIT)
    views = two_views()
    whole(views, 0.0)["loss"].backward()
    for part in zip(*(view.chunk(2) for view in views), strict=True):
        (parts(list(part), 0.0)["loss"] / 2).backward()
    for key, gradient in grads(whole).items():
        torch.testing.assert_close(grads(parts)[key], gradient, msg=key)
    for method in (whole, parts):
        method.after_step(0.0)
    torch.testing.assert_close(parts.queue.rows, whole.queue.rows)
    assert not whole.compares_images
    assert trained_apart(RESNET).compares_images


@pytest.mark.parametrize("net", [VIT, RESNET])
def test_a_resumed_run_goes_on_exactly(net: dict[str, Any]) -> None:
    whole = tiny(net).double()
    for number in range(2):
        train_step(whole, number)
    resumed = tiny(net, seed=9).double()
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    for number in range(2, 5):
        assert torch.equal(train_step(resumed, number), train_step(whole, number))
    for key, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key


def test_the_loss_is_computed_in_float32_under_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scalars = tiny(VIT)([view.float() for view in two_views()], 0.0)
    assert scalars.keys() == {"loss", "positive_similarity", "top1", "feature_std"}
    assert {value.dtype for value in scalars.values()} == {torch.float32}
    assert [name for name, value in scalars.items() if value.requires_grad] == ["loss"]
    scalars["loss"].backward()


# --- what is refused


def run(batch: int, *, world: int = 1, parts: int = 1) -> Duration:
    return Duration(10, 5, batch_size=batch, part_size=batch // world // parts, world_size=world)


def test_a_queue_that_the_batch_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"mocov2.queue_size 24 is no multiple of the 10 images of a batch"):
        tiny().begin(run(10))
    tiny().begin(run(12))


@pytest.mark.parametrize(
    ("splits", "duration", "hint"),
    [
        (3, run(8), "--mocov2.num-splits 2"),  # groups of unequal size
        (8, run(8), "--mocov2.num-splits 4"),  # groups of one image
        (8, run(24, parts=3), "--mocov2.num-splits 4"),  # groups of one image of a part
        (3, run(12, world=2), "--mocov2.num-splits 2"),  # a group on two processes
        (2, run(1), "use a larger --train.batch-size"),
    ],
)
def test_groups_that_the_processes_cannot_share_are_refused(
    splits: int, duration: Duration, hint: str
) -> None:
    with pytest.raises(ConfigError, match=f"num_splits {splits}: .* groups of two or more") as error:
        tiny(num_splits=splits).begin(duration)
    assert hint in error.value.hint


def test_a_network_without_batch_norm_needs_no_groups() -> None:
    method = tiny(VIT, num_splits=8).double()
    method.begin(run(3))
    assert method(two_views(3), 0.0)["loss"].isfinite()


def test_other_than_two_views_are_refused() -> None:
    with pytest.raises(ConfigError, match="the views make 1"):
        MomentumContrast(
            tiny(VIT).student, SimpleNamespace(num_views=1, image_size=16), MoCoV2Config(**SIZES), seed=0
        )


@pytest.mark.slow
def test_compiling_meets_no_new_graph_at_every_step() -> None:
    graphs = []
    method, expected = tiny(VIT).double(), tiny(VIT).double()
    method.compile(backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    for number in range(5):
        torch.testing.assert_close(train_step(method, number), train_step(expected, number))
        if number == 2:
            settled = len(graphs)
    assert len(graphs) == settled


# --- two processes


def one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    results = {name: run_steps(method, rank, 2) for name, method in cases().items()}
    torch.save(results, f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


def cases() -> dict[str, MomentumContrast]:
    return {"vit": trained_apart(VIT, momentum=0.5), "resnet": trained_apart(num_splits=4, momentum=0.5)}


def run_steps(method: MomentumContrast, rank: int, world: int) -> list[dict[str, Any]]:
    """Three steps; the last overwrites what the first two queued."""
    options = {"broadcast_buffers": False}
    module = DistributedDataParallel(method, **options) if world > 1 else method
    optimiser = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.01)
    results = []
    for number in range(3):
        torch.manual_seed(number + 100 * rank)  # what rank 0 draws counts
        optimiser.zero_grad()
        views = [view.chunk(world)[rank] for view in two_views(12, seed=number)]
        loss = module(views, 0.0)["loss"]
        loss.backward()
        results.append({"loss": loss.detach(), "grads": grads(method)})
        optimiser.step()
        method.after_step(0.0)
        results[-1]["state"] = copy.deepcopy(method.state_dict())
    return results


@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore:.broadcast_buffers. is deprecated:FutureWarning")
def test_two_ranks_equal_one_process(tmp_path: Any) -> None:
    mp.spawn(one_rank, args=(str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    for name, method in cases().items():
        for number, expected in enumerate(run_steps(method, 0, 1)):
            got = [result[name][number] for result in ranks]
            torch.testing.assert_close((got[0]["loss"] + got[1]["loss"]) / 2, expected["loss"])
            for key, gradient in expected["grads"].items():
                for one in got:
                    torch.testing.assert_close(one["grads"][key], gradient, rtol=1e-6, atol=1e-9, msg=key)
            for key, value in expected["state"].items():
                torch.testing.assert_close(got[0]["state"][key], value, rtol=1e-6, atol=1e-9, msg=key)
            assert torch.equal(got[0]["state"]["queue.rows"], got[1]["state"]["queue.rows"])
