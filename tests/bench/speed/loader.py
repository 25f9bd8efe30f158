"""Section 6: the share of a fit in which it waits for images, and the loader alone beside the peer's.

Images are 512 x 512, 8-bit PNG and 16-bit TIFF, in a folder. Waiting is the time inside the training loop's `next` on
the loader, held-out images included, over that of the whole `zoo.fit.fit` with preset lite. Alone: one pass over the
training images as the data module of either gives them, at their own size, in batches of 8, with its own default of
workers (the peer's is 8 processes; ours a thread on a CPU); on two cores a pass includes the start of these.
"""

import tempfile
import time
from pathlib import Path

import sides

SIZE, BATCH = 512, 8
STEPS = 60
WAIT = 0.05  # share of a fit


def write_images(folder, count, kind):
    """Grey texture with noise, of 8 bits as PNG or of 16 bits as TIFF."""
    import numpy as np
    from PIL import Image

    (folder / "good").mkdir(parents=True)
    for i in range(count):
        rng = np.random.default_rng(i)
        coarse = Image.fromarray(rng.integers(40, 215, (14, 14), dtype=np.uint8)).resize((SIZE, SIZE), Image.BICUBIC)
        noisy = (np.asarray(coarse) + rng.normal(0, 8, (SIZE, SIZE))).clip(0, 255) / 255
        pixels = (noisy * 255).astype(np.uint8) if kind == "png" else (noisy * 65535).astype(np.uint16)
        Image.fromarray(pixels).save(folder / "good" / f"{i:04d}.{kind}")


def ours(task, data, method=None):
    from zoo.data import check_data, load_data
    from zoo.data.datamodule import AnomalyDataModule
    from zoo.data.loader import EpochLoader
    from zoo.fit import fit

    if task == "alone":
        module = AnomalyDataModule(load_data(check_data(data)), batch_size=BATCH, hold_out=0)
        return passed(module.train_dataloader(), lambda batch: len(batch.name))
    waits, plain = [], EpochLoader.__iter__

    def watched(loader):
        batches = plain(loader)
        while True:
            begin = time.perf_counter()
            batch = next(batches, None)
            waits.append(time.perf_counter() - begin)
            if batch is None:
                return
            yield batch

    EpochLoader.__iter__ = watched
    options = {"arguments": {"bank_size": 1000}} if method == "patchcore" else {}
    options |= {"trainer_options": {"max_steps": STEPS}} if method == "stfpm" else {}
    begin = time.perf_counter()
    fit(method, data, preset="lite", data_options={"batch_size": BATCH}, **options)
    whole = time.perf_counter() - begin
    EpochLoader.__iter__ = plain
    return {"seconds": whole, "share": sum(waits) / whole}


def peer(task, data):
    from anomalib.data import Folder

    module = Folder(
        name="loader",
        root=data,
        normal_dir="good",
        train_batch_size=BATCH,
        test_split_mode="none",
        val_split_mode="none",
    )
    module.setup()
    return passed(module.train_dataloader(), lambda batch: len(batch.image))


def passed(loader, size):
    begin = time.perf_counter()
    count = sum(size(batch) for batch in loader)
    return {"milliseconds": 1000 * (time.perf_counter() - begin) / count}


def section(pythons, quick=False):
    count = 48 if quick else 400
    rows = []
    with tempfile.TemporaryDirectory() as place:
        folders = {kind: Path(place, kind) for kind in ("png", "tiff")}
        for kind, folder in folders.items():
            write_images(folder, count, kind)
        with sides.Side(pythons["ours"], "loader.py", "ours") as side:
            side.ask(task="fit", method="padim", data=str(folders["png"]))
            for kind, folder in folders.items():
                for method in ("padim", "patchcore", "stfpm"):
                    answer = side.ask(task="fit", method=method, data=str(folder))
                    name = f"{method} fit of {count} {kind.upper()}: share of waiting, of {WAIT}"
                    rows.append(
                        {"name": name, "ours": answer["share"], "peer": None, "ratio": None} | {"unit": "share"}
                    )
                    rows[-1] |= {"ratio": WAIT / max(answer["share"], 1e-3), "wanted": 1}
        for kind, folder in folders.items():
            found = sides.in_turns(pythons, "loader.py", 1 if quick else 3, task="alone", data=str(folder))
            a, b = (sides.median_of(found[name], "milliseconds") for name in ("ours", "peer"))
            rows.append({"name": f"loader alone, {kind.upper()}", "ours": a, "peer": b, "ratio": b / a})
            rows[-1] |= {"unit": "ms an image", "wanted": None}
    return {"rows": rows, "notes": [f"A fit is to wait for less than {WAIT:.0%} of its time."]}


SIDES = {"ours": ours, "peer": peer}
if __name__ == "__main__":
    sides.serve(SIDES)
