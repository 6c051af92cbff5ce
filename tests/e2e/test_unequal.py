"""Shards of different emulated speed on the running cluster: they say so, share out the work, and answer the same."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
import yaml

from tests.deadlines import PATIENCE_S
from tests.e2e.conftest import Service, config_of, eventually

pytestmark = pytest.mark.multinode
NAME = "unequal"
SPEEDS = {"fast": 0.4, "slow": 0.1}


@pytest.fixture(scope="module")
def url(service: Service) -> Iterator[str]:
    pool = {"num_cpus": 0.1, "num_threads": 1, "kv_cache": "4MB", "memory_budget": "800MB", "resources": {"shard": 1}}
    config = config_of(service.checkpoint) | {
        "application": NAME, "route_prefix": f"/{NAME}", "placement": {"num_rows": 64, "context_tokens": 64},
        "pools": [pool | {"name": name, "emulated_speed": speed} for name, speed in SPEEDS.items()]}
    path = service.work_dir / f"{NAME}.yaml"
    path.write_text(yaml.safe_dump(config))
    service.ray("deploy", NAME, str(path))
    url = f"{service.proxy_url}/{NAME}"
    try:
        assert eventually(lambda: httpx.get(f"{url}/health", timeout=PATIENCE_S).status_code == 200)
        yield url
    finally:
        service.ray("delete", NAME)


def answer(url: str, seed: int) -> str:
    body = {"model": "tiny", "prompt": f"request {seed}", "max_tokens": 24, "temperature": 1.0, "seed": seed}
    reply = httpx.post(f"{url}/v1/completions", json=body, timeout=PATIENCE_S)
    assert reply.status_code == 200, reply.text
    return str(reply.json()["choices"][0]["text"])


def test_speeds_change_no_answer(service: Service, url: str) -> None:
    assert [answer(url, seed) for seed in range(4)] == [answer(service.url, seed) for seed in range(4)]


def by_pool(metrics: str, name: str) -> dict[str, float]:
    return {line.split('pool="')[1].split('"')[0]: float(line.rsplit(" ", 1)[1]) for line in metrics.splitlines()
            if line.startswith(f"moesaic:{name}{{")}


def test_the_faster_shard_gets_the_larger_share_and_emulation_is_shown(url: str) -> None:
    metrics = httpx.get(f"{url}/metrics", timeout=PATIENCE_S).text
    shares = by_pool(metrics, "request_share")
    assert shares["fast"] > shares["slow"] and sum(shares.values()) == pytest.approx(1.0)
    assert by_pool(metrics, "emulated_speed") == SPEEDS
