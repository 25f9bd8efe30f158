"""What fine-tuning on 20 images is worth, beside a fit on the same 20 and the model as it was.

    python tests/bench/finetune.py --boards FOLDER --out tests/bench/finetune.json [--methods ...] [--seeds 0 1]

Each method (preset lite) is fitted on 180 synthetic images in the style "metal". Then, on 20 images of the style "fine"
and on 20 of DeepPCB (an MVTec-style folder with masks), 5 of which are held out: the model as it was is evaluated, a
model that is fitted on the 20 from scratch, and one that is fine-tuned as `zoo finetune` does by default; of methods
with statistics also one in which the parent counts as all images that it is of (--parent-share null). The seed draws
the 20 images, the weights and what is held out. The parent takes 30 % of the preset's steps, at most 200; a fit from
scratch takes 200, as many as fine-tuning may. Images are seen at 224 pixels, by methods without a backbone at 128 or
64. Runs are added to the record.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from zoo.evaluation import evaluate
from zoo.finetune import finetune
from zoo.fit import fit
from zoo.hub import from_pretrained
from zoo.methods import list_methods, presets
from zoo.run import RunOptions

SIZES = {"fanogan": 64, "ganomaly": 128, "iad_inpainting": 128, "riad": 128}  # else 224
SHARE_OF_STEPS, MOST = 0.3, 200
IMAGES, HELD = 20, 5
PARENT = "synthetic:train=180,good=1,defect=1,size=224,seed={seed}"
FINE = "synthetic:train=20,good=60,defect=60,size=224,style=fine,seed={seed}"
FIGURES = ("image_auroc", "pixel_auroc", "pixel_ap", "pixel_aupro")


def write_boards(source, seed, out):
    """A folder with 20 of the normal boards to learn from, and the test images."""
    images = sorted((source / "train" / "good").iterdir())
    (out / "train" / "good").mkdir(parents=True)
    for i in np.random.default_rng(seed).permutation(len(images))[:IMAGES]:
        shutil.copy(images[i], out / "train" / "good")
    for part in ("test", "ground_truth"):
        shutil.copytree(source / part, out / part)
    return str(out)


def run_method(method, seed, boards, out):
    """All arms of one method and seed, in this process."""
    home = Path(tempfile.mkdtemp())
    run = RunOptions(say=lambda line: print("   ", line, flush=True))
    planned = presets(method, "lite").get("trainer")
    training = {"max_steps": min(MOST, round(SHARE_OF_STEPS * planned["max_steps"]))} if planned else {}
    scratch = {"max_steps": MOST} if planned else {}
    how = {
        "preset": "lite",
        "arguments": {"input_size": SIZES.get(method, 224), "seed": seed},
        "run": run,
        "home": home,
    }
    begin = time.perf_counter()
    _, first = fit(method, PARENT.format(seed=seed), "parent", trainer_options=training, **how)
    place, found = home / "models" / "parent", []
    targets = {
        "style fine": FINE.format(seed=seed + 1000),
        "DeepPCB": write_boards(boards, seed, home / "boards"),
    }
    shares = {"fine-tuned": 0.5, "fine-tuned, share null": None}
    for target, data in targets.items():

        def note(arm, model, record, seconds, data=data, target=target):
            figures = evaluate(model, data, record, bootstrap=0)["metrics"]
            row = {"method": method, "seed": seed, "target": target, "arm": arm, "seconds": round(seconds, 1)}
            row |= {key: figures[key] for key in FIGURES} | {"steps": record.get("training", {}).get("steps")}
            row |= {"kept_step": record.get("training", {}).get("selection", {}).get("step")}
            print(json.dumps(row), flush=True)
            found.append(row)

        note("as it was", from_pretrained(place), first, 0.0)
        start = time.perf_counter()
        options = {"data_options": {"hold_out": HELD}}
        model, record = fit(method, data, None, trainer_options=scratch, **options, **how)
        note("from scratch", model, record, time.perf_counter() - start)
        for arm, share in shares.items():
            if share is None and not model.learns_statistics:
                continue
            start = time.perf_counter()
            model, record = finetune(place, data, "child", **options, parent_share=share, run=run, home=home)
            note(arm, model, record, time.perf_counter() - start)
    shutil.rmtree(home)
    about = {"steps_of_parent": training.get("max_steps"), "seconds": round(time.perf_counter() - begin, 1)}
    versions = {key: first[key] for key in ("versions", "hardware")}
    out.write_text(json.dumps({"runs": found, "about": {method: about}, **versions}))


def table(runs):
    """Mean over the seeds of image ROC and PRO, by method and target."""
    arms = ("as it was", "from scratch", "fine-tuned", "fine-tuned, share null")
    lines = [f"| target | method | seeds | {' | '.join(arms)} | steps kept |", "|---" * (len(arms) + 4) + "|"]
    for target, method in sorted({(run["target"], run["method"]) for run in runs}):
        mine = [run for run in runs if (run["target"], run["method"]) == (target, method)]
        cells = []
        for arm in arms:
            pairs = [(run["image_auroc"], run["pixel_aupro"]) for run in mine if run["arm"] == arm]
            cells.append("{:.3f} / {:.3f}".format(*np.mean(pairs, 0)) if pairs else "-")
        kept = [str(run["kept_step"]) for run in mine if run["arm"] == "fine-tuned" and run["kept_step"] is not None]
        seeds = len({run["seed"] for run in mine})
        lines.append(f"| {target} | `{method}` | {seeds} | {' | '.join(cells)} | {', '.join(kept) or '-'} |")
    return "\n".join(lines)


def main():
    if sys.argv[1:2] == ["--one"]:
        method, seed, boards, out = sys.argv[2:]
        return run_method(method, int(seed), Path(boards), Path(out))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--boards", type=Path, required=True, help="folder of DeepPCB")
    parser.add_argument("--methods", nargs="+", default=list_methods())
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, help="record that the runs are added to")
    options = parser.parse_args()
    report = json.loads(options.out.read_text()) if options.out and options.out.exists() else {"runs": [], "about": {}}
    with tempfile.TemporaryDirectory() as temporary:
        for seed in options.seeds:
            for method in options.methods:
                one = Path(temporary) / "record.json"
                command = [sys.executable, __file__, "--one", method, str(seed), str(options.boards), str(one)]
                subprocess.run(command, check=True)
                new = json.loads(one.read_text())
                kept = [run for run in report["runs"] if (run["method"], run["seed"]) != (method, seed)]
                report |= new | {"runs": kept + new["runs"], "about": report["about"] | new["about"]}
                if options.out:
                    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report["runs"]))


if __name__ == "__main__":
    main()
