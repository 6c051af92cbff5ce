"""Clients that ask all the time, while something is done to the service: nothing may fail, and no text may change."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import httpx

from tests.deadlines import PATIENCE_S

PROMPTS = ("hello", "one two three")
MAX_TOKENS = 300


@dataclass
class Streams:
    url: str
    texts: dict[str, list[str]] = field(default_factory=lambda: {prompt: [] for prompt in PROMPTS})
    errors: list[str] = field(default_factory=list)
    _ended: threading.Event = field(default_factory=threading.Event)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Ask from the beginning of the block to its end; every answer that was begun is awaited."""
        with httpx.Client(timeout=PATIENCE_S) as client:
            threads = [threading.Thread(target=self._ask, args=(client, prompt)) for prompt in PROMPTS]
            for thread in threads:
                thread.start()
            try:
                yield
            finally:
                self._ended.set()
                for thread in threads:
                    thread.join()

    def verify(self) -> None:
        """Nothing has failed, and every text is the one of an undisturbed service."""
        assert not self.errors, self.errors
        with httpx.Client(timeout=PATIENCE_S) as client:
            for prompt, texts in self.texts.items():
                assert texts and set(texts) == {stream(client, self.url, prompt)}, prompt

    def _ask(self, client: httpx.Client, prompt: str) -> None:
        while not self._ended.is_set():
            try:
                self.texts[prompt].append(stream(client, self.url, prompt))
            except (httpx.HTTPError, AssertionError) as error:
                self.errors.append(f"{prompt}: {error!r}")
                return


def stream(client: httpx.Client, url: str, prompt: str) -> str:
    """Return the text of a streamed completion."""
    body = {"model": "tiny", "prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0, "stream": True,
            "ignore_eos": True}
    text, is_done = "", False
    with client.stream("POST", f"{url}/v1/completions", json=body) as response:
        for line in response.iter_lines():
            content = line.removeprefix("data: ")
            is_done = is_done or content == "[DONE]"
            if content and not is_done:
                event = json.loads(content)
                assert "error" not in event, event
                text += event["choices"][0]["text"]
    assert is_done, text
    return text
