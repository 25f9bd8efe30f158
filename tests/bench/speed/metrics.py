"""Section 5: the four pixel metrics of many maps, beside the peer's.

AUROC, average precision, the highest F1 and AUPRO up to a false-positive rate of 0.3, on maps of 224 x 224 in (0, 1)
with a defect in every third one, given in batches of 32 as an evaluation does. The peer's are `AUROC`, `AUPR`, `F1Max`
and `AUPRO` of `anomalib.metrics` on the fields anomaly_map and gt_mask, which its Evaluator updates and computes one
after the other; ours is `AnomalyMetrics`, which an evaluation calls: its time includes the three image metrics.

Memory is the growth of the peak of the resident set of a fresh process, from before the first batch, the maps made
batch by batch and not kept: what the metrics keep and need is measured, and a batch. scikit-learn judges the values.
"""

import math
import sys
import time
from pathlib import Path

sys.path.insert(1, str(Path(__file__).parents[1]))
import sides  # noqa: E402

SIZE, BATCH = 224, 32
NAMES = ("auroc", "ap", "f1_max", "aupro")
LIMIT_MIB = 100


def batch_of(first, last):
    """Maps (B, 1, SIZE, SIZE) of smooth noise, brighter around defects of one to three discs, and masks."""
    import torch

    maps, masks = [], []
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    for i in range(first, last):
        generator = torch.Generator().manual_seed(i)
        noise = torch.nn.functional.interpolate(
            torch.randn(1, 1, 28, 28, generator=generator), size=(SIZE, SIZE), mode="bicubic"
        )[0, 0]
        mask = torch.zeros(SIZE, SIZE, dtype=torch.bool)
        for _ in range(1 + i // 3 % 3 if i % 3 == 0 else 0):
            row, column, radius = (torch.rand(3, generator=generator) * torch.tensor([SIZE, SIZE, 16.0])).tolist()
            mask |= (y - row) ** 2 + (x - column) ** 2 <= (radius + 3) ** 2
        maps.append((noise + 1.5 * mask - 1).sigmoid())
        masks.append(mask)
    return torch.stack(maps)[:, None], torch.stack(masks)[:, None]


def batches(count):
    return (batch_of(first, min(first + BATCH, count)) for first in range(0, count, BATCH))


def resident(what):
    """VmRSS or VmHWM, the peak, of this process in MiB."""
    return int(Path("/proc/self/status").read_text().split(f"{what}:")[1].split()[0]) / 1024


def measured(metric_of, task, maps):
    """Time of updates and computation, the values, and the growth of the peak."""
    update, compute, _ = metric_of()
    update(*batch_of(0, 2))
    compute()  # imports and warms up
    update, compute, state = metric_of()
    if task == "speed":
        kept = list(batches(maps))
    else:
        kept = batches(maps)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, seconds = resident("VmRSS"), 0.0  # of a process in which all is loaded
    for scores, masks in kept:
        begin = time.perf_counter()
        update(scores, masks)
        seconds += time.perf_counter() - begin
    begin = time.perf_counter()
    values = compute()
    seconds += time.perf_counter() - begin
    return {"seconds": seconds, "growth": resident("VmHWM") - before, "state": state()} | values


def ours(task, maps):
    from zoo.metrics import AnomalyMetrics

    def metric_of():
        suite = AnomalyMetrics()

        def update(scores, masks):
            suite.update(scores.amax((1, 2, 3)), scores, masks.any(-1).any(-1)[:, 0], masks)

        def compute():
            values = suite.compute()
            return {name: float(values[f"pixel_{name}"]) for name in NAMES}

        return update, compute, lambda: sum(t.nbytes for t in suite.image_tables + suite.pixel_tables) / 2**20

    return measured(metric_of, task, maps)


def peer(task, maps):
    from anomalib.data import ImageBatch
    from anomalib.metrics import AUPR, AUPRO, AUROC, F1Max

    if task == "sklearn":
        return judged(maps)

    def metric_of():
        metrics = [kind(fields=["anomaly_map", "gt_mask"]) for kind in (AUROC, AUPR, F1Max, AUPRO)]

        def update(scores, masks):
            batch = ImageBatch(image=scores.expand(-1, 3, -1, -1), anomaly_map=scores[:, 0], gt_mask=masks[:, 0])
            for metric in metrics:
                metric.update(batch)

        def compute():
            return {name: float(metric.compute()) for name, metric in zip(NAMES, metrics, strict=True)}

        return update, compute, lambda: None

    return measured(metric_of, task, maps)


def judged(maps):
    """The first three by scikit-learn, which is in the peer's environment too."""
    import numpy as np
    from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

    scores, masks = (np.concatenate([part.numpy().ravel() for part in x]) for x in zip(*batches(maps), strict=True))
    precision, recall, _ = precision_recall_curve(masks, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    values = (roc_auc_score(masks, scores), average_precision_score(masks, scores), f1.max())
    return dict(zip(NAMES, map(float, values), strict=False))


def section(pythons, quick=False):
    maps = 64 if quick else 278
    found = sides.in_turns(pythons, "metrics.py", 3, task="speed", maps=maps)
    a, b = (sides.median_of(found[name], "seconds") for name in ("ours", "peer"))
    rows = [row(f"four pixel metrics, {maps} maps", a, b, "s", 10)]
    growth = {}
    for name, python in pythons.items():
        with sides.Side(python, "metrics.py", name) as side:
            growth[name] = side.ask(task="memory", maps=maps)["growth"]
    rows.append(row(f"four pixel metrics, {maps} maps: memory", growth["ours"], growth["peer"], "MiB", None))
    with sides.Side(pythons["ours"], "metrics.py", "ours") as side:
        many = side.ask(task="memory", maps=10 * maps)
    for what, value in ("state", many["state"]), ("memory", many["growth"]):
        kept = LIMIT_MIB / value
        rows.append(
            {
                "name": f"four pixel metrics, {10 * maps} maps: {what}, of {LIMIT_MIB} MiB",
                "ours": value,
                "peer": None,
                "ratio": kept,
            }
        )
        rows[-1] |= {"unit": "MiB", "wanted": 1}
    with sides.Side(pythons["peer"], "metrics.py", "peer") as side:
        exact = side.ask(task="sklearn", maps=maps)
    notes = [
        "State is what our metrics keep; memory is that, all that an update or the computation takes for a moment, and "
        "a batch."
    ]
    for name in NAMES:
        mine, theirs = (found[side][-1][name] for side in ("ours", "peer"))
        judge = f", scikit-learn {exact[name]:.6f}" if name in exact else ""
        notes.append(f"{name}: ours {mine:.6f}, peer {theirs:.6f}{judge}.")
        if not math.isclose(mine, theirs, abs_tol=1e-3) or not math.isclose(mine, exact.get(name, mine), abs_tol=1e-6):
            raise RuntimeError(f"the values differ: {notes[-1]}")
    return {"rows": rows, "notes": notes}


def row(name, mine, theirs, unit, wanted):
    ratio = theirs / max(mine, 1e-9)
    return {"name": name, "ours": mine, "peer": theirs, "ratio": ratio, "unit": unit, "wanted": wanted}


SIDES = {"ours": ours, "peer": peer}
if __name__ == "__main__":
    sides.serve(SIDES)
