"""One local Ray cluster of three nodes for all end-to-end tests, started and stopped with the command line."""

from __future__ import annotations

import atexit
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from cluster.launch.process_marks import process_of, stop_processes
from cluster.launch.state_file import RunningCluster, read_state
from serving.errors import ServingError
from tests.deadlines import PATIENCE_S
from tests.e2e.tiny_model import write_checkpoint
from tests.ports import held_port
from tests.process_pool import ProcessPool

COMMAND_TIMEOUT_S = PATIENCE_S
MAX_OPEN_REQUESTS = 40
MAX_QUEUED_REQUESTS = 8
APPLICATION = "e2e"


def moesaic(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own, as a user does."""
    return subprocess.run([sys.executable, "-c", "from cluster.cli.main import main; main()", *arguments],
                          capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S)


def eventually(holds: Callable[[], bool], timeout_s: float = PATIENCE_S) -> bool:
    """For what other processes do in their own time."""
    until_s = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > until_s:
            return False
        time.sleep(0.05)
    return True


@dataclass(frozen=True)
class Service:
    running: RunningCluster
    checkpoint: Path
    state_dir: Path
    work_dir: Path
    proxy_url: str          # of Ray Serve's proxy, which all applications of the cluster share
    worker: ProcessPool     # of one process, connected to the cluster

    @property
    def url(self) -> str:
        return self.running.http_url

    @property
    def model(self) -> str:
        return self.running.model

    def moesaic(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Carry out a command that asks a running service, without a process of its own: see ray_commands.py. Once more
        where the coordinator is too busy to answer in the seconds that a person would wait."""
        done: list[subprocess.CompletedProcess[str]] = []

        def is_answered() -> bool:
            done[:] = [self.ray("moesaic", *arguments, "--state-dir", str(self.state_dir))]
            return "did not answer" not in done[0].stderr
        eventually(is_answered)
        return done[0]

    def status(self, application: str = APPLICATION) -> dict[str, object]:
        """`moesaic status --json`, as soon as there is an answer."""
        found: list[str] = []

        def is_answered() -> bool:
            done = self.moesaic("status", "--json", "--address", self.running.address, "--application", application)
            found[:] = [done.stdout or done.stderr]
            return bool(done.stdout)
        assert eventually(is_answered), found
        return dict(json.loads(found[0]))

    def metric(self, name: str, route_prefix: str = "") -> float:
        """Add it up over all labels. `route_prefix`: of another application on the same cluster."""
        url = f"{self.proxy_url}{route_prefix}" if route_prefix else self.url
        lines = httpx.get(f"{url}/metrics", timeout=PATIENCE_S).text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines
                   if line.startswith((f"moesaic:{name} ", f"moesaic:{name}{{")))

    def is_empty(self) -> bool:
        """Nothing is open in the router, nothing runs or waits in any shard, no KV block is in use."""
        names = ("num_requests_open", "num_requests_queued", "num_requests_running", "num_requests_waiting",
                 "kv_cache_usage_perc")
        return not any(self.metric(name) for name in names)

    def shard_processes(self, application: str = APPLICATION) -> list[psutil.Process]:
        found = []
        for mark in self.running.processes:
            process = process_of(mark)
            for child in process.children(recursive=True) if process else []:
                with contextlib.suppress(psutil.NoSuchProcess):
                    if any(f"ServeReplica:{application}:Shard" in part for part in child.cmdline()):
                        found.append(child)
        return found

    def ray(self, command: str, *arguments: object) -> Any:
        """Have one of ray_commands.py carried out."""
        return self.worker.run(f"tests.e2e.ray_commands:{command}", [(self.running.address, *arguments)])[0]


def config_of(checkpoint: Path) -> dict[str, object]:
    return {
        "application": APPLICATION, "http_port": 0, "proxy_port": held_port(),
        "model": {"path": str(checkpoint), "name": "tiny"},
        "pools": [{"name": "cpu", "replicas": 3, "memory_budget": "800MB", "kv_cache": "4MB", "num_cpus": 0.1,
                   "resources": {"shard": 1}}],
        "router": {"num_cpus": 0.1, "grpc_port": 0, "admission": {
            "max_open_requests": MAX_OPEN_REQUESTS, "max_queued_requests": MAX_QUEUED_REQUESTS}},
        "scheduler": {"max_batch_tokens": 256, "max_running_requests": 64},
        "local_nodes": [{"name": name, "num_cpus": 2, "resources": {"shard": 2}} for name in ("a", "b", "c")]}


@pytest.fixture(scope="session", autouse=True)
def _clients_go_past_proxies() -> Iterator[None]:
    """Those of the tests themselves; that the service does so too is for test_surroundings.py."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("no_proxy", "NO_PROXY"):
            patch.setenv(name, "127.0.0.1,localhost,::1")
        yield


def _stop(state_dir: Path) -> None:
    """Whatever state the tests left it in."""
    with contextlib.suppress(ServingError):
        stop_processes(read_state(state_dir, APPLICATION).processes)


@pytest.fixture(scope="session")
def connected_worker() -> Iterator[ProcessPool]:
    worker = ProcessPool(1)
    yield worker
    worker.close()


@pytest.fixture(scope="session")
def service(connected_worker: ProcessPool, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    work_dir = tmp_path_factory.mktemp("e2e")
    checkpoint, state_dir = work_dir / "tiny", work_dir / "state"
    write_checkpoint(checkpoint)
    config_path = work_dir / "config.yaml"
    config = config_of(checkpoint)
    config["pools"] = [dict(pool, min_replicas=2) for pool in config["pools"]]      # type: ignore[attr-defined]
    config_path.write_text(yaml.safe_dump(config))
    atexit.register(_stop, state_dir)
    try:
        started = moesaic("up", str(config_path), "--state-dir", str(state_dir))
        assert started.returncode == 0, started.stdout + started.stderr
        yield Service(read_state(state_dir, APPLICATION), checkpoint, state_dir, work_dir,
                      f"http://127.0.0.1:{config['proxy_port']}", connected_worker)
        stopped = moesaic("down", "--state-dir", str(state_dir), "--application", APPLICATION)
        assert stopped.returncode == 0, stopped.stderr
    finally:
        _stop(state_dir)
        atexit.unregister(_stop)
