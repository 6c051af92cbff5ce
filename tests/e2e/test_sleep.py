"""A service without requests has no shard, and the first request has them start: its answer is the usual one."""

from __future__ import annotations

import httpx
import pytest
import yaml

from tests.deadlines import PATIENCE_S
from tests.e2e.conftest import Service, config_of, eventually

pytestmark = pytest.mark.multinode
BODY = {"model": "tiny", "prompt": "a", "max_tokens": 16, "temperature": 0}


def test_shards_go_without_requests_and_the_first_request_wakes_them(service: Service) -> None:
    awake = httpx.post(f"{service.url}/v1/completions", json=BODY, timeout=PATIENCE_S)
    config = config_of(service.checkpoint)
    pool = {"name": "cpu", "replicas": 2, "min_replicas": 1, "memory_budget": "800MB", "kv_cache": "4MB",
            "num_cpus": 0.1, "resources": {"shard": 1}}
    config |= {"application": "sleeper", "route_prefix": "/sleeper", "pools": [pool],
               "autoscaling": {"idle_timeout_s": 3}}
    path, url = service.work_dir / "sleeper.yaml", f"{service.proxy_url}/sleeper"
    path.write_text(yaml.safe_dump(config))
    service.ray("deploy", "sleeper", str(path))
    try:
        assert eventually(lambda: service.metric("asleep", "/sleeper") == 1)
        assert eventually(lambda: not service.shard_processes("sleeper"))
        shown = service.moesaic("status", "--autoscaler", "--application", "sleeper", "--address",
                                service.running.address)
        assert "asleep since" in shown.stdout and "-> 0: no request for" in shown.stdout, shown.stdout + shown.stderr
        assert httpx.get(f"{url}/health", timeout=PATIENCE_S).status_code == 200
        woken = httpx.post(f"{url}/v1/completions", json=BODY, timeout=PATIENCE_S)
        assert woken.status_code == 200 and woken.json()["choices"] == awake.json()["choices"], woken.text
    finally:
        service.ray("delete", "sleeper")
