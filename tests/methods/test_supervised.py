import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fdkit.data.supervised_views import SupervisedViews, SupervisedViewsConfig
from fdkit.errors import ConfigError
from fdkit.methods._method import Duration
from fdkit.methods.supervised import Supervised, SupervisedConfig
from fdkit.models.classifier import build_classifier
from fdkit.models.libraries import build_timm

VIT: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}
BEIT: dict[str, Any] = {**VIT, "global_pool": "token", "use_abs_pos_emb": False, "init_values": 0.1}
PLAIN: dict[str, Any] = {
    "mixup": 0.0, "cutmix": 0.0, "erase_probability": 0.0, "drop_path": 0.0, "head_scale": 1.0
}  # fmt: skip


def method(
    name: str = "vit_tiny_patch16_224", args: dict[str, Any] | None = None, repeats: int = 1, **fields: Any
) -> Supervised:
    config = SupervisedConfig(**(PLAIN | fields))
    student = build_classifier(
        build_timm(name, VIT if args is None else args), ("a", "b", "c"), drop_path=config.drop_path, seed=1
    )
    views = SupervisedViews(
        SupervisedViewsConfig(randaugment=None, repeats=repeats), image_size=16, mean=(0.5, 0.5, 0.5)
    )
    return Supervised(student, views, config, num_classes=3).train()


def batch(count: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(count, 3, 16, 16, generator=generator), torch.tensor([0, 2, 1, 1, 0, 2])[:count]


def test_the_loss_is_the_cross_entropy_with_smoothed_labels() -> None:
    made, (images, labels) = method(label_smoothing=0.3), batch()
    found = made([images], 0.0, labels)
    logits = made.student.logits(images).detach().double()
    total = 0.0
    for row, label in zip(logits, labels.tolist(), strict=True):
        log_probabilities = row - row.logsumexp(0)
        for k in range(3):
            total -= float((0.7 * (k == label) + 0.3 / 3) * log_probabilities[k])
    assert found["loss"].item() == pytest.approx(total / 6, rel=1e-5)
    assert float(found["train_top1"]) == pytest.approx(float((logits.argmax(1) == labels).float().mean()))
    assert [name for name, value in found.items() if value.requires_grad] == ["loss"]


def test_a_mixed_batch_is_scored_against_its_mixed_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    from fdkit.methods import supervised
    from fdkit.methods._mixing import Mixture

    made, (images, labels) = method(mixup=0.8, label_smoothing=0.0), batch()
    monkeypatch.setattr(supervised, "draw_mixture", lambda *args, **kwargs: Mixture(0.25))
    found = made([images], 0.0, labels)
    logits = made.student.logits(0.25 * images + 0.75 * images.flip(0)).log_softmax(dim=1)
    rows = torch.arange(6)
    expected = -(0.25 * logits[rows, labels] + 0.75 * logits[rows, labels.flip(0)]).mean()
    torch.testing.assert_close(found["loss"], expected)
    assert float(found["train_top1"]) == float((logits.argmax(1) == labels.flip(0)).float().mean())


def test_repeats_are_a_longer_batch_of_the_same_labels() -> None:
    made, (images, labels) = method(repeats=3), batch(4)
    views = [images, images.flip(-1), images * 0.5]
    torch.testing.assert_close(
        made(views, 0.0, labels)["loss"],
        torch.stack([made([view], 0.0, labels)["loss"] for view in views]).mean(),
    )


def test_a_seed_repeats_a_step_and_another_does_not() -> None:
    made, (images, labels) = method(mixup=0.8, cutmix=1.0, erase_probability=0.5, drop_path=0.5), batch()
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(made([images], 0.0, labels)["loss"].item())
    assert losses[0] == losses[1] != losses[2]


def test_one_image_cannot_be_mixed() -> None:
    one = Duration(num_steps=10, batch_size=4, part_size=1)
    with pytest.raises(ConfigError, match=r"mixup 0\.8 and supervised\.cutmix 0 mix the images"):
        method(mixup=0.8).begin(one)
    method().begin(one)
    method(mixup=0.8, repeats=2).begin(one)
    method(mixup=0.8, mix_probability=0.0).begin(one)


# Parts of the network


def trained(made: Supervised) -> set[str]:
    return {name for name, parameter in made.student.network.named_parameters() if parameter.requires_grad}


def of(made: Supervised, *prefixes: str) -> set[str]:
    return {name for name, _ in made.student.network.named_parameters() if name.startswith(prefixes)}


@pytest.mark.parametrize(
    ("count", "prefixes"),
    [
        (0, ()),
        (0.5, ("blocks.2.norm2", "blocks.2.mlp", "blocks.2.gamma_2", "blocks.2.ls2")),
        (1, ("blocks.2.",)),
        (2, ("blocks.1.", "blocks.2.")),
        (3, ("blocks.",)),
    ],
)
@pytest.mark.parametrize(
    ("name", "args"), [("vit_tiny_patch16_224", {**VIT, "init_values": 0.1}), ("beit_base_patch16_224", BEIT)]
)
def test_the_last_blocks_the_norm_and_the_head_train_alone(
    name: str, args: dict[str, Any], count: float, prefixes: tuple[str, ...]
) -> None:
    made = method(name, args, trained_blocks=count)
    assert trained(made) == of(made, "fc_norm", "head", *prefixes)
    assert trained(made) >= {"fc_norm.weight", "head.weight"}
    images, labels = batch()
    before = copy.deepcopy(made.student.network.state_dict())
    made([images], 0.0, labels)["loss"].backward()
    optimizer = torch.optim.SGD([p for p in made.parameters() if p.requires_grad], lr=1.0)
    optimizer.step()
    changed = {
        key for key, value in made.student.network.state_dict().items() if not torch.equal(value, before[key])
    }
    assert changed <= trained(made)
    assert {"head.weight", "head.bias"} <= changed


def test_frozen_blocks_drop_no_branch_and_trained_ones_do() -> None:
    made = method("beit_base_patch16_224", {**BEIT, "depth": 4}, trained_blocks=1.0, drop_path=0.9)
    network: Any = made.student.network
    made.eval()
    made.train()
    assert [block.drop_path1.training for block in network.blocks[1:]] == [False, False, True]
    half: Any = method("beit_base_patch16_224", BEIT, trained_blocks=0.5, drop_path=0.9).student.network
    assert (half.blocks[2].drop_path1.training, half.blocks[2].drop_path2.training) == (False, True)
    assert (half.patch_embed.training, half.head.training) == (False, True)


def test_frozen_batch_norms_keep_their_statistics() -> None:
    args = {"img_size": 32, "channels": [8, 8, 16, 16], "stem_width": 4}
    made, images = method("resnet10t", args, trained_blocks=0), torch.rand(4, 3, 16, 16)
    before = made.student.network.bn1.running_mean.clone()  # type: ignore[union-attr,operator]
    made([images], 0.0, torch.tensor([0, 1, 2, 0]))["loss"].backward()
    assert torch.equal(made.student.network.bn1.running_mean, before)  # type: ignore[union-attr,arg-type]
    assert trained(made) == {"fc.weight", "fc.bias"}


def test_blocks_that_are_not_there_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"trained_blocks 4: VisionTransformer has 3 blocks"):
        method(trained_blocks=4)
    with pytest.raises(ConfigError, match=r"trained_blocks 1\.5"):
        method(trained_blocks=1.5)
    with pytest.raises(ConfigError, match="ResNet has no transformer blocks"):
        method("resnet10t", {"img_size": 32}, trained_blocks=1)


# The moving average


def test_the_average_follows_weights_and_statistics_as_in_the_equation() -> None:
    args = {"img_size": 32, "channels": [8, 8, 16, 16], "stem_width": 4}
    made, decay = method("resnet10t", args, ema_decay=0.8), 0.8
    made.begin(Duration(num_steps=100))
    expected = {key: value.double() for key, value in copy.deepcopy(made.student.state_dict()).items()}
    for step in range(3):
        torch.manual_seed(step)
        made([torch.rand(4, 3, 16, 16)], 0.0, torch.tensor([0, 1, 2, 0]))
        with torch.no_grad():
            for parameter in made.student.parameters():
                parameter.add_(torch.randn_like(parameter))
        made.after_step(0.0)
        for key, value in made.student.state_dict().items():
            average = value.is_floating_point()
            expected[key] = (
                decay * expected[key] + (1 - decay) * value.double() if average else value.double()
            )
    assert made.exported is made.averaged is not None
    for key, value in made.averaged.state_dict().items():
        torch.testing.assert_close(value.double(), expected[key], rtol=1e-5, atol=1e-6, msg=key)
    assert int(made.averaged.network.bn1.num_batches_tracked) == 3  # type: ignore[union-attr,arg-type]


def test_the_average_takes_no_gradient_stays_in_eval_and_without_it_the_student_is_exported() -> None:
    made = method(ema_decay=0.9, drop_path=0.5)
    assert made.averaged is not None
    made.train()
    assert not any(module.training for module in made.averaged.modules())
    assert not any(parameter.requires_grad for parameter in made.averaged.parameters())
    plain = method()
    assert plain.averaged is None
    assert plain.exported is plain.student
    plain.after_step(0.0)


def test_an_average_over_more_steps_than_there_are_is_said_to_be(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="fdkit")
    method(ema_decay=0.999).begin(Duration(num_steps=100))
    assert "averages over 1000 steps, and the run has 100" in caplog.text
    caplog.clear()
    method(ema_decay=0.9).begin(Duration(num_steps=100))
    assert not caplog.text


@pytest.mark.parametrize(
    ("name", "args"),
    [
        (
            "swinv2_tiny_window8_256",
            {
                "img_size": 16,
                "patch_size": 2,
                "embed_dim": 8,
                "num_heads": [2, 4],
                "window_size": 4,
                "depths": [1, 2],
            },
        ),
        ("convnext_atto", {"img_size": 32, "depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}),
        ("resnet10t", {"img_size": 32, "channels": [8, 8, 16, 16], "stem_width": 4}),
    ],
)
def test_other_kinds_of_networks_learn_too(name: str, args: dict[str, Any]) -> None:
    made, (images, labels) = method(name, args, mixup=0.8, cutmix=1.0, erase_probability=0.5), batch()
    optimizer = torch.optim.AdamW(made.parameters(), lr=3e-3)
    losses = []
    for step in range(12):
        torch.manual_seed(step)
        optimizer.zero_grad()
        made([images], 0.0, labels)["loss"].backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in made.student.network.parameters())
        optimizer.step()
        with torch.no_grad():
            losses.append(made.classify(images, torch.eye(3)[labels])["loss"].item())
    assert losses[-1] < losses[0]


def test_the_gradient_reaches_every_parameter() -> None:
    made, (images, labels) = method(), batch()
    made([images], 0.0, labels)["loss"].backward()
    for name, parameter in made.student.network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert isinstance(made.student.network.norm, nn.Identity)
