"""Which vectors a memory bank keeps, and the search in it: k-center coresets and exact nearest neighbours.

Distances are Euclidean, float32 products of centred vectors, and float64 where float32 has lost too many digits.
"""

import math
import time
from contextlib import contextmanager

import torch

from zoo.nn.fast import candidates, has_bfloat16

TILE = 2048  # vectors a side of one product: 16 MB; blocks of 32 MB and more would be mapped afresh each time
POOL = 2048  # farthest points that are brought up to date together
CLOSE = 1e-3  # squared distance over squared norm below which float64 takes over


@contextmanager
def _full_precision(device):
    """Float32 products as such, whatever autocast and torch.set_float32_matmul_precision say."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def _products(a, b):
    """|b|^2 - 2ab, the squared distance less |a|^2; (A, D), (B, D) -> (A, B)."""
    with _full_precision(a.device):
        return torch.addmm(b.square().sum(1), a, b.T, alpha=-2)


def _centre(vectors):
    """About the mean (D,): taken away, it keeps |a|^2 + |b|^2 - 2ab from cancelling."""
    return vectors[:: max(1, len(vectors) // TILE)].float().mean(0)


def _search(rows, bank, centre, k):
    """The k nearest in the bank (M, D) of centred rows (q, D): squared distances (q, k) and indices (q, k)."""
    square, index, close = _scan(rows, bank, centre, k)
    close = close.nonzero().flatten()
    if len(close):
        again, index[close], _ = _scan(rows[close].double(), bank, centre, k)
        square[close] = again.float()
    return square, index


def _scan(rows, bank, centre, k):
    """What `_search` gives, in the precision of the rows alone, and which rows (q,) need a better one."""
    value, index = rows.new_empty(len(rows), 0), torch.empty(len(rows), 0, dtype=torch.int64, device=rows.device)
    for first in range(0, len(bank), TILE):
        tile = (bank[first : first + TILE].float() - centre).to(rows)
        value, index = _best(value, index, _products(rows, tile), first, k)
    norms = rows.square().sum(1, keepdim=True)  # (q, 1)
    square = value + norms
    close = square[:, 0] < CLOSE * norms[:, 0]
    if rows.dtype == torch.float64:
        return torch.where(square < 1e-12 * norms, 0, square), index, torch.zeros_like(close)
    return square, index, close


def _best(value, index, products, first, k):
    """The k smallest (q, k) of `value` (q, m), found at `index`, and of the products (q, T) of a tile from `first`."""
    if k > 1 or not value.numel():
        near, where = products.topk(min(k, products.shape[1]), largest=False)
        value, best = torch.cat([value, near], 1).sort(dim=1, stable=True)
        return value[:, :k], torch.cat([index, where + first], 1).gather(1, best[:, :k])
    if products.device.type != "cpu":  # a GPU finds both in one pass, and the host would wait for who wins
        near, where = products.min(1, keepdim=True)  # (q, 1)
        wins = near < value
        return near.where(wins, value), (where + first).where(wins, index)
    near = products.amin(1)  # the place of a minimum costs far more than its value: ask only where it wins
    wins = (near < value[:, 0]).nonzero().flatten()
    value[wins, 0] = near[wins]
    index[wins, 0] = first + products[wins].argmin(1)
    return value, index


class _Traversal:
    """Farthest-first traversal that computes only the distances that decide.

    `bound[i]` is the squared distance of point i to the first `seen[i]` picks, an upper bound of that to all of them. A
    point that has seen all picks and is not below any other's bound is what the plain algorithm would take.
    """

    def __init__(self, vectors, start, capacity):
        n, d = vectors.shape
        self.vectors = vectors
        self.centre = _centre(vectors)  # (D,)
        origin = vectors[start].float()
        self.bound = torch.cat([(part.float() - origin).square_().sum(1) for part in vectors.split(TILE)])  # (N,)
        if not (16 * self.bound.max()).isfinite():
            raise ValueError("the vectors hold values that are not finite, or too large for float32 distances")
        self.seen = torch.ones(n, dtype=torch.int64, device=vectors.device)
        self.index = torch.empty(capacity, dtype=torch.int64, device=vectors.device)
        self.picks = torch.empty(capacity, d, device=vectors.device)
        self.count = 0

    def rows(self, index):
        return self.vectors[index].float() - self.centre  # (b, D)

    def take(self, index):
        """Choose the points `index` (b,), in this order."""
        end = self.count + len(index)
        self.index[self.count : end] = index
        self.picks[self.count : end] = self.vectors[index]
        self.bound[index] = -1  # below any distance: never taken twice
        self.count = end

    def farthest(self):
        """Points (m,), their true squared distances (m,), what no other point exceeds; m = 0 once all are taken."""
        while True:
            bound, pool = self.bound.topk(min(POOL, len(self.bound)))
            floor = bound[-1].clamp(min=0)
            stale = pool[(self.seen[pool] < self.count) & (bound >= floor)]
            stale = stale[self.seen[stale].argsort()]  # those that lack as many picks go together
            for part in stale.split(POOL // 4) if len(stale) else ():
                new = self.picks[int(self.seen[part].min()) : self.count]
                square, _ = _search(self.rows(part), new, self.centre, 1)  # (b, 1)
                self.bound[part] = self.bound[part].minimum(square[:, 0])
                self.seen[part] = self.count
            far = pool[self.bound[pool] >= floor]
            if len(far) or self.count == len(self.bound):
                return far, self.bound[far], floor

    def run(self, k):
        while self.count < k:
            far, square, floor = self.farthest()
            if not square.max():  # only copies of taken points are left
                self.take((self.bound == 0).nonzero().flatten()[: k - self.count])
            else:
                self.take(far[_greedy(self.rows(far), square, floor, k - self.count)])

    def radius(self):
        square = self.farthest()[1]
        return math.sqrt(square.max()) if len(square) else 0.0


def _greedy(rows, square, floor, limit):
    """The plain algorithm inside a pool, while its farthest point is not below the floor; (m, D), (m,) -> positions."""
    norms = rows.square().sum(1)
    if floor < CLOSE * norms.max():
        rows, norms, square = rows.double(), norms.double(), square.double()
    gram = _products(rows, rows).add_(norms[:, None])  # (m, m)
    # Each pick waits for the one before. The host does that in a microsecond, where a GPU would have to be asked twice:
    # so it is asked once a pool, for 16 MB.
    gram, square, floor = gram.cpu(), square.cpu(), float(floor)
    picks = []
    while len(picks) < limit:
        value, best = square.max(0)
        if value < floor or value <= 0:
            break
        picks.append(int(best))
        square = square.minimum(gram[picks[-1]])
        square[picks[-1]] = -1
    return torch.tensor(picks, device=rows.device)


@torch.no_grad()
def greedy_coreset(vectors, k, start=None, seed=0, project_to=None):
    """Farthest-first traversal: k vectors, each the farthest from those before it, whose balls cover all others.

    Up to float32 rounding the picks are those of the plain algorithm, which passes over all vectors for each pick; here
    a distance is computed only once it may be the largest. The radius is at most twice the smallest possible.

    Args:
        vectors: (N, D), any floating dtype and device; never copied as a whole.
        k: size of the coreset; from N on, all are taken. Copies of a taken vector come last.
        start: index of the first pick; by default the farthest vector in a random direction, which does not depend on
            the order of the vectors. `seed` draws the direction, and the projection.
        project_to: choose in a random Gaussian projection to that many dimensions (128 in the official PatchCore).
            Its radius was 1.01, 1.01 and 1.08 times the exact one's on normal, clustered and ReLU-like data of 1,536
            dimensions (tests/bench/coreset_speed.py), and it was no faster.

    Returns indices (k,) int64 in the order of picking, and the covering radius in the original space, a float. Raises
    ValueError for no vectors, k below 1, a start that is no index, and values that are not finite.

    Sources: Gonzalez, "Clustering to minimize the maximum intercluster distance", 1985; as a coreset Sener and
    Savarese, ICLR 2018; for memory banks, projected, Roth et al., CVPR 2022, section 3.2.
    """
    n, d = vectors.shape
    if n < 1 or k < 1 or not 0 <= (start or 0) < n:
        raise ValueError(f"need k >= 1 and a start among the {n} vectors, not k = {k} and start = {start}")
    generator = torch.Generator().manual_seed(seed)
    if start is None:
        direction = torch.randn(d, 1, generator=generator).to(vectors.device)
        with _full_precision(vectors.device):
            start = int(torch.cat([part.float() @ direction for part in vectors.split(TILE)]).argmax())
    traversal = _Traversal(vectors, start, min(k, n))
    if project_to is None:
        traversal.take(torch.tensor([start], device=vectors.device))
        traversal.run(min(k, n))
    else:
        matrix = torch.randn(d, project_to, generator=generator).to(vectors.device) / math.sqrt(project_to)
        with _full_precision(vectors.device):
            projected = torch.cat([part.float() @ matrix for part in vectors.split(TILE)])  # (N, project_to)
        traversal.take(greedy_coreset(projected, k, start)[0])
    return traversal.index, traversal.radius()


class StreamingCoreset:
    """A k-center coreset of a stream that is too long to hold, in memory that does not grow with it.

    All vectors are candidates until the working set overflows. Then the greedy algorithm reduces them to half (not
    below `size`), and tau becomes its covering radius. From then on a vector within tau of a candidate is dropped; the
    next overflow reduces again. At the end the greedy algorithm picks `size` of the candidates: exactly
    `greedy_coreset` of the whole stream if it fits into the working set. Arrivals are worked off in chunks of 4,096,
    however `add` gets them.

    Guarantee: each candidate carries how far a vector that it stands for may be: tau for dropped ones, and for an
    absorbed candidate the distance to it plus what it carried. So no vector of the stream is farther from the coreset
    than `radius_bound`, the largest of these, which is at most twice the smallest possible radius plus what the
    candidates carried before the last step. It is a worst case: over 18.7 million patches of SEM images the true radius
    was a fifth of it (tests/bench/scale_radius.py, where it is compared with the greedy algorithm on a random subset).

    At most `working_set` candidates are held, besides one chunk; the fewer, the faster and the coarser. `seed` draws
    the greedy starts. Raises ValueError unless 1 <= size <= working_set.

    Source: Charikar, Chekuri, Feder and Motwani, "Incremental clustering and dynamic information retrieval", 2004 (a
    threshold that grows with each overflow; theirs doubles); for the greedy steps see `greedy_coreset`.
    """

    CHUNK = 2 * TILE
    NUMBERS = ("size", "working_set", "seed", "count", "pending", "tau")
    TENSORS = ("vectors", "sources", "reach", "hits")

    def __init__(self, size, working_set, seed=0):
        if not 1 <= size <= working_set:
            raise ValueError(f"need 1 <= size <= working_set, not size = {size} and working_set = {working_set}")
        self.size, self.working_set, self.seed = size, working_set, seed
        self.count, self.pending = 0, 0  # candidates, and arrivals that are stored behind them
        self.tau = -1.0  # below 0: nothing is dropped
        self.vectors = None

    def _hold(self, *tensors):
        """Store vectors, sources, reach (how far a vector stood for may be) and hits, with room for a chunk more."""
        rows = self.working_set + self.CHUNK
        for name, x in zip(self.TENSORS, tensors, strict=True):
            setattr(self, name, torch.cat([x, x.new_zeros(max(0, rows - len(x)), *x.shape[1:])]))

    def _held(self):
        return [getattr(self, name)[: self.count + self.pending] for name in self.TENSORS]

    @torch.no_grad()
    def add(self, vectors, source):
        """Take in `vectors` (B, D) that came from `source` (B, T) int64, for example image, row and column."""
        if len(vectors) != len(source):
            raise ValueError(f"{len(vectors)} vectors, but {len(source)} sources")
        if self.vectors is None:
            none = vectors[:0].float()
            self._hold(none, source[:0].to(none.device), none.sum(1), none.sum(1).long())
        self._fit()
        while len(vectors):
            end, room = self.count + self.pending, self.CHUNK - self.pending
            self.pending += len(vectors[:room])
            self.vectors[end : self.count + self.pending] = vectors[:room]
            self.sources[end : self.count + self.pending] = source[:room]
            vectors, source = vectors[room:], source[room:]
            if self.pending == self.CHUNK:
                self._sieve()
                self._fit()

    def _sieve(self):
        """Turn pending arrivals into candidates, except those within tau of another."""
        first, last = self.count, self.count + self.pending
        if self.tau >= 0 and self.pending:
            keep = first + self._uncovered(self.vectors[first:last])
            last = first + len(keep)
            self.vectors[first:last] = self.vectors[keep]
            self.sources[first:last] = self.sources[keep]
        self.reach[first:last] = 0
        self.hits[first:last] = 0
        self.count, self.pending = last, 0

    def _fit(self):
        if self.count > self.working_set:
            self._reduce(max(self.size, self.working_set // 2))

    def _uncovered(self, arrivals):
        """Which arrivals become candidates; (B, D) -> (b,). Candidates hit often come first: most rows leave early."""
        centre = _centre(self.vectors[: self.count])
        rows, limit = arrivals - centre, self.tau**2
        norms = rows.square().sum(1)
        if limit < CLOSE * norms.max():
            rows, norms = rows.double(), norms.double()
        alive = torch.arange(len(rows), device=rows.device)
        # A GPU is asked once a tile how many rows are left: to go on with all of them would cost many times as much.
        for first in range(0, self.count, TILE // 2):
            tile = self.vectors[first : min(first + TILE // 2, self.count)] - centre
            square = _products(rows[alive], tile.to(rows))  # (b, T)
            near = square.amin(1) + norms[alive] <= limit
            hit = first + square[near].argmin(1)
            self.hits.index_add_(0, hit, torch.ones_like(hit))
            alive = alive[~near]
            if not len(alive):
                return alive
        return alive[_greedy(rows[alive], torch.full_like(norms[alive], math.inf), limit, len(alive))]

    def _reduce(self, k):
        """Keep k candidates, which take over what the others stood for."""
        vectors, sources, reach, hits = self._held()
        index, radius = greedy_coreset(vectors, k, seed=self.seed)
        distance, owner = (x[:, 0] for x in nearest(vectors, vectors[index]))  # (M,), (M,)
        reach = torch.zeros_like(reach[index]).scatter_reduce_(0, owner, distance + reach.clamp(min=self.tau), "amax")
        hits = torch.zeros_like(hits[index]).index_add_(0, owner, hits)
        order = hits.argsort(descending=True, stable=True)
        index, self.count, self.tau = index[order], len(index), radius
        self._hold(vectors[index], sources[index], reach[order], hits[order])

    @torch.no_grad()
    def finish(self):
        """The coreset, after the last `add`: vectors (k, D) in float32, sources (k, T). Raises ValueError if empty."""
        if not self.count + self.pending:
            raise ValueError("no vectors were added")
        self._sieve()
        self._reduce(self.size)
        return self.vectors[: self.count].clone(), self.sources[: self.count].clone()

    @property
    def radius_bound(self):
        """No vector seen is farther from a candidate, after `finish` from the coreset; 0.1 % is for rounding."""
        return 1.001 * max(self.tau, float(self.reach[: self.count].max()) if self.count else 0.0)

    @torch.no_grad()
    def merge(self, other, shift=0):
        """Take over all candidates of `other`, from another part of the data; `other` stays as it is.

        `shift` (T,) or a number is added to its sources. The candidates of both may exceed the working set: they are
        reduced when the next vectors come, and `finish` chooses among all of them.
        """
        if other.vectors is None:
            return
        self.add(other.vectors[:0], other.sources[:0])  # makes room if this one is empty
        self._sieve()
        theirs = [x.to(self.vectors.device) for x in other._held()]
        theirs[1] = theirs[1] + torch.as_tensor(shift, device=self.vectors.device)
        pairs = [torch.cat(pair) for pair in zip(self._held(), theirs, strict=True)]
        self.count, self.tau = len(pairs[0]), max(self.tau, other.tau)
        self._hold(*pairs)

    def estimate_bytes(self, dimensions, parts=1):
        """At the peak, while the held vectors, of so many merged parts, are reduced to half and copied."""
        return (2 * parts * (self.working_set + self.CHUNK) + self.working_set // 2) * (4 * dimensions + 40)

    def estimate_seconds(self, count, dimensions, device):
        """For a stream of `count` vectors: products of tiles, timed here, times a number of them that was fitted.

        How many candidates an arrival meets depends on the data; the rule is that of synthetic SEM images (lite0's
        features, banks of 2,000 and 10,000), where fewer and fewer are met as tau grows.
        """
        tile, chunks = _tile_seconds(dimensions, device), count / self.CHUNK
        overflows = max(count / self.working_set, 1)
        met = 0.75 * min(self.working_set, count) / (TILE // 2) * min(0.2 + 1.5 / math.sqrt(overflows), 1)
        reductions = math.log2(overflows) + (overflows > 1)
        pairs = self.working_set**2 / 2 / (TILE * TILE // 2)
        last = min(0.75 * self.working_set, count) * min(self.size, count) / (TILE * TILE // 2)
        return tile * (chunks * (2 + 2 * met * (overflows > 1)) + 4 * (reductions * pairs + last))

    def state_dict(self):
        """Tensors and plain numbers from which `load_state_dict` goes on bit for bit."""
        numbers = {name: getattr(self, name) for name in self.NUMBERS}
        tensors = self._held() if self.vectors is not None else []
        return numbers | {name: x.clone() for name, x in zip(self.TENSORS, tensors, strict=False)}

    def load_state_dict(self, state):
        """Become the coreset that `state` was taken from; size, working set and seed included."""
        self.vectors = None
        for name in self.NUMBERS:
            setattr(self, name, state[name])
        if "vectors" in state:
            self._hold(*(state[name] for name in self.TENSORS))


def _tile_seconds(dimensions, device):
    """Median time of one product of tiles, as a sieve does it."""
    a, b = torch.randn(TILE, dimensions, device=device), torch.randn(TILE // 2, dimensions, device=device)
    times = []
    for _ in range(7):
        begin = time.perf_counter()
        float(_products(a, b).amin(1)[0])  # waits for the device
        times.append(time.perf_counter() - begin)
    return sorted(times)[3]


def estimate_search(queries, bank_size, dimensions, device):
    """Seconds that `nearest` takes for so many queries."""
    return 1.5 * _tile_seconds(dimensions, device) * queries * bank_size / (TILE * TILE // 2)


@torch.no_grad()
def nearest(queries, bank, k=1, fast=False):
    """The k nearest in `bank` (M, D) of each of `queries` (Q, D), exactly, in tiles of bounded size.

    Returns Euclidean distances (Q, k) float32, ascending, and indices (Q, k) int64. A product finds the neighbours; the
    distances then come from the differences, so that a copy is at 0. With `fast` the product is one of bfloat16, where
    the device computes in it: of vectors that are about as near another may be found. Raises ValueError unless
    1 <= k <= M.
    """
    if not 1 <= k <= len(bank):
        raise ValueError(f"k must be between 1 and the {len(bank)} vectors of the bank, not {k}")
    queries, centre = queries.float(), _centre(bank)
    if fast and has_bfloat16(queries.device):
        index = torch.cat([candidates(part - centre, bank, centre, k) for part in queries.split(TILE)])  # (Q, c)
    else:
        scans = [_scan(part - centre, bank, centre, k)[1:] for part in queries.split(TILE)]
        index, close = (torch.cat(parts) for parts in zip(*scans, strict=True))  # (Q, k), (Q,)
        close = close.nonzero().flatten()  # asked once for all: here alone the host waits for a GPU
        for some in close.split(TILE) if len(close) else ():
            index[some] = _scan((queries[some] - centre).double(), bank, centre, k)[1]
    distances, indices = [], []
    for part, found in zip(queries.split(TILE), index.split(TILE), strict=True):
        square = [(part - bank[column].float()).square_().sum(1) for column in found.T]
        distance, order = torch.stack(square, 1).sqrt_().sort(dim=1, stable=True)
        distances.append(distance[:, :k])
        indices.append(found.gather(1, order)[:, :k])
    return torch.cat(distances), torch.cat(indices)


@torch.no_grad()
def covering_radius(vectors, bank):
    """Largest distance from one of `vectors` (N, D) to its nearest in `bank` (M, D), a float.

    Exact, at a fraction of the cost of all distances: a vector is left as soon as it is nearer than the largest so far.
    """
    centre, radius = _centre(bank), 0.0
    for part in vectors.split(2 * TILE):
        rows = part.float() - centre
        norms, far = rows.square().sum(1), torch.arange(len(rows), device=rows.device)
        for tile in bank.split(TILE // 2):
            near = _products(rows[far], tile.float() - centre).amin(1) + norms[far]
            far = far[near > radius**2 - CLOSE * norms[far]]
            if not len(far):
                break
        else:
            radius = max(radius, float(nearest(part[far], bank)[0].max()))
    return radius
