"""`moesaic usage`: who has used how much, and what it costs."""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cluster.device.state_dir import database_url
from serving.config import AccessConfig, PriceConfig, check_options
from serving.tenants.database import open_database
from serving.tenants.usage import Usage, read_usage
from serving.tenants.usage_by import UsageBy, UsageFormat, days_between


def usage_between(database: str | None, state_dir: Path, by: UsageBy, since: str | None, until: str | None
                  ) -> list[Usage]:
    """Return what was used from the first to the last of these days, both included. Raises InvalidRequestError."""
    checked = check_options(AccessConfig, {"database": database}, "--database", "database")
    days = days_between(since, until, time.time())
    engine = open_database(database_url(checked.database, state_dir))
    found = read_usage(engine, by, days)
    engine.dispose()
    return found


def print_usage(console: Console, usages: Sequence[Usage], by: UsageBy, prices: PriceConfig | None,
                form: UsageFormat) -> None:
    """Print a line for each; with prices, also what it costs."""
    rows = [usage.row(by, prices) for usage in usages]
    names = list(Usage("", "", 0, 0, 0, 0, 0, 0).row(by, prices))
    if form is UsageFormat.JSON:
        console.print(json.dumps(rows, indent=1), markup=False, highlight=False, soft_wrap=True)
    elif form is UsageFormat.CSV:
        text = io.StringIO()
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        console.print(text.getvalue(), end="", markup=False, highlight=False, soft_wrap=True)
    else:
        table = Table(*names, box=None)
        for row in rows:
            table.add_row(*(f"{value:,}" if isinstance(value, int) else str(value) for value in row.values()))
        console.print(table)
