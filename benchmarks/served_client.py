"""The one client of served.py: closed-loop clients in one process, over HTTP or gRPC, that stream completions.

Every run draws new prompts, so that it meets no prefix cache; where a server says that it found tokens cached, that
is reported. Times are taken as tokens arrive: `return_token_ids` makes servers send each token, with or without text.

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
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import grpc
from load import first_model, percentiles

FIRST_TOKEN_ID = 300            # below are special tokens and bytes
Ask = Callable[[list[int], "Stream"], Awaitable[None]]


@dataclass
class Stream:
    """One answer as it arrived."""

    began_s: float = field(default_factory=time.perf_counter)
    times_s: list[float] = field(default_factory=list)      # of each token
    num_cached: int = 0                                     # of the prompt's tokens, as the server says

    def arrived(self, num_tokens: int) -> None:
        self.times_s += [time.perf_counter()] * num_tokens


async def ask_http(session: aiohttp.ClientSession, url: str, body: dict[str, object], stream: Stream) -> None:
    async with session.post(f"{url}/v1/completions", json=body) as response:
        if response.status != 200:
            raise RuntimeError(f"{url}: HTTP {response.status}: {(await response.text())[:300]}")
        async for line in response.content:
            if not line.startswith(b"data:") or line[5:].strip() == b"[DONE]":
                continue
            chunk = json.loads(line[5:])
            if "error" in chunk:
                raise RuntimeError(f"{url}: {chunk['error']}")
            for choice in chunk.get("choices") or ():
                stream.arrived(len(choice.get("token_ids") or ()))
            details = (chunk.get("usage") or {}).get("prompt_tokens_details") or {}
            stream.num_cached = max(stream.num_cached, details.get("cached_tokens") or 0)


async def run_http(options: argparse.Namespace) -> tuple[list[Stream], float]:
    timeout = aiohttp.ClientTimeout(total=options.timeout_s)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        model = await first_model(session, options.http)

        async def ask(prompt: list[int], stream: Stream) -> None:
            await ask_http(session, options.http, {
                "model": model, "prompt": prompt, "max_tokens": options.tokens, "temperature": 0, "stream": True,
                "stream_options": {"include_usage": True}, "ignore_eos": True, "return_token_ids": True}, stream)

        return await run_clients(options, ask)


async def run_grpc(options: argparse.Namespace) -> tuple[list[Stream], float]:
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from serving.proto import inference_pb2 as pb
    from serving.proto.inference_pb2_grpc import InferenceStub

    async with grpc.aio.insecure_channel(options.grpc, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        stub = InferenceStub(channel)
        model = (await stub.ListModels(pb.ListModelsRequest())).models[0].name
        sampling = pb.Sampling(max_tokens=options.tokens, ignore_eos=True, temperature=0)

        async def ask(prompt: list[int], stream: Stream) -> None:
            request = pb.GenerateRequest(model=model, token_ids=pb.TokenIds(ids=prompt), sampling=sampling)
            async for answer in stub.Generate(request, timeout=options.timeout_s):
                stream.arrived(len(answer.token_ids))
                stream.num_cached = max(stream.num_cached, answer.usage.cached_tokens)

        return await run_clients(options, ask)


async def run_clients(options: argparse.Namespace, ask: Ask) -> tuple[list[Stream], float]:
    """Have every client ask one question after the other -> all answers, and the seconds that they took together."""
    draw = random.Random(options.seed)
    streams: list[Stream] = []

    async def client(prompts: list[list[int]]) -> None:
        for prompt in prompts:
            stream = Stream()
            streams.append(stream)
            await ask(prompt, stream)
            if len(stream.times_s) != options.tokens:
                raise RuntimeError(f"an answer has {len(stream.times_s)} tokens, {options.tokens} were asked for")

    vocabulary = range(FIRST_TOKEN_ID, options.vocab_size)
    prompts = [[draw.choices(vocabulary, k=options.input_tokens) for _ in range(options.requests)]
               for _ in range(options.clients)]
    began_s = time.perf_counter()
    await asyncio.gather(*map(client, prompts))
    return streams, time.perf_counter() - began_s


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
    cpu_before_s = time.process_time()
    streams, wall_s = asyncio.run(run_http(options) if options.http else run_grpc(options))
    print(json.dumps({"benchmark": "served_client", "clients": options.clients, "seed": options.seed,
                      **figures(streams, wall_s, time.process_time() - cpu_before_s)}))


if __name__ == "__main__":
    main()
