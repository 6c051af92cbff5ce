"""The whole table beside other engines in one command: engine.py on small and medium, then served.py.

  python benchmarks/beside_peers.py --vllm /peers/vllm/bin/python --llamacpp /peers/llamacpp/bin/python
  python benchmarks/beside_peers.py --quick --vllm ... --llamacpp ...       # about 12 minutes on two cores

Checkpoints and their GGUF are written first. Every part has a limit of time, all together take no more than --limit-s:
what does not fit is left out and named. The bandwidth bound of one sequence's decode is what a token reads of the
weights over the rate at which all threads read memory, measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine import describe
from make_checkpoint import SHAPES, Shape, default_dir

HERE = Path(__file__).parent
READ_BYTES, READ_PASSES = 1 << 30, 7
BF16 = 2
LAST_SERVER_S = 150.0           # before the end; one server takes about a minute


@dataclass(frozen=True)
class Target:
    name: str
    value: float | None
    limit: float
    is_least: bool = True       # else the most

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not measured"
        return "met" if (self.value >= self.limit) == self.is_least or self.value == self.limit else "missed"


class Budget:
    """The time that is left for all parts together."""

    def __init__(self, limit_s: float) -> None:
        self._until_s = time.monotonic() + limit_s

    @property
    def left_s(self) -> float:
        return max(0.0, self._until_s - time.monotonic())


def run(script: str, *arguments: str, budget: Budget) -> dict[str, Any]:
    """Return the last line of one script; what it prints before is shown. {"failed": why} when it fails or is late."""
    print(f"\n== {script} {' '.join(arguments)}", flush=True)
    if budget.left_s < 30:
        return {"failed": "no time was left"}
    process = subprocess.Popen([sys.executable, str(HERE / script), *arguments], stdout=subprocess.PIPE, text=True)
    try:
        printed, _ = process.communicate(timeout=budget.left_s)
    except subprocess.TimeoutExpired:
        process.terminate()                 # it takes down what it started
        try:
            process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
        return {"failed": "it took too long"}
    lines = printed.splitlines()
    print("\n".join(lines[:-1]), flush=True)
    if process.returncode != 0 or not lines:
        return {"failed": f"exit code {process.returncode}"}
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer


def read_bytes_per_s(num_threads: int) -> float:
    """Return the rate at which all threads together read memory, the best of some passes."""
    import torch

    torch.set_num_threads(num_threads)
    words = torch.ones(READ_BYTES // 4, dtype=torch.float32)
    best_s = float("inf")
    for _ in range(READ_PASSES):
        began_s = time.perf_counter()
        words.sum()
        best_s = min(best_s, time.perf_counter() - began_s)
    return READ_BYTES / best_s


def bytes_of_token(shape: Shape) -> int:
    """Return the bytes of weights that a decode step of one sequence reads."""
    hidden, heads, kv_heads = shape.hidden_size, shape.num_attention_heads, shape.num_key_value_heads
    attention = hidden * shape.head_dim * (2 * heads + 2 * kv_heads)
    experts = 3 * hidden * shape.moe_intermediate_size * shape.num_experts_per_tok
    layers = shape.num_hidden_layers * (attention + experts + hidden * shape.num_experts)
    return BF16 * (layers + hidden * shape.vocab_size)


def engine_targets(name: str, engines: dict[str, Any], bytes_per_s: float) -> list[Target]:
    least = {"small": 0.8, "medium": 0.9}[name]
    alone = engines.get("moesaic", {}).get("decode_batch_1_tokens_per_s")
    bound = bytes_per_s / bytes_of_token(SHAPES[name])
    over = engines.get("moesaic/vllm", {})
    return [Target(f"{name}: decode of one sequence over the bandwidth bound of {bound:,.0f}/s",
                   round(alone / bound, 3) if alone else None, least),
            *(Target(f"{name}: batch {size} over vLLM", over.get(f"decode_batch_{size}_tokens_per_s"), 1.3)
              for size in (8, 32)),
            Target(f"{name}: prefill of 2,048 over vLLM", over.get("prefill_2048_tokens_per_s"), 1.2)]


def served_targets(served: dict[str, Any]) -> list[Target]:
    ratios = served.get("ratios", {})
    wanted = (("HTTP over vllm serve, 16 clients", 1.3, True),
              ("time to the first token over vllm's, 16 clients", 1.0, False),
              ("HTTP over the offline engine, 16 clients", 0.9, True),
              ("gRPC over the offline engine, 16 clients", 0.9, True),
              ("2 shards over 1, http, 16 clients", 0.9, True), ("2 shards over 1, grpc, 16 clients", 0.9, True),
              ("inter-token of 3 shards over 1, http, 1 client", 1.6, False),
              ("demo tokens/s while decoding, http, 1 client", 40.0, True),
              ("idle shard of moesaic-1, without its KV cache, over 1.15 x its weights + 400 MB", 1.0, False))
    return [Target(name, ratios.get(name), limit, is_least) for name, limit, is_least in wanted]


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", metavar="PYTHON", help="interpreter of vLLM's environment; see README.md")
    parser.add_argument("--llamacpp", metavar="PYTHON", help="interpreter of llama.cpp's environment")
    parser.add_argument("--models", type=lambda text: text.split(","), default=["small", "medium"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="one repeat of everything, shorter")
    parser.add_argument("--limit-s", type=float, default=1500.0, help="of all parts together")
    return parser.parse_args()


def engine_arguments(name: str, options: argparse.Namespace) -> list[str]:
    peers = {peer: path for peer, path in (("vllm", options.vllm), ("llamacpp", options.llamacpp)) if path}
    compared = ["--compare", ",".join(peers)] if peers else []
    pythons = [part for peer, path in peers.items() for part in ("--python", f"{peer}={path}")]
    repeats = "1" if options.quick else {"small": "3", "medium": "2"}[name]
    return ["--model", str(default_dir(name)), "--threads", str(options.threads), *compared, *pythons,
            "--repeats", repeats, "--output-tokens", "64" if options.quick or name == "medium" else "128",
            "--prefill-turns", "1" if options.quick else "3"]


def main() -> None:
    options = parse_options()
    budget = Budget(options.limit_s)
    read = read_bytes_per_s(options.threads)
    print(f"{options.threads} threads read {read / 1e9:.1f} GB/s")
    results: dict[str, Any] = {}
    targets: list[Target] = []
    for name in options.models:
        run("make_checkpoint.py", name, *(["--gguf"] if options.llamacpp else []), budget=budget)
        results[name] = run("engine.py", *engine_arguments(name, options), budget=budget)
        targets += engine_targets(name, results[name], read)
    limit_s = int(max(0.0, budget.left_s - LAST_SERVER_S))
    served = ["--model", "small", "--threads", str(options.threads), "--limit-s", str(limit_s),
              *(["--quick"] if options.quick else []),
              *(["--vllm", options.vllm] if options.vllm else [])]
    results["served"] = run("served.py", *served, budget=budget)
    targets += served_targets(results["served"])
    print("\n| target | measured | wanted | |\n|---|---|---|---|")
    for target in targets:
        measured = "" if target.value is None else f"{target.value:,.3f}"
        print(f"| {target.name} | {measured} | {'>=' if target.is_least else '<='} {target.limit:g} "
              f"| {target.verdict} |")
    print(json.dumps({"benchmark": "beside_peers", "read_bytes_per_s": round(read), "machine": describe(), **results,
                      "targets": {target.name: target.value for target in targets}}))


if __name__ == "__main__":
    main()
