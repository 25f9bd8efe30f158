"""How well the streaming coreset covers a MIIC-sized set: its radius over all patches beside a random subset's.

    python tests/bench/scale_radius.py --cache FOLDER --out tests/bench/scale_radius.json

All patches of 23,888 synthetic images at 224 (lite0, layers of stride 8 and 16, 18.7 million vectors of 152 numbers, as
`zoo fit patchcore --preset lite` sees them) are written to a file of 11 GB once; the fit itself never does that. Then,
for each seed: the images come in another order, StreamingCoreset keeps 10,000 vectors; the greedy algorithm, exact,
chooses 10,000 of a random 200,000; and one pass over all patches measures the covering radius of both.
"""

import argparse
import json
import platform
import time
from pathlib import Path

import numpy as np
import torch

from zoo.data import load_data
from zoo.data.datamodule import AnomalyDataModule
from zoo.methods import create_model
from zoo.nn.coreset import StreamingCoreset, covering_radius, greedy_coreset

PATCHES = 28 * 28  # an image


def features(images, path):
    """Memory-mapped (images * PATCHES, D)."""
    done = path.with_suffix(".done")
    if not done.exists():
        model = create_model("patchcore", "lite").eval()
        data = load_data(f"synthetic:train={round(images / 0.9)},size=224")
        module = AnomalyDataModule(data, input_size=model.size)
        assert module.num_train_images == images
        shape = (images * PATCHES, model.width)
        vectors, first = np.lib.format.open_memmap(path, "w+", np.float32, shape), 0
        with torch.inference_mode():
            for batch in module.train_dataloader():
                patches = model.embed(batch.image).permute(0, 2, 3, 1).flatten(0, 2)
                vectors[first : first + len(patches)] = patches.numpy()
                first += len(patches)
        vectors.flush()
        done.touch()
    return np.load(path, mmap_mode="r")


def one_seed(vectors, bank_size, seed):
    images = len(vectors) // PATCHES
    rng = np.random.default_rng(seed)
    start = time.perf_counter()
    stream = StreamingCoreset(bank_size, 4 * bank_size, seed)
    for image in rng.permutation(images):
        first = image * PATCHES
        source = torch.full((PATCHES, 1), int(image))
        stream.add(torch.from_numpy(np.array(vectors[first : first + PATCHES])), source)
    bank, _ = stream.finish()
    seconds = {"stream": time.perf_counter() - start}

    start = time.perf_counter()
    rows = np.sort(rng.choice(len(vectors), 200_000, replace=False))
    subset = torch.from_numpy(np.array(vectors[rows]))
    index, radius = greedy_coreset(subset, bank_size, seed=seed)
    seconds["greedy"] = time.perf_counter() - start

    start = time.perf_counter()
    everything = torch.from_numpy(vectors)
    found = {
        "stream": covering_radius(everything, bank),
        "greedy_on_subset": covering_radius(everything, subset[index]),
    }
    seconds["radii"] = time.perf_counter() - start
    return {
        "seed": seed,
        "radius_over_all": found,
        "ratio": found["stream"] / found["greedy_on_subset"],
        "radius_over_subset": {"stream": covering_radius(subset, bank), "greedy_on_subset": radius},
        "radius_bound": stream.radius_bound,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=23_888)
    parser.add_argument("--bank-size", type=int, default=10_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cache", type=Path, required=True, help="folder for the file of all patches")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.cache.mkdir(parents=True, exist_ok=True)
    vectors = features(options.images, options.cache / f"patches-{options.images}.npy")
    report = {"images": options.images, "patches": len(vectors), "dimensions": vectors.shape[1], "seeds": []}
    report |= {"bank_size": options.bank_size, "threads": torch.get_num_threads(), "machine": platform.processor()}
    for seed in range(options.seeds):
        report["seeds"].append(one_seed(vectors, options.bank_size, seed))
        print(report["seeds"][-1], flush=True)
        if options.out:
            options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
