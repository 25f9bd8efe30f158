"""What a card says to people, sentence by sentence; every figure of ours comes from the record.

A function returns a paragraph or a section as Markdown, empty where there is nothing to say. Records of before, and
those that are published, have fewer keys.
"""

import re
from typing import Any

from zoo import paper
from zoo.card_data import ordered
from zoo.card_terms import beside_normals
from zoo.card_words import capital, count, has, of, paragraphs, were
from zoo.methods import about
from zoo.naming import FURTHER, METRICS

PRECISIONS = {
    "32-true": "float32",
    "16-mixed": "mixed float16",
    "bf16-mixed": "mixed bfloat16",
    "fast": "the fast mode",
}
READINGS = ("held_out", "full", "last")  # in order


# ---- what it is, and what it learned from ----------------------------------------------------------------------------


def lead(config: dict[str, Any], record: dict[str, Any]) -> str:
    data, learned = record.get("train_data"), ""
    if data:
        learned = f", learned from normal images {beside_normals(data) or 'alone'}"
    return f"A visual anomaly detector of the zoo{learned}. {method(config)}"


def method(config: dict[str, Any]) -> str:
    title = about(config["method"]).title.replace(", no arXiv", "")
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", f"Its method is {title}.")


# ---- what was measured -----------------------------------------------------------------------------------------------


def results(config: dict[str, Any], record: dict[str, Any]) -> str:
    if not record.get("metrics"):
        return (
            "Nothing yet: this model was fitted and not evaluated."
            if record
            else "No record of a fit or an evaluation came with this model."
        )
    data = record["test_data"]["name"]
    data = data if record.get("train_data", {}).get("name") == data else ""  # others have nothing to be compared with
    theirs = paper.figures(data, config["method"])
    return paragraphs(
        _setting(config, record),
        _protocol(record),
        table(_columns(record, theirs)),
        _about_intervals(record),
        _about_seeds(record),
        *(_other_score(form, found) for form, found in sorted(record.get("other_scores", {}).items())),
        _about_metrics(record),
        about_paper(data, config["method"]),
    )


def _setting(config: dict[str, Any], record: dict[str, Any]) -> str:
    """On what it was scored, and how."""
    data, size = record["test_data"], record.get("eval_size", "native")
    scored = "at their own size" if size == "native" else f"at {size[0]} x {size[1]} pixels"
    if record.get("tile"):
        scored += f", in tiles of {record['tile']} pixels"
    elif config["preprocessing"].get("tile"):
        scored += ", as a whole"
    counts = f"{count(data['normal'], 'normal image')} and {count(data['anomalous'], 'anomalous one')}"
    said = [f"It was scored on {counts} {of(data, 'the test split of ')}, {scored}."]
    if data.get("half"):
        said.append(f"They are {data['half']}.")
    if data.get("seen"):
        said.append(f"{capital(data['seen'])}.")
    if data.get("ignored"):
        said.append(f"Not looked at is {data['ignored']}.")
    if broken := data.get("broken"):
        said.append(f"{count(broken, 'image')} could not be read and {were(broken)} left out.")
    if empty := data.get("unmarked"):
        said.append(f"{count(empty, 'anomalous image')} {has(empty)} no defect pixel in the mask as it was scored.")
    return " ".join(said)


def _readings(record: dict[str, Any]) -> list[dict[str, Any]]:
    found = record.get("readings", {})
    return [found[name] for name in (*READINGS, *sorted(found.keys() - set(READINGS))) if name in found]


def _protocol(record: dict[str, Any]) -> str:
    if not (readings := _readings(record)):
        return ""
    lines = [f"- {found['about']} ({found['normal']:,} normal, {found['anomalous']:,} anomalous)" for found in readings]
    return f"By the {record['protocol']['name']} protocol:\n\n" + "\n".join(lines)


def _columns(record: dict[str, Any], theirs: dict[str, Any] | None) -> dict[str, dict[str, str]]:
    """Title -> figures by metric, as shares of 1; the first one is what counts."""
    parts = {found["about"].partition(",")[0]: found["metrics"] for found in _readings(record)}
    columns = {title: _digits(metrics) for title, metrics in (parts or {"this model": record["metrics"]}).items()}
    (first, *others) = columns.items()
    columns = dict([first])
    if intervals := record.get("intervals"):
        ends = {key: f"{low:.3f} to {high:.3f}" for key, (low, high) in intervals["metrics"].items()}
        columns[f"{100 * intervals['level']:.4g} % interval"] = ends
    if seeds := record.get("seeds"):
        spread = {key: f"{mean:.4f} ± {deviation:.4f}" for key, (mean, deviation) in seeds["metrics"].items()}
        columns[f"mean of {count(seeds['count'], 'seed')}"] = spread
    return columns | dict(others) | (paper_column(theirs) if theirs else {})


def paper_column(theirs: dict[str, Any]) -> dict[str, dict[str, str]]:
    return {theirs["source"]: _digits(theirs["metrics"])}


def _digits(metrics: dict[str, float]) -> dict[str, str]:
    return {key: f"{value:.4f}" for key, value in metrics.items()}


def table(columns: dict[str, dict[str, str]]) -> str:
    """Metrics below each other; "-" where a column has none."""
    keys = [key for key in METRICS | FURTHER if any(key in figures for figures in columns.values())]
    lines = [["metric", *columns], ["---", *["---:"] * len(columns)]]
    lines += [[(METRICS | FURTHER)[key], *(figures.get(key, "-") for figures in columns.values())] for key in keys]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _about_intervals(record: dict[str, Any]) -> str:
    if not (found := record.get("intervals")):
        return ""
    of = f" of the {_readings(record)[0]['about'].partition(',')[0]}" if _readings(record) else ""
    level, drawn = f"{100 * found['level']:.4g} %", found["drawn"].removeprefix("images, ")
    return (
        f"The {level} intervals{of} come from {found['draws']:,} draws of the test images ({drawn}). They say "
        f"how much the figures depend on which images were tested, not on the seed.{_about_ends(record)}"
    )


def _about_ends(record: dict[str, Any]) -> str:
    """What an interval can't say: draws of images without an error have none either."""
    reading = _readings(record)[0] if _readings(record) else record | record["test_data"]
    ends = record["intervals"]["metrics"]
    perfect = any(reading["metrics"].get(key, 0) >= 1 for key in ends)
    if not perfect and all(f"{low:.3f}" != f"{high:.3f}" for low, high in ends.values()):
        return ""
    tested = f"{count(reading['normal'], 'normal image')} and {count(reading['anomalous'], 'anomalous one')}"
    return (
        " Where a figure is 1, or all draws gave the same, the interval can't say how far below it the true value "
        f"may be: rare errors don't show in {tested}."
    )


def _about_seeds(record: dict[str, Any]) -> str:
    if not (found := record.get("seeds")):
        return ""
    return (
        f"Mean and standard deviation are over {count(found['count'], 'fit')} that differ in their seed alone. The "
        f"weights of this model, and all other figures, are those of seed {record['seed']}."
    )


def _other_score(form: str, metrics: dict[str, float]) -> str:
    said = ", ".join(f"{(METRICS | FURTHER)[key]} {value:.4f}" for key, value in ordered(metrics).items())
    return f"By its `{form}` score (`--score {form}`) instead: {said}."


def _about_metrics(record: dict[str, Any]) -> str:
    keys = record["metrics"].keys() | {key for found in _readings(record) for key in found["metrics"]}
    said = [
        "ROC is the area under the ROC curve, PR average precision.",
        "F1 is the maximum over all thresholds, chosen on the evaluated images themselves: an upper bound.",
        "PRO is the exact area under the curve up to a false positive rate of 0.3."
        if "pixel_aupro" in keys
        else "There were no masks, so how well its map places defects was not measured.",
    ]
    if "image_f1_at_val" in keys:
        said.append(
            "F1 at val threshold takes the threshold that was best on `val`, the half of the test images to select on."
        )
    if "pixel_pro_dfr200" in keys:
        said.append("PRO dfr200 is another recipe: 200 equally spaced thresholds, both axes stretched.")
    return " ".join(filter(None, said))


def about_paper(data_name: str, method: str) -> str:
    """What the paper's figures beside ours are."""
    if data_name != paper.DATA_NAME:
        return ""
    if method not in paper.TABLE3:
        return "The paper ([arXiv 2505.07576](https://arxiv.org/abs/2505.07576)) has no figures of this method on MIIC."
    return paper.caveat(method)


# ---- threshold -------------------------------------------------------------------------------------------------------


def threshold(config: dict[str, Any], record: dict[str, Any]) -> str:
    found = config["calibration"]
    if not found:
        return "None: no normal images were held out, and scores come without a verdict."
    above = f"An image is called anomalous from a score of {found['image_threshold']:.6g}."
    if not found["calibrated"]:
        held = count(len(found["scores"]), "held-out normal image")
        return (
            f"Default, uncalibrated: from {held}, without a stated false-alarm rate. {above} `zoo calibrate` sets a "
            f"threshold that holds a rate, from normal images of your own. {_scores_held(found, 'held-out')}"
        )
    origin, area = record.get("calibration", {}), found["min_area"]
    source = f" {of(origin['data'])}" if origin.get("data") else ""
    unseen = {
        True: ", which neither fit nor selection has seen",
        False: ", of which it could not be checked whether the fit had seen them",
    }.get(origin.get("checked"), "")
    tiles = f", in tiles of {origin['tile']} pixels" if origin.get("tile") else ""
    normals = count(len(found["scores"]), "distinct normal image")
    where = f"{normals}{source}{unseen}, in {_precision(found['precision'])}{tiles}"
    sure, rate = f"{100 * found['confidence']:.4g} %", f"{100 * found['false_alarm_rate']:.4g} %"
    tested = record.get("test_data", {}).get("fingerprint")
    shared = tested and tested == origin.get("data", {}).get("fingerprint")
    among = " Normal images of its test split are among them, so these verdicts are no test of the rate." * bool(shared)
    return (
        f"Calibrated on {where}.{among} {above} With {sure} confidence, at most {rate} of normal images are called "
        "anomalous by their scores, and at most as many, though they may be other ones, have a region of "
        f"{count(area, 'pixel')} or more in the mask. Both hold for images that are drawn as these were: of the same "
        "tool, process and size. `zoo calibrate` sets another rate, or takes other images. "
        f"{_scores_held(found, 'calibration')}"
    )


def _scores_held(found: dict[str, Any], which: str) -> str:
    levels = " and the levels at which regions appear in their maps" if found.get("levels") else ""
    return (
        f"`config.json` holds the scores of the {which} images{levels}, sorted, without the images or their names; "
        "p-values of new images come from them."
    )


def _precision(name: str) -> str:
    return f"{PRECISIONS[name]} (`{name}`)" if name in PRECISIONS else f"`{name}`"


# ---- how it was made -------------------------------------------------------------------------------------------------


def made(config: dict[str, Any], record: dict[str, Any]) -> str:
    seed = f", seed {record['seed']}" if "seed" in record else ""
    preset = f"preset `{config['preset']}`" if config["preset"] else "no preset"
    lines = [f"configuration: {preset}{seed}, precision {_precision(config['precision'])}, zoo {config['zoo_version']}"]
    if "training" in record:
        lines.append(_training(record["training"]))
    if seen := _seen(config["preprocessing"]):
        lines.append(f"images: {'; '.join(seen)}")
    if backbone := config["backbone"]:
        lines.append(_backbone(backbone))
    lines += _hardware(record)
    if "versions" in record:
        lines.append("versions: " + ", ".join(f"{name} {version}" for name, version in record["versions"].items()))
    return "\n".join(f"- {line}" for line in lines)


def _training(found: dict[str, Any]) -> str:
    said = (
        f"training: {count(found['steps'], 'step')} of {count(found['images_a_step'], 'image')} "
        f"({found['epochs']:,g} epoch{'s' * (found['epochs'] != 1)})"
    )
    if kept := found.get("selection"):
        rule = f"the lowest {kept.get('of', 'mean map')}" if kept["rule"] == "normal" else f"`{kept['rule']}`"
        said += f"; kept is step {kept['step']:,}, chosen by {rule} on {count(kept['images'], 'image')}"
    return said


def _backbone(found: dict[str, Any]) -> str:
    weights = f", weights `{found['weights']}`" if found.get("weights") else ""
    digest = f", SHA-256 `{found['sha256']}`" if found.get("sha256") else ""
    return f"backbone: `{found['backbone']}`{weights}{digest}"


def _hardware(record: dict[str, Any]) -> list[str]:
    lines = []
    if "hardware" in record and "seconds" in record:
        took = f"fit: {_duration(record['seconds']['fit'])}{_peak(record)}, on {_machine(record['hardware'])}"
        processes = record.get("processes", 1)
        lines.append(f"{took}, {processes} processes" if processes > 1 else took)
    if found := record.get("evaluation"):
        lines.append(f"evaluation: {_duration(found['seconds'])}{_peak(found)}, on {_machine(found['hardware'])}")
    if cost := record.get("cost"):
        height, width = cost["image_size"]
        lines.append(
            f"scoring: {cost['ms_per_image']:,.1f} ms for an image of {height} x {width} pixels, alone in its batch; "
            f"weights of {cost['checkpoint_mb']:,.1f} MiB"
        )
    return lines


def _machine(found: dict[str, Any]) -> str:
    processor = f"{found['processor']}, {count(found['cores'], 'core')}"
    return f"{found['gpu']} ({processor})" if found.get("gpu") else processor


def _peak(found: dict[str, Any]) -> str:
    """Memory; what a record has as `..._mb` is MiB."""
    if "peak_memory_mb" not in found:
        return ""
    gpu = f", {found['peak_gpu_memory_mb']:,.0f} MiB of the GPU" if "peak_gpu_memory_mb" in found else ""
    return f", {found['peak_memory_mb']:,.0f} MiB at the peak{gpu}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _seen(view: dict[str, Any]) -> list[str]:
    """How images are seen; models of before have no view."""
    height, width = view["input_size"]
    channels = "in grey" if view["channels"] == 1 else "in three channels (a grey image is repeated in each)"
    found = [f"{height} x {width} pixels, {channels}"]
    for height, width, rows in view.get("bars", ()):
        found += [f"without the info bar, the last {rows} rows of {width} x {height}"] if rows else []
    if view.get("low") is not None:
        unit = "" if view["floats"] else " of the full scale"
        found.append(f"from {view['low']:.4g} (black) to {view['high']:.4g} (white){unit}")
    if view.get("tile"):
        found.append(f"in tiles of {view['tile']} pixels, where they are larger")
    return found


def size(view: dict[str, Any]) -> str:
    height, width = view["input_size"]
    tiles = f"tiles of {view['tile']} pixels" if view.get("tile") else "images"
    return f"It sees {tiles} at {height} x {width} pixels. A defect of a pixel or two at that size is easily missed."
