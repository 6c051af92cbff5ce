"""The one client of served.py: closed-loop clients in one process, over HTTP or gRPC, that stream completions.

It shares the machine with what it measures, so while answers come it only notes when which bytes came, and reads them
when all are there. Every run draws new prompts, so that it meets no prefix cache; where a server says that it found
tokens cached, that is reported. `return_token_ids` makes servers send each token, with or without text.

  python benchmarks/served_client.py --http http://127.0.0.1:8000 --clients 16
  python benchmarks/served_client.py --grpc 127.0.0.1:9000 --clients 1
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import secrets
import sys
import time
import urllib.parse
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import grpc
import httptools
import uvloop
from load import first_model, percentiles

FIRST_TOKEN_ID = 300            # below are special tokens and bytes
Ask = Callable[[list[int], "Stream"], Awaitable[None]]
Read = Callable[["Stream"], None]


@dataclass
class Stream:
    """One answer as it arrived."""

    began_s: float = field(default_factory=time.perf_counter)
    pieces: list[tuple[float, bytes]] = field(default_factory=list)     # when which bytes came
    times_s: list[float] = field(default_factory=list)      # of each token
    num_cached: int = 0                                     # of the prompt's tokens, as the server says


class HttpConnection(asyncio.Protocol):
    """The connection of one client, on which one answer follows the other."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport

    async def ask(self, request: bytes, stream: Stream) -> None:
        """Return when the whole answer is in `stream`. Raises RuntimeError for another status than 200."""
        self._stream, self._is_over = stream, asyncio.get_running_loop().create_future()
        self._parser = httptools.HttpResponseParser(self)
        self._transport.write(request)
        await self._is_over
        status = self._parser.get_status_code()
        if status != 200:
            raise RuntimeError(f"HTTP {status}: {b''.join(body for _, body in stream.pieces)!r:.300}")

    def data_received(self, content: bytes) -> None:
        self._now_s = time.perf_counter()
        self._parser.feed_data(content)

    def on_body(self, body: bytes) -> None:
        self._stream.pieces.append((self._now_s, body))

    def on_message_complete(self) -> None:
        self._is_over.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._is_over.done():
            self._is_over.set_exception(RuntimeError(f"the connection broke: {exc}"))


def read_events(stream: Stream) -> None:
    """Find the tokens in server-sent events. Raises RuntimeError when one is an error."""
    unread = b""
    for time_s, piece in stream.pieces:
        *events, unread = (unread + piece).split(b"\n\n")
        for event in events:
            content = event.partition(b"data:")[2].strip()
            chunk = {} if content in (b"", b"[DONE]") else json.loads(content)
            if "error" in chunk:
                raise RuntimeError(chunk["error"])
            for choice in chunk.get("choices") or ():
                stream.times_s += [time_s] * len(choice.get("token_ids") or ())
            details = (chunk.get("usage") or {}).get("prompt_tokens_details") or {}
            stream.num_cached = max(stream.num_cached, details.get("cached_tokens") or 0)


async def run_http(options: argparse.Namespace) -> tuple[list[Stream], float, float]:
    url = urllib.parse.urlsplit(options.http)
    async with aiohttp.ClientSession() as session:
        model = await first_model(session, options.http)
    connections: list[HttpConnection] = []
    for _ in range(options.clients):
        connections.append((await asyncio.get_running_loop().create_connection(
            HttpConnection, url.hostname, url.port))[1])

    async def ask(prompt: list[int], stream: Stream) -> None:
        body = json.dumps({
            "model": model, "prompt": prompt, "max_tokens": options.tokens, "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True}, "ignore_eos": True, "return_token_ids": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: {url.netloc}\r\ncontent-type: application/json\r\n"
        connection = connections.pop()      # there are as many as clients
        async with asyncio.timeout(options.timeout_s):
            await connection.ask(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body, stream)
        connections.append(connection)

    return await run_clients(options, ask, read_events)


async def run_grpc(options: argparse.Namespace) -> tuple[list[Stream], float, float]:
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from serving.proto import inference_pb2 as pb
    from serving.proto.inference_pb2_grpc import InferenceStub

    def read_messages(stream: Stream) -> None:
        for time_s, piece in stream.pieces:
            answer = pb.GenerateResponse.FromString(piece)
            stream.times_s += [time_s] * len(answer.token_ids)
            stream.num_cached = max(stream.num_cached, answer.usage.cached_tokens)

    async with grpc.aio.insecure_channel(options.grpc, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        model = (await InferenceStub(channel).ListModels(pb.ListModelsRequest())).models[0].name
        sampling = pb.Sampling(max_tokens=options.tokens, ignore_eos=True, temperature=0)
        generate = channel.unary_stream("/moesaic.v1.Inference/Generate", pb.GenerateRequest.SerializeToString)

        async def ask(prompt: list[int], stream: Stream) -> None:
            request = pb.GenerateRequest(model=model, token_ids=pb.TokenIds(ids=prompt), sampling=sampling)
            async for answer in generate(request, timeout=options.timeout_s):
                stream.pieces.append((time.perf_counter(), answer))

        return await run_clients(options, ask, read_messages)


async def run_clients(options: argparse.Namespace, ask: Ask, read: Read) -> tuple[list[Stream], float, float]:
    """Have every client ask one question after the other -> all answers, the seconds that they took together, and those
    that this process worked meanwhile."""
    draw = random.Random(options.seed)
    streams: list[Stream] = []

    async def client(prompts: list[list[int]]) -> None:
        for prompt in prompts:
            stream = Stream()
            streams.append(stream)
            await ask(prompt, stream)

    vocabulary = range(FIRST_TOKEN_ID, options.vocab_size)
    prompts = [[draw.choices(vocabulary, k=options.input_tokens) for _ in range(options.requests)]
               for _ in range(options.clients)]
    began_s, began_cpu_s = time.perf_counter(), time.process_time()
    await asyncio.gather(*map(client, prompts))
    wall_s, cpu_s = time.perf_counter() - began_s, time.process_time() - began_cpu_s
    for stream in streams:
        read(stream)
        if len(stream.times_s) != options.tokens:
            raise RuntimeError(f"an answer has {len(stream.times_s)} tokens, {options.tokens} were asked for")
    return streams, wall_s, cpu_s


def figures(streams: list[Stream], wall_s: float, cpu_s: float) -> dict[str, object]:
    """Return what the answers show. `inter_token_ms`: between tokens, 0 within a message that brings several;
    `tpot_ms`: of each answer the mean of those."""
    gaps_s = [after - before for stream in streams for before, after in
              zip(stream.times_s, stream.times_s[1:], strict=False)]
    return {"tokens_per_s": round(sum(len(stream.times_s) for stream in streams) / wall_s, 2),
            "ttft_ms": percentiles([stream.times_s[0] - stream.began_s for stream in streams]),
            "inter_token_ms": percentiles(gaps_s),
            "tpot_ms": percentiles([(stream.times_s[-1] - stream.times_s[0]) / max(1, len(stream.times_s) - 1)
                                    for stream in streams]),
            "wall_s": round(wall_s, 3), "client_cpu": round(cpu_s / wall_s, 3),
            "cached_tokens": sum(stream.num_cached for stream in streams)}


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    door = parser.add_mutually_exclusive_group(required=True)
    door.add_argument("--http", metavar="URL", help="ask /v1/completions there")
    door.add_argument("--grpc", metavar="HOST:PORT", help="ask a moesaic router's gRPC door")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=3, help="of each client, one after the other")
    parser.add_argument("--input-tokens", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--vocab-size", type=int, default=32_000, help="prompts draw from it")
    parser.add_argument("--seed", type=int, help="of the prompts; default: a new one for each run")
    parser.add_argument("--timeout-s", type=float, default=120.0, help="of one request")
    options = parser.parse_args()
    options.seed = secrets.randbits(48) if options.seed is None else options.seed
    return options


def main() -> None:
    options = parse_options()
    streams, wall_s, cpu_s = uvloop.run(run_http(options) if options.http else run_grpc(options))
    print(json.dumps({"benchmark": "served_client", "clients": options.clients, "seed": options.seed,
                      **figures(streams, wall_s, cpu_s)}))


if __name__ == "__main__":
    main()
