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
from tests.cluster.shard.shard_jobs import DirectedCoordinator
from tests.e2e.tiny_model import write_checkpoint
from tests.serving.link.fake_link import Changed, epoch_of
from tests.serving.router.test_service import Shard

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
async def replica(checkpoint: Path) -> AsyncIterator[Running]:
    config = parse_config({"model": {"path": str(checkpoint), "name": "tiny"}, "pools": [{}], "http_port": 0,
                           "router": {"grpc_port": 0}})
    coordinator, shard = Coordinator(), Shard()
    await shard.start()
    task = asyncio.create_task(RouterReplica(config, NodeIdentity("n", "n", "127.0.0.1"), coordinator).run())
    gc.unfreeze()
    async with asyncio.timeout(60):
        await coordinator.reported.until(lambda: bool(coordinator.reports))
        url = f"http://{coordinator.reports[0].http_address}"
        async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=30.0) as http:
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


async def test_what_is_open_at_the_end_goes_on(running: Running) -> None:
    await serve(running)
    async with contextlib.AsyncExitStack() as stack:
        lines = await first_event(running, stack)
        ending = asyncio.create_task(running.end())
        with pytest.raises(httpx.ConnectError):
            while True:
                async with httpx.AsyncClient(base_url=running.http.base_url, trust_env=False) as newcomer:
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
