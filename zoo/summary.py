"""Records of a benchmark -> rows of Table 3, with mean and spread over seeds, as Markdown, LaTeX and CSV."""

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from zoo import paper
from zoo.checkpoint import csv_text
from zoo.naming import FURTHER, METRICS

READINGS = {
    "held_out": "Held-out half",
    "full": "Full test set",
    "last": "Last step's weights, held-out half",
}
FIGURES = METRICS | FURTHER  # in percent
COSTS = {
    "fit_seconds": "fit s",
    "ms_per_image": "ms/image",
    "peak_memory_mb": "peak MB",
    "peak_gpu_memory_mb": "peak GPU MB",
    "checkpoint_mb": "checkpoint MB",
}
OURS = "zoo"


@dataclass
class Row:
    """A method in a reading of the test set: ours over its seeds, or the paper's.

    `values` are, by key of `FIGURES` (shares of 1) and `COSTS`, mean and standard deviation over seeds (None of one).
    `planned` is how many seeds there are to be.
    """

    method: str
    source: str
    seeds: int
    values: dict[str, tuple[float, float | None]] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    planned: int = 0

    @property
    def label(self) -> str:
        name = self.method.replace("_", "-")
        if self.source == OURS:
            return name
        return f"{name}{'*' * (self.source == paper.COPIED)}, {self.source}"


def tables(index: dict[str, Any], records: Sequence[dict[str, Any]]) -> dict[str, list[Row]]:
    """Rows by reading, methods in order, the paper's beneath ours where the data set is the paper's.

    Args:
        index: as `benchmark.json` holds it.
        records: of its runs, failed ones too.
    """
    by_method: dict[str, list[dict[str, Any]]] = {method: [] for method in index["methods"]}
    for record in records:
        by_method[record["method"]].append(record)
    names = [name for name in READINGS if any(name in record.get("readings", {}) for record in records)]
    found: dict[str, list[Row]] = {}
    for reading in names or ["full" if index["common"]["protocol"] == "paper" else "held_out"]:
        rows = found[reading] = []
        for method, of_method in sorted(by_method.items()):
            done = [record for record in of_method if reading in record.get("readings", {})]
            failed = [f"seed {record['seed']}: {record['failed']}" for record in of_method if "failed" in record]
            planned = index.get("seeds", {}).get(method, 0)
            if not done and not failed and (of_method or reading == "last"):  # a reading that the method has not
                continue
            values = {**_spread([record["readings"][reading]["metrics"] for record in done]), **_costs(done)}
            rows.append(Row(method, OURS, len(done), values, failed, planned))
            if theirs := paper.figures(index["common"]["data"]["name"], method):
                printed = {key: (value, None) for key, value in theirs["metrics"].items()}
                rows.append(Row(method, theirs["source"], 0, printed))
    return found


def _costs(records: Sequence[dict[str, Any]]) -> dict[str, tuple[float, float | None]]:
    costs = []
    for record in records:
        cost = {key: record["cost"][key] for key in ("ms_per_image", "checkpoint_mb")}
        cost |= {key: record[key] for key in ("peak_memory_mb", "peak_gpu_memory_mb") if key in record}
        costs.append(cost | {"fit_seconds": record["seconds"]["fit"]})
    return _spread(costs)


def _spread(found: Sequence[dict[str, float]]) -> dict[str, tuple[float, float | None]]:
    """Mean and sample standard deviation by key."""
    values = {key: [each[key] for each in found if key in each] for key in {key for each in found for key in each}}
    return {
        key: (statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else None)
        for key, numbers in values.items()
    }


def best_method(rows: Sequence[Row]) -> str | None:
    """The one of ours with the highest mean image AUROC."""
    ours = [row for row in rows if row.source == OURS and "image_auroc" in row.values]
    return max(ours, key=lambda row: row.values["image_auroc"][0]).method if ours else None


def cells(rows: Sequence[Row], plus_minus: str = " ± ") -> tuple[list[str], list[list[str]]]:
    """Head and lines of a table in words: figures in percent, mean and standard deviation; "-" where there is none."""
    keys = [key for key in FIGURES | COSTS if any(key in row.values for row in rows)]
    head = ["method", "seeds", *((FIGURES | COSTS)[key] for key in keys)]
    lines = [[row.label, _seeds(row), *(_cell(row, key, plus_minus) for key in keys)] for row in rows]
    return head, lines


def _seeds(row: Row) -> str:
    """How many there are, and of how many where some are missing or have failed."""
    if row.source != OURS:
        return "-"
    return str(row.seeds) if row.seeds >= row.planned else f"{row.seeds} of {row.planned}"


def _cell(row: Row, key: str, plus_minus: str) -> str:
    if key not in row.values:
        return "-"
    mean, deviation = row.values[key]
    scale, digits = (1, int(mean < 100)) if key in COSTS else (100, 2)
    spread = "" if deviation is None else f"{plus_minus}{scale * deviation:.{digits}f}"
    return f"{scale * mean:.{digits}f}{spread}"


def markdown(rows: Sequence[Row]) -> str:
    """A table of Markdown; a method that failed says why in its row."""
    head, lines = cells(rows)
    if any(row.failed for row in rows):
        head = [*head, "failed"]
        reasons = ["; ".join(row.failed).replace("|", "\\|") or "-" for row in rows]
        lines = [[*line, why] for line, why in zip(lines, reasons, strict=True)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *lines])


def latex(rows: Sequence[Row], caption: str) -> str:
    """A `table*` over the width of the text, with the rules of booktabs; why a method failed stands below."""
    head, lines = cells(rows, r" $\pm$ ")
    lines = [[tex(line[0]), *line[1:]] for line in lines]
    body = [" & ".join(line) + r" \\" for line in [[tex(title) for title in head], *lines]]
    failed = [rf"\par {tex(row.label)} failed: {tex('; '.join(row.failed))}" for row in rows if row.failed]
    return "\n".join(
        [
            r"\begin{table*}",
            r"\centering",
            rf"\caption{{{tex(caption)}.}}",
            r"\resizebox{\textwidth}{!}{%",
            r"\begin{tabular}{lr" + "r" * (len(head) - 2) + "}",
            *[r"\toprule", body[0], r"\midrule", *body[1:], r"\bottomrule"],
            r"\end{tabular}}",
            *([r"\par\smallskip\raggedright\footnotesize", *failed] if failed else []),
            r"\end{table*}",
        ]
    )


def tex(text: str) -> str:
    """Text as LaTeX sets it letter by letter."""
    named = {"\\": "backslash", "~": "asciitilde", "^": "asciicircum", "<": "less", ">": "greater", "|": "bar"}
    escaped = (rf"\text{named[c]}{{}}" if c in named else f"\\{c}" if c in "&%$#_{}" else c for c in text)
    return re.sub("-(?=-)", "-{}", "".join(escaped))  # two would become a dash


def csv_of(found: dict[str, list[Row]]) -> str:
    """All readings in one CSV: a line for each row, figures as shares of 1, mean and standard deviation apart."""
    keys = [*FIGURES, *COSTS]
    head = [
        "reading",
        "method",
        "source",
        "seeds",
        "seeds_planned",
        *(f"{key}_{part}" for key in keys for part in ("mean", "sd")),
    ]
    lines = []
    for reading, rows in found.items():
        for row in rows:
            numbers = [value for key in keys for value in row.values.get(key, (None, None))]
            text = ["" if value is None else f"{value:.6g}" for value in numbers]
            lines.append([reading, row.method, row.source, row.seeds, row.planned, *text, "; ".join(row.failed)])
    return csv_text([*head, "failed"], lines)
