"""Alerts and dashboards ask for metrics that a router shows, and alerts fire when they should."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from serving.metrics import RouterMetrics
from tests.k8s.rendering import CHART, ROOT, one, rendered

HERE = Path(__file__).parent
ALERTS = CHART / "files" / "alerts.yaml"
DASHBOARDS = CHART / "files" / "dashboards.yaml"
HA = ROOT / "k8s/profiles/ha.yaml"
SUFFIXES = {"counter": [""], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}


def shown_metrics() -> set[str]:
    types = re.findall(r"^# TYPE (\S+) (\w+)$", RouterMetrics().render()[0].decode(), re.MULTILINE)
    return {name + suffix for name, kind in types for suffix in SUFFIXES[kind]}


def queries() -> Iterator[str]:
    for group in yaml.safe_load(ALERTS.read_text())["groups"]:
        yield from (rule["expr"] for rule in group["rules"])
    for board in yaml.safe_load(DASHBOARDS.read_text()).values():
        yield from (query for panel in board["panels"] for query in panel["queries"].values())


def test_every_query_asks_for_metrics_that_a_router_shows() -> None:
    shown = shown_metrics()
    for query in queries():
        asked = set(re.findall(r"moesaic:\w+", query))
        assert asked and asked <= shown, f"{query} asks for {sorted(asked - shown)}"


def test_rules_and_dashboards_are_rendered_as_they_are_written() -> None:
    manifests = rendered(HA)
    assert one(manifests, "PrometheusRule")["spec"] == yaml.safe_load(ALERTS.read_text())
    boards = yaml.safe_load(DASHBOARDS.read_text())
    for name, board in boards.items():
        (text,) = one(manifests, "ConfigMap", f"moesaic-dashboard-{name}")["data"].values()
        panels = json.loads(text)["panels"]
        assert [{target["legendFormat"]: target["expr"] for target in panel["targets"]} for panel in panels] == [
            panel["queries"] for panel in board["panels"]]
        places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
        assert len(places) == len(panels)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is in Debian's package prometheus")
def test_alerts_fire_when_they_should_and_not_before() -> None:
    told = subprocess.run(["promtool", "test", "rules", str(HERE / "alerts_test.yaml")], capture_output=True, text=True)
    assert told.returncode == 0, told.stdout + told.stderr


def test_every_alert_has_a_case_in_which_it_fires() -> None:
    alerts = re.findall(r"alert: (\w+)", ALERTS.read_text())
    assert set(re.findall(r'alertname="(\w+)"', (HERE / "alerts_test.yaml").read_text())) == set(alerts)
