"""The results of a benchmark, from its records alone: Table 3, Figures 1 and 2, and a page with all of it."""

import json
import shutil
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from zoo import paper, plots, summary
from zoo.benchmark import alone, check_figure_method, read_index, read_records
from zoo.checkpoint import write_text
from zoo.errors import ZooError
from zoo.plan import run_name

GALLERY, FIGURE1, ONE_KIND = "pictures.json", "figure1.png", "defect"  # as `zoo.gallery` writes them
METRICS_NOTE = (
    "Figures are in percent, mean and standard deviation over seeds. F1 is the maximum over all thresholds, chosen on "
    "the evaluated images themselves; F1 at val threshold takes the threshold that was best on the val half. PR is "
    "average precision. PRO is the exact area up to a false-positive rate of 0.3; PRO dfr200 is the recipe of 200 "
    "equally spaced thresholds with both axes stretched, for comparison with papers that use it. The time of an image "
    "is the median of images scored alone; of a fit that went on after a stop the seconds are added up."
)


def render(out: Path, figure_method: str | None = None) -> list[Path]:
    """Write table3.md, table3.tex, table3.csv, figure1.png, figure2.png and index.html into a benchmark's folder.

    Args:
        figure_method: whose Figure 1 is shown; None takes the one with the highest image AUROC.

    Returns:
        The files that were written.

    Raises:
        ZooError: no benchmark there, or none of that method.
    """
    if not (index := read_index(out)):
        raise ZooError(f"{out} holds no benchmark; make one: zoo benchmark --data DATA --out {out}.")
    with alone(out):
        return _rendered(out, index, figure_method)


def _rendered(out: Path, index: dict[str, Any], figure_method: str | None) -> list[Path]:
    records = read_records(out, index)
    found = summary.tables(index, records)
    counted = next(iter(found.values()))
    method = check_figure_method(figure_method, index["methods"]) if figure_method else summary.best_method(counted)
    with_paper = any(row.source != summary.OURS for row in counted)
    titles = {name: _title(name, index) for name in found}
    about = {"index": index, "titles": titles, "note": METRICS_NOTE, "paper": paper.ABOUT if with_paper else None}
    about["facts"] = _facts(index, records)
    made = "; ".join(f"{name}: {fact}" for name, fact in about["facts"].items())
    about["texts"] = [f"How it was made: {made}.", METRICS_NOTE, *([paper.ABOUT] if with_paper else [])]
    write_text(out / "table3.csv", summary.csv_of(found))
    write_text(out / "table3.md", _markdown(found, about))
    write_text(out / "table3.tex", _latex(found, about))
    written = [out / name for name in ("table3.md", "table3.tex", "table3.csv")]
    written += _figures(out, counted, records, method, titles[next(iter(found))])
    pictures = {path.name for path in written}
    galleries = _galleries(out, records)
    page = _template().render(
        about,
        tables={name: (*summary.cells(rows), rows) for name, rows in found.items()},
        figures=pictures,
        figure_method=method,
        counted=titles[next(iter(found))],
        galleries=galleries,
        one_kind=any(g["one_kind"] for g in galleries if g["method"] == (method or "").replace("_", "-")),
    )
    write_text(out / "index.html", page)
    return [*written, out / "index.html"]


def _title(reading: str, index: dict[str, Any]) -> str:
    """What a reading is, as a caption says it."""
    common = index["common"]
    title = summary.READINGS[reading]
    selected = common["select"] not in ("last", "normal")
    if common["protocol"] == "paper":
        title += " at 224 x 224, masks thresholded, then resized by nearest"
    if reading == "full" and selected:
        title += f"; half of it chose the step of methods that take steps ({common['select']}): too good"
    if reading == "held_out":
        title += ", which no choice of a step has seen"
    return title


def _facts(index: dict[str, Any], records: list[dict[str, Any]]) -> dict[str, str]:
    """What was compared and on what, for the head of the page."""
    common, done = index["common"], [record for record in records if "failed" not in record]
    facts = {"data": f"{common['data']['name']} (fingerprint {common['data']['fingerprint'][:16]})"}
    facts |= {"protocol": common["protocol"], "step chosen by": common["select"]}
    presets = sorted({how["preset"] for how in index["methods"].values()})
    names = {run_name(method, seed) for method, count in index.get("seeds", {}).items() for seed in range(count)}
    if missing := sorted(names - {record["benchmark"]["name"] for record in records}):
        facts["runs without a whole record"] = ", ".join(missing)
    facts |= {"preset": ", ".join(presets), "budget": common["budget"] or "the preset's"}
    if done:
        facts["images"] = "; ".join(sorted({_images(record) for record in done}))
        hardware = {_hardware(record) for record in done}
        facts["hardware"] = "; ".join(sorted(hardware))
        if days := sorted({record["benchmark"]["date"] for record in done if "date" in record["benchmark"]}):
            facts["dates"] = " to ".join(dict.fromkeys((days[0], days[-1])))
        versions = {f"zoo {r['versions']['zoo']}, torch {r['versions']['torch']}" for r in done}
        facts["versions"] = "; ".join(sorted(versions))
    return facts


def _images(record: dict[str, Any]) -> str:
    """What a run learned from, and what of the test set its figures go by."""
    learned, counted = record["train_data"], record["readings"].get("held_out", record["readings"]["full"])
    held = f", {learned['held_out']:,} of them held out for thresholds" if learned["held_out"] else ""
    part = "held-out half" if "held_out" in record["readings"] else "full test set"
    normals = f"{learned['images'] + learned['held_out']:,} normal to learn from{held}"
    return f"{normals}; {part} of {counted['normal']:,} normal and {counted['anomalous']:,} anomalous"


def _hardware(record: dict[str, Any]) -> str:
    found = record["hardware"]
    where = found.get("gpu") or f"{found['processor']}, {found['cores']} thread{'s' * (found['cores'] > 1)}"
    return f"{where}, {record['processes']} process{'es' * (record['processes'] > 1)}, {record['precision']}"


def _markdown(found: dict[str, list[summary.Row]], about: dict[str, Any]) -> str:
    parts = [f"# Benchmark on {about['index']['common']['data']['name']}"]
    for name, rows in found.items():
        parts += [f"## {about['titles'][name]}", summary.markdown(rows)]
    parts += about["texts"]
    return "\n\n".join(parts) + "\n"


def _latex(found: dict[str, list[summary.Row]], about: dict[str, Any]) -> str:
    data = about["index"]["common"]["data"]["name"]
    parts = ["% needs \\usepackage{booktabs} and \\usepackage{graphicx}"]
    parts += [summary.latex(rows, f"Benchmark on {data}. {about['titles'][name]}") for name, rows in found.items()]
    parts += [rf"\noindent {summary.tex(text)}" for text in about["texts"]]
    return "\n\n".join(parts) + "\n"


def _figures(
    out: Path, rows: list[summary.Row], records: list[dict[str, Any]], method: str | None, title: str
) -> list[Path]:
    """Figure 2 from the rows; Figure 1 is that of a run that has succeeded. One that can't be had is not left over."""
    written = []
    for name in (FIGURE1, "figure2.png"):
        (out / name).unlink(missing_ok=True)
    bars = [row for row in rows if "image_f1_max" in row.values]
    if bars:
        named = [(row.label.replace(f", {row.source}", "\nthe paper's"), row.source == summary.OURS) for row in bars]
        shown = [(*name, row.values) for name, row in zip(named, bars, strict=True)]
        plots.figure2(shown, out / "figure2.png", title)
        written.append(out / "figure2.png")
    drawn = [
        path
        for record in records
        if record["method"] == method
        and "failed" not in record
        and (path := out / "runs" / record["benchmark"]["name"] / FIGURE1).is_file()
    ]
    if drawn:
        temporary = out / ".figure1.png.part"
        shutil.copyfile(drawn[0], temporary)
        written.append(temporary.replace(out / FIGURE1))
    return written


def _galleries(out: Path, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The pictures of each method's first run that has some, by kind of defect, as links beside the page."""
    galleries: dict[str, dict[str, Any]] = {}
    for record in records:
        name, method = record["benchmark"]["name"], record["method"]
        listed = out / "runs" / name / GALLERY
        if method in galleries or not listed.is_file() or "failed" in record:
            continue
        groups: dict[str, list[dict[str, Any]]] = {}
        try:
            pictures = [_checked(picture) for picture in json.loads(listed.read_text(encoding="utf-8"))]
        except (OSError, ValueError, KeyError, TypeError):  # damaged: the page does without
            continue
        one_kind = {picture["kind"] for picture in pictures if picture["kind"]} == {ONE_KIND}
        for picture in pictures:
            title = picture["group"] + (f": {picture['kind']}" if picture["kind"] else "")
            groups.setdefault(title, []).append(picture | {"link": f"runs/{name}/{picture['file']}"})
        about = {"method": method.replace("_", "-"), "seed": record["seed"], "one_kind": one_kind}
        galleries[method] = about | {"groups": groups}
    return list(galleries.values())


def _checked(picture: dict[str, Any]) -> dict[str, Any]:
    """An entry of `pictures.json` with what the page shows of it; damaged, or of an older version, it raises."""
    return {key: picture[key] for key in ("group", "kind", "name", "score", "file", "called")}


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string((files("zoo.hub_cards") / "benchmark.html.j2").read_text(encoding="utf-8"))
