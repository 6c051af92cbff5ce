"""Usage is shown as a table, CSV or JSON, with a bill where there are prices."""

from __future__ import annotations

import csv
import io
import json
import time
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from cluster.cli.main import app
from serving.errors import InvalidRequestError
from serving.tenants.database import open_database
from serving.tenants.ledger import Ending, Ledger, Opening, Outcome, Used
from serving.tenants.standing import Ask
from tests.serving.tenants.keys import new_key


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    engine, (key, _), now_s = open_database(f"sqlite:///{tmp_path}/tenants.db"), new_key(), time.time()
    ledger = Ledger(engine, "r")
    ledger.write([Opening("1", "r", key, "m", Ask(9, 9, 9), now_s)], [])
    ledger.write([], [Ending("1", key.key_id, Outcome.FINISHED, Used(1_000_000, 0, 4, 1), now_s)])
    engine.dispose()
    return tmp_path


def run(folder: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["usage", *arguments, "--state-dir", str(folder)])


def test_usage_in_every_format(folder: Path) -> None:
    assert "1,000,000" in run(folder).stdout
    (row,) = json.loads(run(folder, "--format", "json", "--by", "day").stdout)
    assert row["prompt_tokens"] == 1_000_000 and row["reasoning_tokens"] == 1 and "cost_usd" not in row
    prices = {"prompt": 1.5, "cached": 0.1, "generated": 0, "currency": "EUR"}
    config = folder / "my.yaml"
    config.write_text(yaml.safe_dump({"model": {"path": "m"}, "pools": [{}], "access": {"prices": prices}}))
    shown = run(folder, "--by", "key", "--format", "csv", "--config", str(config)).stdout
    (priced,) = csv.DictReader(io.StringIO(shown))
    assert priced["cost_eur"] == "1.500000" and priced["name"] == ""


def test_days_bound_it_and_wrong_ones_are_named(folder: Path) -> None:
    assert json.loads(run(folder, "--format", "json", "--until", "2020-01-01").stdout) == []
    assert isinstance(run(folder, "--since", "yesterday").exception, InvalidRequestError)
