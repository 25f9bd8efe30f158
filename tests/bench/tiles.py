"""Large images in tiles: how a blended map agrees with that of the whole image, and what memory 4096 x 4096 takes.

python tests/bench/tiles.py --out tests/bench/tiles.json

Equality: a model is fitted on tiles of 256 pixels at their own scale; images of 512 x 512 are then scored in tiles and,
by the same weights with 512 as network input, as a whole. Differences are in standard deviations of the whole maps, by
the distance in pixels to the next edge of a tile that is not the image's. Methods are left out whose weights hold for
one input size alone.

Memory: `model.predict` of one 16-bit TIFF in tiles of 512 pixels, each in a fresh process; the peak of resident memory
by the side of the image. The image itself, its tensor, its map and the weights of the blend take 14 bytes a pixel, and
the tensor is copied once.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import tifffile
import torch

from zoo import record
from zoo.data import load_data
from zoo.data.rows import read_row
from zoo.fit import fit
from zoo.hub import from_pretrained, model_place
from zoo.methods import list_methods
from zoo.tiles import corners

ANY_INPUT = {
    "patchcore": ({"bank_size": 2000}, None),
    "cfa": ({}, {"max_steps": 30}),
    "stfpm": ({}, {"max_steps": 100}),
    "rd4ad": ({}, {"max_steps": 30}),
}
BANDS = ((0, 16), (16, 32), (32, 64), (64, 128))
SIDES = (1024, 2048, 4096)
DATA = "synthetic:train=60,good=4,defect=4,size=512,seed=3"


def equality(method):
    arguments, trainer = ANY_INPUT[method]
    model, _ = fit(method, DATA, None, "lite", {"input_size": 256, **arguments}, {"tile": 256}, trainer)
    images = torch.stack([model.view.tensor(read_row(row)[0]) for row in load_data(DATA)["test"]])
    with torch.inference_mode():
        tiled = model.score_images(images)
        model.size = (512, 512)
        whole = model(images)
    error = (tiled.map - whole.map).abs()[:, 0] / whole.map.std()  # (B, H, W)
    edges = torch.tensor([e for c in corners(512, 256) for e in (c, c + 256) if 0 < e < 512])
    side = ((torch.arange(512) + 0.5)[:, None] - edges).abs().amin(1)
    distance = torch.minimum(side[:, None], side)
    found = {}
    for low, high in BANDS:
        here = error[:, (distance >= low) & (distance < high)]
        found[f"{low} to {high} px"] = {"mean": float(here.mean()), "max": float(here.max())}
    return {"map_error": found, "score_error": ((tiled.image - whole.image).abs() / whole.image.abs()).tolist()}


def peak_mb(folder, image):
    code = (
        "import sys; from zoo.hub import from_pretrained; model = from_pretrained(sys.argv[1]); "
        "p = model.predict(sys.argv[2], tile=512); assert p.map.shape[0] == int(sys.argv[3]); "
        "status = open('/proc/self/status').read(); print(int(status.split('VmHWM:')[1].split()[0]) / 1024)"
    )  # not ru_maxrss, which a child takes over from its parent
    side = str(tifffile.imread(image).shape[0])
    start = time.perf_counter()
    run = subprocess.run([sys.executable, "-c", code, folder, image, side], check=True, capture_output=True, text=True)
    return float(run.stdout.split()[-1]), time.perf_counter() - start


def memory(method, place):
    arguments = {"bank_size": 2000} if method == "patchcore" else {}
    trainer = {"max_steps": 5} if method not in ("padim", "patchcore") else None
    data = "synthetic:train=40,good=1,defect=1,size=128"
    fit(method, data, "m", "lite", arguments, {"batch_size": 4}, trainer, home=place)
    found = {}
    for side in SIDES:
        image = np.random.default_rng(0).integers(0, 65535, (side, side), dtype=np.uint16)
        tifffile.imwrite(place / "image.tif", image)
        peak, seconds = peak_mb(str(model_place("m", place)), str(place / "image.tif"))
        found[f"{side} px"] = {"peak_mb": round(peak, 1), "seconds": round(seconds, 1)}
    assert from_pretrained(model_place("m", place)).method == method
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list_methods())
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    report = {"equality": {}, "memory": {}, **record.environment(torch.device("cpu"))}
    for method in options.methods:
        if method in ANY_INPUT:
            report["equality"][method] = equality(method)
            print(method, report["equality"][method], flush=True)
    for method in options.methods:
        with tempfile.TemporaryDirectory() as place:
            report["memory"][method] = memory(method, Path(place))
        print(method, report["memory"][method], flush=True)
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
