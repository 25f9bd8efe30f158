"""Tables of records for a terminal."""

import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from zoo.cards import METRICS


def console() -> Console:
    """The terminal; wide where stdout is a file or a pipe, so that no figure is cut."""
    return Console(width=None if sys.stdout.isatty() else 160)


def metric_table(record: dict[str, Any]) -> Table:
    """A row with the metrics of a record, one with their intervals, one for each further score of its method."""
    table = Table(title=f"{record['method']} on {record['test_data']['name']}", title_justify="left")
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
