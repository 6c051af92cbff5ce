"""What the chart renders is what Ray's dashboard takes from KubeRay: with its token, and from nobody without."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest
import yaml

from cluster.http_proxy import CALLBACK
from k8s.make_base import PROFILES, files_of, read_values
from tests.deadlines import PATIENCE_S
from tests.e2e.conftest import eventually
from tests.e2e.tiny_model import write_checkpoint
from tests.k8s.rendering import one, render
from tests.ports import held_port

pytestmark = pytest.mark.multinode
TOKEN = secrets.token_hex(32)
RESOURCES = '{"routers": 1, "pool-cpu": 1}'     # as the worker groups of the chart offer them


@dataclass(frozen=True)
class Dashboard:
    port: int

    def client(self, **headers: str) -> httpx.Client:
        return httpx.Client(base_url=f"http://127.0.0.1:{self.port}", headers=headers, timeout=PATIENCE_S)


@pytest.fixture(scope="module")
def dashboard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dashboard]:
    """Ray's, of a cluster of one node that asks for a token, as KubeRay sets it."""
    port = held_port()
    environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_worker_niceness": "0",
                                "PYTHONSAFEPATH": "1", "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60", **CALLBACK}
    log = tmp_path_factory.mktemp("ray") / "start.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--port=0",
             "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--dashboard-port={port}",
             f"--ray-client-server-port={held_port()}", f"--dashboard-agent-listen-port={held_port()}",
             "--num-cpus=4", f"--resources={RESOURCES}", "--object-store-memory=83886080", "--disable-usage-stats"],
            env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        found = Dashboard(port)
        assert eventually(lambda: process.poll() is not None or _answers(found)), log.read_text()
        assert process.poll() is None, log.read_text()
        yield found
    finally:
        started = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.send_signal(signal.SIGTERM)
        process.wait(PATIENCE_S)
        for each in psutil.wait_procs(started, 10.0)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()


def _answers(dashboard: Dashboard) -> bool:
    try:
        with dashboard.client() as client:
            return client.get("/api/serve/applications/").status_code == 401
    except httpx.TransportError:
        return False


def _rendered(checkpoint: Path, http_port: int) -> dict[str, object]:
    """Return the Serve config of the profile for one machine, with a model of a few kilobytes."""
    profile = next(each for each in PROFILES if each.stem == "kind")
    values = read_values(files_of(profile))
    values["config"] |= {
        "http_host": "127.0.0.1", "http_port": http_port, "proxy_port": held_port(),
        "model": {"path": str(checkpoint), "name": "tiny"},
        "pools": [{"name": "cpu", "replicas": 1, "memory_budget": "800MB", "kv_cache": "4MB", "num_cpus": 0.1}],
        "router": {"replicas": 1, "num_cpus": 0.1, "grpc_port": held_port()}}
    return dict(yaml.safe_load(one(render(values), "RayService")["spec"]["serveConfigV2"]))


def test_what_the_chart_renders_runs_for_who_has_rays_token(dashboard: Dashboard, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "tiny")
    http_port = held_port()
    config = _rendered(tmp_path / "tiny", http_port)
    for headers in ({}, {"authorization": "Bearer wrong"}):
        with dashboard.client(**headers) as stranger:
            assert stranger.put("/api/serve/applications/", json=config).status_code in (401, 403)
    with dashboard.client(**{"x-ray-authorization": f"Bearer {TOKEN}"}) as kuberay:
        told: list[httpx.Response] = []

        def is_taken() -> bool:         # Serve's proxies have a fixed time to start; KubeRay asks again too
            told[:] = [kuberay.put("/api/serve/applications/", json=config)]
            return told[0].status_code == 200

        def is_running() -> bool:
            told[:] = [kuberay.get("/api/serve/applications/")]
            return told[0].status_code == 200 and {
                each["status"] for each in told[0].json()["applications"].values()} == {"RUNNING"}
        assert eventually(is_taken) and eventually(is_running), told[0].text
    with httpx.Client(base_url=f"http://127.0.0.1:{http_port}", timeout=PATIENCE_S) as client:
        assert eventually(lambda: client.get("/health").status_code == 200), "the router has heard of the group"
        answer = client.post("/v1/completions", json={
            "model": "tiny", "prompt": "hello", "max_tokens": 4, "temperature": 0})
        assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 4, answer.text
