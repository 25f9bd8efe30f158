"""Records of a benchmark -> rows of Table 3, with mean and spread over seeds, as Markdown, LaTeX and CSV."""

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from zoo import paper
from zoo.cards import FURTHER, METRICS
from zoo.checkpoint import csv_text

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
    """

    method: str
    source: str
    seeds: int
    values: dict[str, tuple[float, float | None]] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

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
    by_method = defaultdict(list)
    for record in records:
        by_method[record["method"]].append(record)
    names = [name for name in READINGS if any(name in record.get("readings", {}) for record in records)]
    found: dict[str, list[Row]] = {}
    for reading in names or ["full" if index["common"]["protocol"] == "paper" else "held_out"]:
        rows = found[reading] = []
        for method, of_method in sorted(by_method.items()):
            done = [record for record in of_method if reading in record.get("readings", {})]
            failed = [f"seed {record['seed']}: {record['failed']}" for record in of_method if "failed" in record]
            if not done and not failed:  # a reading that the method has not
                continue
            values = {**_spread([record["readings"][reading]["metrics"] for record in done]), **_costs(done)}
            rows.append(Row(method, OURS, len(done), values, failed))
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
    lines = [[row.label, str(row.seeds or "-"), *(_cell(row, key, plus_minus) for key in keys)] for row in rows]
    return head, lines


def _cell(row: Row, key: str, plus_minus: str) -> str:
    if key not in row.values:
        return "-"
    mean, deviation = row.values[key]
    if key in COSTS:
        return f"{mean:.0f}" if mean >= 100 else f"{mean:.1f}"
    return f"{100 * mean:.2f}" + (f"{plus_minus}{100 * deviation:.2f}" if deviation is not None else "")


def markdown(rows: Sequence[Row]) -> str:
    """A table of Markdown; a method that failed says why in its row."""
    head, lines = cells(rows)
    head, lines = _with_reasons(head, lines, rows, lambda text: text.replace("|", "\\|"))
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *lines])


def latex(rows: Sequence[Row]) -> str:
    """A `tabular` with the rules of booktabs."""
    head, lines = cells(rows, r" $\pm$ ")
    lines = [[_tex(line[0]), *line[1:]] for line in lines]
    head, lines = _with_reasons(head, lines, rows, _tex)
    columns = "lr" + "r" * (len(head) - 2)
    body = [" & ".join(line) + r" \\" for line in [[_tex(title) for title in head], *lines]]
    rules = [r"\begin{tabular}{" + columns + "}", r"\toprule", body[0], r"\midrule", *body[1:], r"\bottomrule"]
    return "\n".join([*rules, r"\end{tabular}"])


def _with_reasons(
    head: list[str], lines: list[list[str]], rows: Sequence[Row], escape: Callable[[str], str]
) -> tuple[list[str], list[list[str]]]:
    """One more column, if any run has failed."""
    if not any(row.failed for row in rows):
        return head, lines
    return [*head, "failed"], [
        [*line, escape("; ".join(row.failed)) or "-"] for line, row in zip(lines, rows, strict=True)
    ]


def _tex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(c, f"\\{c}" if c in "&%$#_{}" else c) for c in text)


def csv_of(found: dict[str, list[Row]]) -> str:
    """All readings in one CSV: a line for each row, figures as shares of 1, mean and standard deviation apart."""
    keys = [*FIGURES, *COSTS]
    head = ["reading", "method", "source", "seeds", *(f"{key}_{part}" for key in keys for part in ("mean", "sd"))]
    lines = []
    for reading, rows in found.items():
        for row in rows:
            numbers = [value for key in keys for value in row.values.get(key, (None, None))]
            text = ["" if value is None else f"{value:.6g}" for value in numbers]
            lines.append([reading, row.method, row.source, row.seeds, *text, "; ".join(row.failed)])
    return csv_text([*head, "failed"], lines)
