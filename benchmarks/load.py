"""Open-loop load on a running server, over the OpenAI completions API with server-sent events.

Requests leave at their own times (Poisson at --rate, or a trace's), however slow the answers are. Reported: time to
first token, inter-token latency, time per output token, and goodput: requests a second that met both limits.

  python benchmarks/load.py --rate 2 --duration-s 30
  python benchmarks/load.py --trace TRACE.csv --time-scale 0.5 --duration-s 60
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import ipaddress
import json
import math
import random
import socket
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
from machine import describe

BLOCK_TOKENS = 512              # of a trace's hash_ids: rows that share leading ids share so many tokens each
TOKEN_IDS = range(300, 450)     # prompts draw from these: ordinary text tokens in every checkpoint used here


@dataclass(frozen=True)
class Arrival:
    at_s: float
    num_input_tokens: int
    num_output_tokens: int
    block_ids: tuple[int, ...] = ()


@dataclass
class Outcome:
    sent_late_s: float
    ttft_s: float | None = None
    gaps_s: list[float] = field(default_factory=list)
    end_s: float = 0.0
    num_output_tokens: int = 0
    error: str = ""

    @property
    def tpot_s(self) -> float | None:
        if self.ttft_s is None or self.num_output_tokens < 2:
            return None
        return sum(self.gaps_s) / (self.num_output_tokens - 1)


# ==== what to send ====


def poisson_arrivals(options: argparse.Namespace) -> list[Arrival]:
    draw, at_s, arrivals = random.Random(options.seed), 0.0, list[Arrival]()
    while (at_s := at_s + draw.expovariate(options.rate)) < options.duration_s:
        arrivals.append(Arrival(at_s, options.input_tokens, options.output_tokens))
    return arrivals


def trace_arrivals(options: argparse.Namespace) -> list[Arrival]:
    arrivals = []
    with options.trace.open(encoding="utf-8") as rows:
        for row in csv.DictReader(rows):
            at_s = float(row["timestamp_s"]) * options.time_scale
            if at_s >= options.duration_s:
                break
            blocks = tuple(int(block) for block in (row.get("hash_ids") or "").split())
            arrivals.append(Arrival(at_s, max(1, int(int(row["input_tokens"]) * options.token_scale)),
                                    max(1, int(int(row["output_tokens"]) * options.token_scale)), blocks))
    return arrivals


def prompt_of(arrival: Arrival, index: int, seed: int, token_scale: float) -> list[int]:
    """Return token ids: those of the trace's shared blocks first, then the request's own."""
    token_ids: list[int] = []
    for block in arrival.block_ids:
        draw = random.Random(f"{seed} block {block}")
        token_ids += draw.choices(TOKEN_IDS, k=max(1, int(BLOCK_TOKENS * token_scale)))
    own = random.Random(f"{seed} request {index}")
    missing = max(0, arrival.num_input_tokens - len(token_ids))
    return (token_ids + own.choices(TOKEN_IDS, k=missing))[:arrival.num_input_tokens]


# ==== sending ====


async def send(session: aiohttp.ClientSession, body: dict[str, object], sent_late_s: float, url: str) -> Outcome:
    outcome, start_s = Outcome(sent_late_s), time.perf_counter()
    last_s = start_s
    try:
        async with session.post(f"{url}/v1/completions", json=body) as response:
            if response.status != 200:
                outcome.error = f"HTTP {response.status}"
                return outcome
            async for line in response.content:
                if not line.startswith(b"data:") or line[5:].strip() == b"[DONE]":
                    continue
                chunk, now_s = json.loads(line[5:]), time.perf_counter()
                if "error" in chunk:
                    outcome.error = str(chunk["error"].get("message"))[:200]
                if chunk.get("usage"):
                    outcome.num_output_tokens = chunk["usage"]["completion_tokens"]
                if not chunk.get("choices") or not chunk["choices"][0]["text"]:
                    continue
                if outcome.ttft_s is None:
                    outcome.ttft_s = now_s - start_s
                else:
                    outcome.gaps_s.append(now_s - last_s)
                last_s = now_s
        if not outcome.error and not outcome.num_output_tokens:
            outcome.error = "stream ended without usage"
    except (aiohttp.ClientError, TimeoutError) as error:
        outcome.error = type(error).__name__
    outcome.end_s = time.perf_counter()
    return outcome


async def run(arrivals: list[Arrival], options: argparse.Namespace) -> tuple[list[Outcome], float]:
    """Send every arrival at its time. Returns the outcomes and the seconds until the last one ended."""
    timeout = aiohttp.ClientTimeout(total=options.timeout_s)
    connector = aiohttp.TCPConnector(limit=0)
    headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    async with aiohttp.ClientSession(timeout=timeout, connector=connector, headers=headers) as session:
        model = options.model or await first_model(session, options.url)
        bodies = [{"model": model, "prompt": prompt_of(arrival, index, options.seed, options.token_scale),
                   "max_tokens": arrival.num_output_tokens, "temperature": 0, "seed": index, "stream": True,
                   "stream_options": {"include_usage": True}, "ignore_eos": True}
                  for index, arrival in enumerate(arrivals)]
        start_s, tasks = time.perf_counter(), list[asyncio.Task[Outcome]]()
        for arrival, body in zip(arrivals, bodies, strict=True):
            await asyncio.sleep(max(0.0, start_s + arrival.at_s - time.perf_counter()))
            late_s = time.perf_counter() - start_s - arrival.at_s
            tasks.append(asyncio.create_task(send(session, body, late_s, options.url)))
        outcomes = await asyncio.gather(*tasks)
        return outcomes, time.perf_counter() - start_s


async def first_model(session: aiohttp.ClientSession, url: str) -> str:
    async with session.get(f"{url}/v1/models") as response:
        response.raise_for_status()
        return str((await response.json())["data"][0]["id"])


# ==== figures ====


def percentiles(values: list[float]) -> dict[str, float] | None:
    """Return p50, p90, p99 by nearest rank, and the mean, in milliseconds."""
    if not values:
        return None
    ordered = sorted(values)
    ranks = {f"p{p}": ordered[max(0, math.ceil(p / 100 * len(ordered)) - 1)] for p in (50, 90, 99)}
    return {name: round(value * 1e3, 2) for name, value in {**ranks, "mean": sum(values) / len(values)}.items()}


def summarize(outcomes: list[Outcome], wall_s: float, options: argparse.Namespace) -> dict[str, object]:
    done = [outcome for outcome in outcomes if not outcome.error]
    good = [outcome for outcome in done if outcome.ttft_s is not None and outcome.ttft_s <= options.slo_ttft_s
            and (outcome.tpot_s or 0.0) <= options.slo_tpot_s]
    errors: dict[str, int] = {}
    for outcome in outcomes:
        if outcome.error:
            errors[outcome.error] = errors.get(outcome.error, 0) + 1
    return {
        "requests": len(outcomes), "completed": len(done), "errors": errors, "wall_s": round(wall_s, 2),
        "output_tokens_per_s": round(sum(outcome.num_output_tokens for outcome in done) / wall_s, 2),
        "requests_per_s": round(len(done) / wall_s, 3),
        "goodput_requests_per_s": round(len(good) / wall_s, 3),
        "goodput_share": round(len(good) / len(outcomes), 4) if outcomes else None,
        "slo": {"ttft_s": options.slo_ttft_s, "tpot_s": options.slo_tpot_s},
        "ttft_ms": percentiles([outcome.ttft_s for outcome in done if outcome.ttft_s is not None]),
        "inter_token_ms": percentiles([gap for outcome in done for gap in outcome.gaps_s]),
        "tpot_ms": percentiles([outcome.tpot_s for outcome in done if outcome.tpot_s is not None]),
        "sent_late_ms": percentiles([outcome.sent_late_s for outcome in outcomes]),
    }


def is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    addresses = {item[4][0] for item in socket.getaddrinfo(host, None)}
    return all(ipaddress.ip_address(address).is_loopback for address in addresses)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", help="default: the first of /v1/models")
    parser.add_argument("--api-key")
    parser.add_argument("--rate", type=float, default=1.0, help="Poisson arrivals a second")
    parser.add_argument("--trace", type=Path, help="CSV with timestamp_s,input_tokens,output_tokens[,hash_ids]")
    parser.add_argument("--time-scale", type=float, default=1.0, help="multiplies the trace's times")
    parser.add_argument("--token-scale", type=float, default=1.0, help="multiplies the trace's token counts")
    parser.add_argument("--duration-s", type=float, default=30.0, help="arrivals stop then")
    parser.add_argument("--max-requests", type=int, default=10_000)
    parser.add_argument("--timeout-s", type=float, default=120.0, help="of one request")
    parser.add_argument("--input-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--slo-ttft-s", type=float, default=2.0)
    parser.add_argument("--slo-tpot-s", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--allow-remote", action="store_true", help="send to a server that is not on this machine")
    options = parser.parse_args()
    if not options.allow_remote and not is_loopback(options.url):
        parser.error(f"{options.url} is not on this machine: give --allow-remote to load it all the same")
    return options


def main() -> None:
    options = parse_options()
    arrivals = (trace_arrivals(options) if options.trace else poisson_arrivals(options))[:options.max_requests]
    print(f"{len(arrivals)} requests over {options.duration_s:.0f} s", file=sys.stderr)
    outcomes, wall_s = asyncio.run(run(arrivals, options))
    print(json.dumps({"benchmark": "load", "trace": options.trace.name if options.trace else None,
                      "rate": None if options.trace else options.rate, **summarize(outcomes, wall_s, options),
                      "machine": describe()}))


if __name__ == "__main__":
    main()
