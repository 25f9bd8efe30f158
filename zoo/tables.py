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
    """One row with the metrics of a record."""
    table = Table(title=f"{record['method']} on {record['test_data']['name']}", title_justify="left")
    for key in record["metrics"]:
        table.add_column(METRICS[key], justify="right")
    table.add_row(*(f"{value:.4f}" for value in record["metrics"].values()))
    return table
