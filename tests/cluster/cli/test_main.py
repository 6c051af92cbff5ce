"""What people see when something is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def moesaic(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", "from cluster.cli.main import main; main()", *arguments],
                          capture_output=True, text=True, timeout=120)


def test_errors_are_one_message_without_a_traceback(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("model: {path: x}\npools: [{replicas: 0, colour: red}]\n")
    refused = moesaic("up", str(config))
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    assert "pools.0.replicas" in refused.stderr and "pools.0.colour: unknown key" in refused.stderr


@pytest.mark.parametrize("command", ["status", "chat", "down"])
def test_nothing_runs(command: str, tmp_path: Path) -> None:
    refused = moesaic(command, "--state-dir", str(tmp_path))
    assert refused.returncode == 1 and "moesaic up" in refused.stderr and "Traceback" not in refused.stderr


def test_wrong_usage_ends_with_2() -> None:
    assert moesaic("up").returncode == 2
