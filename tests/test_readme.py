"""No figure in the README without a record behind it."""

import json
from pathlib import Path

from bench import cost, fast, finetune
from bench.real_images import table

from zoo import paper
from zoo.methods import list_methods

ROOT = Path(__file__).parents[1]


def test_table_is_that_of_the_record():
    report = json.loads((ROOT / "tests/bench/real_images.json").read_text(encoding="utf-8"))
    assert all(found["runs"] for found in report.values()) and len(report) == 3
    assert table(report) in (ROOT / "README.md").read_text(encoding="utf-8")


def test_costs_are_those_of_the_record():
    report = json.loads((ROOT / "tests/bench/cost.json").read_text(encoding="utf-8"))
    assert {run["method"] for run in report["runs"]} == set(list_methods())
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert cost.table(report["runs"]) in readme
    assert report["images"] == cost.IMAGES and f"{cost.IMAGES:,} images" in readme
    assert report["assumed_flops"] == cost.RATE and f"{cost.RATE / 1e12:g} TFLOP/s" in readme


def test_false_alarms_are_those_of_the_record():
    report = json.loads((ROOT / "tests/bench/false_alarms.json").read_text(encoding="utf-8"))
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert ", ".join(f"`{method}`" for method in list(report["methods"])[:3]) in readme
    draws = {n: [run["by_n"][n] for run in report["methods"].values()] for n in ("299", "1000")}
    found = {n: [run[level]["exceeding"] for run in runs for level in ("image", "region")] for n, runs in draws.items()}
    assert max(map(max, found.values())) <= 0.064 == report["limit"]  # 5 %, and two standard errors of 1,000 draws
    found["quantile"] = [run["image, 99 % quantile"]["exceeding"] for runs in draws.values() for run in runs]
    for exceeding in found.values():
        assert f"{100 * min(exceeding):.1f} to {100 * max(exceeding):.1f} %" in readme


def test_tiles_are_those_of_the_record():
    report = json.loads((ROOT / "tests/bench/tiles.json").read_text(encoding="utf-8"))
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    sides = [{side: run[f"{side} px"]["peak_mb"] for side in (1024, 4096)} for run in report["memory"].values()]
    peaks, more = [run[4096] for run in sides], [run[4096] - run[1024] for run in sides]
    assert len(sides) == len(list_methods())
    assert f"{min(peaks):,.0f} to {max(peaks):,.0f} MB at the peak" in readme
    assert f"{min(more):.0f} to {max(more):.0f} MB more than" in readme
    errors = {method: run["map_error"] for method, run in report["equality"].items()}
    far = {method: bands.pop("64 to 128 px") for method, bands in errors.items()}
    assert max(far["patchcore"]["max"], far["stfpm"]["max"]) <= 1e-5
    assert f"by {far['cfa']['max']:.3f} with `cfa`" in readme
    assert f"by {far['rd4ad']['mean']:.2f} in the mean and {far['rd4ad']['max']:.2f} at most" in readme
    near = [band["mean"] for bands in errors.values() for band in bands.values()]
    assert f"by {min(near):.2f} to {max(near):.2f} in the mean" in readme
    assert max(error for run in report["equality"].values() for error in run["score_error"]) <= 0.03


def test_bars_are_those_of_the_record():
    report = json.loads((ROOT / "tests/bench/bars.json").read_text(encoding="utf-8"))
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    large, all_of_them = report["large_grey"], report["all"]
    assert f"Of {large['of']} bars" in readme and f"{large['exact']} were found at the very row" in readme
    assert f"{large['within_1']} within one;" in readme
    assert f"all {all_of_them['of']:,}: {all_of_them['exact']:,} and {all_of_them['within_1']:,}" in readme
    false, clean = map(sum, zip(*report["false_finds"].values(), strict=True))
    assert false == 1 and f"One bar was seen in {clean:,} images" in readme
    assert report["images"]["seed"] == 1  # the limits were set on draws of another seed


def test_fine_tuning_is_that_of_the_record():
    report = json.loads((ROOT / "tests/bench/finetune.json").read_text(encoding="utf-8"))
    assert {run["method"] for run in report["runs"]} == set(list_methods())
    assert finetune.table(report["runs"]) in (ROOT / "README.md").read_text(encoding="utf-8")


def test_drift_is_that_of_the_record():
    report = json.loads((ROOT / "tests/bench/drift.json").read_text(encoding="utf-8"))
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    by_method = {method: found["by_change"] for method, found in report["methods"].items()}
    wrong = {
        m: sum(n["drift"] * report["null_draws"] for n in found["nothing"].values()) for m, found in by_method.items()
    }
    checks = 4 * report["null_draws"]
    assert f"{wrong['padim']:.0f} (`padim`) and {wrong['ganomaly']:.0f} (`ganomaly`) of {checks:,} checks" in readme
    darker = [found["brightness x 0.9"] for found in by_method.values()]
    assert {found["20"]["drift"] for found in darker} == {0.75} and {found["50"]["drift"] for found in darker} == {1.0}
    assert "brightness was found in 75 % of the checks, of 50 in all" in readme
    others = [c for c in by_method["padim"] if c.startswith(("blur", "noise", "style"))]
    assert len(others) == 3 and all(found[c]["20"]["drift"] == 1 for found in by_method.values() for c in others)


def test_the_paragraph_on_the_papers_figures_is_that_of_the_table():
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert paper.ABOUT.replace("*", "\\*") in readme


def test_round_trip_between_environments_is_that_of_the_record():
    report = json.loads((ROOT / "tests/bench/hub.json").read_text(encoding="utf-8"))
    assert set(report["models"]) == {f"miic-{method.replace('_', '-')}" for method in list_methods()}
    assert all(found["equal"] and found["equal_with_the_server_gone"] for found in report["models"].values())
    assert "(`tests/bench/hub.json`)" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert report["uncached"]["seconds"] < 5


def test_the_fast_mode_is_that_of_the_record():
    runs = json.loads((ROOT / "tests/bench/fast.json").read_text(encoding="utf-8"))["runs"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert runs and all(set(found) == {"synthetic", "boards"} for found in runs.values())
    assert fast.table(runs) in readme and fast.unmeasured(runs) in " ".join(readme.split())
    rounded = json.loads((ROOT / "tests/bench/fast_rounded.json").read_text(encoding="utf-8"))["runs"]["cfa"]
    assert not rounded["synthetic"]["accepted"]
    assert f"cost {-rounded['synthetic']['image_moved']:.3f} of its image ROC" in " ".join(readme.split())
