"""People are told when something is wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from cluster.launch.state_file import RunningCluster, write_state
from tests.command_line import moesaic_here
from tests.deadlines import PATIENCE_S


def moesaic(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, without this one's folders; see moesaic_here for what needs none."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "MOESAIC_"))}
    return subprocess.run([sys.executable, "-c", "from cluster.cli.main import main; main()", *arguments],
                          capture_output=True, encoding="utf-8", timeout=PATIENCE_S, env=inherited | variables)


def test_errors_are_one_message_without_a_traceback(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("model: {path: x}\npools: [{replicas: 0, colour: red}]\n")
    refused = moesaic("up", str(config))
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    assert "pools.0.replicas" in refused.stderr and "pools.0.colour: unknown key" in refused.stderr


@pytest.mark.parametrize("command", ["status", "chat", "down"])
def test_nothing_runs(command: str, tmp_path: Path) -> None:
    refused = moesaic_here(command, "--state-dir", str(tmp_path))
    assert refused.returncode == 1 and "moesaic up" in refused.stderr and "Traceback" not in refused.stderr


def test_a_model_that_is_there_need_not_be_fetched(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert moesaic_here("fetch", str(tmp_path)).stdout.strip() == str(tmp_path)
    refused = moesaic_here("fetch", "s3://bucket/model")
    assert refused.returncode == 1 and "unknown scheme 's3'" in refused.stderr and "Traceback" not in refused.stderr


@pytest.mark.parametrize("door", [[], ["--grpc"]])
def test_a_service_that_is_starting_has_no_address_yet(door: list[str], tmp_path: Path) -> None:
    write_state(RunningCluster("one", "auto", "", "tiny"), tmp_path)
    refused = moesaic_here("chat", "hello", *door, "--state-dir", str(tmp_path))
    assert refused.returncode == 1 and "still starting" in refused.stderr and "Traceback" not in refused.stderr


def test_wrong_usage_ends_with_2() -> None:
    assert moesaic_here("up").returncode == 2


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_a_command_without_a_stack(signum: signal.Signals) -> None:
    """The doctor, while its processes begin to import what they need."""
    command = [sys.executable, "-c", "from cluster.cli.main import main; main()", "doctor"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
                          env=os.environ | {"PYTHONUNBUFFERED": "1"}, start_new_session=True) as process:
        assert process.stdout is not None
        while "shared memory" not in (line := process.stdout.readline()):
            assert line, "the doctor has ended too early"
        while not psutil.Process(process.pid).children():
            pass
        os.killpg(process.pid, signum)
        _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 128 + signum, errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("content", ["", "{", '{"application": "a"}', "[1]"])
@pytest.mark.parametrize("command", ["status", "chat", "down"])
def test_a_broken_note_is_named(command: str, content: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(content, encoding="utf-8")
    refused = moesaic_here(command, "--state-dir", str(tmp_path))
    assert refused.returncode == 1 and "a.json" in refused.stderr and "Traceback" not in refused.stderr


@pytest.mark.parametrize(("home", "command", "named"), [
    ("/proc/no-home", ["up", "config.yaml"], "MOESAIC_STATE_DIR"), ("/dev/null", ["demo"], "XDG_CACHE_HOME")])
def test_a_home_that_cannot_be_written_to_is_named(home: str, command: list[str], named: str,
                                                   tmp_path: Path) -> None:
    """With another home each, see test_state_file.py and test_demo.py."""
    config = tmp_path / "config.yaml"
    config.write_text("model: {path: /nowhere}\npools: [{}]\n", encoding="utf-8")
    refused = moesaic(*(str(config) if part == config.name else part for part in command), HOME=home)
    assert refused.returncode == 1 and "Traceback" not in refused.stderr and named in refused.stderr, refused.stderr
