"""A model larger than any node's budget: three nodes serve it, each within its budget; two are told what they miss."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
import yaml

from tests.e2e.conftest import Service, config_of, eventually
from tests.e2e.tiny_model import write_checkpoint

pytestmark = pytest.mark.multinode
BUDGET_BYTES = 840_000_000     # a process takes 360 to 440 MB of it: how much of libtorch is resident differs


@pytest.fixture(scope="module")
def large(service: Service) -> Iterator[Path]:
    folder = service.work_dir / "large"
    weights_bytes = write_checkpoint(folder, hidden_size=1024, num_layers=6, num_experts=24, moe_intermediate_size=1024)
    assert weights_bytes > BUDGET_BYTES
    yield folder
    (folder / "model.safetensors").unlink()


def deployed(service: Service, checkpoint: Path, name: str, replicas: int) -> None:
    config = config_of(checkpoint)
    pool = {"name": "cpu", "replicas": replicas, "memory_budget": BUDGET_BYTES, "kv_cache": "4MB", "num_cpus": 0.1,
            "resources": {"shard": 1}}
    config |= {"application": name, "route_prefix": f"/{name}", "pools": [pool]}
    path = service.work_dir / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    service.ray("deploy", name, str(path))


def health(service: Service, name: str) -> httpx.Response:
    return httpx.get(f"{service.proxy_url}/{name}/health", timeout=60.0)


def test_three_nodes_serve_it_each_within_its_budget(service: Service, large: Path) -> None:
    deployed(service, large, "three", replicas=3)
    try:
        assert eventually(lambda: health(service, "three").status_code == 200, timeout_s=120.0), health(
            service, "three").text
        prompts = [[index] * 200 for index in range(8)]
        answer = httpx.post(f"{service.proxy_url}/three/v1/completions", timeout=120.0,
                            json={"model": "tiny", "prompt": prompts, "max_tokens": 8, "temperature": 0})
        assert answer.status_code == 200, answer.text
        resident = [process.memory_info().rss for process in service.shard_processes("three")]
        assert len(resident) == 3 and max(resident) <= BUDGET_BYTES, resident
    finally:
        service.ray("delete", "three")


def test_two_nodes_are_told_what_is_missing(service: Service, large: Path) -> None:
    deployed(service, large, "two", replicas=2)
    try:
        assert eventually(lambda: "cannot hold the model" in health(service, "two").text, timeout_s=120.0), health(
            service, "two").text
        refused = health(service, "two")
        assert refused.status_code == 503
        message = refused.json()["error"]["message"]
        assert "bytes are missing" in message and message.count(f"bytes missing (budget {BUDGET_BYTES}") == 2, message
    finally:
        service.ray("delete", "two")


def peak_bytes(process: psutil.Process) -> int:
    """The most that was ever resident of it."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))) * 1024


def test_survivors_of_a_lost_shard_go_on_within_their_budget(service: Service, large: Path) -> None:
    """They keep what they hold and wait for another in its place, so that one more epoch is enough."""
    deployed(service, large, "lost", replicas=3)
    url = f"{service.proxy_url}/lost/v1/completions"
    body = {"model": "tiny", "prompt": [[index] * 50 for index in range(8)], "max_tokens": 400, "temperature": 0}
    try:
        assert eventually(lambda: health(service, "lost").status_code == 200, timeout_s=120.0), health(
            service, "lost").text
        with ThreadPoolExecutor(1) as threads:
            threads.submit(httpx.post, url, json=body, timeout=120.0)
            assert eventually(lambda: service.metric("num_requests_running", "/lost") > 0)
            lost, *survivors = service.shard_processes("lost")
            lost.kill()
            assert eventually(lambda: health(service, "lost").status_code != 200)
            assert eventually(lambda: health(service, "lost").status_code == 200, timeout_s=120.0), health(
                service, "lost").text
        assert all(process.is_running() for process in survivors)
        assert service.ray("epoch-number", "lost").split()[-1] == "2"
        peaks = [peak_bytes(process) for process in service.shard_processes("lost")]
        assert len(peaks) == 3 and max(peaks) <= BUDGET_BYTES, peaks
    finally:
        service.ray("delete", "lost")
