"""K-center coresets and nearest neighbours against plain float64 references."""

import itertools

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from sklearn.neighbors import NearestNeighbors

from zoo.nn.coreset import StreamingCoreset, covering_radius, greedy_coreset, nearest


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """So many small operations would spend their time on waiting for the other thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def plain_greedy(vectors, k, start):
    """One pick a pass, from differences in float64."""
    x = vectors.numpy().astype(np.float64)
    indices, distance = [start], np.linalg.norm(x - x[start], axis=1)
    while len(indices) < k:
        indices.append(int(distance.argmax()))
        distance = np.minimum(distance, np.linalg.norm(x - x[indices[-1]], axis=1))
    return indices, distance.max()


def true_radius(vectors, bank):
    return cdist(vectors.double().numpy(), bank.double().numpy()).min(1).max()


def normal(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def clusters(n, d, spread):
    return spread * normal(20, d, 1)[torch.arange(n) % 20] + normal(n, d)


DATA = {
    "normal": normal(3000, 32),
    "wide": normal(1500, 200),
    "offset": normal(3000, 32) + 1000,
    "clusters": clusters(3000, 32, 5.0),
    "tight clusters": clusters(3000, 32, 100.0),
    "relu": (normal(3000, 8) @ normal(8, 64, 1) + 0.3 * normal(3000, 64, 2) + 1).relu(),
    "heavy tails": normal(3000, 32) / normal(3000, 1, 3).abs().clamp(min=0.01),
    "line": torch.linspace(0, 1, 3000)[:, None] ** 2,
    "half duplicates": normal(1500, 32).repeat(2, 1),
}


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("k", [1, 7, 300])
def test_radius_is_that_of_the_plain_algorithm(name, k):
    x = DATA[name]
    indices, radius = greedy_coreset(x, k, start=3)
    expected = plain_greedy(x, k, 3)[1]
    assert len(indices.unique()) == k and indices[0] == 3
    assert true_radius(x, x[indices]) <= 1.001 * expected
    assert radius == pytest.approx(true_radius(x, x[indices]), rel=1e-3)


@pytest.mark.parametrize("name", ["normal", "wide", "clusters", "relu"])
def test_same_picks_as_the_plain_algorithm(name):
    x = DATA[name]
    assert greedy_coreset(x, 200, start=5)[0].tolist() == plain_greedy(x, 200, 5)[0]


def test_all_vectors_and_more():
    x = normal(60, 4)
    for k in (60, 100):
        indices, radius = greedy_coreset(x, k)
        assert sorted(indices.tolist()) == list(range(60)) and radius == 0
    indices, radius = greedy_coreset(x[:1], 5)
    assert indices.tolist() == [0] and radius == 0


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_distinct_points_come_before_copies(offset):
    x = (normal(50, 16) + offset).repeat(60, 1)
    indices, radius = greedy_coreset(x, 50, start=0)
    assert len((indices % 50).unique()) == 50 and radius == 0
    indices, radius = greedy_coreset(x, 80, start=0)
    assert len((indices[:50] % 50).unique()) == 50 and len(indices.unique()) == 80 and radius == 0


def test_constant_data():
    indices, radius = greedy_coreset(torch.ones(5000, 8), 3000)
    assert len(indices.unique()) == 3000 and radius == 0


def test_two_approximation():
    for seed in range(20):
        x = normal(12, 2, seed)
        best = min(true_radius(x, x[list(chosen)]) for chosen in itertools.combinations(range(12), 3))
        assert greedy_coreset(x, 3, seed=seed)[1] <= 2 * best * (1 + 1e-5)


def test_seed_sets_the_start():
    x = DATA["normal"]
    starts = {int(greedy_coreset(x, 1, seed=seed)[0]) for seed in range(5)}
    assert len(starts) > 1
    assert torch.equal(greedy_coreset(x, 9, seed=2)[0], greedy_coreset(x, 9, seed=2)[0])


def test_lower_precision_and_autocast():
    x = DATA["normal"].half()
    expected = greedy_coreset(x.float(), 50, start=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = greedy_coreset(x, 50, start=0)
        projected = greedy_coreset(x, 50, start=0, project_to=16)
    assert torch.equal(found[0], expected[0]) and found[1] == pytest.approx(expected[1])
    assert torch.equal(projected[0], greedy_coreset(x, 50, start=0, project_to=16)[0])
    assert torch.get_float32_matmul_precision() == "highest"


def test_projection_measures_in_the_original_space():
    x = DATA["wide"]
    indices, radius = greedy_coreset(x, 50, start=0, project_to=64)
    assert radius == pytest.approx(true_radius(x, x[indices]), rel=1e-5)
    assert radius <= 1.2 * greedy_coreset(x, 50, start=0)[1]
    assert torch.equal(indices, greedy_coreset(x, 50, start=0, project_to=64)[0])


def test_picks_do_not_depend_on_the_order():
    x = DATA["normal"]
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    assert torch.equal(x[order][greedy_coreset(x[order], 50, seed=3)[0]], x[greedy_coreset(x, 50, seed=3)[0]])


@pytest.mark.parametrize("k, start", [(0, None), (3, -1), (3, 60)])
def test_wrong_arguments(k, start):
    with pytest.raises(ValueError):
        greedy_coreset(normal(60, 4), k, start)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_values_that_are_not_finite(value):
    x = normal(60, 4)
    x[7, 1] = value
    with pytest.raises(ValueError, match="finite"):
        greedy_coreset(x, 3)


STREAMS = {
    "iid": normal(40_000, 6),
    "sorted": normal(40_000, 6)[normal(40_000, 6)[:, 0].argsort()],
    "drift": normal(40_000, 6) + torch.linspace(0, 30, 40_000)[:, None],
    "offset": normal(40_000, 6) + 1000,
    "few distinct": normal(50, 6)[torch.arange(40_000) % 50],
    "constant": torch.ones(20_000, 6),
}


def sources(x):
    return torch.stack([torch.arange(len(x)) // 100, torch.arange(len(x)) % 100], 1)  # (N, 2)


def stream(x, coreset, *splits):
    for part, source in zip(x.tensor_split(splits), sources(x).tensor_split(splits), strict=True):
        coreset.add(part, source)
        assert coreset.count <= coreset.working_set and coreset.pending < coreset.CHUNK
        assert len(coreset.vectors) == coreset.working_set + coreset.CHUNK
    return coreset


@pytest.mark.parametrize("name", STREAMS)
def test_stream_is_covered_within_the_bound(name):
    x = STREAMS[name]
    coreset = stream(x, StreamingCoreset(100, 400), *range(0, len(x), 3000))
    before = coreset.radius_bound
    vectors, source = coreset.finish()
    assert vectors.shape == (100, 6) and torch.equal(x[source[:, 0] * 100 + source[:, 1]], vectors)
    radius = true_radius(x, vectors)
    assert before <= coreset.radius_bound and radius <= coreset.radius_bound
    if name in ("iid", "sorted", "drift"):
        assert radius <= 2 * greedy_coreset(x, 100)[1] and coreset.radius_bound <= 8 * radius
    if name in ("few distinct", "constant"):
        assert radius == 0 and coreset.radius_bound == 0


def test_stream_that_fits_is_exact():
    x = DATA["normal"]
    vectors, source = stream(x, StreamingCoreset(70, 3000, seed=4), 10, 2000).finish()
    indices, radius = greedy_coreset(x, 70, seed=4)
    assert torch.equal(vectors, x[indices]) and torch.equal(source, sources(x)[indices])
    coreset = stream(x[:30], StreamingCoreset(70, 100))
    assert len(coreset.finish()[0]) == 30 and coreset.radius_bound == 0


def test_stream_does_not_depend_on_how_it_is_split():
    x = STREAMS["iid"]
    one = stream(x, StreamingCoreset(100, 1000))
    other = stream(x, StreamingCoreset(100, 1000), 1, 777, 5000, 30_001)
    assert all(torch.equal(a, b) for a, b in zip(one.finish(), other.finish(), strict=True))
    assert one.radius_bound == other.radius_bound


@pytest.mark.parametrize("at", [0, 500, 23_456])
def test_stream_goes_on_from_its_state(at):
    x = STREAMS["drift"]
    whole = stream(x, StreamingCoreset(100, 1000))
    first = StreamingCoreset(100, 1000)
    first.add(x[:at], sources(x)[:at])
    state = first.state_dict()
    first.add(x[:9000], sources(x)[:9000])  # a state is a copy
    assert all(isinstance(value, int | float | torch.Tensor) for value in state.values())
    second = StreamingCoreset(1, 1)
    second.load_state_dict(state)
    second.add(x[at:], sources(x)[at:])
    assert all(torch.equal(a, b) for a, b in zip(whole.finish(), second.finish(), strict=True))
    assert whole.radius_bound == second.radius_bound


@pytest.mark.parametrize("cut", [0, 300, 20_000, 40_000])
def test_merge_covers_both(cut):
    x = STREAMS["drift"]
    one, other = StreamingCoreset(100, 1000), StreamingCoreset(100, 1000)
    if cut:
        one.add(x[:cut], sources(x)[:cut])
    if cut < len(x):
        other.add(x[cut:], sources(x)[cut:])
    held = sum(c.count + c.pending for c in (one, other))
    one.merge(other)
    assert one.count <= held  # none is lost before the last choice
    vectors, source = one.finish()
    assert torch.equal(x[source[:, 0] * 100 + source[:, 1]], vectors)
    radius = true_radius(x, vectors)
    assert radius <= one.radius_bound and radius <= 2 * greedy_coreset(x, 100)[1]


def test_merge_of_what_fits_is_exact():
    x = DATA["normal"]
    one, other = StreamingCoreset(70, 3000), StreamingCoreset(70, 3000)
    one.add(x[:1250], sources(x)[:1250])
    other.add(x[1250:], sources(x)[1250:])
    one.merge(other)
    assert torch.equal(one.finish()[0], x[greedy_coreset(x, 70)[0]])


def test_stream_beats_greedy_on_a_subset():
    x = normal(60_000, 24) / normal(60_000, 1, 3).abs().clamp(min=0.2)
    vectors, _ = stream(x, StreamingCoreset(500, 1500)).finish()
    subset = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:6000]]
    assert covering_radius(x, vectors) < covering_radius(x, subset[greedy_coreset(subset, 500)[0]])


def test_wrong_streams():
    with pytest.raises(ValueError):
        StreamingCoreset(10, 9)
    with pytest.raises(ValueError):
        StreamingCoreset(1, 2).finish()
    with pytest.raises(ValueError):
        StreamingCoreset(1, 2).add(normal(3, 2), torch.zeros(2, 1, dtype=torch.int64))


@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("k", [1, 9])
def test_nearest_is_exact(k, offset):
    bank, queries = normal(5000, 40) + offset, normal(3000, 40, 1) + offset
    distances, indices = nearest(queries, bank, k)
    reference = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(bank.double().numpy())
    expected, where = reference.kneighbors(queries.double().numpy())
    np.testing.assert_allclose(distances, expected, rtol=1e-5)
    assert (indices.numpy() == where).mean() > 0.999
    np.testing.assert_allclose(nearest(queries[5:6], bank, k)[0], distances[5:6], rtol=1e-6)
    assert covering_radius(queries, bank) == pytest.approx(expected[:, 0].max(), rel=1e-5)


def test_nearest_finds_copies_and_ties():
    bank = torch.cat([normal(3000, 16) + 100, normal(3000, 16) + 100])
    distances, indices = nearest(bank[:500], bank, 2)
    assert (distances == 0).all()
    assert torch.equal(indices.sort(1)[0], torch.arange(500)[:, None] + torch.tensor([0, 3000]))
    distances, _ = nearest(torch.zeros(1, 2), torch.tensor([[1.0, 0], [0, 1], [-1, 0], [5, 5]]), 3)
    assert distances.tolist() == [[1, 1, 1]]
    with pytest.raises(ValueError):
        nearest(bank, bank[:3], 4)


@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("name", ["iid", "drift", "offset"])
def test_merged_parts_cover_like_one_stream(name, parts):
    """As processes share a data set: every image to the next one in turn."""
    x = STREAMS[name]
    alone = stream(x, StreamingCoreset(400, 1600)).finish()[0]
    coresets = [StreamingCoreset(400, 1600) for _ in range(parts)]
    for rank, coreset in enumerate(coresets):
        coreset.add(x[rank::parts], sources(x)[rank::parts])
    for other in coresets[1:]:
        coresets[0].merge(other)
    merged, source = coresets[0].finish()
    assert covering_radius(x, merged) <= 1.05 * covering_radius(x, alone)
    assert torch.equal(x[source[:, 0] * 100 + source[:, 1]], merged)


def test_merge_shifts_sources_and_goes_on():
    x = STREAMS["iid"]
    one, other = StreamingCoreset(100, 1000), StreamingCoreset(100, 1000)
    one.add(x[:9000], sources(x)[:9000])
    other.add(x[9000:20_000], sources(x)[:11_000])
    one.merge(other, torch.tensor([90, 0]))
    one.add(x[20_000:], sources(x)[20_000:])
    assert one.count <= 1000
    vectors, source = one.finish()
    assert torch.equal(x[source[:, 0] * 100 + source[:, 1]], vectors) and true_radius(x, vectors) <= one.radius_bound


@pytest.mark.parametrize("name", DATA)
def test_covering_radius_is_exact(name):
    x = DATA[name]
    for bank in (x[::50], x[:3], x):
        assert covering_radius(x, bank) == pytest.approx(true_radius(x, bank), rel=1e-5, abs=1e-6)
