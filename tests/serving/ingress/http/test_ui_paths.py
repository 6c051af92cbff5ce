"""The live page by HTTP: its files, what it may do in a browser, who may follow, and that it ends."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator

import httpx
import pytest
from starlette.applications import Starlette

from serving.config import RouterConfig
from serving.ingress.http.app import HttpParts, build_http_app
from serving.ingress.http.ui.live_feed import LiveFeed
from serving.ingress.http.ui.snapshot import Snapshot
from serving.tenants.key import Scope
from serving.tenants.key_ring import KeyRing
from tests.serving.ingress.conftest import FakeService
from tests.serving.ingress.http.test_protocol import opened
from tests.serving.ingress.http.ui.snapshots import a_snapshot
from tests.serving.tenants.keys import new_key


async def test_the_page_is_one_folder_that_needs_nothing_from_elsewhere(http: httpx.AsyncClient) -> None:
    page = await http.get("/ui/")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    named = re.findall(r'(?:src|href)="([^"#:]+)"', page.text)
    assert sorted(named) == ["ui.css", "ui.js"] and "style=" not in page.text and "<style" not in page.text
    for name in named:
        answer = await http.get(f"/ui/{name}")
        assert answer.status_code == 200 and answer.headers["x-content-type-options"] == "nosniff"
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", answer.text)
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy and "frame-ancestors 'none'" in policy


async def test_without_its_slash_it_is_elsewhere_whatever_the_prefix(http: httpx.AsyncClient) -> None:
    answer = await http.get("/ui")
    assert answer.status_code == 307 and answer.headers["location"] == "ui/"
    assert (await http.get("/ui", follow_redirects=True)).text == (await http.get("/ui/")).text


async def followed(client: httpx.AsyncClient, num_events: int, **headers: str) -> list[tuple[str, object]]:
    found: list[tuple[str, object]] = []
    async with asyncio.timeout(60), client.stream("GET", "/ui/events", headers=headers) as response:
        assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
        async for line in response.aiter_lines():
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: "):
                found.append((name, json.loads(line.removeprefix("data: "))))
                if len(found) == num_events:
                    break
    return found


async def test_events_are_followed_through_the_door(app: Starlette) -> None:
    async with opened(app) as door, httpx.AsyncClient(base_url=f"http://127.0.0.1:{door.port}",
                                                      trust_env=False) as client:
        events = await followed(client, 4)
    assert dict(events) == {name: json.loads(content) for name, content in a_snapshot().events().items()}


class Keyed:
    """A door with keys, that whoever may follow follows."""

    def __init__(self, service: FakeService) -> None:
        self.keys = KeyRing(time.time)
        self.num_looks = 0
        self.feed = LiveFeed(self.look, time.monotonic, interval_s=0.0)
        self.app = build_http_app(service, service.tokenizer, RouterConfig(), lambda: (b"", "text/plain"),
                                  parts=HttpParts(keys=self.keys, live=self.feed))

    async def look(self) -> Snapshot:
        self.num_looks += 1
        return a_snapshot(num_tokens_per_s=float(self.num_looks))


@pytest.fixture
async def keyed(service: FakeService) -> AsyncIterator[tuple[Keyed, httpx.AsyncClient]]:
    keyed = Keyed(service)
    async with opened(keyed.app) as door, httpx.AsyncClient(base_url=f"http://127.0.0.1:{door.port}",
                                                            trust_env=False) as client:
        yield keyed, client
        keyed.feed.close()


async def test_only_a_key_for_it_follows_while_the_page_itself_is_free(
        keyed: tuple[Keyed, httpx.AsyncClient]) -> None:
    group, client = keyed
    (asking, ask_secret), (looking, look_secret) = (new_key(scopes=frozenset({scope}))
                                                    for scope in (Scope.INFER, Scope.STATUS))
    group.keys.set_keys([asking, looking])
    for path in ("/ui/", "/ui/ui.js", "/ui/ui.css"):
        assert (await client.get(path)).status_code == 200
    assert (await client.get("/ui/events")).status_code == 401
    assert (await client.get("/ui/events", headers={"authorization": f"Bearer {ask_secret}"})).status_code == 403
    assert group.num_looks == 0
    events = await followed(client, 4, authorization=f"Bearer {look_secret}")
    assert [name for name, _ in events] == ["group", "holders", "load", "requests"]


async def test_a_key_that_is_revoked_follows_no_longer(keyed: tuple[Keyed, httpx.AsyncClient]) -> None:
    group, client = keyed
    key, secret = new_key(scopes=frozenset({Scope.STATUS}))
    group.keys.set_keys([key])
    headers = {"authorization": f"Bearer {secret}"}
    async with asyncio.timeout(60), client.stream("GET", "/ui/events", headers=headers) as response:
        lines = response.aiter_lines()
        await anext(lines)
        group.keys.set_keys([])
        rest = [line async for line in lines]
    assert "event: error" in rest and "key" in rest[rest.index("event: error") + 1]


async def test_an_open_page_holds_no_end_up(keyed: tuple[Keyed, httpx.AsyncClient]) -> None:
    group, client = keyed
    key, secret = new_key(scopes=frozenset({Scope.ADMIN}))
    group.keys.set_keys([key])
    headers = {"authorization": f"Bearer {secret}"}
    async with asyncio.timeout(60), client.stream("GET", "/ui/events", headers=headers) as response:
        lines = response.aiter_lines()
        await anext(lines)
        group.feed.close()
        assert [line async for line in lines]
    assert group.feed.num_listeners == 0
