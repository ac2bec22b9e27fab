import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

from fdkit.errors import NumericsError
from fdkit.evaluation import _search
from fdkit.evaluation._search import Blocks, Neighbours, Vectors, resolve_method, search, search_all

SMALL = Blocks(queries=7, bank=33, numbers=100)


def naive(queries: Tensor, bank: Tensor, k: int) -> tuple[list[list[float]], list[list[int]]]:
    """Similarities and rows by the rule, one pair at a time with a sum that does not round."""
    found: tuple[list[list[float]], list[list[int]]] = ([], [])
    for query in queries.double().tolist():
        scores = [cosine(query, row) for row in bank.double().tolist()]
        order = sorted(range(len(scores)), key=lambda row: (-scores[row], row))[:k]
        found[0].append([scores[row] for row in order])
        found[1].append(order)
    return found


def cosine(a: list[float], b: list[float]) -> float:
    dot, *squares = (
        math.fsum(x * y for x, y in zip(*pair, strict=True)) for pair in ((a, b), (a, a), (b, b))
    )
    lengths = [max(math.sqrt(square), 1e-12) for square in squares]
    return float(np.float32(dot / (lengths[0] * lengths[1])))


def features(kind: str, num_queries: int = 11, num_rows: int = 170, width: int = 19) -> tuple[Tensor, Tensor]:
    """Queries and a bank that are hard in some way."""
    random = torch.Generator().manual_seed(3)
    both = torch.randn(num_queries + num_rows, width, generator=random)
    if kind == "long and short":
        both *= torch.logspace(-20, 18, len(both))[torch.randperm(len(both), generator=random), None]
    elif kind == "longer than float32 can say":
        both *= 3e37
    elif kind == "pointing one way":
        both = torch.ones(width) + 0.05 * both
    elif kind == "nearly collapsed":
        both = torch.ones(width) + 1e-4 * both
    elif kind == "collapsed but for rounding":
        both = torch.linspace(1, 2, width) + 1e-7 * both
    elif kind == "duplicates":
        both[num_queries:] = both[num_queries:][torch.randint(5, (num_rows,), generator=random)]
        both[:3] = both[-3:]
    elif kind == "zeros":
        both[::4] = 0
        both[0] = both[5] = 0
    elif kind == "sparse":
        both = (both.abs() > 1.5).float()
    else:
        assert kind == "random", kind
    return both[:num_queries], both[num_queries:]


KINDS = (
    "random",
    "long and short",
    "longer than float32 can say",
    "pointing one way",
    "nearly collapsed",
    "collapsed but for rounding",
    "duplicates",
    "zeros",
    "sparse",
)


def assert_same(found: Neighbours, expected: Neighbours) -> None:
    assert torch.equal(found.rows, expected.rows)
    assert torch.equal(found.similarity, expected.similarity)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["fp32", "bf16"])
@pytest.mark.parametrize("k", [1, 6, 170])
def test_equals_a_naive_loop(kind, method, k):
    queries, bank = features(kind)
    similarity, rows = naive(queries, bank, k)
    found = search_all(queries, bank, k, method=method, blocks=SMALL)
    assert found.rows.tolist() == rows
    assert found.similarity.dtype == torch.float32
    torch.testing.assert_close(found.similarity, torch.tensor(similarity), rtol=2e-7, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_neither_precision_nor_blocks_change_a_bit(kind):
    queries, bank = features(kind, num_queries=20, num_rows=400, width=37)
    expected = search_all(queries, bank, 9, method="fp32")
    for blocks in (Blocks(20, 400, 10**6), Blocks(7, 100, 2000), Blocks(13, 257, 37)):
        for method in ("fp32", "bf16"):
            assert_same(search_all(queries, bank, 9, method=method, blocks=blocks), expected)


def close_calls() -> tuple[Tensor, Tensor]:
    """A query and 600 rows, of which the nearer half differ in its direction by less than bf16 can say."""
    random = torch.Generator().manual_seed(0)
    along = 0.7 + 1e-5 * torch.randperm(300, generator=random).double()
    along = torch.cat([along, -along])[:, None]
    across = torch.nn.functional.normalize(torch.randn(600, 30, generator=random).double(), dim=1)
    return torch.eye(31)[:1], torch.cat([along, (1 - along**2).sqrt() * across], dim=1).float()


def test_what_bf16_cannot_tell_apart_is_searched_again():
    queries, bank = close_calls()
    expected = naive(queries, bank, 5)[1]
    found = search_all(queries, bank, 5, method="bf16")
    assert found.rows.tolist() == expected
    assert found.rechecked.tolist() == [True]
    assert not search_all(queries, bank, 5, method="fp32").rechecked.any()
    assert not search_all(*features("random"), 5, method="bf16").rechecked.any()


@pytest.mark.parametrize("trusted", ["scores", "candidates"])
def test_without_the_bound_bf16_would_be_wrong(monkeypatch, trusted):
    queries, bank = close_calls()
    right = _search._Searcher._upper_bound

    def wrong(self, queries, scores, dtype):
        highest = right(self, queries, scores, dtype)
        return highest - 0.02 if trusted == "scores" else torch.where(highest > highest[:, -1:], highest, -1)

    monkeypatch.setattr(_search._Searcher, "_upper_bound", wrong)
    found = search_all(queries, bank, 5, method="bf16")
    assert found.rows.tolist() != naive(queries, bank, 5)[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [-0.5, 0.5])
def test_sums_in_any_order_give_the_bits_of_ordered_ones(monkeypatch, kind, share):
    queries, bank = features(kind)
    expected = search_all(queries, bank, 170)
    ordered = disturb_other_sums(monkeypatch, share * 2 * 19 * 2**-52)
    found = search_all(queries, bank, 170)
    assert_same(found, expected)
    assert bool(ordered) == (kind in ("long and short", "zeros", "sparse"))


def disturb_other_sums(monkeypatch, error: float) -> list[int]:
    """Cosines whose sums are in no fixed order get an error; the numbers of those in order are listed."""
    right = _search._Searcher._cosines
    ordered: list[int] = []

    def disturbed(self, queries, rows, *, in_order):
        if in_order:
            ordered.append(rows.numel())
            return right(self, queries, rows, in_order=True)
        return right(self, queries, rows, in_order=True) + error

    monkeypatch.setattr(_search._Searcher, "_cosines", disturbed)
    return ordered


def test_orders_of_summing_differ_by_less_than_half_their_bound():
    queries, bank = features("pointing one way", width=769)
    exact = _search._Exact(bank, SMALL)
    searched, asked = (_search._measured(each, "", exact, sharded=False) for each in (bank, queries))
    searcher = _search._Searcher(searched, 1, exact, SMALL)
    rows = torch.arange(len(bank)).expand(len(queries), -1)
    ordered, other = (searcher._cosines(asked, rows, in_order=each) for each in (True, False))
    assert 0 < (ordered - other).abs().max() < 769 * 2**-52


@pytest.mark.parametrize(
    ("dtype", "slack"), [(torch.bfloat16, 0.03), (torch.float32, 1e-4), (torch.float64, 2e-7)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_no_similarity_exceeds_its_bound(dtype, slack, kind):
    queries, bank = features(kind, num_queries=23, num_rows=301, width=65)
    blocks = _search.CPU_BLOCKS
    exact = _search._Exact(bank, blocks)
    searched, asked = (_search._measured(each, "", exact, sharded=False) for each in (bank, queries))
    searcher = _search._Searcher(searched, 1, exact, blocks)
    scores, rows = searcher._candidates(_search._rounded(asked, dtype), len(bank))
    margin = searcher._upper_bound(asked, scores, dtype) - searcher._similarity(asked, rows)
    assert margin.min() >= 0
    assert margin.max() < slack


def test_the_bound_holds_where_all_roundings_go_one_way():
    # Each component lies just below the middle of two bf16 numbers, and is rounded away from it.
    bank = torch.full((200, 64), 1.0 + 2**-8 - 2**-15) / 8
    bank[:, :2] = torch.tensor([1.7, 0.3])
    queries = bank[:3].clone()
    queries[:, 5] += 0.01
    found = search_all(queries, bank, 4, method="bf16", blocks=SMALL)
    assert found.rows.tolist() == [[0, 1, 2, 3]] * 3
    torch.testing.assert_close(found.similarity, torch.tensor(naive(queries, bank, 4)[0]))


def test_of_more_equal_rows_than_candidates_the_first_are_found():
    queries, bank = features("random", num_queries=5, num_rows=500, width=8)
    bank[37::2] = 3 * queries[2]
    found = search_all(queries, bank, 4, method="bf16", blocks=SMALL)
    assert found.rows[2].tolist() == [37, 39, 41, 43]
    assert found.rechecked[2]
    assert found.rows.tolist() == naive(queries, bank, 4)[1]


def test_of_features_all_the_same_the_first_are_found_at_once(monkeypatch):
    pairs = []
    right = _search._Searcher._similarity

    def counted(self, queries, rows):
        pairs.append(rows.numel())
        return right(self, queries, rows)

    monkeypatch.setattr(_search._Searcher, "_similarity", counted)
    same = torch.linspace(-1, 2, 12).expand(3000, 12)
    assert search_all(same[:6], same, 3).rows.tolist() == [[0, 1, 2]] * 6
    assert sum(pairs) < 6 * 300


def test_callers_precision_settings_do_not_reach_the_search():
    queries, bank = features("random", num_queries=40, num_rows=1500)
    expected = search_all(queries, bank, 9, method="fp32")
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            found = search_all(queries, bank, 9, method="fp32")
            assert (queries @ bank.T).dtype == torch.bfloat16
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert_same(found, expected)
    assert not found.rechecked.any()


def test_a_bank_in_a_file_is_read_in_blocks(tmp_path: Path, monkeypatch):
    queries, bank = features("random", num_rows=1000)
    np.asarray(bank).tofile(tmp_path / "bank")
    mapped = np.memmap(tmp_path / "bank", dtype=np.float32, mode="r+", shape=tuple(bank.shape))
    sizes = []
    expected = search_all(queries, bank, 4, method="fp32")
    right = Vectors.unit

    def recorded(self, dtype):
        sizes.append(len(self.values))
        return right(self, dtype)

    monkeypatch.setattr(Vectors, "unit", recorded)
    monkeypatch.setattr(_search, "CENTRED_ON", 30)
    blocks = Blocks(queries=5, bank=120, numbers=400)
    found = search_all(queries, torch.from_numpy(mapped), 4, method="bf16", blocks=blocks)
    assert_same(found, expected)
    assert max(sizes) == 120


def test_blocks_come_in_order_and_cover_the_queries():
    queries, bank = features("random")
    parts = [part for _, part in search(queries, bank, 2, blocks=SMALL)]
    assert parts == [slice(0, 7), slice(7, 14)]


@pytest.mark.parametrize("shape", [(4, 1), (3, 2, 7), (2, 64), (5, 769)])
def test_sums_do_not_depend_on_what_is_beside_them(shape):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1)).double()
    sums = _search._sum(values.clone())
    for index in np.ndindex(*shape[:-1]):
        assert float(sums[index]) == pytest.approx(math.fsum(values[index].tolist()), rel=1e-12)
        assert torch.equal(_search._sum(values[index][None].clone())[0], sums[index])


@pytest.mark.parametrize("num_columns", [1, 15, 16, 50])
def test_scores_above_a_floor_are_found_by_query(num_columns):
    scores = torch.randn(6, num_columns, generator=torch.Generator().manual_seed(2))
    floor = torch.tensor([0.0, -torch.inf, 9.0, 0.5, -1.0, float(scores[5, 0])])
    query, column, score = _search._above(scores, floor)
    assert torch.equal(query, query.sort().values)
    expected = {(q, c) for q in range(6) for c in range(num_columns) if scores[q, c] > floor[q]}
    assert set(zip(query.tolist(), column.tolist(), strict=True)) == expected
    assert len(query) == len(expected)
    assert torch.equal(score, scores[query, column])


def test_features_that_are_not_finite_are_counted():
    queries, bank = features("random")
    broken = bank.clone()
    broken[4, 2], broken[9, 0], broken[9, 1] = torch.nan, torch.inf, -torch.inf
    with pytest.raises(NumericsError, match="2 of 170 training features are not finite"):
        search_all(queries, broken, 3)
    with pytest.raises(NumericsError, match="2 of 170 test features are not finite"):
        search_all(broken, queries, 3)


@pytest.mark.parametrize(
    ("avx512", "amx", "expected"), [(False, False, "fp32"), (True, False, "bf16"), (False, True, "bf16")]
)
def test_auto_takes_bf16_where_the_processor_has_it(monkeypatch, avx512, amx, expected):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert resolve_method("auto", torch.device("cpu")) == expected
    assert resolve_method("fp32", torch.device("cpu")) == "fp32"
    assert resolve_method("bf16", torch.device("cpu")) == "bf16"


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_auto_takes_bf16_on_gpus_since_ampere(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert resolve_method("auto", torch.device("cuda")) == expected


SHARDED = [("random", 6), ("zeros", 90), ("collapsed but for rounding", 3)]


def one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    found: dict[str, Tensor | str] = {}
    for kind, k in SHARDED:
        parts = list(search(*features(kind), k, method="bf16", sharded=True, blocks=SMALL))
        for name in Neighbours._fields:
            found[f"{kind} {name}"] = torch.cat([getattr(part, name) for part, _ in parts])
    queries, bank = features("random")
    found["one row"] = next(search(queries, bank[:1], 1, sharded=True))[0].rows
    bank[-1] = torch.nan  # in the second process's slice alone
    try:
        next(search(queries, bank, 3, sharded=True))
    except NumericsError as error:
        found["error"] = error.message
    torch.save(found, f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.distributed
def test_two_processes_equal_one(tmp_path: Path) -> None:
    mp.spawn(one_rank, args=(str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    for rank in ranks:
        for kind, k in SHARDED:
            alone = search_all(*features(kind), k, method="fp32")
            assert torch.equal(rank[f"{kind} rows"], alone.rows), kind
            assert torch.equal(rank[f"{kind} similarity"], alone.similarity), kind
            assert torch.equal(rank[f"{kind} rechecked"], ranks[0][f"{kind} rechecked"]), kind
        assert rank["one row"].tolist() == [[0]] * 11
        assert rank["error"] == "1 of 170 training features are not finite"
