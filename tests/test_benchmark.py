"""A benchmark as its user meets it: runs, stops, failures, and what is rendered from the records."""

import contextlib
import csv
import io
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from miic_replica import make
from PIL import Image
from safetensors.torch import save_file
from sklearn.metrics import average_precision_score, roc_auc_score

from zoo import paper, plots
from zoo.benchmark import read_index
from zoo.checkpoint import dump
from zoo.cli import main
from zoo.data import load_data
from zoo.data.halves import halves
from zoo.fit import fit
from zoo.naming import FURTHER, METRICS
from zoo.nn.features import find_weights
from zoo.plan import Plan, jobs_of, run_key, steps_an_epoch, trainer_options
from zoo.reasons import publishable, reason
from zoo.report import render
from zoo.resume import drop_unusable
from zoo.run import RunOptions
from zoo.trial import run

pytestmark = pytest.mark.usefixtures("runs_here")  # commands in processes of their own start others as usual
BOARDS = Path(__file__).parents[2] / "shared" / "data" / "deeppcb_small"
CLASSES = ("normal", "anomalous")
DATA = "synthetic:train=50,good=9,defect=14,size=64"
SIZES = {"padim": {"input_size": 64, "dims": 20}, "stfpm": {"input_size": 64}}
LITE = ["--preset", "lite", "--batch-size", "10", "--device", "cpu"]


def command(out, *methods, seeds=1, budget=4, arguments=None, data=DATA):
    given = {method: SIZES[method] | (arguments or {}).get(method, {}) for method in methods}
    about = ["--data", data, "--out", out, "--methods", *methods, "--seeds", seeds, "--budget", budget]
    return [str(part) for part in ["benchmark", *about, *LITE, "--arguments", json.dumps(given)]]


def records_of(out):
    return {path.stem: json.loads(path.read_text()) for path in (out / "runs").glob("*.json")}


@pytest.fixture(scope="module")
def bench(runs_here, tmp_path_factory):
    """A benchmark in which a method failed at first, and was run again with its cause removed and one more seed."""
    root = tmp_path_factory.mktemp("bench")
    out, weights = root / "out", root / "secret place" / "weights.safetensors"
    arguments = {"stfpm": {"backbone_weights": str(weights)}}
    told = io.StringIO()
    with contextlib.redirect_stderr(told):
        assert main(command(out, "padim", "stfpm", arguments=arguments)) == 2
    first = root / "first"
    shutil.copytree(out, first)
    before = (out / "runs" / "padim-seed0.json").stat().st_mtime_ns

    weights.parent.mkdir()
    save_file({k: v.contiguous() for k, v in find_weights("tf_efficientnet_lite0")[0].items()}, weights)
    assert main(command(out, "padim", "stfpm", seeds=2, arguments=arguments)) == 0
    return {"out": out, "first": first, "before": before, "root": root, "told": told.getvalue()}


def test_a_failing_method_is_survived_and_says_why(bench, capsys):
    assert "1 of 2 runs failed: stfpm-seed0; the same command tries them again." in bench["told"]
    found = records_of(bench["first"])
    assert set(found) == {"padim-seed0", "stfpm-seed0"}
    assert found["padim-seed0"]["metrics"] and "weights.safetensors" in found["stfpm-seed0"]["failed"]
    for path in ("table3.md", "table3.tex", "table3.csv", "index.html", "runs/stfpm-seed0.json", "benchmark.json"):
        text = (bench["first"] / path).read_text()
        assert "weights.safetensors" in text and "secret place" not in text and str(bench["root"]) not in text
    with open(bench["first"] / "table3.csv") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert rows["stfpm"]["seeds"] == "0" and rows["stfpm"]["image_auroc_mean"] == "" and rows["stfpm"]["failed"]
    assert rows["padim"]["seeds"] == "1" and not rows["padim"]["failed"] and rows["padim"]["image_auroc_sd"] == ""


def test_a_rerun_repeats_nothing_and_tries_again_what_failed(bench):
    out = bench["out"]
    assert set(records_of(out)) == {f"{method}-seed{seed}" for method in ("padim", "stfpm") for seed in (0, 1)}
    assert not any("failed" in record for record in records_of(out).values())
    assert (out / "runs" / "padim-seed0.json").stat().st_mtime_ns == bench["before"]


def test_records_say_what_was_run(bench):
    for name, record in records_of(bench["out"]).items():
        assert record["seed"] == int(name[-1]) and set(record["readings"]) >= {"held_out", "full"}
        assert record["protocol"]["name"] == "house" and record["cost"]["ms_per_image"] > 0
        weights = bench["out"] / "models" / name / "model.safetensors"
        assert record["cost"]["checkpoint_mb"] == pytest.approx(weights.stat().st_size / 2**20, abs=0.01)
        assert record["peak_memory_mb"] > 100 and record["seconds"]["fit"] > 0
        assert str(bench["root"]) not in json.dumps(record)
    stfpm = records_of(bench["out"])["stfpm-seed1"]
    assert stfpm["training"]["steps"] == 4 and stfpm["training"]["selection"]["rule"] == "image_auroc"
    stored = json.loads((bench["out"] / "halves.json").read_text())
    test = load_data(DATA)["test"].with_format(None)
    names = list(test["path"])
    val, held_out = halves(list(test["label"]), names)
    assert stored == {"seed": 0, "val": [names[i] for i in val], "held_out": [names[i] for i in held_out]}


def expected_rows(out):
    """Mean and spread by reading, method and figure, straight from the records."""
    values = {}
    for record in records_of(out).values():
        for reading, found in record["readings"].items():
            costs = {"ms_per_image": record["cost"]["ms_per_image"], "peak_memory_mb": record["peak_memory_mb"]}
            costs |= {"fit_seconds": record["seconds"]["fit"], "checkpoint_mb": record["cost"]["checkpoint_mb"]}
            for key, value in (found["metrics"] | costs).items():
                values.setdefault((reading, record["method"], key), []).append(value)
    return {key: (statistics.mean(found), statistics.stdev(found)) for key, found in values.items()}


def test_the_csv_is_that_of_the_records(bench):
    expected = expected_rows(bench["out"])
    with open(bench["out"] / "table3.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["reading"], row["method"]) for row in rows] == [
        *[(reading, method) for reading in ("held_out", "full") for method in ("padim", "stfpm")],
        ("last", "stfpm"),
    ]
    seen = set()
    for row in rows:
        for column in (name for name in row if name.endswith("_mean") and row[name]):
            key = (row["reading"], row["method"], column.removesuffix("_mean"))
            assert float(row[column]) == pytest.approx(expected[key][0], rel=1e-5, abs=1e-6)
            assert float(row[f"{key[2]}_sd"]) == pytest.approx(expected[key][1], rel=1e-4, abs=1e-6)
            seen.add(key)
    assert seen == expected.keys()


@pytest.mark.parametrize("kind", ["md", "tex", "html"])
def test_the_tables_are_those_of_the_records(bench, kind):
    """Each table is parsed back; a cell is mean and spread in percent."""
    text = (bench["out"] / ("index.html" if kind == "html" else f"table3.{kind}")).read_text()
    if kind == "md":
        rows = [line for line in text.splitlines() if line.startswith("|")]
        lines = [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]
    elif kind == "tex":
        assert text.count("\\toprule") == text.count("\\bottomrule") == 3
        rows = [line.removesuffix(" \\\\") for line in text.splitlines() if " & " in line]
        lines = [line.replace("$\\pm$", "±").split(" & ") for line in rows]
    else:
        rows = re.findall(r"<tr.*?</tr>", text)
        lines = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]
    heads = [i for i, line in enumerate(lines) if line[0] == "method"]
    assert len(heads) == 3
    expected, titles = expected_rows(bench["out"]), {title: key for key, title in (METRICS | FURTHER).items()}
    compared = 0
    for reading, start, end in zip(("held_out", "full", "last"), heads, [*heads[1:], len(lines)], strict=True):
        for line in (line for line in lines[start + 1 : end] if line[0] in SIZES):
            for title, cell in zip(lines[start], line, strict=True):
                if title in titles and cell != "-":
                    mean, deviation = expected[reading, line[0], titles[title]]
                    assert cell == f"{100 * mean:.2f} ± {100 * deviation:.2f}"
                    compared += 1
    assert compared == sum(key[2] in METRICS | FURTHER for key in expected)


def test_a_table_says_how_it_was_made(bench):
    for name in ("table3.md", "table3.tex"):
        text = (bench["out"] / name).read_text().replace("\\_", "_")
        assert "preset: lite; budget: 4;" in text and "protocol: house; step chosen by: image_auroc" in text
        assert "images: 50 normal to learn from, 20 of them held out for thresholds; held-out half of 5 normal" in text


def test_a_rule_that_is_none_is_refused_whatever_the_methods(tmp_path, capsys):
    assert main([*command(tmp_path, "padim"), "--select", "foo"]) == 2
    assert "--select is one of last, normal" in capsys.readouterr().err and not (tmp_path / "benchmark.json").exists()
    assert main(command(tmp_path, "padim", seeds=0)) == 2
    assert "--seeds is at least 1, not 0." in capsys.readouterr().err


def test_the_page_shows_what_lies_beside_it(bench):
    out = bench["out"]
    page = (out / "index.html").read_text()
    links = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert "figure1.png" in links and "figure2.png" in links and len(links) > 10
    for link in links:
        assert not link.startswith(("/", "http", "file")), link
        with Image.open(out / link) as image:
            image.load()
    listed = json.loads((out / "runs/padim-seed0/pictures.json").read_text())
    kinds = {name.split("/")[1] for name in json.loads((out / "halves.json").read_text())["held_out"]} - {"good"}
    assert {p["kind"] for p in listed if p["group"] == "hits"} == kinds
    assert all(f"<h3>hits: {kind}</h3>" in page for kind in kinds) and "<h3>false alarms</h3>" in page
    for place in (str(bench["root"]), str(Path.home()), "/tmp/", os.getcwd()):
        assert place not in page
    assert "2505.07576" not in page and "the paper's" not in page
    assert not list(out.rglob("*.part"))
    # The galleries show the extremes of what the records' scores say
    rows = list(csv.DictReader(open(out / "models/padim-seed0/private/scores.csv")))
    normals = sorted((float(row["score"]) for row in rows if row["label"] == "0"), reverse=True)
    alarms = [picture["score"] for picture in listed if picture["group"] == "false alarms"]
    scores = {row["image"]: float(row["score"]) for row in rows}
    assert all(scores[p["name"]] == pytest.approx(p["score"], rel=1e-6) and p["name"] in page for p in listed)
    shown = [p for method in SIZES for p in json.loads((out / f"runs/{method}-seed0/pictures.json").read_text())]
    assert page.count(": no miss<") == sum(p["called"] for p in shown if p["group"] == "misses")
    assert page.count(": no false alarm<") == sum(not p["called"] for p in shown if p["group"] == "false alarms")
    assert alarms == pytest.approx(normals[:3], rel=1e-6)


def test_costs_have_their_spread_and_missing_seeds_are_told(bench, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(bench["out"], out)
    found = [record["seconds"]["fit"] for name, record in records_of(out).items() if name.startswith("padim")]
    render(out)
    padim = next(line for line in (out / "table3.md").read_text().splitlines() if line.startswith("| padim"))
    mean, deviation = statistics.mean(found), statistics.stdev(found)
    assert f"| {mean:.1f} ± {deviation:.1f} |" in padim and "| padim | 2 |" in padim
    (out / "runs/padim-seed1.json").unlink()
    for seed in (0, 1):
        (out / f"runs/stfpm-seed{seed}.json").unlink()
    render(out)
    page, text = (out / "index.html").read_text(), (out / "table3.md").read_text()
    assert "| padim | 1 of 2 |" in text and "| stfpm | 0 of 2 | - |" in text
    assert "padim-seed1, stfpm-seed0, stfpm-seed1" in page


def test_latex_is_whole(bench, tmp_path):
    """What TeX would stumble over: braces, environments, letters that mean something, columns."""
    out, bad = tmp_path / "out", "50% of <a|b> & $x_1 {y}^2 ~ #3 \\n --preset; "
    shutil.copytree(bench["first"], out)
    path = out / "runs/stfpm-seed0.json"
    path.write_text(dump(json.loads(path.read_text()) | {"failed": bad + "long " * 60}))
    render(out)
    text = (out / "table3.tex").read_text()
    assert "\\resizebox{\\textwidth}" in text and text.count("\\begin{table*}") == text.count("\\end{table*}") == 2
    assert "\\caption{Benchmark on" in text and "half of it chose the step" in text and "average precision" in text
    assert (
        "50\\% of \\textless{}a\\textbar{}b\\textgreater{} \\& \\$x\\_1 \\{y\\}\\textasciicircum{}2 "
        "\\textasciitilde{} \\#3 \\textbackslash{}n -{}-preset"
    ) in text
    for table in re.findall(r"\\begin\{tabular\}\{(\w+)\}(.*?)\\end\{tabular\}", text, re.DOTALL):
        lines = [line for line in table[1].splitlines() if line.endswith("\\\\")]
        assert len(lines) == 3 and all(len(line.split(" & ")) == len(table[0]) for line in lines)
        assert "long" not in table[1]
    body = re.sub(r"(?m)^%.*|(?<=\{)%$", "", text)
    plain = re.sub(r"\\[{}%&#_$\\]", "", body)
    assert plain.count("{") == plain.count("}") and not set("%#<>|^~") & set(plain)


def test_figure_2_says_what_it_shows(monkeypatch, tmp_path):
    """One method, pixels not measured: one bar, its legend inside of the picture, the reading in the title."""
    drawn, save = [], plots._save_figure
    monkeypatch.setattr(plots, "_save_figure", lambda figure, path: (drawn.append(figure), save(figure, path)))
    plots.figure2([("padim", True, {"image_f1_max": (0.5, None)})], tmp_path / "figure2.png", "Held-out half, " * 8)
    (figure,) = drawn
    (axis,), (legend,) = figure.axes, figure.legends
    figure.draw_without_rendering()
    assert len(axis.patches) == 1 and [text.get_text() for text in legend.get_texts()] == ["image"]
    assert axis.get_title().replace("\n", " ").startswith("Held-out half, Held-out half")
    for artist in (legend, axis.title):
        box = artist.get_window_extent()
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
    assert not legend.get_window_extent().overlaps(axis.title.get_window_extent())


def test_a_single_kind_of_defects_has_many_pictures(mvtec, tmp_path):
    """As MIIC's, whose names tell no kind: rows over the quantiles of the scores, half of the rest hits and misses."""
    plan = Plan(str(mvtec), ["padim"], tmp_path / "out", 1, "lite", arguments={"padim": SIZES["padim"]}, device="cpu")
    plan.protocol = "paper"
    here(plan)
    listed = json.loads((plan.out / "runs/padim-seed0/pictures.json").read_text())
    groups = [[p["score"] for p in listed if p["group"] == name] for name in ("hits", "misses", "false alarms")]
    assert [len(scores) for scores in groups] == [3, 3, 6] and {p["kind"] for p in listed} == {"defect", ""}
    assert min(groups[0]) >= max(groups[1]) and groups[1] == sorted(groups[1])
    page = (plan.out / "index.html").read_text()
    assert "<h3>hits: defect</h3>" in page and "over the quantiles of their scores" in page
    with Image.open(plan.out / "figure1.png") as picture:
        assert picture.size[1] > 1.2 * picture.size[0]  # six rows


def test_text_of_a_data_set_is_escaped(bench, tmp_path):
    out = named(bench["out"], tmp_path / "out", "<script>alert(1)</script> & co")
    page = (out / "index.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page


def named(source, out, name):
    """A copy of a benchmark as if its data set had another name, rendered anew."""
    shutil.copytree(source, out)
    index = read_index(out)
    index["common"]["data"]["name"] = name
    (out / "benchmark.json").write_text(dump(index))
    for path in (out / "runs").glob("*.json"):
        record = json.loads(path.read_text())
        method = record["method"]
        record["benchmark"]["key"] = run_key(index["common"], method, index["methods"][method], record["seed"])
        path.write_text(dump(record))
    render(out)
    return out


def test_the_papers_figures_stand_beside_ours_on_miic_alone(bench, tmp_path):
    out = named(bench["out"], tmp_path / "miic", "miic")
    with open(out / "table3.csv") as file:
        rows = list(csv.DictReader(file))
    theirs = [row for row in rows if row["source"] != "zoo"]
    assert [row["method"] for row in theirs if row["reading"] == "held_out"] == ["padim", "stfpm"]
    assert all("paper" in row["source"] for row in theirs)
    (padim,) = [row for row in theirs if (row["reading"], row["method"]) == ("full", "padim")]
    assert float(padim["image_auroc_mean"]) == 0.8489 and float(padim["pixel_aupro_mean"]) == 0.953
    assert padim["pixel_pro_dfr200_mean"] == "" and padim["seeds"] == "0"
    page, text = (out / "index.html").read_text(), (out / "table3.md").read_text()
    assert "84.89" in page and "padim, paper (arXiv 2505.07576)" in text and "\\textasciicircum" not in text
    assert " ".join(paper.ABOUT.split()) in text and "possible explanations" in page
    replica = named(bench["out"], tmp_path / "replica", "miic-replica")
    for name in ("index.html", "table3.md", "table3.tex", "table3.csv"):
        assert "2505" not in (replica / name).read_text() and "84.89" not in (replica / name).read_text()


def test_the_papers_figures_are_those_of_its_table():
    assert set(paper.STARRED) == {"ganomaly", "fanogan", "iad_inpainting"} and "riad" not in paper.TABLE3
    assert paper.figures("miic", "cfa")["metrics"]["pixel_ap"] == 0.7891
    assert paper.figures("miic", "ganomaly") == {
        "source": paper.COPIED,
        "metrics": {"image_auroc": 0.9334, "image_f1_max": 0.7464},
    }
    assert paper.figures("miic", "riad") is None and paper.figures("miic-replica", "cfa") is None


def test_a_killed_benchmark_goes_on(tmp_path):
    """Killed without a word in the middle of a fit: the fit leaves a checkpoint, and the same command ends the work."""
    out = tmp_path / "out"
    launch = [sys.executable, "-m", "zoo.cli", *command(out, "stfpm", budget=120)]
    log = out / "logs" / "stfpm-seed0.log"
    job = subprocess.Popen(launch, stdout=subprocess.DEVNULL)
    while not (log.is_file() and "Step 12 of 120" in log.read_text()):
        assert job.poll() is None
        time.sleep(0.05)
    job.kill()
    job.wait()
    checkpoint = out / "unfinished" / "stfpm-seed0" / "last.ckpt"
    deadline = time.monotonic() + 300
    while not checkpoint.is_file():  # its run notices, and keeps what it has
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not records_of(out)
    states = torch.load(checkpoint, weights_only=True)["callbacks"]
    before = next(state["seconds"] for name, state in states.items() if "Unfinished" in name)
    assert main(launch[3:]) == 0
    record = records_of(out)["stfpm-seed0"]
    assert record["resumed"] and record["training"]["steps"] == 120 and "Going on after" in log.read_text()
    assert len(record["training"]["losses"]) == 10
    with open(out / "table3.csv") as file:
        told = float(next(csv.DictReader(file))["fit_seconds_mean"])
    own = 45 / record["training"]["steps_per_second"]  # at most 108 of the 120 steps, at this process's pace
    assert told == pytest.approx(record["seconds"]["fit"], rel=1e-4) and before > 0.1 and told > before + 0.5 * own


def test_a_run_that_was_fitted_is_not_fitted_again(bench, tmp_path):
    """Killed between the fit and the record."""
    out = tmp_path / "out"
    shutil.copytree(bench["out"], out)
    (out / "runs/stfpm-seed1.json").unlink()
    given = {
        "stfpm": SIZES["stfpm"] | {"backbone_weights": str(bench["root"] / "secret place" / "weights.safetensors")}
    }
    _, jobs = jobs_of(Plan(DATA, ["stfpm"], out, 2, "lite", "4", arguments=given, device="cpu", batch_size=10))
    run(jobs[1])
    again, before = (records_of(place)["stfpm-seed1"] for place in (out, bench["out"]))
    assert again["readings"] == before["readings"] and again["seconds"] == before["seconds"]
    weights = [place / "models/stfpm-seed1/model.safetensors" for place in (out, bench["out"])]
    assert weights[0].stat().st_mtime_ns == weights[1].stat().st_mtime_ns


def here(plan):
    """All runs of a plan in this process, and what is rendered from them."""
    index, jobs = jobs_of(plan)
    (plan.out / "runs").mkdir(parents=True)
    (plan.out / "benchmark.json").write_text(dump(index))
    for job in jobs:
        run(job)
    render(plan.out)
    with open(plan.out / "table3.csv") as file:
        return list(csv.DictReader(file))


def test_the_papers_protocol(mvtec, tmp_path):
    given = {"padim": SIZES["padim"]}
    plan = Plan(str(mvtec), ["padim"], tmp_path / "out", 1, "lite", protocol="paper", arguments=given, device="cpu")
    (row,) = here(plan)
    record = records_of(plan.out)["padim-seed0"]
    assert row["reading"] == "full" and record["eval_size"] == record["cost"]["image_size"] == [224, 224]
    assert float(row["pixel_pro_dfr200_mean"]) == pytest.approx(
        record["readings"]["full"]["metrics"]["pixel_pro_dfr200"], abs=1e-5
    )
    page = (plan.out / "index.html").read_text()
    assert "Full test set at 224 x 224, masks thresholded" in page and "called" not in page
    with Image.open(plan.out / "runs/padim-seed0/000.png") as picture:
        assert picture.size == (2 * 192, 192)


def test_images_without_masks_and_broken_ones(mvtec, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(mvtec, data, ignore=shutil.ignore_patterns("ground_truth"))
    (data / "test/good/000.png").write_bytes(b"broken")
    given = {"padim": SIZES["padim"]}
    plan = Plan(str(data), ["padim"], tmp_path / "out", 1, "lite", arguments=given, device="cpu", skip_broken=True)
    rows = here(plan)
    assert [row["reading"] for row in rows] == ["held_out", "full"] and rows[1]["pixel_aupro_mean"] == ""
    assert float(rows[1]["image_auroc_mean"]) > 0.5 and (plan.out / "figure1.png").is_file()
    assert records_of(plan.out)["padim-seed0"]["readings"]["full"]["normal"] == 5
    assert "PRO</th>" not in (plan.out / "index.html").read_text()


@pytest.mark.parametrize("sent", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_an_interrupt_ends_the_run_too(sent, tmp_path):
    """Ctrl-C goes to all processes of a terminal: the run's is spared, and asked to end by its benchmark."""
    out = tmp_path / "out"
    launch = [sys.executable, "-m", "zoo.cli", *command(out, "stfpm", budget=300)]
    usual = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a job in the background ignores it
    pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    job = subprocess.Popen(launch, **pipes, start_new_session=True, preexec_fn=usual)
    log = out / "logs" / "stfpm-seed0.log"
    while not (log.is_file() and "Step 30 of 300" in log.read_text()):
        assert job.poll() is None
        time.sleep(0.05)
    (os.killpg if sent == signal.SIGINT else os.kill)(job.pid, sent)
    assert job.wait(timeout=300) == 130 and "stopped" in job.stderr.read()
    assert not records_of(out) and (out / "unfinished" / "stfpm-seed0" / "last.ckpt").is_file()


@pytest.mark.slow
def test_two_at_once_share_the_runs(tmp_path):
    """Each run is done by one of them, and both render all."""
    launch = [sys.executable, "-m", "zoo.cli", *command(tmp_path, "padim", seeds=2)]
    jobs = [subprocess.Popen(launch, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [job.communicate(timeout=900)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0]
    assert "".join(said).count("image ROC") == 2 and all("index.html are in" in text for text in said)
    assert set(records_of(tmp_path)) == {"padim-seed0", "padim-seed1"}
    with open(tmp_path / "table3.csv") as file:
        assert [row["seeds"] for row in csv.DictReader(file)] == ["2", "2"]


def test_a_run_that_another_one_has_done_meanwhile_is_not_repeated(bench, monkeypatch):
    """It waited for the run's lock: the record is looked at again."""
    given = {"padim": SIZES["padim"]}
    _, jobs = jobs_of(Plan(DATA, ["padim"], bench["out"], 2, "lite", "4", arguments=given, device="cpu", batch_size=10))
    before = dump(records_of(bench["out"]))
    monkeypatch.setattr("zoo.trial.fit", None)
    monkeypatch.setattr("zoo.trial.evaluate_by", None)
    run(jobs[0])
    assert dump(records_of(bench["out"])) == before


def test_foreign_files_among_the_records_do_not_count(bench, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(bench["out"], out)
    tables = [(out / f"table3.{kind}").read_text() for kind in ("md", "csv")]
    record = json.loads((out / "runs/padim-seed0.json").read_text())
    (out / "runs/padim-seed0 copy.json").write_text(dump(record))
    (out / "runs/padim-seed7.json").write_text(
        dump(record | {"benchmark": record["benchmark"] | {"name": "padim-seed7"}})
    )
    for name, text in {
        "list": "[1]",
        "none": "{}",
        "odd": '{"benchmark": 3, "method": [], "seed": {}}',
        "cut": "{",
    }.items():
        (out / f"runs/{name}.json").write_text(text)
    render(out)
    assert [(out / f"table3.{kind}").read_text() for kind in ("md", "csv")] == tables


def test_weights_of_one_name_are_told_apart_by_their_contents(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = ["a/w.safetensors", str(tmp_path / "b/w.safetensors"), "./c/w.safetensors", "w.safetensors"]
    for place, text in zip(places, ("one", "two", "one", "three"), strict=True):
        Path(place).parent.mkdir(exist_ok=True)
        Path(place).write_text(text)
    keys = []
    for place in places:
        given = {"stfpm": {"backbone_weights": place}}
        index, (job,) = jobs_of(Plan(DATA, ["stfpm"], tmp_path / "out", 1, "lite", arguments=given, device="cpu"))
        assert index["methods"]["stfpm"]["arguments"] == {"backbone_weights": "w.safetensors"}
        assert job["arguments"] == given["stfpm"]
        keys.append(job["key"])
    assert keys[0] == keys[2] and len(set(keys)) == 3


@pytest.mark.parametrize("damage", ["broken", "old"])
def test_a_checkpoint_that_is_of_no_use_is_dropped(damage, tmp_path):
    path, said = tmp_path / "last.ckpt", []
    torch.save({"zoo_version": "0.0.0"}, path)
    if damage == "broken":
        path.write_bytes(path.read_bytes()[:-40])
    drop_unusable(path, said.append)
    assert not path.exists() and "begun anew" in said[0] and ("0.0.0" in said[0]) == (damage == "old")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (dict(budget=5), 'budget is "4", not "5"'),
        (
            dict(data="synthetic:train=51,good=9,defect=14,size=64"),
            'defect=14,size=64", not "synthetic:train=51',
        ),
        (dict(arguments={"padim": {"dims": 21}}), "arguments of padim is {"),
        (dict(arguments={"padim": {"dims": "many"}}), "--dims: Expected a int"),
    ],
)
def test_another_configuration_is_refused(bench, change, match, capsys):
    before = {name: dump(record) for name, record in records_of(bench["out"]).items()}
    assert main(command(bench["out"], "padim", **change)) == 2
    error = capsys.readouterr().err
    assert match in error and ("--out" in error) != ("--help" in error) and error.count("\n") == 1
    assert {name: dump(record) for name, record in records_of(bench["out"]).items()} == before


def test_a_method_that_has_only_failed_may_be_given_other_arguments(tmp_path, capsys):
    assert main(command(tmp_path, "padim", arguments={"padim": {"input_size": 16}})) == 2
    assert "--input-size" in records_of(tmp_path)["padim-seed0"]["failed"]
    assert main(command(tmp_path, "padim")) == 0
    assert main(["benchmark", "--render", str(tmp_path), "--data", DATA]) == 2
    assert "leave out --data" in capsys.readouterr().err


def test_a_model_of_another_configuration_is_not_taken_for_this_run(tmp_path):
    """Its folder's index is gone, and with it what refuses another configuration."""
    assert main(command(tmp_path, "padim")) == 0
    (tmp_path / "benchmark.json").unlink()
    other = "synthetic:train=40,good=6,defect=8,size=64"
    assert main(command(tmp_path, "padim", arguments={"padim": {"dims": 12}}, data=other)) == 0
    record = records_of(tmp_path)["padim-seed0"]
    assert record["configuration"]["model"]["dims"] == 12 and record["train_data"]["name"] == other
    names = json.loads((tmp_path / "halves.json").read_text())
    assert sum(len(names[half]) for half in ("val", "held_out")) == 6 + 8


def test_arguments_that_are_null_where_they_may_not_be(tmp_path, capsys):
    assert main(command(tmp_path, "padim", arguments={"padim": {"backbone": None}})) == 2
    assert "--backbone can't be null" in capsys.readouterr().err
    assert main(command(tmp_path, "padim", arguments={"padim": {"seed": 3}})) == 2
    assert "no argument 'seed'" in capsys.readouterr().err


@pytest.mark.parametrize("text", ['{"format_version": 1}', "[]", '{"format_version": 1, "common": 3, "methods": {}}'])
def test_a_damaged_index_is_one_sentence(bench, tmp_path, text, capsys):
    out = tmp_path / "out"
    shutil.copytree(bench["out"], out)
    (out / "benchmark.json").write_text(text)
    assert main(["benchmark", "--render", str(out)]) == 2
    told = capsys.readouterr().err
    assert "benchmark.json is damaged" in told and told.count("\n") == 1


def test_a_damaged_gallery_is_left_out_of_the_page(bench, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(bench["out"], out)
    for text in ("[{", '[{"group": "hits"}]', "3"):
        for seed in (0, 1):
            (out / f"runs/padim-seed{seed}/pictures.json").write_text(text)
        render(out)
        page = (out / "index.html").read_text()
        assert "<h2>stfpm, seed" in page and "<h2>padim, seed" not in page


@pytest.mark.parametrize("protocol", ["house", "paper"])
def test_the_replica_of_miic_from_benchmark_to_intervals(protocol, tmp_path, capsys):
    root = tmp_path / "replica"
    make(root, train=30, normal=8, abnormal=10, size=64)
    data, out = f"miic:{root}", tmp_path / "out"
    assert main([*command(out, "padim", data=data), "--protocol", protocol, "--skip-broken"]) == 0
    table = (out / "table3.md").read_text()
    assert "Benchmark on miic-replica" in table and "padim" in table and "2505.07576" not in table
    record = records_of(out)["padim-seed0"]
    assert set(record["readings"]) == ({"held_out", "full"} if protocol == "house" else {"full"})
    assert record["readings"]["full"]["unmarked"] >= 1  # the replica's empty mask
    halves = json.loads((out / "halves.json").read_text())
    assert {Path(name).parent.as_posix() for name in halves["val"]} <= {
        "Anomaly_test/normal_img",
        "Anomaly_test/abnormal_img",
    }
    model, scores = str(out / "models/padim-seed0"), str(tmp_path / "scores.csv")
    options = ["--data", data, "--protocol", protocol, "--bootstrap", "50", "--scores", scores, "--skip-broken"]
    assert main(["evaluate", model, *options]) == 0
    intervals = json.loads((Path(model) / "results.json").read_text())["intervals"]
    assert intervals["draws"] == 50 and all(low <= high for low, high in intervals["metrics"].values())
    rows = list(csv.DictReader(open(scores)))
    assert len(rows) == sum(record["readings"]["held_out" if protocol == "house" else "full"][k] for k in CLASSES)


@pytest.mark.slow
@pytest.mark.skipif(not BOARDS.is_dir(), reason="the circuit boards are not here")
def test_the_circuit_boards_from_benchmark_to_intervals(tmp_path):
    out = tmp_path / "out"
    assert main(command(out, "padim", "stfpm", data=str(BOARDS))) == 0
    for method in ("padim", "stfpm"):
        record = records_of(out)[f"{method}-seed0"]
        assert record["readings"]["full"]["anomalous"] == sum(1 for _ in (BOARDS / "test/defect").iterdir())
        rows = list(csv.DictReader(open(out / f"models/{method}-seed0/private/scores.csv")))
        labels, scores = [int(row["label"]) for row in rows], [float(row["score"]) for row in rows]
        held_out = record["readings"]["held_out"]
        assert (labels.count(0), labels.count(1)) == (held_out["normal"], held_out["anomalous"])
        assert held_out["metrics"]["image_auroc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-5)
        assert held_out["metrics"]["image_ap"] == pytest.approx(average_precision_score(labels, scores), abs=1e-5)
    assert main(["evaluate", str(out / "models/padim-seed0"), "--data", str(BOARDS), "--bootstrap", "50"]) == 0
    assert "intervals" in json.loads((out / "models/padim-seed0/results.json").read_text())


def test_figure_1_of_another_method_and_rendering_alone(bench, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(bench["out"], out)
    drawn = {method: (out / f"runs/{method}-seed0/figure1.png").read_bytes() for method in ("padim", "stfpm")}
    for method, picture in drawn.items():
        assert main(["benchmark", "--render", str(out), "--figure-method", method]) == 0
        assert (out / "figure1.png").read_bytes() == picture
        assert f"predicted mask by {method}" in (out / "index.html").read_text()
    capsys.readouterr()
    assert main(["benchmark", "--render", str(out), "--figure-method", "cfa"]) == 2
    assert "--figure-method cfa is not one of" in capsys.readouterr().err
    assert main(["benchmark", "--render", str(tmp_path)]) == 2 and "holds no benchmark" in capsys.readouterr().err


def test_budgets():
    assert trainer_options("padim", "lite", "300", "image_auroc", 7) == {}
    assert trainer_options("stfpm", "lite", "300", "last", 7) == {"select": "last", "max_steps": 300}
    assert trainer_options("stfpm", "lite", "10%", "last", 7) == {"select": "last", "max_steps": 30}
    assert trainer_options("stfpm", "paper224", "10%", "last", 7) == {"select": "last", "max_steps": 70}
    assert trainer_options("stfpm", "paper224", "0.1%", "last", 7)["max_steps"] == 1
    assert trainer_options("stfpm", "lite", None, "pixel_ap", 7) == {"select": "pixel_ap"}


def test_an_epoch_has_the_steps_that_a_fit_takes(tmp_path):
    """50 normals, 20 held out: 30 images, in batches of 10."""
    plan = Plan(DATA, ["stfpm"], tmp_path, 1, "lite", batch_size=10, arguments={"stfpm": SIZES["stfpm"]})
    counted = steps_an_epoch("stfpm", "lite", plan, 50, 0)
    _, record = fit(
        "stfpm", DATA, None, "lite", SIZES["stfpm"], {"batch_size": 10}, {"max_epochs": 2}, RunOptions("cpu")
    )
    assert counted == 3 and record["training"]["steps"] == 2 * counted


def test_presets_about_steps_leave_methods_without_steps_alone(tmp_path):
    small = {method: {"backbone": "tf_efficientnet_lite0"} for method in ("padim", "stfpm")}
    index, jobs = jobs_of(Plan(DATA, ["padim", "stfpm"], tmp_path, 2, "mvtec_steps", arguments=small))
    others, _ = jobs_of(Plan(DATA, ["ganomaly", "riad"], tmp_path, 2, "mvtec_steps"))
    assert [how["preset"] for how in others["methods"].values()] == ["paper224", "mvtec_steps"]
    assert index["methods"]["padim"]["preset"] == "paper224" and index["methods"]["stfpm"]["preset"] == "mvtec_steps"
    assert [(job["method"], job["seed"]) for job in jobs] == [("padim", 0), ("stfpm", 0), ("padim", 1), ("stfpm", 1)]
    assert len({job["key"] for job in jobs}) == 4


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "needs --data"),
        (["--data", DATA, "--preset", "lite", "--seeds", "0"], "--seeds"),
        (["--data", DATA, "--preset", "lite", "--batch-size", "0"], "--batch-size"),
        (["--data", DATA, "--preset", "lite", "--budget", "0"], "--budget is a number of steps"),
        (["--data", DATA, "--preset", "mvtec_steps", "--methods", "padim", "stfpm", "ganomaly"], "padim, stfpm need"),
        (["--data", DATA, "--preset", "lite", "--budget", "10m"], "--budget"),
        (["--data", DATA, "--preset", "lite", "--budget", "0%"], "--budget"),
        (["--data", DATA, "--preset", "lite", "--select", "best"], "--select"),
        (["--data", DATA, "--preset", "lite", "--methods", "padin"], "did you mean padim"),
        (["--data", DATA, "--preset", "lite", "--methods", "padim", "--arguments", '{"cfa": {}}'], "leaves out"),
        (["--data", DATA, "--preset", "lite", "--arguments", '{"padim": {"dimms": 3}}'], "no argument 'dimms'"),
        (["--data", DATA, "--preset", "lite", "--protocol", "our"], "--protocol"),
        (["--data", "/nowhere/at/all", "--preset", "lite"], "/nowhere"),
        (["--data", "synthetic:good=1,defect=7", "--preset", "lite"], "two normal and two anomalous"),
        (["--data", DATA, "--methods", "stfpm"], "--preset lite"),
        (["--data", DATA, "--preset", "lite", "--figure-method", "padin"], "did you mean padim"),
        (["--data", DATA, "--preset", "lite", "--methods", "padim", "--figure-method", "cfa"], "--figure-method cfa"),
    ],
)
def test_mistakes_are_one_sentence(argv, words, tmp_path, capsys):
    assert main(["benchmark", *argv, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_figure_by_a_method_that_failed(bench, tmp_path, capsys):
    """Tables and page are written and say so; the picture of a run before it failed is not shown."""
    out = tmp_path / "out"
    shutil.copytree(bench["first"], out)
    (out / "runs/stfpm-seed0").mkdir()
    shutil.copy(out / "runs/padim-seed0/figure1.png", out / "runs/stfpm-seed0")
    (out / "table3.md").unlink()
    assert main(["benchmark", "--render", str(out), "--figure-method", "stfpm"]) == 0
    assert "no run of stfpm has succeeded" in capsys.readouterr().out
    assert "no run of stfpm has succeeded" in (out / "index.html").read_text()
    assert (out / "table3.md").is_file() and not (out / "figure1.png").exists()


HOME = "/home/ann.b-smith"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("HOME/data/a b/x.png is broken", "a b/x.png is broken"),
        ("--data miic:HOME/data/a b has none; ann.b-smith", "--data a b has none; ..."),
        ("No file /srv/users/ann/x.png; look.", "No file x.png; look."),
        ("10 images/s, and/or 3/4", "10 images/s, and/or 3/4"),
        ("~/secret/w.safetensors and ~bob/y and HOME.", "w.safetensors and ... and ...."),
        ("file:///srv/x y, hub://who@there/z", "... y, ..."),
        ("[Errno 2] No such file: '/srv/my stuff/x.png'", "[Errno 2] No such file: 'x.png'"),
        ('in "miic:/srv/my stuff/deep" and ../ann/w.pt, up/../../ann/v', 'in "..." and w.pt, ...'),
        ("can't reach node7.lan:29500, 10.0.0.5, 10.0.0.5:80 or [fe80::1]:29500", "can't reach ..., ..., ... or ..."),
        ("fe80::a1b:2 is away; --device cuda:12 has 3:4", "... is away; --device cuda:12 has 3:4"),
        ("../rel ative/data: empty", "data: empty"),
    ],
)
def test_places_of_this_machine_are_cut(text, expected, monkeypatch):
    monkeypatch.setenv("HOME", HOME)
    places = [f"miic:{HOME}/data/a b", "../rel ative/data", "synthetic:train=3", HOME]
    assert publishable(text.replace("HOME", HOME), places) == expected


def test_an_unforeseen_error_is_told_by_its_class_alone(tmp_path):
    log = tmp_path / "padim-seed0.log"
    job = {"out": "/proc/nowhere", "method": "padim"}  # no whole job
    launch = [sys.executable, "-m", "zoo.trial", json.dumps(job)]
    with open(log, "wb") as said, subprocess.Popen(launch, stdin=subprocess.PIPE, stderr=said) as child:
        code = child.wait()
    assert code == 2 and "Traceback" in log.read_text()
    assert reason(log, code, []) == "KeyError; see logs/padim-seed0.log"
