import itertools
import json
import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from fdkit.analysis.attention_entropy import (
    AttentionEntropyConfig,
    Entropies,
    analyze,
    attention_entropy,
    draw,
    num_seen,
    query_entropies,
    scalars,
    summary,
    uniform_entropy,
)
from fdkit.analysis.observe import Attention
from fdkit.errors import ConfigError, DataError
from tests.attention_cases import (
    global_attention,
    layers_of,
    observed,
    random_attention,
    tiny,
    tiny_swin,
    windows,
)


def by_queries(attention: Attention) -> Entropies:
    """The definition, one query at a time, by scipy; what a query sees is found from what it attends to."""
    weights, places = attention.weights.double().numpy(), attention.places.numpy()
    num_images, num_windows, num_heads, num_tokens, _ = weights.shape
    sums, num_queries = np.zeros((4, num_heads)), 0
    for image, window, query in itertools.product(range(num_images), range(num_windows), range(num_tokens)):
        if places[window, query] < 0:
            continue
        num_queries += 1
        is_patch = places[window] >= 0
        sees = weights[:, window, :, query].max((0, 1)) > 1e-30
        for head in range(num_heads):
            row = weights[image, window, head, query]
            among = scipy.stats.entropy(row[is_patch])  # scales to sum to 1 itself
            whole = scipy.stats.entropy(row)
            most = [math.log((sees & is_patch).sum()), math.log(sees.sum())]
            normalised = [one / top if top > 0 else 1 for one, top in zip((among, whole), most, strict=True)]
            sums[:, head] += among, whole, *normalised
    return Entropies(*torch.from_numpy(sums / num_queries))


def assert_same(found: Entropies, expected: Entropies) -> None:
    for name, one, other in zip(Entropies._fields, found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("num_prefix_tokens", [0, 1, 5])
@pytest.mark.parametrize("sharpness", [0.5, 3, 12])
def test_equals_scipy_on_an_oblong_grid(num_prefix_tokens, sharpness):
    attention = random_attention(num_prefix_tokens, sharpness=sharpness)
    assert_same(attention_entropy(attention), by_queries(attention))


@pytest.mark.parametrize("layer", range(4))
def test_equals_scipy_in_padded_and_shifted_windows(layer):
    attention = windows()[layer]
    assert_same(attention_entropy(attention), by_queries(attention))


def test_versions_that_are_nearly_right_differ():
    attention = random_attention(1)
    found = attention_entropy(attention)
    rows = attention.weights[:, 0, :, 1:].double()
    not_renormalised = torch.special.entr(rows[..., 1:]).sum(-1).mean((0, 2))
    of_mean_map = torch.special.entr(attention.weights.mean(0)[0, :, 1:].double()).sum(-1).mean(1)
    with_class_query = torch.special.entr(attention.weights[:, 0].double()).sum(-1).mean((0, 2))
    wrong_count = found.among_patches / math.log(16)
    pairs = [
        (not_renormalised, found.among_patches),
        (of_mean_map, found.over_all),
        (with_class_query, found.over_all),
        (wrong_count, found.among_patches_normalised),
    ]
    for wrong, right in pairs:
        assert (wrong - right).abs().max() > 1e-3


def test_uniform_attention_is_1_and_a_single_token_0():
    uniform = attention_entropy(global_attention(torch.full((2, 3, 16, 16), 1 / 16), 1))
    assert uniform.over_all.tolist() == pytest.approx([math.log(16)] * 3)
    assert uniform.among_patches.tolist() == pytest.approx([math.log(15)] * 3)
    assert uniform.over_all_normalised.tolist() == pytest.approx([1] * 3)
    assert uniform.among_patches_normalised.tolist() == pytest.approx([1] * 3)
    single = attention_entropy(global_attention(torch.eye(16).expand(2, 3, 16, 16), 1))
    for part in single:
        assert part.tolist() == [0, 0, 0]


def test_by_hand():
    # Patches get 1/8 and 3/8, the class token 1/2: among patches 1/4 and 3/4.
    row = torch.tensor([0.5, 0.125, 0.375])
    found = attention_entropy(global_attention(row.expand(1, 1, 3, 3), 1, grid=(1, 2)))
    assert found.over_all.item() == pytest.approx(
        0.5 * math.log(2) + 0.125 * math.log(8) + 0.375 * math.log(8 / 3)
    )
    assert found.among_patches.item() == pytest.approx(0.25 * math.log(4) + 0.75 * math.log(4 / 3))


def test_uniform_over_what_a_shifted_window_shows_is_1():
    for attention in windows():
        sees = attention.sees().float()
        uniform = (
            (sees / sees.sum(-1, keepdim=True))
            .expand(attention.weights.transpose(1, 2).shape)
            .transpose(1, 2)
        )
        found = attention_entropy(attention._replace(weights=uniform))
        heads = [1.0] * attention.num_heads
        assert found.over_all_normalised.tolist() == pytest.approx(heads)
        assert found.among_patches_normalised.tolist() == pytest.approx(heads)
        among, whole = uniform_entropy(attention)
        assert found.among_patches.tolist() == pytest.approx([among] * attention.num_heads)
        assert found.over_all.tolist() == pytest.approx([whole] * attention.num_heads)
    assert not torch.equal(*num_seen(windows()[0])), "padding counts among all tokens"


def test_a_query_that_sees_itself_alone_counts_as_uniform():
    attention = Attention(torch.ones(1, 2, 1, 1, 1), torch.tensor([[0], [1]]), (1, 2), 16)
    found = attention_entropy(attention)
    assert (found.among_patches.item(), found.among_patches_normalised.item()) == (0, 1)


@pytest.mark.parametrize("mass", [0, 1e-30, 1e-6])
def test_a_query_that_attends_to_hardly_any_patch_stays_finite(mass):
    weights = torch.full((1, 1, 16, 16), mass / 15)
    weights[..., 0] = 1 - mass
    among = query_entropies(global_attention(weights, 1))[0][0, 0, 0, 1:]
    expected = 0 if mass == 0 else math.log(15)
    assert among.tolist() == pytest.approx([expected] * 15, abs=1e-4)


@given(sharpness=st.floats(0, 50), shift=st.integers(0, 14))
def test_between_0_and_1_and_blind_to_the_order_of_tokens(sharpness, shift):
    attention = random_attention(0, sharpness=sharpness)
    found = attention_entropy(attention)
    for part in found[2:]:
        assert torch.all((part >= 0) & (part <= 1 + 1e-5))
    rolled = attention_entropy(attention._replace(weights=attention.weights.roll(shift, -1)))
    torch.testing.assert_close(rolled.over_all, found.over_all, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [tiny, tiny_swin])
def test_numbers_equal_the_mean_over_images_however_they_are_batched(make):
    model = make()
    expected = [by_queries(one) for one in layers_of(observed(model=model, count=5))]
    for sizes in ([5], [2, 2, 1]):
        one = observed(model=model, count=5, sizes=sizes)
        found = analyze([one], AttentionEntropyConfig()).numbers["models"][0]
        names = (
            "entropy_among_patches",
            "entropy_over_all",
            "normalised_among_patches",
            "normalised_over_all",
        )
        for name, field in zip(names, Entropies._fields, strict=True):
            for layer, other in zip(found[name], expected, strict=True):
                assert layer == pytest.approx(getattr(other, field).tolist(), abs=1e-5)
        assert found["num_images"] == 5


def test_numbers_are_plain_and_hold_both_ways():
    kept = {
        renormalise: analyze([observed("a")], AttentionEntropyConfig(renormalise=renormalise)).numbers
        for renormalise in (True, False)
    }
    for renormalise, kind in ((True, "among_patches"), (False, "over_all")):
        numbers = kept[renormalise]
        model = numbers["models"][0]
        assert json.loads(json.dumps(numbers)) == numbers
        assert (numbers["analysis"], numbers["unit"], numbers["renormalised"]) == (
            "attention-entropy",
            "nat",
            renormalise,
        )
        assert model["entropy"] == model[f"entropy_{kind}"]
        assert model["normalised"] == model[f"normalised_{kind}"]
        assert model["uniform"] == pytest.approx([math.log(16 if renormalise else 17)] * 2)
        assert model["mean"] == pytest.approx([np.mean(heads) for heads in model["normalised"]])
        assert model["head_std"] == pytest.approx([np.std(heads) for heads in model["normalised"]])
    assert kept[True]["models"][0]["entropy"] != kept[False]["models"][0]["entropy"]
    assert scalars(kept[True]["models"][0]) == {
        "mean entropy (1 = uniform)": pytest.approx(np.mean(kept[True]["models"][0]["normalised"])),
        "spread of heads in deep layers (1 = uniform)": kept[True]["models"][0]["head_std"][1],
    }


@pytest.mark.parametrize(("unit", "factor"), [("nats", 1), ("bits", 1 / math.log(2)), ("normalised", None)])
def test_table_and_figure_are_in_the_unit_asked_for(unit, factor):
    analysis = analyze([observed("a"), observed("b", tiny(depth=3))], AttentionEntropyConfig(unit=unit))
    model = analysis.numbers["models"][0]
    shown = model["normalised"] if factor is None else factor * np.array(model["entropy"])
    title, rows = summary(analysis.numbers)
    assert ("1 = uniform" if factor is None else unit) in title
    assert rows[1][1] == f"{np.mean(shown[0]):.2f} ± {np.std(shown[0]):.2f}"
    assert rows[3][1] == ""
    figure = analysis.figure()
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["a", "b"]
    dots = figure.axes[0].collections[0].get_offsets()
    assert dots[:, 1].tolist() == pytest.approx(np.ravel(shown).tolist())
    top = 1 if factor is None else factor * math.log(16)
    assert set(np.round(figure.axes[0].lines[0].get_ydata(), 6)) == {round(top, 6)}
    assert figure.axes[0].get_ylim()[1] > top
    assert len(draw(analysis.numbers, width=3.7).axes) == 2


def test_nothing_to_observe_is_refused():
    with pytest.raises(ConfigError, match="attention-entropy needs a model"):
        analyze([], AttentionEntropyConfig())
    with pytest.raises(DataError, match="no images to observe m on"):
        analyze([observed()._replace(batches=[])], AttentionEntropyConfig())
