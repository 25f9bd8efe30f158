"""Section 2: a coreset of the peer's and ours from the same vectors, its radius, and a whole PatchCore bank.

Coreset: 78,400 vectors of 1,536 numbers (100 images of Wide ResNet-50 at 224), of which 1,568 are picked. Both
processes draw the same vectors; timed is the peer's `KCenterGreedy.select_coreset_idxs`, as its PatchCore calls it,
and `greedy_coreset`. The peer picks in a random projection to some 280 numbers, ours in all 1,536: its loop reads a
fifth of what an exact one would. One function of this file computes the radius of either, in the original space.

Bank: from images in memory to the memory bank, embedding included, same backbone, layers, 3x3 means and bank size, in
batches of 8. The peer keeps all patch vectors and picks at the end; ours is its default, which never holds them all.

What bounds ours: torch's FLOP counter counts the products; the rate of a product of two tiles and the speed at which
memory is read are measured in the same process. The limit is the time of these products at that rate, and of one read
of all vectors, which no algorithm can do without.
"""

import math
import statistics
import sys
import time
from functools import cache
from pathlib import Path

sys.path.insert(1, str(Path(__file__).parents[1]))
import sides  # noqa: E402

DIMS = 1536
LITE0 = "tf_efficientnet_lite0"  # has its real weights on both sides; the other one is random, of the same seed
LAYERS = {"wide_resnet50_2": ["layer2", "layer3"], LITE0: ["blocks.2", "blocks.4"]}  # of the peer
MEAN_STD = {"wide_resnet50_2": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), LITE0: ((0.5,) * 3, (0.5,) * 3)}
PATCHES = 28 * 28  # of an image


@cache
def vectors(kind, n):
    """Standard normal, or around 100 centres; (n, DIMS)."""
    import torch

    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(n, DIMS, generator=generator)
    if kind == "clusters":
        centres = 3 * torch.randn(100, DIMS, generator=generator)
        noise += centres[torch.randint(100, (n,), generator=generator)]
    return noise


@cache
def images(n):
    """Grey texture with noise, (n, 3, 224, 224) in [0, 1]."""
    import torch

    generator = torch.Generator().manual_seed(0)
    coarse = torch.nn.functional.interpolate(torch.rand(n, 1, 14, 14, generator=generator), size=224, mode="bicubic")
    return (coarse + 0.1 * torch.randn(n, 1, 224, 224, generator=generator)).clamp(0, 1).expand(-1, 3, -1, -1)


def radius(x, picks):
    """Largest distance of a vector (n, d) to its nearest pick, by float64 differences for the farthest candidates."""
    import torch

    centres = x[picks]
    nearest = [torch.cdist(part, centres).min(1) for part in x.split(4096)]
    near, owner = (torch.cat(parts) for parts in zip(*nearest, strict=True))
    far = near.topk(min(100, len(x))).indices
    return float((x[far].double() - centres[owner[far]].double()).norm(dim=1).max())


def timed(function, *args):
    begin = time.perf_counter()
    result = function(*args)
    return result, time.perf_counter() - begin


def ours(task, **request):
    if task == "bank":
        return our_bank(**request)
    return our_limits(**request) if task == "limits" else our_coreset(**request)


def our_coreset(kind, n, size):
    from zoo.nn.coreset import greedy_coreset

    x = vectors(kind, n)
    (picks, _), seconds = timed(greedy_coreset, x, size)
    return {"seconds": seconds, "radius": radius(x, picks), "checksum": float(x[-1].double().sum())}


def our_limits(kind, n, size):
    """Products of one coreset, GFLOP; the rates of products and of reading on this machine, GFLOP/s and GB/s."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from zoo.nn.coreset import TILE, greedy_coreset

    x = vectors(kind, n)
    with FlopCounterMode(display=False) as counter:
        greedy_coreset(x, size)
    a, b = x[:TILE], x[-TILE:]
    product = statistics.median(timed(torch.mm, a, b.T)[1] for _ in range(9))
    read = statistics.median(timed(torch.sum, x)[1] for _ in range(5))
    return {
        "gflop": counter.get_total_flops() / 1e9,
        "gflops": 2 * len(a) * len(b) * DIMS / product / 1e9,
        "gbytes_per_s": x.nbytes / read / 1e9,
        "gbytes": x.nbytes / 1e9,
    }


def our_bank(backbone, n, size):
    import torch

    from zoo.methods import create_model
    from zoo.module import Batch
    from zoo.nn.features import architecture_only

    torch.manual_seed(0)
    arguments = {"embedding": "concat", "bank_size": size}
    if backbone == LITE0:
        model = create_model("patchcore", "lite", **arguments)
    else:
        with architecture_only():
            model = create_model("patchcore", "paper224", backbone=backbone, **arguments)

    @torch.no_grad()
    def build():
        for first, batch in enumerate(images(n).split(8)):
            model.observe(Batch(batch, [f"{first}-{i}" for i in range(len(batch))]))
        model.finish()

    model.eval()
    model.num_train_images = n
    _, seconds = timed(build)
    return {"seconds": seconds, "bank": list(model.bank.shape)}


def peer(task, **request):
    return peer_bank(**request) if task == "bank" else peer_coreset(**request)


def peer_coreset(kind, n, size):
    import torch
    from anomalib.models.components.sampling import KCenterGreedy

    torch.manual_seed(0)
    x = vectors(kind, n)
    sampler = KCenterGreedy(x, size / n)
    sampler.coreset_size = size  # a ratio may be rounded to one less
    picks, seconds = timed(sampler.select_coreset_idxs)
    return {"seconds": seconds, "radius": radius(x, picks), "checksum": float(x[-1].double().sum())}


def peer_bank(backbone, n, size):
    import torch
    from anomalib.models.image.patchcore.torch_model import PatchcoreModel
    from peer_anomalib import backbone_weights

    torch.manual_seed(0)
    model = PatchcoreModel(backbone=backbone, layers=LAYERS[backbone], pre_trained=False)
    if backbone == LITE0:
        model.feature_extractor.feature_extractor.load_state_dict(backbone_weights(), strict=False)
    mean, std = (torch.tensor(values)[:, None, None] for values in MEAN_STD[backbone])

    @torch.no_grad()
    def build():
        for batch in images(n).split(8):
            model((batch - mean) / std)
        model.subsample_embedding((size + 0.5) / (n * PATCHES))

    model.train()
    _, seconds = timed(build)
    return {"seconds": seconds, "bank": list(model.memory_bank.shape)}


def asked(stack, rounds, warm, **request):
    """Median seconds, and the last answer, of each side; asked in turns after a small request that warms up."""
    for side in stack.values():
        side.ask(**(request | warm))
    answers = {name: [] for name in stack}
    for _ in range(rounds):
        for name, side in stack.items():
            answers[name].append(side.ask(**request))
    return {name: found[-1] | {"seconds": sides.median_of(found, "seconds")} for name, found in answers.items()}


def section(pythons, quick=False):
    n, size, rounds = (7840, 157, 3) if quick else (78_400, 1568, 2)
    rows, notes = [], []
    script = "coreset.py"
    with sides.Side(pythons["ours"], script, "ours") as mine, sides.Side(pythons["peer"], script, "peer") as theirs:
        both = {"ours": mine, "peer": theirs}
        for kind in ("normal", "clusters"):
            small = {"n": 4096, "size": 64}
            answers = asked(both, rounds, small, task="coreset", kind=kind, n=n, size=size)
            a, b = answers["ours"], answers["peer"]
            if not math.isclose(a["checksum"], b["checksum"], rel_tol=1e-6, abs_tol=1e-6):
                raise RuntimeError(f"the two sides have drawn other vectors: {answers}")
            rows.append(row(f"coreset, {kind}: {n:,} x {DIMS} -> {size:,}", a["seconds"], b["seconds"], "s", 20))
            rows.append(row(f"coreset, {kind}: covering radius", a["radius"], b["radius"], "distance", 1))
            limits = mine.ask(task="limits", kind=kind, n=n, size=size)
            notes.append(bound(kind, n, size, a["seconds"], limits))
        for backbone in LAYERS:
            count = n // PATCHES
            answers = asked(both, rounds, {"n": 8, "size": 64}, task="bank", backbone=backbone, n=count, size=size)
            a, b = answers["ours"], answers["peer"]
            if a["bank"] != b["bank"]:
                raise RuntimeError(f"the banks of the two sides differ in shape: {answers}")
            rows.append(
                row(f"PatchCore bank, {backbone}: {count} images -> {size:,}", a["seconds"], b["seconds"], "s", 1)
            )
    return {"rows": rows, "notes": notes}


def row(name, mine, theirs, unit, wanted):
    return {"name": name, "ours": mine, "peer": theirs, "ratio": theirs / mine, "unit": unit, "wanted": wanted}


def bound(kind, n, size, seconds, limits):
    floor = limits["gflop"] / limits["gflops"] + limits["gbytes"] / limits["gbytes_per_s"]
    whole = 2 * n * size * DIMS / 1e9
    return (
        f"Coreset, {kind}: {limits['gflop']:.0f} GFLOP of products ({limits['gflop'] / whole:.0%} of the {whole:.0f} "
        f"that all distances to all picks take) at {limits['gflops']:.0f} GFLOP/s in float32, and one read of "
        f"{limits['gbytes']:.2f} GB at {limits['gbytes_per_s']:.1f} GB/s, would take {floor:.2f} s; "
        f"measured {seconds:.2f} s, {floor / seconds:.0%} of the limit."
    )


SIDES = {"ours": ours, "peer": peer}
if __name__ == "__main__":
    sides.serve(SIDES)
