"""Exact k-center coresets against the plain loop; `python tests/bench/coreset_speed.py` writes coreset_speed.json."""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import torch

from zoo.nn.coreset import greedy_coreset


def plain_coreset(vectors, k, start, parts):
    """One pass over all vectors a pick, as anomalib's KCenterGreedy does it; yields after each of `parts` parts."""
    indices, distance = [start], torch.full((len(vectors),), torch.inf)
    for pick in range(1, k + 1):
        new = torch.linalg.norm(vectors - vectors[indices[-1]][None], dim=1)
        distance = torch.minimum(distance, new)
        if pick < k:
            indices.append(int(distance.argmax()))
        if pick * parts // k > (pick - 1) * parts // k:
            yield indices, distance


def make(kind, n, d):
    """Standard normal; 100 clusters with noise; correlated with a mean far from zero, as after a ReLU."""
    generator = torch.Generator().manual_seed(0)
    if kind == "relu":
        latent = torch.randn(n, 64, generator=generator) * torch.linspace(3, 0.1, 64)
        mixed = latent @ torch.randn(64, d, generator=generator) / 8
        return mixed.add_(torch.randn(n, d, generator=generator), alpha=0.2).add_(0.5).relu_()
    noise = torch.randn(n, d, generator=generator)
    if kind == "clusters":
        centres = 3 * torch.randn(100, d, generator=generator)
        noise += centres[torch.randint(100, (n,), generator=generator)]
    return noise


def timed(function, *args, **kwargs):
    begin = time.perf_counter()
    result = function(*args, **kwargs)
    return *result, time.perf_counter() - begin


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vectors", type=int, default=78_400)
    parser.add_argument("--dims", type=int, default=1536)
    parser.add_argument("--size", type=int, default=1568)
    parser.add_argument("--project-to", type=int, default=128)
    parser.add_argument("--parts", type=int, default=8, help="parts of the plain loop, between which ours runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    record = {"vectors": args.vectors, "dims": args.dims, "size": args.size, "project_to": args.project_to}
    record |= {"torch": torch.__version__, "cpus": os.cpu_count(), "threads": torch.get_num_threads(), "data": {}}
    for kind in ("normal", "clusters", "relu"):
        vectors = make(kind, args.vectors, args.dims)
        loop = plain_coreset(vectors, args.size, 0, args.parts)
        plain, exact, projected = [], [], []  # seconds, taken in turn, so that other load on the machine falls on all
        for _ in range(args.parts):
            theirs, distance, seconds = timed(next, loop)
            plain.append(seconds)
            ours, radius, seconds = timed(greedy_coreset, vectors, args.size, start=0)
            exact.append(seconds)
            _, projected_radius, seconds = timed(
                greedy_coreset, vectors, args.size, start=0, project_to=args.project_to
            )
            projected.append(seconds)
        record["data"][kind] = row = {
            "plain_seconds": sum(plain),
            "seconds": statistics.median(exact),
            "ratio": sum(plain) / statistics.mean(exact),  # the mean, as a sum over the plain loop's parts is one
            "radius": radius,
            "radius_ratio": radius / float(distance.max()),
            "same_picks": int((ours == torch.tensor(theirs)).sum()),
            "projected_seconds": statistics.median(projected),
            "projected_radius_ratio": projected_radius / radius,
            "plain_parts": plain,
            "runs": exact,
            "load": os.getloadavg()[0],
        }
        print(kind, json.dumps(row), flush=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
