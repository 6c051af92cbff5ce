"""A service that says a fixed text, and both doors in front of it."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path

import httpx
import openai
import pytest
import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette

from model.step import TokenLogprob
from serving.batches.stored_file import CHUNK_BYTES
from serving.batches.stores import BatchStores
from serving.config import BatchConfig, RouterConfig
from serving.engine.request import FinishReason
from serving.errors import NotReadyError
from serving.ingress.http.app import HttpParts, build_http_app
from serving.ingress.http.ui.live_feed import LiveFeed
from serving.ingress.http.ui.snapshot import Snapshot
from serving.router.generation import GenerationDelta, GenerationRequest, ModelCard
from serving.router.request_checks import check_requests
from serving.tenants.database import open_database
from serving.text.detokenizer import Detokenizer
from serving.text.tokenizer import Tokenizer
from tests.serving.ingress.http.ui.snapshots import a_snapshot

ANSWER = "Hello 你好 👩‍👩‍👧 world, this is a longer answer than sixteen tokens."


class FakeService:
    """Streams ANSWER token by token, each choice's own number before it; a hot one also depends on the seed."""

    def __init__(self, tokenizer: Tokenizer, max_model_len: int = 256) -> None:
        self.tokenizer = tokenizer
        self.cards = (ModelCard("tiny", max_model_len, created_s=1_700_000_000),)
        self.ready = True
        self.requests: list[GenerationRequest] = []
        self.num_closed = 0
        self.error: Exception | None = None         # raised after `num_before_error` deltas
        self.num_before_error = 0
        self.says: str | None = None                # instead of the answer
        self.stalls = False                         # after the first delta: wait to be cancelled or resumed
        self.resume = asyncio.Event()
        self.started = asyncio.Event()
        self.closed = asyncio.Event()

    def is_ready(self) -> bool:
        return self.ready

    async def generate(self, requests: Sequence[GenerationRequest]) -> AsyncGenerator[tuple[int, GenerationDelta]]:
        check_requests(requests, self.cards[0], self.tokenizer.num_embeddings, None)        # as the real one does
        self.requests += requests
        try:
            if not self.ready:
                raise NotReadyError("no shards are serving yet", fix="wait")
            deltas = [(index, delta) for index, request in enumerate(requests) for delta in self._deltas(request)]
            for num_sent, delta in enumerate(deltas):
                if self.error is not None and num_sent == self.num_before_error:
                    raise self.error
                yield delta
                self.started.set()
                if self.stalls:
                    await self.resume.wait()
        finally:
            self.num_closed += len(requests)
            self.closed.set()

    def _deltas(self, request: GenerationRequest) -> list[GenerationDelta]:
        choices = [self._choice(request, index) for index in range(request.params.n)]
        longest = max(len(choice) for choice in choices)
        return [choice[index] for index in range(longest) for choice in choices if index < len(choice)]

    def _choice(self, request: GenerationRequest, index: int) -> list[GenerationDelta]:
        params = request.params
        draw = hashlib.sha256(f"{params.seed} {params.temperature!r}".encode()).hexdigest()[:6]
        usual = f"{index}{'' if params.temperature == 0 else draw}{ANSWER}"
        whole = self.tokenizer.encode(usual if self.says is None else self.says, add_special_tokens=False)
        ids = whole[:params.max_tokens]
        end = FinishReason.LENGTH if len(ids) < len(whole) else FinishReason.STOP
        detokenizer = Detokenizer(self.tokenizer, request.prompt_token_ids, params.stop,
                                  params.include_stop_str_in_output, params.skip_special_tokens)
        deltas = []
        for position, token_id in enumerate(ids):
            piece = detokenizer.push([token_id])
            is_last = position == len(ids) - 1
            finish = FinishReason.STOP if piece.stop_string else end if is_last else None
            deltas.append(GenerationDelta(
                index, piece.text + (detokenizer.flush() if is_last else ""), (token_id,),
                logprobs=() if params.logprobs is None else (scored(token_id, params.logprobs),),
                prompt_logprobs=() if params.prompt_logprobs is None or position else tuple(
                    scored(prompt_id, params.prompt_logprobs) for prompt_id in request.prompt_token_ids[1:]),
                num_cached_tokens=3 if position == 0 else None, finish_reason=finish, stop_reason=piece.stop_string))
            if piece.stop_string:
                break
        return deltas


def scored(token_id: int, num_top: int) -> TokenLogprob:
    return TokenLogprob(token_id, -0.5, tuple((token_id + rank, -0.5 - rank) for rank in range(num_top)))


@pytest.fixture(scope="session")
def plain_tokenizer(byte_level_dir: Path) -> Tokenizer:
    return Tokenizer.from_dir(byte_level_dir)


@pytest.fixture
def template() -> str | None:
    """The chat template, None for the checkpoint's own."""
    return None


@pytest.fixture
def tokenizer(plain_tokenizer: Tokenizer, template: str | None, folder_with: Callable[..., Path]) -> Tokenizer:
    return plain_tokenizer if template is None else Tokenizer.from_dir(folder_with(chat_template=template))


@pytest.fixture
async def service(tokenizer: Tokenizer, template: str | None) -> FakeService:
    return FakeService(tokenizer, max_model_len=256 if template is None else 2048)     # what others write is longer


@pytest.fixture
def app(service: FakeService, tokenizer: Tokenizer) -> Starlette:
    async def look() -> Snapshot:
        return a_snapshot()
    return build_http_app(service, tokenizer, RouterConfig(), lambda: (b"moesaic:up 1\n", CONTENT_TYPE_LATEST),
                          parts=HttpParts(live=LiveFeed(look, time.monotonic)))


@pytest.fixture
def stores(tmp_path: Path) -> Iterator[BatchStores]:
    """Stores of files and batches in a new database."""
    engine = open_database(f"sqlite:///{tmp_path}/tenants.db")
    yield BatchStores(engine, "router", BatchConfig(max_file_bytes=2 * CHUNK_BYTES, max_tenant_bytes=3 * CHUNK_BYTES))
    engine.dispose()


@pytest.fixture
async def http(app: Starlette) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        yield client


@pytest.fixture
async def base_url(app: Starlette) -> AsyncIterator[str]:
    server = uvicorn.Server(uvicorn.Config(app, port=0, lifespan="off", log_level="error", ws="none"))
    config = server.config
    config.load()
    server.lifespan = config.lifespan_class(config)
    await server.startup()
    loop = asyncio.create_task(server.main_loop())
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}/v1"
    server.should_exit = True
    await loop
    await server.shutdown()


@pytest.fixture
async def client(base_url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=base_url, api_key="any", max_retries=0) as made:
        yield made
