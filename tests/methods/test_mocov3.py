import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fdkit.data.views import TwoViewsConfig
from fdkit.errors import ConfigError
from fdkit.methods._contrast import info_nce
from fdkit.methods._method import Duration
from fdkit.methods._network import NetworkConfig, build_network
from fdkit.methods.mocov3 import DEFAULTS, MoCoV3, MoCoV3Config, build
from fdkit.models.backbone import Backbone

TINY_VIT = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
HEADS = {"hidden_dim": 12, "output_dim": 6}
VIEWS = SimpleNamespace(num_views=2, image_size=8)


def network(**fields: Any) -> NetworkConfig:
    """A small vision transformer, with MoCo v3's own settings."""
    small = {"architecture": "vit_tiny_patch16_224", "model_args": TINY_VIT}
    return NetworkConfig(**{**DEFAULTS["network"], **small, **fields})


def tiny(seed: int = 0, *, net: dict[str, Any] | None = None, **fields: Any) -> MoCoV3:
    config = network(**(net or {}))
    torch.manual_seed(seed)
    student = build_network(config, image_size=8)
    return MoCoV3(student, VIEWS, MoCoV3Config(**{**HEADS, **fields}), pooling=config.pooling, seed=seed)


def two_views(batch: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(batch, 3, 8, 8, generator=generator) for _ in range(2)]


def info_nce_by_loops(queries: Tensor, keys: Tensor, temperature: float) -> float:
    """Mean over queries of -log of the softmax share of their own key."""
    total, queries, keys = 0.0, queries.detach(), keys.detach()
    for i, query in enumerate(queries):
        scores = [float(torch.dot(query, key) / query.norm() / key.norm()) / temperature for key in keys]
        total -= math.log(math.exp(scores[i]) / sum(math.exp(score) for score in scores))
    return total / len(queries)


def grads(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


# --- the loss


def test_equal_features_cost_ln_n_and_in_both_directions_4_tau_ln_n() -> None:
    rows = torch.ones(8, 6)
    result = info_nce(rows, rows, temperature=0.2)
    assert result.loss.item() == pytest.approx(math.log(8), abs=1e-5)
    assert result.positive_similarity.item() == pytest.approx(1)
    method = tiny(num_predictor_layers=0, head_norm=False)
    for head in (method.projector, method.momentum_projector):
        head.register_forward_hook(lambda module, inputs, output: output * 0 + 1)
    assert method(two_views(8), 0.0)["loss"].item() == pytest.approx(1.6636, abs=1e-4)  # 4 * 0.2 * ln 8


def test_a_collapse_shows_in_feature_std_although_queries_are_normalised() -> None:
    method = tiny()
    with torch.no_grad():
        healthy = method(two_views(), 0.0)["feature_std"]
        method.student.network.norm.weight.mul_(1e-4)
        method.student.network.norm.bias.fill_(1.0)
        collapsed = method(two_views(), 0.0)["feature_std"]
    assert collapsed < 0.01 * healthy


# --- a training step


def forward_by_hand(method: MoCoV3, views: list[Tensor], momentum: float) -> Tensor:
    """The loss of one step, view by view, from copies of the method's parts."""
    student, projector, predictor, old_student, old_projector = (
        copy.deepcopy(part)
        for part in (
            method.student,
            method.projector,
            method.predictor,
            method.momentum_student,
            method.momentum_projector,
        )
    )
    queries = [predictor(projector(student(view).prefix[:, 0])) for view in views]
    for old, new in ((old_student, student), (old_projector, projector)):
        for old_parameter, parameter in zip(old.parameters(), new.parameters(), strict=True):
            old_parameter.data = momentum * old_parameter.data + (1 - momentum) * parameter.data
    keys = [old_projector(old_student(view).prefix[:, 0]) for view in views]
    temperature = method.config.temperature
    directions = [
        info_nce_by_loops(queries[0], keys[1], temperature),
        info_nce_by_loops(queries[1], keys[0], temperature),
    ]
    return torch.tensor(2 * temperature * sum(directions))


def trained_apart(**fields: Any) -> MoCoV3:
    """A method whose student has left its momentum copy behind, as after some steps."""
    method = tiny(**fields)
    generator = torch.Generator().manual_seed(2)
    for parameter in method.student.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return method


def test_a_step_is_queries_then_momentum_then_keys() -> None:
    method = trained_apart(momentum=0.3)
    views = two_views()
    progress = 0.25
    momentum = 1 - 0.7 * (1 + math.cos(math.pi * progress)) / 2
    expected = forward_by_hand(method, views, momentum)
    stale = forward_by_hand(method, views, 1.0)  # keys before the momentum update
    loss = method(views, progress)["loss"]
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-4, atol=1e-5)
    assert abs(stale - expected) > 0.01


def test_the_loss_does_not_know_which_view_is_first() -> None:
    views = two_views()
    first = tiny()(views, 0.0)["loss"]
    second = tiny()(views[::-1], 0.0)["loss"]
    torch.testing.assert_close(first, second)


def test_gradients_reach_everything_that_trains_and_nothing_else() -> None:
    method = tiny()
    method(two_views(), 0.0)["loss"].backward()
    with_gradient = grads(method)
    trainable = {name for name, parameter in method.named_parameters() if parameter.requires_grad}
    assert with_gradient.keys() == trainable
    assert not any(name.startswith("momentum_") for name in trainable)
    assert not any("patch_embed" in name or "pos_embed" in name for name in trainable)
    assert any(name.startswith("predictor") for name in trainable)


def test_a_free_patch_projection_and_learned_positions_get_gradients() -> None:
    method = tiny(net={"freeze_patch_projection": False, "position": "learned"})
    method(two_views(), 0.0)["loss"].backward()
    names = grads(method)
    assert {"student.network.patch_embed.proj.weight", "student.network.pos_embed"} <= names.keys()


def test_the_momentum_encoder_starts_equal_and_has_no_predictor() -> None:
    method = tiny()
    assert not any("predictor" in name for name in method.momentum_student.state_dict())
    for part, old in (("student", "momentum_student"), ("projector", "momentum_projector")):
        state, old_state = (getattr(method, name).state_dict() for name in (part, old))
        assert state.keys() == old_state.keys()
        assert all(torch.equal(state[key], old_state[key]) for key in state)


def momentum_weight(method: MoCoV3) -> Tensor:
    weight: Tensor = method.momentum_student.network.blocks[0].attn.qkv.weight
    return weight.clone()


def test_the_momentum_encoder_moves_once_an_optimiser_step() -> None:
    method = trained_apart()
    start = momentum_weight(method)
    predictor = copy.deepcopy(method.predictor)
    method(two_views(), 0.1)
    moved = momentum_weight(method)
    method(two_views(), 0.1)  # the second part of the same step
    assert not torch.equal(start, moved)
    assert torch.equal(moved, momentum_weight(method))
    method.after_step(0.1)
    method(two_views(), 0.2)
    assert not torch.equal(moved, momentum_weight(method))
    for old, new in zip(predictor.parameters(), method.predictor.parameters(), strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize("how", ["eval", "no_grad"])
def test_looking_at_the_loss_leaves_the_momentum_encoder_alone(how: str) -> None:
    method = trained_apart().train(how != "eval")
    start = momentum_weight(method)
    with torch.set_grad_enabled(how != "no_grad"):
        assert method(two_views(), 0.1)["loss"].isfinite()
    assert torch.equal(start, momentum_weight(method))


def test_batch_norm_of_the_momentum_encoder_lives_by_its_own_batches() -> None:
    method = trained_apart()
    method(two_views(), 0.1)
    mine, theirs = method.projector[1], method.momentum_projector[1]
    assert mine.num_batches_tracked.item() == theirs.num_batches_tracked.item() == 2
    assert not torch.allclose(mine.running_mean, theirs.running_mean)


def test_twenty_steps_learn_and_log_scalars() -> None:
    method = tiny()
    optimiser = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=3e-3)
    views = two_views(16)
    losses = []
    for step in range(20):
        scalars = method(views, step / 20)
        optimiser.zero_grad()
        scalars["loss"].backward()
        optimiser.step()
        method.after_step(step / 20)
        losses.append(scalars["loss"].item())
    assert losses[-1] < 0.7 * losses[0]
    assert scalars.keys() == {"loss", "positive_similarity", "top1", "feature_std"}
    assert all(value.ndim == 0 and value.isfinite() for value in scalars.values())
    assert [name for name, value in scalars.items() if value.requires_grad] == ["loss"]


def test_the_loss_is_computed_in_float32_under_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scalars = tiny()(two_views(), 0.0)
    assert scalars["loss"].dtype == torch.float32
    scalars["loss"].backward()


# --- the network and the heads


@pytest.mark.parametrize("architecture", ["vit_small_patch16_224", "vit_small_patch14_dinov2"])
def test_vit_small_has_12_heads_unless_told_otherwise(architecture: str) -> None:
    def num_heads(**args: Any) -> int:
        config = network(
            architecture=architecture, model_args={"embed_dim": 24, "depth": 1, "patch_size": 16, **args}
        )
        method = build(MoCoV3Config(**HEADS), TwoViewsConfig(image_size=32), config, seed=0)
        count: int = method.student.network.blocks[0].attn.num_heads
        assert method.student.recipe["model_args"]["num_heads"] == count  # and is exported so
        return count

    assert num_heads() == 12
    assert num_heads(num_heads=3) == 3


def test_other_networks_keep_their_own_number_of_heads() -> None:
    method = build(
        MoCoV3Config(**HEADS),
        TwoViewsConfig(image_size=8),
        network(model_args={**TINY_VIT, "num_heads": 4}),
        seed=0,
    )
    assert method.student.network.blocks[0].attn.num_heads == 4


def kinds(head: nn.Module) -> list[str]:
    return [type(layer).__name__ for layer in head.children()]


def test_the_heads_are_those_of_the_paper() -> None:
    method = tiny()
    hidden = ["Linear", "BatchNorm", "ReLU"]
    assert kinds(method.projector) == [*hidden, *hidden, "Linear", "BatchNorm"]
    assert kinds(method.predictor) == [*hidden, "Linear", "BatchNorm"]
    assert all(head[-1].weight is None for head in (method.projector, method.predictor))
    linear = [
        layer
        for head in (method.projector, method.predictor)
        for layer in head
        if isinstance(layer, nn.Linear)
    ]
    assert all(layer.bias is None for layer in linear)
    assert [tuple(layer.weight.shape) for layer in linear] == [(12, 16), (12, 12), (6, 12), (12, 6), (6, 12)]


def test_the_heads_of_a_resnet_are_those_of_the_paper() -> None:
    method = tiny(num_projector_layers=2, predictor_last_norm=False)
    assert kinds(method.projector) == ["Linear", "BatchNorm", "ReLU", "Linear", "BatchNorm"]
    assert kinds(method.predictor) == ["Linear", "BatchNorm", "ReLU", "Linear"]


def test_heads_without_batch_norms_have_none() -> None:
    method = tiny(head_norm=False)
    assert kinds(method.projector) == ["Linear", "ReLU", "Linear", "ReLU", "Linear"]
    assert kinds(method.predictor) == ["Linear", "ReLU", "Linear"]
    method(two_views(), 0.0)["loss"].backward()
    assert grads(method).keys() == {name for name, p in method.named_parameters() if p.requires_grad}


def test_without_a_predictor_the_projections_are_the_queries() -> None:
    method = tiny(num_predictor_layers=0)
    assert list(method.predictor.parameters()) == []
    queries = [method.projector(method.student(view).prefix[:, 0]) for view in two_views()]
    expected = (
        2
        * 0.2
        * sum(
            info_nce_by_loops(
                queries[i],
                method.momentum_projector(method.momentum_student(two_views()[1 - i]).prefix[:, 0]),
                0.2,
            )
            for i in range(2)
        )
    )
    assert method(two_views(), 0.0)["loss"].item() == pytest.approx(expected, rel=1e-4)


def test_build_takes_the_image_size_from_the_views() -> None:
    method = build(MoCoV3Config(**HEADS), TwoViewsConfig(image_size=12), network(), seed=0)
    assert method.student.image_size == method.views.image_size == 12
    assert method.student.network.pos_embed.shape == (1, 1 + 9, 16)


@pytest.mark.slow
def test_compiling_meets_no_new_graph_at_every_step() -> None:
    graphs = []
    small = {
        "num_projector_layers": 1,
        "num_predictor_layers": 1,
        "net": {"model_args": {**TINY_VIT, "depth": 1}},
    }
    method, expected = (tiny(**small) for _ in range(2))
    method.compile(backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    for step in range(5):
        loss = method(two_views(), step / 6)["loss"]
        torch.testing.assert_close(loss, expected(two_views(), step / 6)["loss"])
        method.after_step(step / 6)
        expected.after_step(step / 6)
        if step == 2:
            settled = len(graphs)
    assert len(graphs) == settled


def resnet() -> MoCoV3:
    fields = {"num_projector_layers": 2, "predictor_last_norm": False, "temperature": 1.0}
    config = NetworkConfig(architecture="resnet10t", pooling="patches")
    torch.manual_seed(0)
    student: Backbone = build_network(config, image_size=32)
    views = SimpleNamespace(num_views=2, image_size=32)
    return MoCoV3(student, views, MoCoV3Config(**HEADS, **fields), pooling="patches", seed=0)


def test_a_resnet_trains_with_batch_norms_that_see_one_view_at_a_time() -> None:
    method = resnet()
    views = [torch.rand(3, 3, 32, 32) for _ in range(2)]
    method(views, 0.0)["loss"].backward()
    assert grads(method).keys() == {name for name, p in method.named_parameters() if p.requires_grad}
    counts = {int(value) for key, value in method.state_dict().items() if key.endswith("num_batches_tracked")}
    assert counts == {2}


def lengths_seen(student: Backbone) -> list[int]:
    lengths: list[int] = []
    first = next(part for part in student.network.modules() if isinstance(part, nn.Conv2d))
    first.register_forward_pre_hook(lambda module, inputs: lengths.append(len(inputs[0])))
    return lengths


def test_views_go_through_a_network_without_batch_norms_at_once() -> None:
    whole, parts = tiny(), tiny()
    lengths = lengths_seen(whole.student)
    loss = whole(two_views(), 0.0)["loss"]
    assert lengths == [10]
    parts._has_batch_norm = True
    torch.testing.assert_close(parts(two_views(), 0.0)["loss"], loss)
    method = resnet()
    lengths = lengths_seen(method.student)
    method([torch.rand(3, 3, 32, 32) for _ in range(2)], 0.0)
    assert lengths == [3, 3]


def test_a_single_image_is_refused_where_batch_norms_see_it() -> None:
    alone = Duration(num_steps=10, batch_size=1, part_size=1)
    with pytest.raises(ConfigError, match="cannot normalise a single image"):
        tiny().begin(alone)
    tiny(head_norm=False).begin(alone)
    tiny().begin(alone._replace(batch_size=2, world_size=2))


def test_other_than_two_views_are_refused() -> None:
    with pytest.raises(ConfigError, match="the views make 1"):
        MoCoV3(
            build_network(network(), image_size=8),
            SimpleNamespace(num_views=1, image_size=8),
            MoCoV3Config(),
            seed=0,
        )


# --- two processes


def one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    results = {}
    for name, method, views in cases():
        parallel = DistributedDataParallel(method)
        scalars = parallel([view.chunk(2)[rank] for view in views], 0.25)
        scalars["loss"].backward()
        results[name] = {
            "loss": scalars["loss"].detach(),
            "grads": grads(method),
            "state": method.state_dict(),
        }
    torch.save(results, f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


def cases() -> list[tuple[str, MoCoV3, list[Tensor]]]:
    """Double precision, so that the order of sums does not show."""
    images = [view.double().repeat(1, 1, 4, 4) for view in two_views(6)]
    return [
        ("vit", trained_apart(temperature=1.0).double(), [view.double() for view in two_views(6)]),
        ("resnet", resnet().double(), images),
    ]


@pytest.mark.distributed
def test_two_ranks_equal_one_process(tmp_path: Any) -> None:
    mp.spawn(one_rank, args=(str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    for name, method, views in cases():
        loss = method(views, 0.25)["loss"]
        loss.backward()
        torch.testing.assert_close((ranks[0][name]["loss"] + ranks[1][name]["loss"]) / 2, loss.detach())
        for key, grad in grads(method).items():
            for result in ranks:
                torch.testing.assert_close(result[name]["grads"][key], grad, rtol=1e-4, atol=1e-7, msg=key)
        for key, value in method.state_dict().items():
            torch.testing.assert_close(ranks[1][name]["state"][key], value, rtol=1e-5, atol=1e-7, msg=key)
