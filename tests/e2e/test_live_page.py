"""The live page in a real browser, where the machine has one: Debian's package is called chromium."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from serving.config import RouterConfig
from serving.ingress.http.app import HttpParts, build_http_app
from serving.ingress.http.ui.live_feed import LiveFeed
from serving.ingress.http.ui.snapshot import Snapshot
from serving.tenants.key import Scope
from serving.tenants.key_ring import KeyRing
from serving.text.tokenizer import Tokenizer
from tests.serving.conftest import byte_level_dir
from tests.serving.ingress.conftest import ANSWER, FakeService
from tests.serving.ingress.http.test_protocol import opened
from tests.serving.ingress.http.ui.snapshots import NODES, a_snapshot
from tests.serving.tenants.keys import new_key

playwright = pytest.importorskip("playwright.async_api", reason="playwright is not installed")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WAIT_MS = 120_000.0     # of what happens at once where the machine is not busy
__all__ = ["byte_level_dir"]

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium: install Debian's package chromium")


class Served:
    """A page that wants a key, of a group that changes when the test says so."""

    def __init__(self, folder: Path) -> None:
        tokenizer = Tokenizer.from_dir(folder)
        self.health = "healthy"
        self.feed = LiveFeed(self.look, time.monotonic, interval_s=0.05)
        keys = KeyRing(time.time)
        key, self.secret = new_key(scopes=frozenset({Scope.ADMIN}))
        keys.set_keys([key])
        self.app = build_http_app(FakeService(tokenizer), tokenizer, RouterConfig(), lambda: (b"", "text/plain"),
                                  parts=HttpParts(keys=keys, live=self.feed))

    async def look(self) -> Snapshot:
        return a_snapshot(health=self.health)


@pytest.fixture
async def page() -> AsyncIterator[playwright.Page]:
    async with playwright.async_playwright() as started:
        # As root, as in containers, Chromium has no sandbox; it loads only the page of this test.
        browser = await started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"], timeout=WAIT_MS)
        context = await browser.new_context()
        context.set_default_timeout(WAIT_MS)
        yield await context.new_page()
        await browser.close()


async def test_it_shows_the_group_and_chats(page: playwright.Page, byte_level_dir: Path) -> None:      # noqa: F811
    served, expect = Served(byte_level_dir), playwright.expect
    expect.set_options(timeout=WAIT_MS)
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text) if message.type in ("error", "warning") else None)
    page.on("request", lambda request: faults.append(request.url) if "//127.0.0.1:" not in request.url
            and not request.url.startswith("data:") else None)
    async with opened(served.app) as door:
        await page.goto(f"http://127.0.0.1:{door.port}/ui")
        await page.get_by_label("Key", exact=True).fill(served.secret)
        await page.get_by_role("button", name="Use it").click()
        for node in NODES:
            await expect(page.get_by_role("rowheader", name=node)).to_be_visible()
        await expect(page.locator("#straggler")).to_contain_text("The others wait for node-c: its experts take 1.90 x")
        await expect(page.locator("#changes")).to_contain_text("died shard-3")
        await expect(page.get_by_role("img", name="Tokens a second")).to_have_accessible_name(re.compile("now 41"))
        await page.locator("#map").press("ArrowDown")
        await page.locator("#map").press("ArrowDown")
        await expect(page.locator("#cell")).to_have_text(
            "MoE layer 1, expert 0: on node-a; 0.72 × the layer's mean load")
        await page.get_by_label("Your message").fill("hello")
        await page.get_by_role("button", name="Send").click()
        await expect(page.locator("#chat")).to_contain_text(ANSWER)
        await expect(page.locator("#pace")).to_contain_text("tokens")
        served.health = "loading"
        await expect(page.get_by_role("status").first).to_have_text("loading")
        served.feed.close()
    assert [fault for fault in faults if "401" not in fault] == []
