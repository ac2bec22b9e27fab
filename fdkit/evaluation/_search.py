"""Exact nearest neighbours by cosine similarity, with most of the multiplying done in the precision that is fastest.

What is found is defined without a matrix product: the similarity of a pair is its dot product in float64, summed in a
fixed order, over the two lengths, rounded to float32; rows rank by similarity, then by number. Each of those operations
is correctly rounded, so no block, device or number of processes changes a bit of the answer. A matrix product in bf16
or fp32 only proposes candidates, more than k a query. Its error has a bound: rounded vectors lie a measured distance
from the true ones (Cauchy-Schwarz), and a sum of D products is off by at most a multiple of D. If by this bound even
the best row that is no candidate falls short of the k-th similarity, the neighbours are proven. Queries where it might
not are searched again in higher precision, until it does. Products are taken with rows minus a common centre, which
moves all scores of a query alike: features that point one way lie close to it, so the error is small where they are.
Nor is the fixed order followed where any other must round to the same float32, which is nearly everywhere.
Sources: Higham 2002 (Accuracy and stability of numerical algorithms), section 3.1: the bound on a sum; Ziv 1991 (Fast
evaluation of elementary mathematical functions with correctly rounded last bit): more work only where rounding asks it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fdkit.errors import ConfigError, NumericsError

Method = Literal["auto", "fp32", "bf16"]

FINER = {torch.bfloat16: torch.float32, torch.float32: torch.float64, torch.float64: torch.float64}
SHORTEST = 1e-12
"""Shorter vectors count as this long, as in torch's normalize, so a zero vector has similarity 0 to all."""
LONGEST_IN_FP32 = 1e30
"""Longer vectors are scaled in float64, where the length cannot overflow."""
CENTRED_ON = 1024
"""Rows, evenly spread, whose mean is the centre; any centre is right, a good one leaves less doubt."""
EXACT_ERROR = 64 * torch.finfo(torch.float64).eps
"""More than a similarity in float64 can be off."""
NUM_SPARE = 64
"""Candidates a query beyond k, or half as many beyond 1.5 k, so that few queries are searched twice."""
REACHES = 32
"""Parts in which queries' further candidates are compared; the queries of one have about as many."""
GROUP = 8
"""Scores looked at through their maximum before they are looked at one by one."""


class Blocks(NamedTuple):
    """How much is worked on at a time, which bounds the memory."""

    queries: int
    """Queries searched together."""
    bank: int
    """Bank rows multiplied with them at a time."""
    numbers: int
    """float64 numbers of exact work at a time."""


CPU_BLOCKS = Blocks(queries=2048, bank=4096, numbers=2**18)
GPU_BLOCKS = Blocks(queries=8192, bank=65536, numbers=2**25)


def default_blocks(device: torch.device) -> Blocks:
    """Blocks that stay near the cache of a CPU, and fill a GPU with 2 GB of scores."""
    return CPU_BLOCKS if device.type == "cpu" else GPU_BLOCKS


class Neighbours(NamedTuple):
    """The k nearest rows of Q queries."""

    similarity: Tensor
    """(Q, k) float32 cosines, descending."""
    rows: Tensor
    """(Q, k) int64; of equally similar rows the lower comes first."""
    rechecked: Tensor
    """(Q,) bool: the first search left a doubt, which another in higher precision settled."""


class Vectors(NamedTuple):
    """Features and their lengths."""

    values: Tensor
    """(N, D) float32; may be mapped from a file, and is only read a block at a time."""
    lengths: Tensor
    """(N,) float64, at least SHORTEST."""

    def at(self, rows: Tensor | slice) -> "Vectors":
        """Some of them."""
        return Vectors(self.values[rows], self.lengths[rows])

    def unit(self, dtype: torch.dtype) -> Tensor:
        """The vectors at length 1, (N, D) in float32 or float64; off by less than 4 epsilons of the dtype."""
        work = torch.float64 if bool((self.lengths > LONGEST_IN_FP32).any()) else dtype
        return (self.values.to(work) / self.lengths.to(work)[:, None]).to(dtype)


@torch.no_grad()
def search(
    queries: Tensor,
    bank: Tensor,
    k: int,
    *,
    method: Method = "auto",
    sharded: bool = False,
    blocks: Blocks | None = None,
) -> Iterator[tuple[Neighbours, slice]]:
    """The k rows of bank (N, D) most similar to each of queries (Q, D), and which queries, a block at a time.

    method: where candidates come from, see `resolve_method`; it changes no bit of what is found. sharded: the
    processes of the default group share the work; each reads its own slice of the bank. All of them call this
    together, with the same arguments, and all get the whole answer.
    Raises ConfigError if k exceeds N, NumericsError if a feature is not finite.
    """
    if k > len(bank):
        raise ConfigError(
            f"k is {k}, but there are only {len(bank)} training images to be neighbours",
            f"ask for --k {len(bank)} or less",
        )
    blocks = blocks or default_blocks(bank.device)
    first, last = _own_slice(len(bank)) if sharded else (0, len(bank))
    exact = _Exact(bank, blocks)
    own = _measured(bank[first:last], "training", exact, sharded=sharded)
    asked = _measured(queries, "test", exact, sharded=False)
    searcher = _Searcher(own, min(k, last - first), exact, blocks)
    dtype = torch.bfloat16 if resolve_method(method, bank.device) == "bf16" else torch.float32
    for start in range(0, len(queries), blocks.queries):
        part = slice(start, start + blocks.queries)
        found = searcher.nearest(asked.at(part), dtype, k + max(NUM_SPARE, k // 2 + NUM_SPARE // 2))
        if sharded:
            found = _merged(found._replace(rows=found.rows + first), k, len(bank))
        yield found, part


def search_all(
    queries: Tensor, bank: Tensor, k: int, *, method: Method = "auto", blocks: Blocks | None = None
) -> Neighbours:
    """The k rows of bank (N, D) most similar to each of queries (Q, D), Q at least 1; raises as `search` does."""
    parts = [found for found, _ in search(queries, bank, k, method=method, blocks=blocks)]
    return Neighbours(*(torch.cat(column) for column in zip(*parts, strict=True)))


def resolve_method(method: Method, device: torch.device) -> Literal["fp32", "bf16"]:
    """The precision candidates come from; "auto" is bf16 where the hardware multiplies bf16 matrices itself.

    That is a CUDA device of compute capability 8 or more, or a CPU with AVX512-BF16 or AMX. Elsewhere bf16 finds
    the same and is slower.
    """
    if method != "auto":
        return method
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if native else "fp32"


class _Searcher:
    """Searches one bank."""

    def __init__(self, bank: Vectors, k: int, exact: "_Exact", blocks: Blocks) -> None:
        self.bank = bank
        self.k = k
        self.exact = exact
        self.blocks = blocks
        step = max(1, len(bank.lengths) // CENTRED_ON)
        self.centre = bank.at(slice(None, None, step)).unit(torch.float64).mean(dim=0).float()
        self._extents: dict[torch.dtype, tuple[float, float]] = {}

    def nearest(self, queries: Vectors, dtype: torch.dtype, num_candidates: int) -> Neighbours:
        """The nearest rows, proven; candidates come from a matrix product in dtype, or a finer one where in doubt."""
        num_rows = len(self.bank.lengths)
        if num_rows == 0:
            return _nothing(len(queries.lengths), self.bank.values)
        count = min(num_candidates, num_rows)
        scores, rows = self._candidates(_rounded(queries, dtype), count)
        highest = self._upper_bound(queries, scores, dtype)
        similarity, rows = self._chosen(queries, highest, rows, with_first=dtype == torch.float64)
        doubt = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        if count < num_rows:
            last, level = similarity[:, -1], highest[:, -1]
            doubt = level >= last
            if dtype == torch.float64:
                # The first k rows were compared: another cannot displace one of them that it only equals.
                doubt &= (level > last) | (rows[:, -1] >= self.k)
        if doubt.any():
            # Where float64 leaves a doubt the rows are as good as equal: more of them are compared exactly.
            more = count if dtype != torch.float64 else 8 * count
            for again in doubt.nonzero()[:, 0].split(max(1, self.blocks.numbers // more)):
                found = self.nearest(queries.at(again), FINER[dtype], more)
                similarity[again], rows[again] = found.similarity, found.rows
        return Neighbours(similarity, rows, doubt)

    def _chosen(
        self, queries: Vectors, highest: Tensor, rows: Tensor, *, with_first: bool
    ) -> tuple[Tensor, Tensor]:
        """The nearest among candidates, rows (Q, count) that `highest` bounds, and how similar; both (Q, k).

        with_first: the first k rows of the bank are candidates too.
        """
        k = self.k
        exact = torch.full_like(highest, -torch.inf)
        exact[:, :k] = self._similarity(queries, rows[:, :k])
        # Any k rows bound the k-th similarity from below, and few of the other candidates can reach that.
        reaching = (highest >= exact[:, :k].amin(dim=1, keepdim=True)).sum(dim=1)
        for alike in reaching.argsort().chunk(REACHES):
            reached = slice(k, int(reaching[alike[-1]]))
            if rows[alike, reached].numel() > 0:
                exact[alike, reached] = self._similarity(queries.at(alike), rows[alike, reached])
        if with_first:
            first = torch.arange(k, device=rows.device).expand(len(rows), k)
            exact = torch.cat(
                [self._similarity(queries, first), exact.masked_fill_(rows < k, -torch.inf)], dim=1
            )
            rows = torch.cat([first, rows], dim=1)
        return _ranked(exact, rows, k)

    def _candidates(self, queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The highest products of each query with rows of the bank, descending, and the rows; both (Q, count)."""
        first = max(self.blocks.bank, count)
        best, rows = self._products(queries, slice(0, first)).topk(count, dim=1, sorted=False)
        for start in range(first, len(self.bank.lengths), self.blocks.bank):
            scores = self._products(queries, slice(start, start + self.blocks.bank))
            query, column, score = _above(scores, best.amin(dim=1))
            if len(query) > 0:
                best, rows = _joined(best, rows, query, column + start, score)
        best, order = best.sort(dim=1, descending=True)
        return best, rows.gather(1, order)

    def _products(self, queries: Tensor, rows: slice) -> Tensor:
        """Products of queries (Q, D) with rows of the bank at length 1, less the centre, in the queries' dtype."""
        part = _rounded(self.bank.at(rows), queries.dtype, self.centre)
        with _in_own_precision(queries.device):
            if queries.is_cuda and queries.dtype == torch.bfloat16:
                return torch.mm(queries, part.T, out_dtype=torch.float32)
            return queries @ part.T

    def _upper_bound(self, queries: Vectors, scores: Tensor, dtype: torch.dtype) -> Tensor:
        """What the similarities behind candidates' scores (Q, count) cannot exceed, float32.

        Nor can those of rows with a lower score: the bound grows with the score.
        """
        highest = scores.double()
        if scores.dtype == torch.bfloat16:
            highest += highest.abs() * torch.finfo(torch.bfloat16).eps / 2
        of_queries, _ = _extent(queries, dtype)
        of_bank, radius = self._extent(dtype)
        rounding = of_queries * radius + of_bank * (1 + of_queries)
        # Twice Higham's bound: a matrix unit may cut sums off instead of rounding them.
        summing = 2 * queries.values.shape[1] * torch.finfo(_summed_in(dtype)).eps * (radius + of_bank)
        common = _sum(queries.unit(torch.float64) * self.centre)
        return (highest + (rounding + summing + EXACT_ERROR) + common[:, None]).float()

    def _extent(self, dtype: torch.dtype) -> tuple[float, float]:
        """`_extent` of the whole bank."""
        if dtype not in self._extents:
            size = len(self.exact.products)
            starts = range(0, len(self.bank.lengths), size)
            parts = [_extent(self.bank.at(slice(i, i + size)), dtype, self.centre) for i in starts]
            self._extents[dtype] = (max(part[0] for part in parts), max(part[1] for part in parts))
        return self._extents[dtype]

    def _similarity(self, queries: Vectors, rows: Tensor) -> Tensor:
        """Cosines of each query with its own rows of the bank (Q, n), float32 (Q, n), as if summed in order."""
        rough = self._cosines(queries, rows, in_order=False)
        # Twice what two orders of summing can differ by. Where both ends round alike, so does the ordered sum.
        error = 2 * self.bank.values.shape[1] * torch.finfo(torch.float64).eps
        similarity = (rough - error).float()
        query, place = (similarity != (rough + error).float()).nonzero(as_tuple=True)
        if len(query) > 0:
            pairs = queries.at(query), rows[query, place][:, None]
            similarity[query, place] = self._cosines(*pairs, in_order=True)[:, 0].float()
        return similarity

    def _cosines(self, queries: Vectors, rows: Tensor, *, in_order: bool) -> Tensor:
        """Their float64 cosines (Q, n), by ordered sums or by those of the fastest routine."""
        dots = self.exact.dots(queries.values, self.bank.values, rows, in_order=in_order)
        return dots.div_(queries.lengths[:, None] * self.bank.lengths[rows])


class _Exact:
    """Sums of exact products in an order of their own, in memory taken once: fresh pages cost more than the sums."""

    def __init__(self, like: Tensor, blocks: Blocks) -> None:
        shape = (max(1, blocks.numbers // like.shape[1]), like.shape[1])
        self.gathered = like.new_empty(shape)
        self.products = like.new_empty(shape, dtype=torch.float64)

    def lengths(self, values: Tensor) -> Tensor:
        """The length of each row of values (N, D), (N,) float64."""
        squares = values.new_empty(len(values), dtype=torch.float64)
        for start in range(0, len(values), len(self.products)):
            part = values[start : start + len(self.products)]
            work = self.products[: len(part)].copy_(part)
            squares[start : start + len(part)] = _sum(work.mul_(work))
        return squares.sqrt_()

    def dots(self, queries: Tensor, bank: Tensor, rows: Tensor, *, in_order: bool) -> Tensor:
        """Dot products of each of queries (Q, D) with its own rows of the bank (Q, n), float64 (Q, n)."""
        dots = torch.empty(rows.shape, dtype=torch.float64, device=rows.device)
        num_columns = max(1, min(rows.shape[1], len(self.products)))
        num_queries = len(self.products) // num_columns
        for start in range(0, len(rows), num_queries):
            part = slice(start, start + num_queries)
            factors = queries[part, None].double()
            for column in range(0, rows.shape[1], num_columns):
                chosen = rows[part, column : column + num_columns]
                size = chosen.numel()
                torch.index_select(bank, 0, chosen.flatten(), out=self.gathered[:size])
                work = self.products[:size].copy_(self.gathered[:size]).view(*chosen.shape, -1)
                sums = _sum(work.mul_(factors)) if in_order else torch.bmm(work, factors.mT)[..., 0]
                dots[part, column : column + num_columns] = sums
        return dots


def _measured(values: Tensor, name: str, exact: "_Exact", *, sharded: bool) -> Vectors:
    """The vectors with their lengths. Raises NumericsError, in all processes, if one of any is not finite."""
    lengths = exact.lengths(values)
    counts = torch.stack([(~lengths.isfinite()).sum(), torch.tensor(len(lengths), device=lengths.device)])
    if sharded:
        counts = _for_group(counts)
        dist.all_reduce(counts)
    bad, total = counts.tolist()
    if bad > 0:
        raise NumericsError(
            f"{bad} of {total} {name} features are not finite",
            "the weights may be damaged; if --precision is bf16, try fp32",
        )
    return Vectors(values, lengths.clamp_(min=SHORTEST))


def _sum(values: Tensor) -> Tensor:
    """The sum over the last dimension, halves upon halves, so that its bits do not depend on shape or device.

    values: float64; overwritten.
    """
    while (width := values.shape[-1]) > 1:
        half = width // 2
        values[..., :half] += values[..., width - half :]
        values = values[..., : width - half]
    return values[..., 0]


def _rounded(vectors: Vectors, dtype: torch.dtype, centre: Tensor | None = None) -> Tensor:
    """The vectors at length 1, less the centre, rounded to dtype."""
    return _centred(vectors, dtype, centre).to(dtype)


def _extent(vectors: Vectors, dtype: torch.dtype, centre: Tensor | None = None) -> tuple[float, float]:
    """Bounds of how far `_rounded` vectors lie from the exact ones, and of how long those are."""
    exact = _centred(vectors, dtype, centre)
    error = 8 * torch.finfo(exact.dtype).eps
    # The difference of a float32 and its bf16 rounding is a float32; only the norm of it is inexact.
    distance, length = (
        float(torch.linalg.vector_norm(each, dim=1).max()) for each in (exact - exact.to(dtype), exact)
    )
    return 1.01 * distance + error, 1.01 * length + error


def _centred(vectors: Vectors, dtype: torch.dtype, centre: Tensor | None) -> Tensor:
    """The vectors at length 1, less the centre, in the type that products of dtype are summed in."""
    unit = vectors.unit(_summed_in(dtype))
    return unit if centre is None else unit.sub_(centre)


def _summed_in(dtype: torch.dtype) -> torch.dtype:
    """What matrix products of a dtype are accumulated in."""
    return torch.float32 if dtype == torch.bfloat16 else dtype


def _above(scores: Tensor, floor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, column and value of the scores (Q, B) above their query's floor (Q,), by query; each (P,)."""
    num_columns = scores.shape[1]
    missing = -num_columns % GROUP
    if missing:
        scores = torch.nn.functional.pad(scores, (0, missing), value=-torch.inf)
    # Column j belongs to group j % num_groups: reducing over the far dimension keeps memory order.
    groups = scores.unflatten(1, (GROUP, -1))
    query, group = (groups.amax(dim=1) > floor[:, None]).nonzero(as_tuple=True)
    members = groups[query, :, group]
    pair, member = (members > floor[query][:, None]).nonzero(as_tuple=True)
    return query[pair], member * groups.shape[2] + group[pair], members[pair, member]


def _joined(
    best: Tensor, rows: Tensor, query: Tensor, new_rows: Tensor, scores: Tensor
) -> tuple[Tensor, Tensor]:
    """The best candidates (Q, count) and their rows after more were found: (P,) each, in the order of queries."""
    counts = query.bincount(minlength=len(best))
    place = torch.arange(len(query), device=query.device) - (counts.cumsum(0) - counts)[query]
    shape = (len(best), int(counts.max()))
    values, numbers = best.new_full(shape, -torch.inf), rows.new_zeros(shape)
    values[query, place], numbers[query, place] = scores, new_rows
    best, order = torch.cat([best, values], dim=1).topk(best.shape[1], dim=1, sorted=False)
    return best, torch.cat([rows, numbers], dim=1).gather(1, order)


def _ranked(similarity: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k most similar, descending, equally similar ones by row; both (Q, k)."""
    rows, order = rows.sort(dim=1)
    similarity, order = similarity.gather(1, order).sort(dim=1, descending=True, stable=True)
    return similarity[:, :k], rows.gather(1, order[:, :k])


@contextmanager
def _in_own_precision(device: torch.device) -> Iterator[None]:
    """Matrix products in the precision of their operands, whatever the caller allows elsewhere."""
    settings = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value


def _nothing(num_queries: int, like: Tensor) -> Neighbours:
    """No neighbours: what a process finds whose slice of the bank is empty."""
    empty = like.new_empty(num_queries, 0, dtype=torch.float32)
    return Neighbours(empty, empty.long(), like.new_zeros(num_queries, dtype=torch.bool))


def _own_slice(num_rows: int) -> tuple[int, int]:
    """The rows this process searches, from and to."""
    rank, size = dist.get_rank(), dist.get_world_size()
    return num_rows * rank // size, num_rows * (rank + 1) // size


def _merged(found: Neighbours, k: int, num_rows: int) -> Neighbours:
    """The k nearest among those that all processes found in their slices."""
    missing = (0, k - found.rows.shape[1])
    similarity = torch.nn.functional.pad(found.similarity, missing, value=-torch.inf)
    rows = torch.nn.functional.pad(found.rows, missing, value=num_rows)
    similarity, rows = _ranked(torch.cat(_gathered(similarity), 1), torch.cat(_gathered(rows), 1), k)
    return Neighbours(similarity, rows, torch.stack(_gathered(found.rechecked.int())).any(dim=0))


def _gathered(values: Tensor) -> list[Tensor]:
    """The values of every process, by rank, on the device of this one's."""
    sent = _for_group(values).contiguous()
    parts = [torch.empty_like(sent) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, sent)
    return [part.to(values.device) for part in parts]


def _for_group(values: Tensor) -> Tensor:
    """The values where the processes can exchange them: nccl knows CUDA devices alone."""
    return values.cuda() if dist.get_backend() == "nccl" else values
