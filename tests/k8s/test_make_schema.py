"""The schema of the values is that of the config as it is now."""

from __future__ import annotations

import runpy

from tests.k8s.rendering import CHART


def test_the_schema_is_up_to_date() -> None:
    script = runpy.run_path(str(CHART.parent / "make_schema.py"))
    written = (CHART / "values.schema.json").read_text()
    assert written == script["schema_text"](), "run .venv/bin/python k8s/make_schema.py"
