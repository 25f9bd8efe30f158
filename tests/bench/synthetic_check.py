"""The built-in synthetic set, measured: speed, grey levels, plain numbers, PatchCore and PaDiM by kind of defect.

    python tests/bench/synthetic_check.py            # all: about 10 minutes on two cores
    python tests/bench/synthetic_check.py --only speed statistics plain sheet

Writes synthetic_check.json (parts that were not asked for are kept), synthetic_sheet.png and synthetic_histogram.png
beside this file. A plain number must not find defects: max(AUROC, 1 - AUROC) <= 0.62 overall and for each kind.
"""

import argparse
import io
import json
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from scipy.ndimage import binary_dilation
from sklearn.metrics import roc_auc_score

from zoo.data.synthetic import KINDS, STYLES, load_synthetic, render

HERE = Path(__file__).parent
MIIC = {"mean": 94.1, "std": 41.3, "range": [34, 192], "pitch": 51}  # METHODS 2, measured by a third party at 512
FOUND = 0.9  # image AUROC from which a setting finds a kind of defect
RUNS = [("patchcore", 224, 0), ("patchcore", 224, 1), ("patchcore", 224, 2), ("patchcore", 448, 0), ("padim", 224, 0)]


def seconds_of(indices):
    """Render these images at 512, good and defective in turn; seconds."""
    start = time.perf_counter()
    for i in indices:
        render(i, size=512, kind=(None, KINDS[i // 2 % len(KINDS)])[i % 2])
    return time.perf_counter() - start


def speed(count=280):
    """Images a second at 512 x 512 of two processes, of which half are defective; the start of the processes aside."""
    with get_context("spawn").Pool(2) as pool:
        pool.map(seconds_of, [range(8)] * 2, chunksize=1)
        found = []
        for _ in range(3):
            start = time.perf_counter()
            pool.map(seconds_of, [range(count), range(count, 2 * count)], chunksize=1)
            found.append(2 * count / (time.perf_counter() - start))
    return {"images_per_second_two_processes": [round(rate, 1) for rate in found]}


def pitch_of(image):
    """Pixels from line to line across the main direction, from a smoothed profile's upward crossings of its middle."""
    image = image.astype(float)
    vertical = image.mean(0).std() > image.mean(1).std()
    apart = []
    for band in np.array_split(image if vertical else image.T, 16):
        profile = np.convolve(band.mean(0), np.ones(5) / 5, "valid")
        middle = (np.quantile(profile, 0.05) + np.quantile(profile, 0.9)) / 2
        apart.extend(np.diff(np.flatnonzero(np.diff((profile > middle).astype(int)) == 1)))
    return np.median(apart) if apart else np.nan


def statistics(count=200):
    """Grey levels of normal images at 512, as METHODS 2 has them for MIIC."""
    report = {"miic": MIIC}
    for style in STYLES:
        images = np.stack([render(i, size=512, style=style)[0] for i in range(count)])
        levels = np.bincount(images.ravel(), minlength=256) / images.size
        smooth = np.convolve(levels, np.ones(9) / 9, "same")
        modes = [i for i in range(5, 250) if smooth[i] == smooth[max(i - 14, 0) : i + 15].max() and smooth[i] > 1e-3]
        report[style] = {
            "mean": round(float(images.mean()), 1),
            "std": round(float(images.std()), 1),
            "share_in_34_to_192": round(float(levels[34:193].sum()), 4),
            "quantiles_0.1_1_50_99_99.9_percent": np.quantile(images, [0.001, 0.01, 0.5, 0.99, 0.999]).tolist(),
            "modes": modes,
            "pitch_median": float(np.nanmedian([pitch_of(image) for image in images])),
            "std_of_means": round(float(images.mean((1, 2)).std()), 1),
            "levels": [round(float(level), 5) for level in levels],
        }
    return report


def jpeg_size(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=90)
    return buffer.tell()


def numbers_of(image):
    grey = image.astype(np.float32)
    energy = np.mean(np.square(np.diff(grey, axis=0))) + np.mean(np.square(np.diff(grey, axis=1)))
    return [image.mean(), image.std(), image.min(), image.max(), energy, jpeg_size(image)]


def plain(sizes=(224, 512), seeds=(0, 1)):
    """AUROC, or 1 - AUROC where that is higher, of plain numbers on 500 good and 500 defective images."""
    report = {}
    for size in sizes:
        for seed in seeds:
            test = load_synthetic(train=1, good=500, defect=500, size=size, seed=seed)["test"]
            rows = [(numbers_of(row["image"]), row["path"].split("/")[1]) for row in test]
            numbers, kinds = np.array([row[0] for row in rows]), np.array([row[1] for row in rows])
            found = {}
            for group in ("all", *KINDS):
                chosen = (kinds == "good") | (kinds == group) | (group == "all")
                rocs = [roc_auc_score(kinds[chosen] != "good", column) for column in numbers[chosen].T]
                names = ("mean", "std", "min", "max", "gradient", "jpeg")
                found[group] = {n: round(max(roc, 1 - roc), 3) for n, roc in zip(names, rocs, strict=True)}
            found["highest"] = max(max(group.values()) for group in found.values())
            report[f"{size}, seed {seed}"] = found
    return report


def models(runs=RUNS):
    """Image AUROC of fitted models (preset lite), overall and of each kind against all good images."""
    from zoo.evaluation import evaluate
    from zoo.fit import fit

    report = []
    for method, size, seed in runs:
        start = time.perf_counter()
        data = f"synthetic:train=556,good=250,defect=250,size={size},seed={seed}"
        arguments = {"input_size": size} | ({"bank_size": 5000} if method == "patchcore" else {})
        model, record = fit(method, data, preset="lite", arguments=arguments)
        metrics = evaluate(model, data, record)["metrics"]
        kinds = np.array([path.split("/")[-2] for path, _, _ in model.scored])
        scores = np.array([float(score) for _, _, score in model.scored])
        by_kind = {}
        for kind in KINDS:
            chosen = (kinds == "good") | (kinds == kind)
            by_kind[kind] = round(roc_auc_score(kinds[chosen] == kind, scores[chosen]), 3)
        report.append(
            {"method": method, "size": size, "seed": seed, "seconds": round(time.perf_counter() - start, 1)}
            | {"image_auroc": round(roc_auc_score(kinds != "good", scores), 4), "by_kind": by_kind}
            | {"metrics": {name: round(float(value), 4) for name, value in metrics.items()}}
        )
        print(report[-1], flush=True)
    return report


def found(models):
    """For each kind the settings that find it: some, and not all."""
    settings = {
        kind: [f"{m['method']} {m['size']}, seed {m['seed']}" for m in models if m["by_kind"][kind] >= FOUND]
        for kind in KINDS
    }
    patchcore = [m["image_auroc"] for m in models if (m["method"], m["size"]) == ("patchcore", 224)]
    return {
        "limit": FOUND,
        "settings": settings,
        "each_by_some_none_by_all": all(0 < len(names) < len(models) for names in settings.values()),
        "patchcore_in_0.85_to_0.99": len(patchcore) == 3 and all(0.85 <= auroc <= 0.99 for auroc in patchcore),
    }


def outlined(image, mask):
    """(S, S, 3), a thin line around the mask."""
    shown = np.stack([image] * 3, -1)
    near = binary_dilation(mask, iterations=5)
    shown[binary_dilation(near) & ~near] = (255, 90, 0)
    return shown


def sheet(size=192, columns=6):
    """24 samples: normal images, each kind of defect outlined, the second style and info bars."""
    cells = [(i, None, {}) for i in range(8)] + [(100 + i, KINDS[i % 7], {}) for i in range(11)]
    cells += [(i, None, {"style": "fine"}) for i in (20, 21)] + [(22, "open", {"style": "fine"})]
    cells += [(23, None, {"bar": True}), (24, "particle", {"bar": True})]
    tiles = []
    for index, kind, options in cells:
        image, mask = render(index, size=2 * size, kind=kind, **options)
        small = Image.fromarray(outlined(image, mask)).resize((size, size), Image.Resampling.BOX)
        tiles.append(np.pad(np.asarray(small), ((2, 2), (2, 2), (0, 0)), constant_values=255))
    rows = [np.concatenate(tiles[i : i + columns], axis=1) for i in range(0, len(tiles), columns)]
    picture = Image.fromarray(np.concatenate(rows)).quantize(128, dither=Image.Dither.NONE)
    picture.save(HERE / "synthetic_sheet.png", optimize=True)
    return {"bytes": (HERE / "synthetic_sheet.png").stat().st_size}


def histogram(statistics):
    """Grey levels of both styles beside MIIC's figures."""
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axis = figure.subplots()
    for style in STYLES:
        found = statistics[style]
        label = f"{style}: mean {found['mean']}, std {found['std']}, pitch {found['pitch_median']:.0f} px"
        axis.plot(found["levels"], label=label)
    low, high = MIIC["range"]
    axis.axvspan(low, high, color="0.92", label=f"MIIC: {low} to {high}, two modes, pitch {MIIC['pitch']} px")
    axis.axvline(MIIC["mean"], color="k", lw=1, label=f"MIIC: mean {MIIC['mean']}, std {MIIC['std']} (bar)")
    top = max(found["levels"])
    axis.plot([MIIC["mean"] - MIIC["std"], MIIC["mean"] + MIIC["std"]], [top * 1.05] * 2, "k|-", lw=1)
    axis.set(xlabel="grey level", ylabel="share of pixels", xlim=(0, 255), ylim=(0, None))
    axis.legend(fontsize=8, frameon=False)
    figure.savefig(HERE / "synthetic_histogram.png", dpi=100)


def main():
    parts = {"speed": speed, "statistics": statistics, "plain": plain, "models": models, "sheet": sheet}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts))
    path = HERE / "synthetic_check.json"
    report = json.loads(path.read_text()) if path.exists() else {}
    for part in parser.parse_args().only:
        report[part] = parts[part]()
        shown = {k: v for k, v in report[part].items() if k != "levels"} if isinstance(report[part], dict) else ""
        print(part, json.dumps(shown, indent=1) if part != "statistics" else "", flush=True)
        path.write_text(json.dumps(report) + "\n")
    if "models" in report:
        report["found"] = found(report["models"])
        path.write_text(json.dumps(report) + "\n")
    if "statistics" in report:
        histogram(report["statistics"])


if __name__ == "__main__":
    main()
