"""Time the pixel metrics of many maps against scikit-learn's AUROC of the same pixels.

    python tests/bench/metrics_scale.py --maps 100 --batch 16

The maps stream: none is kept for our side. scikit-learn needs all pixels at once; --sklearn-part 0.1 gives it a tenth
and multiplies its time by ten (in its favour: sorting costs more than linear time).
"""

import argparse
import json
import resource
import time
from pathlib import Path

import torch
from sklearn.metrics import roc_auc_score

from zoo.metrics import AnomalyMetrics


def batches(maps: int, batch: int, size: int):
    """Smooth noise with a brighter rectangle in every 10th map; a function of the map's number alone."""
    for first in range(0, maps, batch):
        numbers = range(first, min(first + batch, maps))
        noise = torch.stack([torch.randn(1, 28, 28, generator=torch.Generator().manual_seed(i)) for i in numbers])
        scores = torch.nn.functional.interpolate(noise, size=(size, size), mode="bicubic").exp()  # (B, 1, H, W)
        mask = torch.zeros_like(scores, dtype=torch.bool)
        for row, i in enumerate(numbers):
            if i % 10 == 0:
                mask[row, :, size // 4 : size // 2, size // 3 : size // 2] = True
        scores[mask] *= 2
        yield scores, mask


def peak_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--maps", type=int, default=100)
    parser.add_argument("--size", type=int, default=512, help="height and width of a map in pixels")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--sklearn-part", type=float, default=1.0, help="part of the maps that scikit-learn gets")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    suite, seconds, state, before = AnomalyMetrics(), 0.0, 0, peak_mib()
    for scores, mask in batches(args.maps, args.batch, args.size):
        start = time.perf_counter()
        suite.update(scores.amax((1, 2, 3)), scores, mask.any((1, 2, 3)), mask)
        seconds += time.perf_counter() - start
        state = max(state, sum(t.nbytes for t in suite.image_tables + suite.pixel_tables))
    start = time.perf_counter()
    ours = suite.compute()
    seconds += time.perf_counter() - start
    print(f"maps {args.maps} of {args.size}x{args.size}, {args.maps * args.size**2 / 1e6:.1f} M pixels")
    print(
        f"zoo: all seven metrics  {seconds:8.2f} s, state {state / 1e6:.1f} MB, peak RSS {before} -> {peak_mib()} MiB"
    )

    part = round(args.maps * args.sklearn_part)
    scores, masks = (torch.cat(x).flatten().numpy() for x in zip(*batches(part, args.batch, args.size), strict=True))
    start = time.perf_counter()
    theirs = roc_auc_score(masks, scores)
    sklearn_seconds = (time.perf_counter() - start) * args.maps / part
    print(f"scikit-learn: AUROC only {sklearn_seconds:7.2f} s, from {part} maps, peak RSS {peak_mib()} MiB")
    print(f"ratio {sklearn_seconds / seconds:.1f}, AUROC {ours['pixel_auroc']:.9f} and {theirs:.9f}")
    if args.out:
        report = {"maps": args.maps, "size": args.size, "batch": args.batch, "limits": {"state_mb": 100, "ratio": 1}}
        report |= {"zoo_seconds": round(seconds, 2), "state_mb": round(state / 1e6, 1), "metrics": ours}
        report |= {"sklearn_seconds": round(sklearn_seconds, 2), "sklearn_maps": part, "sklearn_auroc": theirs}
        report["ratio"] = round(sklearn_seconds / seconds, 2)
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
