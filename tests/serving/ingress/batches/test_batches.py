"""The Batch API through the official client, sync and async, over a real HTTP server, with a runner behind it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import openai
import pytest
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette

from serving.batches import runner as runner_module
from serving.batches.runner import BatchRunner
from serving.batches.stores import BatchStores
from serving.config import RouterConfig
from serving.ingress.batches.line_worker import LineWorker
from serving.ingress.http.app import HttpParts, build_http_app
from serving.ingress.responses.store import MemoryStore
from serving.metrics import BatchMetrics
from serving.router.patient_service import PatientService
from serving.tenants.key_ring import KeyRing
from serving.tenants.ledger import Ledger
from serving.text.tokenizer import Tokenizer
from tests.serving.ingress.conftest import ANSWER, FakeService
from tests.serving.tenants.keys import new_key

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "temperature": 0}
PROMPT = {"model": "tiny", "prompt": "hi", "temperature": 0, "max_tokens": 100}
RESPONSE = {"model": "tiny", "input": "hi", "temperature": 0}
BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", CHAT), ("/v1/completions", PROMPT), ("/v1/responses", RESPONSE)]


def jsonl(url: str, *bodies: dict[str, Any]) -> bytes:
    return b"".join(json.dumps({"custom_id": f"id-{number}", "method": "POST", "url": url, "body": body}).encode() +
                    b"\n" for number, body in enumerate(bodies))


@asynccontextmanager
async def runner(stores: BatchStores, service: FakeService, keys: KeyRing | None = None) -> AsyncIterator[None]:
    await stores.thread.call(lambda: Ledger(stores.engine, stores.router_id).beat(time.time(), []))
    work = LineWorker(PatientService(service), service.tokenizer, None, MemoryStore(), keys)
    task = asyncio.create_task(BatchRunner(stores, work, lambda: True, time.time,
                                           BatchMetrics(CollectorRegistry())).run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "POLL_S", 0.005)


async def ended(client: openai.AsyncOpenAI, batch_id: str) -> Any:
    async with asyncio.timeout(120):
        while True:
            found = await client.batches.retrieve(batch_id)
            if found.status in ("completed", "failed", "expired", "cancelled"):
                return found


async def begin(client: openai.AsyncOpenAI, url: Any, content: bytes, **more: Any) -> Any:
    file = await client.files.create(file=("in.jsonl", content), purpose="batch")
    return await client.batches.create(input_file_id=file.id, endpoint=url, completion_window="24h", **more)


async def lines(client: openai.AsyncOpenAI, file_id: str | None) -> list[dict[str, Any]]:
    assert file_id is not None
    return [json.loads(line) for line in (await client.files.content(file_id)).text.splitlines()]


@pytest.mark.parametrize(("url", "body"), BODIES)
async def test_a_batch_is_answered_as_its_requests_would_be(client: openai.AsyncOpenAI, http: httpx.AsyncClient,
                                                            service: FakeService, stores: BatchStores, url: str,
                                                            body: dict[str, Any]) -> None:
    async with runner(stores, service):
        batch = await begin(client, url, jsonl(url, body, body | {"temperature": 5.0}), metadata={"a": "b"})
        assert batch.status == "validating" and batch.expires_at == batch.created_at + 86400
        done = await ended(client, batch.id)
    assert (done.status, done.model, done.metadata) == ("completed", "tiny", {"a": "b"})
    assert (done.request_counts.total, done.request_counts.completed, done.request_counts.failed) == (2, 1, 1)
    (right,), (wrong,) = await lines(client, done.output_file_id), await lines(client, done.error_file_id)
    direct = (await http.post(url, json=body)).json()
    assert right["custom_id"] == "id-0" and right["response"]["status_code"] == 200 and right["error"] is None
    answered = right["response"]["body"]
    assert {name: answered[name] for name in ("object", "model", "usage")} == {
        name: direct[name] for name in ("object", "model", "usage")} and f"0{ANSWER}" in json.dumps(
            answered, ensure_ascii=False)
    assert wrong["custom_id"] == "id-1" and wrong["response"]["status_code"] == 400
    error = wrong["response"]["body"]["error"]
    assert error["param"] == "temperature" and error["code"] == "invalid_request"
    usage = done.usage
    assert usage.output_tokens > 0 and usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert done.in_progress_at and done.finalizing_at and done.completed_at and not done.cancelled_at


async def test_the_sync_client_lists_and_cancels(base_url: str) -> None:
    """Nobody runs, so the batch stays where it is."""
    def ask() -> None:
        with openai.OpenAI(base_url=base_url, api_key="any", max_retries=0) as sync:
            file = sync.files.create(file=jsonl("/v1/completions", PROMPT), purpose="batch")
            made = [sync.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
                    for _ in range(3)]
            assert {batch.id for batch in sync.batches.list(limit=2)} == {batch.id for batch in made}
            assert sync.batches.cancel(made[0].id).status == "cancelling"
            with pytest.raises(openai.BadRequestError, match="open batch"):
                sync.files.delete(file.id)
    await asyncio.to_thread(ask)


async def test_a_cancelled_batch_ends(client: openai.AsyncOpenAI, service: FakeService, stores: BatchStores) -> None:
    service.stalls = True
    async with runner(stores, service):
        batch = await begin(client, "/v1/chat/completions", jsonl("/v1/chat/completions", CHAT))
        async with asyncio.timeout(120):
            await service.started.wait()
        await client.batches.cancel(batch.id)
        done = await ended(client, batch.id)
        assert done.status == "cancelled" and done.cancelled_at and done.output_file_id is None
        async with asyncio.timeout(120):
            await service.closed.wait()


@pytest.mark.parametrize(("content", "code", "param"), [
    (b"", "empty_file", None), (b"{", "invalid_line", None), (b"[]", "invalid_line", None),
    (jsonl("/v1/completions", PROMPT), "invalid_line", "url"), (jsonl("/v1/x", CHAT), "invalid_line", "url"),
    (b'{"custom_id": "a", "method": "GET", "url": "/v1/chat/completions", "body": {}}', "invalid_line", "method"),
    (jsonl("/v1/chat/completions", CHAT) * 2, "duplicate_custom_id", "custom_id"),
    (b'{"method": "POST", "url": "/v1/chat/completions", "body": {}}', "invalid_line", "custom_id")])
async def test_a_wrong_file_fails_the_batch_and_names_the_line(
        client: openai.AsyncOpenAI, service: FakeService, stores: BatchStores, content: bytes, code: str,
        param: str | None) -> None:
    async with runner(stores, service):
        done = await ended(client, (await begin(client, "/v1/chat/completions", content)).id)
    assert done.status == "failed" and done.failed_at and done.errors is not None and service.requests == []
    fault = done.errors.data[0]
    assert (fault.code, fault.param) == (code, param) and fault.message and (fault.line or code == "empty_file")


@pytest.mark.parametrize(("fields", "param"), [
    ({"endpoint": "/v1/embeddings"}, "endpoint"), ({"completion_window": "1h"}, "completion_window"),
    ({"metadata": {"a": 1}}, "metadata.a"), ({"metadata": {str(key): "" for key in range(17)}}, "metadata"),
    ({"x": 1}, "x"), ({"input_file_id": "file-none"}, "input_file_id"), ({"input_file_id": None}, "input_file_id"),
    ({"output_expires_after": {"anchor": "created_at", "seconds": 10**8}}, "output_expires_after.seconds")])
async def test_what_cannot_be_is_refused_by_name(http: httpx.AsyncClient, fields: dict[str, Any], param: str) -> None:
    made = await http.post("/v1/files", files={"file": ("a", b"x")}, data={"purpose": "batch"})
    body = {"input_file_id": made.json()["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
    response = await http.post("/v1/batches", json=body | fields)
    error = response.json()["error"]
    assert response.status_code == (404 if fields.get("input_file_id") else 400), error
    assert error["param"] == param and error["code"] and ". " in error["message"]


async def test_lines_are_asked_for_the_key_of_their_batch(service: FakeService, tokenizer: Tokenizer,
                                                          stores: BatchStores) -> None:
    keys = KeyRing(time.time)
    (key, secret), (_, other) = new_key(tenant="team"), new_key(tenant="other")
    keys.set_keys([key])
    app: Starlette = build_http_app(service, tokenizer, RouterConfig(), lambda: (b"", ""),
                                    parts=HttpParts(keys=keys, stores=stores))
    headers = {"authorization": f"Bearer {secret}"}
    url = "/v1/completions"
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test", headers=headers) as http:
        async def begun() -> str:
            made = await http.post("/v1/files", files={"file": ("a", jsonl(url, PROMPT))}, data={"purpose": "batch"})
            batch = await http.post("/v1/batches", json={"input_file_id": made.json()["id"], "endpoint": url,
                                                         "completion_window": "24h"})
            return f"/v1/batches/{batch.json()['id']}"

        async def done(path: str) -> Any:
            async with asyncio.timeout(120):
                while (found := (await http.get(path)).json())["status"] != "completed":
                    pass
            return found
        first = await begun()
        async with runner(stores, service, keys):
            assert (await done(first))["request_counts"]["completed"] == 1
            assert service.requests[-1].tenant.key == key and service.requests[-1].deadline_s is not None
        second = await begun()
        gone = KeyRing(time.time)       # of a router that knows that the key is revoked
        gone.set_keys([])
        async with runner(stores, service, gone):
            assert (await done(second))["request_counts"]["failed"] == 1
        for path in (first, f"{first}/cancel"):
            method = "POST" if path.endswith("cancel") else "GET"
            assert (await http.request(method, path, headers={"authorization": f"Bearer {other}"})).status_code == 401


async def test_without_a_database_the_answer_says_how_to_have_one(service: FakeService, tokenizer: Tokenizer) -> None:
    app = build_http_app(service, tokenizer, RouterConfig(), lambda: (b"", "text/plain"))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
        for method, path in (("POST", "/v1/batches"), ("GET", "/v1/batches"), ("POST", "/v1/batches/x/cancel")):
            response = await http.request(method, path)
            assert response.status_code == 404 and "access.database" in response.json()["error"]["message"]
