"""The Files API through the official client, sync and async, over a real HTTP server."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import httpx
import openai
import pytest
from sqlalchemy import func, select
from starlette.applications import Starlette

from serving.batches.stored_file import CHUNK_BYTES
from serving.batches.stores import BatchStores
from serving.config import RouterConfig
from serving.ingress.http.app import HttpParts, build_http_app
from serving.tenants.database import reading
from serving.tenants.key_ring import KeyRing
from serving.tenants.schema import FILES
from serving.text.tokenizer import Tokenizer
from tests.serving.ingress.conftest import FakeService
from tests.serving.tenants.keys import new_key

LINES = b'{"a": 1}\n{"b": "\xc3\xa9"}\r\n'


async def test_a_file_goes_up_and_comes_back(client: openai.AsyncOpenAI) -> None:
    made = await client.files.create(file=("in.jsonl", LINES), purpose="batch")
    assert (made.bytes, made.filename, made.purpose, made.object) == (len(LINES), "in.jsonl", "batch", "file")
    assert made.expires_at is not None and abs(made.expires_at - made.created_at - 30 * 86400) <= 1
    assert await client.files.retrieve(made.id) == made
    assert (await client.files.content(made.id)).content == LINES
    assert [file async for file in await client.files.list(purpose="batch")] == [made]
    assert (await client.files.delete(made.id)).deleted
    with pytest.raises(openai.NotFoundError):
        await client.files.content(made.id)


async def test_the_sync_client_uploads_what_is_larger_than_a_chunk(base_url: str) -> None:
    content = bytes(range(256)) * (CHUNK_BYTES // 256) + b"\r\n--rest"

    def ask() -> None:
        with openai.OpenAI(base_url=base_url, api_key="any", max_retries=0) as sync:
            made = sync.files.create(file=content, purpose="batch",
                                     expires_after={"anchor": "created_at", "seconds": 7200})
            assert made.expires_at == made.created_at + 7200 and made.bytes == len(content)
            with sync.files.with_streaming_response.content(made.id) as response:
                assert response.headers["content-length"] == str(len(content))
                assert b"".join(response.iter_bytes()) == content
            second = sync.files.create(file=b"x", purpose="batch")
            assert [file.id for file in sync.files.list(limit=1)] == [second.id, made.id]       # of two pages
            assert [file.id for file in sync.files.list(order="asc", limit=10)] == [made.id, second.id]
    await asyncio.to_thread(ask)


@pytest.mark.parametrize(("form", "files", "param"), [
    ({"purpose": "fine-tune"}, [("file", b"x")], "purpose"), ({}, [("file", b"x")], "purpose"),
    ({"purpose": "batch"}, [("file", b"x"), ("file", b"y")], "file"), ({"purpose": "batch"}, [("data", b"x")], "file"),
    ({"purpose": "batch", "x": "1"}, [("file", b"x")], "x"),
    ({"purpose": "batch", "y": "1" * 2000}, [("file", b"x")], "y"),
    ({"purpose": "batch", "expires_after[seconds]": "1", "expires_after[anchor]": "created_at"}, [("file", b"x")],
     "expires_after.seconds"),
    ({"purpose": "batch", "expires_after[seconds]": "9999999", "expires_after[anchor]": "created_at"},
     [("file", b"x")], "expires_after.seconds"),
    ({"purpose": "batch"}, [("file", b"x" * (2 * CHUNK_BYTES + 1))], "file"),
    ({"purpose": "batch", "file": "x"}, [], "file")])
async def test_what_cannot_be_is_refused_by_name_and_leaves_nothing(
        http: httpx.AsyncClient, stores: BatchStores, form: dict[str, str], files: list[tuple[str, bytes]], param: str
        ) -> None:
    parts: Any = [(name, (None, value)) for name, value in form.items()]
    parts += [(name, ("in.jsonl", content)) for name, content in files]
    response = await http.post("/v1/files", files=parts)
    error = response.json()["error"]
    assert response.status_code == 400, error
    assert error["param"] == param and error["code"] == "invalid_request" and ". " in error["message"]
    assert (await http.get("/v1/files")).json()["data"] == []
    with reading(stores.engine) as connection:
        assert connection.execute(select(func.count()).select_from(FILES)).scalar_one() == 0


@pytest.mark.parametrize(("path", "status", "param"), [
    ("/v1/files?limit=0", 400, "limit"), ("/v1/files?order=up", 400, "order"), ("/v1/files?x=1", 400, "x"),
    ("/v1/files?after=file-none", 404, "after"), ("/v1/files/file-none", 404, "file_id"),
    ("/v1/files/file-none/content", 404, "file_id")])
async def test_what_is_not_there_is_named(http: httpx.AsyncClient, path: str, status: int, param: str) -> None:
    response = await http.get(path)
    assert response.status_code == status and response.json()["error"]["param"] == param, response.text


async def test_files_are_of_the_tenant_of_a_key(service: FakeService, tokenizer: Tokenizer,
                                                stores: BatchStores) -> None:
    keys = KeyRing(time.time)
    (mine, secret), (theirs, other) = new_key(tenant="team"), new_key(tenant="other")
    keys.set_keys([mine, theirs])
    app = build_http_app(service, tokenizer, RouterConfig(), lambda: (b"", "text/plain"),
                         parts=HttpParts(keys=keys, stores=stores))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
        def ask(method: str, path: str, secret: str, **more: Any) -> Any:
            return http.request(method, path, headers={"authorization": f"Bearer {secret}"}, **more)
        made = await ask("POST", "/v1/files", secret, files={"file": ("a", b"x")}, data={"purpose": "batch"})
        path = f"/v1/files/{made.json()['id']}"
        assert (await ask("GET", path, secret)).status_code == 200
        for method, where in (("GET", path), ("GET", f"{path}/content"), ("DELETE", path)):
            assert (await ask(method, where, other)).status_code == 404
        assert (await ask("GET", "/v1/files", other)).json()["data"] == []
        assert (await http.get(path)).status_code == 401


async def test_without_a_database_the_answer_says_how_to_have_one(service: FakeService, tokenizer: Tokenizer) -> None:
    app: Starlette = build_http_app(service, tokenizer, RouterConfig(), lambda: (b"", "text/plain"))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
        for method, path in (("POST", "/v1/files"), ("GET", "/v1/files"), ("GET", "/v1/files/x/content")):
            response = await http.request(method, path)
            assert response.status_code == 404 and "access.database" in response.json()["error"]["message"]
