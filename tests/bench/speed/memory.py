"""Section 3: peak memory of a fit as the number of images grows, beside the peer's.

Each fit is a process of its own that reads the same folder of 224 x 224 images, with tf_efficientnet_lite0's real
weights, the same layers, batches of 8 and no worker processes. Ours is `zoo fit`, as a user calls it, with the model
saved; the peer's is its Engine and Folder data module, likewise with its checkpoint. Both hold out a tenth of the
images (ours at least 20). Our bank has 500 vectors, the peer's nine tenths of that: its loop would take hours at its
default. The peak is the kernel's, of the resident set; growth is that from the fewest to the most images.
"""

import sys
import tempfile
from contextlib import chdir
from pathlib import Path

sys.path.insert(1, str(Path(__file__).parents[1]))
import sides  # noqa: E402

LITE0 = "tf_efficientnet_lite0"
BANK, BATCH = 500, 8
PATCHES = 28 * 28
FLAT = 64  # MiB that a fit of ours may grow by


def peak_mib():
    """Of this process alone; ru_maxrss would begin with that of the one that started it."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def write_images(folder, count):
    """Grey texture with noise, as 8-bit PNG."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True)
    for i in range(count):
        rng = np.random.default_rng(i)
        coarse = Image.fromarray(rng.integers(40, 215, (14, 14), dtype=np.uint8)).resize((224, 224), Image.BICUBIC)
        noisy = np.asarray(coarse) + rng.normal(0, 8, (224, 224))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{i:04d}.png")


def ours(method, data, home):
    import os

    os.environ["ZOO_HOME"] = home
    from zoo.cli import main

    options = ["--bank-size", str(BANK)] if method == "patchcore" else []
    options += ["--preset", "lite", "--batch-size", str(BATCH), "--num-workers", "0", "--name", "memory"]
    code = main(["fit", method, "--data", data, *options])
    if code:
        raise RuntimeError(f"zoo fit ended with code {code}")
    return {"peak": peak_mib()}


def peer(method, data, home):
    from anomalib.data import Folder
    from anomalib.engine import Engine
    from anomalib.models import Padim, Patchcore
    from peer_anomalib import LAYERS, backbone_weights
    from torchvision.transforms.v2 import Compose, Normalize, Resize

    count = len(list(Path(data, "good").iterdir()))
    kind, options = Padim, {"n_features": 100}
    if method == "patchcore":
        kind, options = Patchcore, {"coreset_sampling_ratio": (BANK + 0.5) / (count * PATCHES)}
    model = kind(backbone=LITE0, layers=list(LAYERS[method]), pre_trained=False, **options)
    model.pre_processor.transform = Compose([Resize((224, 224), antialias=True), Normalize([0.5] * 3, [0.5] * 3)])
    model.model.feature_extractor.feature_extractor.load_state_dict(backbone_weights(), strict=False)
    images = Folder(
        name="memory",
        root=data,
        normal_dir="good",
        train_batch_size=BATCH,
        num_workers=0,
        test_split_mode="none",
        val_split_mode="from_train",
        val_split_ratio=0.1,
    )
    with chdir(home):
        engine = Engine(accelerator="cpu", devices=1, default_root_dir=home, logger=False)
        engine.fit(model=model, datamodule=images)
    return {"peak": peak_mib()}


def section(pythons, quick=False):
    counts = (20, 60) if quick else (200, 400, 800)
    rows = []
    with tempfile.TemporaryDirectory() as place:
        for count in counts:
            write_images(Path(place, str(count), "good"), count)
        for method in ("padim", "patchcore"):
            peaks = {name: [] for name in pythons}
            for count in counts:
                for name, python in pythons.items():
                    with sides.Side(python, "memory.py", name) as side, tempfile.TemporaryDirectory() as home:
                        answer = side.ask(method=method, data=str(Path(place, str(count))), home=home)
                    peaks[name].append(answer["peak"])
            for count, a, b in zip(counts, peaks["ours"], peaks["peer"], strict=True):
                rows.append(row(f"{method} fit, {count} images: peak", a, b, b / a, 1))
            a, b = (peaks[name][-1] - peaks[name][0] for name in ("ours", "peer"))
            name = f"{method} fit, {counts[0]} -> {counts[-1]} images: growth"
            rows.append(row(name, a, b, FLAT / max(a, 1), 1))
    return {"rows": rows, "notes": [f"The ratio of a growth is that of {FLAT} MiB, which ours may grow by, to ours."]}


def row(name, mine, theirs, ratio, wanted):
    return {"name": name, "ours": mine, "peer": theirs, "ratio": ratio, "unit": "MiB", "wanted": wanted}


SIDES = {"ours": ours, "peer": peer}
if __name__ == "__main__":
    sides.serve(SIDES)
