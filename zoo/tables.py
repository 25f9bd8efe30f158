"""Tables of records for a terminal."""

import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from zoo.naming import FURTHER, METRICS


def console() -> Console:
    """The terminal; wide where stdout is a file or a pipe, so that no figure is cut."""
    return Console(width=None if sys.stdout.isatty() else 160)


def metric_table(record: dict[str, Any]) -> Table:
    """A row with the metrics of a record, one with their intervals, one for each further score of its method.

    Of a record by a protocol, a row for each of its readings; the intervals are those of the first.
    """
    table = Table(title=f"{record['method']} on {record['test_data']['name']}", title_justify="left")
    if readings := record.get("readings"):
        keys = [k for k in METRICS | FURTHER if any(k in found["metrics"] for found in readings.values())]
        for title in ("reading", *((METRICS | FURTHER)[key] for key in keys)):
            table.add_column(title, justify="left" if title == "reading" else "right")
        for number, found in enumerate(readings.values()):
            figures = (f"{found['metrics'][k]:.4f}" if k in found["metrics"] else "-" for k in keys)
            table.add_row(found["about"], *figures)
            if "intervals" in record and not number:
                ends = record["intervals"]["metrics"]
                table.add_row("", *("{:.3f}-{:.3f}".format(*ends[k]) if k in ends else "" for k in keys))
        return table
    rows = {"": record["metrics"]}
    if others := record.get("other_scores"):
        table.add_column("score")
        rows = {record["score"]: record["metrics"], **others}
    for key in record["metrics"]:
        table.add_column(METRICS[key], justify="right")
    for form, metrics in rows.items():
        figures = (f"{metrics[key]:.4f}" if key in metrics else "-" for key in record["metrics"])
        table.add_row(*([form] if others else []), *figures)
        if "intervals" in record and metrics is record["metrics"]:
            ends = record["intervals"]["metrics"]
            table.add_row(*([""] if others else []), *(f"{low:.3f}-{high:.3f}" for low, high in ends.values()))
    return table
