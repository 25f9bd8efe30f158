"""The metrics against scikit-learn, an exact sort and formulas written out directly."""

import numpy as np
import pytest
import torch
from scipy.ndimage import label as scipy_label
from scipy.special import ndtr
from sklearn.metrics import auc, average_precision_score, f1_score, precision_recall_curve, roc_auc_score
from torch import distributed
from torchmetrics import MetricCollection

from zoo.errors import ZooError
from zoo.metrics import AUPRO, AUROC, PRODFR200, AnomalyMetrics, AveragePrecision, F1Max, ranking

SUITE_KEYS = ["image_auroc", "image_f1_max", "image_ap", "pixel_auroc", "pixel_f1_max", "pixel_ap", "pixel_aupro"]


def rank_table(scores, targets, **options):
    """Merged table and shift of all scores, added at once."""
    tables, shift = [torch.zeros(0, 4, dtype=torch.int64)], 0
    tables, shift = ranking.add(tables, shift, torch.as_tensor(scores), torch.as_tensor(targets).bool(), **options)
    return ranking.merge(torch.cat(tables), shift)


def sample(n=4000, rate=0.1, seed=0):
    """Overlapping classes: scores (n,) float64 and targets (n,)."""
    rng = np.random.default_rng(seed)
    targets = rng.random(n) < rate
    return rng.normal(size=n) + targets, targets


def maps(n=6, size=(24, 20), seed=0):
    """Maps (n, H, W) with ties, and masks of which the last is empty, with regions that touch at a corner only."""
    rng = torch.Generator().manual_seed(seed)
    masks = torch.zeros(n, *size, dtype=torch.bool)
    for i in range(n - 1):
        masks[i, 2 : 6 + i, 3:7] = True
        masks[i, 6 + i : 8 + i, 7:9] = True  # 8-connected with the one above, 4-connected not
        masks[i, 15:17, 12 : 14 + i] = True
    scores = torch.randn(n, *size, generator=rng) + masks.float()
    return (scores * 8).round() / 8, masks


def brute_force_aupro(scores, masks, limit=0.3, valid=None):
    """Overlap of each region at each threshold, counted directly; segments clipped at the limit one by one."""
    scores, masks = scores.numpy(), masks.numpy()
    valid = np.ones_like(masks) if valid is None else valid.numpy()
    regions = []  # scores of the pixels of each region
    for score, mask, use in zip(scores, masks, valid, strict=True):
        labels, count = scipy_label(mask, structure=np.ones((3, 3)))
        regions += [score[(labels == k) & use] for k in range(1, count + 1)]
    regions = [region for region in regions if len(region)]
    normal = scores[~masks & valid]
    x0 = y0 = area = 0.0
    for threshold in np.unique(scores[valid])[::-1]:
        x1, y1 = np.mean(normal >= threshold), np.mean([np.mean(region >= threshold) for region in regions])
        if x1 > limit:
            return (area + (limit - x0) * (y0 + (y0 + (y1 - y0) * (limit - x0) / (x1 - x0))) / 2) / limit
        area += (x1 - x0) * (y0 + y1) / 2
        x0, y0 = x1, y1
    return area / limit


def direct_dfr200(scores, masks, valid=None):
    """DFR's recipe as its text says: 200 binary maps, overlap by region, rate over all normal pixels, both rescaled."""
    scores, masks = scores.double().numpy(), masks.numpy()
    valid = np.ones_like(masks) if valid is None else valid.numpy()
    high, low = scores[valid].max(), scores[valid].min()
    rates, overlaps = [], []
    for step in range(200):
        called = (scores > high - step * (high - low) / 200) & valid
        found = []
        for call, mask, use in zip(called, masks, valid, strict=True):
            labels, count = scipy_label(mask, structure=np.ones((3, 3)))
            found += [call[(labels == k) & use].mean() for k in range(1, count + 1) if ((labels == k) & use).any()]
        rates.append(called[~masks & valid].mean())
        overlaps.append(np.mean(found))
    kept = np.array(rates) <= 0.3
    rates, overlaps = np.array(rates)[kept], np.array(overlaps)[kept]
    return auc(
        (rates - rates.min()) / (rates.max() - rates.min()),
        (overlaps - overlaps.min()) / (overlaps.max() - overlaps.min()),
    )


def exact_sort(scores, targets):
    """AUROC and average precision by a sort of all scores, ties included."""
    order = np.argsort(-scores)
    scores, targets = scores[order], targets[order]
    last = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)
    tp = np.cumsum(targets)[last].astype(float)
    fp = last + 1 - tp
    gain, loss = np.diff(tp, prepend=0), np.diff(fp, prepend=0)
    return np.sum(loss * (tp - gain / 2)) / (tp[-1] * fp[-1]), np.sum(gain * tp / (tp + fp)) / tp[-1]


@pytest.fixture
def small_tables(monkeypatch):
    """Limits so low that a few thousand scores drop bits and merge many times."""
    limit_tables()
    yield
    limit_tables(ranking_limits)


ranking_limits = ranking.MAX_KEYS, ranking.MAX_ROWS, ranking.MAX_TABLES, ranking.CHUNK


def limit_tables(limits=(300, 400, 5, 700)):
    ranking.MAX_KEYS, ranking.MAX_ROWS, ranking.MAX_TABLES, ranking.CHUNK = limits


RANGES = {
    "plain": lambda x: x,
    "ties": lambda x: np.round(x * 2) / 2,
    "two values": lambda x: (x > 1).astype(float),
    "tiny products": lambda x: np.exp(x) * 1e-12,
    "denormal": lambda x: np.round(np.exp(x) * 100) * 1e-44,
    "narrow, far from zero": lambda x: 1000 + 1e-3 * x,
    "negative": lambda x: -np.exp(-x),
    "huge": lambda x: x * 1e30,
    "many decades": lambda x: np.sign(x) * 10.0 ** (10 * np.abs(x)),
    "infinite": lambda x: np.where(x > 2, np.inf, np.where(x < -2, -np.inf, x)),
    "signed zeros": lambda x: np.where(np.abs(x) < 1, np.where(np.arange(len(x)) % 2, 0.0, -0.0), x),
}


@pytest.mark.parametrize("name", RANGES)
def test_equals_scikit_learn_on_any_range(name):
    scores, targets = sample()
    with np.errstate(over="ignore"):
        scores = RANGES[name](scores).astype(np.float32)
    table, _ = rank_table(scores, targets)
    ranks = np.unique(scores, return_inverse=True)[1]  # scikit-learn refuses infinities
    precision, recall, _ = precision_recall_curve(targets, ranks)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-30)

    assert ranking.auroc(table) == pytest.approx(roc_auc_score(targets, ranks), abs=1e-12)
    assert ranking.average_precision(table) == pytest.approx(average_precision_score(targets, ranks), abs=1e-12)
    best, threshold = ranking.f1_max(table)
    assert best == pytest.approx(f1.max(), abs=1e-12)
    hit = scores >= np.float32(threshold)
    assert best == pytest.approx(2 * (hit & targets).sum() / (hit.sum() + targets.sum()), abs=1e-12)
    assert np.float32(threshold) in scores


def test_auroc_is_the_probability_of_a_right_order():
    scores, targets = sample(500)
    scores = np.round(scores, 1).astype(np.float32)
    positive, negative = scores[targets][:, None], scores[~targets]
    expected = np.mean((positive > negative) + 0.5 * (positive == negative))
    assert ranking.auroc(rank_table(scores, targets)[0]) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_floats_are_read_as_float32(dtype):
    scores, targets = sample()
    scores, targets = torch.tensor(scores).to(dtype), torch.tensor(targets)
    expected = roc_auc_score(targets, scores.float())
    assert ranking.auroc(rank_table(scores, targets)[0]) == pytest.approx(expected, abs=1e-12)


def test_keys_keep_the_order_and_come_back():
    scores = torch.tensor([-np.inf, -1e30, -1.0, -1e-45, -0.0, 0.0, 1e-45, 1e-12, 1.0, 1000.0, np.inf])
    keys = ranking.order_keys(scores)
    assert keys[4] == keys[5] == 0
    assert (keys.diff() > 0).tolist() == [True] * 4 + [False] + [True] * 5
    assert [ranking.key_score(key) for key in keys] == scores.tolist()
    assert ranking.key_score(-(2**31)) == -np.inf  # a key of -inf without its low bits


DISTRIBUTIONS = {
    "normal": lambda z, rng: z,
    "log-normal": lambda z, rng: np.exp(2 * z),
    "exponential": lambda z, rng: -np.log(ndtr(-z)),
    "cauchy": lambda z, rng: np.tan(np.pi * (ndtr(z) - 0.5)),
    "uniform": lambda z, rng: ndtr(z) + 0.1 * rng.random(len(z)),
    "two scales": lambda z, rng: z * np.where(rng.random(len(z)) < 0.5, 1, 1e-4),
}


def errors(name, keys, n):
    """Errors of AUROC and AP where n scores share tables of so many keys."""
    limit_tables((keys, keys + keys // 4, 64, n // 3))
    rng = np.random.default_rng(1)
    targets = rng.random(n) < 0.02
    z = rng.normal(size=n)
    scores = DISTRIBUTIONS[name](np.where(targets, 1.2 * z + 1, z), rng).astype(np.float32)
    table, shift = rank_table(scores, targets)
    assert shift > 0 and keys // 4 < len(table) <= keys
    auroc, ap = exact_sort(scores, targets)
    return abs(ranking.auroc(table) - auroc), abs(ranking.average_precision(table) - ap)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_more_distinct_scores_than_keys(name, small_tables):
    auroc_error, ap_error = errors(name, 2**20, 1_500_000)
    assert auroc_error < 1e-8
    assert ap_error < 1e-6


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_many_more_distinct_scores_than_keys(name, small_tables):
    auroc_error, ap_error = errors(name, 2**16, 300_000)
    assert auroc_error < 1e-6
    assert ap_error < 1e-4


def test_known_failure_is_a_narrow_cluster_in_a_wide_spread(small_tables, monkeypatch):
    """The documented limit: a sigmoid packs the highest scores into 1 - 1e-6 and spreads the lowest over decades."""
    monkeypatch.setitem(DISTRIBUTIONS, "sigmoid", lambda z, rng: 1 / (1 + np.exp(-4 * z)))
    assert 1e-4 < errors("sigmoid", 2**16, 300_000)[1] < 0.1


@pytest.mark.parametrize("split", ["one by one", "uneven", "shuffled", "by class"])
def test_table_is_a_function_of_the_multiset(split, small_tables):
    scores, targets = sample(1500)
    scores[::7] *= 1e-9
    whole, shift = rank_table(scores, targets)
    keys = ranking.order_keys(torch.tensor(scores)).numpy()
    assert shift == next(s for s in range(32) if len(np.unique(keys >> s)) <= ranking.MAX_KEYS)
    assert whole[:, 1:3].sum(0).tolist() == [(~targets).sum(), targets.sum()]

    order = {"shuffled": np.random.default_rng(4).permutation(1500), "by class": np.argsort(targets)}
    order = order.get(split, np.arange(1500))
    cuts = range(1501) if split == "one by one" else [0, 1, 2, 900, 905, 1400, 1500]
    metric = AUROC()
    for a, b in zip(cuts, cuts[1:], strict=False):
        metric.update(torch.tensor(scores[order[a:b]]), torch.tensor(targets[order[a:b]]))
        assert sum(map(len, metric.score_tables)) <= ranking.MAX_ROWS
    assert torch.equal(metric._table("score"), whole)
    assert metric.compute() == torch.tensor(ranking.auroc(whole))


@pytest.mark.parametrize("stretch", [1.0, 4.0, 1e-7])
def test_dfr200_equals_the_direct_formula(stretch):
    scores, masks = maps()
    scores = torch.expm1(stretch * scores)  # heavy tails: few thresholds are kept
    metric = PRODFR200()
    for i in range(len(scores)):
        metric.update(scores[i : i + 1], masks[i : i + 1])
    assert float(metric.compute()) == pytest.approx(direct_dfr200(scores, masks), abs=1e-6)
    valid = torch.rand(scores.shape, generator=torch.Generator().manual_seed(1)) > 0.3
    metric = PRODFR200()
    metric.update(scores, masks, valid)
    assert float(metric.compute()) == pytest.approx(direct_dfr200(scores, masks, valid), abs=1e-6)


def test_dfr200_depends_on_the_scale_and_aupro_does_not():
    """Which is why it has a name of its own."""
    scores, masks = maps(12, (64, 64))
    found = []
    for view in (scores, torch.exp(3 * scores)):
        both = PRODFR200(), AUPRO()
        for metric in both:
            metric.update(view, masks)
        found.append([float(metric.compute()) for metric in both])
    assert found[0][1] == pytest.approx(found[1][1], abs=1e-6) and abs(found[0][0] - found[1][0]) > 0.05


def test_dfr200_is_no_number_where_its_recipe_divides_by_zero():
    masks = torch.zeros(1, 8, 8, dtype=torch.bool)
    masks[0, :2] = True
    metric = PRODFR200()
    metric.update((~masks).float(), masks)  # all normal pixels at once: no rate but 0 is within the limit
    assert torch.isnan(metric.compute())


def test_dfr200_with_bounded_keys(small_tables):
    """With bits dropped its thresholds move by as much as the scores do."""
    scores, masks = maps(12, (64, 64), seed=3)
    scores = scores + torch.rand(scores.shape, generator=torch.Generator().manual_seed(2)) / 8
    metric = PRODFR200()
    metric.update(scores, masks)
    assert float(metric.compute()) == pytest.approx(direct_dfr200(scores, masks), abs=0.02)


def test_f1_at_a_threshold_of_other_images():
    """The suite's threshold is that of scikit-learn's best F1, and F1 at it is scikit-learn's on other images."""
    first, other, whole = AnomalyMetrics(), AnomalyMetrics(), AnomalyMetrics()
    parts = []
    for seed, suites in (0, (first, whole)), (1, (other, whole)):
        pixels, masks = maps(12, seed=seed)
        masks[::2] = False  # half of the images are normal
        labels = masks.any((1, 2))
        images = torch.tensor(sample(12, seed=seed)[0]).float() + labels
        for suite in suites:
            suite.update(images, pixels[:, None], labels, masks[:, None])
        parts.append({"image": (images, labels), "pixel": (pixels.flatten(), masks.flatten())})
    thresholds = first.thresholds()
    found = other.further(thresholds)
    for level in ("image", "pixel"):
        precision, recall, candidates = precision_recall_curve(parts[0][level][1], parts[0][level][0])
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
        assert thresholds[level] == pytest.approx(candidates[f1[:-1].argmax()], rel=1e-6)
        scores, targets = parts[1][level]
        expected = f1_score(targets, scores >= thresholds[level])
        assert found[f"{level}_f1_at_val"] == pytest.approx(expected, abs=1e-6)
    assert other.further({"image": 1e9})["image_f1_at_val"] == 0
    assert "image_f1_at_val" not in other.further({})
    assert first.compute() != whole.compute()
    first.merge_state(other)  # after a compute
    assert first.compute() == whole.compute() and first.further({}) == whole.further({})


@pytest.mark.parametrize("limit", [0.05, 0.3, 1.0])
def test_aupro_equals_brute_force(limit):
    scores, masks = maps()
    metric = AUPRO(limit)
    table, _ = rank_table(scores, masks, weights=ranking.region_weights(masks))
    assert ranking.aupro(table, limit) == pytest.approx(brute_force_aupro(scores, masks, limit), abs=1e-10)
    for i in range(len(scores)):
        metric.update(scores[i : i + 1], masks[i : i + 1].int())
    assert metric.compute() == torch.tensor(ranking.aupro(table, limit))


def test_aupro_limit_on_a_point_and_below_the_first():
    scores, masks = torch.tensor([[[3.0, 2.0, 1.0, 0.0]]]), torch.tensor([[[True, False, True, False]]])
    table, _ = rank_table(scores, masks, weights=ranking.region_weights(masks))
    for limit, expected in (0.5, 0.5), (0.25, 0.5), (1.0, 0.75):
        assert ranking.aupro(table, limit) == expected == brute_force_aupro(scores, masks, limit)
    with pytest.raises(ZooError, match="limit"):
        ranking.aupro(table, 30)


def test_aupro_is_invariant_to_monotone_transforms():
    scores, masks = maps()
    weights = ranking.region_weights(masks)
    values = {ranking.aupro(rank_table(f(scores), masks, weights=weights)[0]) for f in (torch.exp, torch.atan, abs_log)}
    assert values == {ranking.aupro(rank_table(scores, masks, weights=weights)[0])}


def abs_log(scores):
    return -(20 - scores).log() * 1e-6


def test_regions_weigh_the_same_whatever_their_area():
    _, masks = maps()
    weights = ranking.region_weights(masks)
    regions = sum(scipy_label(mask, structure=np.ones((3, 3)))[1] for mask in masks.numpy())
    assert len(weights) == masks.sum()
    assert int(weights.sum()) == pytest.approx(regions * 2**40, rel=1e-9)


def test_valid_pixels_are_all_that_counts():
    scores, masks = maps()
    valid = torch.rand(scores.shape, generator=torch.Generator().manual_seed(1)) < 0.6
    valid[0, :12] = False  # hides two regions of the first image whole
    broken = scores.masked_fill(~valid, torch.nan)
    metric = AUPRO()
    metric.update(broken, masks, valid)
    expected = brute_force_aupro(scores, masks, valid=valid)
    assert float(metric.compute()) == pytest.approx(expected, abs=1e-6)
    assert expected != pytest.approx(brute_force_aupro(scores, masks), abs=1e-4)
    for cls, reference in (AUROC, roc_auc_score), (AveragePrecision, average_precision_score):
        metric = cls()
        metric.update(broken, masks, valid)
        assert float(metric.compute()) == pytest.approx(reference(masks[valid], scores[valid]), abs=1e-6)


def test_forward_reset_merge_state_and_collections(small_tables):
    scores, targets = map(torch.tensor, sample(3000))
    for cls in AUROC, AveragePrecision, F1Max:
        whole, steps, other = cls(), cls(), cls()
        whole.update(scores, targets)
        for i in range(0, 2000, 100):
            batch = cls()
            batch.update(scores[i : i + 100], targets[i : i + 100])
            assert steps(scores[i : i + 100], targets[i : i + 100]) == batch.compute()
        assert len(steps.score_tables) <= ranking.MAX_TABLES
        other.update(scores[2000:], targets[2000:])
        steps.merge_state(other)
        assert torch.equal(steps._table("score"), whole._table("score")) and steps.compute() == whole.compute()
        steps.reset()
        steps.update(scores[2000:], targets[2000:])
        assert steps.compute() == other.compute()

    maps_, masks = maps()
    collection, alone = MetricCollection([AUROC(), F1Max(), AveragePrecision(), AUPRO()]), AUPRO()
    for metric in collection, alone:
        metric.update(maps_[-1:], masks[-1:])  # normal: at this point all states are alike
        metric.update(maps_, masks)
    assert collection.compute()["AUPRO"] == alone.compute()


def test_merged_metrics_share_no_memory(small_tables):
    scores, targets = map(torch.tensor, sample(3000))
    source, metric = AUROC(), AUROC()
    source.update(scores, targets)
    before = source._table("score")
    metric.merge_state(source)
    metric.update(scores[:50], targets[:50])
    assert torch.equal(source._table("score"), before)


def test_bits_are_dropped_from_one_key_too_many(small_tables):
    for n, expected in (ranking.MAX_KEYS, 0), (ranking.MAX_KEYS + 1, 1):
        scores = torch.arange(n, dtype=torch.int32).view(torch.float32)  # neighbouring keys
        assert rank_table(scores, torch.zeros(n))[1] == expected


@pytest.mark.parametrize("targets, missing", [([0, 0], "no abnormal"), ([1, 1], "no normal"), ([], "no normal")])
def test_one_class_is_refused(targets, missing):
    for metric in AUROC(), AveragePrecision(), F1Max():
        metric.update(torch.arange(float(len(targets))), torch.tensor(targets))
        with pytest.raises(ZooError, match=missing):
            metric.compute()
    metric = AUPRO()
    metric.update(torch.arange(float(len(targets)))[None, None], torch.tensor(targets)[None, None])
    with pytest.raises(ZooError, match=missing):
        metric.compute()


def test_nan_and_wrong_shapes_are_refused_and_leave_no_trace():
    metric = AUROC()
    metric.update(torch.tensor([0.0, 1.0]), torch.tensor([0, 1]))
    negative_nan = torch.tensor([-1]).to(torch.int32).view(torch.float32)
    for nan in torch.tensor([torch.nan]), negative_nan:
        for target in 0, 1:
            with pytest.raises(ZooError, match="NaN"):
                metric.update(torch.cat([torch.tensor([0.5, torch.inf]), nan]), torch.tensor([0, 1, target]))
    with pytest.raises(ZooError, match="shapes"):
        metric.update(torch.zeros(3), torch.zeros(2))
    with pytest.raises(ZooError, match="B, H, W"):
        AUPRO().update(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4))
    assert metric._table("score")[:, 1:3].sum() == 2


def fill(suite, first=0, last=6, **options):
    """Add maps of two sizes one image at a time."""
    for i in range(first, last):
        scores, masks = maps(size=(24, 20) if i % 2 else (30, 26))
        scores, masks = scores[i, None, None], masks[i, None, None]  # (1, 1, H, W)
        extra = {name: value(scores) for name, value in options.items()}
        suite.update(scores.amax((1, 2, 3)), scores, masks.any((1, 2, 3)), **({"mask": masks} | extra))
    return suite


def test_suite_equals_the_references():
    suite = fill(AnomalyMetrics())
    result = suite.compute()
    assert list(result) == SUITE_KEYS and all(type(value) is float for value in result.values())
    chosen = [maps(size=(24, 20) if i % 2 else (30, 26)) for i in range(6)]
    scores, masks = [s[i] for i, (s, _) in enumerate(chosen)], [m[i] for i, (_, m) in enumerate(chosen)]
    pixels, labels = torch.cat([s.flatten() for s in scores]), torch.cat([m.flatten() for m in masks])
    image_scores, image_labels = [s.max() for s in scores], [m.any() for m in masks]
    for level, s, y in ("image", image_scores, image_labels), ("pixel", pixels, labels):
        precision, recall, _ = precision_recall_curve(y, s)
        assert result[f"{level}_auroc"] == pytest.approx(roc_auc_score(y, s), abs=1e-12)
        assert result[f"{level}_ap"] == pytest.approx(average_precision_score(y, s), abs=1e-12)
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-30)
        assert result[f"{level}_f1_max"] == pytest.approx(f1.max(), abs=1e-12)
    padded = [torch.nn.functional.pad(m, (0, 26 - m.shape[1], 0, 30 - m.shape[0])) for m in masks]
    inside = [torch.nn.functional.pad(m, (0, 26 - m.shape[1], 0, 30 - m.shape[0])) for m in map(torch.ones_like, masks)]
    filled = [torch.nn.functional.pad(s, (0, 26 - s.shape[1], 0, 30 - s.shape[0])) for s in scores]
    expected = brute_force_aupro(torch.stack(filled), torch.stack(padded), valid=torch.stack(inside) > 0)
    assert result["pixel_aupro"] == pytest.approx(expected, abs=1e-10)


def test_suite_without_masks():
    complete = fill(AnomalyMetrics()).compute()
    normal_without = fill(fill(AnomalyMetrics(), 0, 5), 5, 6, mask=lambda scores: None).compute()
    assert normal_without == complete
    for order in (0, 1), (1, 0):
        suite = AnomalyMetrics()
        for part in order:
            fill(suite, *((0, 3), (3, 6))[part], **({"mask": lambda scores: None} if part else {}))
        assert suite.compute() == {name: complete[name] for name in SUITE_KEYS[:3]}
    suite.reset()
    assert fill(suite).compute() == complete
    for parts in ((0, 3), (3, 6)), ((3, 6), (0, 3)):
        with_masks, without = fill(AnomalyMetrics(), *parts[0]), fill(AnomalyMetrics(), *parts[1], mask=lambda _: None)
        with_masks.merge_state(without)
        assert list(with_masks.compute()) == SUITE_KEYS[:3]

    nothing_marked = fill(AnomalyMetrics(), roi=lambda scores: torch.zeros_like(scores, dtype=torch.bool))
    assert list(nothing_marked.compute()) == SUITE_KEYS[:3]
    with pytest.raises(ZooError, match="no normal"):
        fill(AnomalyMetrics(), 0, 5).compute()


def test_suite_counts_only_the_roi():
    suite = fill(AnomalyMetrics(), roi=lambda scores: torch.arange(scores.numel()).view(scores.shape) % 3 > 0)
    complete = fill(AnomalyMetrics())
    parts = [suite._table("pixel")[:, 1:3].sum(), complete._table("pixel")[:, 1:3].sum()]
    assert parts[0] == pytest.approx(int(parts[1]) * 2 / 3, abs=6)
    assert list(suite.compute()) == SUITE_KEYS and suite.compute() != complete.compute()


def test_state_stays_under_100_mb():
    suite, rng, seen, most = AnomalyMetrics(), torch.Generator().manual_seed(0), 0, 0
    for _ in range(6):
        scores = torch.randn(2, 1, 512, 512, generator=rng) * torch.tensor([1e-6, 1.0]).view(2, 1, 1, 1)
        mask = torch.zeros_like(scores, dtype=torch.bool)
        mask[1, :, 100:200, 100:120] = True
        suite.update(scores.amax((1, 2, 3)), scores, torch.tensor([0, 1]), mask)
        seen += scores.numel()
        most = max(most, sum(t.nbytes for t in suite.image_tables + suite.pixel_tables))
    assert most <= ranking.MAX_ROWS * 32 + 1000 < 50e6  # and the table of images can take as much again
    assert suite.pixel_shift > 0
    assert suite._table("pixel")[:, 1:3].sum() == seen


ROUNDS = ((range(0, 5), range(5, 6)), (range(0, 6), range(0)))  # images of the two processes, in two rounds


def two_processes(rank, folder):
    limit_tables()
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = []
    for parts in ROUNDS:
        suite, aupro, auroc = AnomalyMetrics(), AUPRO(), AUROC()
        for i in parts[rank]:
            fill(suite, i, i + 1)
            scores, masks = maps()
            scores = scores * (1 + i) ** -9.0  # processes reach different shifts
            aupro.update(scores[i : i + 1], masks[i : i + 1])
            auroc(scores[: i + 1], masks[: i + 1])
        before = auroc._table("score")
        auroc.sync()
        table = auroc._table("score")
        auroc.unsync()
        assert torch.equal(auroc._table("score"), before)
        results.append((suite.compute(), aupro.compute(), auroc.compute(), table))
    torch.save(results, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_two_processes_equal_one(tmp_path, small_tables):
    torch.multiprocessing.spawn(two_processes, args=(str(tmp_path),), nprocs=2)
    suite, aupro, auroc = fill(AnomalyMetrics()), AUPRO(), AUROC()
    for i in range(6):
        scores, masks = maps()
        scores = scores * (1 + i) ** -9.0
        aupro.update(scores[i : i + 1], masks[i : i + 1])
        auroc.update(scores[: i + 1], masks[: i + 1])
    assert auroc.score_shift > 0
    for rank in range(2):
        for result in torch.load(tmp_path / f"{rank}.pt", weights_only=True):
            assert result[:3] == (suite.compute(), aupro.compute(), auroc.compute())
            assert torch.equal(result[3], auroc._table("score"))


def test_a_part_without_dropped_bits_merges_as_if_seen_together():
    """One rank has few keys, another one more than fit: those of the first lose as many bits as theirs."""
    generator = torch.Generator().manual_seed(0)
    few, many = 0.4 * torch.rand(50_000, generator=generator), 0.5 + 40 * torch.rand(3_000_000, generator=generator)
    parts = [(few, few < 0.1), (many, many < 9)]

    def table(parts):
        tables, shift = [torch.zeros(0, 4, dtype=torch.int64)], 0
        for scores, targets in parts:
            tables, shift = ranking.add(tables, shift, scores, targets)
        return ranking.merge_all(tables, shift)

    together, shift = table(parts)
    (one, first), (other, second) = table(parts[:1]), table(parts[1:])
    merged, again = ranking.merge_all([one, other], max(first, second))
    assert first < second == shift == again and merged.equal(together)
