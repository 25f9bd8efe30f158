"""From nothing to the first heatmap: whole new processes, ours and the peer's in turns, files in the disk cache.

A process starts Python, imports what it needs, loads a model from a local file, scores a PNG of 224 x 224 and ends:
    ours  zoo.from_pretrained(FOLDER).predict(IMAGE), of a model that `zoo fit METHOD --preset lite` has written
    peer  anomalib.deploy.TorchInferencer(FILE).predict(IMAGE), of a model that its own export (`to_torch`) has written
Both have the same method, backbone (tf_efficientnet_lite0 with the same weights), layers and, of PatchCore, bank size;
the peer's is fitted to less, which changes no shape. Further rows are parts of the same (imports, the model alone), and
the command line. "cpu" is the processor time of the process: it holds where other work is on the machine. The notes
have what the imports of libraries take that both sides share: that much is not ours to save.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # for peer_anomalib

from sides import THREADS, Side, serve

HEATMAP = {
    "ours": "import zoo; zoo.from_pretrained({model!r}).predict({image!r})",
    "peer": "from anomalib.deploy import TorchInferencer as T; T({model!r}, device='cpu').predict({image!r})",
}
MODEL = {
    "ours": "import zoo; zoo.from_pretrained({model!r})",
    "peer": "from anomalib.deploy import TorchInferencer as T; T({model!r}, device='cpu')",
}
MODULES = {"ours": "import zoo.methods.padim", "peer": "import anomalib.models"}
FACE = {"ours": "import zoo", "peer": "import anomalib"}
COMMAND = {
    "ours": "from zoo.cli import main; main(['predict', {model!r}, {image!r}, '--out', {out!r}])",
    "peer": HEATMAP["peer"],
}
HELP = {
    "ours": "import sys; from zoo.cli import main; sys.exit(main(['--help']))",
    "peer": "import sys; sys.argv = ['anomalib', '--help']; from anomalib.cli.cli import main; main()",
}
LIBRARIES = ("torch", "torch, torchvision", "torch, torchmetrics", "torch, lightning", "torch, lightning, timm")


def section(pythons: dict[str, str], quick: bool) -> dict[str, Any]:
    rounds = 2 if quick else 9
    with tempfile.TemporaryDirectory() as folder:
        image = str(Path(folder, "image.png"))
        rows = []
        for method in ["padim"] if quick else ["padim", "patchcore"]:
            asked = {"folder": folder, "method": method, "image": image}
            given: dict[str, dict[str, Any]] = {}
            for side, python in pythons.items():
                with Side(python, "cold.py", side) as process:
                    given[side] = process.ask(**asked, **given.get("ours", {}))
            places = {side: {"model": given[side]["model"], "image": image} for side in pythons}
            places["ours"]["out"] = str(Path(folder, "out"))
            what = [(f"first heatmap, {method}", HEATMAP, 3.0), (f"model alone, {method}", MODEL, None)]
            if quick:
                what = what[:1]
            elif method == "padim":
                what += [("zoo predict beside its inferencer", COMMAND, None), ("--help", HELP, None)]
                what += [("import of a method", MODULES, None), ("import alone", FACE, None)]
            rows += [_row(pythons, name, programs, places, rounds, wanted) for name, programs, wanted in what]
    return {"rows": rows, "notes": _floor(pythons["ours"], rounds)}


def _row(
    pythons: dict[str, str],
    name: str,
    programs: dict[str, str],
    places: dict[str, dict[str, str]],
    rounds: int,
    wanted: float | None,
) -> dict[str, Any]:
    times: dict[str, list[tuple[float, float]]] = {side: [] for side in pythons}
    for i in range(rounds + 1):
        for side, python in pythons.items():
            found = _run(python, programs[side].format(**places[side]))
            if i:  # the first ones bring the files into the cache
                times[side].append(found)
    (ours, ours_cpu), (peer, peer_cpu) = (map(statistics.median, zip(*times[s], strict=True)) for s in ("ours", "peer"))
    row = {"name": name, "ours": ours, "peer": peer, "ratio": peer / ours, "unit": "s", "wanted": wanted}
    return row | {"ours_cpu": ours_cpu, "peer_cpu": peer_cpu, "ratio_cpu": peer_cpu / ours_cpu}


def _run(python: str, program: str) -> tuple[float, float]:
    """Seconds, and seconds of processor, of a new process."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    environment |= {"OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1", "TRUST_REMOTE_CODE": "1"}
    before, start = os.times(), time.perf_counter()
    done = subprocess.run([python, "-c", program], env=environment, capture_output=True, text=True)
    seconds, after = time.perf_counter() - start, os.times()
    if done.returncode:
        raise RuntimeError(f"{program}\n{done.stderr}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return seconds, cpu


def _floor(python: str, rounds: int) -> list[str]:
    """What the libraries alone take."""
    notes = []
    for names in LIBRARIES:
        times = [_run(python, f"import {names}") for _ in range(rounds)]
        seconds, cpu = (statistics.median(column) for column in zip(*times, strict=True))
        notes.append(f"import {names}: {seconds:.2f} s, of processor {cpu:.2f} s")
    return notes


def save_ours(folder: str, method: str, image: str) -> dict[str, Any]:
    """A model of preset lite, and the image."""
    import numpy as np
    from PIL import Image

    from zoo import from_pretrained
    from zoo.cli import main

    os.environ["ZOO_HOME"] = folder
    assert main(["fit", method, "--preset", "lite", "--data", "synthetic", "--name", method]) == 0
    pixels = np.random.default_rng(0).integers(0, 256, (224, 224), dtype=np.uint8)
    Image.fromarray(pixels).save(image)
    model = from_pretrained(method)
    bank = len(model.bank) if method == "patchcore" else None
    return {"model": str(Path(folder, "models", method)), "bank": bank}


def save_peer(folder: str, method: str, image: str, model: str, bank: int | None) -> dict[str, Any]:
    """The same method on the same backbone, as anomalib exports it."""
    import torch
    from anomalib.models import Padim, Patchcore
    from peer_anomalib import BACKBONE, LAYERS, backbone_weights

    kind, options = (Patchcore, {}) if method == "patchcore" else (Padim, {"n_features": 100})
    options |= {"pre_processor": kind.configure_pre_processor((224, 224)), "pre_trained": False}
    peer = kind(backbone=BACKBONE, layers=list(LAYERS[method]), **options)
    peer.model.feature_extractor.feature_extractor.load_state_dict(backbone_weights(), strict=False)
    peer.model.train()
    images = torch.rand(8, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        peer.model(images)
        if method == "patchcore":
            peer.model.subsample_embedding(0.001)
            peer.model.memory_bank = torch.rand(bank, peer.model.memory_bank.shape[1])
        else:
            peer.model.fit()
    return {"model": str(peer.eval().to_torch(Path(folder, f"peer-{method}")))}


SIDES = {"ours": save_ours, "peer": save_peer}

if __name__ == "__main__":
    serve(SIDES)
