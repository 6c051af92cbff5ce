"""`moesaic up` (HTTP and gRPC; 1, 2 and 3 shards), `vllm serve` and the offline engine, under one client program.

In each repeat every system is brought up, warmed, asked, and taken down again, in turns, forwards and backwards; each
figure is the median over the repeats. The client is served_client.py: one process, closed-loop clients, prompts that
are new in each run; a run that met tokens in a prefix cache is marked. `offline` is the engine in one process, given
as many sequences at once as there are clients: what serving costs is the distance to it. The last line is one JSON
object. What fails is named, and the rest is measured all the same.

  python benchmarks/served.py --vllm /peers/vllm/bin/python
  python benchmarks/served.py --quick --only moesaic-1,moesaic-2
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from machine import describe
from make_checkpoint import SHAPES, default_dir, make

HERE = Path(__file__).parent
CLIENT_S = 300.0
DEMO_VOCAB = 40_000
Figures = dict[str, Any]        # as served_client.py prints them
Row = tuple[str, str, int]      # system, door, clients
COLUMNS = ("tokens_per_s", "ttft_ms p50", "ttft_ms p99", "tpot_ms p50", "inter_token_ms p50",
           "inter_token_ms p99", "client_cpu")


def systems_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return how to bring up each system that was asked for, by name; None: the engine in one process."""
    from served_systems import demo, moesaic, vllm

    rows = max(options.clients)
    systems: dict[str, Any] = {"offline": None}
    systems |= {f"moesaic-{num}": moesaic(options.folder, num, options.threads, rows) for num in options.shards}
    if options.vllm:
        systems["vllm"] = vllm(options.folder, options.vllm, options.threads)
    systems["demo"] = demo()
    if options.only:
        unknown = set(options.only) - set(systems)
        if unknown:
            raise SystemExit(f"--only {', '.join(sorted(unknown))}: there are {', '.join(systems)}")
        systems = {name: systems[name] for name in systems if name in options.only}
    return systems


def measure(name: str, system: Any, options: argparse.Namespace) -> tuple[dict[Row, Figures], dict[str, object]]:
    """Return one repeat of a system's rows, and facts of the idle servers."""
    if system is None:
        return {(name, "", clients): run_offline(options, clients) for clients in options.clients}, {}
    found: dict[Row, Figures] = {}
    with system() as served:
        for door, address in served.doors.items():
            ask(door, address, options, name, max(options.clients), 1)         # warms up
            for clients in [1] if name == "demo" else options.clients:
                found[name, door, clients] = ask(door, address, options, name, clients, options.requests)
    return found, served.facts


def ask(door: str, address: str, options: argparse.Namespace, name: str, clients: int, requests: int) -> Figures:
    vocab_size = DEMO_VOCAB if name == "demo" else SHAPES[options.model].vocab_size
    done = subprocess.run(
        [sys.executable, str(HERE / "served_client.py"), f"--{door}", address, "--clients", str(clients),
         "--requests", str(requests), "--input-tokens", str(options.input_tokens), "--tokens", str(options.tokens),
         "--vocab-size", str(vocab_size)], stdout=subprocess.PIPE, text=True, timeout=CLIENT_S)
    if done.returncode != 0:
        raise RuntimeError(f"the client of {name} over {door} failed, see above")
    figures: Figures = json.loads(done.stdout.splitlines()[-1])
    print(f"{name} {door}, {clients} clients: {figures['tokens_per_s']} tokens/s, first after "
          f"{figures['ttft_ms']['p50']} ms, then every {figures['tpot_ms']['p50']} ms", file=sys.stderr)
    return figures


# ==== the engine in one process ====


def run_offline(options: argparse.Namespace, clients: int) -> Figures:
    command = [sys.executable, str(HERE / "served.py"), "--offline", str(clients), "--model", options.model,
               "--threads", str(options.threads), "--requests", str(options.requests), "--tokens", str(options.tokens),
               "--input-tokens", str(options.input_tokens)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=CLIENT_S,
                          env=os.environ | {"OMP_NUM_THREADS": str(options.threads)})
    if done.returncode != 0:
        raise RuntimeError("the offline engine failed, see above")
    figures: Figures = json.loads(done.stdout.splitlines()[-1])
    print(f"offline, {clients} at once: {figures['tokens_per_s']} tokens/s", file=sys.stderr)
    return figures


def offline(options: argparse.Namespace) -> Figures:
    """Return the figures of waves of sequences, `requests` after one another."""
    from engine import prompts_of
    from engine_adapters import BLOCK_SIZE, MoesaicEngine

    clients = options.offline
    num_kv_tokens = clients * (options.input_tokens + options.tokens + BLOCK_SIZE)
    engine = MoesaicEngine(options.folder, options.threads, num_kv_tokens, "cpu", "bfloat16")
    seed, waves = secrets.randbits(32), []
    for wave in range(options.requests + 1):
        prompts = prompts_of(clients, options.input_tokens, engine.vocab_size, seed + wave)
        waves.append(engine.generate(prompts, options.tokens, CLIENT_S))
    engine.close()
    waves = waves[1:]                                   # the first warms up
    whole_s = sum(wave.prefill_s + wave.decode_s for wave in waves)
    step_ms = statistics.median(wave.decode_s for wave in waves) / (options.tokens - 1) * 1e3
    first_ms = statistics.median(wave.prefill_s for wave in waves) * 1e3
    return {"tokens_per_s": round(len(waves) * clients * options.tokens / whole_s, 2), "cached_tokens": 0,
            "ttft_ms": {"p50": round(first_ms, 2)}, "tpot_ms": {"p50": round(step_ms, 2)}}


# ==== the table ====


def value_of(figures: Figures, column: str) -> float | None:
    name, _, part = column.partition(" ")
    found = figures.get(name)
    return found.get(part) if part and isinstance(found, dict) else found


def medians(runs: dict[Row, list[Figures]]) -> dict[Row, dict[str, float]]:
    found: dict[Row, dict[str, float]] = {}
    for row, repeats in runs.items():
        columns = {column: [value for run in repeats if (value := value_of(run, column)) is not None]
                   for column in COLUMNS}
        found[row] = {column: round(statistics.median(values), 2) for column, values in columns.items() if values}
        found[row]["cached_tokens"] = max(run.get("cached_tokens", 0) for run in repeats)
    return found


def print_table(table: dict[Row, dict[str, float]]) -> None:
    print("| system | door | clients | " + " | ".join(COLUMNS) + " | |\n" + "|---" * (len(COLUMNS) + 4) + "|")
    for (name, door, clients), figures in table.items():
        cells = [f"{figures[column]:,.2f}" if column in figures else "" for column in COLUMNS]
        note = f"met {figures['cached_tokens']:.0f} cached tokens" if figures["cached_tokens"] else ""
        print(f"| {name} | {door} | {clients} | " + " | ".join(cells) + f" | {note} |")


def ratios_of(table: dict[Row, dict[str, float]], facts: dict[str, dict[str, Any]], most: int) -> dict[str, float]:
    """Return what the systems are compared by, where both sides were measured. `most`: of the numbers of clients."""
    found: dict[str, float] = {}

    def add(name: str, row: Row, other: Row, column: str = "tokens_per_s") -> None:
        ours, theirs = table.get(row, {}).get(column), table.get(other, {}).get(column)
        if ours and theirs:
            found[name] = round(ours / theirs, 3)

    one, peer, alone = ("moesaic-1", "http", most), ("vllm", "http", most), ("offline", "", most)
    add(f"HTTP over vllm serve, {most} clients", one, peer)
    add(f"time to the first token over vllm's, {most} clients", one, peer, "ttft_ms p50")
    add(f"HTTP over the offline engine, {most} clients", one, alone)
    add(f"gRPC over the offline engine, {most} clients", ("moesaic-1", "grpc", most), alone)
    for door in ("http", "grpc"):
        for num in (2, 3):
            ours = f"moesaic-{num}"
            add(f"{num} shards over 1, {door}, {most} clients", (ours, door, most), ("moesaic-1", door, most))
            add(f"inter-token of {num} shards over 1, {door}, 1 client", (ours, door, 1), ("moesaic-1", door, 1),
                "tpot_ms p50")
        tpot_ms = table.get(("demo", door, 1), {}).get("tpot_ms p50")
        if tpot_ms:
            found[f"demo tokens/s while decoding, {door}, 1 client"] = round(1e3 / tpot_ms, 1)
    for name, of in facts.items():
        memory = [(resident - kv_cache) / (1.15 * weights + 400e6) for resident, kv_cache, weights in
                  zip(*(of.get(key, ()) for key in ("resident_bytes", "kv_cache_bytes", "weights_bytes")), strict=True)]
        if memory:
            found[f"idle shard of {name}, without its KV cache, over 1.15 x its weights + 400 MB"] = round(
                max(memory), 3)
    return found


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(SHAPES), default="small", help="of make_checkpoint.py")
    parser.add_argument("--vllm", metavar="PYTHON", help="interpreter of vLLM's environment; default: without it")
    parser.add_argument("--shards", type=lambda text: [int(num) for num in text.split(",")], default=[1, 2, 3])
    parser.add_argument("--clients", type=lambda text: [int(num) for num in text.split(",")], default=[16, 1])
    parser.add_argument("--threads", type=int, default=2, help="of all shards together, at least one each")
    parser.add_argument("--requests", type=int, default=3, help="of each client")
    parser.add_argument("--input-tokens", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one repeat")
    parser.add_argument("--only", type=lambda text: text.split(","), help="systems: offline, moesaic-N, vllm, demo")
    parser.add_argument("--limit-s", type=float, default=3600.0, help="no server is brought up after that")
    parser.add_argument("--offline", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.folder = default_dir(options.model)
    options.repeats = 1 if options.quick else options.repeats
    return options


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))     # what was started is ended on the way out
    options = parse_options()
    if not options.folder.exists():
        make(options.model, options.folder)
    if options.offline:
        print(json.dumps(offline(options)))
        return
    systems = systems_of(options)
    runs: dict[Row, list[Figures]] = {}
    facts: dict[str, dict[str, Any]] = {}
    failures: list[str] = []
    until_s = time.monotonic() + options.limit_s
    for repeat in range(options.repeats):
        for name in systems if repeat % 2 == 0 else reversed(systems):
            if time.monotonic() > until_s:
                failures.append(f"{name}: no time was left for repeat {repeat + 1}")
                continue
            try:
                found, facts[name] = measure(name, systems[name], options)
            except (RuntimeError, OSError, subprocess.SubprocessError) as error:
                failures.append(f"{name}: {error}")
                print(failures[-1], file=sys.stderr)
                continue
            for row, figures in found.items():
                runs.setdefault(row, []).append(figures)
    report(options, medians(runs), facts, failures)


def report(options: argparse.Namespace, table: dict[Row, dict[str, float]], facts: dict[str, dict[str, Any]],
           failures: list[str]) -> None:
    table = dict(sorted(table.items()))
    ratios = ratios_of(table, facts, max(options.clients))
    print_table(table)
    print("\n".join(f"{name}: {value}" for name, value in ratios.items()))
    print(json.dumps({
        "benchmark": "served", "model": options.model, "threads": options.threads, "repeats": options.repeats,
        "input_tokens": options.input_tokens, "tokens": options.tokens, "ratios": ratios, "facts": facts,
        "rows": [{"system": name, "door": door, "clients": clients, **figures}
                 for (name, door, clients), figures in table.items()],
        "failures": failures, "machine": describe()}))
    sys.exit(1 if not table else 0)


if __name__ == "__main__":
    main()
