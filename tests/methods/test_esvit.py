"""EsViT's loss against naive loops over its equations in double precision, and what must not change it."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from esvit_toys import SWIN, VIT, images, score, tiny, trained_apart
from torch import Tensor

from fdkit.data.views import MultiCropConfig
from fdkit.methods import esvit
from fdkit.methods.esvit import EsViT, region_cross_entropy, region_matches
from fdkit.models.backbone import pool

# --- the loss, by hand


def cross_entropy(teacher: Tensor, student: Tensor, centre: Tensor, temperature: float) -> float:
    """-sum_k p_t log p_s of two vectors of scores; the student's temperature is 0.1."""
    sharp = [math.exp((float(t) - float(c)) / temperature) for t, c in zip(teacher, centre[0], strict=True)]
    wide = [math.exp(float(s) / 0.1) for s in student]
    return -sum(p / sum(sharp) * math.log(q / sum(wide)) for p, q in zip(sharp, wide, strict=True))


def nearest(region: Tensor, regions: Tensor) -> int:
    cosines = [float(torch.dot(region, other) / region.norm() / other.norm()) for other in regions]
    return max(range(len(cosines)), key=lambda number: cosines[number])


Match = Callable[[Tensor, Tensor, Tensor, Tensor], list[int]]
"""From maps (S, C) and (T, C), and scores (S, K) and (T, K), of an image's two views: a teacher region each."""


def by_features(own: Tensor, taught: Tensor, own_scores: Tensor, taught_scores: Tensor) -> list[int]:
    return [nearest(region, taught) for region in own]


def by_scores(own: Tensor, taught: Tensor, own_scores: Tensor, taught_scores: Tensor) -> list[int]:
    return [nearest(row, taught_scores) for row in own_scores]


def by_the_students_axis(own: Tensor, taught: Tensor, own_scores: Tensor, taught_scores: Tensor) -> list[int]:
    return [nearest(region, own) for region in taught][: len(own)]


def by_channels(own: Tensor, taught: Tensor, own_scores: Tensor, taught_scores: Tensor) -> list[int]:
    return [int((region * taught.mean(dim=0)).argmax()) % len(taught) for region in own]


def by_place(own: Tensor, taught: Tensor, own_scores: Tensor, taught_scores: Tensor) -> list[int]:
    return list(range(len(own)))


class ByHand:
    """The terms of one step's loss, image by image and region by region, from the method's parts."""

    def __init__(self, method: EsViT, views: list[Tensor], temperature: float) -> None:
        self.method, self.temperature = method, temperature
        with torch.no_grad():
            own = [method.student(view) for view in views]
            taught = [method.teacher(view) for view in views[:2]]
        self.pooling = method.pooling
        self.own, self.taught = own, taught
        self.views = {(i, j) for i in range(2) for j in range(len(views))}
        self.pairs = sorted(pair for pair in self.views if pair[0] != pair[1])
        self.num_images = len(views[0])

    def view(self, i: int, j: int) -> float:
        """The view task of a teacher's view i and a student's view j."""
        taught = score(self.method.teacher_head, pool(self.taught[i], self.pooling))
        own = score(self.method.head, pool(self.own[j], self.pooling))
        centre = self.method.centre.value
        terms = [cross_entropy(t, s, centre, self.temperature) for t, s in zip(taught, own, strict=True)]
        return sum(terms) / len(terms)

    def region(self, i: int, j: int, match: Match = by_features, centre: Tensor | None = None) -> float:
        """The region task of the same."""
        taught_maps, own_maps = self.taught[i].patches, self.own[j].patches
        taught, own = (
            score(self.method.teacher_region_head, taught_maps),
            score(self.method.region_head, own_maps),
        )
        centre = self.method.region_centre.value if centre is None else centre
        terms = []
        for image in range(self.num_images):
            for r, target in enumerate(match(own_maps[image], taught_maps[image], own[image], taught[image])):
                terms.append(cross_entropy(taught[image, target], own[image, r], centre, self.temperature))
        return sum(terms) / len(terms)

    def mean(self, term: Callable[..., float], *args: Any) -> float:
        return sum(term(i, j, *args) for i, j in self.pairs) / len(self.pairs)


@torch.no_grad()
def by_hand(method: EsViT, views: list[Tensor], temperature: float) -> tuple[float, float]:
    """View and region loss."""
    hand = ByHand(method, views, temperature)
    return hand.mean(hand.view), hand.mean(hand.region)


@pytest.mark.parametrize(
    "network",
    [SWIN, VIT, {**VIT, "pooling": "patches"}],
    ids=["swin", "vit by class token", "vit by patches"],
)
def test_the_loss_matches_naive_loops(network: dict[str, Any]) -> None:
    method = trained_apart(network)
    scalars = method(images(), 3 / 8)  # step 3, in epoch 1, the second of three of warm-up
    view, region = by_hand(method, images(), 0.055)
    assert scalars["view_loss"].item() == pytest.approx(view, rel=1e-12)
    assert scalars["region_loss"].item() == pytest.approx(region, rel=1e-12)
    assert scalars["loss"].item() == pytest.approx((view + region) / 2, rel=1e-12)
    assert scalars["divergence"].item() == pytest.approx(view - scalars["target_entropy"].item(), rel=1e-9)


def test_views_alone_are_dino() -> None:
    method = trained_apart(region_loss=False)
    hand = ByHand(method, images(), 0.07)
    with torch.no_grad():
        scalars = method(images(), 7 / 8)
        assert scalars["loss"].item() == pytest.approx(hand.mean(hand.view), rel=1e-12)
    assert "region_loss" not in scalars
    assert not any("region" in name for name in method.state_dict())


@torch.no_grad()
def test_plausible_mistakes_give_another_loss() -> None:
    method = trained_apart()
    hand = ByHand(method, images(), 0.07)
    view, region = hand.mean(hand.view), hand.mean(hand.region)
    wrong = {
        "matched by the heads' scores": hand.mean(hand.region, by_scores),
        "argmax over the student's regions": hand.mean(hand.region, by_the_students_axis),
        "argmax over channels": hand.mean(hand.region, by_channels),
        "not matched": hand.mean(hand.region, by_place),
        "one centre": hand.mean(hand.region, by_features, method.centre.value),
        "a view meets itself": sum(hand.region(i, j) for i, j in hand.views) / len(hand.views),
        "mean over 2V": region * len(hand.pairs) / len(hand.views),
    }
    found = method(images(), 7 / 8)
    assert found["loss"].item() == pytest.approx((view + region) / 2, rel=1e-12)
    for mistake, value in wrong.items():
        assert abs(value - region) > 1e-3, mistake
    assert abs(view - region) > 1e-3  # so that halves cannot be exchanged
    method.region_head, method.teacher_region_head = method.head, method.teacher_head
    assert abs(method(images(), 7 / 8)["region_loss"].item() - region) > 1e-3, "one head"


def test_four_views_make_six_pairs_and_the_first_two_do_not_meet_themselves() -> None:
    own = [torch.randn(3, regions, 5) for regions in (4, 4, 2, 2)]
    taught = [torch.randn(3, 4, 5) for _ in range(2)]
    matches = region_matches(own, taught)
    assert [match.shape for match in matches] == [(3, 4, 1), (3, 4, 1), (3, 2, 2), (3, 2, 2)]
    assert matches[0].min() >= 12  # of the second view
    assert matches[1].max() < 12
    for image in range(3):
        assert set((matches[2][image].flatten() % 12 // 4).tolist()) == {image}


def test_an_equal_view_is_matched_region_by_region() -> None:
    regions = torch.randn(2, 6, 5)
    matches = region_matches([torch.randn(2, 6, 5), regions, 3 * regions], [regions, torch.randn(2, 6, 5)])
    assert torch.equal(matches[1][..., 0], torch.arange(12).view(2, 6))
    assert torch.equal(matches[2][..., 0], torch.arange(12).view(2, 6))


def test_the_order_of_the_teachers_regions_does_not_matter() -> None:
    own = [torch.randn(2, regions, 5) for regions in (6, 6, 3)]
    taught = [torch.randn(2, 6, 5) for _ in range(2)]
    scores, targets = torch.randn(2 * 15, 7), torch.randn(2, 2, 6, 7).softmax(dim=-1)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    loss = region_cross_entropy(scores, targets.view(-1, 7), region_matches(own, taught), temperature=0.1)
    moved = region_matches(own, [one[:, order] for one in taught])
    permuted = region_cross_entropy(scores, targets[:, :, order].reshape(-1, 7), moved, temperature=0.1)
    torch.testing.assert_close(permuted, loss)


def plain_region_loss(scores: Tensor, targets: Tensor, matches: list[Tensor]) -> Tensor:
    """The same with whole softmaxes and copies, left to autograd."""
    total, views = scores.new_zeros(()), scores.split([match[..., 0].numel() for match in matches])
    for view, match in zip(views, matches, strict=True):
        for rows in match.flatten(0, 1).T:
            total = total - (targets[rows] * (view / 0.1).log_softmax(dim=1)).sum(dim=1).mean()
    return total / (2 * (len(matches) - 1))


@pytest.mark.parametrize("block", [7, 7 * 4, 2**24])
def test_blocks_give_the_value_and_gradient_of_the_plain_loss(monkeypatch: Any, block: int) -> None:
    monkeypatch.setattr(esvit, "BLOCK_NUMBERS", block)
    maps = [torch.randn(3, regions, 5) for regions in (4, 4, 2)]
    matches = region_matches(maps, maps[1::-1])
    targets = torch.randn(24, 7).double().softmax(dim=1)
    results = []
    for loss_of in (plain_region_loss, lambda *args: region_cross_entropy(*args, temperature=0.1)):
        scores = torch.randn(30, 7, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
        loss = loss_of(scores, targets, matches)
        (3 * loss).backward()
        results.append((loss.detach(), scores.grad))
    for plain, blocked in zip(*results, strict=True):
        torch.testing.assert_close(blocked, plain)


def test_equal_scores_cost_ln_k_and_random_ones_about_as_much() -> None:
    method = tiny(output_dim=65536, hidden_dim=16, bottleneck_dim=256)
    with torch.no_grad():
        scalars = method([view.float() for view in images(batch=1)], 0.0)
        assert 10 < scalars["view_loss"].item() < 11.5
        assert 10 < scalars["region_loss"].item() < 11.5
        method.head.mlp[-1].weight.zero_()
        method.region_head.mlp[-1].weight.zero_()
        scalars = method([view.float() for view in images(batch=1)], 0.0)
    for name in ("view_loss", "region_loss", "loss"):
        assert scalars[name].item() == pytest.approx(math.log(65536), abs=1e-3)  # 11.090


@pytest.mark.parametrize("num_local", [0, 1, 3])
def test_any_number_of_small_views_will_do_even_of_the_large_ones_size(num_local: int) -> None:
    for size in (16, 8):
        crops = MultiCropConfig(image_size=16, local_size=size, num_local=num_local)
        method = trained_apart(crops=crops)
        view, region = by_hand(method, images(crops), 0.07)
        assert method(images(crops), 7 / 8)["loss"].item() == pytest.approx((view + region) / 2, rel=1e-12)
