"""The command line as a user meets it: every mistake is one sentence with code 2, and torch stays out of it."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from zoo.cli import main
from zoo.hub import model_place


def run(*argv):
    return main([str(a) for a in argv])


@pytest.fixture
def model(mvtec):
    assert (
        run("fit", "padim", "--preset", "lite", "--input_size", 64, "--dims", 20, "--data", mvtec, "--name", "m") == 0
    )
    return model_place("m")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["fitt"], "did you mean zoo fit"),
        (["fit"], "needs a method"),
        (["fit", "padin", "--data", "synthetic", "--name", "a"], "did you mean padim"),
        (["fit", "padim", "--name", "a"], "needs --data"),
        (["fit", "padim", "--data", "synthetic"], "needs --name"),
        (["fit", "padim", "--data", "synthetic", "--name", "../a"], "no name for a model"),
        (["fit", "padim", "--data", "synthetic", "--name", "a/b"], "no name for a model"),
        (["fit", "padim", "--data", "/nowhere/at/all", "--name", "a"], "/nowhere"),
        (["fit", "padim", "--data", "synthetic:trian=3", "--name", "a"], "train"),
        (["fit", "padim", "--data", "synthetic", "--name", "a", "--preset", "lita"], "original, paper224, lite"),
        (["fit", "padim", "--data", "synthetic", "--name", "a", "--dim", "3"], "did you mean --dims"),
        (["fit", "padim", "--data", "synthetic", "--name", "a", "--dims", "many"], "--dims"),
        (["fit", "padim", "--data", "synthetic", "--name", "a", "--device", "tpu"], "--device"),
        (["fit", "padim", "--preset", "lite", "--data", "synthetic", "--name", "a", "--seed", "-1"], "--seed"),
        (["fit", "padim", "--preset", "lite", "--data", "synthetic", "--name", "a", "--sigma", "0"], "--sigma"),
        (["fit", "padim", "--preset", "lite", "--data", "synthetic", "--name", "a", "--layers", "[]"], "Layers"),
        (["fit", "padim", "--preset", "lite", "--data", "synthetic", "--name", "a", "--num-workers", "-1"], "--num-w"),
        (["fit", "padim", "--data", "synthetic", "--name", "a", "--input-size", "big"], "--input-size"),
        (["fit", "--input-size", "64", "--data", "synthetic"], "needs a method"),
        (["fit", "--name", "padim", "--data", "synthetic", "patchcore"], "method first"),
        (["fit", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["evaluate", "nobody", "--data", "synthetic"], "zoo fit METHOD"),
        (["predict", "nobody", "x.png", "--out", "o"], "zoo fit METHOD"),
        (["calibrate", "nobody", "--data", "synthetic", "--false-alarm-rate", "0.1"], "zoo fit METHOD"),
    ],
)
def test_mistakes_are_one_sentence(argv, words, capsys):
    assert run(*argv) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("zoo: ") and captured.err.count("\n") == 1 and words in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["list"],
        ["fit", "patchcore", "--help"],
        ["fit", "patchcore", "--preset", "lite", "--print_config"],
        ["fit", "padim", "--data", "/nowhere", "--name", "a"],
        ["evaluate", "nobody", "--data", "synthetic"],
        ["predict", "nobody", "x.png", "--out", "o"],
        ["calibrate", "nobody", "--data", "synthetic", "--false-alarm-rate", "0.1"],
        ["benchmark", "--help"],
        ["benchmark", "--data", "/nowhere", "--preset", "lite"],
        ["benchmark", "--data", "synthetic", "--preset", "lite", "--methods", "nope"],
        ["benchmark", "--render", "/nowhere"],
    ],
)
def test_answers_before_torch_is_imported(argv):
    code = (
        "import sys\nfrom zoo.cli import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'lightning', 'datasets', 'timm'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code, *argv], check=True, capture_output=True)


def test_import_zoo_is_light():
    code = "import sys, zoo, time\nassert not {'torch', 'lightning', 'numpy'} & sys.modules.keys()\nassert dir(zoo)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_config_file_and_options(mvtec, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run("fit", "padim", "--preset", "lite", "--dims", 20, "--input-size", 64, "--print-config")
    text = capsys.readouterr().out
    assert "dims: 20" in text and "backbone: tf_efficientnet_lite0" in text
    (tmp_path / "c.yaml").write_text(text)
    assert run("fit", "--config", tmp_path / "c.yaml", "--data", mvtec, "--name", "from-file", "--ridge", 0.02) == 0
    arguments = json.loads((model_place("from-file") / "config.json").read_text())["arguments"]
    assert arguments["dims"] == 20 and arguments["ridge"] == 0.02 and arguments["input_size"] == 64


def test_evaluate_keeps_the_record(model, mvtec, capsys):
    assert run("evaluate", "m", "--data", mvtec) == 0
    assert "image ROC" in capsys.readouterr().out
    record = json.loads((model / "results.json").read_text())
    assert set(record["metrics"]) == {
        *("image_auroc", "image_f1_max", "image_ap"),
        *("pixel_auroc", "pixel_f1_max", "pixel_ap", "pixel_aupro"),
    }
    assert record["test_data"]["normal"] == 6 and record["train_data"]["images"] == 15  # half of 30 are held out
    assert record["eval_size"] == "native" and record["seconds"]["fit"] > 0 and record["peak_memory_mb"] > 0
    with open(model / "private" / "scores.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12 and {r["label"] for r in rows} == {"0", "1"}
    assert f"{record['metrics']['image_auroc']:.4f}" in (model / "README.md").read_text()
    assert run("list", "m*") == 0
    assert f"{record['metrics']['image_auroc']:.4f}" in capsys.readouterr().out


def test_predict_writes_what_it_says(model, mvtec, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("predict", "m", mvtec / "test", "--out", out, "--batch-size", 5) == 0
    assert "uncalibrated" in capsys.readouterr().out
    with open(out / "predictions.csv") as file:
        rows = list(csv.DictReader(file))
    report = json.loads((out / "predictions.json").read_text())
    assert len(rows) == len(report["images"]) == 12
    threshold = report["calibration"]["image_threshold"]
    for row in rows:
        assert row["verdict"] == f"{'anomalous' if float(row['score']) >= threshold else 'normal'} (uncalibrated)"
        assert Image.open(out / row["heatmap"]).size == (96, 96) and Image.open(out / row["heatmap"]).mode == "RGB"
        assert set(np.unique(np.asarray(Image.open(out / row["mask"])))) <= {0, 255}
    assert any(r["verdict"].startswith("anomalous") for r in rows)
    assert not list(out.rglob(".*"))  # no temporary file is left


def test_predict_names_a_broken_image(model, mvtec, tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    good = next((mvtec / "test/good").iterdir())
    (folder / "a.png").write_bytes(good.read_bytes())
    (folder / "b.png").write_bytes(good.read_bytes()[:500])
    (folder / "c.png").write_bytes(good.read_bytes())
    assert run("predict", "m", folder, "--out", tmp_path / "out", "--batch-size", 1) == 2
    assert "b.png" in capsys.readouterr().err
    assert len((tmp_path / "out/predictions.csv").read_text().splitlines()) == 2  # what was done is kept
    assert run("predict", "m", folder, "--out", tmp_path / "out2", "--skip-broken") == 0
    assert len((tmp_path / "out2/predictions.csv").read_text().splitlines()) == 3


def test_predict_knows_masks_from_images(model, mvtec, tmp_path):
    assert run("predict", "m", mvtec, "--out", tmp_path / "out") == 0
    assert len((tmp_path / "out/predictions.csv").read_text().splitlines()) == 1 + 30 + 6 + 6


def test_a_folder_called_masks_may_hold_images(model, mvtec, tmp_path):
    (tmp_path / "reticles/masks").mkdir(parents=True)
    (tmp_path / "reticles/masks/a.png").write_bytes(next((mvtec / "test/good").iterdir()).read_bytes())
    assert run("predict", "m", tmp_path / "reticles", "--out", tmp_path / "out") == 0
    assert len((tmp_path / "out/predictions.csv").read_text().splitlines()) == 2


def test_fit_says_what_it_replaces(model, mvtec, capsys):
    again = ["fit", "padim", "--preset", "lite", "--input-size", 64, "--dims", 20, "--name", "m"]
    capsys.readouterr()
    assert run(*again, "--data", mvtec) == 0
    assert "Replaced m" in capsys.readouterr().out
    assert run(*again, "--data", mvtec / "train/good") == 0
    assert "Next: zoo calibrate m" in capsys.readouterr().out


def test_predict_leaves_its_own_results_out(model, mvtec, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.png").write_bytes(next((mvtec / "test/good").iterdir()).read_bytes())
    for _ in range(2):
        assert run("predict", "m", folder, "--out", folder / "results") == 0
        assert len((folder / "results/predictions.csv").read_text().splitlines()) == 2


def test_results_of_equal_names_stay_apart(model, mvtec, tmp_path):
    source = next((mvtec / "test/good").iterdir()).read_bytes()
    for place in ("x/a.png", "y/a.png", "y/a.bmp"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_bytes(source)
    paths = [tmp_path / "x/a.png", tmp_path / "y/a.png", tmp_path / "y/a.bmp"]
    assert run("predict", "m", *paths, "--out", tmp_path / "out") == 0
    assert len(list((tmp_path / "out/heatmaps").rglob("*.png"))) == 3


def test_quickstart(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("zoo.tour.DATA", "synthetic:train=44,good=7,defect=7,size=128")
    assert run("quickstart") == 0
    text = capsys.readouterr().out
    assert "PRO" in text and text.count("\n  zoo ") == 3
    assert (tmp_path / "zoo-quickstart/figure1.png").stat().st_size > 10_000
    assert (model_place("sem-patchcore") / "model.safetensors").is_file()
    samples = tmp_path / "zoo-quickstart/samples"
    assert run("predict", "sem-patchcore", samples, "--out", tmp_path / "results") == 0
