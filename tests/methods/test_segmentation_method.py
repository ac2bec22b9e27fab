import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fdkit.data.segmentation import IGNORED
from fdkit.data.segmentation_views import SegmentationCrop, SegmentationCropConfig
from fdkit.errors import ConfigError
from fdkit.methods._method import Duration
from fdkit.methods.segmentation import Segmentation, SegmentationConfig, pixel_accuracy, pixel_loss
from fdkit.models.backbone import Backbone
from fdkit.models.libraries import build_timm
from fdkit.models.segmentation_heads import resize, token_map

SIZE, CLASSES = 32, 3
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", {"patch_size": 8, "embed_dim": 16, "depth": 4, "num_heads": 2}),
    "beit": (
        "beit_base_patch16_224",
        {
            "patch_size": 8,
            "embed_dim": 16,
            "depth": 4,
            "num_heads": 2,
            "init_values": 0.1,
            "global_pool": "token",
        },
    ),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"patch_size": 2, "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [2] * 4, "window_size": 2},
    ),
    "resnet": ("resnet10t", {"channels": [8, 8, 16, 16], "stem_width": 4}),
    "convnext": ("convnext_atto", {"dims": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}),
}


def network(kind: str = "vit") -> Backbone:
    name, args = NETWORKS[kind]
    return build_timm(name, {**args, "img_size": SIZE})


def build(kind: str = "vit", *, seed: int = 0, **fields: Any) -> Segmentation:
    torch.manual_seed(1)
    config = SegmentationConfig(**({"channels": 8} if fields.get("head") == "upernet" else {}) | fields)
    views = SegmentationCrop(SegmentationCropConfig(), SIZE)
    return Segmentation(network(kind), views, config, num_classes=CLASSES, seed=seed).train()


def batch(count: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    images = torch.rand(count, 3, SIZE, SIZE, generator=generator)
    masks = torch.randint(0, CLASSES, (count, SIZE, SIZE), generator=generator)
    masks[torch.rand(count, SIZE, SIZE, generator=generator) < 0.3] = IGNORED
    return [images, masks]


HEADS: list[dict[str, Any]] = [{}, {"head": "upernet"}]


def test_the_loss_is_the_mean_over_the_pixels_that_count() -> None:
    scores, (_, masks) = torch.randn(2, CLASSES, SIZE, SIZE, dtype=torch.float64), batch()
    masks[0] = IGNORED  # a mean over images of means over pixels would differ
    masks[0, :2] = 1
    total, count, right = 0.0, 0, 0
    for image in range(2):
        for row in range(SIZE):
            for column in range(SIZE):
                true = int(masks[image, row, column])
                if true == IGNORED:
                    continue
                one = scores[image, :, row, column]
                total -= float(one[true] - one.exp().sum().log())
                count += 1
                right += int(one.argmax()) == true
    assert float(pixel_loss(scores, masks)) == pytest.approx(total / count)
    assert float(pixel_accuracy(scores, masks)) == pytest.approx(right / count)


@pytest.mark.parametrize("fields", HEADS)
def test_a_batch_without_a_pixel_that_counts_has_loss_0_and_no_slope(fields: dict[str, Any]) -> None:
    method = build(**fields)
    images, masks = batch()
    scalars = method([images, torch.full_like(masks, IGNORED)], 0.0)
    scalars["loss"].backward()
    assert float(scalars["loss"].detach()) == 0
    assert all(float(p.grad.abs().sum()) == 0 for p in method.parameters() if p.grad is not None)


def test_the_linear_head_reads_the_final_tokens_and_its_scores_are_resized_to_the_mask() -> None:
    method = build()
    images, masks = batch()
    with torch.no_grad():
        features = token_map(method.student.eval()(images))
    normed = method.head.norm(features)
    scores = nn.functional.interpolate(method.head.classifier(normed), size=(SIZE, SIZE), mode="bilinear")
    loss = method([images, masks], 0.0)["loss"]
    torch.testing.assert_close(loss, nn.functional.cross_entropy(scores, masks, ignore_index=IGNORED))
    method.eval()
    assert method.scores(images).shape == (2, CLASSES, 4, 4)


def test_several_layers_stand_side_by_side_each_through_the_final_norm() -> None:
    method = build(num_layers=3)
    images, _ = batch()
    expected = method.student.encode_layers(images, [1, 2, 3], norm=True)
    found = method._levels(images)
    for one, tokens in zip(found, expected, strict=True):
        assert torch.equal(one, token_map(tokens))
    assert method.head.classifier.in_channels == 48


def test_layers_may_be_named() -> None:
    method = build(layers=(1, -1))
    images, _ = batch()
    expected = method.student.encode_layers(images, [1, 3], norm=True)
    assert all(torch.equal(a, token_map(b)) for a, b in zip(method._levels(images), expected, strict=True))
    assert (
        build(layers=(-4, -3, -2, -1), head="upernet").layers == build(head="upernet").layers == [0, 1, 2, 3]
    )
    stage = build("swin", layers=(1,))
    assert stage.head.classifier.in_channels == 16
    assert not stage.norm, "the final norm does not fit a stage before the last"
    assert build("swin").norm


def test_upernets_loss_is_that_of_both_heads_and_dropout_is_drawn_from_the_global_generator() -> None:
    method = build(head="upernet", dropout=0.0)
    scalars = method(batch(), 0.0)
    alone = copy.deepcopy(method)
    alone.auxiliary = None
    main = alone(batch(), 0.0)["loss"]
    torch.testing.assert_close(scalars["loss"], main + 0.4 * scalars["auxiliary_loss"])
    assert build(head="upernet", auxiliary_weight=0).auxiliary is None
    images, masks = batch()
    third = method.eval()._levels(images)[2]  # of four, as in BEiT and Swin
    expected = pixel_loss(resize(method.auxiliary(third), masks.shape[-2:]), masks)
    torch.testing.assert_close(method([images, masks], 0.0)["auxiliary_loss"], expected)
    method = build(head="upernet", dropout=0.5)
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(float(copy.deepcopy(method)(batch(), 0.0)["loss"].detach()))
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("fields", HEADS)
@pytest.mark.parametrize("kind", list(NETWORKS))
def test_a_frozen_backbone_stays_as_it_is_to_the_bit(kind: str, fields: dict[str, Any]) -> None:
    method = build(kind, **fields)
    before = copy.deepcopy(method.student.state_dict())
    heads = {name: value.clone() for name, value in method.head.named_parameters()}
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1)
    loss = method(batch(), 0.0)["loss"]
    loss.backward()
    optimizer.step()
    assert not any(module.training for module in method.student.modules())
    assert method.head.training
    assert not any(p.requires_grad for p in method.student.parameters())
    for name, value in method.student.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert any(not torch.equal(value, heads[name]) for name, value in method.head.named_parameters())


@pytest.mark.parametrize("fields", HEADS)
@pytest.mark.parametrize("kind", list(NETWORKS))
def test_a_trained_backbone_learns_with_the_head_and_nothing_waits_for_a_gradient(
    kind: str, fields: dict[str, Any]
) -> None:
    method = build(kind, freeze=False, **fields)
    assert method.student.training
    losses = []
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(8):
        torch.manual_seed(0)
        optimizer.zero_grad(set_to_none=True)
        scalars = method(batch(), 0.0)
        scalars["loss"].backward()
        for name, parameter in method.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name
        optimizer.step()
        losses.append(float(scalars["loss"].detach()))
    assert [key for key, value in scalars.items() if value.requires_grad] == ["loss"]
    assert sum(p.requires_grad for p in method.student.parameters()) > 0.7 * len(
        list(method.student.parameters())
    )
    assert losses[-1] < losses[0]


def test_what_upernet_does_not_read_does_not_train() -> None:
    still = {
        name
        for name, p in build(freeze=False, head="upernet").student.named_parameters()
        if not p.requires_grad
    }
    assert still == {"network.norm.weight", "network.norm.bias"}
    assert all(p.requires_grad for p in build(freeze=False).student.parameters())


def test_stochastic_depth_is_the_one_asked_for_and_rests_in_eval() -> None:
    swin = build("swin", freeze=False).student
    assert not any(isinstance(part, DropPath) and part.drop_prob > 0 for part in swin.modules())
    method = build("vit", freeze=False, drop_path=0.3)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in method.student.network.blocks]  # type: ignore[union-attr]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])
    images = batch()[0]
    assert not torch.equal(method.scores(images), method.scores(images))
    method.eval()
    assert torch.equal(method.scores(images), method.scores(images))


def test_the_seed_decides_the_head_and_the_global_generator_is_left_alone() -> None:
    views = SegmentationCrop(SegmentationCropConfig(), SIZE)
    students = [network() for _ in range(3)]
    before = torch.get_rng_state()
    heads = [
        Segmentation(one, views, SegmentationConfig(), num_classes=CLASSES, seed=seed).head.state_dict()
        for one, seed in zip(students, (3, 3, 4), strict=True)
    ]
    assert torch.equal(before, torch.get_rng_state())
    weights = [head["classifier.weight"] for head in heads]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"channels": 64}, "channels 64 has no effect on the head linear"),
        ({"dropout": 0.2}, "dropout 0.2 has no effect on the head linear"),
        ({"auxiliary_weight": 1.0}, "auxiliary_weight 1.0 has no effect on the head linear"),
        ({"head": "upernet", "num_layers": 2}, "num_layers 2 has no effect on the head upernet"),
        ({"layers": (0, 2), "num_layers": 2}, r"num_layers 2 and layers \[0, 2\] exclude each other"),
        ({"layers": (0, 1, 2), "head": "upernet"}, "upernet reads 4 layers"),
        ({"layers": (3, 2, 1, 0), "head": "upernet"}, "upernet reads 4 layers"),
        ({"layers": (4,)}, "layer 4: VisionTransformer has 4 layers"),
        ({"drop_path": 0.1}, "drop_path 0.1 has no effect on a frozen backbone"),
        ({"num_layers": 5}, "num_layers 5: the network has 4 layers"),
    ],
)
def test_options_without_effect_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**fields)


def test_drop_path_needs_a_place() -> None:
    one = network("resnet")
    for module in one.modules():
        for name in ("drop_path", "drop_path1", "drop_path2"):
            if hasattr(module, name):
                setattr(module, name, None)
    with pytest.raises(ConfigError, match="have no place for it"):
        Segmentation(
            one,
            SegmentationCrop(SegmentationCropConfig(), SIZE),
            SegmentationConfig(freeze=False, drop_path=0.1),
            num_classes=2,
        )


def test_a_single_image_is_enough_for_the_linear_head_and_too_few_for_upernets_pooling() -> None:
    alone = Duration(batch_size=1, part_size=1)
    build().begin(alone)
    with pytest.raises(ConfigError, match="cannot normalise a single image"):
        build(head="upernet").begin(alone)


def one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    results = {}
    for head in ("linear", "upernet"):
        method = distributed_method(head)
        parallel = DistributedDataParallel(method, broadcast_buffers=False)
        views = [view[2 * rank : 2 * rank + 2] for view in distributed_batch()]
        for _ in range(2):  # a parameter without gradient would be missed at the second pass
            method.zero_grad()
            parallel(views, 0.0)["loss"].backward()
        results[head] = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
    torch.save(results, f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


def distributed_method(head: str) -> Segmentation:
    fields = {} if head == "linear" else {"dropout": 0.0}
    return build("vit", freeze=False, head=head, **fields).double()


def distributed_batch() -> list[Tensor]:
    images, masks = batch(4)
    masks[:2, :20] = IGNORED  # so that the processes have unlike numbers of pixels that count
    return [images.double(), masks]


@pytest.mark.distributed
def test_two_processes_equal_one(tmp_path: Path) -> None:
    mp.spawn(one_rank, args=(str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    for head in ("linear", "upernet"):
        method = distributed_method(head)
        for _ in range(2):
            method.zero_grad()
            method(distributed_batch(), 0.0)["loss"].backward()
        for name, parameter in method.named_parameters():
            for rank in ranks:
                if parameter.grad is not None:
                    torch.testing.assert_close(
                        rank[head][name], parameter.grad, rtol=1e-6, atol=1e-10, msg=name
                    )
