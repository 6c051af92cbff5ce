"""A whole router replica before a real engine: how it begins, and how it ends with requests open."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster import router_replica
from cluster.coordinator.view import GroupPhase, RouterReport, View
from cluster.device.node import NodeIdentity
from cluster.router_replica import RouterReplica
from serving.config import parse_config
from serving.tenants.database import open_database
from serving.tenants.key import Limits
from serving.tenants.key_store import KeyStore
from serving.tenants.usage import read_usage
from serving.tenants.usage_by import UsageBy
from tests.cluster.shard.shard_jobs import DirectedCoordinator
from tests.deadlines import PATIENCE_S
from tests.e2e.tiny_model import write_checkpoint
from tests.serving.link.fake_link import Changed, epoch_of
from tests.serving.router.served_shards import Shard
from tests.serving.tenants.keys import new_key

BODY = {"model": "tiny", "prompt": "hello", "max_tokens": 8, "ignore_eos": True}


class Coordinator(DirectedCoordinator):
    """Keeps what the router reports."""

    def __init__(self) -> None:
        super().__init__(View(GroupPhase.WAITING, None, "two shards are missing"))
        self.reports: list[RouterReport] = []
        self.forgotten: list[str] = []
        self.reported = Changed()

    async def report_router(self, report: RouterReport) -> None:
        self.reports.append(report)
        self.reported.set()

    async def forget_router(self, router_id: str) -> None:
        self.forgotten.append(router_id)

    async def until_ready(self) -> None:
        await self.reported.until(lambda: bool(self.reports) and self.reports[-1].is_ready)


@dataclass
class Running:
    task: asyncio.Task[None]
    coordinator: Coordinator
    shard: Shard
    http: httpx.AsyncClient

    async def end(self) -> None:
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("router") / "tiny"
    write_checkpoint(folder)
    return folder


@pytest.fixture
async def running(checkpoint: Path) -> AsyncIterator[Running]:
    async with replica(checkpoint) as found:
        yield found


@asynccontextmanager
async def replica(checkpoint: Path, **access: object) -> AsyncIterator[Running]:
    config = parse_config({"model": {"path": str(checkpoint), "name": "tiny"}, "pools": [{}], "http_port": 0,
                           "router": {"grpc_port": 0}, "access": access})
    coordinator, shard = Coordinator(), Shard()
    await shard.start()
    task = asyncio.create_task(RouterReplica(config, NodeIdentity("n", "n", "127.0.0.1"), coordinator).run())
    gc.unfreeze()
    async with asyncio.timeout(PATIENCE_S):
        await coordinator.reported.until(lambda: bool(coordinator.reports))
        url = f"http://{coordinator.reports[0].http_address}"
        async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=PATIENCE_S) as http:
            found = Running(task, coordinator, shard, http)
            yield found
            await found.end()
    await shard.stop()


async def serve(running: Running) -> None:
    running.coordinator.show(View(GroupPhase.READY, epoch_of(1, running.shard.port)))
    await running.coordinator.until_ready()


async def first_event(running: Running, stack: contextlib.AsyncExitStack) -> Any:
    """Open a stream whose shard then stands still -> its lines from the second on."""
    running.shard.executor.allow(3)
    response = await stack.enter_async_context(
        running.http.stream("POST", "/v1/completions", json={**BODY, "stream": True}))
    lines = response.aiter_lines()
    assert (await anext(lines)).startswith("data: {")
    return lines


async def test_the_door_says_what_is_missing_until_it_serves(running: Running) -> None:
    waiting = await running.http.get("/health")
    assert waiting.status_code == 503 and "two shards are missing" in waiting.json()["error"]["message"]
    assert (await running.http.post("/v1/completions", json=BODY)).status_code == 503
    await serve(running)
    assert (await running.http.get("/health")).status_code == 200
    answer = await running.http.post("/v1/completions", json=BODY)
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 8
    assert not running.coordinator.forgotten


async def test_with_keys_an_answer_is_counted_once_also_at_the_end(checkpoint: Path, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/tenants.db"
    engine, (key, secret) = open_database(url), new_key(limits=Limits(requests_per_minute=9, tokens_per_month=15))
    KeyStore(engine).add(key)
    async with replica(checkpoint, keys=True, database=url) as running:
        await serve(running)
        assert (await running.http.post("/v1/completions", json=BODY)).status_code == 401
        headers = {"authorization": f"Bearer {secret}"}
        while True:
            answer = await running.http.post("/v1/completions", json=BODY, headers=headers)
            if answer.status_code != 401:       # the keys are read now
                break
        assert answer.status_code == 200 and answer.headers["x-ratelimit-limit-requests"] == "9"
        refusal = await running.http.post("/v1/completions", json=BODY, headers=headers)
        assert refusal.status_code == 429 and refusal.json()["error"]["code"] == "insufficient_quota"
    (usage,) = read_usage(engine, UsageBy.TENANT, (0, 10**6))
    engine.dispose()
    assert (usage.of, usage.num_requests, usage.num_open, usage.num_generated) == ("team", 1, 0, 8)


async def test_a_later_epoch_is_taken_before_it_is_ready_and_who_leaves_gets_nothing_new(running: Running) -> None:
    port = running.shard.port
    running.coordinator.show(View(GroupPhase.LOADING, epoch_of(1, port)))
    assert (await running.http.post("/v1/completions", json=BODY)).status_code == 503
    await serve(running)
    async with contextlib.AsyncExitStack() as stack:
        lines = await first_event(running, stack)
        running.coordinator.show(View(GroupPhase.LOADING, epoch_of(2, port)))
        await running.coordinator.reported.until(lambda: running.coordinator.reports[-1].epoch_number == 2)
        running.shard.executor.allow(None)
        assert [line async for line in lines if line][-1] == "data: [DONE]"
    assert running.shard.scheduler._num_arrived == 1        # its member stayed: it was not submitted again
    running.coordinator.show(View(GroupPhase.READY, epoch_of(2, port), leaving=("s0",)))
    await running.coordinator.reported.until(lambda: not running.coordinator.reports[-1].is_ready)
    assert (await running.http.get("/health")).status_code == 503
    running.coordinator.show(View(GroupPhase.READY, epoch_of(2, port)))
    await running.coordinator.until_ready()


async def test_what_is_open_at_the_end_goes_on(running: Running) -> None:
    await serve(running)
    async with contextlib.AsyncExitStack() as stack:
        lines = await first_event(running, stack)
        ending = asyncio.create_task(running.end())
        with pytest.raises(httpx.ConnectError):
            while True:
                async with httpx.AsyncClient(base_url=running.http.base_url, trust_env=False) as newcomer:
                    with contextlib.suppress(httpx.ReadError, httpx.RemoteProtocolError):   # it came in just before
                        await newcomer.get("/health")
        assert running.coordinator.forgotten
        running.shard.executor.allow(None)
        rest = [line async for line in lines if line]
        assert rest[-1] == "data: [DONE]" and not ending.done()
        await ending


async def test_what_does_not_end_in_time_gets_an_error(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_replica, "DRAIN_S", 0.0)
    await serve(running)
    async with contextlib.AsyncExitStack() as stack:
        lines = await first_event(running, stack)
        whole = asyncio.create_task(running.http.post("/v1/completions", json=BODY))
        while "moesaic:num_requests_open 2.0" not in (await running.http.get("/metrics")).text:     # noqa: ASYNC110
            await asyncio.sleep(0)
        ending = asyncio.create_task(running.end())
        rest = [line async for line in lines if line]
        assert "this router is shutting down" in rest[-1] and "not_ready" in rest[-1]
        answer = await whole
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "not_ready"
        await ending


async def test_a_coordinator_that_is_gone_holds_no_end_up(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = asyncio.Event()

    async def never(router_id: str) -> None:
        asked.set()
        await asyncio.Event().wait()
    monkeypatch.setattr(running.coordinator, "forget_router", never)
    await serve(running)
    await running.end()
    assert asked.is_set() and running.task.cancelled()
