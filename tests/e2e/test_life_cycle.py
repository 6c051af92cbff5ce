"""`moesaic` leaves nothing when it is ended, and says so when a service has ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest
import yaml

from cluster.launch.process_marks import are_alive, process_of, stop_processes
from cluster.launch.state_file import RunningCluster, read_state
from serving.errors import ServingError
from tests.e2e.conftest import COMMAND_TIMEOUT_S, config_of, eventually, moesaic
from tests.e2e.tiny_model import write_checkpoint

pytestmark = pytest.mark.multinode
APPLICATION = "life-cycle"
AT_ONCE_S = 60.0        # Ray alone would ask for minutes


@pytest.fixture
def config_path(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "tiny")
    config = config_of(tmp_path / "tiny") | {"application": APPLICATION}
    config["pools"] = [dict(pool, replicas=1) for pool in config["pools"]]      # type: ignore[attr-defined]
    config["local_nodes"] = [{"name": "a", "num_cpus": 2, "resources": {"shard": 1}}]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return tmp_path / "config.yaml"


@pytest.fixture
def state_dir(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "state"
    with contextlib.suppress(ServingError):
        stop_processes(read_state(tmp_path / "state").processes)


@contextlib.contextmanager
def starting(config_path: Path, state_dir: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", "from cluster.cli.main import main; main()", "up", str(config_path),
               "--state-dir", str(state_dir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8",
                          start_new_session=True) as process:
        try:
            yield process
        finally:
            process.kill()


def noted(state_dir: Path) -> RunningCluster | None:
    with contextlib.suppress(ServingError):
        return read_state(state_dir, APPLICATION)
    return None


def has_begun(state_dir: Path) -> bool:
    """Return whether its head node runs."""
    running = noted(state_dir)
    return running is not None and bool(running.processes)


def runs_replicas(state_dir: Path) -> bool:
    """Return whether the application is being deployed."""
    running = noted(state_dir)
    nodes = [process_of(mark) for mark in running.processes] if running else []
    with contextlib.suppress(psutil.NoSuchProcess):
        return any("ServeReplica" in part for node in nodes if node is not None
                   for child in node.children(recursive=True) for part in child.cmdline())
    return False


@pytest.mark.parametrize(("signum", "when"), [(signal.SIGTERM, has_begun), (signal.SIGINT, runs_replicas)])
def test_a_signal_undoes_the_start(config_path: Path, state_dir: Path, signum: signal.Signals,
                                   when: Callable[[Path], bool]) -> None:
    with starting(config_path, state_dir) as process:
        assert eventually(lambda: when(state_dir))
        running = noted(state_dir)
        assert running is not None
        children = [child for mark in running.processes if (node := process_of(mark))
                    for child in node.children(recursive=True)]
        child = psutil.Process(process.pid).children()[0]
        os.killpg(process.pid, signum)      # the whole group, as a terminal does
        assert eventually(lambda: not child.is_running() or child.status() in (psutil.STATUS_STOPPED,
                                                                               psutil.STATUS_ZOMBIE))
        os.killpg(process.pid, signal.SIGINT)
        os.killpg(process.pid, signal.SIGTERM)
        output, _ = process.communicate(timeout=COMMAND_TIMEOUT_S)
    assert process.returncode == 128 + signum, output
    assert "Traceback" not in output and "ended by SIG" in output
    assert noted(state_dir) is None and not are_alive(running.processes)
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)


def test_two_starts_at_once_are_one_and_down_ends_it(config_path: Path, state_dir: Path) -> None:
    config = yaml.safe_load(config_path.read_text(encoding="utf-8"))
    config["pools"][0]["replicas"] = 2      # its node takes one: the first start is not done before it is ended
    config_path.write_text(yaml.safe_dump(config), encoding="utf-8")
    with starting(config_path, state_dir) as process:
        assert eventually(lambda: has_begun(state_dir))
        second = moesaic("up", str(config_path), "--state-dir", str(state_dir))
        assert second.returncode == 1 and "another `moesaic up`" in second.stderr, second.stderr
        down = moesaic("down", "--state-dir", str(state_dir))
        assert down.returncode == 0, down.stderr
        output, _ = process.communicate(timeout=COMMAND_TIMEOUT_S)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert noted(state_dir) is None


def test_a_service_whose_processes_are_gone_is_told_at_once(config_path: Path, state_dir: Path) -> None:
    started = moesaic("up", str(config_path), "--state-dir", str(state_dir))
    assert started.returncode == 0, started.stderr
    running = noted(state_dir)
    assert running is not None
    control_service = next(mark for mark in running.processes if "gcs_server" in mark.name)
    process = process_of(control_service)
    assert process is not None
    process.kill()
    assert eventually(lambda: process_of(control_service) is None)
    for command in (["status"], ["status", "--json"], ["chat", "hello"], ["placement", "show"]):
        began_s = time.monotonic()
        told = moesaic(*command, "--state-dir", str(state_dir))
        assert told.returncode == 1 and time.monotonic() - began_s < AT_ONCE_S
        assert "gcs_server of a" in told.stderr and "moesaic down" in told.stderr, told.stderr
    down = moesaic("down", "--state-dir", str(state_dir))
    assert down.returncode == 0 and not are_alive(running.processes), down.stderr
    (state_dir / f"{APPLICATION}.json").write_text(json.dumps(asdict(running)), encoding="utf-8")
    assert "all its processes have ended" in moesaic("status", "--state-dir", str(state_dir)).stderr
    down = moesaic("down", "--state-dir", str(state_dir))
    assert down.returncode == 0 and "had ended already" in down.stdout, down.stdout


def test_a_failed_deployment_shows_the_error_of_its_replica(config_path: Path, state_dir: Path, tmp_path: Path) -> None:
    """Here a pool whose environment has a `model.py` in front of the program's."""
    (tmp_path / "shadows").mkdir()
    (tmp_path / "shadows" / "model.py").write_text("raise RuntimeError('this is not the program')", encoding="utf-8")
    config = yaml.safe_load(config_path.read_text(encoding="utf-8"))
    config["pools"][0]["runtime_env"] = {"env_vars": {"PYTHONPATH": str(tmp_path / "shadows")}}
    config_path.write_text(yaml.safe_dump(config), encoding="utf-8")
    failed = moesaic("up", str(config_path), "--state-dir", str(state_dir))
    assert failed.returncode == 1 and "Traceback" not in failed.stderr
    assert f"RuntimeError: this is not the program ({tmp_path}/shadows/model.py, line 1)" in failed.stderr
    assert noted(state_dir) is None
