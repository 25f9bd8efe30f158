"""Files of a model from anywhere: what is well formed and of no model of the zoo is refused, in one clear sentence."""

import contextlib
import json
import math
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from zoo import checkpoint, forms
from zoo.calibration import Calibration
from zoo.cli import main
from zoo.errors import ZooError
from zoo.fit import fit
from zoo.hub import from_pretrained, list_models, model_place
from zoo.importing import import_models
from zoo.methods import create_model, list_methods, signature
from zoo.nn.features import architecture_only
from zoo.publish import stage
from zoo.view import View

FULL = {  # a record with all that is read of one
    "method": "padim",
    "metrics": {"image_auroc": 0.75},
    "test_data": {"name": "tiles", "fingerprint": "0" * 32, "normal": 6, "anomalous": 6, "broken": 0},
    "train_data": {"name": "tiles", "fingerprint": "0" * 32, "images": 24, "held_out": 6, "terms": "Ask first."},
    "protocol": {"name": "house", "halves_seed": 0},
    "readings": {"full": {"about": "full test set", "normal": 6, "anomalous": 6, "metrics": {"image_auroc": 0.75}}},
    "intervals": {"level": 0.95, "draws": 50, "drawn": "images", "metrics": {"image_auroc": [0.5, 1]}},
    "other_scores": {},
    "seeds": {"count": 3, "metrics": {"image_auroc": [0.75, 0.01]}},
    "seed": 2**64 - 1,
    "eval_size": [64, 64],
    "training": {"steps": 3, "epochs": 1, "images_a_step": 8, "selection": {"rule": "last", "step": 3, "images": 2}},
    "seconds": {"fit": 1.5},
    "hardware": {"processor": "x", "cores": 1, "device": "cpu"},
    "versions": {"torch": "2"},
    "evaluation": {"seconds": 1, "hardware": {"processor": "x", "cores": 1}},
    "cost": {"ms_per_image": 1.5, "image_size": [64, 64], "checkpoint_mb": 0.5},
    "calibration": {"normals": 30, "data": {"name": "tiles", "fingerprint": "0"}, "checked": True},
    "of_tomorrow": [None],
}


@pytest.fixture(scope="module")
def fitted(mvtec):
    return fit("padim", str(mvtec), preset="lite", arguments={"input_size": 64, "dims": 10})


@pytest.fixture
def folder(fitted, tmp_path):
    return fitted[0].save_pretrained(tmp_path / "model", FULL)


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def change(folder, *keys, to):
    """Put a value into the configuration; `...` takes the key out."""
    config = part = config_of(folder)
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = to
    if to is ...:
        del part[keys[-1]]
    (folder / "config.json").write_text(json.dumps(config))


def nested(value, *keys):
    """A copy of the full record with another value at a place."""
    record = part = json.loads(json.dumps(FULL))
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    return record


def sentence(error, *words):
    text = str(error.value)
    assert "\n" not in text and "\x1b" not in text and len(text) < 500 and text.count(". ") == 0
    assert all(word in text for word in words), text


def refused(folder, *words):
    start = time.process_time()
    with pytest.raises(ZooError) as error:
        from_pretrained(folder)
    assert time.process_time() - start < 10
    sentence(error, *words)


# ---- records ---------------------------------------------------------------------------------------------------------

ODD_RECORDS = {
    "list": "[]",
    "number": "5",
    "types": json.dumps({"metrics": "x", "test_data": 5}),
    "brackets": "[" * 200_000,
    "objects": '{"a":' * 900 + "1" + "}" * 900,
    "large": json.dumps({"a": [{}] * (checkpoint.LARGEST["results.json"] // 4 + 1)}),
    "nan": json.dumps(nested(math.nan, "metrics", "image_auroc")),
    "infinity": '{"seconds": {"fit": -Infinity}}',
    "overflow": '{"seconds": {"fit": 1e999}}',
    "digits": json.dumps({"seed": 10**30}),
    "many digits": '{"seed": ' + "1" * 10_000 + "}",
    "escape": json.dumps(nested("\x1b[2J", "train_data", "terms")),
    "escape in a key": json.dumps(FULL | {"\x9b2J": 1}),
    "half a character": '{"train_data": "\\ud800"}',
    "no test data": json.dumps({"metrics": {"image_auroc": 0.5}}),
    "no seed": json.dumps({key: value for key, value in FULL.items() if key != "seed"}),
}


@pytest.mark.parametrize("text", ODD_RECORDS.values(), ids=ODD_RECORDS)
def test_a_record_of_another_form(folder, tmp_path, capsys, text):
    (folder / "results.json").write_text(text)
    refused(folder, "results.json")
    with pytest.raises(ZooError) as error:
        import_models(str(folder), False, print)
    sentence(error, str(folder))
    with pytest.raises(ZooError) as error:
        stage(folder, tmp_path / "staged")
    sentence(error, "results.json")
    model_place("odd").parent.mkdir(parents=True, exist_ok=True)
    folder.rename(model_place("odd"))  # as if it had been imported before
    (found,) = list_models()
    assert found == "odd" and found.error and found.metrics == {}
    assert main(["list"]) == 0 and "\x1b[2J" not in capsys.readouterr().out


PLACES = [
    *((key,) for key in FULL if key != "of_tomorrow"),
    *(("metrics", "image_auroc"), ("test_data", "name"), ("test_data", "fingerprint"), ("test_data", "normal")),
    *(("train_data", "images"), ("train_data", "terms"), ("protocol", "name"), ("readings", "full")),
    *(("readings", "full", "about"), ("readings", "full", "metrics"), ("readings", "full", "metrics", "image_auroc")),
    *(("intervals", "level"), ("intervals", "metrics", "image_auroc"), ("intervals", "metrics", "image_auroc", 1)),
    *(
        ("seeds", "count"),
        ("seeds", "metrics", "image_auroc"),
        ("calibration", "data"),
        ("calibration", "data", "name"),
    ),
    *(("seconds", "fit"), ("hardware", "cores"), ("versions", "torch"), ("training", "selection", "rule")),
    *(("evaluation", "hardware", "processor"), ("cost", "image_size"), ("cost", "image_size", 0)),
]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: ".".join(map(str, place)))
def test_another_type_at_any_place_of_a_record(place, tmp_path):
    for value in (None, True, [], {"x": None}, [1, 2, 3]):
        if place == ("calibration",) and value == {"x": None}:  # nothing of it has to be there
            continue
        (tmp_path / "results.json").write_text(json.dumps(nested(value, *place)))
        with pytest.raises(ZooError) as error:
            checkpoint.read_record(tmp_path)
        sentence(error, str(place[0]))


def test_a_record_as_it_is_and_as_it_was(folder, tmp_path):
    assert checkpoint.read_record(folder) == FULL and from_pretrained(folder).record == FULL
    assert checkpoint.read_record(tmp_path) == {}
    for key in FULL:  # models of before have fewer keys
        fewer = {name: value for name, value in FULL.items() if name != key}
        if any(key in needs and fewer.get(other) for other, needs in forms.NEEDS.items()):
            continue
        (tmp_path / "results.json").write_text(json.dumps(fewer))
        assert checkpoint.read_record(tmp_path) == fewer


def test_saving_a_record_that_no_card_can_be_made_of(fitted, tmp_path):
    with pytest.raises(ZooError, match="test_data"):
        fitted[0].save_pretrained(tmp_path / "m", {"method": "padim", "metrics": {"image_auroc": 0.5}})
    assert not (tmp_path / "m").exists()


def test_names_that_look_like_markup(fitted, capsys):
    fitted[0].save_pretrained(model_place("m"), nested("[/red] [bold]", "test_data", "name"))
    assert main(["list"]) == 0
    assert "[bold]" in capsys.readouterr().out


# ---- configurations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        *(("format_version", bad, "no format version") for bad in (0, -1, True, 1.0, "1", None, [], "9" * 10_000, {})),
        *(("format_version", bad, "newer") for bad in (2, 10**9)),
        *(("precision", bad, "precision") for bad in ("17-bogus", "32", "", None, 32, ["32-true"])),
        *(("method", bad, "no method") for bad in ("PaDiM", "PADIM", "padim ", "", "x" * 10_000)),
        *(("method", bad, "method") for bad in (None, ["padim"])),
        *(
            ("weights_sha256", bad, "weights_sha256")
            for bad in ("", "x" * 64, "0" * 63, "A" * 64, "0" * 64 + "\n", None)
        ),
        *(("learned", bad, "learned") for bad in ([], {"center": 3}, {"center": [1.0, 2]}, {"center": [True, 10]})),
        *(("learned", {bad: [1]}, "of padim") for bad in ("surprise", "features.trunk.conv_stem.weight")),
        *(("backbone", bad, "backbone") for bad in ({}, {"backbone": "x"}, {"backbone": 1, "weights": None}, [])),
        *(("selection", bad, "selection") for bad in ({}, {"metric": "image_ap", "fingerprint": "0"}, "x")),
        *(("preset", bad, "preset") for bad in (3, ...)),
        ("arguments", [], "arguments"),
        ("zoo_version", "\x1b[2J", "control characters"),
    ],
)
def test_the_top_level(folder, key, value, words):
    change(folder, key, to=value)
    refused(folder, "config.json", words)


def test_a_preset_that_is_not_known_is_but_a_word(folder):
    change(folder, "preset", to="of tomorrow")
    assert from_pretrained(folder).preset == "of tomorrow"


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity", "1e999", "1" * 30])
@pytest.mark.parametrize("place", [("arguments", "sigma"), ("calibration", "image_threshold"), ("of",)])
def test_numbers_that_are_none(folder, constant, place):
    change(folder, *place, to="HERE")
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"HERE"', constant))
    refused(folder, "not finite or too large")


def test_nesting(folder):
    config = (folder / "config.json").read_text().rstrip().removesuffix("}")
    for deep in ("[" * 100_000 + "]" * 100_000, "[" * 100 + "]" * 100):
        (folder / "config.json").write_text(f'{config}, "x": {deep}}}')
        refused(folder, "nested too deeply")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("sigma", bad) for bad in (65, 1e8, 1e9, 0, -1)),
        *(("input_size", bad) for bad in (10**6, [64, 10**5], 8193)),
        *(("layers", bad) for bad in ([1] * 100_000, [1] * 65)),
        *(("ridge", bad) for bad in (-1.0, "0.01")),
        *(("seed", bad) for bad in (2**63, -1)),
    ],
)
def test_arguments_beyond_reason(folder, key, value):
    change(folder, "arguments", key, to=value)
    refused(folder, "config.json")


def test_a_network_of_endless_parts(mvtec, tmp_path):
    arguments = {"input_size": 64, "flow_steps": 1, "backbone": "resnet18", "layers": [1]}
    with architecture_only():
        folder = create_model("fastflow", **arguments).save_pretrained(tmp_path / "m")
    assert from_pretrained(folder).method == "fastflow"
    change(folder, "arguments", "flow_steps", to=10**6)
    refused(folder, "more than 8,000 parts")
    change(folder, "arguments", "flow_steps", to=10**7)
    refused(folder, "'flow_steps'")


@pytest.mark.parametrize("method", list_methods())
def test_no_method_builds_what_is_large_before_it_is_refused(method, tmp_path):
    """Any integer of any method at the highest that is let through: built on no memory, in little time."""
    with torch.device("meta"):
        for key, option in signature(method).items():
            if option.type is not int or key in ("seed", "channels"):
                continue
            start = time.process_time()
            with contextlib.suppress(ZooError, RuntimeError), architecture_only(), checkpoint._few_modules():
                create_model(method, **{key: 10**6})
            assert time.process_time() - start < 20, key


def test_weights_of_another_size_are_not_imported(folder):
    change(folder, "arguments", "input_size", to=96)
    change(folder, "preprocessing", "input_size", to=[96, 96])
    with pytest.raises(ZooError) as error:
        import_models(str(folder), False, print)
    sentence(error, str(folder), "can't score an image")
    assert not model_place("model").exists()


def test_names_of_tensors_are_quoted(folder):
    path = folder / "model.safetensors"
    save_file(load_file(path) | {"\x1b[2J" + "x" * 1000: torch.zeros(1)}, path)
    refused(folder, "doesn't fit", r"\x1b[2J")


# ---- calibration and view --------------------------------------------------------------------------------------------

STATED = {
    "scores": [1.0, 2.0],
    "levels": [0.5, 1.5],
    "image_threshold": 2.5,
    "pixel_threshold": 1.75,
    "pixel_median": 0.25,
    "calibrated": True,
    "false_alarm_rate": 0.9,
    "confidence": 0.95,
    "min_area": 3,
    "precision": "32-true",
    "sizes": [[64, 48]],
}


def test_a_calibration_as_it_is(folder):
    change(folder, "calibration", to=STATED)
    assert from_pretrained(folder).calibration.to_dict() == STATED
    before = {key: STATED[key] for key in ("scores", "image_threshold", "pixel_threshold", "pixel_median")}
    change(folder, "calibration", to=before)  # of a model that was saved before there were rates
    assert from_pretrained(folder).calibration == Calibration(**before)
    change(folder, "calibration", to=None)
    assert from_pretrained(folder).calibration is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("sizes", bad) for bad in ("x", [64], [[64]], [[64, 64, 1]], [[64, 0]], [["a", "b"]], None, {})),
        *(("false_alarm_rate", bad) for bad in (2, 0, 1, -0.5, "0.1", None, True)),
        *(("confidence", bad) for bad in ("high", None, 0, 1.5, True)),
        *(("calibrated", bad) for bad in ("yes", 1, None)),
        *(("precision", bad) for bad in ("xx", 32, True)),
        *(("min_area", bad) for bad in (-1, 0, 1.5, "3", None)),
        *(("scores", bad) for bad in ("12", [2.0, 1.0], [1.0], [], None, [1.0, "2"], [1.0, 1e39], {"1": 2})),
        *(("levels", bad) for bad in ("12", [1.5, 0.5], [[1.0], [2.0]], [True, True])),
        *(
            (key, bad)
            for key in ("image_threshold", "pixel_threshold", "pixel_median")
            for bad in ("1", None, True, ...)
        ),
        ("surprise", 1),
    ],
)
def test_a_calibration_that_none_gives(folder, key, value):
    change(folder, "calibration", to=STATED)
    change(folder, "calibration", key, to=value)
    refused(folder, "config.json")
    with pytest.raises(ZooError) as error:
        checkpoint.read_config(folder)
    sentence(error, "config.json")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, ...) for key in ("input_size", "channels", "mean", "std", "interpolation", "resize", "crop")),
        *((key, ...) for key in ("info_bar", "bars", "low", "high", "floats", "tile")),
        *(("input_size", bad) for bad in (64, [64], [65, 64], None)),
        *(("mean", bad) for bad in ([0.5], [0.4, 0.5, 0.5], "x")),
        *(("low", bad) for bad in (0.9, 2, "x", None, True)),
        *(("high", bad) for bad in (0.1, None, [1])),
        *(("info_bar", bad) for bad in ("zzz", None, 1)),
        *(
            ("bars", bad)
            for bad in ("x", [[64, 64]], [[64, 64, 64]], [[64, 64, -1]], [[64, 64, 1.5]], [64, 64, 4], None)
        ),
        *(("tile", bad) for bad in ("64", 64.0, True, 31, 0, -64)),
        *(("floats", bad) for bad in ("no", 0, None)),
        *(("resize", bad) for bad in (0, -1, 10**9, "bilinear, antialias", [64, 64])),
        *(("crop", bad) for bad in (0, 10**9, 1.5)),
        ("surprise", 1),
    ],
)
def test_a_view_that_none_is(folder, key, value):
    config = config_of(folder)
    change(folder, "preprocessing", to=config["preprocessing"] | {"low": 0.1, "high": 0.9, "bars": [[64, 64, 8]]})
    view = from_pretrained(folder).view
    assert (view.low, view.high, view.bars) == (0.1, 0.9, ((64, 64, 8),))
    change(folder, "preprocessing", key, to=value)
    refused(folder, "config.json")


def test_no_preprocessing_at_all(folder, tmp_path):
    change(folder, "preprocessing", to={})
    refused(folder, "preprocessing")
    with pytest.raises(ZooError) as error:
        stage(folder, tmp_path / "staged")
    sentence(error, "preprocessing")


def test_floats_without_a_scale():
    with pytest.raises(ZooError):
        View(floats=True)


# ---- types -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "kind", "where"),
    [
        (1, float, None),
        (1.0, int, "it"),
        (True, float, "it"),
        (True, int, "it"),
        (True, bool, None),
        (1, bool, "it"),
        (None, int | None, None),
        ([1, 2.5], list[float], None),
        ([1, None], list[float], "1"),
        ((1, 2), tuple[int, int], None),
        ([1], tuple[int, int], "it"),
        ([[1, 2, 3], [1, 2]], tuple[tuple[int, int, int], ...], "1"),
        ([], tuple[int, ...], None),
        ("ab", list[str], "it"),
        ({"a": [0, "x"]}, dict[str, tuple[int, int]], "a.1"),
        ({"name": "house", "more": ...}, forms.Protocol, None),
        ({}, forms.Protocol, "name"),
        ({"seconds": {"fit": None}}, forms.Record, "seconds.fit"),
    ],
)
def test_where_a_value_is_not_of_a_type(value, kind, where):
    assert forms.misfit(value, kind) == where


def test_what_is_written_can_be_read():
    value = {"a": [1, -2, 0.1, 1e-320, 1.7976931348623157e308, -(2**63), None, True, "ä\n\t\N{MICROSCOPE}"]}
    assert forms.parse(checkpoint.dump(value)) == value == json.loads(checkpoint.dump(value))
