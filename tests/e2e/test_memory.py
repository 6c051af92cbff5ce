"""A model larger than any node's budget: three nodes serve it, each within its budget; two are told what they miss."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from tests.deadlines import PATIENCE_S
from tests.e2e.conftest import Service, config_of, eventually
from tests.e2e.test_operations import epoch_number
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
    return httpx.get(f"{service.proxy_url}/{name}/health", timeout=PATIENCE_S)


def test_two_nodes_are_told_what_is_missing(service: Service, large: Path) -> None:
    deployed(service, large, "two", replicas=2)
    try:
        assert eventually(lambda: "cannot hold the model" in health(service, "two").text), health(service, "two").text
        refused = health(service, "two")
        assert refused.status_code == 503
        message = refused.json()["error"]["message"]
        assert "bytes are missing" in message and message.count(f"bytes missing (budget {BUDGET_BYTES}") == 2, message
    finally:
        service.ray("delete", "two")


@pytest.fixture(scope="module")
def three_url(service: Service, large: Path) -> Iterator[str]:
    """Three nodes serve it there. The cluster has no room for two more beside them, so what needs those comes first."""
    deployed(service, large, "three", replicas=3)
    try:
        assert eventually(lambda: health(service, "three").status_code == 200), health(service, "three").text
        yield f"{service.proxy_url}/three/v1/completions"
    finally:
        service.ray("delete", "three")


def peak_bytes(service: Service) -> list[int]:
    """Return the most that was ever resident of each shard."""
    statuses = [Path(f"/proc/{process.pid}/status").read_text() for process in service.shard_processes("three")]
    return [int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))) * 1024
            for status in statuses]


def test_three_nodes_serve_it_each_within_its_budget(service: Service, three_url: str) -> None:
    answer = httpx.post(three_url, timeout=PATIENCE_S, json={
        "model": "tiny", "prompt": [[index] * 200 for index in range(8)], "max_tokens": 8, "temperature": 0})
    assert answer.status_code == 200, answer.text
    peaks = peak_bytes(service)
    assert len(peaks) == 3 and max(peaks) <= BUDGET_BYTES, peaks


def test_survivors_of_a_lost_shard_go_on_and_take_another_in_within_their_budget(service: Service,
                                                                                three_url: str) -> None:
    """Two cannot hold the model: the answer that runs waits for another, and is what it is without a loss."""
    body = {"model": "tiny", "prompt": [[index] * 50 for index in range(8)], "max_tokens": 200, "temperature": 0,
            "ignore_eos": True, "stream": True}
    first_epoch = epoch_number(service, "three")
    disturbed = events(three_url, body)
    texts = dict([next(disturbed)])
    lost, *survivors = service.shard_processes("three")
    lost.kill()
    for index, text in disturbed:
        texts[index] = texts.get(index, "") + text
    assert eventually(lambda: epoch_number(service, "three") > first_epoch)
    assert eventually(lambda: health(service, "three").status_code == 200), health(service, "three").text
    assert all(process.is_running() for process in survivors)
    undisturbed = httpx.post(three_url, json=body | {"stream": False}, timeout=PATIENCE_S)
    assert texts == {choice["index"]: choice["text"] for choice in undisturbed.json()["choices"]}
    peaks = peak_bytes(service)
    assert len(peaks) == 3 and max(peaks) <= BUDGET_BYTES, peaks


def events(url: str, body: dict[str, object]) -> Iterator[tuple[int, str]]:
    """Yield the pieces of a streamed answer as they come, each with the number of its choice."""
    with httpx.stream("POST", url, json=body, timeout=PATIENCE_S) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):          # others are comments that keep it open, and its end
                for choice in json.loads(line.removeprefix("data: "))["choices"]:
                    yield choice["index"], choice["text"]
