"""The command as people call it."""

from __future__ import annotations

import json
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests.cluster.whatif.plan_questions import EXAMPLES, SMALL_MODEL
from tests.command_line import moesaic_here


def plan(*arguments: object) -> CompletedProcess[str]:
    return moesaic_here("plan", *map(str, arguments))


def test_json_is_all_that_stdout_has_and_the_page_is_written(tmp_path: Path) -> None:
    done = plan("--model", SMALL_MODEL, "--cluster", EXAMPLES / "clusters/8xH100.yaml", "--fast", "--json",
                "--html", tmp_path / "plan.html")
    assert done.returncode == 0 and json.loads(done.stdout)["fits"]
    assert (tmp_path / "plan.html").read_text().startswith("<!DOCTYPE html>")


def test_what_does_not_fit_ends_with_1(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text("nodes: [{name: a, device: t4}]")
    done = plan("--model", SMALL_MODEL, "--cluster", tmp_path / "small.yaml")
    assert done.returncode == 1 and "it does not fit" in done.stdout


@pytest.mark.parametrize(("cluster", "named"), [
    ("nodes: [{name: a, device: h1000}]", "'h1000' is not known"),
    ("nodes: [{name: a, device: t4, count: 0}]", "nodes.0.count")])
def test_errors_have_no_traceback(cluster: str, named: str, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(cluster)
    done = plan("--model", SMALL_MODEL, "--cluster", tmp_path / "bad.yaml")
    assert done.returncode == 1 and named in done.stderr and "Traceback" not in done.stderr
