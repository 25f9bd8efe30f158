"""Exact k-center coresets against the plain loop; `python tests/bench/coreset_speed.py` writes coreset_speed.json."""

import argparse
import json
import os
import time
from pathlib import Path

import torch

from zoo.nn.coreset import greedy_coreset


def plain_coreset(vectors, k, start):
    """One pass over all vectors a pick, as anomalib's KCenterGreedy does it."""
    indices, distance = [start], torch.full((len(vectors),), torch.inf)
    while True:
        new = torch.linalg.norm(vectors - vectors[indices[-1]][None], dim=1)
        distance = torch.minimum(distance, new)
        if len(indices) == k:
            return torch.tensor(indices), float(distance.max())
        indices.append(int(distance.argmax()))


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
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    record = {"vectors": args.vectors, "dims": args.dims, "size": args.size, "project_to": args.project_to}
    record |= {"torch": torch.__version__, "cpus": os.cpu_count(), "threads": torch.get_num_threads(), "data": {}}
    for kind in ("normal", "clusters", "relu"):
        vectors = make(kind, args.vectors, args.dims)
        _, _, before = timed(greedy_coreset, vectors, args.size, start=0)
        theirs, plain_radius, plain_seconds = timed(plain_coreset, vectors, args.size, 0)
        ours, radius, after = timed(greedy_coreset, vectors, args.size, start=0)
        _, projected_radius, projected_seconds = timed(
            greedy_coreset, vectors, args.size, start=0, project_to=args.project_to
        )
        record["data"][kind] = row = {
            "plain_seconds": plain_seconds,
            "seconds": [before, after],  # before and after the plain loop
            "ratio": plain_seconds / max(before, after),
            "radius": radius,
            "radius_ratio": radius / plain_radius,
            "same_picks": int((ours == theirs).sum()),
            "projected_seconds": projected_seconds,
            "projected_radius_ratio": projected_radius / radius,
        }
        print(kind, json.dumps(row), flush=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
